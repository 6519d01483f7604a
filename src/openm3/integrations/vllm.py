"""vLLM's MiniMax-M3 attention ops on openm3's operator: the same names, arguments and cache layouts (vLLM 0.33).

    from openm3.integrations import vllm as ops          # in place of vllm.models.minimax_m3.common.ops

    blocks = ops.minimax_m3_index_decode(idx_q, index_cache, block_table, seq_lens, max_seq_len, 16, 0, 1, 4, 1, 1)
    ops.minimax_m3_sparse_attn_decode(q, kv_cache, blocks, block_table, seq_lens, 4, scale, output, 1)

vLLM itself is not imported. Pages hold one block of 128 tokens: index keys [P, 128, Di], keys beside values
[P, Hkv, 128, 2 D], finite behind a sequence's end too. Blocks come in ascending order, where vLLM's go by score; both
attend alike. Scores and blocks of no key are -inf and -1.

Lengths stay on the device: a step's positions are computed there, so that decode may be captured in a CUDA graph after
one call outside of it, where openm3 attends by its Triton backend. Only a prefill of several sequences reads where its
queries start, a wait for the device.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from openm3 import msa

__all__ = [
    "minimax_m3_index_decode",
    "minimax_m3_index_decode_score",
    "minimax_m3_index_prefill",
    "minimax_m3_index_score",
    "minimax_m3_index_topk",
    "minimax_m3_sparse_attn",
    "minimax_m3_sparse_attn_decode",
]

BLOCK = 128
FORCED_LOCAL, FORCED_INIT = 1e29, 1e30  # what decode's scores say of blocks that are taken in any case
PLANS = 32

_plans: OrderedDict[tuple, msa.Plan] = OrderedDict()


def minimax_m3_index_score(
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    prefix_lens: Tensor,
    max_query_len: int,
    max_seq_len: int,
    num_kv_heads: int,
) -> Tensor:
    """Each query's best score in each block it sees: float32 [heads, T, blocks, rounded up to 16].

    idx_q [T, heads, Di]; index_kv_cache [P, 128, Di]; block_table int32 [B, blocks]; cu_seqlens_q [B+1], seq_lens and
    prefix_lens [B] on the device. ValueError for other than one index head a KV head.
    """
    _check_heads(idx_q, num_kv_heads)
    positions = _positions(cu_seqlens_q, prefix_lens, len(idx_q))
    return _scores(idx_q, index_kv_cache, block_table, _lengths(cu_seqlens_q, len(idx_q)), positions, max_seq_len)


def minimax_m3_index_topk(
    score: Tensor,
    cu_seqlens_q: Tensor,
    prefix_lens: Tensor,
    max_query_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    out: Tensor | None = None,
) -> Tensor:
    """The topk best blocks of each row of `score` [heads, T, blocks]: int32 [heads, T, topk], or in out[:, :T].

    The first `init_blocks` and the last `local_blocks` that a query sees are always among them.
    """
    tokens = score.shape[1]
    seen = (_positions(cu_seqlens_q, prefix_lens, tokens) // BLOCK + 1)[:, None]  # [T, 1]
    ids = torch.arange(score.shape[2], device=score.device)
    rank = score.masked_fill((ids < init_blocks) | (ids >= seen - local_blocks), torch.inf)
    rank = rank.masked_fill(ids >= seen, -torch.inf)
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :topk]  # ties go to the lower block
    best = best.masked_fill(best >= seen, score.shape[2]).sort(dim=-1).values
    blocks = torch.full((*score.shape[:2], topk), -1, dtype=torch.int32, device=score.device)
    blocks[..., : best.shape[-1]] = best.masked_fill(best == score.shape[2], -1)
    return _into(out, blocks)


def minimax_m3_index_prefill(
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    prefix_lens: Tensor,
    max_query_len: int,
    max_seq_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    num_kv_heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """`minimax_m3_index_topk` of `minimax_m3_index_score` in one, without scores of [heads, T, blocks] in memory.

    vLLM has no such op; it is the fast way, because all blocks' scores are not what openm3's kernels are made for.
    """
    _check_heads(idx_q, num_kv_heads)
    lens, positions = _lengths(cu_seqlens_q, len(idx_q)), _positions(cu_seqlens_q, prefix_lens, len(idx_q))
    return _selected(
        idx_q, index_kv_cache, block_table, lens, positions, max_seq_len, topk, init_blocks, local_blocks, out
    )


def minimax_m3_index_decode_score(
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    init_blocks: int,
    local_blocks: int,
    num_kv_heads: int,
    decode_query_len: int,
    max_decode_query_len: int,
    score_out: Tensor | None = None,
) -> Tensor:
    """As `minimax_m3_index_score` for the last `decode_query_len` tokens of each sequence; in score_out where given.

    The first `init_blocks` score 1e30, the last `local_blocks` 1e29.
    """
    _check_heads(idx_q, num_kv_heads)
    lens, positions = _decoded(seq_lens, len(idx_q), decode_query_len)
    score = _scores(idx_q, index_kv_cache, block_table, lens, positions, max_seq_len)
    ids, seen = torch.arange(score.shape[2], device=score.device), (positions // BLOCK + 1)[:, None]
    score.masked_fill_((ids < init_blocks) & (ids < seen), FORCED_INIT)
    score.masked_fill_((ids >= seen - local_blocks) & (ids < seen), FORCED_LOCAL)
    if score_out is None:
        return score
    width = min(score.shape[2], score_out.shape[2])
    score_out[:, : len(idx_q), :width].copy_(score[..., :width])
    return score_out


def minimax_m3_index_decode(
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    num_kv_heads: int,
    decode_query_len: int,
    max_decode_query_len: int,
    out: Tensor | None = None,
    score_out: Tensor | None = None,
) -> Tensor:
    """Blocks for the last `decode_query_len` tokens of each sequence: int32 [heads, T, topk], or in out[:, :T].

    idx_q [T, heads, Di], sequence after sequence; `score_out` takes what `minimax_m3_index_decode_score` gives.
    """
    _check_heads(idx_q, num_kv_heads)
    if score_out is not None:
        minimax_m3_index_decode_score(
            idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, init_blocks, local_blocks, num_kv_heads,
            decode_query_len, max_decode_query_len, score_out,
        )  # fmt: skip
    lens, positions = _decoded(seq_lens, len(idx_q), decode_query_len)
    return _selected(
        idx_q, index_kv_cache, block_table, lens, positions, max_seq_len, topk, init_blocks, local_blocks, out
    )


def minimax_m3_sparse_attn(
    q: Tensor,
    kv_cache: Tensor,
    topk_idx: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    prefix_lens: Tensor,
    max_query_len: int,
    num_kv_heads: int,
    sm_scale: float,
    output: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Attention of q [T, Hq, D] over its blocks topk_idx [Hkv, T, topk] of kv_cache [P, Hkv, 128, 2 D], into `output`.

    `k_scale`, `v_scale` dequantize a float8_e4m3fn cache: one number each (ValueError for one a token).
    """
    lens, positions = _lengths(cu_seqlens_q, len(q)), _positions(cu_seqlens_q, prefix_lens, len(q))
    _attend(q, kv_cache, topk_idx, block_table, lens, positions, num_kv_heads, sm_scale, output, (k_scale, v_scale))


