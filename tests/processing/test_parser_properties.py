"""The parser on random text: what a schema and arguments render to is read back, at any split; no text is ever lost."""

import json
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st
from m3_format import NS, block, invoke, processor, tool
from parser_cases import DEVIATIONS, FORMAT, THINKING, TOOLS, ns
from test_parser import events, in_pieces, merged, shown

from openm3.processing import ContentDelta, OutputParser, ToolCall

# --- arguments and their schemas ---

FRAGMENTS = ["<", ">", "</item>", "<b>", "]<]", "[>[", "]<]minimax[>", "tool_call>", "invoke name=x>", "/a>", "a>",
             "\n", " ", "null", "42", "true", '{"a":', "日本", "🙂", "ü", "<mm:think>"]  # fmt: skip
NAMES = ["item", "invoke", "tool_call", "name", "a", "b", "city", "a-b", "a.b", "größe", "$x", "items"]
texts = st.text(max_size=20) | st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
texts = texts.filter(lambda t: NS not in t and t.strip() != "null")  # `null` is null where a schema allows both
floats = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = {  # the type's name in these tests: (schema, values)
    "text": ({"type": "string"}, texts),
    "integer": ({"type": "integer"}, st.integers()),
    "number": ({"type": "number"}, floats | st.integers()),
    "boolean": ({"type": "boolean"}, st.booleans()),
    "text or null": ({"type": ["string", "null"]}, texts),
    "integer or null": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, st.integers()),
    "colour": ({"type": "string", "enum": ["red", "42", ""]}, st.sampled_from(["red", "42", ""])),
}


def array_of(member):
    schema, values = member
    return {"type": "array", "items": schema}, st.lists(values, max_size=3)


def object_of(members):
    """An object whose members may be null as well; M3 leaves these out."""
    properties = {name: {"anyOf": [schema, {"type": "null"}]} for name, (schema, _) in members.items()}
    values = {name: values | st.none() for name, (_, values) in members.items()}
    return {"type": "object", "properties": properties}, st.fixed_dictionaries({}, optional=values)


def objects(members):
    return st.dictionaries(st.sampled_from(NAMES), members, max_size=4).map(object_of)


typed = st.recursive(
    st.sampled_from(sorted(SCALARS)).map(SCALARS.get), lambda t: t.map(array_of) | objects(t), max_leaves=8
)
tool_names = st.from_regex(r"[a-zA-Z_][\w.\-/]{0,12}", fullmatch=True)
calls = st.dictionaries(tool_names, objects(typed), min_size=1, max_size=3).flatmap(
    lambda tools: st.tuples(
        *(
            values.map(lambda v, name=name, schema=schema: (name, (schema, v)))
            for name, (schema, values) in tools.items()
        )
    )
)


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def cuts(data, text):
    return data.draw(st.lists(st.integers(0, len(text)), max_size=12), label="cuts")


@settings(max_examples=400)
@given(calls, st.data())
def test_rendered_arguments_are_read_back_at_any_split(made, data):
    tools = [tool(name) for name, _ in made]
    for schema, (_, (parameters, _)) in zip(tools, made):
        schema["function"]["parameters"] = parameters
    text = block(*(invoke(name, arguments) for name, (_, arguments) in made))
    expected = [("call", name, without_nulls(arguments)) for name, (_, arguments) in made]
    got = in_pieces(text, cuts(data, text), tools=tools)
    assert shown(got) == expected
    for event, (_, _, arguments) in zip(got, expected):
        assert json.dumps(event.arguments) == json.dumps(arguments)  # 1, 1.0 and True are equal to Python
    assert shown(in_pieces(text, range(1, len(text)), tools=tools)) == expected


@settings(max_examples=100)
@given(calls)
def test_what_a_template_renders_is_read_back(made):
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, (schema, _) in made]
    calls = [{"id": name, "function": {"name": name, "arguments": arguments}} for name, (_, arguments) in made]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    text = processor().prepare(messages, tools=tools, add_generation_prompt=False).text
    answer = text.rpartition("]~b]ai\n")[2].removesuffix("\n").removesuffix("[e~[")
    expected = [("call", name, without_nulls(arguments)) for name, (_, arguments) in made]
    assert shown(events(answer, "adaptive", tools)) == expected


# --- any text at all ---

PIECES = [NS, "<", ">", "/", "</", "tool_call", "invoke", "<tool_call>", "</tool_call>", ' name="get_weather"',
          "</invoke>", '<invoke name="save_file">', "<city>", "</city>", "<item>", "</item>", "city>", "item",
          "<mm:think>", "</mm:think>", "x", "42", " ", "\n", "]<]", "minimax", "[>[", '"', "'", "é"]  # fmt: skip
