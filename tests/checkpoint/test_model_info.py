"""Sizes: the released model's published figures, and whether a model fits a machine."""

from __future__ import annotations

import json

import pytest

from openm3.checkpoint import CheckpointError, info_dict, info_lines, model_info
from openm3.checkpoint.info import Device, cards_needed, devices, fits, gigabytes
from openm3.config import M3Config

GB = 10**9
RAM_24 = Device("cpu", "RAM", 24 * GB)
H200 = Device("cuda:0", "NVIDIA H200", 141 * GB)


def test_the_released_models_figures_are_the_published_ones():
    info = model_info(M3Config.preset("m3"))
    assert round(info.total / 1e9) == 427
    assert round(info.active / 1e9, 1) == 23.5
    assert round(info.active_with_head / 1e9, 1) == 24.7
    assert round(info.weights["bf16"] / 1e9) == 854
    assert 435 < info.weights["mxfp8"] / 1e9 < 450
    assert info.kv["bf16"] == 122_880 * 1_048_576
    assert info.index_keys["bf16"] == 14_592 * 1_048_576
    assert info.kv["fp8"] * 2 == info.kv["bf16"]


def test_counts_are_those_of_the_model_itself(tiny_config):
    from openm3.model import M3

    for changes in ({}, {"tie_word_embeddings": True}, {"moe_layers": (False,) * 3, "sparse_layers": (False,) * 3}):
        config = tiny_config(**changes)
        model = M3(config, device="meta")
        info = model_info(config, context=100)
        assert info.total == sum(t.numel() for t in model.state_dict().values())
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        text = sum(t.numel() for n, t in model.state_dict().items() if n.startswith(("layers.", "norm.")))
        assert info.active == text - experts + experts * 2 // 5
        assert info.active_with_head == info.active + 96 * 48


def test_mxfp8_bytes_are_what_a_save_writes(tiny_model, tmp_path):
    import torch

    from openm3.checkpoint import save_model

    model = tiny_model(hidden_size=64)
    save_model(model, tmp_path, quantization="mxfp8", dtype=torch.bfloat16)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert model_info(model.config).weights["mxfp8"] == len(data) - 8 - int.from_bytes(data[:8], "little")


def test_a_small_model_fits_and_the_released_one_does_not():
    nano, m3 = model_info(M3Config.preset("nano")), model_info(M3Config.preset("m3"))
    assert fits(nano, RAM_24) == (True, "fits cpu (RAM, 24.0 GB): 63.8 MB of float32 weights and 120 MB of cache")
    good, told = fits(m3, H200)
    assert not good
    assert told == "does not fit cuda:0 (NVIDIA H200, 141 GB): needs 854 GB of bf16 weights and 144 GB of cache"


def test_a_model_that_fits_with_a_shorter_context_says_with_how_many_tokens():
    info = model_info(M3Config.preset("nano"))
    device = Device("cpu", "RAM", 100_000_000)
    good, told = fits(info, device)
    tokens = int(told.split("up to ")[1].split()[0].replace(",", ""))
    assert good
    shorter, longer = (model_info(M3Config.preset("nano"), context=n) for n in (tokens, tokens + 1))
    weights = info.weights["float32"]
    assert shorter.cache("float32") + weights <= 90_000_000 < longer.cache("float32") + weights
    assert fits(shorter, device)[1].startswith("fits cpu (RAM, 100 MB): ")


def test_how_many_cards_would_do():
    info = model_info(M3Config.preset("m3"), context=131_072)
    assert cards_needed(info, "bf16", 141) == 8
    assert cards_needed(info, "mxfp8", 141) == 4
    assert cards_needed(info, "mxfp8", 80) == 8
    assert cards_needed(model_info(M3Config.preset("nano")), "bf16", 80) == 1


def test_lines_and_dict_say_the_same():
    config = M3Config.preset("m3")
    lines = info_lines(config, context=131_072, found=[RAM_24])
    assert lines[0].split() == ["parameters", "427.0", "B"]
    assert any(line.startswith("does not fit cpu (RAM, 24.0 GB): needs 1.71 TB") for line in lines)
    assert any("8 x 141 GB in bf16" in line and "4 x 141 GB in MXFP8" in line for line in lines)
    data = json.loads(json.dumps(info_dict(config, context=131_072, found=[RAM_24])))
    assert data["total"] == 427_040_140_160
    assert data["devices"][0]["fits"] is False
    assert data["gpus_needed"]["bf16"] == {"80 GB": 16, "141 GB": 8}


def test_this_machine_has_memory():
    found = devices()
    assert found[-1].name == "cpu"
    assert found[-1].total > 500_000_000


@pytest.mark.parametrize("context", [0, -5, 12_289])
def test_a_context_the_model_does_not_have_is_refused(context):
    with pytest.raises(CheckpointError, match=f"context = {context}: must be from 1 to the model's 12288 tokens"):
        model_info(M3Config.preset("nano"), context=context)


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (12_345, "12.3 KB"), (854_080_280_320, "854 GB"),
     (999_600_000, "1.00 GB"), (5 * 10**15, "5000 TB")],
)  # fmt: skip
def test_sizes_read_with_three_digits(size, told):
    assert gigabytes(size) == told
