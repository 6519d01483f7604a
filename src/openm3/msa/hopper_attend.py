"""Attention of a prompt on Hopper: 128 rows, the query heads of 8 or 16 neighbouring queries that share a KV head, walk
the pages of the blocks that any of them selected, or of all blocks before them.

A producer warp brings keys and values through tensor maps, each into a ring of STAGES buffers of its own. Two
warpgroups take 64 rows each: scores from shared memory, weights back into the second product from registers. The next
block's scores are issued before the weighted sum of this one, so that a softmax runs beside a product: between the two
waits stands one for the keys after, which keeps the exponentials from being moved behind the second. `score_mul` (the
scale times log2 e) must be positive: maxima are taken of unscaled scores.
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

from openm3.msa.hopper_select import barrier, load_page

INF = gl.constexpr(float("inf"))
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of one warpgroup
HIGHEST = gl.constexpr(2**31 - 1)


@gluon.jit
def _bring(
    k_pages, v_pages, k_ring, v_ring, k_full, k_empty, v_full, v_empty, chosen, table, r, length,
    SELECTED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: keys and values of `length` blocks of KV head r."""
    for n in range(length):
        stage, free = n % STAGES, (n // STAGES & 1) ^ 1
        block = n
        if SELECTED:
            block = gl.load(chosen + n) >> 8
        page = gl.load(table + block)
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), k_pages.block_type.nbytes)
        load_page(k_pages, [page, r, 0, 0], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), v_pages.block_type.nbytes)
        load_page(v_pages, [page, r, 0, 0], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _issue_scores(mine, k_ring, k_full, n, nothing, STAGES: gl.constexpr):
    mbarrier.wait(k_full.index(n % STAGES), n // STAGES & 1)
    keys = k_ring.index(n % STAGES).permute((1, 0))
    return warpgroup_mma(mine, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _weigh(
    scores, total, top, entry, query, position, whole, score_mul, SELECTED: gl.constexpr, BLOCK: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """One step of the running softmax: weights, how far earlier sums fade, the new total, and the maximum, unscaled."""
    block = entry
    if SELECTED:
        block = entry >> 8
        scores = gl.where(((entry >> query) & 1 > 0)[:, None], scores, -INF)
    if block >= whole:
        key = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, mma))
        scores = gl.where(key[None] <= position[:, None], scores, -INF)
    best = gl.maximum(top, gl.max(scores, 1))
    safe = gl.where(best == -INF, 0.0, best) * score_mul
    p = gl.exp2(scores * score_mul - safe[:, None])
    fade = gl.exp2(top * score_mul - safe)
    return p, fade, total * fade + gl.sum(p, 1), best


@gluon.jit
def _attend_rows(
    q_ptr, out_ptr, lse_ptr, positions_ptr, chosen, q_smem, k_ring, v_ring, k_full, k_empty, v_full, v_empty, first,
    count, r, length, whole, q_token, q_head, heads, score_mul, GROUP: gl.constexpr, SELECTED: gl.constexpr,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, NTH: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows against all blocks of the list."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    mine = q_smem.index(NTH)
    row = NTH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    q_at = (first + row // GROUP).to(gl.int64) * q_token + (r * GROUP + row % GROUP) * q_head
    q = gl.load(q_ptr + q_at[:, None] + d[None], mask=(row < count * GROUP)[:, None], other=0.0)
    mine.store(q)
    fence_async_shared()
    barrier()

    row = NTH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    query = row // GROUP
    real = row < count * GROUP
    position = gl.load(positions_ptr + first + query, mask=real, other=-1).to(gl.int32)
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, mma)
    acc = gl.zeros([ROWS, D], gl.float32, mma)
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, mma))
    top = gl.full([ROWS], -INF, gl.float32, gl.SliceLayout(1, mma))
    if length > 0:
        entry = 0
        if SELECTED:
            entry = gl.load(chosen)
        scores = _issue_scores(mine, k_ring, k_full, 0, nothing, STAGES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        barrier()  # all four warps have read the buffer
        mbarrier.arrive(k_empty.index(0), count=1)
        p, fade, total, top = _weigh(
            scores, total, top, entry, query, position, whole, score_mul, SELECTED, BLOCK, mma
        )  # fmt: skip
        p_half = gl.convert_layout(p.to(q_ptr.dtype.element_ty), weights)
        for n in range(1, length):
            entry = n
            if SELECTED:
                entry = gl.load(chosen + n)
            before = (n - 1) % STAGES
            scores = _issue_scores(mine, k_ring, k_full, n, nothing, STAGES)
            mbarrier.wait(v_full.index(before), (n - 1) // STAGES & 1)
            acc = warpgroup_mma(p_half, v_ring.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            barrier()
            mbarrier.arrive(k_empty.index(n % STAGES), count=1)
            p, fade, total, top = _weigh(
                scores, total, top, entry, query, position, whole, score_mul, SELECTED, BLOCK, mma
            )  # fmt: skip
            following = n + 1
            mbarrier.wait(k_full.index(following % STAGES), following // STAGES & 1, pred=following < length)
            acc, p_half, p = warpgroup_mma_wait(0, deps=(acc, p_half, p))  # p: the exponentials come before the wait
            barrier()
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * fade[:, None]
            p_half = gl.convert_layout(p.to(q_ptr.dtype.element_ty), weights)
        last = length - 1
        mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
        acc = warpgroup_mma(p_half, v_ring.index(last % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    some = total > 0.0
    divisor = gl.where(some, total, 1.0)
    at = (first + query).to(gl.int64) * heads + r * GROUP + row % GROUP
    column = gl.arange(0, D, layout=gl.SliceLayout(0, mma))
    out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + at[:, None] * D + column[None], out, mask=real[:, None])
    gl.store(lse_ptr + at, gl.where(some, (top * score_mul + gl.log2(divisor)) * LN2, -INF), mask=real)


@gluon.jit(do_not_specialize=["table_row", "tile_start"])
def attend_tiles(
    q_ptr, k_pages, v_pages, list_ptr, length_ptr, out_ptr, lse_ptr, seq_ptr, first_ptr, count_ptr, positions_ptr,
    table_ptr, q_token, q_head, table_row, heads, score_mul, tile_start, GROUP: gl.constexpr, SHARE: gl.constexpr,
    WIDTH: gl.constexpr, SELECTED: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of queries (128 rows with their heads) and one KV head. A list has WIDTH entries, block * 256 + a bit a
    query; SHARE KV heads share one. Tiles whose list has a negative length are somebody else's."""
    gl.static_assert(STAGES >= 2, "keys are waited for before the values of the block before are given back")
    tile = gl.program_id(0) + tile_start
    r = gl.program_id(1)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    chosen = list_ptr
    length = 0
    if SELECTED:
        nth = gl.program_id(0) * (gl.num_programs(1) // SHARE) + r // SHARE
        chosen = list_ptr + nth.to(gl.int64) * WIDTH
        length = gl.load(length_ptr + nth)

    if length >= 0:
        seq = gl.load(seq_ptr + tile).to(gl.int64)
        first = gl.load(first_ptr + tile)
        count = gl.load(count_ptr + tile)
        row = gl.arange(0, 2 * ROWS, layout=flat)
        real = row < count * GROUP
        position = gl.load(positions_ptr + first + row // GROUP, mask=real, other=-1).to(gl.int32)
        whole = (gl.min(gl.where(real, position, HIGHEST), 0) + 1) // BLOCK  # blocks before it are seen as a whole
        if not SELECTED:
            length = (gl.max(position, 0) + BLOCK) // BLOCK
        half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        q_smem = gl.allocate_shared_memory(k_pages.dtype, [2, ROWS, D], half)
        k_ring = gl.allocate_shared_memory(k_pages.dtype, [STAGES, BLOCK, D], half)
        v_ring = gl.allocate_shared_memory(k_pages.dtype, [STAGES, BLOCK, D], half)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_full.index(stage), count=1)
            mbarrier.init(k_empty.index(stage), count=2)
            mbarrier.init(v_full.index(stage), count=1)
            mbarrier.init(v_empty.index(stage), count=2)
        fence_async_shared()
        table = table_ptr + seq * table_row
        gl.warp_specialize(
            [
                (_attend_rows, (q_ptr, out_ptr, lse_ptr, positions_ptr, chosen, q_smem, k_ring, v_ring, k_full,
                                k_empty, v_full, v_empty, first, count, r, length, whole, q_token, q_head, heads,
                                score_mul, GROUP, SELECTED, BLOCK, D, STAGES, 0)),
                (_attend_rows, (q_ptr, out_ptr, lse_ptr, positions_ptr, chosen, q_smem, k_ring, v_ring, k_full,
                                k_empty, v_full, v_empty, first, count, r, length, whole, q_token, q_head, heads,
                                score_mul, GROUP, SELECTED, BLOCK, D, STAGES, 1)),
                (_bring, (k_pages, v_pages, k_ring, v_ring, k_full, k_empty, v_full, v_empty, chosen, table, r, length,
                          SELECTED, STAGES)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
