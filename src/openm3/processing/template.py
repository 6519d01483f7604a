"""The checkpoint's own chat template, run as untrusted code: in a sandbox, with its output bounded.

A template comes with the weights, from whoever made them. Jinja's immutable sandbox keeps it from Python's internals
and from changing what it is given; the text it writes and any product or power it computes are bounded here. What
stays out of reach is time (nested loops of up to 100,000 steps each) and memory inside one expression: run a template
that you do not trust in a process with limits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from openm3.processing.tokenizer import GUARD

MAX_TEMPLATE_CHARS = 1_000_000
MAX_PROMPT_CHARS = 32_000_000  # a context of 1 M tokens is some 5 million characters
_MAX_NUMBER_BITS = 4096


class TemplateError(ValueError):
    """A template that cannot be read, that raises, or whose output is no prompt of M3's format; one line."""


class ChatTemplate:
    """A compiled chat_template.jinja."""

    def __init__(self, source: str, *, guard: Callable[[str], str] = str, name: str = "chat_template.jinja",
                 max_chars: int = MAX_PROMPT_CHARS) -> None:  # fmt: skip
        """guard: what makes JSON that the template writes safe to tokenize (Tokenizer.guard). Raises TemplateError."""
        self._made_from = functools.partial(type(self), source, guard=guard, name=name, max_chars=max_chars)
        self._name, self._max_chars = name, max_chars
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"{name}: {len(source)} characters; a template has at most {MAX_TEMPLATE_CHARS}")
        try:
            self._template = _environment(guard, max_chars).from_string(source)
        except Exception as error:  # a syntax error, or Python refusing the compiled form
            raise TemplateError(f"{name}{_place(error)}: {_line(error)}") from None

    @classmethod
    def from_file(cls, path: str | Path, *, guard: Callable[[str], str] = str) -> ChatTemplate:
        """Reads and compiles a template file; TemplateError if it is missing or no template."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"), guard=guard, name=str(path))
        except FileNotFoundError:
            raise TemplateError(f"{path}: no such file; a model's directory holds it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"{path}: cannot be read ({_line(error)})") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made_from, ()

    def render(self, **variables: Any) -> str:
        """The template's text. Whatever goes wrong inside is one TemplateError with one line."""
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > self._max_chars:
                    raise TemplateError(f"writes more than {self._max_chars} characters")
                pieces.append(piece)
        except Exception as error:  # the template is foreign code: it may raise anything
            raise TemplateError(f"{self._name}: {_line(error)}") from None
        return "".join(pieces)


def _environment(guard: Callable[[str], str], max_chars: int) -> Any:
    """Jinja set up as transformers does for chat templates: trimmed blocks, loop controls, tojson, raise_exception."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _too_large(operator, left, right, max_chars):
                raise SecurityError(f"a result of {operator} that is too large")
            return super().call_binop(context, operator, left, right)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
        text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        text = text.replace(GUARD, "")
        if ensure_ascii:
            text = "".join(char if char.isascii() else json.dumps(char)[1:-1] for char in text)
        return guard(text)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = _raise
    return env


def _raise(message: Any) -> NoReturn:
    raise TemplateError(message)


def _too_large(operator: str, left: Any, right: Any, max_chars: int) -> bool:
    """Whether left * right or left ** right would be a huge text, list or integer."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        return bits > _MAX_NUMBER_BITS
    sizes = [value if isinstance(value, int) else len(value) for value in (left, right) if not isinstance(value, float)]
    return operator == "*" and len(sizes) == 2 and sizes[0] * sizes[1] > max_chars


def _place(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return f", line {line}" if line else ""


def _line(error: BaseException) -> str:
    text = " ".join(str(error).replace(GUARD, "").split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
