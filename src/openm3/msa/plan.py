"""What all layers of one step share: lengths, positions, where the keys lie, and the sizes of the selection.

A plan is built once a step from lengths that the host knows, so that no op waits for the device to learn a maximum.
Keys lie packed, one sequence behind the other (`Plan.packed`), or in pages of one block each (`Plan.paged`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, pairwise
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Lengths = Sequence[int] | Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on `device`; to an accelerator through pinned memory, so that the host does not wait for it."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Plan:
    """Built by `Plan.packed` or `Plan.paged`. T query tokens of B sequences; keys of sequence s: `lens_k[s]`.

    `cu_seqlens_q`, `cu_seqlens_k` int32 [B+1]; `positions` int64 [T], each query's position in its sequence;
    `seq_ids` int64 [T]; `page_table` int32 [B, max_pages] or None; `lens_q`, `lens_k` the same lengths on the host.
    `explicit`: the positions were given, so nothing may be concluded from the lengths alone. `host` int64, on the CPU:
    the plan's number and all that the host knows of it, so that `tensors` says a plan to an op that takes tensors only.
    """

    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    positions: Tensor
    seq_ids: Tensor
    page_table: Tensor | None
    block_size: int
    topk: int
    local_blocks: int
    init_blocks: int
    workspace_bytes: int
    explicit: bool
    host: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        number = next(_numbers)
        sizes = (self.block_size, self.topk, self.local_blocks, self.init_blocks, self.workspace_bytes, self.explicit)
        host = torch.tensor([number, *map(int, sizes), *self.lens_q, *self.lens_k], dtype=torch.int64, device="cpu")
        object.__setattr__(self, "host", host)
        _alive[number] = self

    @classmethod
    def packed(
        cls,
        cu_seqlens_q: Lengths,
        cu_seqlens_k: Lengths | None = None,
        *,
        block_size: int,
        topk: int,
        local_blocks: int = 1,
        init_blocks: int = 0,
        positions: Tensor | None = None,
        workspace_bytes: int = 1 << 30,
        device: torch.device | str | None = None,
    ) -> Plan:
        """Keys in flat tensors [N, ...]. `cu_seqlens_*`: B+1 ascending offsets from 0 (lists, or tensors on the CPU).

        `cu_seqlens_k` defaults to `cu_seqlens_q`; the queries are the last ones of their sequence unless `positions`
        int64 [T] says otherwise. Raises ValueError for offsets that do not ascend, more queries than keys, and a
        position without a key (where positions lie on the CPU).
        """
        lens_q = _lengths("cu_seqlens_q", cu_seqlens_q)
        lens_k = lens_q if cu_seqlens_k is None else _lengths("cu_seqlens_k", cu_seqlens_k)
        device = device or _device_of(cu_seqlens_q, positions)
        sizes = dict(block_size=block_size, topk=topk, local_blocks=local_blocks, init_blocks=init_blocks)
        return _build(cls, lens_q, lens_k, None, positions, workspace_bytes, device, sizes)

    @classmethod
    def paged(
        cls,
        page_table: Tensor,
        seq_lens: Lengths,
        cu_seqlens_q: Lengths,
        *,
        block_size: int,
        topk: int,
        local_blocks: int = 1,
        init_blocks: int = 0,
        positions: Tensor | None = None,
        workspace_bytes: int = 1 << 30,
        device: torch.device | str | None = None,
    ) -> Plan:
        """Keys in pages of `block_size` tokens: block b of sequence s lies in page `page_table[s, b]`.

        `page_table` int32 [B, max_pages]; `seq_lens`: keys of each sequence, those of this step's queries included.
        Raises ValueError as `packed` does, and for a page table that is too short for a sequence.
        """
        lens_q = _lengths("cu_seqlens_q", cu_seqlens_q)
        lens_k = tuple(int(n) for n in (seq_lens.tolist() if isinstance(seq_lens, Tensor) else seq_lens))
        if page_table.dim() != 2 or page_table.dtype != torch.int32 or len(page_table) != len(lens_q):
            raise ValueError(
                f"page_table: {page_table.dtype} {list(page_table.shape)}, must be int32 [{len(lens_q)}, max_pages]"
            )
        if lens_k and page_table.shape[1] * block_size < max(lens_k):
            raise ValueError(
                f"page_table: {page_table.shape[1]} pages of {block_size} a sequence, a sequence has {max(lens_k)} keys"
            )
        sizes = dict(block_size=block_size, topk=topk, local_blocks=local_blocks, init_blocks=init_blocks)
        return _build(cls, lens_q, lens_k, page_table, positions, workspace_bytes, device or page_table.device, sizes)

    @property
    def num_queries(self) -> int:
        return sum(self.lens_q)

    @property
    def max_q(self) -> int:
        return max(self.lens_q, default=0)

    @property
    def max_k(self) -> int:
        return max(self.lens_k, default=0)

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def slots(self) -> Tensor:
        """int64 [T]: where each query token's own key goes in a cache of pages seen as [P * block_size]."""
        if self.page_table is None:
            raise ValueError("plan.slots: the plan's keys are packed; only a paged plan has slots")
        pages = self.page_table[self.seq_ids, self.positions // self.block_size].long()
        return pages * self.block_size + self.positions % self.block_size

    def starts_q(self) -> list[int]:
        return [0, *accumulate(self.lens_q)]

    def starts_k(self) -> list[int]:
        return [0, *accumulate(self.lens_k)]

    def sequences(self, first: int, last: int) -> Plan:
        """The plan of the sequences first..last alone, of a plan whose keys are paged."""
        if self.page_table is None:
            raise ValueError("plan.sequences: the plan's keys are packed; only a paged plan can be cut")
        rows = slice(self.starts_q()[first], self.starts_q()[last])
        cu_q, cu_k = (cu[first : last + 1] - cu[first] for cu in (self.cu_seqlens_q, self.cu_seqlens_k))
        return replace(
            self, lens_q=self.lens_q[first:last], lens_k=self.lens_k[first:last], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            positions=self.positions[rows], seq_ids=self.seq_ids[rows] - first, page_table=self.page_table[first:last],
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """The whole plan as tensors: `host`, then those on the plan's device."""
        paged = [] if self.page_table is None else [self.page_table]
        return [self.host, self.cu_seqlens_q, self.cu_seqlens_k, self.positions, self.seq_ids, *paged]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> Plan:
        """The plan that gave `tensors` while it lives, with what backends remember of it; else one like it."""
        host, *there = tensors
        number, block_size, topk, local_blocks, init_blocks, workspace_bytes, explicit, *lens = host.tolist()
        plan = _alive.get(number)
        if plan is not None and all(a.data_ptr() == b.data_ptr() for a, b in zip(plan.tensors(), tensors)):
            return plan
        half = len(lens) // 2
        cu_seqlens_q, cu_seqlens_k, positions, seq_ids, *paged = there
        return cls(
            lens_q=tuple(lens[:half]), lens_k=tuple(lens[half:]), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            positions=positions, seq_ids=seq_ids, page_table=paged[0] if paged else None, block_size=block_size,
            topk=topk, local_blocks=local_blocks, init_blocks=init_blocks, workspace_bytes=workspace_bytes,
            explicit=bool(explicit),
        )  # fmt: skip


_numbers = count()
_alive: WeakValueDictionary[int, Plan] = WeakValueDictionary()


def _lengths(name: str, offsets: Lengths) -> tuple[int, ...]:
    values = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
    if not values or values[0] != 0:
        raise ValueError(f"{name}: {values[:4]}..., must start with 0")
    lengths = tuple(int(b) - int(a) for a, b in pairwise(values))
    if any(n < 0 for n in lengths):
        raise ValueError(f"{name}: offsets must ascend, a sequence has length {min(lengths)}")
    return lengths


def _device_of(*candidates: object) -> torch.device:
    return next((c.device for c in candidates if isinstance(c, Tensor)), torch.device("cpu"))


def _build(
    cls: type[Plan],
    lens_q: tuple[int, ...],
    lens_k: tuple[int, ...],
    page_table: Tensor | None,
    positions: Tensor | None,
    workspace_bytes: int,
    device: torch.device | str,
    sizes: dict[str, int],
) -> Plan:
    if len(lens_q) != len(lens_k):
        raise ValueError(f"{len(lens_q)} sequences of queries but {len(lens_k)} of keys")
    for name, least in (("block_size", 1), ("topk", 1), ("local_blocks", 1), ("init_blocks", 0)):
        if not isinstance(sizes[name], int) or sizes[name] < least:
            raise ValueError(f"{name} = {sizes[name]!r}: must be an integer of at least {least}")
    if sizes["init_blocks"] + sizes["local_blocks"] > sizes["topk"]:
        raise ValueError(
            f"init_blocks + local_blocks = {sizes['init_blocks'] + sizes['local_blocks']}: "
            f"may not exceed topk = {sizes['topk']}"
        )
    if workspace_bytes < 1 << 20:
        raise ValueError(f"workspace_bytes = {workspace_bytes}: must be at least 1 MiB")
    counts = torch.tensor(lens_q, dtype=torch.int64)
    seq_ids = torch.repeat_interleave(torch.arange(len(lens_q)), counts)
    explicit = positions is not None
    if explicit:
        if positions.dtype != torch.int64 or positions.shape != seq_ids.shape:
            raise ValueError(
                f"positions: {positions.dtype} {list(positions.shape)}, must be int64 [{len(seq_ids)}], one a query"
            )
        if positions.device.type == "cpu":
            behind = (positions >= torch.tensor(lens_k, dtype=torch.int64)[seq_ids]).nonzero().flatten()
            if len(behind):
                at = int(behind[0])
                raise ValueError(
                    f"positions[{at}] = {int(positions[at])}: sequence {int(seq_ids[at])} has "
                    f"{lens_k[int(seq_ids[at])]} keys, and a query is among the keys"
                )
        positions = positions.to(device)
    else:
        for s, (n_q, n_k) in enumerate(zip(lens_q, lens_k)):
            if n_q > n_k:
                raise ValueError(f"sequence {s}: {n_q} queries but {n_k} keys; the queries are among the keys")
        first = torch.tensor(lens_k, dtype=torch.int64) - counts
        starts = torch.tensor([0, *accumulate(lens_q)][:-1], dtype=torch.int64)
        positions = to_device(torch.arange(len(seq_ids)) + (first - starts)[seq_ids], device)
    return cls(
        lens_q=lens_q,
        lens_k=lens_k,
        cu_seqlens_q=to_device(torch.tensor([0, *accumulate(lens_q)], dtype=torch.int32), device),
        cu_seqlens_k=to_device(torch.tensor([0, *accumulate(lens_k)], dtype=torch.int32), device),
        positions=positions,
        seq_ids=to_device(seq_ids, device),
        page_table=page_table,
        workspace_bytes=workspace_bytes,
        explicit=explicit,
        **sizes,
    )
