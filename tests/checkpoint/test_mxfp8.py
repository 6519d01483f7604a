"""MXFP8 against the format's definition, element by element, and through a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from openm3.checkpoint import CheckpointError, load_model, save_model
from openm3.checkpoint.mxfp8 import dequantize, quantize, scale_shape
from openm3.checkpoint.names import disk_entries
from openm3.config import M3Config

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


def e4m3(byte: int) -> float:
    """float8_e4m3fn by its definition (OCP OFP8): bias 7, no infinities, 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = (-1.0 if byte & 0x80 else 1.0), byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def widened(values, scales, dtype=torch.float32):
    out = torch.empty(values.shape, dtype=dtype)
    dequantize(values, scales, out)
    return out


def test_dequantizing_follows_the_formats_definition():
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)  # 254 values, no NaNs
    rows = torch.stack([codes, codes.flip(0)])
    scales = torch.randint(100, 150, (2, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = widened(rows.view(torch.float8_e4m3fn), scales)
    for r in range(2):
        for c in range(254):
            want = e4m3(int(rows[r, c])) * 2.0 ** (int(scales[r, c // 32]) - 127)
            assert got[r, c].item() == want
    assert torch.equal(widened(rows.view(torch.float8_e4m3fn), scales, torch.bfloat16).float(), got)  # exact there too


def test_scales_may_carry_the_e8m0_dtype_and_reach_both_ends():
    ones = torch.ones(1, 64).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0, 254]], dtype=torch.uint8)
    got = widened(ones, scales.view(torch.float8_e8m0fnu))
    assert got[0, 0].item() == 2.0**-127
    assert got[0, 63].item() == 2.0**127


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70),
    st.sampled_from([1.0, 1e-20, 1e-35, 1e8]),
)
def test_every_value_is_within_half_a_step_of_its_block(numbers, by):
    weight = torch.tensor([numbers]) * by
    values, scales = quantize(weight)
    back = widened(values, scales)
    assert scales.shape == scale_shape(weight.shape)
    for start in range(0, len(numbers), 32):
        block, got = weight[0, start : start + 32], back[0, start : start + 32]
        amax, scale = block.abs().max().item(), 2.0 ** (int(scales[0, start // 32]) - 127)
        assert amax <= 448 * scale  # nothing saturates
        assert amax == 0 or amax > 224 * scale or scale == 2.0**-127  # and no bit is given away
        bound = torch.maximum(block.abs() * 2.0**-4, torch.tensor(scale * 2.0**-10))  # half a step of 3 mantissa bits
        assert bool(((got - block).abs() <= bound).all())


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 1 << 30))
def test_quantizing_what_was_dequantized_changes_nothing(rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    once = widened(*quantize(weight))
    assert torch.equal(widened(*quantize(once)), once)


def test_this_scale_errs_less_than_the_floor_of_the_ocp_text():
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    blocks = weight.unflatten(1, (-1, 32))
    floor = torch.exp2(blocks.abs().amax(-1, keepdim=True).log2().floor() - 8)
    other = (blocks / floor).clamp(-448, 448).to(torch.float8_e4m3fn).float() * floor

    def rms(x):
        return (x - weight).square().mean().sqrt() / weight.square().mean().sqrt()

    assert 0.0260 < rms(widened(*quantize(weight))) < 0.0270
    assert 0.0285 < rms(other.flatten(1)) < 0.0300


def test_large_weights_go_through_in_pieces_with_the_same_result(monkeypatch):
    weight = torch.randn(37, 100, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight)
    monkeypatch.setattr("openm3.checkpoint.mxfp8.PIECE", 300)
    pieces = quantize(weight)
    assert torch.equal(whole[0].view(torch.uint8), pieces[0].view(torch.uint8))
    assert torch.equal(whole[1], pieces[1])
    assert torch.equal(widened(*whole), widened(*pieces))


def test_numbers_that_are_none_are_refused():
    with pytest.raises(CheckpointError, match="infinities or NaNs"):
        quantize(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(CheckpointError, match="reserves for NaN"):
        widened(torch.ones(1, 32).to(torch.float8_e4m3fn), torch.tensor([[255]], dtype=torch.uint8))


ROWS_OF_32 = {"hidden_size": 64, "intermediate_size": 96, "shared_intermediate_size": 32}


@pytest.mark.parametrize("changes", [ROWS_OF_32, {}])
def test_a_quantized_checkpoint_loads_as_the_rounded_model(tiny_model, tmp_path, changes):
    model = tiny_model(**changes)
    assert any(entry.quantized for entry in disk_entries(model.config))
    save_model(model, tmp_path / "m", quantization="mxfp8")
    back = load_model(tmp_path / "m")
    assert back.config == model.config  # in memory it is an ordinary model again
    own, got = dict(model.state_dict()), dict(back.state_dict())
    for entry in disk_entries(model.config):
        want = entry.view(own[entry.own_name])
        want = widened(*quantize(want)) if entry.quantized else want
        assert torch.equal(entry.view(got[entry.own_name]), want), entry.disk_name
    save_model(back, tmp_path / "again", quantization="mxfp8")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "m" / "config.json").read_text()
    assert all(torch.equal(t, got[n]) for n, t in load_model(tmp_path / "again").state_dict().items())


def test_the_files_are_as_the_released_ones(tiny_model, tmp_path):
    save_model(tiny_model(**ROWS_OF_32), tmp_path, quantization="mxfp8", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {k: raw[k] for k in ("quant_method", "weight_block_size", "activation_scheme")} == {
        "quant_method": "mxfp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic"
    }  # fmt: skip
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale_inv"):
            weight = tensors[name.removesuffix("_scale_inv")]
            assert weight.dtype == torch.float8_e4m3fn
            assert tensor.dtype == torch.uint8
            assert tensor.shape == (weight.shape[0], -(-weight.shape[1] // 32))
        elif tensor.dtype == torch.bfloat16 and tensor.ndim > 1:
            assert name.removesuffix(".weight") in raw["ignored_layers"]
    kept = ("gate.weight", "lm_head.weight", "embed_tokens.weight", "norm.weight")
    for name, tensor in tensors.items():
        if name.endswith(kept) or name.startswith(("vision_tower", "multi_modal_projector", "patch_merge_mlp")):
            assert tensor.dtype == torch.bfloat16, name
        if "experts." in name or ("self_attn" in name and "proj" in name and "vision" not in name):
            assert tensor.dtype in (torch.float8_e4m3fn, torch.uint8), name
    assert M3Config.from_pretrained(tmp_path).dtype == "bfloat16"


def test_rows_that_are_no_multiple_of_32_stay_as_they_are_and_are_listed(tiny_model, tmp_path):
    save_model(tiny_model(hidden_size=64), tmp_path, quantization="mxfp8", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignored_layers"]
    expert = "language_model.model.layers.1.block_sparse_moe.experts.0"
    assert tensors[f"{expert}.w1.weight"].dtype == torch.float8_e4m3fn  # rows of 64
    assert tensors[f"{expert}.w2.weight"].dtype == torch.bfloat16  # rows of 40
    assert f"{expert}.w2" in ignored
    assert f"{expert}.w1" not in ignored


def test_a_last_block_that_is_shorter_is_read_too(tiny_model, tmp_path):
    model = tiny_model()  # hidden size 48: the last block of a row has 16 values
    save_model(model, tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    values, scales = quantize(tensors[Q_PROJ])
    tensors |= {Q_PROJ: values, Q_PROJ + "_scale_inv": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).layers[0].attn.qkv_proj.weight[:96], widened(values, scales))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(Q_PROJ + "_scale_inv"), f"tensors missing: 1 ({Q_PROJ}_scale_inv)"),
        (
            lambda t: t.update({Q_PROJ + "_scale_inv": torch.zeros(96, 3, dtype=torch.uint8)}),
            "[96, 3], must be [96, 2]",
        ),
        (lambda t: t.update({Q_PROJ + "_scale_inv": torch.ones(96, 2)}), "_scale_inv F32, must be U8"),
        (lambda t: t.update({Q_PROJ: torch.zeros(96, 64)}), f"tensors unexpected: 1 ({Q_PROJ}_scale_inv)"),
        (lambda t: t[Q_PROJ + "_scale_inv"].fill_(255), "reserves for NaN"),
    ],
)
def test_scales_that_do_not_fit_their_weight_are_named(tiny_model, tmp_path, change, told):
    save_model(tiny_model(**ROWS_OF_32), tmp_path, quantization="mxfp8")
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "declared",
    [{"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "gptq", "bits": 4},
     {"quant_method": "mxfp8", "weight_block_size": [1, 16]}, {}],
)  # fmt: skip
def test_other_quantizations_are_refused_in_one_line(tiny_model, tmp_path, declared):
    save_model(tiny_model(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": declared}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="only unquantized checkpoints and 'mxfp8'"):
        load_model(tmp_path)
