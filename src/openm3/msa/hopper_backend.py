"""MSA on Hopper (sm_90a), for the M3 family's sizes on paged caches: tensor maps, wgmma, programmatic launches.

decode     up to 16 query tokens a sequence: four launches, the context split over the card (`hopper_decode.py`)
selection  of more: tiles of 256 rows through warp-specialized products (`hopper_select.py`), then as in decode
attention  of more: tiles of neighbouring queries whose blocks are few walk their union, as dense attention walks all
           blocks (`hopper_attend.py`); other tiles' queries are gathered by page (`hopper_gather.py`, `hopper_page.py`)
others     the portable kernels of `triton_backend.py`

Grids follow from what the host knows of a plan, so a captured step follows lengths that change on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openm3.msa import triton_backend
from openm3.msa.keys import Scale
from openm3.msa.plan import Plan, to_device
from openm3.msa.triton_backend import FP8, HALVES, Call, on, pad
from openm3.msa.triton_tiles import Tiles, once, strips_of, tiles_of

if TYPE_CHECKING:
    from openm3.msa.hopper_gather import Cut, Turns

__all__ = ["TUNING", "Tuning", "dense_attention", "refusal", "select_blocks", "sparse_attention"]

BLOCK = DIM = 128
GROUPS, TOPKS, INDEX_HEADS = (8, 16), (8, 16, 32), (1, 2, 4)
TILE_ROWS = 256  # (query, index head) pairs that one program scores
TILE = 128  # rows of a tile of attention
PASS_ROWS = 64  # of a pass of gathered queries, ROWS of `hopper_page.py`
UNITED = 8  # neighbouring queries that walk the union of their blocks: a bit each
MOST_ROWS = 64  # of the narrow operand in decode: (query, head) pairs
MOST_QUERIES = 16  # tokens a sequence that are still a decode step
MOST_SPAN = 256  # steps of one program, whose pages it holds in registers
MOST_BLOCKS = 16384  # of one row of scores
LIST_PIECE = 8192  # of them, that are looked at together to list the promising ones
SHORT_LIST = 512  # of these, that are chosen from without a look at the others
MOST_WARPS = 32


@dataclass(frozen=True)
class Tuning:
    """What a kernel's speed depends on and its result does not. Stages are buffers of keys in shared memory."""

    score_stages: int = 3
    score_warps: int = 4
    score_waves: int = 2  # programs a multiprocessor
    narrow_waves: int = 3  # of a scan of fp8 keys
    pick_chunk: int = 128  # blocks a warp
    scan_blocks: int = 512  # a row of a decode step, from which on an fp8 scan is less to read than the exact keys
    attend_keys: int = 64  # keys a step
    attend_stages: int = 3
    attend_waves: int = 2
    few_keys: int = 128  # the same three where there are fewer (token, KV head) pairs than multiprocessors
    few_stages: int = 2
    few_waves: int = 1
    attend_warps: int = 4
    tile_stages: int = 4
    tile_blocks: int = 64  # that one program scores
    union: float = 2.5  # times top-k blocks in a tile's union, above which its queries are gathered
    union_stages: int = 2
    page_window: int = 2048  # gathered queries that take their turns together
    join_warps: int = 4
    join_heads: int = 8
    gather_rows: int = 64  # query heads that pass an fp8 page at a time
    gather_chunk: int = 32  # queries of one program
    gather_stages: int = 2
    programmatic: bool = True  # the next kernel is set up while one still runs


TUNING = Tuning()


