"""Who is optimized how, Muon's arithmetic, and the learning rate over time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CopySource, tiny_model, train_config

from openm3.train.losses import forward, language_loss
from openm3.train.optim import Muon, build_optimizers, clip_gradients, group_of, is_index, orthogonalize, parts_of
from openm3.train.schedule import TrainConfig, TrainConfigError, lr_factor


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(optimizer, tied):
    model = tiny_model(tie_word_embeddings=tied)
    optimizers = build_optimizers(model, train_config(optimizer=optimizer))
    seen = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == set(model.parameters())
    for group in (group for o in optimizers for group in o.param_groups if group["weight_decay"] == 0):
        assert all(p.dim() == 1 for p in group["params"])


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    groups = {}
    for name, parameter in tiny_model(tie_word_embeddings=False).named_parameters():
        groups.setdefault(group_of(name, parameter), set()).add(name)
    hidden = ("0.attn.qkv_proj.weight", "1.attn.o_proj.weight", "0.mlp.gate_up_proj.weight", "0.mlp.down_proj.weight",
              "1.mlp.experts.gate_up", "1.mlp.experts.down", "1.mlp.shared.gate_up_proj.weight",
              "1.mlp.shared.down_proj.weight")  # fmt: skip
    assert {f"layers.{name}" for name in hidden} <= groups["muon"]
    others = ("embed.weight", "lm_head.weight", "layers.1.mlp.router.weight", "layers.1.attn.index_proj.weight")
    assert set(others) <= groups["decay"]
    assert {"norm.weight", "layers.1.attn.index_q_norm.weight", "layers.0.attn.q_norm.weight"} <= groups["plain"]
    rest = ("embed.", "lm_head.", "router.", "index_", "norm", "patch_embed", "bias")
    assert not [name for name in groups["muon"] if any(part in name for part in rest)]


def test_the_language_loss_gives_the_index_branch_no_gradient_and_the_index_loss_nothing_else():
    model, batch = tiny_model(), CopySource().batch(0)
    output = forward(model, batch, msa="train")
    language_loss(model, output.hidden, batch).backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        silent = parameter.grad is None or not parameter.grad.any()
        if is_index(name) or name.startswith(("vision", "projector")):
            assert silent, name
        else:
            assert not silent, name
    model.zero_grad()
    output.index_loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_index(name), name


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_orthogonalized_matrices_have_singular_values_near_one(n, out, width, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(n, out, width, generator=generator) * 10 ** torch.randn(n, 1, 1, generator=generator)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    # the quintic maps [0.02, 1] (relative to the norm) into this band in 5 steps; smaller ones have not arrived yet
    arrived = s / matrices.norm(dim=(-2, -1))[:, None] > 0.02
    assert values.max() < 1.25
    assert (torch.diagonal(u.mT @ result @ vt.mT, dim1=-2, dim2=-1)[arrived] > 0.6).all()
    torch.testing.assert_close(orthogonalize(matrices.mT), result.mT, atol=2e-4, rtol=2e-4)


def test_a_zero_gradient_moves_nothing_but_the_decay():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], [[3]], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    torch.testing.assert_close(weight.data, torch.full((3, 4), 0.95))


def test_muon_treats_fused_and_stacked_matrices_as_their_parts():
    """One fused [7, 5], a stack [3, 4, 5] of two parts each: as if every part were a parameter of its own."""
    torch.manual_seed(0)
    fused, stack = torch.randn(7, 5), torch.randn(3, 4, 5)
    together = [torch.nn.Parameter(fused.clone()), torch.nn.Parameter(stack.clone())]
    pieces = [*fused.split([4, 3]), *[part for matrix in stack for part in matrix.split(2)]]
    apart = [torch.nn.Parameter(piece.clone()) for piece in pieces]
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    one = Muon(together, [[4, 3], [2, 2]], **options)
    many = Muon(apart, [[p.shape[0]] for p in apart], **options)
    for _ in range(3):
        gradients = [torch.randn(7, 5), torch.randn(3, 4, 5)]
        for p, g in zip(together, gradients):
            p.grad = g
        for p, g in zip(apart, [*gradients[0].split([4, 3]), *[x for m in gradients[1] for x in m.split(2)]]):
            p.grad = g.clone()
        one.step()
        many.step()
    torch.testing.assert_close(together[0].data, torch.cat([p.data for p in apart[:2]]))
    torch.testing.assert_close(together[1].data, torch.cat([p.data for p in apart[2:]]).view(3, 4, 5))


def test_muon_agrees_with_torch_s_on_single_matrices():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    muon = Muon([ours], [[24]], lr=0.02, momentum=0.95, weight_decay=0.1)
    options = dict(lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    reference = torch.optim.Muon([theirs], **options)
    for _ in range(4):
        ours.grad = torch.randn(24, 16)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    moved = (theirs - 1).detach().norm()
    assert (ours - theirs).detach().norm() < 0.03 * moved  # torch's runs in bfloat16


def test_an_update_of_muon_is_as_large_as_adamw_s():
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 128), (96, 24)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        Muon([weight], [[shape[0]]], lr=1.0, momentum=0.9, weight_decay=0.0).step()
        assert 0.1 < weight.data.square().mean().sqrt() < 0.3  # AdamW's is 0.2 to 0.4 in practice


def test_the_parts_of_the_fused_projections():
    model = tiny_model()
    names = dict(model.named_parameters())
    parts = {name: parts_of(name, names[name], model.config) for name in names if names[name].dim() > 1}
    assert parts["layers.0.attn.qkv_proj.weight"] == [64, 32, 32]
    assert parts["layers.1.mlp.experts.gate_up"] == [16, 16]
    assert parts["layers.1.mlp.experts.down"] == [32]
    assert parts["layers.0.attn.o_proj.weight"] == [32]


def test_clipping_scales_all_gradients_together_and_reports_the_norm_before():
    a, b, idle = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip_gradients([a, b, idle], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(torch.stack([a.grad, b.grad]), torch.tensor([[0.6, 0.0], [0.0, 0.8]]), atol=1e-5, rtol=0)
    assert clip_gradients([a, b], 10.0).item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.0]), atol=1e-5, rtol=0)
    assert clip_gradients([idle], 1.0) is None


@given(st.sampled_from(["wsd", "cosine"]), st.integers(1, 300), st.integers(0, 300), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_schedule_rises_then_never_rises_again(schedule, steps, warmup, decay, low):
    warmup = min(warmup, steps)
    config = TrainConfig(steps=steps, tokens_per_batch=8, schedule=schedule, warmup_steps=warmup, decay_fraction=decay,
                         min_lr_ratio=low)  # fmt: skip
    factors = [lr_factor(config, step) for step in range(steps)]
    assert all(0 < f <= 1 + 1e-12 for f in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(f >= low - 1e-12 for f in factors[warmup:])


def test_wsd_stays_at_the_peak_until_the_decay():
    config = TrainConfig(steps=100, tokens_per_batch=8, lr=1.0, warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.1)
    assert config.lr_at(0) == 0.1
    assert [config.lr_at(step) for step in (9, 10, 50, 80)] == [1.0] * 4
    assert config.lr_at(90) == pytest.approx(0.55)
    assert config.lr_at(99) == pytest.approx(0.1 + 0.9 / 20)


def test_the_attention_stage_follows_the_step():
    config = train_config(warmup_msa_steps=2)
    assert [config.msa_at(step) for step in range(4)] == ["warmup", "warmup", "train", "train"]
    assert train_config(attention="dense", warmup_msa_steps=2).msa_at(0) == "dense"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0: must be an integer of at least 1"),
        ({"lr": 0.0}, "lr = 0.0: must be a number, over 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"optimizer": "sgd"}, "optimizer = 'sgd': must be one of muon, adamw"),
        ({"precision": "fp16"}, "precision = 'fp16'"),
        ({"warmup_steps": 13}, "warmup_steps = 13: may not exceed steps = 12"),
        ({"momentum": 1.0}, "momentum = 1.0: must be a number, at least 0 and under 1"),
        ({"index_queries": 0}, "index_queries = 0"),
        ({"compile": "yes"}, "compile"),
        ({"compile": True}, "compile = True: needs precision bf16"),
    ],
)
def test_impossible_configs_name_the_field_and_what_is_allowed(values, message):
    with pytest.raises(TrainConfigError, match=message):
        train_config(**values)
