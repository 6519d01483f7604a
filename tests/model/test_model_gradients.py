"""Where the two losses send their gradients: the index branch learns from its own loss and from nothing else."""

from __future__ import annotations

import pytest
import torch
from model_tiny import gap, prompt, random_model, tiny

INDEX = ("index_proj", "index_q_norm", "index_k_norm")
PARTS = (3, ("image", 1, 4, 6), 25, ("video", 2, 4, 4), 9)


def run(model, stage, **more):
    p = prompt(model.config, *PARTS)
    return p, model(p.ids, cu_seqlens=[0, 20, len(p.ids)], msa=stage, **p.media, **more)


def touched(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def index_branch(model):
    return {name for name, _ in model.named_parameters() if any(part in name for part in INDEX)}


@pytest.fixture
def model():
    return random_model(tiny())


@pytest.mark.parametrize("stage", ["train", "warmup"])
def test_the_index_loss_reaches_all_of_the_index_branch_and_nothing_else(model, stage):
    _, out = run(model, stage)
    out.index_loss.backward()
    assert touched(model) == index_branch(model)
    assert len(index_branch(model)) == 6
    assert all(p.grad is None for name, p in model.named_parameters() if name not in index_branch(model))


@pytest.mark.parametrize("stage", ["infer", "train", "warmup", "dense"])
def test_the_language_loss_never_reaches_the_index_branch(model, stage):
    p, out = run(model, stage)
    torch.nn.functional.cross_entropy(model.logits(out.hidden)[:-1], p.ids[1:]).backward()
    assert all(q.grad is None for name, q in model.named_parameters() if name in index_branch(model))
    assert touched(model) == {name for name, _ in model.named_parameters()} - index_branch(model)


@pytest.mark.parametrize("stage", ["train", "warmup"])
def test_the_index_loss_does_not_move_the_language_gradient(model, stage):
    gradients = []
    for weight in (0.0, 1.0):
        model.zero_grad()
        p, out = run(model, stage)
        loss = torch.nn.functional.cross_entropy(model.logits(out.hidden)[:-1], p.ids[1:])
        (loss + weight * out.index_loss).backward()
        gradients.append({n: q.grad.clone() for n, q in model.named_parameters() if n not in index_branch(model)})
    assert all(torch.equal(gradients[1][name], x) for name, x in gradients[0].items())


@pytest.mark.parametrize("stage", ["infer", "dense"])
def test_other_stages_have_no_index_loss(model, stage):
    assert run(model, stage)[1].index_loss is None


def test_the_index_loss_falls_when_it_is_followed(model):
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n in index_branch(model)], lr=0.02)
    for stage in ("warmup", "train"):
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = run(model, stage)[1].index_loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.85 * losses[0]


def test_the_index_loss_is_summed_over_layers(model):
    """In the warm-up all attention is dense: taking a layer's index branch away leaves the rest as it was."""
    whole, shares = float(run(model, "warmup")[1].index_loss.detach()), []
    for layer in model.layers[1:]:
        heads, layer.attn.index_heads = layer.attn.index_heads, 0
        shares.append(whole - float(run(model, "warmup")[1].index_loss.detach()))
        layer.attn.index_heads = heads
    assert min(shares) > 0.01
    assert abs(sum(shares) - whole) < 1e-5


@pytest.mark.parametrize("stage", ["train", "warmup"])
def test_some_index_queries_give_an_estimate_whose_mean_is_the_whole(model, stage):
    with torch.no_grad():
        p, out = run(model, stage)
        rows = torch.randperm(len(p.ids), generator=torch.manual_seed(0)).split(13)
        parts = [(len(r), float(run(model, stage, index_queries=r)[1].index_loss)) for r in rows]
    assert abs(sum(n * x for n, x in parts) / len(p.ids) - float(out.index_loss)) < 1e-5


def test_gradients_do_not_depend_on_how_sequences_are_packed(model):
    a, b = torch.arange(5, 45), torch.arange(30, 55)
    run_together = model(torch.cat((a, b)), cu_seqlens=[0, 40, 65], msa="train")
    run_together.hidden.square().sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for ids in (a, b):
        model(ids, msa="train").hidden.square().sum().backward()
    for name, p in model.named_parameters():
        if name in together and bool(together[name].any()):
            assert gap(p.grad, together[name]) <= 2e-4, name


@pytest.mark.parametrize("stage", ["train", "warmup"])
def test_the_gradient_is_the_slope_of_the_loss(model, stage):
    """Finite differences along a random direction of one matrix in each part of the network."""
    run(model, stage)[1].hidden.square().mean().backward()
    generator = torch.manual_seed(0)
    for name in ("layers.1.attn.qkv_proj.weight", "layers.2.mlp.experts.down", "projector.merge_2.bias", "norm.weight"):
        q = model.get_parameter(name)
        direction = torch.randn(q.shape, generator=generator)
        direction /= direction.norm()
        slope = float((q.grad * direction).sum())
        with torch.no_grad():
            values = []
            for step in (2e-3, -4e-3):
                q.add_(direction, alpha=step)
                values.append(float(run(model, stage)[1].hidden.double().square().mean()))
            q.add_(direction, alpha=2e-3)
        assert abs((values[0] - values[1]) / 4e-3 - slope) <= 0.03 * max(abs(slope), 1e-2), name
