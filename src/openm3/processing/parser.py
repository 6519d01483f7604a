"""Generated text to events: thinking, content and tool calls, at every split of the text, losing none of it.

The format is M3's: NS before every tag of a call, think markers around the reasoning. What checkpoints emit deviates
from it (opening tags left out, `<` dropped, other quotes), so this reads leniently where one meaning is possible and
otherwise hands the raw text out as content: a call is delivered whole, or its text is.

How it works: a lexer cuts the text at NS into tokens, holding back only what could still become a tag; the tokens
drive a small machine (thinking, text, block, call). The raw text of a block and of an unfinished call is kept until a
call of it is complete. What is consumed without being delivered is markers, and stretches between two markers that are
white space only. Think markers count until the first content or call; later ones are text. Nothing is looked for in
the prompt: the state at the start follows from the mode of thinking.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openm3.processing.tools import MAX_DEPTH, Element, ToolSchema, arguments_of, child_schema, has_property, read_tools

NS = "]<]minimax[>["
THINK, END_THINK = "<mm:think>", "</mm:think>"
THINKING_MODES = ("enabled", "adaptive", "disabled")
MAX_TAG = 512  # characters between NS and the tag's `>`; more is no tag

_INVOKE = re.compile(r"""\s*<?\s*invoke\s+name\s*=\s*(?:"([^"<>]+)"|'([^'<>]+)'|([^\s"'<>]+))\s*>""")
_TAG = re.compile(r"\s*<\s*(/?)\s*([^\s<>/](?:[^<>]*[^\s<>])?)\s*>")
_BARE = re.compile(r"\s*(?:(/)\s*([\w.\-]+)|()(tool_call))\s*>")  # a tag without its `<`
_UNFINISHED = re.compile(r"\s*(?:<[^<>]*|/\s*[\w.\-]*\s*|tool_call\s*|invoke\s[^<>]*)?\Z")
_BARE_STARTS = ("tool_call", "invoke")


@dataclass(frozen=True)
class ThinkingDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """One complete call. `index` counts from 0; `raw` is its text as generated."""

    index: int
    name: str
    arguments: dict[str, Any]
    raw: str


Event = ThinkingDelta | ContentDelta | ToolCall


@dataclass
class _Token:
    """A piece of the text. kind: text, ns (no tag follows it), open, close, invoke; `bare`: a close without its `<`."""

    kind: str
    raw: str
    name: str = ""
    bare: bool = False


