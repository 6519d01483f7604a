"""What an answer is held to: `tool_choice`, `response_format` and `structured_outputs` as the engine's grammars."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from openm3.engine import Grammar
from openm3.processing import read_tools
from openm3.serve.errors import ApiError
from openm3.serve.generation import Loose


class StructuredOutputs(Loose):
    """What the answer must be, one of the three."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


def tool_grammar(
    choice: Any, tools: list[dict[str, Any]] | None, parallel: bool
) -> tuple[list[dict[str, Any]] | None, Grammar | None]:
    """(the tools to offer, what the answer is held to) for OpenAI's `tool_choice` in the shape of chat completions.

    The grammar is there where the caller asks for more than the model gives by itself: a call that must come, a tool by
    name, one call at most, or arguments that are valid by a schema marked strict. Raises ToolError for a bad tool.
    """
    read_tools(tools)
    if choice in (None, "auto"):
        strict = any(tool["function"].get("strict") for tool in tools or ())
        held = tools and (strict or not parallel)
        return tools, Grammar("tools", tools, required=False, parallel=parallel) if held else None
    if choice == "none":
        return None, None
    if not tools:
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    if choice == "required":
        return tools, Grammar("tools", tools, parallel=parallel)
    function = choice.get("function") if isinstance(choice, dict) else None
    named = [tool for tool in tools if isinstance(function, dict) and tool["function"]["name"] == function.get("name")]
    if not named:
        raise ApiError(400, "tool_choice: must be auto, none, required or a function that is among the tools",
                       param="tool_choice")  # fmt: skip
    return tools, Grammar("tools", named, parallel=False)


def response_grammar(given: dict[str, Any] | None) -> Grammar | None:
    """OpenAI's `response_format` as a grammar."""
    kind = (given or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json", True)
    inner = given.get("json_schema", given)
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise ApiError(400, "response_format: type must be text, json_object, or json_schema with json_schema.schema",
                       param="response_format")  # fmt: skip
    return Grammar("json", schema)


def structured_grammar(given: StructuredOutputs | None) -> Grammar | None:
    """`structured_outputs` as a grammar."""
    if given is None:
        return None
    found = [(kind, value) for kind, value in (("json", given.json_schema), ("regex", given.regex),
                                               ("choice", given.choice)) if value is not None]  # fmt: skip
    if len(found) != 1:
        raise ApiError(400, "structured_outputs: must hold one of json, regex and choice", param="structured_outputs")
    return Grammar(*found[0])
