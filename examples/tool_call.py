"""A tool call there and back: the model asks for a tool, this program runs it, the model answers with its result.

python examples/tool_call.py [MODEL]
"""

from __future__ import annotations

import json
import sys

from openm3 import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0)
QUESTION = "Get the weather with city Paris, unit celsius. What is the temperature?"
TOOLS = [{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city"],
        },
    },
}]  # fmt: skip


def get_weather(city: str, unit: str = "celsius") -> dict:
    """The tool itself; a real one would look out of the window."""
    return {"city": city, "temperature": 21 if unit == "celsius" else 70}


def main() -> None:
    llm = LLM(*sys.argv[1:2])
    messages: list[dict] = [{"role": "user", "content": QUESTION}]
    print(f"> {QUESTION}")
    answer = llm.chat(messages, GREEDY, tools=TOOLS)
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for i, call in enumerate(answer.tool_calls)
    ]
    if not calls:
        sys.exit(f"the model called no tool; it said: {answer.content!r}")
    messages.append({"role": "assistant", "content": answer.content, "tool_calls": calls})
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        print(f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
        try:
            result = {"get_weather": get_weather}[name](**arguments)
        except (KeyError, TypeError) as error:  # a model may ask for anything: tell it what was wrong
            result = {"error": f"{type(error).__name__}: {error}"}
        print(f"  -> {json.dumps(result)}")
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})
    print(llm.chat(messages, GREEDY, tools=TOOLS).content)


if __name__ == "__main__":
    main()