class OutputParser:
    """Feed it text as it comes, then `finish`; both return the events that are certain by then.

    A call of a tool that is not in `tools` is delivered like any other, its values typed by what they look like:
    whether to run it is the caller's to decide. `thinking` is the mode that the prompt was made with.
    """

    def __init__(self, tools: Sequence[ToolSchema | dict[str, Any]] | None = None, thinking: str = "adaptive") -> None:
        """Raises ToolError for a bad tool, ValueError for an unknown mode."""
        if thinking not in THINKING_MODES:
            raise ValueError(f"thinking = {thinking!r}: must be one of {', '.join(THINKING_MODES)}")
        if not (tools and all(isinstance(tool, ToolSchema) for tool in tools)):
            tools = read_tools(tools)
        self._tools = {tool.name: tool.parameters for tool in tools}
        self._buffer, self._at = "", 0  # what is not yet cut into tokens, and how far it is
        self._events: list[Event] = []
        self._step = self._in_thinking if thinking == "enabled" else self._in_markup
        self._take = self._take_in_text
        self._space: list[str] = []  # white space since the last marker, until text makes it worth delivering
        self._fresh = True  # nothing but white space since the last marker
        self._leading = True  # no content and no call yet: think markers are markers
        self._block: list[str] = []  # raw text of a block since its start or its last call
        self._called = False  # the open block has delivered a call, so its closing tag is a marker
        self._call: _Call | None = None
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        """More generated text, any piece of it."""
        return self._run(text, final=False)

    def finish(self) -> list[Event]:
        """The end of the text: what was held back comes out, an unfinished call as content."""
        self._run("", final=True)
        if self._call is not None:
            self._fail()
        elif self._block and not self._called:
            self._release()
        return self._flush()

    def _run(self, text: str, final: bool) -> list[Event]:
        self._buffer += text
        while self._at < len(self._buffer) and self._step(final):
            pass
        self._buffer, self._at = self._buffer[self._at :], 0
        return [] if final else self._flush()

    def _flush(self) -> list[Event]:
        """The events so far, neighbouring deltas of one kind as one."""
        events: list[Event] = []
        for kind, group in itertools.groupby(self._events, type):
            run = list(group)
            events += run if kind is ToolCall else [kind("".join(delta.text for delta in run))]
        self._events.clear()
        return events

    # --- thinking -------------------------------------------------------------------------------------------------

    def _in_thinking(self, final: bool) -> bool:
        """Delivers thinking up to its closing marker. False: more text is needed."""
        if self._fresh and (decided := self._at_marker((THINK,), final)) is not None:
            return decided
        end = self._buffer.find(END_THINK, self._at)
        if end >= 0:
            self._deliver(ThinkingDelta, self._buffer[self._at : end])
            self._at = end + len(END_THINK)
            self._start(self._in_markup)
            return True
        end = len(self._buffer) - (0 if final else _held(self._buffer, END_THINK))
        moved = end > self._at
        self._deliver(ThinkingDelta, self._buffer[self._at : end])
        self._at = max(end, self._at)
        return moved

    def _at_marker(self, markers: tuple[str, ...], final: bool) -> bool | None:
        """At a stretch's start: skips white space and consumes a think marker. None: there is none; False: wait."""
        start = self._at
        while self._at < len(self._buffer) and self._buffer[self._at].isspace():
            self._at += 1
        if self._at > start:
            self._space.append(self._buffer[start : self._at])
        for marker in markers:
            if self._buffer.startswith(marker, self._at):
                self._at += len(marker)
                self._start(self._in_thinking if marker == THINK else self._in_markup)
                return True
        rest = self._buffer[self._at : self._at + len(END_THINK)]
        if not rest:
            return False
        return False if not final and any(marker.startswith(rest) for marker in markers) else None

    def _start(self, step: Any) -> None:
        """A new stretch, after a marker."""
        self._step, self._fresh = step, True
        self._space.clear()

    def _deliver(self, kind: type[ThinkingDelta] | type[ContentDelta], text: str) -> None:
        if self._fresh and (not text or text.isspace()):
            self._space.append(text)
            return
        if self._fresh:
            text = "".join(self._space) + text
            self._space.clear()
            self._fresh = False
        if kind is ContentDelta:
            self._leading = False
        if text:
            self._events.append(kind(text))

    # --- text, blocks and calls -----------------------------------------------------------------------------------

    def _in_markup(self, final: bool) -> bool:
        """Cuts one token off the buffer and takes it. False: more text is needed."""
        if self._leading and self._fresh and (decided := self._at_marker((THINK, END_THINK), final)) is not None:
            return decided
        token = self._next(final)
        if token is None:
            return False
        self._at += len(token.raw)
        self._take(token)
        return True

    def _next(self, final: bool) -> _Token | None:
        """The token at the buffer's start; None if more text decides what it is."""
        buffer, at = self._buffer, self._at
        start = buffer.find(NS, at)
        if start != at:
            end = start if start > at else len(buffer) - (0 if final else _held(buffer, NS))
            return _Token("text", buffer[at:end]) if end > at else None
        after = start + len(NS)
        window = buffer[after : after + MAX_TAG]
        if match := _INVOKE.match(window):
            return _Token("invoke", buffer[at : after + match.end()], match[1] or match[2] or match[3])
        if match := _TAG.match(window):
            return _Token("close" if match[1] else "open", buffer[at : after + match.end()], match[2])
        if match := _BARE.match(window):
            kind, name = ("close", match[2]) if match[1] else ("open", match[4])
            return _Token(kind, buffer[at : after + match.end()], name, bare=True)
        if not final and len(window) < MAX_TAG:
            word = window.strip()
            if _UNFINISHED.match(window) or any(start.startswith(word) for start in _BARE_STARTS):
                return None
        return _Token("ns", NS)

    def _take_in_text(self, token: _Token) -> None:
        if token.kind == "invoke":
            self._begin(token)
        elif token.name == "tool_call" and token.kind == "open":
            self._block = [*self._space, token.raw]
            self._space.clear()
            self._take, self._called, self._leading = self._take_in_block, False, False
        elif token.name == "tool_call" and self._called:
            self._close_block()
        else:
            self._deliver(ContentDelta, token.raw)

    def _take_in_block(self, token: _Token) -> None:
        if token.kind == "text" and token.raw.isspace():
            self._block.append(token.raw)
        elif token.kind == "invoke":
            self._begin(token)
        elif token.name == "tool_call" and token.kind == "close" and self._called:
            self._close_block()
        else:  # no call here after all
            self._release()
            self._take_in_text(token)

    def _close_block(self) -> None:
        self._called = False
        self._block.clear()
        self._take = self._take_in_text
        self._start(self._in_markup)

    def _release(self) -> None:
        """A block's raw text comes out as content, and reading goes on in plain text."""
        self._take = self._take_in_text
        for raw in self._block:
            self._deliver(ContentDelta, raw)
        self._block.clear()

    def _begin(self, token: _Token) -> None:
        self._block += self._space
        self._space.clear()
        self._call = _Call(token.name, self._tools.get(token.name))
        self._call.raw.append(token.raw)
        self._take, self._leading = self._take_in_call, False

    def _take_in_call(self, token: _Token) -> None:
        call = self._call
        if token.kind == "invoke":  # the call before it never ended
            self._fail()
            self._take(token)
            return
        call.raw.append(token.raw)
        if not call.take(token):
            self._fail()
        elif call.done:
            self._events.append(ToolCall(self._count, call.name, call.arguments, "".join(call.raw)))
            self._count += 1
            self._call, self._called = None, True
            self._block.clear()
            self._take = self._take_in_block
            self._start(self._in_markup)

    def _fail(self) -> None:
        """The open call cannot be one: its raw text comes out as content."""
        self._block += self._call.raw
        self._call = None
        self._release()


