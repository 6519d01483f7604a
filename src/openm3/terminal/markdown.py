"""Markdown that grows: finished blocks are cut off, so that only the open one is rendered again.

The parser is CommonMark with tables and without HTML: a tag is text and stays visible. A line break stays one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.segment import Segment

PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")

Line = list[Segment]
WIDTH = 100  # lines longer than this are tiring to read


class _Heading(Heading):
    """A heading at the left, of whatever level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Markdown(Markdown):
    elements: ClassVar = {**Markdown.elements, "heading_open": _Heading}


def split_blocks(source: str) -> tuple[list[str], str]:
    """Cuts `source` into finished top-level blocks and the open rest; their concatenation is `source`.

    A block is finished when a complete line of a later block is there: nothing that follows can change it any more.
    """
    end = source.rfind("\n") + 1
    *finished, last = blocks_of(source[:end])
    return finished, last + source[end:]


def blocks_of(source: str) -> list[str]:
    """The top-level blocks of `source`, each with the blank lines after it; at least one, perhaps empty."""
    starts = [token.map[0] for token in PARSER.parse(source) if token.level == 0 and token.nesting >= 0 and token.map]
    lines = source.split("\n")
    edges = [0, *starts[1:], len(lines)]
    blocks = ["\n".join(lines[a:b]) + "\n" for a, b in pairwise(edges)]
    return [*blocks[:-1], blocks[-1][:-1]]


def render_block(source: str, console: Console) -> list[Line]:
    """One block's terminal lines for the console's width, without blank lines around it."""
    markdown = _Markdown(source, code_theme="ansi_dark")
    markdown.parsed = PARSER.parse(source)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return _strip_blank(to_lines(markdown, console))


def to_lines(renderable: RenderableType, console: Console) -> list[Line]:
    """A renderable's lines for the terminal's present width, without padding at their ends."""
    return console.render_lines(renderable, console.options.update_width(min(console.width, WIDTH)), pad=False)


def _strip_blank(lines: list[Line]) -> list[Line]:
    filled = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
    return lines[filled[0] : filled[-1] + 1] if filled else []
