"""What an answer looks like in the end does not depend on how it came: in pieces or at once, in any window."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from screen import Screen

from openm3.terminal import view
from openm3.terminal.markdown import split_blocks
from openm3.terminal.view import LiveView, PlainView

PIECES = [
    "# A title\n", "## Another\n", "Some *text* with `code`.\n", "One line\nand the next\n", "- a\n", "- b\n",
    "  - c\n",
    "1. one\n", "2. two\n", "\n", "\n\n", "```python\n", "def f(x):\n    return x\n", "```\n", "> quoted\n", "---\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n", "| 3 | 4 |\n", "a < b and <b>tags</b> [x](http://y)\n", "word ", "===\n",
    "    code\n",
    "<mm:think>", "naïve 日本語\n", "long " * 40, "\\*no\\* &amp; 3 * 4 * 5\n", "~~gone~~ **bold", "**\n",
]  # fmt: skip
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


class Clock:
    """Redraws are as frequent as pieces, however fast the test runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def shown(monkeypatch, pieces, *, thinking=(), height=24, width=60, fold=True) -> list[str]:
    monkeypatch.setattr(view, "time", Clock())
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height, legacy_windows=False, _environ={})
    live = LiveView(console, fold=fold, count_tokens=lambda text: len(text.split()))
    live.wait("reading")
    live.draw()
    for take, texts in ((live.thinking, thinking), (live.content, pieces)):
        for text in texts:
            take(text)
            live.draw()
    live.close()
    screen = Screen(width, height)
    screen.feed(out.getvalue().replace("\n", "\r\n"))
    assert not any(screen.lines[screen.row :])  # the cursor is left below everything
    return screen.lines[: screen.row]


def words(lines: list[str]) -> list[str]:
    return re.findall(r"\w+", "\n".join(lines))


@settings(deadline=None, max_examples=150)
@given(answer=ANSWERS, cuts=st.lists(st.integers(0, 400), max_size=12))
def test_finished_blocks_and_the_open_one_are_the_text_and_finished_ones_do_not_change(answer, cuts):
    edges = sorted({0, len(answer), *(cut for cut in cuts if cut < len(answer))})
    finished, rest = [], ""
    for a, b in pairwise(edges):
        blocks, rest = split_blocks(rest + answer[a:b])
        finished += blocks
    assert "".join(finished) + rest == answer
    whole, tail = split_blocks(answer)
    together, last = split_blocks("".join(finished) + rest)
    assert (whole, tail) == (together, last)


@settings(deadline=None, max_examples=60)
@given(answer=ANSWERS.filter(lambda a: "|" not in a), size=st.integers(1, 30), height=st.integers(4, 30))
def test_pieces_and_low_windows_leave_the_same_lines_as_all_at_once(answer, size, height):
    # Without tables: their columns may widen after rows have scrolled away.
    with pytest.MonkeyPatch.context() as patch:
        at_once = shown(patch, [answer] if answer else [], height=200)
        in_pieces = shown(patch, [answer[i : i + size] for i in range(0, len(answer), size)], height=200)
        assert in_pieces == at_once
        low = shown(patch, [answer[i : i + size] for i in range(0, len(answer), size)], height=height)
        assert words(low) == words(at_once)  # a word that scrolled away may have been wrapped otherwise


def test_an_answer_is_rendered(monkeypatch):
    answer = ("# Title\n\nSome **bold** text\nand <b>more</b>.\n\n1. one\n2. two\n\n```\ncode\n```\n"
              "| a | b |\n|---|---|\n| 1 | 2 |\n")  # fmt: skip
    lines = shown(monkeypatch, [answer], width=40)
    assert lines[:10] == [
        "Title", "", "Some bold text", "and <b>more</b>.", "", " 1 one", " 2 two", "", " code", "",
    ]  # fmt: skip
    assert [line.split() for line in lines[10:] if "─" not in line] == [["a", "b"], ["1", "2"], []]


def test_what_scrolls_out_of_a_low_window_is_printed_once(monkeypatch):
    items = [f"- item {i}\n" for i in range(50)]
    lines = [line for line in shown(monkeypatch, items, height=8) if line]
    assert lines == [f" • item {i}" for i in range(50)]
    code = ["```python\n", *(f"x{i} = {i}\n" for i in range(50)), "```\n"]
    lines = [line for line in shown(monkeypatch, code, height=8) if line]
    assert lines == [f" x{i} = {i}" for i in range(50)]


def test_thinking_folds_to_one_line_or_stays(monkeypatch):
    thinking = [f"thought number {i} of several\n" for i in range(30)]
    assert shown(monkeypatch, ["The answer."], thinking=thinking, height=10)[:3] == [
        "▸ thought for 150 tokens", "", "The answer.",
    ]  # fmt: skip
    kept = [line for line in shown(monkeypatch, ["The answer."], thinking=thinking, height=10, fold=False) if line]
    assert kept == [*(f"  thought number {i} of several" for i in range(30)), "The answer."]
    assert shown(monkeypatch, [], thinking=["cut", " off"])[0] == "▸ thought for 2 tokens"
    assert shown(monkeypatch, ["\n\nHi"], thinking=[])[0] == "Hi"


def test_redrawing_is_rare_and_a_long_answer_stays_cheap(monkeypatch):
    """Bytes written grow with the answer's length, not with its square: only the open block is redrawn."""

    def written(blocks: int) -> int:
        monkeypatch.setattr(view, "time", Clock())
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=60, height=24, legacy_windows=False, _environ={})
        live = LiveView(console, fold=True, count_tokens=len)
        for i in range(blocks):
            for word in (f"Block {i} ", "has ", "some ", "words.\n\n"):
                live.content(word)
                live.draw()
        live.close()
        return len(out.getvalue())

    assert written(200) < 2.2 * written(100)


def test_plain_view_separates_thinking_from_the_answer():
    out, err = io.StringIO(), io.StringIO()
    plain = PlainView(out, err)
    plain.thinking("hm, ")
    plain.thinking("well")
    plain.content("**Yes**")
    plain.content(".")
    plain.close()
    assert (out.getvalue(), err.getvalue()) == ("**Yes**.\n", "hm, well\n")
