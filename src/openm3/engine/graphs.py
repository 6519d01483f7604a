"""Decode steps through CUDA graphs: one launch where a step would be hundreds, over buffers that stay where they are.

A graph is captured when a step first needs its size: so many sequences of at most so many pages, both rounded up to a
power of two, pages at most to the model's context. Its plan is that of full sequences; the true positions and pages are
written into its tensors before each replay, which attention follows. Rows behind the step's own decode one token into a
page that belongs to nobody.

Without a GPU the same steps run uncaptured. Half precision only: its grouped products never wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openm3.model import KVCache
from openm3.msa import Plan
from openm3.msa.plan import to_device

NOTHING: tuple[list[int], int] = ([], 0)  # the row of nobody


@dataclass(frozen=True)
class _Step:
    """ids int64 [b], the plan's positions int64 [b] and page_table int32 [b, w] are read by `run`: float32 [b, V].

    rows: the list of pages, which only ever grows, and how much of it each row of the table holds.
    """

    ids: Tensor
    plan: Plan
    run: Callable[[], Tensor]
    rows: list[tuple[list[int], int]]


class DecodeGraphs:
    """forward: (ids [b], plan) -> float32 logits [b, V], always the same work for the same sizes.

    cache: its last page must be nobody's; plan_args: the selection's sizes; context: the longest sequence.
    """

    def __init__(
        self, forward: Callable[[Tensor, Plan], Tensor], cache: KVCache, plan_args: dict[str, int], context: int
    ) -> None:
        self.forward, self.plan_args, self.context = forward, plan_args, context
        self.spare = cache.num_pages - 1
        self.device = cache.layers[0].k.device
        self.steps: dict[tuple[int, int], _Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def run(self, ids: list[int] | Tensor, pages: list[list[int]], lens: list[int]) -> Tensor:
        """Logits float32 [n, V] of one token each of n sequences; ids: a list, or int64 [n] on the device; lens: their
        keys, this token's included.

        Read them before the next step: they lie in the graph's own memory.
        """
        block = self.plan_args["block_size"]
        rows = [(row, -(-n // block)) for row, n in zip(pages, lens)]
        batch, width = _rounded(len(ids)), min(_rounded(max(used for _, used in rows)), -(-self.context // block))
        step = self.steps.get((batch, width))
        if step is None:
            step = self.steps[batch, width] = self._make(batch, width)
        idle = batch - len(ids)
        self._update(step, rows + [NOTHING] * idle, width)
        step.ids[: len(ids)] = to_device(torch.as_tensor(ids), self.device)  # what idle rows decode is nobody's
        _write(step.plan.positions, [n - 1 for n in lens] + [0] * idle)
        return step.run()[: len(ids)]

    def _update(self, step: _Step, rows: list[tuple[list[int], int]], width: int) -> None:
        """Writes the rows of the table that are not what they were: few, from one step to the next."""
        new = [i for i, (a, b) in enumerate(zip(rows, step.rows)) if a[0] is not b[0] or a[1] != b[1]]
        if new:
            table = [rows[i][0][: rows[i][1]] + [self.spare] * (width - rows[i][1]) for i in new]
            step.plan.page_table[to_device(torch.tensor(new), self.device)] = to_device(
                torch.tensor(table, dtype=torch.int32), self.device
            )
            step.rows[:] = rows

    def _make(self, batch: int, width: int) -> _Step:
        ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        table = torch.full((batch, width), self.spare, dtype=torch.int32, device=self.device)
        lens = [min(width * self.plan_args["block_size"], self.context)] * batch
        plan = Plan.paged(table, lens, range(batch + 1), **self.plan_args)
        return _Step(ids, plan, self._captured(lambda: self.forward(ids, plan)), [NOTHING] * batch)

    def _captured(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.device.type != "cuda":
            return work
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # what compiles or allocates at its first call does so here
            for _ in range(2):
                work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _rounded(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _write(tensor: Tensor, values: list) -> None:
    tensor.copy_(to_device(torch.tensor(values, dtype=tensor.dtype), tensor.device), non_blocking=True)
