"""An answer as it streams: Markdown redrawn in place, thinking dim and then folded to one line.

What has scrolled out of the window, and every finished Markdown block, is printed once and left to the terminal's own
scrollback; only the open block is redrawn. So a long answer neither flickers nor grows slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from openm3.terminal.markdown import Line, blocks_of, render_block, split_blocks, to_lines

REDRAW_SECONDS = 0.08
THINKING_LINES = 6  # of the thinking under way, when it will be folded


class PlainView:
    """For pipes and files: the answer's text as it comes, its thinking to another stream or nowhere."""

    def __init__(self, out: TextIO, thinking_out: TextIO | None = None) -> None:
        self.out, self.thinking_out = out, thinking_out
        self._styled = thinking_out is not None and thinking_out.isatty()
        self._thinking = self._answer = ""

    def wait(self, what: str) -> None:
        pass

    def thinking(self, text: str) -> None:
        if self.thinking_out is not None:
            self._thinking += text
            _write(self.thinking_out, f"\x1b[2m{text}\x1b[0m" if self._styled else text)

    def content(self, text: str) -> None:
        if self._thinking and not self._answer and not self._thinking.endswith("\n"):
            _write(self.thinking_out, "\n")
        self._answer += text
        _write(self.out, text)

    def draw(self) -> None:
        pass

    def close(self, note: str = "") -> None:
        if self._answer and not self._answer.endswith("\n"):
            _write(self.out, "\n")
        elif self._thinking and not self._answer and not self._thinking.endswith("\n"):
            _write(self.thinking_out, "\n")


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


class LiveView:
    """For a terminal. `fold` puts thinking away once the answer starts; `count_tokens` says how long it was.

    `thinking` and `content` take text as it comes, `draw` is called often and redraws when it is time, `close` ends.
    """

    def __init__(self, console: Console, *, fold: bool, count_tokens: Callable[[str], int]) -> None:
        self.console, self.fold, self.count_tokens = console, fold, count_tokens
        self._region = _Region(console)
        self._spinner = Spinner("dots", style="cyan")
        self._waiting = self._thinking = self._open = ""
        self._started = self._dirty = False
        self._drawn_at = 0.0

    def wait(self, what: str) -> None:
        """Until the first text arrives, a spinner says what is going on."""
        self._waiting = what

    def thinking(self, text: str) -> None:
        self._end_waiting()
        self._thinking += text
        self._dirty = True

    def content(self, text: str) -> None:
        self._end_waiting()
        if not self._started:
            text = text.lstrip("\n")
            if not text:
                return
            self._end_thinking()
            self._started = True
        self._open += text
        self._dirty = True

    def draw(self) -> None:
        now = time.monotonic()
        if now - self._drawn_at < REDRAW_SECONDS or not (self._dirty or self._waiting):
            return
        self._drawn_at, self._dirty = now, False
        if self._waiting:
            self._spinner.update(text=Text(self._waiting, style="dim"))
            self._region.show(to_lines(self._spinner, self.console))
        elif self._started:
            blocks, self._open = split_blocks(self._open)
            for block in blocks:
                self._region.finish(render_block(block, self.console))
            first, *more = (render_block(block, self.console) for block in blocks_of(self._open))
            self._region.show(first, more)
        elif self._thinking:
            lines = self._thinking_lines()
            if self.fold:
                self._region.show(lines[-THINKING_LINES:])
            else:
                self._region.show(lines)

    def close(self, note: str = "") -> None:
        """Prints what is still open for good, then `note`, a dim line."""
        self._end_waiting()
        if not self._started:
            self._end_thinking()
        blocks, rest = split_blocks(self._open)
        for block in [*blocks, rest]:
            self._region.finish(render_block(block, self.console))
        self._region.stop()
        if note:
            self.console.print(Text(note, style="dim"))
        self.console.print()

    def _end_waiting(self) -> None:
        if self._waiting:
            self._waiting = ""
            self._region.clear()

    def _end_thinking(self) -> None:
        if not self._thinking.strip():
            return
        if self.fold:
            self._region.clear()
            line = Text(folded_line(self.count_tokens(self._thinking)), style="dim")
            self._region.finish(to_lines(line, self.console))
        else:
            self._region.finish(self._thinking_lines())

    def _thinking_lines(self) -> list[Line]:
        return to_lines(thinking_text(self._thinking), self.console)


def folded_line(tokens: int) -> str:
    return f"▸ thought for {tokens} token{'s' if tokens != 1 else ''}"


def thinking_text(text: str) -> Padding:
    """Thinking as it is shown: plain text, dim, a little to the right."""
    return Padding(Text(text.strip(), style="dim italic"), (0, 0, 0, 2))


class _Lines:
    """Lines that are rendered already. What is printed for good ends its last line, what is redrawn does not."""

    def __init__(self, lines: list[Line], *, end: bool) -> None:
        self.lines, self.end = lines, end

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for i, line in enumerate(self.lines):
            yield from line
            if self.end or i + 1 < len(self.lines):
                yield Segment.line()


class _Region:
    """The last lines of the terminal, redrawn in place. Lines pushed out at its top are printed for good, once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._printed = 0  # lines of the current block that are printed for good
        self._gap = False  # something stands above: a blank line parts the next block from it

    def show(self, lines: list[Line], more: Sequence[list[Line]] = ()) -> None:
        """Redraws the open block, and below it what begins to look like `more` blocks."""
        self.live.start()
        lines = self._parted(lines)
        below = [line for block in more if block for line in ([], *block)]
        out = len(lines) + len(below) - max(1, self.console.height - 2)  # so many do not fit
        self._print(lines, up_to=min(out, len(lines)), rest=[*lines, *below][max(self._printed, out, 0) :])

    def finish(self, lines: list[Line]) -> None:
        """Prints the rest of a block for good; the next one starts below."""
        if not lines:
            return
        lines = self._parted(lines)
        self._print(lines, up_to=len(lines), rest=[])
        self._printed, self._gap = 0, True

    def clear(self) -> None:
        """Takes the open block away without a trace."""
        self._print([], up_to=0, rest=[])
        self._printed = 0

    def stop(self) -> None:
        self.live.stop()

    def _parted(self, lines: list[Line]) -> list[Line]:
        return [[], *lines] if self._gap and lines else lines

    def _print(self, lines: list[Line], up_to: int, rest: list[Line]) -> None:
        self.live.update(_Lines(rest, end=False))
        if up_to > self._printed:
            self.console.print(_Lines(lines[self._printed : up_to], end=True), soft_wrap=True)
            self._printed = up_to
        elif self.live.is_started:
            self.live.refresh()
