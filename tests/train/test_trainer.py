"""The loop: it learns, resumes to the bit, stops when told, and never leaves a half state behind."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import BrokenSource, CopySource, tiny_model, train_config

from openm3.train import Trainer, TrainingError, mean_loss
from openm3.train import state as state_module
from openm3.train.data import Batch, DataError, Media, Sample, pack
from openm3.train.metrics import read_metrics
from openm3.train.optim import is_index
from openm3.train.schedule import TrainConfigError
from openm3.train.state import StateError
from openm3.train.trainer import Outcome

EXACT = ("step", "stage", "lr", "tokens", "targets", "loss", "index_loss", "grad_norm", "index_grad_norm", "router_max",
         "router_min", "router_aux")  # fmt: skip


def record(run_dir) -> list[dict]:
    return [{key: row[key] for key in EXACT if key in row} for row in read_metrics(run_dir)]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class PictureSource(CopySource):
    """A picture of one of two shades, then its name; and a text sample, so that both ways are in each batch."""

    def batch(self, index: int) -> Batch:
        samples = []
        for i in range(4):
            shade = (index * 7 + i * 3) % 2
            rows = torch.full((4, 1176), 40 + 150 * shade, dtype=torch.uint8)
            samples.append(Sample([1, 46, 2, 10 + shade], [False, False, False, True],
                                  images=[Media(rows, torch.tensor([[1, 2, 2]]))]))  # fmt: skip
        return pack([*samples, Sample([3, 4], [False, True])], 64)


def test_a_tiny_m3_learns_to_copy_with_sparse_attention_on(tmp_path):
    model = tiny_model()
    config = train_config(steps=130, warmup_msa_steps=40, lr=8e-3, warmup_steps=10, seed=1, router_bias_rate=2e-3)
    trainer = Trainer(model, CopySource(samples=16), config, tmp_path)
    assert trainer.train() == Outcome(130, "done")
    rows = read_metrics(tmp_path)
    assert rows[0]["loss"] > 2.7  # 16 letters, no idea: ln 16 = 2.77
    assert rows[40]["stage"] == "train"
    assert rows[40]["loss"] > 1.0  # most is learned after the switch
    assert rows[-1]["loss"] < 0.5
    held_out = [CopySource(seed=99, samples=16).batch(0)]
    assert mean_loss(model, held_out, msa="infer") < 0.5  # with selection, as at inference


def test_a_model_learns_from_pixels(tmp_path):
    trainer = Trainer(tiny_model(), PictureSource(), train_config(steps=30, attention="dense", lr=1e-2), tmp_path)
    trainer.train()
    rows = read_metrics(tmp_path)
    assert rows[0]["loss"] > 2.0
    assert rows[-1]["loss"] < 0.3  # who does not look at the shade stays above 4 / 5 * ln 2 = 0.55


OPTIONS = dict(steps=9, warmup_steps=3, warmup_msa_steps=4, index_queries=40, accumulation=2, router_aux_weight=0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir, model = tmp_path_factory.mktemp("whole"), tiny_model()
    Trainer(model, CopySource(), train_config(**OPTIONS), run_dir).train()
    return record(run_dir), weights(model)


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_a_run_interrupted_at_any_step_and_resumed_is_the_same_to_the_bit(stop, tmp_path, uninterrupted):
    config = train_config(**OPTIONS)
    assert Trainer(tiny_model(), CopySource(), config, tmp_path).train(until=stop) == Outcome(stop, "until")
    torch.manual_seed(12345)  # nothing of this process may matter
    model = tiny_model(seed=7)
    trainer = Trainer(model, CopySource(), config, tmp_path)
    assert trainer.step == stop
    trainer.train()
    rows, final = uninterrupted
    assert record(tmp_path) == rows
    assert equal(weights(model), final)


def test_adamw_in_bfloat16_resumes_to_the_bit_too(tmp_path):
    config = train_config(steps=6, optimizer="adamw", precision="bf16")
    Trainer(whole := tiny_model(), CopySource(), config, tmp_path / "a").train()
    Trainer(tiny_model(), CopySource(), config, tmp_path / "b").train(until=3)
    Trainer(resumed := tiny_model(seed=7), CopySource(), config, tmp_path / "b").train()
    assert record(tmp_path / "a") == record(tmp_path / "b")
    assert equal(weights(whole), weights(resumed))
    assert all(p.dtype == torch.float32 for p in whole.parameters())


def test_resuming_restores_the_random_generators(tmp_path):
    Trainer(tiny_model(), CopySource(), train_config(), tmp_path).train(until=1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    Trainer(tiny_model(), CopySource(), train_config(), tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_batches_from_workers_give_the_same_run(tmp_path, uninterrupted):
    model = tiny_model()
    Trainer(model, CopySource(), train_config(**OPTIONS, workers=2), tmp_path).train()
    assert record(tmp_path) == uninterrupted[0]


def test_the_run_switches_from_dense_warm_up_to_selection(tmp_path, uninterrupted):
    rows, _ = uninterrupted
    assert [row["stage"] for row in rows] == ["warmup"] * 4 + ["train"] * 5
    assert all(row["index_loss"] > 0 for row in rows)
    config = train_config(attention="dense", steps=3)
    model = tiny_model()
    before = weights(model)
    Trainer(model, CopySource(), config, tmp_path).train()
    assert all(row["stage"] == "dense" and "index_loss" not in row for row in record(tmp_path))
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in after if is_index(name))


def test_the_index_loss_changes_nothing_but_the_index_branch(tmp_path):
    """Nothing is selected in warm-up: with any weight of the index loss, the rest trains the same to the bit."""
    models = []
    for weight in (0.0, 100.0):
        models.append(tiny_model())
        config = train_config(steps=4, warmup_msa_steps=4, index_loss_weight=weight, clip=0.05)
        Trainer(models[-1], CopySource(), config, tmp_path / str(weight)).train()
    without, with_loss = (weights(model) for model in models)
    for name in without:
        assert torch.equal(without[name], with_loss[name]) != is_index(name), name


def test_accumulated_batches_weigh_every_target_equally(tmp_path):
    """Two batches accumulated are one batch of both: the same first loss and gradient norm."""

    class Uneven(CopySource):
        def batch(self, index: int) -> Batch:
            return CopySource(self.seed, samples=(6, 2)[index % 2]).batch(index)

    class Joined(CopySource):
        def batch(self, index: int) -> Batch:
            parts = [Uneven(self.seed).batch(2 * index + i) for i in range(2)]
            starts = parts[1].cu_seqlens[1:] + parts[0].tokens
            return Batch(torch.cat([p.input_ids for p in parts]), torch.cat([p.labels for p in parts]),
                         torch.cat([parts[0].cu_seqlens, starts]))  # fmt: skip

    Trainer(tiny_model(), Uneven(), train_config(steps=1, accumulation=2), tmp_path / "a").train()
    Trainer(tiny_model(), Joined(), train_config(steps=1), tmp_path / "b").train()
    (a,), (b,) = record(tmp_path / "a"), record(tmp_path / "b")
    for key in ("loss", "index_loss", "grad_norm", "index_grad_norm", "router_max"):
        assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_saved_state(tmp_path):
    config = train_config(save_every=2, log_every=1)
    Trainer(tiny_model(), CopySource(), config, tmp_path).train(until=4)
    kept = (tmp_path / "state" / "model.safetensors").read_bytes()
    model = tiny_model()
    trainer = Trainer(model, CopySource(), config, tmp_path)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 5: loss = nan.*state saved before is in"):
        trainer.train()
    assert (tmp_path / "state" / "model.safetensors").read_bytes() == kept
    assert len(read_metrics(tmp_path)) == 4
    assert Trainer(tiny_model(), CopySource(), config, tmp_path).train().reason == "done"


def test_a_time_limit_saves_and_returns(tmp_path):
    trainer = Trainer(tiny_model(), CopySource(), train_config(steps=10_000), tmp_path)
    outcome = trainer.train(max_seconds=0.5)
    assert outcome.reason == "time"
    assert 0 < outcome.step < 10_000
    assert Trainer(tiny_model(), CopySource(), train_config(steps=10_000), tmp_path).step == outcome.step


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_step_with_its_state_saved(number, tmp_path):
    before = signal.getsignal(number)
    trainer = Trainer(tiny_model(), CopySource(), train_config(steps=10_000), tmp_path)
    threading.Timer(0.4, os.kill, (os.getpid(), number)).start()
    outcome = trainer.train()
    assert outcome.reason == signal.Signals(number).name
    assert Trainer(tiny_model(), CopySource(), train_config(steps=10_000), tmp_path).step == outcome.step
    assert signal.getsignal(number) is before


RUN = """
import sys
from tiny import CopySource, tiny_model, train_config
from openm3.train import Trainer
if __name__ == "__main__":
    config = train_config(steps=100_000, save_every=1, log_every=1)
    Trainer(tiny_model(), CopySource(), config, sys.argv[1]).train()
