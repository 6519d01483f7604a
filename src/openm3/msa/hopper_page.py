"""What `attend_gathered` of `hopper_gather.py` does, for bf16 and fp16 pages, with its waits behind each other's work.

One program a multiprocessor takes every so many-th of equal shares of the pairs, in the order of `by_page`. A producer
warp brings the next page's keys and values while this one's are in use, and each pass's queries ahead of its turn.
WORKERS warpgroups take the passes in turn, 64 rows each: while one takes its softmax or hands over its part, the others
keep the tensor cores busy. Parts stand in the order of the pairs, so that a pass's result is one box, which a bulk copy
brings from shared memory to its place. Queries and keys are two halves of 64 columns: there the few rows of each
query's box follow one another just as one box of 64 rows would have them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from openm3.msa.hopper_select import barrier, load_page, seen_as, store_rows

INF = gl.constexpr(float("inf"))
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of one pass
HALF = gl.constexpr(64)  # columns that one tensor map brings
WORKERS = gl.constexpr(3)  # as many roles are listed at the end


@gluon.jit
def _queries(queries, at, end, lo, PER: gl.constexpr):
    """A pass's queries, from place `at` of a chunk that ends at `end`; the last pass fills up with its last query."""
    mine = ()
    for i in gl.static_range(PER):
        mine = mine + (lo + gl.load(queries + gl.minimum(at + i, end - 1)),)  # noqa: RUF005
    return mine


