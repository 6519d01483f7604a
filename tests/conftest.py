"""A model directory for tests that only need one to be there: the bundled tokenizer and template, random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

WEIGHTS = Path(__file__).parent.parent / "src" / "openm3" / "weights" / "openm3-nano"


@pytest.fixture(scope="session")
def random_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer M3 with the bundled model's vocabulary and talk of no meaning. Not to be written to."""
    import torch

    from openm3.checkpoint import save_model
    from openm3.config import M3Config
    from openm3.model import M3

    nano = M3Config.preset("nano")
    text = dataclasses.replace(nano.text, num_hidden_layers=2, sparse_layers=(False, True), moe_layers=(False, True))
    config = dataclasses.replace(nano, text=text, vision=dataclasses.replace(nano.vision, num_hidden_layers=1))
    torch.manual_seed(0)
    model = M3(config)
    model.reset_parameters(std=0.05)
    directory = tmp_path_factory.mktemp("random") / "nano"
    save_model(model, directory, dtype=torch.bfloat16, max_shard_bytes=1_500_000, extra_files_from=WEIGHTS)
    return directory