VALID = [ns(text) for text, _ in (FORMAT | DEVIATIONS).values()] + [ns(text) for _, text, _ in THINKING]
soup = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
modes = st.sampled_from(["enabled", "adaptive", "disabled"])


@st.composite
def damaged(draw):
    """Valid output with characters or pieces deleted, doubled, inserted or swapped."""
    text = draw(st.sampled_from(VALID) | st.lists(st.sampled_from(VALID), min_size=2, max_size=3).map("".join))
    for _ in range(draw(st.integers(1, 6))):
        at, size = draw(st.integers(0, len(text))), draw(st.integers(1, 20))
        kind = draw(st.sampled_from(["delete", "double", "insert", "cut"]))
        if kind == "delete":
            text = text[:at] + text[at + size :]
        elif kind == "double":
            text = text[: at + size] + text[at:]
        elif kind == "insert":
            text = text[:at] + draw(st.sampled_from(PIECES)) + text[at:]
        elif draw(st.booleans()):
            text = text[:at]
    return text


MARKER = re.compile(rf"<mm:think>|</mm:think>|{re.escape(NS)}\s*<?\s*/?\s*tool_call\s*>")


def skipped(text, starts, at_edge):
    """Where one may be after consuming markers and the white space around them; at an edge, white space alone too."""
    todo = [(start, at_edge) for start in starts]
    seen = set(todo)
    while todo:
        at, may_stop = todo.pop()
        steps = [(at + 1, may_stop)] if text[at : at + 1].isspace() else []
        if marker := MARKER.match(text, at):
            steps.append((marker.end(), True))
        todo += [step for step in steps if step not in seen]
        seen.update(steps)
    return set(starts) | {at for at, may_stop in seen if may_stop}


def assert_nothing_lost(text, thinking):
    """Every event's text stands in the input, in order; what lies between is markers and white space at markers."""
    parser = OutputParser(TOOLS, thinking)
    found = [event for char in text for event in parser.feed(char)] + parser.finish()
    places, edge = {0}, True
    for event in found:
        piece = event.raw if isinstance(event, ToolCall) else event.text
        starts = skipped(text, places, at_edge=edge or isinstance(event, ToolCall))
        places = {start + len(piece) for start in starts if text.startswith(piece, start)}
        assert places, f"{event} is not where it should be in {text!r}: {found}"
        edge = isinstance(event, ToolCall)
    assert len(text) in skipped(text, places, at_edge=True), f"the end of {text!r} is lost: {found}"


@settings(max_examples=500)
@given(soup | damaged(), modes, st.data())
def test_any_text_at_any_split_gives_the_same_events(text, thinking, data):
    whole = merged(events(text, thinking))
    assert in_pieces(text, cuts(data, text), thinking) == whole
    assert in_pieces(text, range(1, len(text)), thinking) == whole


@settings(max_examples=500)
@given(soup | damaged(), modes)
@example(f"{NS}<tool_call>\n{NS}</tool_call>", "disabled")
@example(" \n x", "adaptive")
def test_no_text_is_lost(text, thinking):
    assert_nothing_lost(text, thinking)


@settings(max_examples=300)
@given(st.text(), modes)
def test_plain_text_is_content_or_thinking_as_it_is(text, thinking):
    got = events(text, thinking)
    if any(marker in text for marker in ("mm:think", NS)):
        return
    assert "".join(event.text for event in got) == (text if text.strip() else "")
    assert all(isinstance(event, ContentDelta) == (thinking != "enabled") for event in got)


@settings(max_examples=300)
@given(damaged(), modes)
def test_damage_never_makes_a_half_call_whole(text, thinking):
    for event in events(text, thinking):
        if isinstance(event, ToolCall):
            assert event.raw in text
            assert re.match(rf"{re.escape(NS)}\s*<?\s*invoke\s+name", event.raw)
            assert re.search(rf"{re.escape(NS)}\s*<?\s*/\s*invoke\s*>\Z", event.raw)
            json.dumps(event.arguments, allow_nan=False)


@given(st.lists(st.sampled_from(sorted(FORMAT)), min_size=1, max_size=4))
def test_parts_of_a_turn_do_not_disturb_each_other(parts):
    text = ns(" and ".join(FORMAT[name][0] for name in parts))
    calls = [event for name in parts for event in FORMAT[name][1] if event[0] == "call"]
    assert [event for event in shown(events(text)) if event[0] == "call"] == calls
