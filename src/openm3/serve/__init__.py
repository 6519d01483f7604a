"""HTTP: the APIs of OpenAI and Anthropic over the engine, media, limits, metrics and the web page. No model code.

The rooms read in this order: options (every limit), errors (each API's own shape), gate (what stands before every
request), media and files (where pictures and videos come from), generation (what the APIs share), grammars (what
an answer is held to), schemas (what the OpenAPI document says of requests), one file an API, metrics, app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openm3.serve.options import ServeOptions

if TYPE_CHECKING:
    from openm3.serve.app import create_app, run

__all__ = ["ServeOptions", "create_app", "run"]


def __getattr__(name: str) -> Any:
    if name not in ("create_app", "run"):
        raise AttributeError(f"module 'openm3.serve' has no attribute {name!r}")
    try:
        import openm3.serve.app as app
    except ImportError as error:
        raise ImportError(f"the server needs {error.name}: pip install 'openm3[serve]'") from error
    return getattr(app, name)
