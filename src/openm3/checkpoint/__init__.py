"""The one on-disk format, Hugging Face safetensors: names, load, save, MXFP8 weights, download, and what a model needs.

The names below load on first use: resolving a name or counting parameters does not import PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm3.checkpoint.hub import download, resolve
    from openm3.checkpoint.info import info_dict, info_lines, model_info
    from openm3.checkpoint.load import load_model
    from openm3.checkpoint.names import CheckpointError
    from openm3.checkpoint.save import save_model

__all__ = [
    "CheckpointError",
    "download",
    "info_dict",
    "info_lines",
    "load_model",
    "model_info",
    "resolve",
    "save_model",
]

_HOMES = {
    "CheckpointError": "names",
    "download": "hub",
    "info_dict": "info",
    "info_lines": "info",
    "load_model": "load",
    "model_info": "info",
    "resolve": "hub",
    "save_model": "save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openm3.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"openm3.checkpoint.{_HOMES[name]}"), name)