"""


def test_a_run_killed_at_any_moment_leaves_a_state_to_resume_from(tmp_path):
    """Saving after every step, so that the kill falls into the middle of a save."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    steps = []
    for i in range(2):
        process = subprocess.Popen([sys.executable, script, tmp_path / "run"], env=env, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while len(steps) == i and time.monotonic() < end:
            time.sleep(0.03 + 0.007 * i)
            rows = read_metrics(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").is_file() else []
            if rows and rows[-1]["step"] > (steps[-1] if steps else 0) + 3:
                process.kill()
                process.wait()
                config = train_config(steps=100_000, save_every=1, log_every=1)
                steps.append(Trainer(tiny_model(), CopySource(), config, tmp_path / "run").step)
    assert len(steps) == 2
    assert 0 < steps[0] < steps[1]


def test_a_crash_while_saving_leaves_the_old_state(tmp_path, monkeypatch):
    config = train_config(steps=4, save_every=2)
    trainer = Trainer(tiny_model(), CopySource(), config, tmp_path)
    trainer.train(until=2)
    real = state_module.save_file

    def fails(tensors, path):
        if path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        real(tensors, path)

    monkeypatch.setattr(state_module, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    monkeypatch.undo()
    resumed = Trainer(tiny_model(), CopySource(), config, tmp_path)
    assert resumed.step == 2
    assert resumed.train() == Outcome(4, "done")
    (tmp_path / "state").rename(tmp_path / "state.old")  # a crash between the two renames of a save
    assert Trainer(tiny_model(), CopySource(), config, tmp_path).step == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: (state / "state.json").write_text("{"), "state.json: not readable"),
        (lambda state: (state / "optimizer.safetensors").write_bytes(b"x" * 40), "not readable"),
        (lambda state: (state / "model.safetensors").unlink(), "not readable"),
    ],
)
def test_a_damaged_state_is_one_clear_error(damage, message, tmp_path):
    Trainer(tiny_model(), CopySource(), train_config(), tmp_path).train(until=1)
    damage(tmp_path / "state")
    with pytest.raises(StateError, match=message):
        Trainer(tiny_model(), CopySource(), train_config(), tmp_path)


