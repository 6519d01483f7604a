"""Training of an M3 on one device: packed data, losses, optimizers, a resumable loop (docs/training.md)."""

from openm3.train.data import Batch, BatchLoader, Media, Sample, Source, pack, take
from openm3.train.losses import mean_loss
from openm3.train.plot import plot_run
from openm3.train.schedule import TrainConfig, TrainConfigError
from openm3.train.trainer import Outcome, Trainer, TrainingError

__all__ = [
    "Batch",
    "BatchLoader",
    "Media",
    "Outcome",
    "Sample",
    "Source",
    "TrainConfig",
    "TrainConfigError",
    "Trainer",
    "TrainingError",
    "mean_loss",
    "pack",
    "plot_run",
    "take",
]
