"""Decode on a CPU in C (`cpu_decode.c`), where the installation had a compiler: one query each, keys read in place.

Every key and value is read once, whatever the number of heads, out of pages anywhere in the cache. The context is cut
into parts, which threads share; a part's result does not depend on their number.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from openm3.msa.plan import Plan

INF = float("inf")
PART_KEYS = 4096  # of one head that an item takes
THREAD_BYTES = 1 << 21  # a thread is not worth its start for less
TABLES = ("q", "k", "v", "table", "blocks", "positions", "out", "top", "total", "scores")
SIZES = ("tokens", "heads", "group", "dim", "block", "slots", "part", "index_heads", "width", "pages", "table_stride",
         "bf16", "k_page", "k_head", "k_row", "v_page", "v_head", "v_row")  # fmt: skip


class _Problem(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in TABLES), *((name, ctypes.c_int64) for name in SIZES)]


class _Work(ctypes.Structure):
    _fields_ = [("problem", ctypes.POINTER(_Problem)), *((n, ctypes.c_int64) for n in ("items", "next", "failed"))]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None where they could not be built or are those of another revision."""
    for suffix in EXTENSION_SUFFIXES:
        if (path := Path(__file__).with_name("_cpu_decode" + suffix)).exists():
            found = ctypes.CDLL(str(path))
            if not hasattr(found, "openm3_decode_bytes"):
                return None
            found.openm3_decode_bytes.restype = ctypes.c_int64
            return found if found.openm3_decode_bytes() == ctypes.sizeof(_Problem) + ctypes.sizeof(_Work) else None
    return None


@cache
def _openmp() -> Any:
    """How PyTorch's own threads are put to work, None where its OpenMP is another or cannot be found.

    They wait for the next product by spinning for milliseconds: threads beside them would get half of a core.
    """
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None


def fits(queries: Tensor, keys: Tensor, plan: Plan) -> bool:
    """Whether these are single queries over pages of float32 or bf16 on a CPU, in sizes that the C code takes."""
    if plan.page_table is None or plan.max_q != 1 or min(plan.lens_q) != 1 or queries.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        return False
    sizes = keys.shape[-1] % 16 == 0 and plan.block_size <= 256
    return sizes and keys.dtype in (torch.float32, torch.bfloat16) and queries.dtype.itemsize <= 4 and bool(library())


def block_scores(index_q: Tensor, index_k: Tensor, plan: Plan) -> Tensor:
    """[B, Hi, Di] queries over pages [P, block, Di] -> [Hi, B, blocks], -inf where no key is visible."""
    q = _padded(index_q.float()[:, None])  # [B, 1, Hi', Di]
    width = -(-plan.max_k // plan.block_size)
    scores = torch.empty(len(q), q.shape[2], width)
    keys = index_k[:, None]  # one head; there are no values
    problem = _problem(q, keys, keys, None, plan, scores=scores)
    _run("openm3_block_scores", problem, sum(plan.lens_k) * index_k.shape[-1] * index_k.itemsize)
    return scores[:, : index_q.shape[1]].transpose(0, 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """[B, Hq, D], lse float32 [B, Hq]; blocks int32 [Hi, B, topk], or None for all of the context."""
    group = q.shape[1] // k.shape[1]
    queries = _padded((q.float() * softmax_scale).unflatten(1, (-1, group)))  # [B, Hkv, G', D]
    problem = _problem(queries, k, v, blocks, plan)
    parts = (*queries.shape[:2], -(-problem.slots // problem.part), queries.shape[2])
    out = torch.empty(*parts, q.shape[-1])  # [B, Hkv, parts, G', D]
    top, total = torch.empty(parts), torch.empty(parts)
    _give(problem, out=out, top=top, total=total)
    keys = min(sum(plan.lens_k), len(q) * problem.slots * plan.block_size)
    _run("openm3_decode_attention", problem, keys * k.shape[1] * k.shape[-1] * k.itemsize * 2)
    best = top.amax(2, keepdim=True)
    shares = torch.exp(top - best.clamp_min(torch.finfo(torch.float32).min))  # of the parts; 0 for empty ones
    total = (total * shares).sum(2)
    out = (out * shares[..., None]).sum(2) / torch.where(total == 0.0, 1.0, total)[..., None]
    lse = best.squeeze(2) + total.log()
    return out[:, :, :group].flatten(1, 2).to(q.dtype), lse[:, :, :group].flatten(1, 2)


def _padded(q: Tensor) -> Tensor:
    """[B, heads, group, D] with zeros up to a multiple of four queries."""
    return torch.nn.functional.pad(q, (0, 0, 0, -q.shape[2] % 4)).contiguous()


def _problem(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, **tables: Tensor) -> _Problem:
    block = plan.block_size
    part = max(1, PART_KEYS // block)
    slots = -(-plan.max_k // block) if blocks is None else blocks.shape[-1]
    table, positions = plan.page_table, plan.positions.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    blocks = None if blocks is None else blocks.contiguous()
    problem = _Problem(
        tokens=len(q), heads=k.shape[1], group=q.shape[2], dim=q.shape[3], block=block, slots=slots, part=part,
        index_heads=1 if blocks is None else len(blocks), width=table.shape[1], pages=len(k),
        table_stride=table.stride(0), bf16=k.dtype == torch.bfloat16,
        **dict(zip(SIZES[-6:], (*k.stride()[:3], *v.stride()[:3]))),
    )  # fmt: skip
    _give(problem, q=q, k=k, v=v, table=table, blocks=blocks, positions=positions, **tables)
    return problem


def _give(problem: _Problem, **tables: Tensor | None) -> None:
    """Points the problem at tensors, which then live as long as it does: threads may outlive an interrupted caller."""
    problem.tensors = [*getattr(problem, "tensors", ()), *tables.values()]
    for name, tensor in tables.items():
        setattr(problem, name, None if tensor is None else tensor.data_ptr())


def _run(name: str, problem: _Problem, read: int) -> None:
    """All items of a problem that reads so many bytes, on as many threads as PyTorch may use and the work is worth."""
    heads = problem.heads if problem.out else 1
    work = _Work(ctypes.pointer(problem), problem.tokens * heads * -(-problem.slots // problem.part))
    function = getattr(library(), name)
    threads = max(1, min(torch.get_num_threads(), work.items, read // THREAD_BYTES))
    if threads == 1:
        function(ctypes.byref(work))
    elif parallel := _openmp():
        parallel(function, ctypes.byref(work), ctypes.c_uint(threads), ctypes.c_uint(0))
    else:
        others = [Thread(target=function, args=(ctypes.byref(work),), daemon=True) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        function(ctypes.byref(work))
        for thread in others:
            thread.join()
    if work.failed:
        raise ValueError(f"page_table: names pages outside of the cache's {problem.pages}")