def test_a_state_is_refused_for_another_config_or_model(tmp_path):
    Trainer(tiny_model(), CopySource(), train_config(), tmp_path).train(until=1)
    Trainer(tiny_model(), CopySource(), train_config(log_every=1, save_every=1, workers=1), tmp_path)
    with pytest.raises(TrainConfigError, match=r"lr = 0.01: the run in .* was started with 0.005"):
        Trainer(tiny_model(), CopySource(), train_config(lr=0.01), tmp_path)
    with pytest.raises(StateError, match="another model"):
        Trainer(tiny_model(hidden_size=48), CopySource(), train_config(), tmp_path)


def test_evaluation_is_recorded_and_changes_nothing(tmp_path, uninterrupted):
    calls = []

    def evaluate(model, step):
        calls.append((step, model.training))
        return {"loss": 1.5}

    trainer = Trainer(tiny_model(), CopySource(), train_config(**OPTIONS, eval_every=4), tmp_path, evaluate=evaluate)
    trainer.train()
    assert calls == [(4, False), (8, False), (9, False)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval" in row] == [4, 8, 9]
    assert [row for row in record(tmp_path) if "loss" in row] == uninterrupted[0]


def test_errors_of_the_data_reach_the_caller(tmp_path):
    with pytest.raises(KeyError, match="the well is dry"):
        Trainer(tiny_model(), BrokenSource(bad=2), train_config(workers=1), tmp_path / "a").train()
    with pytest.raises(DataError, match="a batch of 208 tokens at step 0: more than tokens_per_batch = 100"):
        Trainer(tiny_model(), CopySource(), train_config(tokens_per_batch=100), tmp_path / "b").train()


def test_the_guide_s_example_runs_as_written(tmp_path):
    guide = Path(__file__).parents[2] / "docs" / "training.md"
    (code,) = [part.split("```")[0] for part in guide.read_text(encoding="utf-8").split("```python\n")[1:]]
    assert code.count("steps=300") == 1
    (tmp_path / "guide.py").write_text(code.replace("steps=300", "steps=21"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "guide.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Outcome(step=21, reason='done')" in done.stdout
    assert (tmp_path / "runs" / "repeats" / "plot.png").stat().st_size > 10_000
    assert (tmp_path / "runs" / "repeats" / "model" / "config.json").is_file()


@pytest.mark.soak
@pytest.mark.skipif("'soak' not in config.getoption('markexpr')", reason="run by make soak")
def test_compiled_layers_train_like_plain_ones(tmp_path):
    """Compiling takes a minute on two cores. Batches differ in length, and must not compile anew."""
    for compiled in (False, True):
        config = train_config(steps=12, precision="bf16", compile=compiled, warmup_msa_steps=4)
        Trainer(tiny_model(), CopySource(), config, tmp_path / str(compiled)).train()
    plain, fast = record(tmp_path / "False"), record(tmp_path / "True")
    for a, b in zip(plain, fast):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.03)  # other fusions round bfloat16 elsewhere
