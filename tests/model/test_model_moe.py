"""The mixture of experts against a loop over tokens and experts written out here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_tiny import gap, random_model, tiny

from openm3.model import text
from openm3.model.moe import balance_loss

SHAPES = [
    dict(),
    dict(num_local_experts=7, num_experts_per_tok=1),
    dict(num_local_experts=3, num_experts_per_tok=3),
    dict(num_local_experts=16, num_experts_per_tok=4, intermediate_size=20, hidden_size=36),
]


def moe_of(**changes):
    return random_model(tiny(**changes)).layers[1].mlp


def swiglu(gate, up, alpha=1.3, limit=0.8):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


@torch.no_grad()
def by_loop(moe, x):
    rows = []
    for token in x.double():
        scores = torch.sigmoid(moe.router.weight.double() @ token)
        chosen = (scores + moe.router.bias).topk(moe.router.topk).indices.tolist()
        total, out = sum(scores[e] for e in chosen), torch.zeros_like(token)
        for e in chosen:
            gate, up = (moe.experts.gate_up[e].double() @ token).chunk(2)
            out += 1.7 * scores[e] / total * (moe.experts.down[e].double() @ swiglu(gate, up))
        gate, up = (moe.shared.gate_up_proj.weight.double() @ token).chunk(2)
        rows.append(out + moe.shared.down_proj.weight.double() @ swiglu(gate, up))
    return torch.stack(rows)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_the_grouped_product_equals_a_loop_over_experts(changes, tokens):
    moe = moe_of(**changes)
    x = torch.randn(tokens, moe.router.weight.shape[1], generator=torch.manual_seed(0))
    assert gap(moe(x)[0].double(), by_loop(moe, x)) <= 1e-5


def test_all_tokens_at_one_expert_are_served_and_the_others_stay_idle():
    moe = moe_of(num_experts_per_tok=1)
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0]))
    x = torch.randn(30, 40, generator=torch.manual_seed(0))
    out, load, _ = moe(x)
    assert load.tolist() == [0, 0, 30, 0, 0]
    assert gap(out.double(), by_loop(moe, x)) <= 1e-5


def test_gradients_are_those_of_the_loop():
    moe = moe_of()
    x = torch.randn(20, 40, generator=torch.manual_seed(0))
    found = torch.autograd.grad(moe(x)[0].square().sum(), list(moe.parameters()))
    dense = torch.zeros(20, 40)
    chosen, weights, _ = moe.router(x)
    for t in range(20):
        for e, w in zip(chosen[t].tolist(), weights[t]):
            gate, up = (moe.experts.gate_up[e] @ x[t]).chunk(2)
            dense = dense.index_add(0, torch.tensor([t]), (w * (moe.experts.down[e] @ swiglu(gate, up)))[None])
    wanted = torch.autograd.grad((dense + moe.shared(x)).square().sum(), list(moe.parameters()))
    for one, other in zip(found, wanted):
        assert gap(one, other) <= 1e-4


@pytest.mark.parametrize("changes", SHAPES)
def test_router_weights_sum_to_the_scaling_factor(changes):
    router = moe_of(**changes).router
    _, weights, scores = router(torch.randn(50, router.weight.shape[1], generator=torch.manual_seed(0)))
    assert weights.dtype == scores.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.full((50,), 1.7))
    assert bool((weights > 0).all())


def test_the_bias_changes_the_choice_and_never_the_weights():
    router = moe_of().router
    x = torch.randn(200, 40, generator=torch.manual_seed(0))
    router.bias.zero_()
    before, weights, scores = router(x)
    router.bias.copy_(torch.tensor([0.4, 0.0, -0.4, 0.0, 0.0]))
    after, biased, same = router(x)
    assert torch.equal(same, scores)
    assert int((after == 0).sum()) > int((before == 0).sum())
    assert int((after == 2).sum()) < int((before == 2).sum())
    kept = (before.sort(-1).values == after.sort(-1).values).all(-1)
    assert 0 < int(kept.sum()) < 200
    by_expert = [w.gather(1, c.argsort(-1)) for c, w in ((before, weights), (after, biased))]
    assert torch.equal(by_expert[0][kept], by_expert[1][kept])
    unbiased = scores.gather(1, after)
    assert torch.allclose(biased, unbiased / unbiased.sum(-1, keepdim=True) * 1.7)


def test_the_bias_has_no_gradient_and_the_router_has():
    moe = moe_of()
    assert not moe.router.bias.requires_grad
    out, load, sums = moe(torch.randn(20, 40, generator=torch.manual_seed(0)))
    aux = balance_loss(load, sums)
    assert bool(torch.autograd.grad(out.sum(), moe.router.weight, retain_graph=True)[0].any())
    assert bool(torch.autograd.grad(aux, moe.router.weight)[0].any())


def test_load_counts_each_tokens_choices_and_the_balance_loss_is_1_when_balanced():
    moe = moe_of()
    x = torch.randn(40, 40, generator=torch.manual_seed(0))
    _, load, sums = moe(x)
    aux = balance_loss(load, sums)
    chosen, _, scores = moe.router(x)
    assert torch.equal(load, torch.bincount(chosen.flatten(), minlength=5).float())
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    assert abs(float(aux) - 5 * float((load / 80 * share).sum())) < 1e-6
    with torch.no_grad():
        moe.router.weight.zero_()  # equal scores: whatever the choice, the loss is 1
    assert abs(float(balance_loss(*moe(x)[1:])) - 1.0) < 1e-6


def test_the_models_output_has_a_load_for_each_moe_layer():
    model = random_model(tiny(moe_layers=(True, False, True)))
    out = model(torch.arange(5, 45))
    assert out.router_load.shape == (2, 5)
    assert out.router_load.sum(1).tolist() == [80, 80]
    assert out.router_aux.shape == ()
    assert random_model(tiny(moe_layers=(False,) * 3))(torch.arange(5, 45)).router_load is None


def test_without_gradients_long_runs_go_through_the_experts_in_pieces(monkeypatch):
    model, ids = random_model(tiny(moe_layers=(True, False, True))), torch.arange(45) % 40 + 5
    with torch.no_grad():
        whole = model(ids)
        monkeypatch.setattr(text, "PIECE", 16)
        seen = []
        handle = model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        pieces = model(ids)
    assert seen == [16, 16, 13]
    assert torch.allclose(pieces.hidden, whole.hidden, rtol=1e-5, atol=1e-6)  # products of other shapes sum otherwise
    assert torch.equal(pieces.router_load, whole.router_load)
    assert torch.allclose(pieces.router_aux, whole.router_aux, rtol=1e-6)
    handle.remove()
    model(ids)
    assert model(ids).hidden.requires_grad  # in one piece


def test_a_bf16_router_multiplies_in_float32_and_keeps_its_bias_unrounded():
    moe = moe_of()
    bias = moe.router.bias.clone()
    x = torch.randn(64, 40, generator=torch.manual_seed(0)).bfloat16()
    moe = moe.to(torch.bfloat16)
    assert torch.equal(moe.router.bias, bias)
    assert moe.router.bias.dtype == torch.float32
    scores = moe.router(x)[2]
    assert torch.equal(scores, torch.sigmoid(F.linear(x.float(), moe.router.weight.float())))
    assert moe(x)[0].dtype == torch.bfloat16
