"""Tools: what is refused, and what a call's text becomes by its schema."""

import itertools

import pytest
from m3_format import tool

from openm3.processing import ToolError, read_tools
from openm3.processing.tools import Element, arguments_of, template_tools


def typed(text, schema, root=None):
    """One parameter's text, or its children [(name, text), ...], as its value."""
    parts = [text] if isinstance(text, str) else [Element(name, [inner]) for name, inner in text]
    parameters = {"type": "object", "properties": {"p": schema}} | (root or {})
    return arguments_of(Element("invoke", [Element("p", parts)]), parameters)["p"]


STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": t} for t in ("string", "integer", "number", "boolean", "null"))
NULLABLE = {"type": ["string", "null"]}
INTEGERS = {"type": "array", "items": INTEGER}
POINT = {"type": "object", "properties": {"x": INTEGER, "y": NUMBER, "name": STRING}}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("42", STRING, "42"),
        (" 42\n", STRING, " 42\n"),
        ("true", STRING, "true"),
        ("null", STRING, "null"),
        ('["a"]', STRING, '["a"]'),
        ("42", INTEGER, 42),
        (" 42\n", INTEGER, 42),
        ("-7", NUMBER, -7),
        ("3.0", INTEGER, 3),
        ("3.0", NUMBER, 3.0),
        ("1e3", NUMBER, 1000.0),
        ("1.5", INTEGER, "1.5"),
        ("forty", INTEGER, "forty"),
        ("NaN", NUMBER, "NaN"),
        ("1e999", NUMBER, "1e999"),
        ("true", BOOLEAN, True),
        ("False", BOOLEAN, False),
        ("yes", BOOLEAN, "yes"),
        ("1", BOOLEAN, "1"),
        ("true", INTEGER, "true"),
        ("null", NULL, None),
        ("null", NULLABLE, None),
        ("none", NULLABLE, "none"),
        ("null", {"type": "string", "nullable": True}, None),
        ("42", {"anyOf": [STRING, INTEGER]}, 42),
        ("x", {"anyOf": [STRING, INTEGER]}, "x"),
        ("42", {"oneOf": [NULL, STRING]}, "42"),
        ("", STRING, ""),
        (" \n", STRING, " \n"),
        ("", INTEGERS, []),
        (" \n", INTEGERS, []),
        ("", POINT, {}),
        ("", {"anyOf": [INTEGERS, NULL]}, []),
        ("", INTEGER, ""),
        ("", {}, ""),
        ("[1, 2]", INTEGERS, [1, 2]),
        ('{"x": 1}', POINT, {"x": 1}),
        ("5", INTEGERS, [5]),
        ("a", {"type": "array", "items": STRING}, ["a"]),
        ("abc", POINT, "abc"),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": [1, "2"]}, "2"),
        (" red ", {"enum": ["red"]}, "red"),
        ("7", {"const": 7}, 7),
        ("42", {}, 42),
        ("true", {}, True),
        ("null", {}, None),
        ("[1, {}]", {}, [1, {}]),
        ('"x"', {}, '"x"'),
        ("007", {}, "007"),
        ("hello", {}, "hello"),
        ("9" * 5000, INTEGER, "9" * 5000),
        ("[" * 100_000, {}, "[" * 100_000),
        ("42", True, 42),
        ("42", None, 42),
        ("42", {"type": 5}, 42),
    ],
)
def test_text_gets_the_type_its_schema_says(text, schema, value):
    result = typed(text, schema)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("children", "schema", "value"),
    [
        ([("item", "1"), ("item", "2")], INTEGERS, [1, 2]),
        ([("item", "1"), ("item", "a")], {}, [1, "a"]),
        ([("x", "1"), ("y", "2.5"), ("name", "7")], POINT, {"x": 1, "y": 2.5, "name": "7"}),
        ([("x", "1"), ("z", "7")], POINT, {"x": 1, "z": 7}),
        ([("z", "7")], {"type": "object", "additionalProperties": STRING}, {"z": "7"}),
        ([("item", "1")], {"type": "object", "properties": {"item": STRING}}, {"item": "1"}),
        ([("item", "1")], {"type": "object"}, {"item": 1}),
        ([("a", "1"), ("a", "2")], {}, {"a": [1, 2]}),
        ([("name", "1"), ("name", "2")], POINT, {"name": ["1", "2"]}),
        ([("x", "1")], {"type": "array", "items": POINT}, [{"x": 1}]),
        ([("item", "1"), ("item", "2")], {"anyOf": [STRING, INTEGERS]}, [1, 2]),
        ([("b", "bold")], STRING, "<b>bold</b>"),
        ([("x", "1")], {"anyOf": [NULL, POINT]}, {"x": 1}),
        ([("x", "1")], INTEGER, {"x": 1}),
    ],
)
def test_children_become_lists_and_objects_as_the_schema_says(children, schema, value):
    assert typed(children, schema) == value


def test_a_repeated_parameter_is_a_list_of_its_items_type():
    parameters = {"type": "object", "properties": {"tag": {"type": "array", "items": STRING}}}
    again = Element("tag", [Element("item", ["3"]), Element("item", ["4"])])
    call = Element("invoke", [Element("tag", ["1"]), Element("tag", ["2"]), again])
    assert arguments_of(call, parameters) == {"tag": ["1", "2", "3", "4"]}


