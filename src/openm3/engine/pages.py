"""The pool of cache pages (page = MSA block): who holds which, what they hold, and runs of consecutive pages.

A page whose block is complete can be remembered by a key of all tokens up to its end (`prefix.py`); a later request
that begins with the same tokens holds the same page. A remembered page that nobody holds keeps its content until
the pages that hold nothing run out: the ones longest unused go first, and of a sequence the last.

Attention on a CPU reads consecutive pages in place, without gathering them, so a sequence grows into the page after
its last one where that is free, and a new sequence starts in the middle of the largest free run, leaving its neighbour
room to grow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

SLACK = 8  # one part in so many of the pages is emptied at a time, so that there are runs to grow into again


class PagePool:
    """Hands out pages 0..num_pages-1. A page can be had again when everyone who holds it has released it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._empty = num_pages  # pages in the free runs
        self._end_of = {0: num_pages}  # free runs [start, end), by start and by end
        self._start_of = {num_pages: 0}
        self._page_of: dict[bytes, int] = {}  # the remembered pages
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered and held by nobody, the longest unused first

    @property
    def free(self) -> int:
        """Pages that can be allocated, remembered ones that nobody holds included."""
        return self._empty + len(self._idle)

    @property
    def remembered(self) -> int:
        """Pages whose content a later request may find."""
        return len(self._page_of)

    def holders(self, page: int) -> int:
        """How often the page is held."""
        return self._holders[page]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The remembered pages of the leading keys, up to the first that is unknown; `retain` holds them."""
        pages = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            pages.append(page)
        return pages

    def remember(self, page: int, key: bytes) -> None:
        """From now on `find` gives this held page for the key, unless it gives another one already."""
        self._require_held(page)
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        """Takes n pages, held once each: where possible one run, and the one that follows page `after`.

        The caller checks `free` first: fewer than n free pages is a ValueError and takes none.
        """
        if n > self.free:
            raise ValueError(f"{n} pages wanted, {self.free} of {self.num_pages} are free")
        if self._empty < n:
            enough = max(n, self.num_pages // SLACK)
            while self._empty < enough and self._idle:
                self._forget(next(iter(self._idle)))
        pages: list[int] = []
        while len(pages) < n:
            start, end = self._take(n - len(pages), after)
            pages.extend(range(start, end))
            after = end - 1
        self._empty -= n
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Holds once more pages that someone holds, or that are remembered."""
        for page in pages:
            if page in self._idle:
                del self._idle[page]
            else:
                self._require_held(page)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Gives a sequence's pages back; each is free once its last holder has released it."""
        for page in reversed(pages):
            self._require_held(page)
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._insert(page)

    def _require_held(self, page: int) -> None:
        if not self._holders[page]:
            raise ValueError(f"page {page} is free already")

    def _forget(self, page: int) -> None:
        """Empties a remembered page that nobody holds."""
        del self._idle[page]
        del self._page_of[self._key_of.pop(page)]
        self._insert(page)

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
        self._empty += 1
