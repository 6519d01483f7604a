"""MiniMax-M3 as open software: the model, its sparse attention, training and inference.

The names below are the stable ones (README). They load on first use, so that `import openm3` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm3.checkpoint import load_model, save_model
    from openm3.config import M3Config
    from openm3.engine import LLM, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "M3Config", "SamplingParams", "load_model", "save_model"]

_HOMES = {
    "LLM": "openm3.engine",
    "M3Config": "openm3.config",
    "SamplingParams": "openm3.engine",
    "load_model": "openm3.checkpoint",
    "save_model": "openm3.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openm3' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
