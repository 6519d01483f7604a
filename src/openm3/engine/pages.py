"""The pool of cache pages (page = MSA block): who holds which, and runs of consecutive pages kept together.

Attention on a CPU reads consecutive pages in place, without gathering them, so a sequence grows into the page after
its last one where that is free, and a new sequence starts in the middle of the largest free run, leaving its neighbour
room to grow.
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out pages 0..num_pages-1. A page is free again when everyone who holds it has released it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = num_pages
        self._holders = [0] * num_pages
        self._end_of = {0: num_pages}  # free runs [start, end), by start and by end
        self._start_of = {num_pages: 0}

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        """Takes n pages, held once each: where possible one run, and the one that follows page `after`.

        The caller checks `free` first: fewer than n free pages is a ValueError and takes none.
        """
        if n > self.free:
            raise ValueError(f"{n} pages wanted, {self.free} of {self.num_pages} are free")
        pages: list[int] = []
        while len(pages) < n:
            start, end = self._take(n - len(pages), after)
            pages.extend(range(start, end))
            after = end - 1
        self.free -= n
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Holds pages that someone holds already once more."""
        for page in pages:
            self._require_held(page)
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Gives pages back; each is free once its last holder has released it."""
        for page in pages:
            self._require_held(page)
            self._holders[page] -= 1
            if not self._holders[page]:
                self._insert(page)

    def _require_held(self, page: int) -> None:
        if not self._holders[page]:
            raise ValueError(f"page {page} is free already")

    def _take(self, n: int, after: int | None) -> tuple[int, int]:
        """Cuts at most n pages, in one piece, out of the free runs."""
        if after is not None and after + 1 in self._end_of:
            start, run_end = after + 1, self._end_of[after + 1]
            begin = start
        else:
            start, run_end = max(self._end_of.items(), key=lambda run: run[1] - run[0])
            length = run_end - start
            begin = start + max(0, min(length // 2, length - n)) if start else start
        end = min(run_end, begin + n)
        del self._end_of[start], self._start_of[run_end]
        for a, b in ((start, begin), (end, run_end)):
            if a < b:
                self._end_of[a], self._start_of[b] = b, a
        return begin, end

    def _insert(self, page: int) -> None:
        """Puts one page back, joined with the free runs at its two sides."""
        start = self._start_of.pop(page, page)
        end = self._end_of.pop(page + 1, page + 1)
        self._end_of[start], self._start_of[end] = end, start
        self.free += 1
