"""Tool calls as a grammar: M3's call format (elements after the namespace token), its arguments valid by JSON schemas.

Objects and lists become elements, texts stay bare, numbers and the like are JSON literals, as the model was trained to
write them. What elements cannot say unambiguously (free-form objects, unions of objects, tuples) is one JSON text,
which the parser reads as well. The grammar is Lark as llguidance reads it; `openm3.processing` reads the calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from openm3.engine.request import RequestError
from openm3.processing import ToolSchema

# A text must not spell the namespace token, and in a union with other types must not read as one of those.
NAMESPACE = r"/(?s:.*)\]<\]minimax\[>\[(?s:.*)/"
INTEGER = r"-?(0|[1-9][0-9]{0,17})"  # what every reader of JSON takes
NUMBER = r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?"
LITERAL = r"/\s*((?i:true|false)|null|[-0-9][0-9.eE+-]*|[\[{](?s:.*))?\s*/"
WHITESPACE = "[ ]?"  # between the parts of a JSON text

_NAME = re.compile(r"[^\s<>/\"](?:[^<>\"]*[^\s<>\"])?\Z")
_OF_STRINGS = {"minLength", "maxLength", "pattern"}
_OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_OF_OBJECTS = {"properties", "required", "additionalProperties"}
_OF_ARRAYS = {"items", "minItems", "maxItems"}
_OF_TYPES = {"string": _OF_STRINGS, "number": _OF_NUMBERS, "integer": _OF_NUMBERS, "object": _OF_OBJECTS,
             "array": _OF_ARRAYS}  # fmt: skip
# The other words that say what is valid. Any further ones are notes, which bind nobody.
_BINDING = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "enum", "const", "contains",
            "minContains", "maxContains", "uniqueItems", "prefixItems", "additionalItems", "unevaluatedItems",
            "patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired",
            "dependentSchemas", "dependencies", "unevaluatedProperties"}.union(*_OF_TYPES.values())  # fmt: skip
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def tools_grammar(tools: list[ToolSchema], namespace_id: int, *, required: bool, parallel: bool) -> str:
    """Lark for calls of these tools. RequestError for a schema that cannot be enforced, naming the tool."""
    writer = _Writer(namespace_id)
    calls = " | ".join(writer.call(tool) for tool in tools)
    block = f'{writer.ns} "<tool_call>\\n" ({calls}){"+" if parallel else ""} {writer.ns} "</tool_call>"'
    start = f"start: {block}" if required else f"start: TEXT ({block})?"
    return "\n".join([start, f"TEXT: /(?s:.*)/ & ~{NAMESPACE}", f"PLAIN: TEXT & ~{LITERAL}",
                      f"INTEGER: /{INTEGER}/", f"NUMBER: /{NUMBER}/", *writer.rules])  # fmt: skip


def json_options(schema: Mapping[str, Any]) -> str:
    """A schema as llguidance's compiler takes it."""
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}, ensure_ascii=False)


