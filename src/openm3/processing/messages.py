"""A request's messages, checked and brought into the shape that M3's chat templates read.

In: OpenAI's shape. Out: roles in the order that the format has a place for (root, then system or developer, then the
conversation), tool results in the order of their calls (templates match them by position), arguments as dicts, media
as bare placeholders with their sources collected in order, and every string of the request guarded (tokenizer.py).
What has no place in the format is refused with the index of the message, never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

ROLES = ("system", "developer", "user", "assistant", "tool", "root")
LEADING = ("system", "developer")
MEDIA = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


class MessageError(ValueError):
    """Messages that cannot be made into a prompt; one line that begins with the place, such as `messages[2]`."""


@dataclass
class Conversation:
    """What the template gets, and the sources of the media that its placeholders stand for, in order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


def read_messages(messages: Any, guard: Callable[[str], str]) -> Conversation:
    """Checks OpenAI-shaped messages and prepares them for the template. Raises MessageError.

    Several leading system and developer messages become one, joined by an empty line. A conversation may end with calls
    that have no results yet; calls of which only some have results are refused.
    """
    if not isinstance(messages, list | tuple):
        raise MessageError(f"messages: must be a list, got {type(messages).__name__}")
    if not messages:
        raise MessageError("messages: empty; a prompt needs at least one message")
    out = Conversation()
    index = 0
    while index < len(messages):
        where = f"messages[{index}]"
        message = messages[index]
        role = _role(message, where)
        if role == "tool":
            raise MessageError(
                f"{where}: a tool result without its call; an assistant message with tool_calls comes before it"
            )
        if role == "root" and index > 0:
            raise MessageError(f"{where}: a root message is the first one")
        if role in LEADING and out.messages and out.messages[-1]["role"] not in (*LEADING, "root"):
            raise MessageError(
                f"{where}: a {role} message comes before the conversation; the format has no place for it here"
            )
        read = {"user": _user, "assistant": _assistant}.get(role, _instruction)
        _add(out, read(message, where, guard, out))
        index += 1
        if role == "assistant":
            index += _results(messages, index, message.get("tool_calls") or (), guard, out)
    return out


def _add(out: Conversation, message: dict[str, Any]) -> None:
    last = out.messages[-1] if out.messages else None
    if last and last["role"] in LEADING and message["role"] in LEADING:
        last["content"] += "\n\n" + message["content"]
    else:
        out.messages.append(message)