@gluon.jit
def _bring(
    q_map, k_pages, v_pages, q_ring, k_ring, v_ring, q_full, q_empty, kv_full, kv_empty, pages, queries, starts, firsts,
    shares, lo, r, GROUP: gl.constexpr,
):  # fmt: skip
    """The producer: the page of each chunk, and behind it the chunk's queries, PER a pass."""
    PER: gl.constexpr = ROWS // GROUP
    passed = 0
    turn = 0
    for share in range(gl.program_id(0), shares, gl.num_programs(0)):
        c0 = gl.load(firsts + share)
        c1 = gl.load(firsts + share + 1)
        start = gl.load(starts + c0) // 2
        for c in range(c0, c1):
            end = gl.load(starts + c + 1) // 2
            page = gl.load(pages + start)
            mine = _queries(queries, start, end, lo, PER)
            pair = turn % 2
            mbarrier.wait(kv_empty.index(pair), (turn // 2 & 1) ^ 1)
            mbarrier.expect(kv_full.index(pair), 2 * k_pages.block_type.nbytes + v_pages.block_type.nbytes)
            load_page(k_pages, [page, r, 0, 0], kv_full.index(pair), k_ring.index(pair * 2))
            load_page(k_pages, [page, r, 0, HALF], kv_full.index(pair), k_ring.index(pair * 2 + 1))
            load_page(v_pages, [page, r, 0, 0], kv_full.index(pair), v_ring.index(pair))
            turn += 1
            for at in range(start, end, PER):
                worker = passed % WORKERS
                mbarrier.wait(q_empty.index(worker), (passed // WORKERS & 1) ^ 1)
                mbarrier.expect(q_full.index(worker), 2 * PER * q_map.block_type.nbytes)
                for i in gl.static_range(PER):
                    to = worker * 2 * PER + i
                    load_page(q_map, [mine[i], r * GROUP, 0], q_full.index(worker), q_ring.index(to))
                    load_page(q_map, [mine[i], r * GROUP, HALF], q_full.index(worker), q_ring.index(to + PER))
                mine = _queries(queries, at + PER, end, lo, PER)
                passed += 1
            start = end


@gluon.jit
def _attend(
    part_map, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full, kv_empty, lasts,
    starts, firsts, shares, score_mul, v_mul, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr,
    NTH: gl.constexpr,
):  # fmt: skip
    """Warpgroup NTH: every WORKERS-th pass, counted through all chunks of the program."""
    PER: gl.constexpr = ROWS // GROUP
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, mma))
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, mma)
    passed = 0  # by this one
    turn = 0
    at = NTH * PER  # of its next pass, from the chunk's start
    for share in range(gl.program_id(0), shares, gl.num_programs(0)):
        c0 = gl.load(firsts + share)
        c1 = gl.load(firsts + share + 1)
        start = gl.load(starts + c0)
        end = gl.load(starts + c0 + 1)
        for c in range(c0, c1):
            following = gl.load(starts + c + 2)
            pair = turn % 2
            count = end // 2 - start // 2
            mbarrier.wait(kv_full.index(pair), turn // 2 & 1)
            turn += 1
            while at < count:
                mbarrier.wait(q_full.index(NTH), passed & 1)
                left = k_ring.index(pair * 2).permute((1, 0))
                right = k_ring.index(pair * 2 + 1).permute((1, 0))
                scores = warpgroup_mma(q_halves.index(NTH * 2), left, nothing, use_acc=False, is_async=True)
                scores = warpgroup_mma(q_halves.index(NTH * 2 + 1), right, scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=(scores,))
                tma.store_wait(0)
                barrier()  # all four warps have read the queries, and the part before this one has left
                mbarrier.arrive(q_empty.index(NTH), count=1)
                if start % 2 == 0:
                    last = gl.load(lasts + start // 2 + gl.minimum(at + row // GROUP, count - 1))
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
                scale = v_mul / whole
                unit = gl.max(gl.abs(out), 1) * gl.abs(scale)
                unit = gl.where(unit > 0.0, unit, 1.0)
                out *= (scale / unit)[:, None]
                results.index(NTH).store(out.to(gl.float16))
                fence_async_shared()
                barrier()  # the part is whole
                to = (start // 2 + (PER - 1) * c + at) * GROUP  # as `whose_turn` places it: PER - 1 is `Cut.spare`
                store_rows(part_map, [to, 0], results.index(NTH))
                gl.store(unit_ptr + to + row, unit)
                gl.store(part_lse_ptr + to + row, gl.where(some, (top * score_mul + gl.log2(whole)) * LN2, -INF))
                passed += 1
                at += WORKERS * PER
            barrier()  # all four warps have read the page
            mbarrier.arrive(kv_empty.index(pair), count=1)
            at -= (count + PER - 1) // PER * PER
            start = end
            end = following
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["count", "most", "shares", "lo", "r"])
def attend_pages(
    q_map, k_pages, v_pages, part_map, unit_ptr, part_lse_ptr, pages_ptr, queries_ptr, lasts_ptr, starts_ptr,
    firsts_ptr, count, most, shares, lo, r, score_mul, v_mul, GROUP: gl.constexpr, SHARE: gl.constexpr,
    BLOCK: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """All shares of the pairs of queries lo .. and KV head r. Results lie as [place, head of the group, D], as
    `join_slots` reads them: a pass may write up to ROWS // GROUP - 1 places beyond its chunk's last, which are left for
    that. q_map brings the HALF columns of one query's GROUP heads, k_pages those of a page, v_pages whole rows;
    part_map takes ROWS whole ones."""
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_ring = gl.allocate_shared_memory(q_map.dtype, [WORKERS * 2 * ROWS // GROUP, GROUP, HALF], half)
    q_halves = seen_as(q_ring, q_map.dtype, [WORKERS * 2, ROWS, HALF], half)
    results = gl.allocate_shared_memory(gl.float16, [WORKERS, ROWS, D], half)
    k_ring = gl.allocate_shared_memory(q_map.dtype, [2 * 2, BLOCK, HALF], half)
    v_ring = gl.allocate_shared_memory(q_map.dtype, [2, BLOCK, D], half)
    q_full = gl.allocate_shared_memory(gl.int64, [WORKERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [WORKERS, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for worker in gl.static_range(WORKERS):
        mbarrier.init(q_full.index(worker), count=1)
        mbarrier.init(q_empty.index(worker), count=1)
    for pair in gl.static_range(2):
        mbarrier.init(kv_full.index(pair), count=1)
        mbarrier.init(kv_empty.index(pair), count=WORKERS)
    fence_async_shared()
    row = r // SHARE
    firsts, starts = firsts_ptr + row * (shares + 1), starts_ptr + row * (most + 2)
    queries, lasts, pages = queries_ptr + row * count, lasts_ptr + row * count, pages_ptr + row * count
    gl.warp_specialize(
        [
            (_attend, (part_map, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full,
                       kv_empty, lasts, starts, firsts, shares, score_mul, v_mul, GROUP, BLOCK, D, 0)),
            (_attend, (part_map, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full,
                       kv_empty, lasts, starts, firsts, shares, score_mul, v_mul, GROUP, BLOCK, D, 1)),
            (_attend, (part_map, unit_ptr, part_lse_ptr, q_halves, k_ring, v_ring, results, q_full, q_empty, kv_full,
                       kv_empty, lasts, starts, firsts, shares, score_mul, v_mul, GROUP, BLOCK, D, 2)),
            (_bring, (q_map, k_pages, v_pages, q_ring, k_ring, v_ring, q_full, q_empty, kv_full, kv_empty, pages,
                      queries, starts, firsts, shares, lo, r, GROUP)),
        ],
        [4, 4, 1], [152, 152, 40],
    )  # fmt: skip
