"""The kernel of `qk_norm_rope_store`: rows are the heads of all tokens, tiles are rows of one kind (say, of q).

A row is read as three parts: the two that RoPE turns together, and the rest; so no value has to find its partner.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale(number, ptr, GIVEN: tl.constexpr):
    """A scale that lies on the device, else the number that came with the launch."""
    if GIVEN:
        number = tl.load(ptr).to(tl.float32)
    return number


@triton.jit
def _store(ptr, x, scale, mask):
    if ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.div_rn(x, tl.zeros_like(x) + scale)
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _move(
    x_ptr, out_ptr, w_ptr, cos_ptr, sin_ptr, token, src, dst, real, kept, scale, eps,
    D: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Rows that start at x_ptr + src to out_ptr + dst, where `kept`; normalized and rotated if TURNED."""
    i, j = tl.arange(0, HALF_PAD), tl.arange(0, REST_PAD)
    turns, stays = (i < HALF)[None], (j < D - 2 * HALF)[None]
    x_at, out_at = x_ptr + src[:, None], out_ptr + dst[:, None]
    a = tl.load(x_at + i[None], mask=real[:, None] & turns, other=0.0).to(tl.float32)
    b = tl.load(x_at + (HALF + i)[None], mask=real[:, None] & turns, other=0.0).to(tl.float32)
    rest = tl.load(x_at + (2 * HALF + j)[None], mask=real[:, None] & stays, other=0.0).to(tl.float32)
    if TURNED:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / D + eps)[:, None]
        w_a = 1.0 + tl.load(w_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None]
        w_b = 1.0 + tl.load(w_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None]
        w_rest = 1.0 + tl.load(w_ptr + 2 * HALF + j, mask=j < D - 2 * HALF, other=0.0).to(tl.float32)[None]
        a = (a * factor * w_a).to(dtype).to(tl.float32)
        b = (b * factor * w_b).to(dtype).to(tl.float32)
        rest = (rest * factor * w_rest).to(dtype).to(tl.float32)
        angle = token[:, None] * HALF + i[None]
        cos = tl.load(cos_ptr + angle, mask=real[:, None] & turns, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=real[:, None] & turns, other=0.0)
        turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
        a, b = turned_a.to(dtype).to(tl.float32), turned_b.to(dtype).to(tl.float32)
    _store(out_at + i[None], a, scale, kept[:, None] & turns)
    _store(out_at + (HALF + i)[None], b, scale, kept[:, None] & turns)
    _store(out_at + (2 * HALF + j)[None], rest, scale, kept[:, None] & stays)


@triton.jit
def _rows(tile, tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """(token, head, whether they are there) of a tile's rows, int64."""
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row // HEADS, row % HEADS, row // HEADS < tokens


@triton.jit
def _slots(slots_ptr, token, real, BLOCK: tl.constexpr):
    """(page, offset, whether the token is stored) of rows."""
    slot = tl.load(slots_ptr + token, mask=real, other=-1)
    kept = slot >= 0
    slot = tl.where(kept, slot, 0)
    return slot // BLOCK, slot % BLOCK, kept


@triton.jit(do_not_specialize=["tokens"])
def norm_rope_store(
    q_ptr, k_ptr, v_ptr, index_q_ptr, index_k_ptr, q_norm_ptr, k_norm_ptr, index_q_norm_ptr, index_k_norm_ptr, cos_ptr,
    sin_ptr, slots_ptr, out_ptr, index_out_ptr, k_cache_ptr, v_cache_ptr, index_cache_ptr, k_scale_ptr, v_scale_ptr,
    index_scale_ptr, k_scale, v_scale, index_scale, q_token, q_head, k_token, k_head, v_token, v_head, index_q_token,
    index_q_head, index_k_token, k_page, k_page_head, k_offset, v_page, v_page_head, v_offset, index_page, index_offset,
    tokens, eps, HQ: tl.constexpr, HKV: tl.constexpr, HI: tl.constexpr, D: tl.constexpr, DI: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
    INDEX_REST_PAD: tl.constexpr, ROWS: tl.constexpr, INDEXED: tl.constexpr, K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr, INDEX_SCALED: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS rows: the keys' tiles come first, then those of values, queries, index keys, index queries."""
    kv_tiles = tl.cdiv(tokens * HKV, ROWS)
    q_tiles = tl.cdiv(tokens * HQ, ROWS)
    tile = tl.program_id(0)
    if tile < kv_tiles:
        token, head, real = _rows(tile, tokens, HKV, ROWS)
        page, offset, kept = _slots(slots_ptr, token, real, BLOCK)
        _move(
            k_ptr, k_cache_ptr, k_norm_ptr, cos_ptr, sin_ptr, token, token * k_token + head * k_head,
            page * k_page + head * k_page_head + offset * k_offset, real, kept, _scale(k_scale, k_scale_ptr, K_SCALED),
            eps, D, HALF, HALF_PAD, REST_PAD, True,
        )  # fmt: skip
    elif tile < 2 * kv_tiles:
        token, head, real = _rows(tile - kv_tiles, tokens, HKV, ROWS)
        page, offset, kept = _slots(slots_ptr, token, real, BLOCK)
        _move(
            v_ptr, v_cache_ptr, k_norm_ptr, cos_ptr, sin_ptr, token, token * v_token + head * v_head,
            page * v_page + head * v_page_head + offset * v_offset, real, kept, _scale(v_scale, v_scale_ptr, V_SCALED),
            eps, D, HALF, HALF_PAD, REST_PAD, False,
        )  # fmt: skip
    elif tile < 2 * kv_tiles + q_tiles:
        token, head, real = _rows(tile - 2 * kv_tiles, tokens, HQ, ROWS)
        _move(
            q_ptr, out_ptr, q_norm_ptr, cos_ptr, sin_ptr, token, token * q_token + head * q_head,
            (token * HQ + head) * D, real, real, 1.0, eps, D, HALF, HALF_PAD, REST_PAD, True,
        )  # fmt: skip
    elif INDEXED:
        tile -= 2 * kv_tiles + q_tiles
        index_tiles = tl.cdiv(tokens, ROWS)
        if tile < index_tiles:
            token, head, real = _rows(tile, tokens, 1, ROWS)
            page, offset, kept = _slots(slots_ptr, token, real, BLOCK)
            _move(
                index_k_ptr, index_cache_ptr, index_k_norm_ptr, cos_ptr, sin_ptr, token, token * index_k_token,
                page * index_page + offset * index_offset, real, kept,
                _scale(index_scale, index_scale_ptr, INDEX_SCALED), eps, DI, HALF, HALF_PAD, INDEX_REST_PAD, True,
            )  # fmt: skip
        else:
            token, head, real = _rows(tile - index_tiles, tokens, HI, ROWS)
            _move(
                index_q_ptr, index_out_ptr, index_q_norm_ptr, cos_ptr, sin_ptr, token,
                token * index_q_token + head * index_q_head, (token * HI + head) * DI, real, real, 1.0, eps, DI, HALF,
                HALF_PAD, INDEX_REST_PAD, True,
            )  # fmt: skip