class _Call:
    """One call while it is read: a stack of open elements, the invoke itself at the bottom.

    An element without a name stands for an NS without a tag: the closing tag that follows names it, or its parts belong
    to the element around it.
    """

    def __init__(self, name: str, parameters: dict[str, Any] | None) -> None:
        self.name = name
        self.raw: list[str] = []
        self.arguments: dict[str, Any] = {}
        self.done = False
        self._parameters = parameters
        self._stack: list[Element] = [Element("invoke", [])]
        self._tags: list[str] = [""]  # how each open element's tag was written, without NS

    def take(self, token: _Token) -> bool:
        """False: this is no call, whatever follows."""
        top = self._stack[-1]
        if token.kind == "text":
            top.parts.append(token.raw)
            return True
        if token.bare and not self._means_tag(token, top):
            return self._open("", NS) and self.take(_Token("text", token.raw[len(NS) :]))
        if token.kind == "close":
            return self._close(token.name)
        return self._open(token.name, token.raw)

    def _open(self, name: str, raw: str) -> bool:
        self._stack.append(Element(name, []))
        self._tags.append(raw[len(NS) :])
        return len(self._stack) <= MAX_DEPTH

    def _means_tag(self, token: _Token, top: Element) -> bool:
        """Whether a tag without its `<` is one: it closes what is open, or names what is."""
        if token.kind == "open":
            return False  # `tool_call>`, which is no parameter's
        return token.name in (top.name, "invoke") or (not top.name and _unopened(token.name, top) is not None)

    def _close(self, name: str) -> bool:
        """Closes the innermost element as `name`."""
        top = self._stack[-1]
        if top.name == name:
            return self._pop(top) if len(self._stack) > 1 else self._finish()
        is_open = any(element.name == name for element in self._stack)
        if not top.name and is_open:
            return self._absorb(top) and self._close(name)
        if name == "tool_call" or is_open:
            return False  # something inside was never closed
        if not top.name:
            return self._pop(Element(name, _unopened(name, top) or top.parts))
        if len(self._stack) == 1 or name == "item":
            return self._take_last_text(name, top)
        return self._was_value(name, top)

    def _pop(self, element: Element) -> bool:
        self._stack.pop()
        self._tags.pop()
        self._stack[-1].parts.append(element)
        return True

    def _absorb(self, top: Element) -> bool:
        """An NS without a tag that nothing names: text where it stands inside a text, else noise."""
        around = self._stack[-2]
        text, before = top.text.strip(), around.text.strip()
        if text and (len(self._stack) == 2 or top.children or around.children):
            return False  # perhaps a value without its tags
        self._stack.pop()
        self._tags.pop()
        around.parts += [NS, *top.parts] if text and before else top.parts
        return True

    def _take_last_text(self, name: str, top: Element) -> bool:
        """A value without even the NS of its opening tag: the text right before the closing tag."""
        last = len(top.parts)
        while last and isinstance(top.parts[last - 1], str):
            last -= 1
        value = top.parts[last:]
        if not "".join(value).strip():
            return False
        top.parts[last:] = [Element(name, value)]
        return True

    def _was_value(self, name: str, top: Element) -> bool:
        """A value that begins like a tag, its own opening tag left out: the schema knows `name` and not the tag."""
        schema = self._schema(len(self._stack) - 1)
        if top.children or has_property(schema, self._parameters, top.name):
            return False
        if not has_property(schema, self._parameters, name):
            return False
        return self._pop(Element(name, [self._tags[-1], *top.parts]))

    def _schema(self, depth: int) -> Any:
        """The schema of the element that holds the open one at `depth`."""
        schema: Any = self._parameters
        for element in self._stack[1:depth]:
            schema = child_schema(schema, self._parameters, element.name)
        return schema

    def _finish(self) -> bool:
        root = self._stack[0]
        if root.text.strip():
            return False  # perhaps a parameter without its tags
        self.arguments = arguments_of(root, self._parameters)
        self.done = True
        return True


def _unopened(name: str, element: Element) -> list[str | Element] | None:
    """The parts of a nameless element after `name>`, its opening tag without the `<`; None if it does not begin so."""
    first = next((i for i, part in enumerate(element.parts) if isinstance(part, Element)), len(element.parts))
    text = "".join(element.parts[:first])
    head, found, rest = text.partition(">")
    return [rest, *element.parts[first:]] if found and head.strip() == name else None


def _held(text: str, marker: str) -> int:
    """How many characters at the text's end could begin the marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
