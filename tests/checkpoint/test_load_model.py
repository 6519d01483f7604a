"""Loading: whole or not at all, one error that names everything, memory of the model plus its largest tensor."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from openm3.checkpoint import CheckpointError, load_model, resolve, save_model
from openm3.config import ConfigError, M3Config

EMBED = "language_model.model.embed_tokens.weight"
NORM = "language_model.model.norm.weight"
BIAS = "language_model.model.layers.1.block_sparse_moe.e_score_correction_bias"


def index_of(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())


def shard_of(directory, name):
    return directory / index_of(directory)["weight_map"][name]


def change(directory, name, edit):
    """Edits the tensors of the shard that holds `name`: `edit` gets the dict of them; the index follows."""
    path, index = shard_of(directory, name), index_of(directory)
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    old = {k: f for k, f in index["weight_map"].items() if f != path.name}
    index["weight_map"] = old | dict.fromkeys(tensors, path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def error_of(directory) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a, b) -> bool:
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


def test_a_saved_model_comes_back_bit_for_bit(tiny_model, saved):
    assert len(set(index_of(saved)["weight_map"].values())) > 3
    assert same(load_model(saved), tiny_model())


def test_one_file_without_an_index_loads(tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert same(load_model(tmp_path / "m"), tiny_model())


def test_the_dtype_is_the_callers_and_the_router_bias_stays_float32(tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path / "m", dtype=torch.bfloat16)
    assert M3Config.from_pretrained(tmp_path / "m").dtype == "bfloat16"
    bias = tiny_model().layers[1].mlp.router.bias
    for dtype, want in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = load_model(tmp_path / "m", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {want}
        assert torch.equal(model.layers[1].mlp.router.bias, bias)  # bfloat16 would have rounded it
        assert torch.equal(model.embed.weight.float(), tiny_model().embed.weight.bfloat16().float())


def test_all_faults_of_all_shards_are_named_in_one_error(saved):
    change(saved, EMBED, lambda t: t.update({EMBED: t[EMBED][:-1].clone(), "surprise.weight": torch.zeros(2)}))
    change(saved, BIAS, lambda t: t.pop(BIAS))
    change(saved, NORM, lambda t: t.update({NORM: torch.zeros(48, dtype=torch.int32)}))
    told = error_of(saved)
    assert f"tensors missing: 1 ({BIAS})" in told
    assert f"tensors misshaped: 1 ({EMBED} [95, 48], must be [96, 48])" in told
    assert "tensors unexpected: 1 (surprise.weight)" in told
    assert f"tensors of a dtype that is not read: 1 ({NORM} I32)" in told


def test_a_long_list_of_faults_is_cut_and_counted(saved, tiny_config):
    (saved / "config.json").unlink()
    tiny_config(num_hidden_layers=4, sparse_layers=(True,) * 4, moe_layers=(True,) * 4).save_pretrained(saved)
    told = error_of(saved)
    assert "tensors missing: " in told
    assert " more)" in told
    assert len(told) < 2000


def test_a_missing_shard_is_named_and_its_tensors_are_not_listed(saved):
    lost = shard_of(saved, BIAS)
    lost.unlink()
    told = error_of(saved)
    assert f"files missing: 1 ({lost.name})" in told
    assert "tensors missing" not in told
    assert "tensors unexpected" not in told


@pytest.mark.parametrize("keep", [0.5, 0.999, 0.0])
def test_a_shard_cut_short_is_named(saved, keep):
    cut = shard_of(saved, BIAS)
    data = cut.read_bytes()
    cut.write_bytes(data[: int(len(data) * keep)])
    told = error_of(saved)
    assert f"files cut short or damaged: 1 ({cut.name}: " in told
    assert "tensors missing" not in told
    assert "tensors unexpected" not in told


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_file_gets_past_as_anything_but_our_error(saved, data):
    path = shard_of(saved, BIAS)
    good = path.read_bytes()
    bad = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(bad[: data.draw(st.sampled_from([len(bad), header, header // 2]))]))
    try:
        with contextlib.suppress(CheckpointError):
            load_model(saved)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x08" + b"\0" * 7 + b"notjson!", b"x"])
def test_a_corrupt_header_is_named(saved, garbage):
    bad = shard_of(saved, BIAS)
    bad.write_bytes(garbage)
    assert f"{bad.name}: " in error_of(saved)


def test_an_index_that_lists_what_its_file_does_not_hold_is_refused(saved):
    index = index_of(saved)
    files = sorted(set(index["weight_map"].values()))
    wrong = next(f for f in files if f != index["weight_map"][NORM])
    index["weight_map"]["ghost.weight"] = wrong
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"its file does not hold: 1 (ghost.weight in {wrong})" in error_of(saved)


@pytest.mark.parametrize(
    "file", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "a\\b.safetensors", 3, ""]
)
def test_an_index_that_points_out_of_the_directory_is_refused(saved, file):
    index = index_of(saved)
    index["weight_map"][NORM] = file
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "must be a .safetensors file beside the index" in error_of(saved)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_without_a_map_is_refused(saved, text):
    (saved / "model.safetensors.index.json").write_text(text)
    assert "no weight_map" in error_of(saved)


def test_an_index_that_is_not_json_is_refused(saved):
    (saved / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        load_model(saved)


def test_a_directory_of_pickles_is_refused(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert "holds neither model.safetensors nor" in error_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle files (pytorch_model.bin)" in error_of(tmp_path)


def test_multi_token_prediction_tensors_are_ignored_and_told_once(tiny_model, saved, caplog):
    names = ["language_model.model.mtp.layers.0.x.weight", "mtp.norm.weight"]
    change(saved, NORM, lambda t: t.update({name: torch.zeros(3) for name in names}))
    with caplog.at_level(logging.WARNING, "openm3"):
        assert same(load_model(saved), tiny_model())
    assert [r.getMessage() for r in caplog.records] == [
        "2 multi-token-prediction tensors (mtp.) are in the checkpoint and are ignored"
    ]
    change(saved, NORM, lambda t: t.update({"notmtp.norm.weight": torch.zeros(3)}))
    assert "tensors unexpected: 1 (notmtp.norm.weight)" in error_of(saved)


def test_a_head_in_a_checkpoint_that_ties_it_is_unexpected(tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path / "m", max_shard_bytes=100_000)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    assert "tensors unexpected: 1 (language_model.lm_head.weight)" in error_of(tmp_path / "m")


def test_names_that_lead_nowhere_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, told in [
        (tmp_path / "nothing", "no such directory"),
        ("./nothing/at/all", "no such directory"),
        ("someorg/no-such-model", "`openm3 download someorg/no-such-model`"),
        (__file__, "is a file"),
    ]:
        with pytest.raises(CheckpointError, match=told.replace(".", r"\.")):
            resolve(name)


def test_a_device_that_is_not_there_is_refused(saved):
    with pytest.raises(CheckpointError, match="must be 'cpu', 'cuda'"):
        load_model(saved, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="PyTorch sees no CUDA device"):
            load_model(saved, device="cuda")


def test_a_model_larger_than_the_memory_is_refused_before_any_is_taken(saved, monkeypatch):
    monkeypatch.setattr("openm3.checkpoint.info._ram", lambda: 100_000)
    assert "see `openm3 info`" in error_of(saved)


def test_loading_draws_no_random_numbers_and_does_not_import_the_compiler(saved):
    code = "import sys, torch; from openm3.checkpoint import load_model; before = torch.get_rng_state()\n"
    code += "model = load_model(sys.argv[1]); assert torch.equal(before, torch.get_rng_state())\n"
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, saved], check=True)


MEASURE = """
import sys, torch
from openm3.checkpoint import load_model, resolve
from openm3.checkpoint.load import MappedTensors
import openm3.model

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
load_model(sys.argv[2])  # a small one first: imports and allocator pools are not the load's
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = load_model(sys.argv[1])
own = list(model.parameters()) + list(model.buffers())
print(status("VmHWM") - before, sum(t.nbytes for t in own), max(t.nbytes for t in own))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantization", [None, "mxfp8"])
def test_peak_memory_is_the_model_and_its_largest_tensor(tiny_config, tmp_path, quantization):
    from openm3.model import M3

    config = tiny_config(hidden_size=256, vocab_size=40_000, dense_intermediate_size=24_000,
                         moe_layers=(False, False, True), intermediate_size=4000, num_local_experts=12)  # fmt: skip
    small, large = tmp_path / "small", tmp_path / "large"
    save_model(M3(tiny_config()), small, quantization=quantization)
    save_model(M3(config), large, quantization=quantization, max_shard_bytes=150_000_000, dtype=torch.bfloat16)
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(MEASURE), large, small], text=True,
                         capture_output=True, check=True)  # fmt: skip
    peak, model, largest = map(int, run.stdout.split())
    assert model > 350e6
    margin = 16 << 20  # a piece of a weight (1 M float32 values) on its way, and the allocator
    print(f"peak {peak / 1e6:.0f} MB, model {model / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert peak <= model + largest + margin, (peak / 1e6, model / 1e6, largest / 1e6)
    shutil.rmtree(large)
