"""Saving: whole or not at all, whatever stops it; other files kept; memory of one tensor beyond the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

import openm3.checkpoint.save as save_module
from openm3.checkpoint import CheckpointError, load_model, save_model


def same(a, b) -> bool:
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


def listing(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}


def _work_until(point: int, work: Callable[[], None]) -> None:
    """In a child: dies with status 9 at the given point, ends with 0 if the work is done before it, 1 if it fails."""
    left = point

    def die(event: str, args: object) -> None:
        nonlocal left
        left -= event.startswith(("open", "os.", "shutil.", "ctypes."))
        if left == 0:
            os._exit(9)

    sys.addaudithook(die)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def crash_at_every_step(work: Callable[[], None], check: Callable[[int], None], before: Callable[[], None]) -> int:
    """Runs `work` in forked children that die, without any clean-up, at their first, second, ... touch of the disk.

    Every open, rename, link, mkdir and removal is such a point (Python's audit events), and so is every call into libc.
    `before` sets the scene, `check` judges what a crash left. Returns how many points there were.
    """
    point = 0
    while True:
        point += 1
        before()
        child = os.fork()
        if child == 0:
            _work_until(point, work)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), f"point {point}: the save failed by itself"
        check(status)
        if status == 0:
            return point


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("one_step", [True, False])
def test_a_crash_at_any_point_leaves_the_old_or_the_new_checkpoint(tiny_model, tmp_path, monkeypatch, one_step):
    if not one_step:  # a file system that cannot swap directories
        monkeypatch.setattr(save_module, "_exchange", lambda a, b: False)
    small = {"num_hidden_layers": 1, "sparse_layers": (True,), "moe_layers": (True,), "num_local_experts": 2}
    old, new = tiny_model(1, **small), tiny_model(2, dtype=torch.bfloat16, **small)
    wide = tiny_model(2, dtype=torch.bfloat16, **small).float()
    target = tmp_path / "m"
    outcomes = []

    def before():
        save_model(old, target, max_shard_bytes=100_000)
        (target / "tokenizer.json").write_text("kept")

    def check(status):
        found = load_model(target, dtype=torch.float32)
        outcomes.append("old" if same(found, old) else "new")
        assert outcomes[-1] == "old" or same(found, wide)
        assert (save_module.backup_of(target) if not target.exists() else target).joinpath("tokenizer.json").exists()
        save_model(old, target)  # whatever was left behind, the next save works and clears it away
        assert sorted(f.name for f in tmp_path.iterdir()) == ["m"]

    points = crash_at_every_step(lambda: save_model(new, target), check, before)
    assert points > 20
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, reverse=True)  # once new, new for good


def test_a_killed_process_leaves_the_old_checkpoint(tiny_model, tmp_path):
    save_model(tiny_model(1), tmp_path / "m")
    code = """
        import os, signal, sys
        import openm3.checkpoint.save as s
        from openm3.checkpoint import load_model
        model = load_model(sys.argv[1])
        write = s._write_tensor
        def killed(tensor, file):
            if file.tell() > 100_000:
                os.kill(os.getpid(), signal.SIGKILL)
            write(tensor, file)
        s._write_tensor = killed
        s.save_model(model, sys.argv[1])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "m"], capture_output=True)
    assert run.returncode == -9
    assert (tmp_path / ".m.saving" / "model.safetensors").exists()
    assert same(load_model(tmp_path / "m"), tiny_model(1))


def test_a_full_disk_is_one_clear_error_and_changes_nothing(tiny_model, tmp_path, monkeypatch):
    save_model(tiny_model(1), tmp_path / "m")
    before = listing(tmp_path / "m")

    def full(tensor, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module, "_write_tensor", full)
    with pytest.raises(CheckpointError, match=r"not saved, nothing changed: .*No space left"):
        save_model(tiny_model(2), tmp_path / "m")
    assert listing(tmp_path / "m") == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_a_save_over_a_checkpoint_keeps_its_other_files_and_drops_its_old_shards(tiny_model, tmp_path):
    target = tmp_path / "m"
    save_model(tiny_model(1), target, max_shard_bytes=100_000)
    (target / "tokenizer.json").write_text("tokens")
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("a")
    (target / "link").symlink_to("notes/a.txt")
    save_model(tiny_model(2), target)
    assert sorted(f.name for f in target.iterdir()) == [
        "config.json", "link", "model.safetensors", "notes", "tokenizer.json"
    ]  # fmt: skip
    assert (target / "link").is_symlink()
    assert (target / "link").read_text() == "a"
    assert same(load_model(target), tiny_model(2))


