"""The index branch's loss: value and gradient against the definition, in both stages, whole or at some queries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from msa_cases import Case, cases, offsets

from openm3 import msa
from openm3.msa import Plan

RUN = settings(deadline=None, max_examples=40)
WHOLE = Case((40, 9, 70), (40, 9, 70))


def selected(case):
    t = case.tensors()
    return msa.select_blocks(t.index_q, t.index_k, case.packed(), backend="reference")


def loss_and_gradient(t, blocks, plan, backend, **more):
    index_q, index_k = (x.detach().requires_grad_() for x in (t.index_q, t.index_k))
    loss = msa.index_loss(index_q, index_k, t.q, t.k, blocks, plan, backend=backend, **more)
    return loss.detach(), *torch.autograd.grad(loss, (index_q, index_k))


def assert_same(found, wanted, tolerance=1e-5):
    loss, *gradients = found
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(wanted[0])) <= tolerance * max(1.0, abs(float(wanted[0])))
    scale = max(1e-3, *(float(x.abs().max()) for x in wanted[1:]))
    for x, y in zip(gradients, wanted[1:]):
        assert float((x - y).abs().max()) <= tolerance * scale


@RUN
@given(cases())
@example(WHOLE)
@example(WHOLE.but(hi=1, hkv=3, group=3))
@example(WHOLE.but(topk=20))
@example(Case((5, 16, 1), (37, 40, 64)))
def test_loss_and_gradient_are_the_references_in_both_stages(case):
    assume(sum(case.lens_q) > 0)
    tensors, plan = case.tensors(), case.packed()
    for blocks in (selected(case), None):
        wanted = loss_and_gradient(tensors.double(), blocks, plan, "reference")
        assert_same(loss_and_gradient(tensors, blocks, plan, "torch"), wanted)


def test_the_loss_is_the_divergence_written_out():
    """The reference too: KL(mean softmax of the group's heads || softmax of the index scores), key by key."""
    case = Case((40,), (40,), group=3)
    t, plan, blocks = case.tensors().double(), case.packed(), selected(case)
    for chosen in (blocks, None):
        total = 0.0
        for i in range(40):
            for r in range(2):
                keys = [j for j in range(i + 1) if chosen is None or j // 8 in chosen[r, i].tolist()]
                heads = [torch.softmax(t.k[keys, r] @ t.q[i, 3 * r + g] / 4.0, 0) for g in range(3)]
                p, index = sum(heads) / 3, torch.softmax(t.index_k[keys] @ t.index_q[i, r] / 4.0, 0)
                total += float((p * (p / index).log()).sum())
        found = msa.index_loss(t.index_q, t.index_k, t.q, t.k, chosen, plan, backend="reference")
        assert abs(float(found) - total / 80) < 1e-6


@pytest.mark.parametrize("case", [WHOLE, WHOLE.but(hi=1), Case((5, 16, 1), (37, 40, 64))])
@pytest.mark.parametrize("dense", [False, True])
def test_some_queries_give_the_mean_over_those_rows(case, dense):
    tensors, plan = case.tensors(), case.packed()
    blocks = None if dense else selected(case)
    rows = torch.arange(plan.num_queries)[torch.rand(plan.num_queries, generator=torch.manual_seed(3)) < 0.4]
    counts = tuple(torch.bincount(plan.seq_ids[rows], minlength=len(case.lens_q)).tolist())
    sizes = dict(block_size=case.block, topk=case.topk, positions=plan.positions[rows])
    part = Plan.packed(offsets(counts), offsets(case.lens_k), **sizes)
    exact = replace(tensors.double(), index_q=tensors.index_q.double()[rows], q=tensors.q.double()[rows])
    loss, dq, dk = loss_and_gradient(exact, None if dense else blocks[:, rows], part, "reference")
    whole_dq = torch.zeros(tensors.index_q.shape, dtype=torch.float64).index_copy(0, rows, dq)
    assert_same(loss_and_gradient(tensors, blocks, plan, "torch", queries=rows), (loss, whole_dq, dk))


def test_the_means_over_all_single_queries_average_to_the_whole():
    tensors, plan, blocks = WHOLE.tensors(), WHOLE.packed(), selected(WHOLE)
    args = (tensors.index_q, tensors.index_k, tensors.q, tensors.k, blocks, plan)
    singles = [msa.index_loss(*args, queries=torch.tensor([i])) for i in range(plan.num_queries)]
    assert abs(float(torch.stack(singles).mean() - msa.index_loss(*args))) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dense", [False, True])
def test_the_main_branch_is_a_teacher_without_a_gradient(backend, dense):
    tensors, plan = WHOLE.tensors(), WHOLE.packed()
    inputs = [x.requires_grad_() for x in (tensors.index_q, tensors.index_k, tensors.q, tensors.k)]
    msa.index_loss(*inputs, None if dense else selected(WHOLE), plan, backend=backend).backward()
    assert tensors.q.grad is None
    assert tensors.k.grad is None
    assert bool(tensors.index_q.grad.any())
    assert bool(tensors.index_k.grad.any())


def test_an_index_branch_that_agrees_has_no_loss_and_no_gradient():
    case = Case((40, 9), (40, 9), hkv=1, group=1, hi=1)
    tensors = case.tensors()
    agreeing = replace(tensors, index_q=tensors.q, index_k=tensors.k[:, 0])
    for blocks in (selected(case), None):
        loss, dq, dk = loss_and_gradient(agreeing, blocks, case.packed(), "torch")
        assert abs(float(loss)) < 1e-6
        assert float(dq.abs().max()) < 1e-6
        assert float(dk.abs().max()) < 1e-6


@pytest.mark.parametrize("dense", [False, True])
def test_a_small_workspace_gives_the_same_loss(dense):
    case = Case((600,), (600,), group=4)
    tensors, blocks = case.tensors(), None if dense else selected(case)
    wanted = loss_and_gradient(tensors, blocks, case.packed(), "torch")
    small = case.but(workspace=1 << 20).packed()
    assert_same(loss_and_gradient(tensors, blocks, small, "torch"), wanted, 1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_a_factor_on_the_loss_scales_the_gradient(dense):
    tensors, plan = WHOLE.tensors(), WHOLE.packed()
    blocks = None if dense else selected(WHOLE)
    _, dq, _ = loss_and_gradient(tensors, blocks, plan, "torch")
    index_q = tensors.index_q.requires_grad_()
    (msa.index_loss(index_q, tensors.index_k, tensors.q, tensors.k, blocks, plan) * 0.25).backward()
    assert torch.allclose(index_q.grad, dq * 0.25, atol=1e-9)


def test_bf16_keeps_its_dtype_in_the_gradient_and_its_value():
    case = WHOLE.but(dtype=torch.bfloat16)
    tensors, plan, blocks = case.tensors(), case.packed(), selected(case)
    for chosen in (blocks, None):
        found = loss_and_gradient(tensors, chosen, plan, "torch")
        wanted = loss_and_gradient(tensors.double(), chosen, plan, "reference")
        assert found[1].dtype == torch.bfloat16
        assert_same(found, wanted, 2e-2)


def test_no_gradient_is_computed_where_none_is_wanted():
    tensors, plan = WHOLE.tensors(), WHOLE.packed()
    loss = msa.index_loss(tensors.index_q, tensors.index_k, tensors.q, tensors.k, None, plan)
    assert not loss.requires_grad


def test_the_same_input_gives_the_same_bits():
    tensors, plan, blocks = WHOLE.tensors(), WHOLE.packed(), selected(WHOLE)
    for chosen in (blocks, None):
        once, twice = (loss_and_gradient(tensors, chosen, plan, "torch") for _ in range(2))
        for x, y in zip(once, twice):
            assert torch.equal(x, y)
