"""The operator as PyTorch's registered ops: `opcheck`, and compiled code that gives what eager code gives.

Compiled with `aot_eager`, which needs no C++ compiler: it traces, and runs the graph as it is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from msa_cases import Case, cases, relative

from openm3 import msa
from openm3.msa import Plan, dispatch, ops

WHOLE = Case((40, 17), (40, 17))
CHUNK = Case((9, 1), (50, 33))
INFO = dict(backend="aot_eager", fullgraph=True)


def both(case):
    """The case's tensors and plan, packed and in pages."""
    return (case.tensors(), case.packed()), (case.tensors().in_pages(), case.paged())


def check(op, *args):
    torch.library.opcheck(getattr(torch.ops.openm3, op).default, args)


@pytest.mark.parametrize("case", [WHOLE, CHUNK])
@pytest.mark.parametrize("scores", [False, True])
def test_selection_is_a_well_formed_op(case, scores):
    for t, plan in both(case):
        check("select_blocks", t.index_q, t.index_k, plan.tensors(), plan.topk, None, scores, None)


@pytest.mark.parametrize("dense", [False, True])
def test_attention_is_a_well_formed_op_with_its_gradient(dense):
    for case in (WHOLE, CHUNK):
        for t, plan in both(case):
            blocks = None if dense else msa.select_blocks(t.index_q, t.index_k, plan)
            inputs = (t.q, t.k, t.v)
            check("attention", *inputs, blocks, plan.tensors(), 0.3, None, None, "torch")
            check("attention_backward", t.q.sin(), *inputs, blocks, plan.tensors(), 0.3, None, None, None)
        t, plan = case.tensors(), case.packed()
        inputs = [x.requires_grad_() for x in (t.q, t.k, t.v)]
        blocks = None if dense else msa.select_blocks(t.index_q, t.index_k, plan)
        check("attention", *inputs, blocks, plan.tensors(), None, None, None, None)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("slopes", [False, True])
def test_the_index_loss_is_a_well_formed_op(dense, slopes):
    t, plan = WHOLE.tensors(), WHOLE.packed()
    blocks = None if dense else msa.select_blocks(t.index_q, t.index_k, plan)
    queries = torch.tensor([3, 50])
    args = (t.index_q, t.index_k, t.q, t.k, blocks, plan.tensors(), None, queries, slopes, None)
    check("index_loss", *args)


def test_a_plan_said_in_tensors_is_that_plan_and_outlives_it():
    plan = CHUNK.paged()
    said = plan.tensors()
    assert Plan.from_tensors(said) is plan
    copies = [x.clone() for x in said]
    del plan
    again = Plan.from_tensors(copies)
    wanted = CHUNK.paged()
    for name in (
        "lens_q",
        "lens_k",
        "block_size",
        "topk",
        "local_blocks",
        "init_blocks",
        "workspace_bytes",
        "explicit",
    ):
        assert getattr(again, name) == getattr(wanted, name)
    for x, y in zip(again.tensors()[1:], wanted.tensors()[1:]):
        assert torch.equal(x, y)


def test_another_plan_with_the_same_number_is_not_taken_for_it():
    """As in a process that was sent a plan by another one, which counts its own plans."""
    plan = CHUNK.packed()
    sent = [x.clone() for x in CHUNK.but(positions=(3,) * 10).packed().tensors()]
    sent[0][0] = plan.host[0]
    found = Plan.from_tensors(sent)
    assert found is not plan
    assert bool((found.positions == 3).all())
    changed = replace(plan, topk=2)
    assert changed.host[0] != plan.host[0]
    assert Plan.from_tensors(changed.tensors()).topk == 2


def everything(t, plan, blocks_of=msa.select_blocks, **more):
    """All ops in one function, as a layer uses them."""
    blocks, scores = blocks_of(t.index_q, t.index_k, plan, return_scores=True)
    out, lse = msa.sparse_attention(t.q, t.k, t.v, blocks, plan, return_lse=True, softmax_scale=0.4)
    dense = msa.dense_attention(t.q, t.k, t.v, plan, **more)
    loss = out.sum() + 0 if plan.page_table is not None else msa.index_loss(
        t.index_q, t.index_k, t.q, t.k, blocks, plan
    )  # fmt: skip
    return blocks, scores, out, lse, dense, loss


@settings(max_examples=15, deadline=None)
@given(cases())
def test_the_ops_give_what_the_backends_give(case):
    for t, plan in both(case):
        args = (t.q, t.k, t.v)
        blocks, scores = ops.select_blocks(t.index_q, t.index_k, plan, None, True, None)
        wanted = dispatch.select_blocks(t.index_q, t.index_k, plan, None, True, None)
        assert torch.equal(blocks, wanted[0])
        assert torch.equal(scores, wanted[1])
        for b in (blocks, None):
            found = ops.attention(*args, b, plan, None, None, None, None)
            for x, y in zip(found, dispatch.attention(*args, b, plan, None, None, None, None)):
                assert torch.equal(x, y)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, **INFO, **options)


def test_a_compiled_function_is_the_eager_one_and_compiles_once_for_all_lengths():
    run = compiled(everything)
    for lens in (WHOLE, WHOLE.but(lens_q=(30, 27), lens_k=(30, 27)), WHOLE.but(lens_q=(1, 56), lens_k=(1, 56))):
        with torch._dynamo.config.patch(error_on_recompile=lens is not WHOLE):
            for x, y in zip(run(lens.tensors(), plan := lens.packed()), everything(lens.tensors(), plan)):
                assert torch.equal(x, y)
    pages = CHUNK.but(shuffled=False)
    for i, case in enumerate((pages, pages.but(lens_k=(54, 31)), pages.but(lens_q=(2, 8)))):
        t, plan = case.tensors().in_pages(), case.paged()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            for x, y in zip(run(t, plan), everything(t, plan)):
                assert torch.equal(x, y)


