"""On a GPU: the kernels that the torch backend takes there, against the reference on the same device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from msa_cases import Case, relative

from openm3 import msa
from openm3.msa import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WHOLE = Case((300, 90, 513), (300, 90, 513), d=32, di=32, block=16, topk=4)
DECODE = Case((1,) * 5, (300, 90, 513, 17, 1), d=32, di=32, block=16, topk=4)
# float32 products may run as TF32 inside FlexAttention's kernels.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-3}


def on_gpu(t):
    return replace(t, **{n: getattr(t, n).cuda() for n in ("index_q", "index_k", "q", "k", "v")})


def packed(case):
    sizes = dict(block_size=case.block, topk=case.topk, device="cuda")
    q, k = (torch.tensor([0, *lens]).cumsum(0).tolist() for lens in (case.lens_q, case.lens_k))
    return Plan.packed(q, k, **sizes)


def paged(case):
    sizes = dict(block_size=case.block, topk=case.topk)
    q = torch.tensor([0, *case.lens_q]).cumsum(0).tolist()
    return Plan.paged(case.page_table().cuda(), list(case.lens_k), q, **sizes)


@pytest.mark.parametrize("case", [WHOLE, DECODE, WHOLE.but(lens_q=(5, 90, 1))])
def test_selection_equals_the_definition_bit_for_bit(case):
    case = case.but(integers=True)
    for t, plan in ((on_gpu(case.tensors()), packed(case)), (on_gpu(case.tensors().in_pages()), paged(case))):
        wanted = msa.select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend="reference")
        found = msa.select_blocks(t.index_q, t.index_k, plan, return_scores=True)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(msa.select_blocks(t.index_q, t.index_k, plan), wanted[0])


@pytest.mark.parametrize("case", [WHOLE, DECODE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_references(case, dtype):
    case = case.but(dtype=dtype)
    for t, plan in ((on_gpu(case.tensors()), packed(case)), (on_gpu(case.tensors().in_pages()), paged(case))):
        wide = t.double()
        blocks = msa.select_blocks(t.index_q, t.index_k, plan)
        out = msa.sparse_attention(t.q, t.k, t.v, blocks, plan)
        wanted = msa.sparse_attention(wide.q, wide.k, wide.v, blocks, plan, backend="reference")
        assert relative(out, wanted) <= TOLERANCE[dtype]
        wanted = msa.dense_attention(wide.q, wide.k, wide.v, plan, backend="reference")
        assert relative(msa.dense_attention(t.q, t.k, t.v, plan), wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
def test_gradients_are_those_of_the_reference(dtype, dense):
    case = WHOLE.but(dtype=dtype)
    t, plan = on_gpu(case.tensors()), packed(case)
    blocks = None if dense else msa.select_blocks(t.index_q, t.index_k, plan)

    def gradients(x, backend):
        inputs = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
        if dense:
            out = msa.dense_attention(*inputs, plan, backend=backend)
        else:
            out = msa.sparse_attention(*inputs, blocks, plan, backend=backend)
        return torch.autograd.grad((out * out.detach().sin()).sum(), inputs)

    for x, y in zip(gradients(t, None), gradients(t.double(), "reference")):
        assert relative(x, y) <= 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dense", [False, True])
def test_the_index_loss_is_the_references(dense):
    t, plan = on_gpu(WHOLE.tensors()), packed(WHOLE)
    blocks = None if dense else msa.select_blocks(t.index_q, t.index_k, plan)
    wide = t.double()
    found = msa.index_loss(t.index_q, t.index_k, t.q, t.k, blocks, plan)
    wanted = msa.index_loss(wide.index_q, wide.index_k, wide.q, wide.k, blocks, plan, backend="reference")
    assert abs(float(found) - float(wanted)) <= 1e-4 * float(wanted)
