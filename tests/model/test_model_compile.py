"""A decoder layer, attention through MSA included, is one graph for `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from model_tiny import gap, random_model, tiny

from openm3.model import KVCache, plan_args
from openm3.model.attention import Step
from openm3.model.layers import rope_angles
from openm3.msa import Plan

MLP = tiny(moe_layers=(False, False, False))
EXPERTS = tiny(hidden_size=48, intermediate_size=32)  # grouped products compile in bf16 only, rows of 16 bytes


def step_of(model, plan, stage):
    text = model.config.text
    cos, sin = rope_angles(plan.positions, text.rotary_dim, text.rope_theta)
    return Step(plan, cos, sin, stage, None if plan.page_table is None else plan.slots, None)


def packed(model, offsets):
    return Plan.packed(offsets, **plan_args(model.config))


def paged(model, lens, offsets):
    table = torch.randperm(20, generator=torch.Generator().manual_seed(len(lens))).int().view(len(lens), -1)
    return Plan.paged(table, lens, offsets, **plan_args(model.config))


def compiled(layer):
    torch._dynamo.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("stage", ["infer", "train", "warmup", "dense"])
@pytest.mark.parametrize("config", [MLP, EXPERTS], ids=["mlp", "experts"])
def test_a_layer_compiles_whole_and_trains_as_it_does_eagerly(index, stage, config):
    dtype = torch.float32 if config is MLP else torch.bfloat16
    model = random_model(config).to(dtype)
    layer = model.layers[index]
    run = compiled(layer)
    for i, offsets in enumerate(([0, 40, 57], [0, 21, 57], [0, 1, 57])):
        step = step_of(model, packed(model, offsets), stage)
        x = torch.randn(57, config.text.hidden_size, generator=torch.Generator().manual_seed(i)).to(dtype)
        results = []
        for function in (layer, run):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                inputs = x.clone().requires_grad_()
                out, loss, _ = function(inputs, step, None)
            total = (out.float() * out.float().detach().sin()).sum() + (0.0 if loss is None else 5.0 * loss)
            wanted = [inputs, *(p for p in layer.parameters() if p.requires_grad)]
            grads = torch.autograd.grad(total, wanted, allow_unused=True)
            results.append([out, *([] if loss is None else [loss]), *grads])
        for eager, found in zip(*results):
            assert (eager is None) == (found is None)
            assert eager is None or gap(found, eager) <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_over_pages_compiles_once_for_all_lengths(index):
    model = random_model(MLP)
    layer = model.layers[index]
    run = compiled(layer)
    caches = [KVCache(MLP, 20).layers[index] for _ in range(2)]
    for i, (lens, offsets) in enumerate((([40, 17], [0, 40, 57]), ([50, 64], [0, 10, 57]), ([68, 80], [0, 18, 57]))):
        plan = paged(model, lens, offsets)
        x = torch.randn(57, MLP.text.hidden_size, generator=torch.Generator().manual_seed(i))
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            wanted = layer(x, step_of(model, plan, "infer"), caches[0])[0]
            found = run(x, step_of(model, plan, "infer"), caches[1])[0]
        assert gap(found, wanted) <= 1e-6
        assert torch.equal(caches[0].k, caches[1].k)
