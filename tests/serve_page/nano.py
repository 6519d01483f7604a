"""openm3-nano's real answers for the test server, greedy, one at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

from openm3 import LLM, SamplingParams
from openm3.engine import Finish
from openm3.processing import ContentDelta, ThinkingDelta

from .server import Answer, Refused


def nano_answers() -> Answer:
    """The bundled model as an `Answer`."""
    llm, lock = LLM("openm3-nano"), threading.Lock()

    def answer(body: dict[str, Any]) -> Iterator[dict[str, Any] | Exception]:
        with lock:
            try:
                params = SamplingParams(temperature=0, max_tokens=body.get("max_tokens"))
                mode, tools = body["thinking"]["type"], body.get("tools")
                events = llm.chat(body["messages"], params, thinking=mode, tools=tools, stream=True)
            except ValueError as error:
                yield Refused(400, str(error))
                return
            calls = count()
            for event in events:
                if isinstance(event, ThinkingDelta):
                    yield {"reasoning_content": event.text}
                elif isinstance(event, ContentDelta):
                    yield {"content": event.text}
                elif isinstance(event, Finish):
                    usage = {"prompt_tokens": event.prompt_tokens, "completion_tokens": event.completion_tokens}
                    yield {"finish_reason": event.finish_reason, "usage": usage}
                else:
                    i = next(calls)
                    function = {"name": event.name, "arguments": json.dumps(event.arguments)}
                    yield {"tool_calls": [{"index": i, "id": f"call_{i}", "type": "function", "function": function}]}

    return answer
