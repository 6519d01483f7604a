"""MSA in plain Triton: any GPU that Triton serves, from sm_80 up and AMD's, nothing that only one architecture has.

select    scores of all blocks by strips of queries under the workspace bound, then the best of each row
sparse    tiles of a few neighbouring queries against the union of their blocks
dense     tiles of neighbouring queries against all they see; where tiles are few, several programs share one's keys

Grids follow from what the host knows of a plan; the device is never asked. Triton is imported at the first call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from openm3.msa.keys import Scale
from openm3.msa.plan import Plan
from openm3.msa.triton_tiles import Strips, Tiles, strips_of, tiles_of

__all__ = ["dense_attention", "refusal", "select_blocks", "sparse_attention"]

HALVES = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
MAX_DIM, MAX_GROUP, MAX_TOPK = 256, 64, 128
ROW_CHUNK = 8192  # block scores of a row that one program holds at a time
LEAST_SPAN = 512  # keys that are worth a program of their own in a split context
MAX_PARTS = 64
UNION = 256  # selected blocks of a tile's queries that are united in one program
ROWS = (128, 64)  # rows of a tile: half precision; float32 and wide heads
STEPS = (64, 32)  # keys a step of attention: half precision; float32 and wide heads


def refusal(q: Tensor, k: Tensor, plan: Plan, v: Tensor | None = None) -> str | None:
    """Why this backend cannot serve these tensors ((index) queries and keys), or None if it can."""
    if not _installed():
        return "Triton is not installed: pip install 'openm3[gpu]'"
    if q.device.type != "cuda" and not _interpreted():
        return f"it needs a GPU, the tensors are on {q.device.type}"
    if q.dtype not in (*HALVES, torch.float32):
        return f"queries of {q.dtype}: must be bfloat16, float16 or float32"
    for x in (k,) if v is None else (k, v):
        if x.dtype not in (*HALVES, torch.float32, FP8):
            return f"keys of {x.dtype}: must be bfloat16, float16, float32 or float8_e4m3fn"
        if x.dtype == FP8 and q.is_cuda and _capability(q.device) < (8, 9):
            return "float8_e4m3fn keys need compute capability 8.9 (sm_89) or above, this GPU has {}.{}".format(
                *_capability(q.device)
            )
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"keys with strides {x.stride()}: the last axis must be dense"
    if q.is_cuda and _capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 (sm_80) or above, this GPU has {}.{}".format(*_capability(q.device))
    if q.shape[-1] > MAX_DIM:
        return f"head dim {q.shape[-1]}: must be at most {MAX_DIM}"
    if v is not None and q.shape[1] // k.shape[1] > MAX_GROUP:
        return f"{q.shape[1] // k.shape[1]} query heads a KV head: must be at most {MAX_GROUP}"
    if v is None and q.shape[1] > MAX_GROUP:
        return f"{q.shape[1]} index heads: must be at most {MAX_GROUP}"
    if plan.topk > MAX_TOPK:
        return f"topk = {plan.topk}: must be at most {MAX_TOPK}"
    if v is not None and plan.page_table is not None and _differentiated(q, k, v):
        return "keys in pages have no gradients here"
    return None


def _differentiated(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if torch.version.hip is not None or device.type != "cuda":
        return (8, 9)
    return torch.cuda.get_device_capability(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may use."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def stages(device: torch.device, fixed: int, piece: int, most: int) -> int:
    """Triton's num_stages, for as many pieces of keys in shared memory as fit beside what is `fixed`, in bytes."""
    pieces = max(1, min(most, (_shared_memory(device) - fixed - 2048) // piece))
    # Where products read shared memory by themselves (sm_90, sm_100), the piece in use stays there; else it has left.
    return pieces if _capability(device)[0] in (9, 10) else min(most, pieces + 1)


def on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pad(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _product(q: Tensor, k: Tensor) -> dict:
    """The dtype that products multiply in: the queries', unless that would round the keys."""
    import triton.language as tl

    same = k.dtype in (q.dtype, FP8)
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(q.dtype, tl.float32) if same else tl.float32
    return dict(DOT=dot, PRECISION="ieee")


def _strides(k: Tensor, plan: Plan) -> tuple[int, int, int]:
    """(page, head, token) strides of keys [N, Hkv, D] or pages [P, Hkv, block, D]."""
    return (0, k.stride(1), k.stride(0)) if plan.page_table is None else (k.stride(0), k.stride(1), k.stride(2))


def _table(plan: Plan) -> tuple[Tensor, int]:
    """The page table and its row stride; for packed keys any tensor."""
    if plan.page_table is None:
        return plan.cu_seqlens_k, 0
    table = plan.page_table if plan.page_table.stride(1) == 1 else plan.page_table.contiguous()
    return table, table.stride(0)


# Selection -----------------------------------------------------------------------------------------------------------


def select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale = None, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Without `scores`, queries that see no more blocks than they may select take all of them, unscored."""
    from openm3.msa import triton_select as kernels

    (tokens, heads, d), device, block = index_q.shape, index_q.device, plan.block_size
    single = index_k.dtype not in (index_q.dtype, FP8) or index_q.dtype == torch.float32
    small = single or d > 128
    bm = max(min(ROWS[small], pad(heads * plan.max_q)), pad(heads))
    strips = strips_of(plan, heads, bm, scores)
    blocks, values = _selected(strips, heads, tokens, plan, scores)
    if not strips.cuts:
        return blocks, values
    found = torch.empty(strips.size, dtype=torch.float32, device=device)
    index_q = index_q if index_q.stride(-1) == 1 else index_q.contiguous()
    table, table_row = _table(plan)
    paged = plan.page_table is not None
    page, token = (index_k.stride(0), index_k.stride(1)) if paged else (0, index_k.stride(0))
    by_page = paged and isinstance(index_k_scale, Tensor) and index_k_scale.dim() > 0
    block_pad, bn = pad(block, 1), 32 if d > 128 else 64 if small else 128
    row_bytes = pad(d) * (4 if single else 2)
    depth = stages(device, (bm + (bn if index_k.dtype == FP8 else 0)) * row_bytes, bn * row_bytes, 3)
    tiles = strips.tiles
    with on(device):
        for a, b, widest in strips.cuts:
            per = max(1, _keys_a_program(widest * block, b - a, bn, device) // block_pad)
            kernels.score_blocks[(b - a, -(-widest // per))](
                index_q, index_k, index_k_scale if by_page else found, found, tiles.seq, tiles.first, tiles.count,
                strips.base, strips.width, plan.positions, plan.cu_seqlens_k, table, index_q.stride(0),
                index_q.stride(1), page, token, table_row, index_k_scale.stride(0) if by_page else 0, a,
                HEADS=heads, D=d, D_PAD=pad(d), BLOCK=block, BLOCK_PAD=block_pad, BM=bm, BN=bn, PER=per,
                PAGED=paged, SCALED=by_page, **_product(index_q, index_k),
                num_warps=8 if bm == 128 else 4, num_stages=depth,
            )  # fmt: skip
            chunk = min(ROW_CHUNK, pad(widest))
            kernels.pick_blocks[((b - a) * strips.rows,)](
                found, blocks, values if scores else found, tiles.first, tiles.count, strips.base, strips.width,
                plan.positions, tokens, a, strips.rows, HEADS=heads, BLOCK=block, TOPK=plan.topk,
                TOPK_PAD=pad(plan.topk, 1), LOCAL=plan.local_blocks, INIT=plan.init_blocks, CHUNK=chunk,
                LONG=widest > chunk, VALUES=scores, num_warps=min(8, max(1, chunk // 512)),
            )  # fmt: skip
    if scores and paged and index_k_scale is not None and not by_page:
        values *= index_k_scale
    return blocks, values


def _selected(strips: Strips, heads: int, tokens: int, plan: Plan, scores: bool) -> tuple[Tensor, Tensor | None]:
    """Where a selection goes; queries of no strip have their blocks, all they see, already."""
    if strips.covers_all:
        blocks = torch.empty(heads, tokens, plan.topk, dtype=torch.int32, device=plan.device)
    else:
        ids, own = torch.arange(plan.topk, dtype=torch.int32, device=plan.device), plan.positions // plan.block_size
        blocks = torch.where(ids <= own[:, None], ids, -1).repeat(heads, 1, 1)
    return blocks, torch.empty(blocks.shape, dtype=torch.float32, device=plan.device) if scores else None


def _keys_a_program(keys: int, tiles: int, step: int, device: torch.device) -> int:
    """How many keys one program scores: many, so that queries are loaded once, unless that leaves the device idle."""
    size = 2048
    while size > step and tiles * -(-keys // size) < 4 * _multiprocessors(device):
        size //= 2
    return size


# Attention -----------------------------------------------------------------------------------------------------------


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, plan: Plan, softmax_scale: float,
    k_scale: Scale = None, v_scale: Scale = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from openm3.msa import triton_attend as kernels

    if _differentiated(q, k, v):
        return _with_gradients(q, k, v, blocks, plan, softmax_scale)
    (tokens, hq, d), hkv, block = q.shape, k.shape[1], plan.block_size
    group, call = hq // hkv, Call(q, k, v, plan, softmax_scale, k_scale, v_scale)
    blocks = blocks.contiguous()
    queries = neighbours(plan, group)
    tiles = tiles_of(plan, queries)
    step = min(call.step, pad(block * plan.topk))
    parts = call.parts(len(tiles) * hkv, -(-plan.topk * block // step))

    def launch(out: Tensor, lse: Tensor) -> None:
        for a, n, lists, lengths in unions(blocks, plan, tiles, queries):
            kernels.attend_selected[(n, hkv, parts)](
                call.q, k, v, lists, lengths, out, lse, *call.scales, tiles.seq, tiles.first, tiles.count,
                plan.positions, plan.cu_seqlens_k, *call.strides, tokens, hq, *call.factors, a, GROUP=group,
                SHARE=hkv // len(blocks), D=d, D_PAD=pad(d), BLOCK=block, TOPK=plan.topk, TOPK_PAD=pad(plan.topk, 1),
                QUERIES=queries, BM=pad(queries * group), BN=step, **call.switches, num_warps=4,
                num_stages=call.stages(pad(queries * group), step),
            )  # fmt: skip

    return call.run(launch, parts)


def unions(blocks: Tensor, plan: Plan, tiles: Tiles, queries: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(first tile, tiles, lists, their lengths) by strips of tiles of `queries` queries, under the workspace bound."""
    from openm3.msa import triton_attend as kernels

    if queries == 1:
        yield 0, len(tiles), blocks, blocks
        return
    heads, topk_pad = len(blocks), pad(plan.topk, 1)
    width = queries * topk_pad
    strip = min(len(tiles), max(1, plan.workspace_bytes // (4 * heads * (width + 1))))
    lists, lengths = (
        torch.empty(n, dtype=torch.int32, device=blocks.device) for n in (strip * heads * width, strip * heads)
    )
    for a in range(0, len(tiles), strip):
        n = min(strip, len(tiles) - a)
        kernels.unite_blocks[(n, heads)](
            blocks, lists, lengths, tiles.first, tiles.count, blocks.shape[1], a, QUERIES=queries, TOPK=plan.topk,
            TOPK_PAD=topk_pad, LIMIT=0, num_warps=1,
        )  # fmt: skip
        yield a, n, lists, lengths


def neighbours(plan: Plan, group: int) -> int:
    """How many neighbouring queries walk the union of their blocks together: 64 rows, at most 8 queries' bits."""
    most = min(8, 64 // group, plan.max_q, UNION // pad(plan.topk, 1))
    return 1 << max(0, most.bit_length() - 1)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, softmax_scale: float, k_scale: Scale = None, v_scale: Scale = None
) -> tuple[Tensor, Tensor]:
    from openm3.msa import triton_attend as kernels

    if _differentiated(q, k, v):
        return _with_gradients(q, k, v, None, plan, softmax_scale)
    (tokens, hq, d), hkv = q.shape, k.shape[1]
    group, call = hq // hkv, Call(q, k, v, plan, softmax_scale, k_scale, v_scale)
    bm = max(min(ROWS[call.small], pad(group * plan.max_q)), pad(group))
    size = max(1, bm // group)
    tiles = tiles_of(plan, size)
    parts = call.parts(len(tiles) * hkv, -(-plan.max_k // LEAST_SPAN))
    span = max(1, -(-plan.max_k // (parts * call.step))) * call.step
    parts = max(1, -(-plan.max_k // span))

    def launch(out: Tensor, lse: Tensor) -> None:
        kernels.attend_all[(len(tiles), hkv, parts)](
            call.q, k, v, out, lse, *call.scales, tiles.seq, tiles.first, tiles.count, plan.positions,
            plan.cu_seqlens_k, *call.strides, tokens, hq, *call.factors, span, GROUP=group, D=d, D_PAD=pad(d),
            BLOCK=plan.block_size, BM=bm, BN=call.step, **call.switches, num_warps=8 if bm == 128 else 4,
            num_stages=call.stages(bm, call.step),
        )  # fmt: skip

    return call.run(launch, parts)


def _with_gradients(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    from openm3.msa.triton_backward import Attention

    return Attention.apply(q, k, v, blocks, plan, softmax_scale)


class Call:
    """What both kernels are given alike: scales, strides, factors of scores (base 2) and values, dtypes."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, softmax_scale: float, k_scale: Scale, v_scale: Scale
    ):
        self.q = q if q.stride(-1) == 1 else q.contiguous()
        self.plan, self.paged = plan, plan.page_table is not None
        self.wide = q.dtype == torch.float32 or any(x.dtype not in (q.dtype, FP8) for x in (k, v))
        self.fp8 = FP8 in (k.dtype, v.dtype)
        self.small = self.wide or q.shape[-1] > 128
        self.step = STEPS[self.small]
        numbers, tensors = [1.0, 1.0], [None, None]
        for i, scale in enumerate((k_scale, v_scale) if self.paged else ()):
            if isinstance(scale, Tensor) and (scale.dim() or scale.device.type != "cpu"):
                tensors[i] = scale
            elif scale is not None:
                numbers[i] = float(scale)
        self.scales = tuple(q if x is None else x for x in tensors)
        steps = [(0,) * 2 if x is None else (*x.stride(), 0, 0)[:2] for x in tensors]
        table, table_row = _table(plan)
        self.strides = (
            table, self.q.stride(0), self.q.stride(1), *_strides(k, plan), *_strides(v, plan), table_row, *steps[0],
            *steps[1],
        )  # fmt: skip
        self.factors = (softmax_scale * numbers[0] * math.log2(math.e), numbers[1])
        self.product = _product(q, k if v.dtype in (q.dtype, FP8) else v)
        self.switches = dict(
            PAGED=self.paged, K_SCALED=tensors[0] is not None, V_SCALED=tensors[1] is not None, **self.product
        )

    def stages(self, rows: int, keys: int) -> int:
        row_bytes = pad(self.q.shape[-1]) * (4 if self.wide else 2)
        return stages(self.q.device, (rows + 2 * keys * self.fp8) * row_bytes, 2 * keys * row_bytes, 2)

    def parts(self, programs: int, most: int) -> int:
        """How many programs share one query's keys, so that the device is full and the parts fit the workspace."""
        tokens, hq, d = self.q.shape
        wanted = -(-4 * _multiprocessors(self.q.device) // max(1, programs))
        fitting = self.plan.workspace_bytes // max(1, tokens * hq * (d + 1) * 4)
        return max(1, min(wanted, most, fitting, MAX_PARTS))

    def run(self, launch: Callable[[Tensor, Tensor], None], parts: int) -> tuple[Tensor, Tensor]:
        """`launch(out, lse)` fills [T, Hq, D] and [T, Hq], or as many of them as there are parts, to be combined."""
        from openm3.msa import triton_attend as kernels

        q, (tokens, hq, d) = self.q, self.q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        if not tokens:
            return out, lse
        with on(q.device):
            if parts == 1:
                launch(out, lse)
                return out, lse
            part = torch.empty(parts, *q.shape, dtype=torch.float32, device=q.device)
            part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=q.device)
            launch(part, part_lse)
            kernels.combine[(tokens * hq,)](
                part, part_lse, out, lse, tokens * hq, parts, PARTS_PAD=pad(parts, 1), D=d, D_PAD=pad(d)
            )
        return out, lse