def literal(text: str) -> str:
    """A fixed text in Lark."""
    return json.dumps(text, ensure_ascii=False)


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, namespace_id: int) -> None:
        self.ns = f"<[{namespace_id}]>"
        self.rules: list[str] = []
        self._references: dict[tuple[int, str], str] = {}
        self._root: Mapping[str, Any] = {}
        self._where = ""

    def call(self, tool: ToolSchema) -> str:
        """The rule of one tool's calls."""
        self._root, self._where = tool.parameters, f"tool {tool.name!r}"
        if not _NAME.match(tool.name):
            raise RequestError(f"{self._where}: the name cannot be written in a call; leave out quotes and brackets")
        schema = self._resolved(tool.parameters)
        self._only(schema, _OF_OBJECTS)
        if not schema.get("properties"):
            if schema.get("required"):
                raise RequestError(f"{self._where}: required parameters {schema['required']} without properties")
            inside = ""
        else:
            inside = self._properties(schema)
        opening = f'<invoke name="{tool.name}">'
        return self._rule("call", f'{self.ns} {literal(opening)} {inside} {self.ns} "</invoke>\\n"')

    def _rule(self, kind: str, body: str) -> str:
        name = f"{kind}_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"T_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """A schema whose reference, if that is all it has, is followed."""
        for _ in range(64):
            if "$ref" not in schema:
                return schema
            self._only(schema, {"$ref"})
            schema = self._follow(schema["$ref"])
        raise RequestError(f"{self._where}: its references go round in a circle")

    def _follow(self, reference: Any) -> Mapping[str, Any]:
        node: Any = self._root
        for step in str(reference).split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            node = node.get(key) if isinstance(node, Mapping) else None
        if not str(reference).startswith("#") or not isinstance(node, Mapping):
            raise RequestError(f"{self._where}: the reference {reference!r} leads nowhere")
        return node

    def _only(self, schema: Mapping[str, Any], known: set[str]) -> None:
        if odd := sorted(set(schema) & _BINDING - known):
            raise RequestError(f"{self._where}: {', '.join(odd)} in its schema cannot be enforced")

    def _element(self, name: str, schema: Any) -> str:
        return f"{self.ns} {literal(f'<{name}>')} {self._value(schema)} {self.ns} {literal(f'</{name}>')}"

    def _properties(self, schema: Mapping[str, Any]) -> str:
        """An object's elements, in the order of its properties."""
        needed, properties = set(schema.get("required") or ()), schema["properties"]
        if missing := sorted(needed - set(properties)):
            raise RequestError(f"{self._where}: required {', '.join(missing)} without a schema of its own")
        parts = []
        for name, inner in properties.items():
            if not _NAME.match(name):
                raise RequestError(f"{self._where}: a parameter named {name!r} cannot be written in a call")
            element = self._element(name, inner)
            parts.append(element if name in needed else f"({element})?")
        return " ".join(parts)

    def _value(self, schema: Any, beside: bool = False) -> str:
        """What stands in an element. beside: other types are possible there too."""
        if schema is True:
            return "TEXT"
        if not isinstance(schema, Mapping):
            raise RequestError(f"{self._where}: a schema that is {schema!r} cannot be enforced")
        if "$ref" in schema:
            return self._reference(schema, beside)
        if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
            rest = {key: value for key, value in schema.items() if key != "allOf"}
            self._only(rest, set())
            return self._value(schema["allOf"][0], beside)
        if "enum" in schema or "const" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
            return "(" + " | ".join(map(literal, texts)) + ")"
        options = self._options(schema)
        if len(options) != 1 or options[0] is not schema:
            return self._union(schema, options)
        kind = schema.get("type") or _kind(schema)
        if kind is None:
            self._only(schema, set())
            return "TEXT"
        if kind not in _TYPES:
            raise RequestError(f"{self._where}: type {kind!r} in its schema is none of {', '.join(_TYPES)}")
        return getattr(self, f"_{kind}")(schema, beside)

    def _reference(self, schema: Mapping[str, Any], beside: bool) -> str:
        key = (id(self._root), f"{schema['$ref']} {beside}")
        if key not in self._references:
            name = self._references[key] = f"ref_{len(self._references)}"
            self.rules.append(f"{name}: {self._value(self._resolved(schema), beside)}")
        return self._references[key]

    def _options(self, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The alternatives of a schema; itself, if there are none."""
        for word in ("anyOf", "oneOf"):
            if word in schema:
                rest = {key: value for key, value in schema.items() if key != word}
                self._only(rest, set())
                return [option for part in schema[word] for option in self._options(part)]
        kinds = schema.get("type")
        if isinstance(kinds, list):
            return [_of_type(schema, kind) for kind in kinds]
        if schema.get("nullable") is True and isinstance(kinds, str) and kinds != "null":
            rest = {key: value for key, value in schema.items() if key != "nullable"}
            return [rest, {"type": "null"}]
        return [schema]

    def _union(self, schema: Mapping[str, Any], options: list[Mapping[str, Any]]) -> str:
        resolved = [self._resolved(option) for option in options]
        kinds = [option.get("type") or _kind(option) for option in resolved]
        if (
            "oneOf" in schema
            and len(set(kinds)) < len(kinds)
            and not all("const" in o or "enum" in o for o in resolved)
        ):
            raise RequestError(f"{self._where}: oneOf in its schema, with two of one type, cannot be enforced")
        nested = [option for option, kind in zip(resolved, kinds) if kind in ("object", "array")]
        parts = []
        if len(nested) > 1 or (nested and any(kind not in ("object", "array", "null") for kind in kinds)):
            parts = [self._json({"anyOf": nested})]  # elements would leave open which of them is meant
        elif nested:
            parts = [self._value(nested[0])]
        shape = {"object", "array"}
        # A schema of one kind names its text exactly; only texts beside other kinds must not be mistaken for those.
        mixed = len({kind for kind in kinds if kind is not None}) > 1
        parts += [self._value(option, mixed) for option, kind in zip(options, kinds) if kind not in shape]
        return "(" + " | ".join(parts) + ")"

    def _json(self, schema: Mapping[str, Any]) -> str:
        shared = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        return f"%json {json_options({**schema, **shared})}"

    def _string(self, schema: Mapping[str, Any], beside: bool) -> str:
        self._only(schema, _OF_STRINGS)
        parts = ["PLAIN" if beside else "TEXT"]
        if "minLength" in schema or "maxLength" in schema:
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            parts.append(f"/(?s:.{{{least},{most}}})/")
        if "pattern" in schema:
            parts.append(f"/{_whole(schema['pattern'])}/")
        return parts[0] if len(parts) == 1 else self._terminal(" & ".join(parts))

    def _number(self, schema: Mapping[str, Any], _: bool) -> str:
        self._only(schema, _OF_NUMBERS)
        return self._json(schema) if _OF_NUMBERS & set(schema) else "NUMBER"

    def _integer(self, schema: Mapping[str, Any], _: bool) -> str:
        self._only(schema, _OF_NUMBERS)
        return self._json(schema) if _OF_NUMBERS & set(schema) else "INTEGER"

    def _boolean(self, schema: Mapping[str, Any], _: bool) -> str:
        self._only(schema, set())
        return '("true" | "false")'

    def _null(self, schema: Mapping[str, Any], _: bool) -> str:
        self._only(schema, set())
        return '"null"'

    def _object(self, schema: Mapping[str, Any], _: bool) -> str:
        properties = schema.get("properties") or {}
        if not properties or set(schema) & _BINDING - _OF_OBJECTS or not all(map(_NAME.match, properties)):
            return self._json(schema)
        return f"({self._properties(schema)})"

    def _array(self, schema: Mapping[str, Any], _: bool) -> str:
        if not isinstance(schema.get("items"), Mapping) or set(schema) & _BINDING - _OF_ARRAYS:
            return self._json(schema)
        item = self._rule("item", self._element("item", schema["items"]))
        least, most = schema.get("minItems", 0), schema.get("maxItems", "")
        return f"{item}{{{least},{most}}}"


def _of_type(schema: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What a schema of several types says of one of them."""
    others = set().union(*_OF_TYPES.values()) - _OF_TYPES.get(kind, set())
    return {**{word: value for word, value in schema.items() if word not in others}, "type": kind}


def _kind(schema: Mapping[str, Any]) -> str | None:
    """The type that a schema without one speaks of."""
    words = ((_OF_OBJECTS, "object"), (_OF_ARRAYS, "array"), (_OF_STRINGS, "string"), (_OF_NUMBERS, "number"))
    return next((kind for known, kind in words if known & set(schema)), None)


def _whole(pattern: str) -> str:
    """A JSON schema's pattern, which may match anywhere, as one of the whole text; `/` as Lark wants it."""
    start = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern[not start : len(pattern) - (not end)]
    return f"{start}({inner}){end}".replace("/", r"\/").replace("\n", r"\n")
