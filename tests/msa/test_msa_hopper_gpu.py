"""The Hopper backend on a Hopper GPU: random problems of M3's family against the reference, twice the same, graphs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from gpu_checks import attend, captured_step_follows_lengths, waits_for_nothing
from msa_cases import Case, offsets, relative

from openm3.msa import Plan, hopper_backend, index_error, reference, select_blocks, store_index_copy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
NAMES = ("index_q", "index_k", "q", "k", "v")
FAMILY = dict(d=128, di=128, block=128, dtype=torch.bfloat16)


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    kind = ("step", "prompt", "mixed", "whole")[seed % 4]
    lens_q, lens_k = [], []
    for _ in range(rng.randint(1, 5)):
        n = rng.choice([1, 127, 128, 129, 2048, 2049, rng.randint(1, 6000)])
        n = min(n, 2049) if kind == "whole" else n  # the definition holds all scores
        lens_k.append(n)
        step, chunk = min(n, rng.randint(0, 16)), min(n, rng.randint(1, 400))
        lens_q.append({"step": step, "prompt": chunk, "whole": n}.get(kind, rng.choice([step, chunk])))
    hi, topk = rng.choice([1, 2, 4]), rng.choice([8, 16, 32])
    local = rng.randint(1, topk)
    positions = None
    if rng.random() < 0.2:
        positions = tuple(rng.randrange(-1, n) for count, n in zip(lens_q, lens_k) for _ in range(count))
    return Case(
        tuple(lens_q), tuple(lens_k), hkv=hi * rng.choice([1, 2]), hi=hi, group=rng.choice([8, 16]), topk=topk,
        local=local, init=rng.randint(0, topk - local), positions=positions, seed=seed, **FAMILY,
    )  # fmt: skip


def on_gpu(case: Case):
    t = case.tensors().in_pages()
    sizes = case.sizes | {"positions": None if case.positions is None else case.sizes["positions"].cuda()}
    plan = Plan.paged(case.page_table().cuda(), list(case.lens_k), offsets(case.lens_q), **sizes)
    return replace(t, **{name: getattr(t, name).cuda() for name in NAMES}), plan


@pytest.mark.parametrize("seed", range(200))
def test_a_random_problem_is_solved_as_the_definition_says(seed, monkeypatch):
    union = (2.5, 0, 8)[seed % 3]  # unions and gathers, gathers only, unions only
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, union=union))
    case = random_case(seed)
    t, plan = on_gpu(case.but(integers=True))
    wanted, scores = reference.select_blocks(t.index_q, t.index_k, plan)
    found, found_scores = hopper_backend.select_blocks(t.index_q, t.index_k, plan)
    assert torch.equal(found, wanted)
    assert torch.equal(found_scores, scores)
    assert torch.equal(hopper_backend.select_blocks(t.index_q, t.index_k, plan, None, False)[0], wanted)
    t, _ = on_gpu(case)
    for blocks in (wanted, None):
        out, lse = attend(hopper_backend, t, blocks, plan)
        exact, exact_lse = attend(reference, t.double(), blocks, plan)
        assert relative(out, exact) <= 5e-3
        assert torch.allclose(lse, exact_lse, rtol=1e-4, atol=1e-4)
        again, again_lse = attend(hopper_backend, t, blocks, plan)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


@pytest.mark.parametrize("kind", ["all equal", "one huge key", "all want one block"])
@pytest.mark.parametrize("lens_q", [(1, 4), (300, 20)])
def test_adversarial_selections(kind, lens_q):
    case = Case(lens_q, (5000, 2500), hkv=4, hi=4, group=16, topk=16, integers=True, **FAMILY)
    t, plan = on_gpu(case)
    if kind == "all equal":
        t.index_k.fill_(1.0)
    elif kind == "one huge key":
        t.index_k[plan.page_table[0, 3], 77] = 1e4
    else:
        t.index_q.fill_(1.0)
        t.index_k[plan.page_table[0, 3].long()] = 2.0
    wanted = reference.select_blocks(t.index_q, t.index_k, plan)[0]
    found = hopper_backend.select_blocks(t.index_q, t.index_k, plan, None, False)[0]
    assert torch.equal(found, wanted)
    out, _ = attend(hopper_backend, replace(t, q=t.q / 8), found, plan)
    assert relative(out, attend(reference, replace(t, q=t.q / 8).double(), wanted, plan)[0]) <= 5e-3


@pytest.mark.parametrize("lens_q", [(1, 1, 1), (4, 16, 2), (300, 4, 20)])
def test_fp8_caches_are_dequantized_as_the_definition_says(lens_q):
    case = Case(lens_q, (4000, 64, 2500), hkv=2, hi=2, group=16, topk=8, **FAMILY)
    t, plan = on_gpu(case)
    fp8 = replace(t, **{name: getattr(t, name).to(torch.float8_e4m3fn) for name in ("index_k", "k", "v")})
    scale = torch.rand(len(t.k), case.hkv, device="cuda") + 0.5
    powers = 2.0 ** torch.randint(0, 4, (len(t.k),), device="cuda")
    whole, _ = on_gpu(case.but(integers=True))
    keys = whole.index_k.to(torch.float8_e4m3fn)
    wanted, scores = reference.select_blocks(whole.index_q, keys, plan, powers)
    found, found_scores = hopper_backend.select_blocks(whole.index_q, keys, plan, powers)
    assert torch.equal(found, wanted)
    assert torch.equal(found_scores, scores)
    wide = replace(t.double(), **{n: getattr(fp8, n).double() * scale.double()[..., None, None] for n in ("k", "v")})
    for blocks in (wanted, None):
        out, _ = attend(hopper_backend, fp8, blocks, plan, scale, scale)
        assert relative(out, attend(reference, wide, blocks, plan)[0]) <= 5e-3


@pytest.mark.parametrize("scale", ["a number", "each page"])
@pytest.mark.parametrize("lens_q", [(1, 1, 1), (4, 16, 2), (1, 0, 3), (40, 1, 1)])
def test_exact_selection_from_fp8_keys_is_the_exact_keys_selection(lens_q, scale, monkeypatch):
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, scan_blocks=0))
    case = Case(lens_q, (70_000, 2100, 2500), hkv=2, hi=2, group=16, topk=16, **FAMILY)
    t, plan = on_gpu(case)
    scale = 0.01 if scale == "a number" else t.index_k.float().abs().amax((1, 2)) / 448
    keys = t.index_k / (scale if isinstance(scale, float) else scale[:, None, None])
    keys = keys.clamp(-448, 448).to(torch.float8_e4m3fn)
    copies = dict(
        index_k_scale=scale, index_k_exact=t.index_k, index_k_error=index_error(t.index_k, keys, scale),
        return_scores=True, backend="hopper",
    )  # fmt: skip
    wanted = select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend="hopper")
    for _ in range(2):
        found = select_blocks(t.index_q, keys, plan, **copies)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_a_copy_of_the_index_keys_is_stored_as_on_a_cpu_without_waiting():
    case = Case((300, 1, 16), (1000, 200, 16), hkv=2, hi=2, group=16, topk=16, **FAMILY)
    near, (t, plan) = case.tensors().in_pages().index_k, on_gpu(case)
    found, wanted = (
        (torch.zeros_like(x, dtype=torch.float8_e4m3fn), torch.zeros(len(x), device=x.device))
        for x in (t.index_k, near)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        store_index_copy(*found, t.index_k, plan, 0.25)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    store_index_copy(*wanted, near, case.paged(), 0.25)
    assert torch.equal(found[0].cpu().view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.allclose(found[1].cpu(), wanted[1], rtol=1e-6)


def test_a_captured_exact_selection_follows_lengths_that_change_and_any_number_of_candidates(monkeypatch):
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, scan_blocks=0))
    case = Case((1,) * 4, (70_000, 64, 2065, 9000), hkv=4, hi=4, group=16, topk=16, **FAMILY)
    t, plan = on_gpu(case)
    keys, error = t.index_k.to(torch.float8_e4m3fn), index_error(t.index_k, t.index_k.to(torch.float8_e4m3fn))

    def step():
        return hopper_backend.select_exactly(t.index_q, keys, plan, None, True, t.index_k, error)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        blocks, scores = step()
    for shorter, worse in ((0, 0.0), (1, 0.0), (63, 0.0), (40, 1e6)):  # at last every block may be chosen
        plan.positions.copy_(torch.tensor(case.lens_k) - 1 - shorter)
        error += worse
        graph.replay()
        wanted = hopper_backend.select_blocks(t.index_q, t.index_k, plan)
        assert torch.equal(blocks, wanted[0])
        assert torch.equal(scores, wanted[1])


def test_a_small_workspace_changes_nothing():
    case = Case((900, 30), (5000, 2500), hkv=4, hi=4, group=16, topk=16, integers=True, **FAMILY)
    t, plan = on_gpu(case)
    _, small = on_gpu(case.but(workspace=16 << 20))
    blocks = hopper_backend.select_blocks(t.index_q, t.index_k, plan, None, False)[0]
    assert torch.equal(hopper_backend.select_blocks(t.index_q, t.index_k, small, None, False)[0], blocks)
    t = replace(t, q=t.q / 8)
    for wanted, found in zip(attend(hopper_backend, t, blocks, plan), attend(hopper_backend, t, blocks, small)):
        assert torch.equal(wanted, found)


def test_a_pool_of_more_than_2_to_the_32_elements():
    case = Case((1, 40), (3000, 2500), hkv=1, hi=1, group=16, topk=8, integers=True, **FAMILY)
    t, plan = on_gpu(case)
    pages = (1 << 32) // (128 * 128) + 64
    moved = pages - 1 - plan.page_table
    far = {}
    for name in ("index_k", "k", "v"):
        near = getattr(t, name)
        far[name] = near.new_empty(pages, *near.shape[1:])
        far[name][moved.flatten().long()] = near[plan.page_table.flatten().long()]
    sizes = dict(block_size=128, topk=8)
    plan_far = Plan.paged(moved, list(case.lens_k), offsets(case.lens_q), **sizes)
    t, t_far = replace(t, q=t.q / 8), replace(t, q=t.q / 8, **far)
    blocks = hopper_backend.select_blocks(t.index_q, t.index_k, plan, None, False)[0]
    assert torch.equal(hopper_backend.select_blocks(t.index_q, t_far.index_k, plan_far, None, False)[0], blocks)
    for chosen in (blocks, None):
        exact = attend(reference, t.double(), chosen, plan)[0]
        assert relative(attend(hopper_backend, t_far, chosen, plan_far)[0], exact) <= 5e-3


@pytest.mark.parametrize("lens_q", [(1, 1, 1), (300, 1, 64)])
def test_no_call_waits_for_the_device(lens_q):
    case = Case(lens_q, (4000, 2500, 64), hkv=4, hi=4, group=16, topk=16, **FAMILY)
    t, plan = on_gpu(case)
    waits_for_nothing(hopper_backend, t, plan)


@pytest.mark.parametrize("programmatic", [True, False])
def test_a_captured_decode_step_follows_lengths_that_change(programmatic, monkeypatch):
    tuning = replace(hopper_backend.TUNING, programmatic=programmatic)
    monkeypatch.setattr(hopper_backend, "TUNING", tuning)
    case = Case((1,) * 4, (9000, 64, 2065, 4000), hkv=4, hi=4, group=16, topk=16, integers=True, **FAMILY)
    t, plan = on_gpu(case)
    t = replace(t, q=t.q / 8)
    captured_step_follows_lengths(hopper_backend, t, plan, case.lens_k)