def test_extra_files_come_from_another_directory_and_leave_it_alone(tiny_model, tmp_path):
    source, target = tmp_path / "source", tmp_path / "m"
    save_model(tiny_model(1), source)
    (source / "tokenizer.json").write_text("new")
    (source / "adapter.safetensors").write_text("no")
    save_model(tiny_model(1), target)
    (target / "tokenizer.json").write_text("old")
    os.link(target / "tokenizer.json", tmp_path / "elsewhere")
    save_model(tiny_model(2), target, extra_files_from=source)
    assert sorted(f.name for f in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (target / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "elsewhere").read_text() == "old"
    assert same(load_model(target), tiny_model(2))
    with pytest.raises(CheckpointError, match="no such directory"):
        save_model(tiny_model(2), target, extra_files_from=tmp_path / "none")
    assert same(load_model(target), tiny_model(2))


@pytest.mark.parametrize("limit", [30_000, 100_000, 10_000_000])
@pytest.mark.parametrize("quantization", [None, "mxfp8"])
def test_shards_keep_under_the_limit_and_the_index_lists_every_tensor(tiny_model, tmp_path, limit, quantization):
    save_model(tiny_model(hidden_size=64), tmp_path, max_shard_bytes=limit, quantization=quantization)
    shards = sorted(tmp_path.glob("*.safetensors"))
    tensors = {shard.name: load_file(shard) for shard in shards}
    for held in tensors.values():
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) <= 2  # 2: a weight with its scales
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
        assert not (tmp_path / "model.safetensors.index.json").exists()
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, held in tensors.items() for name in held}
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in tensors.values() for t in held.values())
    assert [s.name for s in shards] == [f"model-{i:05}-of-{len(shards):05}.safetensors"
                                        for i in range(1, len(shards) + 1)]  # fmt: skip


def test_tensors_begin_at_multiples_of_their_item_size(tiny_model, tmp_path):
    save_model(tiny_model(hidden_size=64), tmp_path, quantization="mxfp8", dtype=torch.bfloat16)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    widths = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    found = {t["dtype"] for name, t in header.items() if name != "__metadata__"}
    assert found == set(widths)
    assert all(t["data_offsets"][0] % widths[t["dtype"]] == 0 for k, t in header.items() if k != "__metadata__")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"quantization": "int4"}, "must be None or 'mxfp8'"),
        ({"dtype": torch.int8}, "must be float32, bfloat16 or float16"),
        ({"dtype": torch.float64}, "must be float32, bfloat16 or float16"),
        ({"max_shard_bytes": 0}, "must be positive"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tiny_model, tmp_path, bad, told):
    with pytest.raises(CheckpointError, match=told):
        save_model(tiny_model(), tmp_path / "m", **bad)
    assert not (tmp_path / "m").exists()


def test_places_that_cannot_be_saved_into_are_refused(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save_model(tiny_model(), tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="current directory"):
        save_model(tiny_model(), ".")


def test_the_model_itself_is_not_changed_by_saving(tiny_model, tmp_path):
    model = tiny_model()
    save_model(model, tmp_path / "m", quantization="mxfp8", dtype=torch.bfloat16)
    assert same(model, tiny_model())
    assert model.config == tiny_model().config


MEASURE = """
import sys, torch
from openm3.checkpoint import load_model, save_model

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
save_model(load_model(sys.argv[2]), sys.argv[3] + "/small", quantization="mxfp8", dtype=torch.bfloat16)
model = load_model(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
save_model(model, sys.argv[3] + "/plain")
plain = status("VmHWM") - before
save_model(model, sys.argv[3] + "/bf16", dtype=torch.bfloat16)
save_model(model, sys.argv[3] + "/mxfp8", quantization="mxfp8", dtype=torch.bfloat16)
print(plain, status("VmHWM") - before, max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_save_is_the_model_and_its_largest_tensor(tiny_config, tmp_path):
    from openm3.model import M3

    config = tiny_config(hidden_size=256, vocab_size=40_000, dense_intermediate_size=24_000)
    save_model(M3(tiny_config()), tmp_path / "small")
    save_model(M3(config), tmp_path / "large")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(MEASURE), tmp_path / "large", tmp_path / "small",
                          tmp_path], text=True, capture_output=True, check=True)  # fmt: skip
    plain, peak, largest = map(int, run.stdout.split())
    print(
        f"beyond the model: {plain / 1e6:.0f} MB as it is, {peak / 1e6:.0f} MB converted; largest {largest / 1e6:.0f}"
    )
    assert plain <= 8 << 20  # nothing is copied
    margin = 24 << 20  # a piece of a weight (1 M float32 values) goes through a few stages as it is quantized
    assert peak <= largest + margin, (peak / 1e6, largest / 1e6)
