"""Bytes and messages to tensors, and back: tokenizer, chat template, pictures, video, streamed output parsing.

The names below load on first use: importing this package brings in neither torch, Pillow nor PyAV.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm3.processing.images import ImageOptions, MediaError, MediaInput, image_pixels, load_image
    from openm3.processing.messages import MessageError
    from openm3.processing.parser import ContentDelta, Event, OutputParser, ThinkingDelta, ToolCall
    from openm3.processing.processor import Processor, Prompt, TrainingPrompt
    from openm3.processing.template import ChatTemplate, TemplateError
    from openm3.processing.tokenizer import StreamDecoder, Tokenizer, TokenizerError
    from openm3.processing.tools import ToolError, ToolSchema, read_tools
    from openm3.processing.video import VideoOptions, load_video, video_pixels

__all__ = [
    "ChatTemplate",
    "ContentDelta",
    "Event",
    "ImageOptions",
    "MediaError",
    "MediaInput",
    "MessageError",
    "OutputParser",
    "Processor",
    "Prompt",
    "StreamDecoder",
    "TemplateError",
    "ThinkingDelta",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "ToolError",
    "ToolSchema",
    "TrainingPrompt",
    "VideoOptions",
    "image_pixels",
    "load_image",
    "load_video",
    "read_tools",
    "video_pixels",
]
_NAMES = {
    "images": ("ImageOptions", "MediaError", "MediaInput", "image_pixels", "load_image"),
    "messages": ("MessageError",),
    "parser": ("ContentDelta", "Event", "OutputParser", "ThinkingDelta", "ToolCall"),
    "processor": ("Processor", "Prompt", "TrainingPrompt"),
    "template": ("ChatTemplate", "TemplateError"),
    "tokenizer": ("StreamDecoder", "Tokenizer", "TokenizerError"),
    "tools": ("ToolError", "ToolSchema", "read_tools"),
    "video": ("VideoOptions", "load_video", "video_pixels"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openm3.processing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"openm3.processing.{_HOMES[name]}"), name)