def refusal(q: Tensor, k: Tensor, plan: Plan, v: Tensor | None = None) -> str | None:
    """Why this backend cannot serve these tensors ((index) queries and keys), or None if it can."""
    if reason := triton_backend.refusal(q, k, plan, v):
        return reason
    if q.is_cuda and (torch.version.hip is not None or triton_backend._capability(q.device) != (9, 0)):
        return "it needs a Hopper GPU (sm_90)"
    if plan.page_table is None:
        return "packed keys: its keys lie in pages"
    if plan.block_size != BLOCK or q.shape[-1] != DIM:
        return f"blocks of {plan.block_size}, head dim {q.shape[-1]}: must be {BLOCK} and {DIM}"
    if plan.topk not in TOPKS:
        return f"topk = {plan.topk}: must be one of {TOPKS}"
    if v is None and q.shape[1] not in INDEX_HEADS:
        return f"{q.shape[1]} index heads: must be one of {INDEX_HEADS}"
    if v is not None and q.shape[1] // k.shape[1] not in GROUPS:
        return f"{q.shape[1] // k.shape[1]} query heads a KV head: must be one of {GROUPS}"
    if q.dtype not in HALVES:
        return f"queries of {q.dtype}: must be bfloat16 or float16"
    for x in (k,) if v is None else (k, v):
        if x.dtype not in (q.dtype, FP8) or x.dtype != k.dtype:
            return f"keys of {x.dtype}: must be {q.dtype} as the queries are, or float8_e4m3fn"
        if x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in x.stride()[:-1]):
            return f"keys with strides {x.stride()}: pages, heads and tokens must start at multiples of 16 bytes"
    return None


def _launch(warps: int, plan: Plan) -> dict:
    programmatic = TUNING.programmatic and plan.device.type == "cuda"
    return dict(PDL=programmatic, num_warps=warps) | (dict(launch_pdl=True) if programmatic else {})


def _each(plan: Plan) -> int:
    """How many query tokens every sequence has, or 0."""
    return plan.max_q if min(plan.lens_q) == plan.max_q else 0


