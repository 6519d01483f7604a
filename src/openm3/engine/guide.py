"""What an answer may say next: its grammar once thinking has ended, and the end of a thinking that is too long.

The prompt's mode says where an answer begins: inside the thinking (enabled), after it (disabled, or no chat at all),
or before the choice of one (adaptive). With a grammar that choice is between the two think markers, thinking runs
free, but may not end the answer, and what follows `</mm:think>` obeys the grammar. Nothing is looked for in the prompt.

Grammars run in llguidance (the extra `openm3[serve]`): one wheel without dependencies, its masks take microseconds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from openm3.engine.request import Grammar, Request, RequestError
from openm3.engine.tool_grammar import json_options, literal, tools_grammar
from openm3.processing import Tokenizer, read_tools
from openm3.processing.parser import END_THINK, NS, THINK

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT_GRAMMARS = 64  # compiled ones that are kept for the next request with the same


class Guides:
    """Makes the guides of a model's requests. eos_ids: the tokens that end its answers."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int]) -> None:
        self.tokenizer, self.eos_ids = tokenizer, sorted(eos_ids)
        self.think_id, self.end_id = (tokenizer.specials.get(marker) for marker in (THINK, END_THINK))
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, request: Request) -> Guide | None:
        """The guide that a request needs; None if it needs none.

        Raises RequestError for a grammar that cannot be enforced, and without llguidance. From any thread.
        """
        budget = request.params.thinking_budget if request.thinking in ("enabled", "adaptive") else None
        if request.grammar is None and budget is None:
            return None
        if request.thinking is not None and self.end_id is None:
            raise RequestError(f"the model's tokenizer has no token {END_THINK!r}, which its thinking would end with")
        matcher = None if request.grammar is None else self._matcher(request.grammar)
        return Guide(self, request.thinking, budget, matcher)

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError("grammar: structured output needs llguidance: pip install 'openm3[serve]'") from None
        try:
            source = self._source(grammar)
        except RequestError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise RequestError(f"grammar: the {grammar.kind} cannot be read ({error})") from None
        with self._lock:
            if source not in self._compiled:
                matcher = LLMatcher(self._tokenizer(), source, log_level=0)
                if matcher.is_error():
                    reason = " ".join(matcher.get_error().split())[:300]
                    raise RequestError(f"grammar: the {grammar.kind} cannot be enforced: {reason}")
                self._compiled[source] = matcher
                if len(self._compiled) > KEPT_GRAMMARS:
                    self._compiled.popitem(last=False)
            return self._compiled[source].deep_copy()

    def _source(self, grammar: Grammar) -> str:
        from llguidance import LLMatcher

        if grammar.kind == "json":
            schema = {"type": "object"} if grammar.value is True else grammar.value
            return LLMatcher.grammar_from_json_schema(json_options(schema))
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.value)
        if grammar.kind == "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(literal, grammar.value)))
        lark = tools_grammar(
            read_tools(grammar.value), self.tokenizer.special_id(NS), required=grammar.required,
            parallel=grammar.parallel,
        )  # fmt: skip
        return LLMatcher.grammar_from_lark(lark)

    def _tokenizer(self) -> LLTokenizer:
        if self._ll_tokenizer is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            self._ll_tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(self.tokenizer, self.eos_ids)),
                                             eos_token=self.eos_ids)  # fmt: skip
        return self._ll_tokenizer


class _Vocabulary:
    """A tokenizer as llguidance takes it: the bytes of each token, and which are special."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: list[int]) -> None:
        unknown = "\ufffd".encode()
        found = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.tokens = [b"" if token == unknown else token for token in found]
        self.special_token_ids = sorted(tokenizer.specials.values())
        self.eos_token_id, self.bos_token_id = eos_ids[0], None
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text)


class Guide:
    """One request's. It follows the tokens of the answer (`apply` and `ended` catch up with what they are given)."""

    def __init__(self, guides: Guides, thinking: str | None, budget: int | None, matcher: LLMatcher | None) -> None:
        self.guides, self.budget, self.matcher = guides, budget, matcher
        self.phase = {"enabled": "thinking", "adaptive": "choice"}.get(thinking or "", "answer")
        self._seen = self._spent = 0
        self._tail = b""  # the text of the last tokens, for markers that are spelled out

    def apply(self, line: Tensor, output_ids: list[int]) -> None:
        """Leaves in one row of logits, in place, only what may come after these tokens."""
        self._update(output_ids)
        guides = self.guides
        if self.phase == "answer":
            if self.matcher is not None:
                self._mask(line)
        elif self.budget is not None and self._spent >= self.budget:
            _keep(line, [guides.end_id])
        elif self.matcher is not None and self.phase == "choice":
            _keep(line, [token for token in (guides.think_id, guides.end_id) if token is not None])
        elif self.matcher is not None:
            line[guides.eos_ids] = -torch.inf

    def ended(self, output_ids: list[int]) -> bool:
        """Whether the grammar is complete and nothing may follow."""
        self._update(output_ids)
        return self.matcher is not None and self.phase == "answer" and self.matcher.is_stopped()

    def _update(self, output_ids: list[int]) -> None:
        for token in output_ids[self._seen :]:
            self._take(token)
            self._seen += 1

    def _take(self, token: int) -> None:
        if self.phase == "answer":
            if self.matcher is not None and not self.matcher.consume_token(token):
                raise RuntimeError(f"the grammar refuses token {token}: {self.matcher.get_error()[:200]}")
            return
        self._tail = (self._tail + self.guides.tokenizer.token_bytes(token))[-64:]
        if self.phase == "thinking":
            self._spent += 1
            if token == self.guides.end_id or END_THINK.encode() in self._tail:
                self.phase = "answer"
            return
        begun = self._tail.lstrip()
        if begun.startswith(THINK.encode()):
            self.phase, self._tail = "thinking", b""
        elif not THINK.encode().startswith(begun):  # the other marker, or an answer without any
            self.phase = "answer"

    def _mask(self, line: Tensor) -> None:
        if self.matcher.is_error():
            raise RuntimeError(f"the grammar failed: {self.matcher.get_error()[:200]}")
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(line)].astype(bool))
        if not bool(allowed.any()):
            raise RuntimeError("the grammar leaves no token to go on with")
        line[: len(allowed)].masked_fill_(~allowed.to(line.device), -torch.inf)
        line[len(allowed) :] = -torch.inf


def _keep(line: Tensor, tokens: list[Any]) -> None:
    """Leaves only these tokens, as likely as they are."""
    kept = line[tokens].clone()
    line.fill_(-torch.inf)
    line[tokens] = kept
