"""Inference on the packed model and the page cache; `LLM` is its face. The rooms behind it read in this order: request
(plain data), pages and prefix (who holds and shares what), scheduler (who computes what), runner (one batch, one
forward), sampler, guide and tool_grammar (what may be said), output (text), core, llm; service runs it beside asyncio.

The names below load on first use: a terminal that reads SamplingParams need not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm3.engine.llm import LLM
    from openm3.engine.output import ChatResult, Completion, Finish
    from openm3.engine.request import Grammar, RequestError, SamplingParams, TokenLogprobs

__all__ = ["LLM", "ChatResult", "Completion", "Finish", "Grammar", "RequestError", "SamplingParams", "TokenLogprobs"]

_HOMES = {
    "LLM": "llm",
    "ChatResult": "output",
    "Completion": "output",
    "Finish": "output",
    "Grammar": "request",
    "RequestError": "request",
    "SamplingParams": "request",
    "TokenLogprobs": "request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openm3.engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"openm3.engine.{_HOMES[name]}"), name)