def _role(message: Any, where: str) -> str:
    if not isinstance(message, dict):
        raise MessageError(f"{where}: must be an object, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise MessageError(f"{where}: role {role!r}; must be one of {', '.join(ROLES)}")
    return role


def _instruction(message: dict[str, Any], where: str, guard: Callable[[str], str], out: Conversation) -> dict[str, Any]:
    return {"role": message["role"], "content": _text(message.get("content"), where, guard)}


def _user(message: dict[str, Any], where: str, guard: Callable[[str], str], out: Conversation) -> dict[str, Any]:
    return {"role": "user", "content": _content(message.get("content"), where, guard, out)}


def _assistant(message: dict[str, Any], where: str, guard: Callable[[str], str], out: Conversation) -> dict[str, Any]:
    reasoning, calls, content = message.get("reasoning_content"), message.get("tool_calls"), message.get("content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise MessageError(f"{where}: reasoning_content must be a string, got {type(reasoning).__name__}")
    if calls is not None and not isinstance(calls, list | tuple):
        raise MessageError(f"{where}: tool_calls must be a list, got {type(calls).__name__}")
    if content is None and not calls and not reasoning:
        raise MessageError(f"{where}: an assistant message needs content, tool_calls or reasoning_content")
    result: dict[str, Any] = {"role": "assistant", "content": "" if content is None else _text(content, where, guard)}
    if reasoning:
        result["reasoning_content"] = guard(reasoning)
    if calls:
        result["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]", guard) for i, call in enumerate(calls)]
        ids = [call.get("id") for call in calls if call.get("id") is not None]
        if len(set(ids)) < len(ids):
            raise MessageError(f"{where}: two tool_calls have the id {next(i for i in ids if ids.count(i) > 1)!r}")
    return result


def _call(call: Any, where: str, guard: Callable[[str], str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise MessageError(f"{where}: must be an object with id, type and function")
    if call.get("id") is not None and not isinstance(call["id"], str):
        raise MessageError(f"{where}: id must be a string, got {type(call['id']).__name__}")
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(name, str) or not name:
        raise MessageError(f"{where}: function.name must be a string that is not empty, got {name!r}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_no_constant) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise MessageError(f"{where}: function.arguments is not JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise MessageError(f"{where}: function.arguments must be an object, got {type(arguments).__name__}")
    try:
        arguments = _guarded(arguments, guard)
    except (TypeError, RecursionError) as error:
        raise MessageError(f"{where}: function.arguments cannot be written as JSON ({error})") from None
    return {"type": "function", "function": {"name": guard(name), "arguments": arguments}}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """A JSON value with its strings and names guarded."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a name in it is not a string")
        return {guard(key): _guarded(item, guard) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(item, guard) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(f"it holds a {type(value).__name__}")


def _results(messages: Any, start: int, calls: Any, guard: Callable[[str], str], out: Conversation) -> int:
    """Adds the tool results that follow at `start`, in the order of `calls`; how many they are."""
    order = [call.get("id") for call in calls]
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    end = start
    while end < len(messages) and _role(messages[end], f"messages[{end}]") == "tool":
        where, message = f"messages[{end}]", messages[end]
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str):
            raise MessageError(f"{where}: a tool result needs tool_call_id, a string; got {call_id!r}")
        if call_id not in order:
            raise MessageError(f"{where}: a tool result without its call; no call before it has the id {call_id!r}")
        if call_id in found:
            raise MessageError(f"{where}: a second result for the call {call_id!r}")
        found[call_id] = where, message
        end += 1
    missing = [call_id for call_id in order if call_id not in found]
    if found and missing:
        raise MessageError(
            f"messages[{start - 1}]: the call {missing[0]!r} has no result, others of the message have one"
        )
    for call_id in order if found else ():
        where, message = found[call_id]
        out.messages.append({"role": "tool", "content": _content(message.get("content"), where, guard, out)})
    return end - start


def _text(content: Any, where: str, guard: Callable[[str], str]) -> str:
    """The content of a message that holds no media."""
    if isinstance(content, str):
        return guard(content)
    own = Conversation()
    text = _content(content, where, guard, own)
    if own.images or own.videos:
        raise MessageError(f"{where}: only user and tool messages hold pictures and video")
    return text


def _content(content: Any, where: str, guard: Callable[[str], str], out: Conversation) -> str | list[dict[str, Any]]:
    """Text as a string; text and media as parts. Sources are added to `out`."""
    if isinstance(content, str):
        return guard(content)
    if not isinstance(content, list | tuple) or not content:
        got = "an empty list" if isinstance(content, list | tuple) else type(content).__name__
        raise MessageError(f"{where}: content must be a string or a list of parts, got {got}")
    parts = [_part(part, f"{where}.content[{i}]", guard, out) for i, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str, guard: Callable[[str], str], out: Conversation) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise MessageError(f"{where}: text must be a string, got {type(part.get('text')).__name__}")
        return {"type": "text", "text": guard(part["text"])}
    if not isinstance(kind, str) or kind not in MEDIA:
        raise MessageError(f"{where}: a part of type {kind!r}; must be text, {', '.join(MEDIA)}")
    source = part.get(kind)
    if kind.endswith("_url") and isinstance(source, dict):
        source = source.get("url")
    if source is None or (kind.endswith("_url") and not isinstance(source, str)):
        raise MessageError(
            f"{where}: {kind} must hold " + ("a url, a string" if kind.endswith("_url") else "its source")
        )
    (out.images if MEDIA[kind] == "image" else out.videos).append(source)
    return {"type": MEDIA[kind]}
