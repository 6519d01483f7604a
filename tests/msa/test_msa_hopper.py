"""The Hopper backend without a GPU: its kernels interpreted or emulated, compiled for sm_90; its refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from msa_cases import Case

from openm3.msa import Plan, hopper_backend, triton_backend

triton = pytest.importorskip("triton")
import triton_targets  # noqa: E402

HERE = Path(__file__).parent
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
STEP = Case((1, 1), (4096, 2000), hkv=4, group=16, hi=4, d=128, di=128, block=128, topk=16, dtype=BF16)


@pytest.mark.parametrize("file", ["test_msa_hopper_interpreted.py", "test_msa_hopper_emulated.py"])
def test_the_kernels_on_a_cpu(file):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", file]
    run = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "passed" in run.stdout


@contextmanager
def recorded(monkeypatch, kernels):
    """What the kernels are launched with, on a card of 132 multiprocessors; nothing runs."""
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((self.kernel, grid, args, options))

    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "_multiprocessors", lambda device: 132)
        for module, name in kernels:
            patch.setattr(module, name, Recorder(getattr(module, name)))
        yield launches


def step_kernels():
    from openm3.msa import hopper_decode, hopper_exact, hopper_pick

    names = [(hopper_decode, name) for name in ("score_step", "attend_step", "combine_step")]
    return [*names, (hopper_pick, "pick_step"), *((hopper_exact, f"{name}_step") for name in ("shortlist", "rescore"))]


def run_step(case, monkeypatch, fp8=False):
    t, plan = case.tensors().in_pages(), case.paged()
    index_k, k, v = (x.to(FP8) if fp8 else x for x in (t.index_k, t.k, t.v))
    scale = torch.ones(len(k), case.hkv) if fp8 else None
    with recorded(monkeypatch, step_kernels()) as launches:
        index_scale = None if scale is None else scale[:, 0].contiguous()
        blocks, _ = hopper_backend.select_blocks(t.index_q, index_k, plan, index_scale, scores=False)
        hopper_backend.sparse_attention(t.q, k, v, blocks, plan, 0.1, scale, scale)
        hopper_backend.dense_attention(t.q, k, v, plan, 0.1, scale, scale)
    return launches


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels for the interpreter do not compile")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        STEP,
        STEP.but(lens_q=(4, 4), hkv=1, group=8, hi=1, topk=8),
        STEP.but(lens_q=(1,), lens_k=(70_000,), hkv=1, hi=1, topk=32),  # 128 parts to combine
        STEP.but(lens_q=(1,) * 40, lens_k=(3000,) * 40),  # more programs than multiprocessors
    ],
    ids=["one", "four", "long", "many"],
)
def test_every_decode_launch_compiles_and_fits(case, fp8, monkeypatch):
    launches = run_step(case, monkeypatch, fp8)
    names = [launch[0].__name__ for launch in launches if launch[0].__name__ != "combine_step"]
    assert names == ["score_step", "pick_step", "attend_step", "attend_step"]
    fit_the_multiprocessor(launches)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels for the interpreter do not compile")
@pytest.mark.parametrize(
    "case",
    [
        STEP.but(lens_q=(1,), lens_k=(1 << 20,)),
        STEP.but(lens_q=(4,), lens_k=(1 << 19,), hi=1, topk=32),
    ],
    ids=["M3", "four"],
)
def test_every_launch_of_an_exact_selection_from_fp8_keys_compiles(case, monkeypatch):
    table = torch.zeros(1, case.lens_k[0] // 128, dtype=torch.int32)
    plan = Plan.paged(table, case.lens_k, [0, *case.lens_q], **case.sizes)
    index_q, exact = torch.zeros(case.lens_q[0], case.hi, 128, dtype=BF16), torch.zeros(2, 128, 128, dtype=BF16)
    with recorded(monkeypatch, step_kernels()) as launches:
        hopper_backend.select_exactly(index_q, exact.to(FP8), plan, torch.ones(2), False, exact, torch.ones(2))
    assert [launch[0].__name__ for launch in launches] == ["score_step", "shortlist_step", "rescore_step", "pick_step"]
    fit_the_multiprocessor(launches)
    batch, rows = 1, case.lens_q[0] * case.hi
    assert [launch[1][1:] for launch in launches] == [(batch,), (batch,), (rows, batch), (batch,)]
    assert launches[2][1][0] * rows >= 132  # every multiprocessor may score again


def fit_the_multiprocessor(launches):
    """Two programs share one, but for attention with few programs, which have one each to themselves."""
    for kernel, _, args, options in launches:
        found = triton_targets.compiled(kernel, args, options, 90)
        alone = options.get("BN") == hopper_backend.TUNING.few_keys
        assert found.metadata.shared <= (227 if alone else 113) << 10, kernel.__name__
        assert found.asm["cubin"]
        assert "griddepcontrol.wait" in found.asm["ptx"]
        assert "LDL" not in found.asm["sass"]
        if kernel.__name__ in ("score_step", "rescore_step", "attend_step"):
            assert "wgmma.mma_async" in found.asm["ptx"]
            assert "cp.async.bulk.tensor" in found.asm["ptx"]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels for the interpreter do not compile")
@pytest.mark.parametrize("heads", [1, 4])
def test_the_score_of_a_prompt_compiles_for_warpgroups_and_fits(heads, monkeypatch):
    from openm3.msa import hopper_pick, hopper_select

    case = STEP.but(lens_q=(3000, 20), lens_k=(4096, 2100), hi=heads)
    t, plan = case.tensors().in_pages(), case.paged()
    kernels = [(hopper_select, "score_tiles"), (hopper_pick, "pick_rows")]
    with recorded(monkeypatch, kernels) as launches:
        hopper_backend.select_blocks(t.index_q, t.index_k, plan, scores=False)
    (kernel, grid, args, options), (pick, rows, *launch) = launches
    assert triton_targets.compiled(pick, *launch, 90).asm["cubin"]
    tiles = grid[0]
    # The first 952 queries of 3000 see 16 blocks and take all of them.
    assert tiles == rows[0] // 256 == 2048 * heads // 256 + 1
    assert grid[1] == 8  # of 4 blocks each
    found = triton_targets.compiled(kernel, args, options, 90)
    assert found.metadata.shared <= 227 << 10
    ptx = found.asm["ptx"]
    assert "st.local" not in ptx
    for instruction in ("wgmma.mma_async.sync.aligned.m64n128k16", "cp.async.bulk.tensor", "setmaxnreg"):
        assert instruction in ptx


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels for the interpreter do not compile")
def test_the_attention_of_a_prompt_compiles_and_softmax_runs_beside_a_product(monkeypatch):
    from openm3.msa import hopper_attend, hopper_gather, hopper_page, triton_attend

    case = STEP.but(lens_q=(300, 20), lens_k=(700, 300), hi=2)
    t, plan = case.tensors().in_pages(), case.paged()
    blocks = torch.zeros(case.hi, 320, 16, dtype=torch.int32)
    order = ("page_keys", "chunk_begins", "whose_turn")
    gather = [(hopper_gather, name) for name in (*order, "attend_gathered", "join_slots")]
    kernels = [*gather, (hopper_attend, "attend_tiles"), (hopper_page, "attend_pages"), (triton_attend, "unite_blocks")]
    with recorded(monkeypatch, kernels) as launches:
        hopper_backend.sparse_attention(t.q, t.k.to(FP8), t.v.to(FP8), blocks, plan, 0.1, torch.ones(len(t.k), 4), 0.5)
        names = [launch[0].__name__ for launch in launches]
        assert names == [*order, *["attend_gathered", "join_slots"] * 4]
        fp8 = launches[4]
        launches.clear()
        hopper_backend.sparse_attention(t.q, t.k, t.v, blocks, plan, 0.1)
        hopper_backend.dense_attention(t.q, t.k, t.v, plan, 0.1)
    names = [launch[0].__name__ for launch in launches]
    assert names == ["unite_blocks", "attend_tiles", *order, *["attend_pages", "join_slots"] * 4, "attend_tiles"]
    for kernel, grid, args, options in (*launches[1:7], launches[-1], fp8):
        found = triton_targets.compiled(kernel, args, options, 90)
        ptx = found.asm["ptx"]
        assert "st.local" not in ptx
        assert found.metadata.shared <= (227 if kernel.is_gluon() else 113) << 10
        assert "setmaxnreg" in ptx or not kernel.is_gluon()
        if kernel is hopper_attend.attend_tiles:
            assert grid == (38 + 3, 4)
            # In the loop: two products in flight, the exponentials while the second runs, then its wait.
            sass = found.asm["sass"]
            rest = sass[sass.index("WARPGROUP.DEPBAR.LE gsb0, 0x1") :]
            assert rest[: rest.index("WARPGROUP.DEPBAR.LE gsb0, 0x0")].count("MUFU.EX2") >= 64
            assert "LDL" not in sass
        if kernel is hopper_page.attend_pages:
            # A pass of each warpgroup, from its first product to the copy of its part, spills next to nothing: what was
            # there before stored and loaded a dozen registers.
            passes = re.findall(r"HGMMA.*?UTMASTG", found.asm["sass"], re.S)
            assert len(passes) == 3
            assert all(x.count("STL") + x.count("LDL") <= 3 for x in passes)


@pytest.mark.parametrize(("group", "topk"), [(16, 16), (8, 32), (16, 8)])
@pytest.mark.parametrize("workspace", [1 << 20, 16 << 20, 1 << 30])
@pytest.mark.parametrize(("queries", "keys"), [(8192, 32768), (70000, 70000), (500, 1 << 20), (17, 40)])
def test_the_parts_of_a_piece_fit_the_workspace(group, topk, workspace, queries, keys, monkeypatch):
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_backend, "_interpreted", lambda: False)
    q, k = torch.empty(queries, 4 * group, 128, dtype=torch.half, device="meta"), torch.empty(1, 4, 1, dtype=torch.half)
    plan = SimpleNamespace(lens_q=(queries,), lens_k=(keys,), topk=topk, workspace_bytes=workspace)

    def size(queries):
        cut = hopper_backend._cut(q, k, queries, plan)
        _, places = cut.sizes(queries * topk, -(-keys // 128))
        return places * group * (2 * 128 + 8) + queries * topk * 4 * 64

    most = hopper_backend._most_queries(q, k, 4, plan)
    assert most % 8 == 0
    assert most == 8 or size(most) <= workspace
    assert most >= queries or size(most + 8) > workspace
    assert size(8) <= 7 << 20


def test_the_card_is_filled_and_grids_ignore_the_lengths_on_the_device(monkeypatch):
    long = STEP.but(lens_q=(1,), lens_k=(128 * 1024,), hkv=1, hi=1)  # 1024 blocks
    t, plan = long.tensors().in_pages(), long.paged()
    grids = []
    for position in (131071, 5):
        plan.positions.fill_(position)
        with recorded(monkeypatch, step_kernels()) as launches:
            hopper_backend.select_blocks(t.index_q, t.index_k, plan)
            hopper_backend.dense_attention(t.q, t.k, t.v, plan, 0.1)
        grids.append([launch[1] for launch in launches])
    assert grids[0] == grids[1]
    assert grids[0][0] == (256, 1)  # two programs a multiprocessor, 4 blocks each
    assert grids[0][1] == (1, 1)
    assert grids[0][2] == (1, 128)  # one a multiprocessor, 8 steps of 128 keys each


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(block=64), "blocks of 64"),
        (dict(d=64), "head dim 64"),
        (dict(topk=12), "topk = 12"),
        (dict(group=4), "4 query heads"),
        (dict(dtype=torch.float32), "torch.float32"),
    ],
)
def test_what_it_is_not_made_for_it_names(change, reason, monkeypatch):
    monkeypatch.setattr(triton_backend, "_interpreted", lambda: True)
    case = STEP.but(lens_k=(200, 100))
    t, plan = case.tensors().in_pages(), case.paged()
    assert hopper_backend.refusal(t.q, t.k, plan, t.v) is None
    assert hopper_backend.refusal(t.index_q, t.index_k, plan) is None
    assert "packed" in hopper_backend.refusal(t.q, case.tensors().k, case.packed(), case.tensors().v)
    assert "3 index heads" in hopper_backend.refusal(t.index_q[:, :3], t.index_k, plan)
    padded = torch.cat((t.k, t.k[..., :1]), dim=-1)[..., :128]
    assert "16 bytes" in hopper_backend.refusal(t.q, padded, plan, t.v)
    case = case.but(**change)
    t = case.tensors().in_pages()
    assert reason in hopper_backend.refusal(t.q, t.k, case.paged(), t.v)


def test_other_gpus_are_refused(monkeypatch):
    class OnGpu(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 0))
        is_cuda = True

    case = STEP.but(lens_k=(200, 100))
    t, plan = case.tensors().in_pages(), case.paged()
    q = t.q.as_subclass(OnGpu)
    for capability, reason in (((9, 0), None), ((8, 0), "Hopper"), ((10, 0), "Hopper")):
        monkeypatch.setattr(triton_backend, "_capability", lambda device, found=capability: found)
        found = hopper_backend.refusal(q, t.k, plan, t.v)
        assert found is None if reason is None else reason in found


def test_the_tuning_run_knows_its_settings_and_tells_the_fastest(monkeypatch):
    monkeypatch.syspath_prepend(HERE.parent.parent / "benchmarks")
    import tune_hopper

    for job in tune_hopper.JOBS.values():
        for variant in job.variants:
            assert replace(hopper_backend.TUNING, **variant) != hopper_backend.TUNING
    row = dict(job="step", part="both", size=[1, 1024], gb_s=900.0)
    lines = tune_hopper.summary([
        row | dict(variant={}, ms=0.02), row | dict(variant={"score_stages": 2}, ms=0.01),
        dict(job="step", check="selection", difference=3.0, allowed=0.0, ok=False), dict(job="select", error="gone"),
    ])  # fmt: skip
    assert list(lines) == [
        "step: 1 checks, selection (3)",
        "  both (1, 1024): 0.02 ms, best 0.01 ms (900 gb_s) with {'score_stages': 2}",
        "select: 0 checks, gone",
    ]
