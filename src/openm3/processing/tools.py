"""Tools as a request gives them, and the typing of a call's text by their JSON schemas.

M3 writes arguments as elements of plain text, so `42` is a number or a string by what the schema says. A schema is
read leniently (references, anyOf, nullable, lists of types): where nothing in it fits, the text itself is the value,
and where there is no schema at all, what reads as JSON is JSON and the rest a string.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_DEPTH = 64  # of elements in a call
MAX_FORMS = 64  # alternatives of one schema that are looked at
MAX_STEPS = 256  # subschemas visited to find them


class ToolError(ValueError):
    """A tool that cannot be offered; one line that begins with its place, such as `tools[0]`."""


@dataclass(frozen=True)
class ToolSchema:
    """One function that the model may call; `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass
class Element:
    """An element of a call: its name, and its text and children in order."""

    name: str
    parts: list[str | Element]

    @property
    def children(self) -> list[Element]:
        return [part for part in self.parts if isinstance(part, Element)]

    @property
    def text(self) -> str:
        """The text directly in this element."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def markup(self) -> str:
        """Everything in this element, children written as plain tags."""
        return "".join(
            part if isinstance(part, str) else f"<{part.name}>{part.markup}</{part.name}>" for part in self.parts
        )


def read_tools(tools: Any) -> list[ToolSchema]:
    """Checks tools in OpenAI's shape, `{"type": "function", "function": {name, description, parameters}}`.

    Raises ToolError for what is no such list, a schema that is not an object, or two tools of one name.
    """
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise ToolError(f"tools: must be a list, got {type(tools).__name__}")
    schemas = [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [schema.name for schema in schemas]
    if len(set(names)) < len(names):
        raise ToolError(f"tools: two have the name {next(name for name in names if names.count(name) > 1)!r}")
    return schemas


def _read_tool(tool: Any, where: str) -> ToolSchema:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise ToolError(f'{where}: must be an object {{"type": "function", "function": {{...}}}}')
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not name:
        raise ToolError(f"{where}.function.name: must be a string that is not empty, got {name!r}")
    if description is not None and not isinstance(description, str):
        raise ToolError(f"{where}.function.description: must be a string, got {type(description).__name__}")
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(parameters, dict):
        got = type(parameters).__name__
        raise ToolError(f"{where}.function.parameters: must be a JSON schema, an object; got {got}")
    if parameters.get("type", "object") != "object":
        raise ToolError(f"{where}.function.parameters: its type must be 'object', got {parameters['type']!r}")
    if not isinstance(parameters.get("properties", {}), dict):
        got = type(parameters["properties"]).__name__
        raise ToolError(f"{where}.function.parameters.properties: must be an object, got {got}")
    try:
        json.dumps(tool, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"{where}: cannot be written as JSON ({error})") from None
    return ToolSchema(name, description or "", parameters)


def template_tools(tools: Any, guard: Callable[[str], str]) -> list[dict[str, Any]] | None:
    """The tools as a template gets them: checked, names and descriptions guarded, None without any.

    What a template writes through tojson is guarded there; names and descriptions are also guarded here, for one that
    writes them directly. Raises ToolError.
    """
    schemas = read_tools(tools)
    if not schemas:
        return None
    return [
        tool | {"type": "function", "function": tool["function"] | _guarded_texts(schema, tool["function"], guard)}
        for tool, schema in zip(tools, schemas)
    ]


def _guarded_texts(schema: ToolSchema, function: dict[str, Any], guard: Callable[[str], str]) -> dict[str, Any]:
    texts = {"name": guard(schema.name)}
    if function.get("description") is not None:
        texts["description"] = guard(schema.description)
    return texts


def arguments_of(call: Element, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call's element, typed by its tool's schema (None: the tool is unknown)."""
    root = parameters if parameters is not None else {}
    return _object(call, root, root)


def has_property(schema: Any, root: Any, name: str) -> bool:
    """Whether some form of the schema names this property."""
    return any(name in form["properties"] for form in _forms(schema, root))


def child_schema(schema: Any, root: Any, name: str) -> Any:
    """The schema of an element `name` inside one with this schema; {} if nothing is said."""
    forms = _forms(schema, root)
    for form in forms:
        if name in form["properties"]:
            return form["properties"][name]
        if name == "item" and "items" in form:
            return form["items"]
    extra = (form.get("additionalProperties") for form in forms)
    return next((schema for schema in extra if isinstance(schema, dict)), {})


def _forms(
    schema: Any, root: Any, path: tuple[str, ...] = (), budget: Iterator[int] | None = None
) -> list[dict[str, Any]]:
    """What a schema allows, as plain alternatives: references followed, anyOf and oneOf opened, allOf merged.

    At most MAX_FORMS, in at most MAX_STEPS, and no reference inside itself: a schema comes from outside.
    """
    budget = iter(range(MAX_STEPS)) if budget is None else budget
    if not isinstance(schema, dict) or next(budget, None) is None:
        return []
    properties = schema.get("properties")
    forms = [schema | {"properties": properties if isinstance(properties, dict) else {}}]
    groups = [[part] for part in _list(schema.get("allOf"))] + [_list(schema.get(key)) for key in ("anyOf", "oneOf")]
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and reference not in path:
        groups.append([_follow(reference, root)])
        path = (*path, reference)
    for group in filter(None, groups):
        options = [form for option in group for form in _forms(option, root, path, budget)][:MAX_FORMS]
        forms = [_merged(form, option) for form in forms for option in options][:MAX_FORMS] or forms
    return forms


def _merged(form: dict[str, Any], option: dict[str, Any]) -> dict[str, Any]:
    return option | form | {"properties": option["properties"] | form["properties"]}


def _follow(reference: str, root: Any) -> Any:
    node = root
    for step in reference.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _types(forms: list[dict[str, Any]]) -> set[str]:
    types = set()
    for form in forms:
        kind = form.get("type")
        named = [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else []
        types.update(name for name in named if isinstance(name, str))
        if not named and form["properties"]:
            types.add("object")
        if not named and "items" in form:
            types.add("array")
        if form.get("nullable") is True:
            types.add("null")
    return types


def _value(element: Element, schema: Any, root: Any) -> Any:
    forms = _forms(schema, root)
    types = _types(forms)
    if not element.children:
        return _leaf(element.text, forms, types, schema, root)
    if types and not types & {"object", "array"} and "string" in types:
        return element.markup
    items_only = all(child.name == "item" for child in element.children)
    if items_only and ("array" in types or not ("object" in types or has_property(schema, root, "item"))):
        return _items(element, child_schema(schema, root, "item"), root)
    if "array" in types and "object" not in types:  # one object that lacks its <item>
        return [_object(element, child_schema(schema, root, "item"), root)]
    return _object(element, schema, root)


def _items(element: Element, schema: Any, root: Any) -> list[Any]:
    """A list of its items; text beside them is kept as items of its own."""
    parts = (part if isinstance(part, Element) else Element("item", [part]) for part in _joined(element.parts))
    return [_value(part, schema, root) for part in parts]


def _joined(parts: list[str | Element]) -> Iterator[str | Element]:
    """Parts with neighbouring texts joined and those of white space only left out."""
    run: list[str] = []
    for part in [*parts, None]:
        if isinstance(part, str):
            run.append(part)
            continue
        if text := "".join(run).strip():
            yield text
        run.clear()
        if part is not None:
            yield part


def _object(element: Element, schema: Any, root: Any) -> dict[str, Any]:
    """An object of its children, a repeated name as a list; text beside them is kept under `$text`."""
    groups: dict[str, list[Element]] = {}
    for child in element.children:
        groups.setdefault(child.name, []).append(child)
    result = {name: _member(group, child_schema(schema, root, name), root) for name, group in groups.items()}
    if text := " ".join(part for part in _joined(element.parts) if isinstance(part, str)):
        key = "$text"
        while key in result:
            key = "$" + key
        result[key] = text
    return result


def _member(group: list[Element], schema: Any, root: Any) -> Any:
    if len(group) == 1:
        return _value(group[0], schema, root)
    if "array" not in _types(_forms(schema, root)):
        return [_value(element, schema, root) for element in group]
    result: list[Any] = []
    for element in group:
        value = _value(element, schema, root)
        result.extend(value if isinstance(value, list) else [value])
    return result


def _leaf(text: str, forms: list[dict[str, Any]], types: set[str], schema: Any, root: Any) -> Any:
    """Text typed by the schema's types, the more specific first; the text itself if none fits."""
    bare = text.strip()
    fixed = [
        value for form in forms for value in (*_list(form.get("enum")), *([form["const"]] if "const" in form else []))
    ]
    for value in fixed:
        if value in (text, bare) if isinstance(value, str) else json.dumps(value) == bare:
            return value
    known, value = _json(bare)
    if not types:
        return value if known and not fixed else text
    if not bare:
        return text if "string" in types else [] if "array" in types else {} if "object" in types else text
    if known and _fits(value, types):
        return int(value) if isinstance(value, float) and "number" not in types else value
    if "boolean" in types and bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    if "string" not in types and "array" in types:
        return [_leaf_item(text, child_schema(schema, root, "item"), root)]
    return text


def _leaf_item(text: str, schema: Any, root: Any) -> Any:
    """A list's only item, written without its <item>."""
    return _value(Element("item", [text]), schema, root)


def _fits(value: Any, types: set[str]) -> bool:
    """Whether a JSON value has one of the types; a string never needs to be JSON."""
    if value is None:
        return "null" in types
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int):
        return bool(types & {"integer", "number"})
    if isinstance(value, float):
        return "number" in types or ("integer" in types and value.is_integer())
    return ("array" if isinstance(value, list) else "object" if isinstance(value, dict) else "") in types


def _json(text: str) -> tuple[bool, Any]:
    """(whether the text is JSON other than a string, its value)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False, None
    return not isinstance(value, str) and value not in (math.inf, -math.inf), value


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
