"""Checkpoints go both ways between openm3 and transformers, and both networks then say the same."""

from __future__ import annotations

import json

import pytest
import torch

from openm3.checkpoint import load_model, save_model
from openm3.checkpoint.names import disk_entries
from openm3.config import M3Config

transformers = pytest.importorskip("transformers", minversion="5.12")

SHAPES = [
    {},
    {"tie_word_embeddings": True},
    {"moe_layers": (True, True, True), "sparse_layers": (False, False, False)},
    {"num_attention_heads": 9, "num_key_value_heads": 3, "sparse_layers": (False, False, False)},
]
PATCHES = (1, 4, 6)  # grid of one image, in patches


def _prompt():
    ids = torch.randint(5, 96, (30,), generator=torch.Generator().manual_seed(1))
    ids[4:10] = 3  # the image's tokens: 4 * 6 patches, four to a token
    pixels = torch.randn(24, 1176, generator=torch.Generator().manual_seed(2))
    return ids, pixels, torch.tensor([PATCHES])


@torch.no_grad()
def _ours(model):
    ids, pixels, grid = _prompt()
    return model.logits(model(ids, pixel_values=pixels, image_grid_thw=grid).hidden)


@torch.no_grad()
def _theirs(model):
    ids, pixels, grid = _prompt()
    out = model.eval()(input_ids=ids[None], pixel_values=pixels, image_grid_thw=grid)
    return out.logits[0]


def _reference(directory):
    return transformers.MiniMaxM3SparseForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")


@pytest.mark.parametrize("changes", SHAPES)
def test_transformers_reads_what_we_save(tiny_model, tmp_path, changes):
    model = tiny_model(**changes)
    save_model(model, tmp_path / "m")
    reference, told = transformers.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        tmp_path / "m", output_loading_info=True, attn_implementation="eager"
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    ours, theirs = _ours(model), _theirs(reference)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("changes", SHAPES)
def test_we_read_what_transformers_saves_in_its_own_spelling(tiny_model, tmp_path, changes):
    model = tiny_model(**changes)
    save_model(model, tmp_path / "ours")
    _reference(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "layer_types" in raw["text_config"]  # the other spelling indeed
    back = load_model(tmp_path / "theirs")
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in back.state_dict().items())
    assert torch.equal(_ours(back), _ours(model))


def test_the_names_on_disk_are_those_transformers_writes(tiny_config, tmp_path):
    from safetensors import safe_open

    config = tiny_config()
    config.save_pretrained(tmp_path / "c")
    made = transformers.AutoConfig.from_pretrained(tmp_path / "c")
    transformers.MiniMaxM3SparseForConditionalGeneration(made).save_pretrained(tmp_path / "t")
    with safe_open(tmp_path / "t" / "model.safetensors", "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert theirs == {entry.disk_name: entry.disk_shape for entry in disk_entries(config)}


def test_the_config_read_back_from_transformers_is_the_same_network(tiny_model, tmp_path):
    model = tiny_model()
    save_model(model, tmp_path / "ours")
    _reference(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert M3Config.from_pretrained(tmp_path / "theirs") == model.config


def test_transformers_reads_our_mxfp8_as_we_do(tiny_model, tmp_path):
    pytest.importorskip("accelerate")  # transformers asks for it
    save_model(tiny_model(hidden_size=64), tmp_path, quantization="mxfp8", dtype=torch.bfloat16)
    reference, told = transformers.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ours, theirs = _ours(load_model(tmp_path)), _theirs(reference.float())
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
