"""Text to ids and back. What a user wrote never becomes a special token, whatever the template does with it.

The reference renders the whole prompt and tokenizes it once, so a message that holds `[e~[` ends its own turn there.
Here each string of a request is *guarded* before the template sees it (`Tokenizer.guard`): GUARD, a lone surrogate,
which no text can hold, goes around the string's core and into every special token spelled in it. The rendered prompt
is then split at the special tokens that are still whole, which are the template's own; the guards are dropped, and the
text between two special tokens is encoded as one run. So innocent text gets the ids that tokenizing the whole gives,
also where template and content merge into one token; hostile text becomes ordinary tokens of the same characters.

Decoding works on the bytes of the tokens: byte-level BPE only, which is what M3 uses.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GUARD = "\udc00"
_SURROGATES = re.compile("[\ud800-\udfff]")
_CACHED_CHARS = 2048  # text up to this length is encoded once and remembered: headers, newlines, the system turns


class TokenizerError(ValueError):
    """A tokenizer.json that cannot be used, or a special token that it does not have."""


class Tokenizer:
    """A checkpoint's byte-level BPE and its special tokens (every added token counts as one)."""

    def __init__(self, spec: str, name: str = "tokenizer.json") -> None:
        """spec: the content of a tokenizer.json. Raises TokenizerError for what is none, or is not byte-level BPE."""
        import tokenizers

        self._spec, self._name = spec, name
        try:
            raw = json.loads(spec)
            added = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
            vocab_size = max([*raw["model"]["vocab"].values(), *added.values()]) + 1
            if "ByteLevel" not in _types(raw.get("decoder")):
                raise TokenizerError(f"{name}: its decoder is not ByteLevel; only byte-level BPE can be used")
            plain = tokenizers.Tokenizer.from_str(
                json.dumps(raw | {"added_tokens": [], "truncation": None, "padding": None})
            )
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exception for a file it cannot use
            raise TokenizerError(f"{name}: not a usable tokenizer ({type(error).__name__}: {_line(error)})") from None
        self._plain = plain  # knows no special tokens, so it cannot produce one
        self.specials: dict[str, int] = added
        self.vocab_size: int = vocab_size
        self._special_texts = {token_id: text for text, token_id in added.items()}
        if short := [text for text in added if len(text) < 2]:
            raise TokenizerError(
                f"{name}: special token {short[0]!r} is too short; it must have two characters or more"
            )
        longest_first = "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)"
        self._special = re.compile(f"({longest_first})")
        self._starts = re.compile(f"(?=(?:{longest_first}))(.)", re.DOTALL)  # overlapping ones too
        self._encode_short = functools.lru_cache(maxsize=4096)(self._encode_plain)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json; TokenizerError if it is missing or cannot be used."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"), str(path))
        except FileNotFoundError:
            raise TokenizerError(f"{path}: no such file; a model's directory holds it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: cannot be read ({_line(error)})") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._spec, self._name)

    def special_id(self, text: str) -> int:
        """The id of a special token by its text. Raises TokenizerError for one that this tokenizer does not have."""
        if text not in self.specials:
            raise TokenizerError(f"{self._name}: unknown special token {text!r}")
        return self.specials[text]

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The ids of a text. Special tokens spelled in it are ordinary text, unless `specials` says otherwise."""
        if not specials:
            return list(self._encode_run(text))
        ids: list[int] = []
        for i, part in enumerate(self.split(text)):
            ids.extend((self.specials[part],) if i % 2 else self._encode_run(part))
        return ids

    def guard(self, text: str) -> str:
        """The text as it may be put into a prompt: no special token of it, nor one that it completes, is seen as one.

        Outer whitespace stays outside, so that templates can strip it; lone surrogates become U+FFFD.
        """
        if not text.isascii():
            text = _SURROGATES.sub("\ufffd", text)
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        guarded = self._starts.sub(rf"\1{GUARD}", core) if self._special.search(core) else core
        return f"{text[:start]}{GUARD}{guarded}{GUARD}{text[start + len(core) :]}"

    def split(self, text: str) -> list[str]:
        """[text, special token, text, special token, ..., text] of a text, guarded or not; guards stay in."""
        return self._special.split(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens by their text. Bytes that are not UTF-8 and unknown ids become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; of an id that has none, U+FFFD's."""
        if token_id in self._special_texts:
            return self._special_texts[token_id].encode()
        token = self._plain.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return "\ufffd".encode()
        try:
            return bytes(_byte_of()[char] for char in token)
        except KeyError:  # a token outside the byte alphabet stands for its own text
            return token.encode()

    def _encode_run(self, text: str) -> tuple[int, ...]:
        text = text.replace(GUARD, "")
        return self._encode_short(text) if len(text) <= _CACHED_CHARS else self._encode_plain(text)

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        if not text.isascii():
            text = _SURROGATES.sub("\ufffd", text)
        return tuple(self._plain.encode(text, add_special_tokens=False).ids) if text else ()


class StreamDecoder:
    """Ids to text, one by one, in constant time each: a character comes out when its last byte is in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for a character that was cut off."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 on (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _types(node: Any) -> list[str]:
    """The types of a tokenizer.json component and of those it is a sequence of."""
    if not isinstance(node, dict):
        return []
    inner = node.get("decoders") or ()
    return [node.get("type", ""), *(name for part in inner for name in _types(part))]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
