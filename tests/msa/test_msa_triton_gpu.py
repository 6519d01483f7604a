"""The Triton backend on a GPU: random problems against the reference, the same bits twice, no wait for the device."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from gpu_checks import attend, captured_step_follows_lengths, waits_for_nothing
from msa_cases import Case, offsets, relative

from openm3.msa import Plan, reference, triton_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("index_q", "index_k", "q", "k", "v")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}  # msa.md's exactness rule


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    block = rng.choice([16, 32, 48, 64, 128, 256])
    kind = rng.choice(["whole", "chunk", "decode"])
    lens_q, lens_k = [], []
    for _ in range(rng.randint(1, 4)):
        edges = [1, block - 1, block, block + 1, 3 * block, rng.randint(1, 2000)]
        n = rng.choice(edges)
        lens_k.append(n)
        lens_q.append({"whole": n, "decode": min(n, rng.randint(1, 4))}.get(kind, rng.randint(0, n)))
    hi, topk = rng.choice([1, 2, 4]), rng.choice([1, 3, 8, 16, 64])
    local = rng.randint(1, topk)
    positions = None
    if rng.random() < 0.2:
        positions = tuple(rng.randrange(-1, n) for count, n in zip(lens_q, lens_k) for _ in range(count))
    return Case(
        tuple(lens_q), tuple(lens_k), hkv=hi * rng.choice([1, 2]), hi=hi, group=rng.choice([1, 2, 4, 8, 16, 32]),
        d=rng.choice([16, 64, 80, 96, 128, 256]), di=rng.choice([32, 64, 128]), block=block, topk=topk, local=local,
        init=rng.randint(0, topk - local), positions=positions, seed=seed,
        dtype=rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
    )  # fmt: skip


def on_gpu(case: Case, paged: bool):
    t = case.tensors().in_pages() if paged else case.tensors()
    sizes = case.sizes | {"positions": None if case.positions is None else case.sizes["positions"].cuda()}
    if paged:
        plan = Plan.paged(case.page_table().cuda(), list(case.lens_k), offsets(case.lens_q), **sizes)
    else:
        plan = Plan.packed(offsets(case.lens_q), offsets(case.lens_k), device="cuda", **sizes)
    return replace(t, **{n: getattr(t, n).cuda() for n in NAMES}), plan


@pytest.mark.parametrize("seed", range(200))
def test_a_random_problem_is_solved_as_the_definition_says(seed):
    case, paged = random_case(seed), bool(seed % 2)
    t, plan = on_gpu(case.but(integers=True), paged)
    wanted, scores = reference.select_blocks(t.index_q, t.index_k, plan)
    found, found_scores = triton_backend.select_blocks(t.index_q, t.index_k, plan)
    assert torch.equal(found, wanted)
    assert torch.equal(found_scores, scores)
    assert torch.equal(triton_backend.select_blocks(t.index_q, t.index_k, plan, scores=False)[0], wanted)
    t, _ = on_gpu(case, paged)
    for blocks in (wanted, None):
        out, lse = attend(triton_backend, t, blocks, plan)
        exact, exact_lse = attend(reference, t.double(), blocks, plan)
        assert relative(out, exact) <= TOLERANCE[case.dtype]
        assert torch.allclose(lse, exact_lse, rtol=1e-4, atol=1e-4)
        again, again_lse = attend(triton_backend, t, blocks, plan)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_problem_has_the_references_gradients(seed):
    case = random_case(1000 + seed)
    t, plan = on_gpu(case, False)
    blocks = reference.select_blocks(t.index_q, t.index_k, plan)[0]

    def gradients(module, x, chosen):
        inputs = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
        out, _ = attend(module, replace(x, q=inputs[0], k=inputs[1], v=inputs[2]), chosen, plan)
        return torch.autograd.grad((out * out.detach().sin()).sum(), inputs)

    for chosen in (blocks, None):
        found, again = (gradients(triton_backend, t, chosen) for _ in range(2))
        wanted = gradients(reference, t.double(), chosen)
        largest = max(float(x.abs().max()) for x in wanted)
        for x, y, z in zip(found, wanted, again):
            assert float((x - y).abs().max()) <= 4 * TOLERANCE[case.dtype] * largest
            assert torch.equal(x, z)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="fp8 caches need sm_89"
)
@pytest.mark.parametrize("lens_q", [(1, 1, 1), (300, 4, 20)])
@pytest.mark.parametrize("block", [16, 128])
def test_fp8_caches_are_dequantized_as_the_definition_says(lens_q, block):
    case = Case(lens_q, (900, 64, 2000), d=128, di=128, group=16, block=block, topk=8, dtype=torch.bfloat16)
    t, plan = on_gpu(case, True)
    fp8 = replace(t, **{n: getattr(t, n).to(torch.float8_e4m3fn) for n in ("index_k", "k", "v")})
    scale = torch.rand(len(t.k), case.hkv, device="cuda") + 0.5
    powers = 2.0 ** torch.randint(0, 4, (len(t.k),), device="cuda")
    whole, _ = on_gpu(case.but(integers=True), True)
    keys = whole.index_k.to(torch.float8_e4m3fn)
    wanted, scores = reference.select_blocks(whole.index_q, keys, plan, powers)
    found, found_scores = triton_backend.select_blocks(whole.index_q, keys, plan, powers)
    assert torch.equal(found, wanted)
    assert torch.equal(found_scores, scores)
    wide = replace(t.double(), **{n: getattr(fp8, n).double() * scale.double()[..., None, None] for n in ("k", "v")})
    for blocks in (wanted, None):
        if blocks is None:
            out, _ = triton_backend.dense_attention(fp8.q, fp8.k, fp8.v, plan, 0.1, scale, scale)
        else:
            out, _ = triton_backend.sparse_attention(fp8.q, fp8.k, fp8.v, blocks, plan, 0.1, scale, scale)
        assert relative(out, attend(reference, wide, blocks, plan)[0]) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("paged", [False, True])
def test_no_call_waits_for_the_device(paged):
    case = Case((300, 1, 64), (900, 70, 64), d=64, di=64, block=64, topk=4, dtype=torch.bfloat16)
    t, plan = on_gpu(case, paged)
    waits_for_nothing(triton_backend, t, plan)


def test_a_captured_decode_step_follows_lengths_that_change():
    case = Case((1,) * 4, (900, 64, 65, 2000), d=128, di=128, block=64, topk=4, group=16, dtype=torch.bfloat16)
    t, plan = on_gpu(case.but(integers=True), True)
    captured_step_follows_lengths(triton_backend, t, plan, case.lens_k)