def minimax_m3_sparse_attn_decode(
    q: Tensor,
    kv_cache: Tensor,
    topk_idx: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    num_kv_heads: int,
    sm_scale: float,
    output: Tensor,
    decode_query_len: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """As `minimax_m3_sparse_attn`, for the last `decode_query_len` tokens of each sequence."""
    lens, positions = _decoded(seq_lens, len(q), decode_query_len)
    _attend(q, kv_cache, topk_idx, block_table, lens, positions, num_kv_heads, sm_scale, output, (k_scale, v_scale))


def _selected(
    idx_q: Tensor, cache: Tensor, block_table: Tensor, lens: list[int], positions: Tensor, max_seq_len: int, topk: int,
    init_blocks: int, local_blocks: int, out: Tensor | None,
) -> Tensor:  # fmt: skip
    sizes = dict(topk=topk, local_blocks=local_blocks, init_blocks=init_blocks)
    return _into(out, msa.select_blocks(idx_q, cache, _plan(block_table, lens, positions, max_seq_len, sizes)))


def _scores(
    idx_q: Tensor, cache: Tensor, block_table: Tensor, lens: list[int], positions: Tensor, max_seq_len: int
) -> Tensor:
    """All blocks' scores: a selection that has room for every block."""
    blocks = max(1, -(-max_seq_len // BLOCK))
    plan = _plan(block_table, lens, positions, max_seq_len, dict(topk=blocks))
    _, found = msa.select_blocks(idx_q, cache, plan, return_scores=True)  # [heads, T, blocks], in order
    return torch.nn.functional.pad(found, (0, -blocks % 16), value=-torch.inf)


def _attend(
    q: Tensor, kv_cache: Tensor, topk_idx: Tensor, block_table: Tensor, lens: list[int], positions: Tensor,
    num_kv_heads: int, sm_scale: float, output: Tensor, scales: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    if kv_cache.shape[1] != num_kv_heads or len(topk_idx) != num_kv_heads:
        raise ValueError(
            f"num_kv_heads = {num_kv_heads}: kv_cache has {kv_cache.shape[1]}, topk_idx blocks for {len(topk_idx)}"
        )
    d = q.shape[-1]
    plan = _plan(block_table, lens, positions, block_table.shape[1] * BLOCK, dict(topk=topk_idx.shape[-1]))
    number = [None, None]
    if kv_cache.dtype.itemsize == 1:
        number = [_number(name, scale) for name, scale in zip(("k_scale", "v_scale"), scales)]
    k, v = kv_cache[..., :d], kv_cache[..., d:]
    blocks = topk_idx[:, : len(q)]
    out = msa.sparse_attention(q, k, v, blocks, plan, softmax_scale=sm_scale, k_scale=number[0], v_scale=number[1])
    output.copy_(out)


def _plan(block_table: Tensor, lens_q: list[int], positions: Tensor, max_k: int, sizes: dict[str, int]) -> msa.Plan:
    """A plan for these lengths, kept for the next layers and steps; its positions are written anew for each call."""
    max_k = min(max(max_k, 1), block_table.shape[1] * BLOCK)
    place = (block_table.data_ptr(), block_table.shape, block_table.stride(), block_table.device)
    key = (*place, tuple(lens_q), max_k, *sorted(sizes.items()))
    plan = _plans.pop(key, None)
    if plan is None:
        offsets = [0, *torch.tensor(lens_q, dtype=torch.int64).cumsum(0).tolist()]
        lens_k = [max(max_k, n) for n in lens_q]
        with torch.inference_mode(False):  # else they could be written in inference mode only
            positions = positions.clone()
        plan = msa.Plan.paged(block_table, lens_k, offsets, block_size=BLOCK, positions=positions, **sizes)
        while len(_plans) >= PLANS:
            _plans.popitem(last=False)
    else:
        plan.positions.copy_(positions)
    _plans[key] = plan
    return plan


def _positions(cu_seqlens_q: Tensor, prefix_lens: Tensor, tokens: int) -> Tensor:
    """int64 [T]: each query's place in its sequence, computed on the device."""
    token = torch.arange(tokens, device=cu_seqlens_q.device)
    seq = torch.bucketize(token, cu_seqlens_q[1:].long(), right=True)
    return prefix_lens.long()[seq] + token - cu_seqlens_q.long()[seq]


def _decoded(seq_lens: Tensor, tokens: int, length: int) -> tuple[list[int], Tensor]:
    """Lengths and positions int64 [T] of each sequence's last tokens; -1, seeing nothing, in rows without any."""
    if tokens != len(seq_lens) * length:
        raise ValueError(f"{tokens} queries, must be decode_query_len = {length} for each of {len(seq_lens)} sequences")
    last = torch.arange(length, device=seq_lens.device) - length
    return [length] * len(seq_lens), (seq_lens.long()[:, None] + last).clamp_min(-1).flatten()


def _lengths(cu_seqlens_q: Tensor, tokens: int) -> list[int]:
    return [tokens] if len(cu_seqlens_q) == 2 else cu_seqlens_q.diff().tolist()


def _check_heads(idx_q: Tensor, num_kv_heads: int) -> None:
    if idx_q.shape[1] != num_kv_heads:
        raise ValueError(f"num_kv_heads = {num_kv_heads}: idx_q has {idx_q.shape[1]} heads, must be one a KV head")


def _number(name: str, scale: Tensor | None) -> Tensor | None:
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"{name}: {list(scale.shape)}, must be one number; scales by token are not served")
    return None if scale is None else scale.reshape(())


def _into(out: Tensor | None, blocks: Tensor) -> Tensor:
    if out is None:
        return blocks
    out = out[:, : blocks.shape[1]]
    return out.copy_(blocks)