def gradients(function, case, plan):
    t = case.tensors()
    names = ("index_q", "index_k", "q", "k", "v")
    inputs = [getattr(t, n).requires_grad_() for n in names]
    *_, out, lse, dense, loss = function(t, plan)
    assert not lse.requires_grad
    total = (out * out.detach().sin()).sum() + (dense * dense.detach().cos()).sum()
    return torch.autograd.grad(total + 3.0 * loss, inputs)


@pytest.mark.parametrize("case", [WHOLE, CHUNK])
def test_gradients_through_compiled_code_are_the_eager_ones(case):
    plan = case.packed()
    for x, y in zip(gradients(compiled(everything), case, plan), gradients(everything, case, plan)):
        assert relative(x, y) <= 1e-6


def test_compiled_code_holds_the_registered_ops_and_anothers_shapes_are_another_graph():
    seen = []

    def keep(graph, _):
        seen.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    torch._dynamo.reset()
    run = torch.compile(everything, backend=keep, fullgraph=True)
    run(WHOLE.tensors(), WHOLE.packed())
    assert {"openm3.select_blocks", "openm3.attention", "openm3.index_loss"} <= seen[0]
    longer = WHOLE.but(lens_q=(40, 18), lens_k=(40, 18))
    with torch._dynamo.config.patch(error_on_recompile=True):  # the test of equal shapes is not vacuous
        with pytest.raises(torch._dynamo.exc.RecompileError):
            run(longer.tensors(), longer.packed())


def attend(plan=None, blocks=None, **change):
    t = CHUNK.tensors()
    given = dict(q=t.q, k=t.k, v=t.v) | {n: change.pop(n) for n in list(change) if n in "qkv"}
    return msa.dense_attention(*given.values(), plan or CHUNK.packed(), **change)


def attend_pages(dtype=torch.float32, **change):
    t = CHUNK.tensors().in_pages()
    return msa.dense_attention(t.q, t.k.to(dtype), t.v.to(dtype), CHUNK.paged(), **change)


def lose(**change):
    t = CHUNK.tensors()
    return msa.index_loss(t.index_q, t.index_k, t.q, t.k, None, CHUNK.packed(), **change)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attend(plan=[0, 9, 10]), "plan: list, must be a Plan"),
        (
            lambda: attend(q=torch.zeros(10, 4, 16, dtype=torch.int32)),
            "q: torch.int32, must be one of float64, float32",
        ),
        (lambda: attend(k=torch.zeros(83, 2, 16).to(FP8)), "k: torch.float8_e4m3fn, must be one of float64"),
        (lambda: attend(v=torch.zeros(83, 2, 16).long()), "v: torch.int64, must be one of"),
        (lambda: attend(q=torch.zeros(10, 4, 16, device="meta")), "q: on meta, must be on the plan's device cpu"),
        (lambda: attend(q=torch.zeros(10, 16, 4).mT), "q: stride 4 along its last axis, must be 1"),
        (lambda: attend(q=torch.zeros(10, 0, 16)), "q: \\[10, 0, 16\\], must be \\[10, heads, dim\\]"),
        (lambda: attend(softmax_scale=0.0), "softmax_scale = 0.0: must be a positive number"),
        (lambda: attend(softmax_scale=float("nan")), "softmax_scale = nan"),
        (lambda: attend_pages(k_scale=0.5), "k_scale: given, but the keys are torch.float32"),
        (
            lambda: attend_pages(FP8, v_scale=float("inf")),
            "v_scale = inf: must be a finite number, or float32 \\[13, 2\\]",
        ),
        (
            lambda: attend_pages(FP8, k_scale=torch.ones(13)),
            "k_scale: torch.float32 \\[13\\], must be float32 \\[13, 2\\]",
        ),
        (lambda: lose(queries=torch.tensor([3, 10])), "queries: from 3 to 10, must lie within 0..9"),
        (lambda: lose(queries=torch.tensor([3.0])), "queries: torch.float32 \\[1\\], must be int64"),
        (lambda: lose(queries=torch.tensor([3]), backend="reference"), "queries: the reference backend"),
        (
            lambda: msa.sparse_attention(CHUNK.tensors().q, CHUNK.tensors().k, CHUNK.tensors().v, None, CHUNK.packed()),
            "blocks: None, must be int32",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dispatch_takes_the_first_that_does_not_refuse(monkeypatch):
    def refuse(queries, keys, plan, values):
        return "too many heads" if queries.shape[1] > 4 else None

    picky = replace(dispatch.BACKENDS["reference"], refusal=refuse, index_loss=None)
    monkeypatch.setitem(dispatch.BACKENDS, "picky", picky)
    monkeypatch.setitem(dispatch.PREFERRED, "cpu", ("picky",))
    case = CHUNK.but(group=4)
    for c, wanted in ((CHUNK, "picky"), (case, "torch")):
        t, plan = c.tensors(), c.packed()
        taken = dispatch.function_of(None, "dense_attention", t.q, t.k, plan, t.v)
        assert taken is dispatch.BACKENDS[wanted].dense_attention
        taken = dispatch.function_of(None, "index_loss", t.q, t.k, plan)
        assert taken is dispatch.BACKENDS["torch"].index_loss
    with pytest.raises(ValueError, match="backend = 'picky': cannot serve this call: too many heads"):
        msa.dense_attention(t.q, t.k, t.v, plan, backend="picky")
    with pytest.raises(ValueError, match="backend = 'picky': cannot serve this call: it has no index_loss"):
        msa.index_loss(t.index_q, t.index_k, t.q, t.k, None, plan, backend="picky")