def _is_step(plan: Plan) -> bool:
    return 0 < plan.max_q <= MOST_QUERIES and -(-plan.max_k // BLOCK) <= MOST_BLOCKS


def _pages(x: Tensor, keys: int):
    """The tensor map of pages [P, (Hkv,) BLOCK, DIM], read `keys` of one page at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [1] * (x.dim() - 2) + [keys, DIM])


def _swizzled_pages(x: Tensor, keys: int, columns: int = DIM):
    """`_pages` for Gluon."""
    return _swizzled(x, [1] * (x.dim() - 2) + [keys, columns])


def _swizzled(x: Tensor, shape: list[int]):
    """The tensor map of boxes of x for Gluon, in the layout that wgmma reads."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.itemsize, rank=x.dim())
    return TensorDescriptor.from_tensor(x, shape, layout)


def _split(steps: int, programs: int, waves: int, device: torch.device) -> tuple[int, int]:
    """(parts, most steps of a part) that give the card its waves of programs."""
    wanted = max(1, waves * triton_backend._multiprocessors(device) // programs)
    share = min(MOST_SPAN, -(-steps // min(wanted, steps)))
    return -(-steps // share), share


# Selection -----------------------------------------------------------------------------------------------------------


def select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale = None, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Without `scores`, queries that see no more blocks than they may select may take all of them, unscored."""
    rows, width = pad(index_q.shape[1] * plan.max_q), _width(plan)
    if _is_step(plan) and 4 * len(plan.lens_q) * rows * width <= plan.workspace_bytes:
        return _select_step(index_q, index_k, plan, index_k_scale, scores, None, None)
    if width <= MOST_BLOCKS and index_k.dtype == index_q.dtype and not triton_backend._interpreted():
        return _select_tiles(index_q, index_k, plan, scores)
    return triton_backend.select_blocks(index_q, index_k, plan, index_k_scale, scores)


def select_exactly(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale, scores: bool, exact: Tensor, error: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`select_blocks` from the keys `exact`; a long decode step reads their fp8 copy `index_k`, and few of them."""
    rows, width = index_q.shape[1] * plan.max_q, _width(plan)
    if not _is_step(plan) or exact.dtype != index_q.dtype or width < TUNING.scan_blocks * rows:
        return select_blocks(index_q, exact, plan, None, scores)
    if 8 * len(plan.lens_q) * pad(rows) * width > plan.workspace_bytes:
        return select_blocks(index_q, exact, plan, None, scores)
    return _select_step(index_q, index_k, plan, index_k_scale, scores, exact, error)


def _width(plan: Plan) -> int:
    return max(1, -(-plan.max_k // BLOCK))


def _select_step(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale, scores: bool, exact: Tensor | None,
    error: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    import triton.language as tl

    from openm3.msa import hopper_decode, hopper_pick

    (tokens, heads, _), device, batch, tuning = index_q.shape, index_q.device, len(plan.lens_q), TUNING
    rows, width, bounds = pad(heads * plan.max_q), _width(plan), exact is not None
    blocks = torch.empty(heads, tokens, plan.topk, dtype=torch.int32, device=device)
    values = torch.empty(blocks.shape, dtype=torch.float32, device=device) if scores else None
    found = torch.empty(batch, rows, width, dtype=torch.float32, device=device)
    index_q = index_q if index_q.stride(-1) == 1 else index_q.contiguous()
    scale, scale_page, k_mul = _key_scale(index_k_scale, found)
    table, table_row = triton_backend._table(plan)
    narrow, dot = index_k.dtype == FP8, triton_backend._product(index_q, index_q)["DOT"]
    splits, span = _split(width, batch, tuning.narrow_waves if narrow else tuning.score_waves, device)
    chunk = pad(width, plan.topk)
    lengths = dict(EACH=_each(plan), HEADS=heads, ROWS=rows, BLOCK=BLOCK)
    with on(device):
        hopper_decode.score_step[(splits, batch)](
            index_q, _pages(index_k, BLOCK), scale, error if bounds else found,
            found.view(torch.int32) if bounds else found, plan.cu_seqlens_q, plan.positions, table, index_q.stride(0),
            index_q.stride(1), table_row, scale_page, width, k_mul, **lengths, D=DIM, SPAN=pad(span, 1),
            SCALED=scale is not found, NARROW=narrow, BOUNDS=bounds, DOT=tl.float16 if narrow else dot,
            STAGES=tuning.score_stages, **_launch(tuning.score_warps, plan),
        )  # fmt: skip
        listed, length, short, warps = found, found, 0, min(MOST_WARPS, max(1, chunk // tuning.pick_chunk))
        if bounds:
            listed, length = _rescore(index_q, exact, plan, found, table, table_row, lengths, dot)
            short, warps = min(SHORT_LIST, chunk), min(8, warps)
        hopper_pick.pick_step[(heads * plan.max_q, batch)](
            found, listed, length, blocks, values if scores else found, plan.cu_seqlens_q, plan.positions, width,
            tokens, **lengths, TOPK=plan.topk, LOCAL=plan.local_blocks, INIT=plan.init_blocks, CHUNK=chunk,
            SHORT=short, VALUES=scores, **_launch(warps, plan),
        )  # fmt: skip
    return blocks, values


def _key_scale(scale: Scale, none: Tensor) -> tuple[Tensor, int, float]:
    """A scale as kernels take it: a tensor (`none` where there is none), its stride from page to page, a number."""
    if not isinstance(scale, Tensor):
        return none, 0, 1.0 if scale is None else float(scale)
    if scale.dim():
        return scale, scale.stride(0), 1.0
    return (scale, 0, 1.0) if scale.device == none.device else (none, 0, float(scale))


def _rescore(
    index_q: Tensor, exact: Tensor, plan: Plan, found: Tensor, table: Tensor, table_row: int, lengths: dict, dot
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Bounds of scores in `found` [B, rows, blocks] become scores, of the blocks that may be chosen. These blocks,
    int32 of the same shape, and how many they are [B, rows]."""
    from openm3.msa import hopper_exact as kernels

    (batch, _, width), heads, device, tuning = found.shape, index_q.shape[1], found.device, TUNING
    listed = torch.empty(found.shape, dtype=torch.int32, device=device)
    length = torch.empty(found.shape[:2], dtype=torch.int32, device=device)
    step = (plan.cu_seqlens_q, plan.positions, table, index_q.stride(0), index_q.stride(1))
    piece = min(LIST_PIECE, pad(width, plan.topk))
    parts, span = _split(width, batch * heads * plan.max_q, tuning.score_waves, device)
    kernels.shortlist_step[(heads * plan.max_q, batch)](
        index_q, exact, found.view(torch.int32), listed, length, *step, exact.stride(0), exact.stride(1), table_row,
        width, **lengths, D=DIM, TOPK=plan.topk, LOCAL=plan.local_blocks, INIT=plan.init_blocks, PIECE=piece,
        GROUPS=min(piece, 4 * plan.topk), **_launch(min(16, max(4, piece // 256)), plan),
    )  # fmt: skip
    kernels.rescore_step[(parts, heads * plan.max_q, batch)](
        index_q, _pages(exact, BLOCK), listed, length, found, *step, table_row, width, **lengths, D=DIM,
        SPAN=pad(span, 1), DOT=dot, STAGES=tuning.score_stages, **_launch(tuning.score_warps, plan),
    )  # fmt: skip
    return listed, length


def _select_tiles(index_q: Tensor, index_k: Tensor, plan: Plan, scores: bool) -> tuple[Tensor, Tensor | None]:
    from openm3.msa import hopper_pick, hopper_select

    (tokens, heads, _), device, tuning = index_q.shape, index_q.device, TUNING
    strips = strips_of(plan, heads, TILE_ROWS, scores)
    blocks, values = triton_backend._selected(strips, heads, tokens, plan, scores)
    if not strips.cuts:
        return blocks, values
    found = torch.empty(strips.size, dtype=torch.float32, device=device)
    index_q = index_q if index_q.stride(-1) == 1 else index_q.contiguous()
    table, table_row = triton_backend._table(plan)
    tiles, pages = strips.tiles, _swizzled_pages(index_k, BLOCK)
    with on(device):
        for a, b, widest in strips.cuts:
            per = tuning.tile_blocks
            while per > 4 and (b - a) * -(-widest // per) < 2 * triton_backend._multiprocessors(device):
                per //= 2
            hopper_select.score_tiles[(b - a, -(-widest // per))](
                index_q, pages, found, tiles.seq, tiles.first, tiles.count, strips.base, strips.width, plan.positions,
                table, index_q.stride(0), index_q.stride(1), table_row, a, HEADS=heads, BLOCK=BLOCK, D=DIM, PER=per,
                STAGES=tuning.tile_stages, num_warps=4,
            )  # fmt: skip
            chunk = pad(widest, plan.topk)
            hopper_pick.pick_rows[((b - a) * strips.rows,)](
                found, blocks, values if scores else found, tiles.first, tiles.count, strips.base, strips.width,
                plan.positions, tokens, a, strips.rows, HEADS=heads, BLOCK=BLOCK, TOPK=plan.topk,
                LOCAL=plan.local_blocks, INIT=plan.init_blocks, CHUNK=chunk, VALUES=scores,
                num_warps=min(16, max(1, chunk // 1024)), maxnreg=128,
            )  # fmt: skip
    return blocks, values


# Attention -----------------------------------------------------------------------------------------------------------


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, plan: Plan, softmax_scale: float,
    k_scale: Scale = None, v_scale: Scale = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    split = _parts(q, k, plan, plan.topk * BLOCK, len(q))
    call = Call(q, k, v, plan, softmax_scale, k_scale, v_scale)
    if plan.max_q > MOST_QUERIES:
        return _attend_prompt(call, k, v, blocks.contiguous(), plan, softmax_scale)
    if split is None:
        return triton_backend.sparse_attention(q, k, v, blocks, plan, softmax_scale, k_scale, v_scale)
    return _attend_step(call, k, v, blocks.contiguous(), plan, split)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, softmax_scale: float, k_scale: Scale = None, v_scale: Scale = None
) -> tuple[Tensor, Tensor]:
    if plan.max_q > MOST_QUERIES and k.dtype != FP8 and not triton_backend._interpreted():
        tiles = tiles_of(plan, TILE // (q.shape[1] // k.shape[1]))
        if 2 * len(tiles) * k.shape[1] >= triton_backend._multiprocessors(q.device):
            out, lse = _results(q)
            _attend_tiles(q, k, v, plan, softmax_scale, tiles, 0, len(tiles), None, None, out, lse)
            return out, lse
    split = _parts(q, k, plan, plan.max_k, len(plan.lens_q))
    if split is None or plan.max_q * q.shape[1] // k.shape[1] > MOST_ROWS:
        return triton_backend.dense_attention(q, k, v, plan, softmax_scale, k_scale, v_scale)
    return _attend_step(Call(q, k, v, plan, softmax_scale, k_scale, v_scale), k, v, None, plan, split)


@dataclass(frozen=True)
class Split:
    """How a decode step's keys are cut: so many parts of at most `span` steps of `keys` keys, in `stages` buffers."""

    parts: int
    span: int
    keys: int
    stages: int


def _parts(q: Tensor, k: Tensor, plan: Plan, keys: int, units: int) -> Split | None:
    """None for a plan that is no decode step, or where the parts exceed the workspace."""
    if not _is_step(plan):
        return None
    step, stages, waves = TUNING.attend_keys, TUNING.attend_stages, TUNING.attend_waves
    programs = units * k.shape[1]
    if programs < triton_backend._multiprocessors(q.device):
        step, stages, waves = TUNING.few_keys, TUNING.few_stages, TUNING.few_waves
    parts, span = _split(max(1, -(-keys // step)), programs, waves, q.device)
    if 4 * parts * len(q) * q.shape[1] * (DIM + 1) > plan.workspace_bytes:
        return None
    return Split(parts, span, step, stages)


def _attend_step(
    call: Call, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, split: Split
) -> tuple[Tensor, Tensor]:
    from openm3.msa import hopper_decode as kernels

    q, parts, step = call.q, split.parts, split.keys
    (tokens, heads, _), hkv, device = q.shape, k.shape[1], q.device
    group, selected = heads // hkv, blocks is not None
    table, q_token, q_head, *_, table_row, k_page, k_head, v_page, v_head = call.strides
    units = (tokens if selected else len(plan.lens_q)) * hkv
    out, lse = _results(q)
    part, part_lse = out, lse
    if parts > 1:
        part = torch.empty(parts, *q.shape, dtype=torch.float32, device=device)
        part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=device)
    with on(device):
        kernels.attend_step[(units, parts)](
            q, _pages(k, step), _pages(v, step), blocks if selected else table, part, part_lse, *call.scales,
            plan.cu_seqlens_q, plan.seq_ids, plan.positions, table, q_token, q_head, table_row, k_page, k_head, v_page,
            v_head, tokens, heads, *call.factors, EACH=_each(plan), GROUP=group, KV_HEADS=hkv,
            SHARE=hkv // len(blocks) if selected else 1, TOPK=plan.topk, SELECTED=selected,
            ROWS=pad(group if selected else group * plan.max_q), BLOCK=BLOCK, BN=step, D=DIM, SPAN=pad(split.span, 1),
            K_SCALED=call.switches["K_SCALED"], V_SCALED=call.switches["V_SCALED"], DOT=call.switches["DOT"],
            STAGES=split.stages, **_launch(TUNING.attend_warps, plan),
        )  # fmt: skip
        if parts > 1:
            kernels.combine_step[(tokens * heads,)](
                part, part_lse, out, lse, tokens * heads, parts, PARTS_PAD=pad(parts, 1), PIECE=min(32, pad(parts, 1)),
                D=DIM, **_launch(4, plan),
            )  # fmt: skip
    return out, lse


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, softmax_scale: float, tiles: Tiles, a: int, n: int,
    lists: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Tiles a .. a + n against the blocks of their lists, [n, Hi, width], or against all they see."""
    from openm3.msa import hopper_attend

    hkv, group, selected = k.shape[1], q.shape[1] // k.shape[1], lists is not None
    table, table_row = triton_backend._table(plan)
    with on(q.device):
        hopper_attend.attend_tiles[(n, hkv)](
            q, _swizzled_pages(k, BLOCK), _swizzled_pages(v, BLOCK), lists if selected else table,
            lengths if selected else table, out, lse, tiles.seq, tiles.first, tiles.count, plan.positions, table,
            q.stride(0), q.stride(1), table_row, q.shape[1], softmax_scale * math.log2(math.e), a, GROUP=group,
            SHARE=hkv // lists.shape[1] if selected else 1, WIDTH=lists.shape[2] if selected else 0,
            SELECTED=selected, BLOCK=BLOCK, D=DIM, STAGES=TUNING.union_stages, num_warps=4,
        )  # fmt: skip


def _attend_prompt(
    call: Call, k: Tensor, v: Tensor, blocks: Tensor, plan: Plan, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Each tile of neighbouring queries by the length of its union: walked as one, or its queries gathered by page, as
    those over fp8 pages all are."""
    from openm3.msa import triton_attend

    q = call.q
    tokens, index_heads, device = len(q), len(blocks), q.device
    out, lse = _results(q)
    key = ("pieces", q.shape[1] // k.shape[1], index_heads, k.dtype, TUNING)
    tiles, pieces = once(plan, key, lambda: _pieces(plan, _most_queries(q, k, index_heads, plan)))
    limit = int(TUNING.union * plan.topk) if k.dtype != FP8 else 0
    for a, n, lo, hi, tile_of in pieces:
        lengths = torch.empty(n, index_heads, dtype=torch.int32, device=device)
        if not limit:
            lengths.fill_(-1)
        else:
            lists = torch.empty(n, index_heads, UNITED * plan.topk, dtype=torch.int32, device=device)
            with on(device):
                triton_attend.unite_blocks[(n, index_heads)](
                    blocks, lists, lengths, tiles.first, tiles.count, tokens, a, QUERIES=UNITED, TOPK=plan.topk,
                    TOPK_PAD=plan.topk, LIMIT=limit, num_warps=1,
                )  # fmt: skip
            _attend_tiles(q, k, v, plan, softmax_scale, tiles, a, n, lists, lengths, out, lse)
        if limit < UNITED * plan.topk:
            _gather(call, k, v, blocks, plan, lo, hi, tile_of, lengths, out, lse)
    return out, lse


def _cut(q: Tensor, k: Tensor, queries: int, plan: Plan) -> Cut:
    """How the pairs of so many queries are cut: into shares, if their pages are streamed. Each window reads the pages
    again: there are as many as cost an eighth of what reading all queries anew would."""
    from openm3.msa.hopper_gather import Cut

    if k.dtype != q.dtype or triton_backend._interpreted():
        return Cut(TUNING.gather_chunk)
    group = q.shape[1] // k.shape[1]
    worth = 1 + queries * plan.topk * group // (16 * BLOCK * _seen(plan))
    windows = max(1, min(-(-queries // TUNING.page_window), worth))
    return Cut(PASS_ROWS // group, windows * triton_backend._multiprocessors(q.device), windows)


def _seen(plan: Plan) -> int:
    """Blocks of all sequences."""
    return max(1, sum(-(-n // BLOCK) for n in plan.lens_k))


def _most_queries(q: Tensor, k: Tensor, index_heads: int, plan: Plan) -> int:
    """So many that the gathered ones' parts, for one KV head, and their order stay in the workspace, but UNITED at
    least: theirs take up to 7 MB."""
    seen, topk = _seen(plan), plan.topk

    def fits(tiles: int) -> bool:
        queries = tiles * UNITED
        _, places = _cut(q, k, queries, plan).sizes(queries * topk, seen)
        part = (q.shape[1] // k.shape[1]) * (2 * DIM + 8)
        return places * part + queries * topk * index_heads * 64 <= plan.workspace_bytes

    low, high = 1, max(1, sum(-(-n // UNITED) for n in plan.lens_q))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * UNITED


def _gather(
    call: Call, k: Tensor, v: Tensor, blocks: Tensor, plan: Plan, lo: int, hi: int, tile_of: Tensor, lengths: Tensor,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Queries lo .. hi of the tiles whose length is negative, by page; one KV head's parts at a time."""
    from openm3.msa import hopper_gather as kernels

    q, hkv, index_heads, tuning = call.q, k.shape[1], len(blocks), TUNING
    heads = q.shape[1]
    group = heads // hkv
    joined, cut = min(group, tuning.join_heads), _cut(q, k, hi - lo, plan)
    with on(q.device):
        turns = kernels.by_page(blocks, plan, lo, hi, tile_of, lengths, len(k), _seen(plan), cut)
        part = torch.empty(turns.room, group, DIM, dtype=torch.float16, device=q.device)
        unit, part_lse = (torch.empty(part.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2))
        parts = (part, unit, part_lse)
        attend = (_attend_streamed if cut.shares else _attend_gathered)(call, k, v, turns, parts, lo)
        for r in range(hkv):
            attend(r)
            kernels.join_slots[((hi - lo) * (group // joined),)](
                *parts, out, lse, turns.places, turns.places.shape[1], lo, heads, r, GROUP=group,
                SHARE=hkv // index_heads, HEADS=joined, TOPK=plan.topk, D=DIM, num_warps=tuning.join_warps,
            )  # fmt: skip


# What attends with the queries of one KV head; its tensor maps are made once for all heads.


def _attend_streamed(
    call: Call, k: Tensor, v: Tensor, turns: Turns, parts: tuple[Tensor, ...], lo: int
) -> Callable[[int], None]:
    from openm3.msa import hopper_page

    q, hkv, count, most = call.q, k.shape[1], turns.pages.shape[1], turns.starts.shape[1] - 2
    if q.data_ptr() % 16 or any(stride * q.itemsize % 16 for stride in q.stride()[:2]):
        q = q.contiguous()
    (part, *others), group, shares = parts, q.shape[1] // hkv, turns.firsts.shape[1] - 1
    maps = (_swizzled(q, [1, group, DIM // 2]), _swizzled_pages(k, BLOCK, DIM // 2), _swizzled_pages(v, BLOCK))
    part_map = _swizzled(part.view(-1, DIM), [PASS_ROWS, DIM])

    def attend(r: int) -> None:
        hopper_page.attend_pages[(triton_backend._multiprocessors(q.device),)](
            *maps, part_map, *others, turns.pages, turns.queries, turns.lasts, turns.starts, turns.firsts, count, most,
            shares, lo, r, *call.factors, GROUP=group, SHARE=hkv // len(turns.pages), BLOCK=BLOCK, D=DIM,
            num_warps=4,
        )  # fmt: skip

    return attend


def _attend_gathered(
    call: Call, k: Tensor, v: Tensor, turns: Turns, parts: tuple[Tensor, ...], lo: int
) -> Callable[[int], None]:
    from openm3.msa import hopper_gather

    q, hkv, count, most = call.q, k.shape[1], turns.pages.shape[1], turns.starts.shape[1] - 2
    group, maps = q.shape[1] // hkv, (_pages(k, BLOCK), _pages(v, BLOCK))

    def attend(r: int) -> None:
        hopper_gather.attend_gathered[(most,)](
            q, *maps, *call.scales, turns.pages, turns.queries, turns.lasts, turns.starts, turns.firsts, *parts,
            q.stride(0), q.stride(1), *call.strides[-4:], count, most, lo, r, *call.factors, GROUP=group,
            SHARE=hkv // len(turns.pages), QUERIES=TUNING.gather_rows // group, CHUNK=TUNING.gather_chunk, BLOCK=BLOCK,
            D=DIM, K_SCALED=call.switches["K_SCALED"], V_SCALED=call.switches["V_SCALED"], DOT=call.switches["DOT"],
            STAGES=TUNING.gather_stages, num_warps=4,
        )  # fmt: skip

    return attend


def _pieces(plan: Plan, most: int) -> tuple[Tiles, list[tuple[int, int, int, int, Tensor]]]:
    """Tiles of UNITED queries in the order of the flat run, and pieces of at most `most` queries of them: (first tile,
    tiles, first query, last + 1, int32 [queries] each one's tile counted from the first)."""
    counts = [-(-n // UNITED) for n in plan.lens_q]
    starts = plan.starts_q()
    first = [start + UNITED * i for start, n in zip(starts, counts) for i in range(n)]
    seq = [s for s, n in enumerate(counts) for _ in range(n)]
    count = [min(UNITED, starts[s + 1] - at) for s, at in zip(seq, first)]
    pieces, size = [], max(1, most // UNITED)
    for a in range(0, len(first), size):
        b = min(a + size, len(first))
        tile_of = torch.repeat_interleave(torch.arange(b - a), torch.tensor(count[a:b])).int()
        pieces.append((a, b - a, first[a], first[b - 1] + count[b - 1], to_device(tile_of, plan.device)))
    tiles = Tiles(*(to_device(torch.tensor(x, dtype=torch.int32), plan.device) for x in (seq, first, count)))
    return tiles, pieces
