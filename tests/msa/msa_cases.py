"""Problems for the operator: lengths, heads and sizes of the selection, with their tensors packed and in pages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor

from openm3.msa import Plan


@dataclass(frozen=True)
class Case:
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    hkv: int = 2
    group: int = 2
    hi: int = 2
    d: int = 16
    di: int = 16
    block: int = 8
    topk: int = 3
    local: int = 1
    init: int = 0
    integers: bool = False
    dtype: torch.dtype = torch.float32
    shuffled: bool = True
    positions: tuple[int, ...] | None = None
    workspace: int = 1 << 30
    seed: int = 0

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    @property
    def sizes(self) -> dict:
        positions = None if self.positions is None else torch.tensor(self.positions, dtype=torch.int64)
        return dict(block_size=self.block, topk=self.topk, local_blocks=self.local, init_blocks=self.init,
                    positions=positions, workspace_bytes=self.workspace)  # fmt: skip

    def packed(self) -> Plan:
        return Plan.packed(offsets(self.lens_q), offsets(self.lens_k), **self.sizes)

    def page_table(self) -> Tensor:
        """Pages of each sequence: anywhere in the cache, or one behind the other. Page 0 belongs to nobody."""
        counts = [-(-n // self.block) for n in self.lens_k]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(self.seed))
        order = order if self.shuffled else torch.arange(sum(counts))
        table = torch.zeros(len(counts), max(1, max(counts)), dtype=torch.int32)
        for row, ids in zip(table, (order + 1).split(counts)):
            row[: len(ids)] = ids
        return table

    def paged(self) -> Plan:
        return Plan.paged(self.page_table(), list(self.lens_k), offsets(self.lens_q), **self.sizes)

    def tensors(self) -> Tensors:
        generator = torch.Generator().manual_seed(self.seed)
        t, n = sum(self.lens_q), sum(self.lens_k)

        def draw(*shape: int) -> Tensor:
            if self.integers:
                return torch.randint(-3, 4, shape, generator=generator).to(self.dtype)
            return torch.randn(shape, generator=generator).to(self.dtype)

        return Tensors(
            index_q=draw(t, self.hi, self.di), index_k=draw(n, self.di), q=draw(t, self.hkv * self.group, self.d),
            k=draw(n, self.hkv, self.d), v=draw(n, self.hkv, self.d), case=self,
        )  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """index_q [T, Hi, Di], index_k [N, Di], q [T, Hq, D], k and v [N, Hkv, D]."""

    index_q: Tensor
    index_k: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    case: Case = field(repr=False)

    def double(self) -> Tensors:
        return replace(self, **{n: getattr(self, n).double() for n in ("index_q", "index_k", "q", "k", "v")})

    def in_pages(self, by_head: bool = True) -> Tensors:
        """Keys as pages: index_k [P, block, Di], k and v [P, Hkv, block, D]; what no key fills holds other numbers."""
        k, v = (self._paged(x) for x in (self.k, self.v))
        if by_head:  # the memory layout of the engine's cache
            k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
        return replace(self, index_k=self._paged(self.index_k[:, None])[:, 0], k=k, v=v)

    def _paged(self, x: Tensor) -> Tensor:
        block, table = self.case.block, self.case.page_table()
        pages = x.new_full((int(table.max()) + 1, x.shape[1], block, x.shape[2]), 3.0)
        for s, keys in enumerate(x.split(list(self.case.lens_k))):
            for b, piece in enumerate(keys.split(block)):
                pages[table[s, b], :, : len(piece)] = piece.transpose(0, 1)
        return pages


def offsets(lengths: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(lengths)]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest error, relative to the largest value; minus infinity must stand in the same places."""
    found, wanted = found.double(), wanted.double()
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    nothing = wanted == -torch.inf
    assert torch.equal(found == -torch.inf, nothing)
    if nothing.all():
        return 0.0
    gap = (found - wanted).masked_fill(nothing, 0.0).abs().max()
    return float(gap / wanted.masked_fill(nothing, 0.0).abs().max().clamp_min(1e-30))


def random_blocks(case: Case, plan: Plan, seed: int = 0) -> Tensor:
    """int32 [Hi, T, topk]: any visible blocks, ascending; some rows have none."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.full((case.hi, plan.num_queries, case.topk), -1, dtype=torch.int32)
    for t, own in enumerate((plan.positions // case.block).tolist()):
        for h in range(case.hi):
            count = int(torch.randint(0, min(case.topk, own + 1) + 1, (), generator=generator))
            chosen = torch.randperm(own + 1, generator=generator)[:count].sort().values
            blocks[h, t, :count] = chosen.int()
    return blocks


@st.composite
def cases(draw, decode: bool = False, explicit: bool | None = None, **fixed) -> Case:
    """Any small problem: whole prompts, chunks in the middle, one query each; any number of heads and blocks."""
    block = draw(st.sampled_from([1, 4, 8, 16]))
    kind = "decode" if decode else draw(st.sampled_from(["whole", "chunk", "decode", "mixed"]))
    lens_q, lens_k = [], []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 7 * block + 3))
        one = {"whole": n, "decode": 1}.get(kind) or draw(st.integers(0 if kind == "mixed" else 1, n))
        lens_q.append(one)
        lens_k.append(n)
    hi = draw(st.sampled_from([1, 2, 3]))
    topk = draw(st.integers(1, 9))
    local = draw(st.integers(1, topk))
    positions = None
    if draw(st.booleans()) if explicit is None else explicit:
        positions = tuple(
            draw(st.integers(0, n - 1)) for count, n in zip(lens_q, lens_k) for _ in range(count)
        )  # fmt: skip
    return Case(
        lens_q=tuple(lens_q), lens_k=tuple(lens_k), hkv=hi * draw(st.sampled_from([1, 2])), hi=hi,
        group=draw(st.sampled_from([1, 2, 3])), d=draw(st.sampled_from([4, 16])), di=draw(st.sampled_from([3, 8])),
        block=block, topk=topk, local=local, init=draw(st.integers(0, topk - local)), positions=positions,
        shuffled=draw(st.booleans()), seed=draw(st.integers(0, 1000)), **fixed,
    )  # fmt: skip
