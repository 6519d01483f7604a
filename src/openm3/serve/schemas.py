"""What the OpenAPI document says of the parts that are checked where they are read, not by pydantic: messages, tools
and items go to the model as they are given, fields of other servers included, and their errors name the place.

Each is the type of a field: `Messages`, `Tools`, ... validate as lists of objects and are described in full.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, WithJsonSchema

from openm3.processing.messages import ROLES
from openm3.serve.media import DETAILS, VIDEO_OPTIONS


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def _list(items: dict[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


def _any(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


def _is(value: str) -> dict[str, Any]:
    return {"const": value, "type": "string"}


STRING, INTEGER, NUMBER, OBJECT = ({"type": kind} for kind in ("string", "integer", "number", "object"))
NULL = {"type": "null"}
NAME = STRING | {"minLength": 1}
URL = STRING | {"description": "data:, http(s) where the server fetches, or the id of an uploaded file"}
PARAMETERS = _object(type=_is("object"), properties=OBJECT) | {"description": "a JSON schema"}

# OpenAI's chat completions
_text = _object("type text", type=_is("text"), text=STRING)
_image = _object("type image_url", type=_is("image_url"),
                 image_url=_object("url", url=URL, detail={"enum": [*DETAILS], "type": "string"}))  # fmt: skip
_video = _object("type video_url", type=_is("video_url"),
                 video_url=_object("url", url=URL, **dict.fromkeys(VIDEO_OPTIONS, NUMBER)))  # fmt: skip
_call = _object("function", id=STRING, type=_is("function"), function=_object("name", name=NAME, arguments=STRING))
_message = _object(
    "role",
    role={"enum": [*ROLES], "type": "string"},
    content=_any(STRING, _list(_any(_text, _image, _video), 1), NULL),
    reasoning_content=_any(STRING, NULL),
    tool_calls=_any(_list(_call), NULL),
    tool_call_id=STRING,
)
_function = _object("name", name=NAME, description=STRING, parameters=PARAMETERS, strict={"type": "boolean"})
_schema_format = _object("type json_schema", type=_is("json_schema"), json_schema=_object("schema", schema=OBJECT))
_free_format = _object("type", type={"enum": ["text", "json_object"], "type": "string"})
_named = _object("type function", type=_is("function"), function=_object("name", name=NAME))
_flat_named = _object("type name", type=_is("function"), name=NAME)
_flat_format = _object("type schema", type=_is("json_schema"), schema=OBJECT)
_modes = {"enum": ["auto", "none", "required"], "type": "string"}
_template = _object(thinking_mode=STRING, enable_thinking={"type": "boolean"}) | {"additionalProperties": False}

# OpenAI's responses
_input_text = _object("type text", type={"enum": ["input_text", "output_text", "text"], "type": "string"}, text=STRING)
_input_image = _object("type", type=_is("input_image"), image_url=URL, file_id=STRING)
_input_video = _object("type", type=_is("input_video"), video_url=URL, file_id=STRING)
_input = _any(STRING, _list(_any(_input_text, _input_image, _input_video), 1))
_items = _any(
    _object("role content", type=_is("message"), role={"enum": [*ROLES], "type": "string"}, content=_input),
    _object("type call_id name arguments", type=_is("function_call"), call_id=STRING, name=NAME, arguments=STRING),
    _object("type call_id output", type=_is("function_call_output"), call_id=STRING, output=_input),
    _object("type", type=_is("reasoning"), content=_list(_object("text", text=STRING))),
)
_flat_tool = _function | {"properties": _function["properties"] | {"type": _is("function")},
                          "required": ["type", "name"]}  # fmt: skip

# Anthropic's messages
_source = _any(
    _object("type media_type data", type=_is("base64"), media_type=STRING, data=STRING),
    _object("type url", type=_is("url"), url=URL),
    _object("type file_id", type=_is("file"), file_id=STRING),
)
_media = _object("type source", type={"enum": ["image", "video"], "type": "string"}, source=_source)
_result = _object("type tool_use_id", type=_is("tool_result"), tool_use_id=STRING,
                  content=_any(STRING, _list(_any(_text, _media))))  # fmt: skip
_use = _object("type id name input", type=_is("tool_use"), id=STRING, name=NAME, input=OBJECT)
_thought = _object("type thinking", type=_is("thinking"), thinking=STRING)


def example(**body: Any) -> ConfigDict:
    """A body's `model_config` with an example for the document."""
    return ConfigDict(json_schema_extra={"examples": [body]})


HELLO = [{"role": "user", "content": "Hello!"}]
Objects = list[dict[str, Any]]
Messages = Annotated[Objects, WithJsonSchema(_list(_message, 1))]
Tools = Annotated[Objects, WithJsonSchema(_list(_object("type function", type=_is("function"), function=_function)))]
ToolChoice = Annotated[Literal["auto", "none", "required"] | dict[str, Any], WithJsonSchema(_any(_modes, _named))]
Format = Annotated[dict[str, Any], WithJsonSchema(_any(_free_format, _schema_format))]
FlatFormat = Annotated[dict[str, Any], WithJsonSchema(_any(_free_format, _flat_format))]
TemplateOptions = Annotated[dict[str, Any], WithJsonSchema(_template)]
Items = Annotated[Objects, WithJsonSchema(_list(_items, 1))]
FlatToolChoice = Annotated[Literal["auto", "none", "required"] | dict[str, Any],
                           WithJsonSchema(_any(_modes, _flat_named))]  # fmt: skip
FlatTools = Annotated[Objects, WithJsonSchema(_list(_flat_tool))]
Blocks = Annotated[Objects, WithJsonSchema(_list(_any(_text, _media, _result, _use, _thought), 1))]
Texts = Annotated[Objects, WithJsonSchema(_list(_text))]
