"""Block scores on Hopper: one long product of (query, index head) rows with keys, and a maximum behind it.

256 rows stay in shared memory. A producer warp brings one page of 128 keys after the other through a tensor map, into a
ring of STAGES buffers; two warpgroups of 128 rows each multiply and take each row's maximum. While the one takes its
maximum the other keeps the tensor cores busy. Both read the same keys, so a page is read from the L2 once in 256 rows.
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

# Names that changed: since Triton 3.7, and in 3.6; since 3.9, and before.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_page = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_rows = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
seen_as = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

INF = gl.constexpr(float("inf"))
ROWS = gl.constexpr(128)  # of one warpgroup
HIGHEST = gl.constexpr(2**31 - 1)


@gluon.jit
def _bring_pages(k_pages, ring, full, empty, table, begin, end, STAGES: gl.constexpr):
    """The producer: pages of blocks begin .. end, each once its buffer has been read by both warpgroups."""
    for block in range(begin, end):
        n = block - begin
        stage = n % STAGES
        page = gl.load(table + block)
        mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), k_pages.block_type.nbytes)
        load_page(k_pages, [page, 0, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _score_rows(
    q_ptr, positions_ptr, out_ptr, q_smem, ring, full, empty, first, count, q_token, q_head, width, begin, whole, end,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, NTH: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 128 rows against blocks begin .. end; before `whole` every row sees every key."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    mine = q_smem.index(NTH)
    row = NTH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    q_at = (first + row // HEADS).to(gl.int64) * q_token + (row % HEADS) * q_head
    q = gl.load(q_ptr + q_at[:, None] + d[None], mask=(row < count * HEADS)[:, None], other=0.0)
    mine.store(q)
    fence_async_shared()
    barrier()

    row = NTH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    real = row < count * HEADS
    position = gl.load(positions_ptr + first + row // HEADS, mask=real, other=-1).to(gl.int32)
    key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, mma))
    out = out_ptr + row.to(gl.int64) * width
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, mma)
    for block in range(begin, end):
        n = block - begin
        stage = n % STAGES
        mbarrier.wait(full.index(stage), n // STAGES & 1)
        scores = warpgroup_mma(mine, ring.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        barrier()  # all four warps have read the buffer
        mbarrier.arrive(empty.index(stage), count=1)
        if block >= whole:
            scores = gl.where((block * BLOCK + key)[None] <= position[:, None], scores, -INF)
        gl.store(out + block, gl.max(scores, 1), mask=real)


@gluon.jit(do_not_specialize=["table_row", "tile_start"])
def score_tiles(
    q_ptr, k_pages, scores_ptr, seq_ptr, first_ptr, count_ptr, base_ptr, width_ptr, positions_ptr, table_ptr, q_token,
    q_head, table_row, tile_start, HEADS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, PER: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of at most 256 rows against PER blocks; scores [rows, width] of a tile lie at its `base`."""
    tile = gl.program_id(0) + tile_start
    begin = gl.program_id(1) * PER
    flat: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    seq = gl.load(seq_ptr + tile).to(gl.int64)
    first = gl.load(first_ptr + tile)
    count = gl.load(count_ptr + tile)
    width = gl.load(width_ptr + tile)
    row = gl.arange(0, 2 * ROWS, layout=flat)
    real = row < count * HEADS
    position = gl.load(positions_ptr + first + row // HEADS, mask=real, other=-1).to(gl.int32)
    last = gl.max(position, 0)
    lowest = gl.min(gl.where(real, position, HIGHEST), 0)
    end = gl.minimum(begin + PER, (last + BLOCK) // BLOCK)
    whole = (lowest + 1) // BLOCK
    if begin < end:
        shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        q_smem = gl.allocate_shared_memory(k_pages.dtype, [2, ROWS, D], shared)
        ring = gl.allocate_shared_memory(k_pages.dtype, [STAGES, BLOCK, D], shared)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=2)
        fence_async_shared()
        out = scores_ptr + gl.load(base_ptr + tile)
        table = table_ptr + seq * table_row
        gl.warp_specialize(
            [
                (_score_rows, (q_ptr, positions_ptr, out, q_smem, ring, full, empty, first, count, q_token, q_head,
                               width, begin, whole, end, HEADS, BLOCK, D, STAGES, 0)),
                (_score_rows, (q_ptr, positions_ptr, out, q_smem, ring, full, empty, first, count, q_token, q_head,
                               width, begin, whole, end, HEADS, BLOCK, D, STAGES, 1)),
                (_bring_pages, (k_pages, ring, full, empty, table, begin, end, STAGES)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