def test_text_beside_children_is_kept():
    inner = Element("p", ["see ", Element("x", ["1"]), " there "])
    assert arguments_of(Element("invoke", [inner]), {"properties": {"p": POINT}}) == {
        "p": {"x": 1, "$text": "see there"}
    }
    taken = Element("p", ["see", Element("$text", ["1"])])
    assert arguments_of(Element("invoke", [taken]), None) == {"p": {"$text": 1, "$$text": "see"}}
    items = Element("p", [" 1 ", Element("item", ["2"]), "\n", Element("item", ["3"]), "4"])
    assert arguments_of(Element("invoke", [items]), {"properties": {"p": INTEGERS}}) == {"p": [1, 2, 3, 4]}
    text = Element("p", ["a ", Element("b", ["c ", Element("i", ["d"])]), " e"])
    assert arguments_of(Element("invoke", [text]), {"properties": {"p": STRING}}) == {"p": "a <b>c <i>d</i></b> e"}


def test_references_are_followed():
    root = {"$defs": {"point": POINT, "a/b": {"$ref": "#/$defs/point"}}}
    assert typed([("name", "1")], {"$ref": "#/$defs/point"}, root) == {"name": "1"}
    assert typed([("name", "1")], {"$ref": "#/$defs/a~1b"}, root) == {"name": "1"}
    assert typed("1", {"$ref": "#/$defs/missing"}, root) == 1
    assert typed("1", {"$ref": "other.json"}, root) == 1
    tree = {"type": "object", "properties": {"v": STRING, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
    kid = Element("item", [Element("v", ["2"]), Element("kids", [Element("item", [Element("v", ["3"])])])])
    call = Element("invoke", [Element("p", [Element("kids", [kid])])])
    parameters = {"properties": {"p": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": tree}}
    assert arguments_of(call, parameters) == {"p": {"kids": [{"v": "2", "kids": [{"v": "3"}]}]}}


def test_all_of_and_siblings_of_any_of_are_merged():
    schema = {"allOf": [{"properties": {"a": STRING}}, {"properties": {"b": STRING}}], "properties": {"c": STRING}}
    assert typed([("a", "1"), ("b", "2"), ("c", "3")], schema) == {"a": "1", "b": "2", "c": "3"}
    schema = {
        "type": "object",
        "properties": {"a": STRING},
        "anyOf": [{"required": ["a"]}, {"properties": {"b": STRING}}],
    }
    assert typed([("a", "1"), ("b", "2")], schema) == {"a": "1", "b": "2"}


def test_schemas_that_turn_in_circles_end():
    double = {"anyOf": [{"$ref": "#/$defs/d"}, {"$ref": "#/$defs/e"}]}
    root = {"$defs": {"d": double, "e": {"allOf": [double, double, {"$ref": "#/$defs/d"}]}, "f": {"$ref": "#/$defs/f"}}}
    assert typed("1", {"$ref": "#/$defs/d"}, root) == 1
    assert typed("1", {"$ref": "#/$defs/f"}, root) == 1
    names = "abcdefghij"
    deep = {n: {"anyOf": [{"$ref": f"#/$defs/{m}"}] * 50} for n, m in itertools.pairwise(names)} | {
        "j": {"$ref": "#/nothing"}
    }
    assert typed("1", {"$ref": "#/$defs/a"}, {"$defs": deep}) == 1
    wide = {"anyOf": [{"anyOf": [{"anyOf": [STRING] * 50}] * 50}] * 50}
    assert typed("1", wide) == "1"


def test_tools_are_read_with_their_schemas():
    schemas = read_tools([tool("f"), {"type": "function", "function": {"name": "g"}}])
    assert [schema.name for schema in schemas] == ["f", "g"]
    assert schemas[0].parameters["properties"] == {"city": STRING}
    assert schemas[1].parameters == {"type": "object", "properties": {}}
    assert read_tools(None) == read_tools([]) == []


def test_templates_get_names_and_descriptions_guarded():
    tools = template_tools([tool("f", strict=True)], "<{}>".format)
    assert tools[0]["function"]["name"] == "<f>"
    assert tools[0]["function"]["description"] == "<Does f.>"
    assert tools[0]["function"]["parameters"]["strict"] is True
    assert template_tools([], str) is None


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("x", r"tools: must be a list, got str"),
        ({}, r"tools: must be a list, got dict"),
        (["x"], r"tools\[0\]: must be an object"),
        ([{"type": "retrieval"}], r"tools\[0\]: must be an object"),
        ([tool("f"), {"type": "function", "function": {}}], r"tools\[1\]\.function\.name: must be a string"),
        ([tool("")], r"tools\[0\]\.function\.name"),
        ([{"function": {"name": "f", "description": 1}}], r"description: must be a string, got int"),
        (
            [{"function": {"name": "f", "parameters": []}}],
            r"tools\[0\]\.function\.parameters: must be a JSON schema, .* list",
        ),
        ([{"function": {"name": "f", "parameters": "{}"}}], r"parameters: must be a JSON schema, an object; got str"),
        ([{"function": {"name": "f", "parameters": {"type": "array"}}}], r"its type must be 'object', got 'array'"),
        ([{"function": {"name": "f", "parameters": {"properties": []}}}], r"properties: must be an object, got list"),
        ([{"function": {"name": "f", "parameters": {"x": {1}}}}], r"tools\[0\]: cannot be written as JSON"),
        ([{"function": {"name": "f", "parameters": {"x": float("nan")}}}], r"tools\[0\]: cannot be written as JSON"),
        ([tool("f"), tool("f")], r"two have the name 'f'"),
    ],
)
def test_a_bad_tool_is_one_clear_error(tools, words):
    with pytest.raises(ToolError, match=words) as error:
        read_tools(tools)
    assert "\n" not in str(error.value)
