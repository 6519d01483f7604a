"""Attention of many queries on a GPU: one FlexAttention kernel over all sequences of a plan, dense or sparse.

The mask is a function of two positions: same sequence, not after the query, and (sparse) a bit that says whether the
query selected the key's block. Which tiles of 128 x 128 are visited follows from the sequences alone, so it is worked
out once a plan, on the device, without a host sync. The kernel computes whole visited tiles: right for training at
moderate lengths and for mixed batches of short prompts; work grows as dense attention does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.msa.plan import Plan, to_device

TILE = 128
RECOMPILES = 64  # PyTorch's own limit of 8 is soon reached by prompts of many sizes; it then attends without a kernel


@cache
def _kernel(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


@dataclass(frozen=True)
class _Layout:
    """Where queries and keys stand, padded to a few sizes so that kernels are compiled once.

    q_seq, q_pos int32 [T']; k_seq, k_pos int32 [N']; padding is in no sequence. `gather` int64 [N]: each key's slot in
    a cache seen as [P * block], for paged plans. `counts` int32 [tiles], `indices` int32 [tiles, key tiles].
    """

    q_seq: Tensor
    q_pos: Tensor
    k_seq: Tensor
    k_pos: Tensor
    gather: Tensor | None
    counts: Tensor
    indices: Tensor


_layouts: WeakKeyDictionary[Plan, _Layout] = WeakKeyDictionary()


def _padded(n: int) -> int:
    """The next power of two, at least a tile."""
    return max(TILE, 1 << (n - 1).bit_length())


def _layout(plan: Plan) -> _Layout:
    if plan in _layouts:
        return _layouts[plan]
    device, total = plan.device, sum(plan.lens_k)
    lens = torch.tensor(plan.lens_k)
    k_seq = torch.repeat_interleave(torch.arange(len(lens)), lens)
    k_pos = torch.arange(total) - (lens.cumsum(0) - lens)[k_seq]
    k_seq, k_pos = to_device(k_seq, device), to_device(k_pos, device)
    gather = None
    if plan.page_table is not None:
        pages = plan.page_table[k_seq, k_pos // plan.block_size].long()
        gather = pages * plan.block_size + k_pos % plan.block_size
    t, n = _padded(plan.num_queries), _padded(total)
    start = plan.cu_seqlens_k[plan.seq_ids]
    pad = (0, t - plan.num_queries)
    first = F.pad(start, pad, value=n).view(-1, TILE).amin(1) // TILE  # the first key tile that a tile of queries sees
    last = (F.pad(start + plan.positions + 1, pad, value=0).view(-1, TILE).amax(1) + TILE - 1) // TILE
    indices = first[:, None] + torch.arange(n // TILE, device=device)
    layout = _Layout(
        q_seq=F.pad(plan.seq_ids.int(), pad, value=-1),
        q_pos=F.pad(plan.positions.int(), pad, value=-1),
        k_seq=F.pad(k_seq.int(), (0, n - total), value=-2),
        k_pos=F.pad(k_pos.int(), (0, n - total), value=0),
        gather=gather,
        counts=(last - first).clamp_min(0).int(),
        indices=indices.clamp_max(n // TILE - 1).int(),
    )
    _layouts[plan] = layout
    return layout


def _block_mask(layout: _Layout, selected: Tensor | None, group: int, block_size: int):
    from torch.nn.attention.flex_attention import BlockMask

    q_seq, q_pos, k_seq, k_pos = layout.q_seq, layout.q_pos, layout.k_seq, layout.k_pos

    def visible(b, h, i, j):
        return (q_seq[i] == k_seq[j]) & (k_pos[j] <= q_pos[i])

    def chosen(b, h, i, j):
        return visible(b, h, i, j) & selected[h // group, i, k_pos[j] // block_size]

    return BlockMask.from_kv_blocks(
        layout.counts[None, None],
        layout.indices[None, None],
        BLOCK_SIZE=TILE,
        mask_mod=visible if selected is None else chosen,
        seq_lengths=(len(q_seq), len(k_seq)),
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, scale: float, *, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """[T, Hq, D], lse float32 [T, Hq]; blocks int32 [Hi, T, topk], or None for dense. Differentiable on packed keys."""
    from torch.nn.attention.flex_attention import AuxRequest

    layout = _layout(plan)
    t, n = len(layout.q_seq), len(layout.k_seq)
    if layout.gather is not None:
        page, offset = layout.gather // plan.block_size, layout.gather % plan.block_size
        k, v = k[page, :, offset], v[page, :, offset]
    selected, group = None, 1
    if blocks is not None:
        width = max(512, _padded(-(-plan.max_k // plan.block_size)))
        bits = torch.zeros(len(blocks), t, width + 1, dtype=torch.bool, device=q.device)
        bits[:, : len(q)].scatter_(-1, blocks.long().masked_fill(blocks < 0, width), True)
        selected, group = bits, q.shape[1] // len(blocks)
    queries, keys, values = (
        F.pad(x, (0, 0, 0, 0, 0, size - len(x))).transpose(0, 1)[None] for x, size in ((q, t), (k, n), (v, n))
    )
    mask = _block_mask(layout, selected, group, plan.block_size)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        out, aux = _kernel(compiled)(
            queries, keys.to(q.dtype), values.to(q.dtype), block_mask=mask, scale=scale, enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    return out[0].transpose(0, 1)[: len(q)], aux.lse[0].T[: len(q)]
