"""The table of names covers the model exactly, and is the one transformers writes."""

from __future__ import annotations

import pytest
import torch

from openm3.checkpoint.names import disk_entries
from openm3.config import M3Config
from openm3.model import M3

SHAPES = [
    {},
    {"tie_word_embeddings": True},
    {"moe_layers": (True, True, True), "sparse_layers": (False, False, False)},
    {"moe_layers": (False, False, False), "sparse_layers": (True, True, True)},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_every_number_of_the_model_is_in_exactly_one_entry(tiny_model, changes):
    model = tiny_model(**changes)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in own.values():
            tensor.zero_()
        for entry in disk_entries(model.config):
            entry.view(own[entry.own_name]).add_(1.0)
    assert set(own) == set(model.state_dict())
    for name, tensor in own.items():
        assert bool((tensor == 1.0).all()), name


@pytest.mark.parametrize("preset", ["m3", "nano"])
def test_the_presets_entries_are_the_models_parameters(preset):
    config = M3Config.preset(preset)
    model = M3(config, device="meta")
    entries = list(disk_entries(config))
    assert {e.own_name for e in entries} == set(model.state_dict())
    assert sum(e.numel for e in entries) == sum(t.numel() for t in model.state_dict().values())
    assert len({e.disk_name for e in entries}) == len(entries)


def test_fused_projections_hold_their_parts_in_order(tiny_model):
    model = tiny_model()
    by_name = {e.disk_name: e for e in disk_entries(model.config)}
    layer, head = model.layers[1], "language_model.model.layers.1."
    q = by_name[head + "self_attn.q_proj.weight"].view(layer.attn.qkv_proj.weight)
    k = by_name[head + "self_attn.k_proj.weight"].view(layer.attn.qkv_proj.weight)
    w1 = by_name[head + "block_sparse_moe.experts.3.w1.weight"].view(layer.mlp.experts.gate_up)
    w3 = by_name[head + "block_sparse_moe.experts.3.w3.weight"].view(layer.mlp.experts.gate_up)
    assert torch.equal(q, layer.attn.qkv_proj.weight[:96])
    assert torch.equal(k, layer.attn.qkv_proj.weight[96:128])
    assert torch.equal(torch.cat((w1, w3)), layer.mlp.experts.gate_up[3])


def test_the_released_sizes_add_up_to_427_billion():
    assert sum(e.numel for e in disk_entries(M3Config.preset("m3"))) == 427_040_140_160
