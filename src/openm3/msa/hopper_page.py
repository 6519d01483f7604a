"""What `attend_gathered` of `hopper_gather.py` does, for bf16 and fp16 pages, with its waits behind each other's work.

One program a multiprocessor takes chunks of queries that selected the same page, one chunk after another. A producer
warp brings the next page's keys and values while this one's are in use, and each pass's queries ahead of its turn.
WORKERS warpgroups take the passes in turn, 64 rows each: while one takes its softmax or writes its part, the others
keep the tensor cores busy. A result takes the place of its pass's queries on its way out, so that whole rows are
written. Queries and keys are two halves of 64 columns: there the few rows of each query's box follow one another just
as one box of 64 rows would have them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from openm3.msa.hopper_select import barrier, load_page, seen_as

INF = gl.constexpr(float("inf"))
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of one pass
HALF = gl.constexpr(64)  # columns that one tensor map brings
WORKERS = gl.constexpr(3)


@gluon.jit
def _bring(
    q_map, k_pages, v_pages, q_ring, k_ring, v_ring, q_full, q_empty, kv_full, kv_empty, pages, entries, starts, chunks,
    lo, r, GROUP: gl.constexpr, TOPK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: each chunk's page, and behind it the chunk's queries, ROWS // GROUP a pass."""
    queries: gl.constexpr = ROWS // GROUP
    passed = 0
    for c in range(gl.program_id(0), chunks, gl.num_programs(0)):
        nth = (c - gl.program_id(0)) // gl.num_programs(0)
        start = gl.load(starts + c)
        count = gl.load(starts + c + 1) - start
        page = gl.load(pages + start)
        pair = nth % 2
        mbarrier.wait(kv_empty.index(pair), (nth // 2 & 1) ^ 1)
        mbarrier.expect(kv_full.index(pair), 2 * k_pages.block_type.nbytes + v_pages.block_type.nbytes)
        load_page(k_pages, [page, r, 0, 0], kv_full.index(pair), k_ring.index(pair * 2))
        load_page(k_pages, [page, r, 0, HALF], kv_full.index(pair), k_ring.index(pair * 2 + 1))
        load_page(v_pages, [page, r, 0, 0], kv_full.index(pair), v_ring.index(pair))
        for n in range(0, (count + queries - 1) // queries):
            mine = ()
            for i in gl.static_range(queries):  # the last pass fills up with its last query
                mine = mine + (gl.load(entries + start + gl.minimum(n * queries + i, count - 1)),)  # noqa: RUF005
            stage = passed % STAGES
            mbarrier.wait(q_empty.index(stage), (passed // STAGES & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), 2 * queries * q_map.block_type.nbytes)
            for i in gl.static_range(queries):
                query = lo + mine[i] // TOPK
                to = stage * 2 * queries + i
                load_page(q_map, [query, r * GROUP, 0], q_full.index(stage), q_ring.index(to))
                load_page(q_map, [query, r * GROUP, HALF], q_full.index(stage), q_ring.index(to + queries))
            passed += 1


@gluon.jit
def _attend(
    part_ptr, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full, kv_empty, entries,
    lasts, starts, chunks, score_mul, v_mul, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, NTH: gl.constexpr,
):  # fmt: skip
    """Warpgroup NTH: every WORKERS-th pass, counted through all chunks of the program."""
    queries: gl.constexpr = ROWS // GROUP
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, mma))
    wide_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    wide_d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, mma)
    passed = 0
    for c in range(gl.program_id(0), chunks, gl.num_programs(0)):
        nth = (c - gl.program_id(0)) // gl.num_programs(0)
        start = gl.load(starts + c)
        count = gl.load(starts + c + 1) - start
        pair = nth % 2
        passes = (count + queries - 1) // queries
        mbarrier.wait(kv_full.index(pair), nth // 2 & 1)
        for n in range((NTH + WORKERS - passed % WORKERS) % WORKERS, passes, WORKERS):
            stage = (passed + n) % STAGES
            turn = (passed + n) // STAGES & 1
            at = n * queries + row // GROUP
            real = at < count
            entry = gl.load(entries + start + gl.minimum(at, count - 1))
            last = gl.load(lasts + start + gl.minimum(at, count - 1))
            first = gl.load(lasts + start + n * queries)
            for i in gl.static_range(1, queries):
                first = gl.minimum(first, gl.load(lasts + start + gl.minimum(n * queries + i, count - 1)))
            mbarrier.wait(q_full.index(stage), turn)
            left = k_ring.index(pair * 2).permute((1, 0))
            right = k_ring.index(pair * 2 + 1).permute((1, 0))
            scores = warpgroup_mma(q_halves.index(stage * 2), left, nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma(q_halves.index(stage * 2 + 1), right, scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            if first < BLOCK - 1:
                scores = gl.where(key[None] <= last[:, None], scores, -INF)
            top = gl.max(scores, 1)
            safe = gl.where(top == -INF, 0.0, top) * score_mul
            p = gl.exp2(scores * score_mul - safe[:, None])
            total = gl.sum(p, 1)
            some = total > 0.0
            whole = gl.where(some, total, 1.0)
            p_half = gl.convert_layout(p.to(k_ring.dtype), weights)
            out = warpgroup_mma(p_half, v_ring.index(pair), nothing, use_acc=False, is_async=True)
            out = warpgroup_mma_wait(0, deps=(out,))
            share = v_mul / whole
            unit = gl.max(gl.abs(out), 1) * gl.abs(share)
            unit = gl.where(unit > 0.0, unit, 1.0)
            out *= (share / unit)[:, None]
            barrier()  # all four warps have read the queries
            results.index(stage).store(out.to(gl.float16))
            barrier()
            x = results.index(stage).load(wide)
            at = n * queries + wide_row // GROUP
            to = gl.load(entries + start + gl.minimum(at, count - 1)).to(gl.int64) * GROUP + wide_row % GROUP
            part_at = part_ptr + to[:, None] * D + wide_d[None]
            gl.store(part_at, x, mask=(at < count)[:, None], eviction_policy="evict_first")
            fence_async_shared()
            barrier()  # all four warps have read the buffer
            mbarrier.arrive(q_empty.index(stage), count=1)
            to = entry.to(gl.int64) * GROUP + row % GROUP
            gl.store(unit_ptr + to, unit, mask=real)
            gl.store(part_lse_ptr + to, gl.where(some, (top * score_mul + gl.log2(whole)) * LN2, -INF), mask=real)
        barrier()
        mbarrier.arrive(kv_empty.index(pair), count=1)
        passed += passes


@gluon.jit(do_not_specialize=["count", "most", "lo", "r"])
def attend_pages(
    q_map, k_pages, v_pages, pages_ptr, entries_ptr, lasts_ptr, starts_ptr, chunks_ptr, part_ptr, unit_ptr,
    part_lse_ptr, count, most, lo, r, score_mul, v_mul, GROUP: gl.constexpr, SHARE: gl.constexpr, TOPK: gl.constexpr,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All chunks of KV head r: parts of queries lo .. lie as [query, slot, head of the group, D], as `join_slots` reads
    them. q_map brings the HALF columns of one query's GROUP heads, k_pages those of a page, v_pages whole rows."""
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries: gl.constexpr = ROWS // GROUP
    q_ring = gl.allocate_shared_memory(q_map.dtype, [STAGES * 2 * queries, GROUP, HALF], half)
    q_halves = seen_as(q_ring, q_map.dtype, [STAGES * 2, ROWS, HALF], half)
    results = seen_as(q_ring, gl.float16, [STAGES, ROWS, D], half)
    k_ring = gl.allocate_shared_memory(q_map.dtype, [2 * 2, BLOCK, HALF], half)
    v_ring = gl.allocate_shared_memory(q_map.dtype, [2, BLOCK, D], half)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=1)
    for pair in gl.static_range(2):
        mbarrier.init(kv_full.index(pair), count=1)
        mbarrier.init(kv_empty.index(pair), count=WORKERS)
    fence_async_shared()
    row = r // SHARE
    chunks = gl.load(chunks_ptr + row)
    starts = starts_ptr + row * (most + 1)
    entries, lasts, pages = entries_ptr + row * count, lasts_ptr + row * count, pages_ptr + row * count
    gl.warp_specialize(
        [
            (_attend, (part_ptr, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full,
                       kv_empty, entries, lasts, starts, chunks, score_mul, v_mul, GROUP, BLOCK, D, STAGES, 0)),
            (_attend, (part_ptr, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full,
                       kv_empty, entries, lasts, starts, chunks, score_mul, v_mul, GROUP, BLOCK, D, STAGES, 1)),
            (_attend, (part_ptr, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full,
                       kv_empty, entries, lasts, starts, chunks, score_mul, v_mul, GROUP, BLOCK, D, STAGES, 2)),
            (_bring, (q_map, k_pages, v_pages, q_ring, k_ring, v_ring, q_full, q_empty, kv_full, kv_empty, pages,
                      entries, starts, chunks, lo, r, GROUP, TOPK, STAGES)),
        ],
        [4, 4, 1], [160, 160, 24],
    )  # fmt: skip
