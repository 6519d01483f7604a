"""What `msa_attention.py` measures: the tensors of a case, the sides that compute on them, and the definition.

A side is one implementation. `SIDES[name](case)` gives its two calls on a case, `select()` and `attend(blocks)`; what
the one returns the other takes. vLLM's and SGLang's M3 operators are sides where they can be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.msa import Plan, dense_attention, index_error, select_blocks, sparse_attention

PIECE = 512  # pages that the definition scores at a time
STRIPES, DRIFT, NOISE = 4, 512, 0.15  # clustered data: see `index_vectors`


@dataclass(frozen=True)
class Geometry:
    """Heads and sizes of one layer; M3's by default."""

    heads: int = 64
    kv_heads: int = 4
    dim: int = 128
    index_heads: int = 4
    index_dim: int = 128
    block: int = 128
    topk: int = 16

    def visible(self, first: int, count: int) -> int:
        """Keys that the queries at positions first .. first + count - 1 see, together."""
        return count * first + count * (count + 1) // 2

    def selected(self, first: int, count: int) -> int:
        """Keys that they attend to: everything up to top-k blocks, then top-k - 1 whole ones and the visible part of
        their own."""
        whole = (self.topk - 1) * self.block
        every = range(first, first + count)
        return sum(p + 1 if p // self.block < self.topk else whole + p % self.block + 1 for p in every)

    def select_flops(self, first: int, count: int) -> int:
        return 2 * self.index_heads * self.index_dim * self.visible(first, count)

    def attend_flops(self, first: int, count: int) -> int:
        return 4 * self.heads * self.dim * self.selected(first, count)

    def dense_flops(self, first: int, count: int) -> int:
        return 4 * self.heads * self.dim * self.visible(first, count)

    def select_bytes(self, batch: int, context: int, width: int = 2) -> int:
        """A decode step's fewest bytes: every index key once, of `width` bytes a number."""
        return batch * context * self.index_dim * width

    def attend_bytes(self, batch: int, context: int, width: int = 2) -> int:
        """Keys and values of the selected blocks, once for each KV head."""
        return batch * self.kv_heads * self.selected(context - 1, 1) * 2 * self.dim * width

    def dense_bytes(self, batch: int, context: int, width: int = 2) -> int:
        return batch * context * self.kv_heads * 2 * self.dim * width


@dataclass(frozen=True)
class Case:
    """The last `queries` tokens of `batch` sequences of `context` tokens, caches in pages in random order.

    kv [P, Hkv, block, 2 * D], keys before values; index_k [P, block, Di]; q [T, Hq, D]; index_q [T, Hi, Di]; page_table
    int32 [batch, pages]. `shared`: what a side derived from the caches, kept for the other cases on the same ones.
    """

    geometry: Geometry
    batch: int
    context: int
    queries: int
    kv: Tensor
    index_k: Tensor
    q: Tensor
    index_q: Tensor
    page_table: Tensor
    shared: dict = field(default_factory=dict)

    @property
    def k(self) -> Tensor:
        return self.kv[..., : self.geometry.dim]

    @property
    def v(self) -> Tensor:
        return self.kv[..., self.geometry.dim :]

    @property
    def prefix(self) -> int:
        return self.context - self.queries

    @cached_property
    def plan(self) -> Plan:
        offsets = [s * self.queries for s in range(self.batch + 1)]
        sizes = dict(block_size=self.geometry.block, topk=self.geometry.topk)
        return Plan.paged(self.page_table, [self.context] * self.batch, offsets, **sizes)

    @cached_property
    def lengths(self) -> dict[str, Tensor]:
        """What the peers take: int32 offsets of the queries, lengths and prefixes of the sequences, their numbers."""
        make = partial(torch.tensor, dtype=torch.int32, device=self.q.device)
        return dict(
            cu_q=make([s * self.queries for s in range(self.batch + 1)]), seq=make([self.context] * self.batch),
            prefix=make([self.prefix] * self.batch), slot=torch.arange(self.batch, device=self.q.device),
        )  # fmt: skip

    def ending_at(self, context: int) -> Case:
        """The same queries and caches in a shorter context."""
        return replace(self, context=context)


def make_case(
    geometry: Geometry, device: str, dtype: torch.dtype, batch: int, context: int, queries: int,
    data: str = "random", seed: int = 0,
) -> Case:  # fmt: skip
    """Random tensors; the same arguments give the same numbers."""
    g, generator = geometry, torch.Generator(device).manual_seed(seed)
    pages = -(-context // g.block)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    table = torch.randperm(batch * pages, device=device, generator=generator).int().view(batch, pages)
    kv = normal(batch * pages, g.kv_heads, g.block, 2 * g.dim)
    index_k, q = normal(batch * pages, g.block, g.index_dim), normal(batch * queries, g.heads, g.dim)
    index_q = index_vectors(g, normal, batch * queries, index_k, table, data)
    return Case(g, batch, context, queries, kv, index_k, q, index_q, table)


def index_vectors(
    g: Geometry, normal: Callable[..., Tensor], tokens: int, index_k: Tensor, table: Tensor, data: str
) -> Tensor:
    """Index queries [T, Hi, Di]. Random ones agree on nothing. Clustered ones select as trained layers do: the first
    block (a sink) and a few others (stripes) always, whose keys in `index_k` are moved toward what all queries ask for;
    the rest by a vector that drifts, new every `DRIFT` tokens, with noise of its own for each token."""
    if data == "random":
        return normal(tokens, g.index_heads, g.index_dim)
    common, anchors = normal(g.index_dim), normal(tokens // DRIFT + 2, g.index_heads, g.index_dim)
    at = torch.arange(tokens, device=index_k.device)
    low, share = at // DRIFT, ((at % DRIFT) / DRIFT).to(index_k.dtype)[:, None, None]
    for nth in range(STRIPES + 1):
        index_k[table[:, table.shape[1] * nth // (STRIPES + 1)].long()] += common * (1 if nth else 2)
    drifting = anchors[low] * (1 - share) + anchors[low + 1] * share
    return drifting + NOISE * normal(tokens, g.index_heads, g.index_dim) + 0.5 * common


def quantized(index_k: Tensor) -> dict[str, Tensor]:
    """Index keys as an exact selection from fp8 takes them: pages with a scale each, and what they were made of."""
    scale = index_k.abs().amax((1, 2)).float() / 448
    keys = (index_k / scale[:, None, None]).to(torch.float8_e4m3fn)
    error = index_error(index_k, keys, scale)
    return dict(index_k=keys, index_k_scale=scale, index_k_exact=index_k, index_k_error=error)


# The sides -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    select: Callable[[], Tensor]
    attend: Callable[[Tensor], Tensor]


def ours(backend: str, case: Case, keys: str = "exact") -> Calls:
    """`keys`: the index keys that are selected from: the exact ones; fp8 pages, approximately; or both, exactly."""
    index = dict(index_k=case.index_k)
    if keys != "exact":
        if "quantized" not in case.shared:
            case.shared["quantized"] = quantized(case.index_k)
        index = dict(case.shared["quantized"])
        if keys == "fp8":
            del index["index_k_exact"], index["index_k_error"]
    return Calls(
        lambda: select_blocks(case.index_q, plan=case.plan, backend=backend, **index),
        lambda blocks: sparse_attention(case.q, case.k, case.v, blocks, case.plan, backend=backend),
    )


def ours_dense(backend: str, case: Case) -> Callable[[], Tensor]:
    return lambda: dense_attention(case.q, case.k, case.v, case.plan, backend=backend)


def vllm(case: Case) -> Calls:
    """vLLM's operators, out of an installed vLLM or lying alone in a package of that name."""
    topk_of, attend_of = _first_of("vllm.models.minimax_m3.common.ops", "vllm", names=("index_topk", "sparse_attn"))
    g, at = case.geometry, case.lengths
    out, scale, table = torch.full_like(case.q, float("nan")), case.geometry.dim**-0.5, case.page_table
    if case.queries == 1:

        def select() -> Tensor:
            return topk_of.minimax_m3_index_decode(
                case.index_q, case.index_k, table, at["seq"], case.context, g.topk, 0, 1, g.kv_heads, 1, 1
            )

        def attend(blocks: Tensor) -> Tensor:
            attend_of.minimax_m3_sparse_attn_decode(
                case.q, case.kv, blocks, table, at["seq"], g.kv_heads, scale, out, 1
            )
            return out

    else:

        def select() -> Tensor:
            scores = topk_of.minimax_m3_index_score(
                case.index_q, case.index_k, table, at["cu_q"], at["seq"], at["prefix"], case.queries, case.context,
                g.kv_heads,
            )  # fmt: skip
            return topk_of.minimax_m3_index_topk(scores, at["cu_q"], at["prefix"], case.queries, g.topk, 0, 1)

        def attend(blocks: Tensor) -> Tensor:
            attend_of.minimax_m3_sparse_attn(
                case.q, case.kv, blocks, table, at["cu_q"], at["seq"], at["prefix"], case.queries, g.kv_heads, scale,
                out,
            )  # fmt: skip
            return out

    return Calls(select, attend)


def sglang(case: Case) -> Calls:
    """SGLang's operators, on a copy of the caches in its layout, token by token."""
    ops = "sglang.kernels.ops.attention.minimax_sparse."
    g, at = case.geometry, case.lengths
    if "sglang" not in case.shared:
        case.shared["sglang"] = _by_token(case)
    k, v, index_k, slots = case.shared["sglang"]
    scored = dict(score_type="max", disable_index_value=True, page_size=g.block)
    if case.queries == 1:
        select_op = import_module(ops + "decode.flash_with_topk_idx").flash_decode_with_topk_idx
        attend_op = import_module(ops + "decode.topk_sparse").flash_decode_with_gqa_share_sparse
        return Calls(
            lambda: select_op(
                case.index_q, None, index_k, None, slots, at["seq"], case.context, at["slot"], g.block, g.topk, 0, 1,
                **scored,
            )[1],
            lambda blocks: attend_op(
                case.q, None, k, v, slots, at["seq"], at["slot"], g.block, blocks, page_size=g.block
            ),
        )  # fmt: skip
    select_op = import_module(ops + "prefill.flash_with_topk_idx").flash_prefill_with_topk_index
    attend_op = import_module(ops + "prefill.topk_sparse").flash_prefill_with_gqa_share_sparse
    return Calls(
        lambda: select_op(
            case.index_q, index_k, None, None, slots, at["slot"], at["cu_q"], at["seq"], at["prefix"], case.queries,
            case.context, 1, g.block, g.topk, 0, 1, **scored,
        )[1],
        lambda blocks: attend_op(
            case.q, k, v, None, slots, at["slot"], blocks, 1, g.block, at["cu_q"], at["seq"], at["prefix"],
            case.queries,
        ),
    )  # fmt: skip


def _by_token(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v [P * block, Hkv, D], index_k [P * block, 1, Di], and each sequence's slots int32 [batch, pages * block]."""
    block = case.geometry.block
    k, v = (x.transpose(1, 2).reshape(-1, *x.shape[1::2]) for x in (case.k, case.v))
    slots = case.page_table.long()[..., None] * block + torch.arange(block, device=case.q.device)
    return k, v, case.index_k.reshape(-1, 1, case.geometry.index_dim), slots.flatten(1).int()


def _first_of(*packages: str, names: tuple[str, ...]) -> list:
    """The modules `names` of the first of the packages that has them; the last one's ImportError where none has."""
    for package in packages[:-1]:
        try:
            return [import_module(f"{package}.{name}") for name in names]
        except ImportError:
            continue
    return [import_module(f"{packages[-1]}.{name}") for name in names]


PEERS = {"vllm": vllm, "sglang": sglang}
DENSE = ("cudnn", "flash")


def missing(peer: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    try:
        if peer == "vllm":
            _first_of("vllm.models.minimax_m3.common.ops", "vllm", names=("index_topk", "sparse_attn"))
        else:
            for stage in ("prefill", "decode"):
                for name in ("flash_with_topk_idx", "topk_sparse"):
                    import_module(f"sglang.kernels.ops.attention.minimax_sparse.{stage}.{name}")
    except Exception as error:  # whatever a foreign package's import does, the run goes on
        return f"{type(error).__name__}: {error}"[:300]
    return None


@dataclass(frozen=True)
class Packed:
    """A case's main branch for PyTorch's dense attention: q [B, Hq, n_q, D], k and v [B, Hkv, n, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, case: Case) -> Packed:
        if "packed" not in case.shared:
            case.shared["packed"] = [x[case.page_table.long()].transpose(1, 2).flatten(2, 3) for x in (case.k, case.v)]
        q = case.q.unflatten(0, (case.batch, case.queries)).transpose(1, 2).contiguous()
        return cls(q, *(x[:, :, : case.context] for x in case.shared["packed"]))


def sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Grouped-query attention through one of PyTorch's backends, `cudnn` or `flash`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel({"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def sdpa_chunk(name: str, packed: Packed) -> Callable[[], tuple[Tensor, ...]]:
    """A chunk at the end of its context: all of what lies before it, and causal attention in the chunk.

    These backends have no mask for that in common, so the two are computed apart; joining them would cost extra.
    A decode step is one call.
    """
    n_q, n = packed.q.shape[2], packed.k.shape[2]
    if n_q == 1:
        return lambda: (sdpa(name, packed.q, packed.k, packed.v, False),)
    old, new = ([x[:, :, part] for x in (packed.k, packed.v)] for part in (slice(n - n_q), slice(n - n_q, n)))
    inside = lambda: sdpa(name, packed.q, *new, True)  # noqa: E731
    return lambda: (inside(), sdpa(name, packed.q, *old, False)) if n > n_q else (inside(),)


# The definition, in float64, of a few rows ---------------------------------------------------------------------------


def some_rows(case: Case) -> list[int]:
    """Rows of the flat run that are looked at: the first, the last and two between."""
    last = len(case.q) - 1
    return sorted({0, last // 3, 2 * last // 3 + 1 if last else 0, last})


def place(case: Case, row: int) -> tuple[int, int]:
    """A row's sequence, and its position there."""
    return row // case.queries, case.prefix + row % case.queries


def by_head(blocks: Tensor, case: Case) -> Tensor:
    """A side's selection as ours lies, [Hi, T, topk], whichever of its two axes comes first."""
    shape = (case.geometry.index_heads, len(case.q))
    if blocks.dim() == 3 and blocks.shape[:2] == shape[::-1] != shape:
        blocks = blocks.transpose(0, 1)
    if blocks.dim() != 3 or blocks.shape[:2] != shape:
        raise ValueError(f"blocks: {list(blocks.shape)}, must be [{shape[0]}, {shape[1]}, topk]")
    return blocks


def check_selection(case: Case, blocks: Tensor) -> dict[str, float]:
    """A side's blocks [Hi, T, topk] in some rows: the share of the true top-k among them, and by how much the worst
    chosen block scores below the worst true one, relative to the largest score (rounding decides between equals)."""
    agreement, shortfall, rows = 0.0, 0.0, some_rows(case)
    for row in rows:
        s, position = place(case, row)
        own = position // case.geometry.block
        scores = _block_scores(case, row, s, position)
        largest = scores.abs().max()
        scores[:, own] = float("inf")
        k = min(case.geometry.topk, own + 1)
        best = scores.topk(k)
        for head, (ids, found) in enumerate(zip(best.indices, scores)):
            mine = blocks[head, row].long().unique()
            mine = mine[(mine >= 0) & (mine <= own)]
            agreement += torch.isin(ids, mine).double().mean().item() / (len(rows) * len(scores))
            if len(mine):
                gap = (best.values[head, -1] - found[mine].min()) / largest
                shortfall = max(shortfall, gap.nan_to_num(0.0).item())
    return {"rows": len(rows), "agreement": agreement, "shortfall": shortfall}


def _block_scores(case: Case, row: int, s: int, position: int) -> Tensor:
    """float64 [Hi, blocks up to its own]: the largest visible score of each block."""
    block, found = case.geometry.block, []
    pages = case.page_table[s, : position // block + 1].long()
    for at, ids in enumerate(pages.split(PIECE)):
        scores = case.index_q[row].double() @ case.index_k[ids].double().flatten(0, 1).T
        key = at * PIECE * block + torch.arange(scores.shape[1], device=scores.device)
        found.append(scores.masked_fill(key > position, -float("inf")).unflatten(1, (-1, block)).amax(-1))
    return torch.cat(found, 1)


def check_attention(case: Case, blocks: Tensor, out: Tensor) -> dict[str, float]:
    """Relative error of some rows of out [T, Hq, D] against attention over the side's own blocks."""
    g, expected, rows = case.geometry, [], some_rows(case)
    for row in rows:
        s, position = place(case, row)
        for r in range(g.kv_heads):
            chosen = blocks[r * len(blocks) // g.kv_heads, row].long()
            chosen = chosen[(chosen >= 0) & (chosen <= position // g.block)]
            page = case.page_table[s, chosen].long()
            key = (chosen[:, None] * g.block + torch.arange(g.block, device=chosen.device)).flatten()
            k, v = (x[page, r].double().flatten(0, 1)[key <= position] for x in (case.k, case.v))
            expected.append(_attend(case.q[row].unflatten(0, (g.kv_heads, -1))[r], k, v))
    return {"rows": len(rows), "relative_error": relative_error(out[rows].flatten(0, 1), torch.cat(expected))}


def check_dense(q: Tensor, k: Tensor, v: Tensor, out: Tensor, first: int) -> dict[str, float]:
    """The same for one sequence's dense attention: q, out [Hq, n_q, D] over k, v [Hkv, n, D]; query i sees the keys up
    to first + i (all of them where that is behind the last)."""
    last = q.shape[1] - 1
    rows, group = sorted({0, last // 2, last}), len(q) // len(k)
    found, expected = [], []
    for row in rows:
        for r in range(len(k)):
            heads = slice(r * group, (r + 1) * group)
            seen = slice(min(first + row + 1, k.shape[1]))
            expected.append(_attend(q[heads, row], k[r, seen].double(), v[r, seen].double()))
            found.append(out[heads, row])
    return {"rows": len(rows), "relative_error": relative_error(torch.cat(found), torch.cat(expected))}


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float64 [G, D]: queries [G, D] that share one KV head, over all of k, v [n, D]."""
    return (q.double() @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def union(blocks: Tensor, neighbours: int, runs: int = 64) -> float:
    """How many different blocks so many neighbouring queries select together, mean over some of them and all heads."""
    count = blocks.shape[1] // neighbours
    if not count:
        return float("nan")
    at = torch.linspace(0, count - 1, min(runs, count), device=blocks.device).long()
    near = blocks[:, : count * neighbours].unflatten(1, (count, neighbours))[:, at].flatten(2).sort(-1).values
    new = near[..., 1:] != near[..., :-1]
    return ((near[..., 0] >= 0).double() + (new & (near[..., 1:] >= 0)).sum(-1)).mean().item()
