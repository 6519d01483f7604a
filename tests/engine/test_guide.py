"""Structured output and thinking budgets: whatever the model would rather say, the answer is what was asked for."""

import json
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from openm3.checkpoint import resolve
from openm3.config import NANO_SPECIALS
from openm3.engine.core import Engine
from openm3.engine.guide import Guides
from openm3.engine.output import TextOutput
from openm3.engine.request import Grammar, Request, RequestError, SamplingParams, State
from openm3.processing import OutputParser, ThinkingDelta, Tokenizer, ToolCall

EOS = NANO_SPECIALS["[e~["]
NS, THINK, END_THINK = "]<]minimax[>[", "<mm:think>", "</mm:think>"
PERSON = {"type": "object", "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "maximum": 150,
          "minimum": 0}}, "required": ["name", "age"], "additionalProperties": False}  # fmt: skip


def tool(name: str, parameters: dict) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(scope="module")
def guides() -> Guides:
    return Guides(Tokenizer.from_file(resolve("openm3-nano") / "tokenizer.json"), [EOS])


class Noise:
    """A model that says anything, the markers in `likely` more often."""

    def __init__(self, vocab: int, seed: int, likely: dict[int, float]) -> None:
        self.vocab, self.seed, self.likely = vocab, seed, likely

    def run(self, batch):
        rows = []
        for request in batch.sampling:
            generator = torch.Generator().manual_seed(self.seed * 1000 + request.generated)
            row = torch.randn(self.vocab, generator=generator)
            for token, bias in self.likely.items():
                row[token] += bias
            rows.append(row)
        return torch.stack(rows) if rows else torch.empty(0, self.vocab)


class Script:
    """A model that insists on one text, again and again."""

    def __init__(self, guides: Guides, text: str) -> None:
        self.ids = guides.tokenizer.encode(text, specials=True)
        self.vocab = guides.tokenizer.vocab_size

    def run(self, batch):
        rows = torch.zeros(len(batch.sampling), self.vocab)
        for row, request in zip(rows, batch.sampling, strict=True):
            row[self.ids[min(request.generated, len(self.ids) - 1)]] = 1e6
        return rows


def answer(guides, runner, thinking=None, grammar=None, n=300, temperature=0.0, **params) -> tuple[Request, str]:
    """A finished request and its whole text, special tokens as they are spelled."""
    engine = Engine(runner, num_pages=64, page_size=16, guides=guides.guide)
    sampling = SamplingParams(temperature, 1.0, 0, **params)
    request = Request([1], sampling, n, eos_ids=frozenset([EOS]), grammar=grammar, thinking=thinking,
                      output=TextOutput(guides.tokenizer.stream()))  # fmt: skip
    engine.add(request)
    while engine.step():
        pass
    assert request.state is State.FINISHED
    assert engine.scheduler.pool.free == 64
    if request.error is not None:
        raise request.error
    return request, request.output.take()


COLOURS = ["red", "dark red", 'a "b"\n/']
KINDS = {
    "json": (Grammar("json", PERSON), lambda text: json.loads(text)["name"] in ("Ada", "Bob")),
    "regex": (Grammar("regex", "[0-9]{3}-[a-z]{2}"), lambda text: re.fullmatch("[0-9]{3}-[a-z]{2}", text)),
    "choice": (
        Grammar("choice", COLOURS),
        lambda text: text in COLOURS,
    ),
    "tools": (Grammar("tools", [tool("meet", PERSON)]), lambda text: calls_of(text, PERSON)),
}


def calls_of(text: str, parameters: dict, thinking: str = "disabled") -> list[ToolCall]:
    """The calls in a text that is nothing but calls, their arguments checked."""
    parser = OutputParser([tool("meet", parameters)], thinking)
    events = parser.feed(text) + parser.finish()
    assert events
    assert all(isinstance(event, ToolCall) for event in events), text
    for event in events:
        assert valid(event.arguments, parameters, parameters), (text, event.arguments)
    return events


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [None, "disabled", "adaptive", "enabled"])
@pytest.mark.parametrize("seed", range(3))
def test_the_answer_obeys_its_grammar_in_every_mode_and_thinking_is_free(guides, kind, mode, seed):
    grammar, holds = KINDS[kind]
    runner = Noise(guides.tokenizer.vocab_size, seed, {guides.think_id: 2.0, guides.end_id: 3.0, EOS: 5.0})
    request, text = answer(guides, runner, mode, grammar, thinking_budget=20)
    assert request.finish_reason == "stop"
    if mode == "adaptive":
        assert text.startswith((THINK, END_THINK))
    if mode in ("adaptive", "enabled"):
        thoughts, marker, text = text.partition(END_THINK)
        assert marker
        assert "[e~[" not in thoughts
    assert holds(text)


@pytest.mark.parametrize("script", ["{} is what I think.", f"{THINK}hm, hm{END_THINK}The answer is 7.[e~["])
def test_what_the_model_would_rather_say_gives_way(guides, script):
    _, text = answer(guides, Script(guides, script), "adaptive", KINDS["json"][0], thinking_budget=10)
    thoughts, _, text = text.partition(END_THINK)
    assert KINDS["json"][1](text)
    assert ("hm, hm" in thoughts) == ("hm, hm" in script)


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("mode", ["adaptive", "enabled"])
def test_thinking_ends_when_its_budget_is_spent(guides, mode, budget):
    script = (THINK if mode == "adaptive" else "") + "hm " * 40
    request, _ = answer(guides, Script(guides, script), mode, n=60, thinking_budget=budget)
    spent = request.output_ids.index(guides.end_id) - (mode == "adaptive" and budget > 0)
    assert spent == budget
    assert request.finish_reason == "length"  # the answer itself is not bounded
    assert request.output_ids.count(guides.end_id) == 1


def test_a_budget_does_not_touch_an_answer_without_thinking(guides):
    for mode in ("disabled", None):
        _, text = answer(guides, Script(guides, "hm " * 5 + "[e~["), mode, thinking_budget=2)
        assert text == "hm " * 5
    _, text = answer(guides, Script(guides, "Seven, I say.[e~["), "adaptive", thinking_budget=2)
    assert text == "Seven, I say."


def test_markers_in_several_ordinary_tokens_count(guides):
    plain = guides.tokenizer.encode(f"{THINK}so{END_THINK}")  # spelled: none of them special
    assert not {guides.think_id, guides.end_id} & set(plain)
    script = Script(guides, "")
    script.ids = [*plain, *guides.tokenizer.encode("nothing of the sort" * 9)]
    request, _ = answer(guides, script, "adaptive", n=len(plain) + 30, thinking_budget=40)
    assert guides.end_id not in request.output_ids  # the thinking had ended by itself
    script.ids = [*plain[1:], *script.ids[len(plain) :]]  # begun in the prompt, and the grammar takes over at its end
    _, text = answer(guides, script, "enabled", KINDS["regex"][0])
    assert KINDS["regex"][1](text.partition(END_THINK)[2])


def test_text_may_stand_before_or_instead_of_a_call_that_is_not_required(guides):
    auto = Grammar("tools", [tool("meet", PERSON)], required=False)
    _, text = answer(guides, Script(guides, "I would rather not.[e~["), "disabled", auto)
    assert text == "I would rather not."
    request, text = answer(guides, Script(guides, f"One moment.\n{NS}<tool_call>"), "disabled", auto)
    content, _, call = text.partition("\n" + NS)
    assert content == "One moment."
    assert calls_of(NS + call, PERSON)
    assert request.finish_reason == "stop"


def test_one_call_where_calls_are_not_parallel_and_one_of_several_tools(guides):
    tools = [tool("meet", PERSON), tool("wait", {"type": "object", "properties": {}})]
    likely = {guides.tokenizer.special_id(NS): 4.0}
    counts, names = [], set()
    for seed in range(12):
        for parallel in (True, False):
            runner = Noise(guides.tokenizer.vocab_size, seed, likely)
            _, text = answer(guides, runner, grammar=Grammar("tools", tools, parallel=parallel))
            parser = OutputParser(tools, "disabled")
            calls = parser.feed(text) + parser.finish()
            assert len(calls) == 1 or parallel
            counts.append(len(calls))
            names |= {call.name for call in calls}
    assert max(counts) > 1
    assert names == {"meet", "wait"}


# --- arguments of any schema ------------------------------------------------------------------------------------------


def valid(value, schema, root) -> bool:
    """Whether a value is valid by a JSON schema, of the keywords that the strategy below draws."""
    if schema is True:
        return True
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].split("/")[-1]], root)
    if "anyOf" in schema and not any(valid(value, option, root) for option in schema["anyOf"]):
        return False
    if "enum" in schema and not any(value == v and type(value) is type(v) for v in schema["enum"]):
        return False
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds and not any(_is_kind(value, kind) for kind in kinds):
        return False
    if isinstance(value, str):
        return (schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1e9)
                and re.search(schema.get("pattern", ""), value, re.DOTALL) is not None)  # fmt: skip
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return (set(schema.get("required", [])) <= set(value)
                and all(valid(v, properties[k], root) for k, v in value.items() if k in properties)
                and (schema.get("additionalProperties") is not False or set(value) <= set(properties)))  # fmt: skip
    if isinstance(value, list):
        items = schema.get("items", True)
        return (schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9)
                and all(valid(v, items, root) for v in value))  # fmt: skip
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.get("minimum", -1e300) <= value <= schema.get("maximum", 1e300)
    return True


def _is_kind(value, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
             "number": (int, float)}  # fmt: skip
    return isinstance(value, types[kind])


names = st.sampled_from(["a", "b", "city", "item", "two words", "x-y", "tool_call", "1"])
strings = st.one_of(
    st.just({"type": "string"}),
    st.fixed_dictionaries({"type": st.just("string"), "minLength": st.integers(0, 2), "maxLength": st.integers(2, 9)}),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]+/?$"}, {"type": "string", "pattern": "[0-9]"},
                     {"type": "string", "pattern": "^x", "maxLength": 6}]),
    st.lists(st.sampled_from(["on", "off", "42", "null", "a b", "<b>", "é", '"']), min_size=1, unique=True).map(
        lambda values: {"type": "string", "enum": values}
    ),
)  # fmt: skip
scalars = st.one_of(
    strings,
    st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "integer", "minimum": 3},
                     {"type": "number", "minimum": -1, "maximum": 7.5}, {"enum": [1, "one", None, True]},
                     {"type": ["string", "null"]}, {"type": ["integer", "string"]},
                     {"type": "string", "nullable": True},
                     {"anyOf": [{"type": "boolean"}, {"type": "string"}]}, {"type": "object"}, {"type": "array"},
                     {"type": ["string", "integer", "null"], "maxLength": 4, "minimum": 2, "x-note": 1},
                     {"$ref": "#/$defs/node"}]),
)  # fmt: skip


def objects(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.dictionaries(names, inner, min_size=1, max_size=3).flatmap(
        lambda properties: st.lists(st.sampled_from(sorted(properties)), unique=True).map(
            lambda needed: {"type": "object", "properties": properties, "required": needed}
        )
    )


schemas = st.recursive(scalars, lambda inner: st.one_of(
    objects(inner),
    inner.map(lambda items: {"type": "array", "items": items}),
    st.tuples(inner, st.integers(0, 2)).map(
        lambda x: {"type": "array", "items": x[0], "minItems": x[1], "maxItems": 3}
    ),
    objects(inner).map(lambda o: {"anyOf": [o, {"type": "null"}]}),
    st.tuples(objects(inner), objects(inner)).map(lambda two: {"anyOf": [*two]}),
), max_leaves=5)  # fmt: skip
NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(parameters=objects(schemas), seed=st.integers(0, 10_000))
def test_arguments_are_valid_by_any_schema(guides, parameters, seed):
    parameters = {**parameters, "$defs": {"node": NODE}}
    braces = dict.fromkeys(guides.tokenizer.encode('}]",'), 2.0)
    runner = Noise(guides.tokenizer.vocab_size, seed, {guides.tokenizer.special_id(NS): 6.0, **braces})
    grammar = Grammar("tools", [tool("meet", parameters)], parallel=False)
    request, text = answer(guides, runner, grammar=grammar, n=600)
    assume(request.finish_reason == "stop")
    assert len(calls_of(text, parameters)) == 1


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "a(?=b)"), "regex cannot be enforced: .*look-around"),
        (Grammar("json", {"type": "object", "properties": {"a": {"not": {}}}}), "json cannot be enforced: .*not"),
        (Grammar("tools", [tool("f", {"type": "object", "properties": {"a": {"type": "integer", "not": {}}}})]),
         "tool 'f': not in its schema cannot be enforced"),
        (Grammar("tools", [tool("f", {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}})]),
         "tool 'f': the reference '#/\\$defs/x' leads nowhere"),
        (Grammar("tools", [tool("f", {"type": "object", "properties": {"<a>": {}}})]), "a parameter named '<a>'"),
        (Grammar("tools", [tool("f", {"type": "object", "properties": {"a": {"type": "strin"}}})]), "type 'strin'"),
        (Grammar("tools", [tool("f", {"type": "object", "properties": {"a": {"anyOf": 3}}})]), "cannot be read"),
        (Grammar("tools", [{"type": "function"}]), "the tools cannot be read .*function"),
        (Grammar("tools", [tool("f", {"anyOf": [{"type": "object"}]})]), "tool 'f': anyOf in its schema cannot be"),
        (Grammar("tools", [tool('f"', {})]), "the name cannot be written in a call"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.kind,
)  # fmt: skip
def test_a_grammar_that_cannot_be_enforced_is_refused_in_one_line(guides, grammar, message):
    with pytest.raises(RequestError, match=message) as error:
        guides.guide(Request([1], SamplingParams(), 5, grammar=grammar))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("xml", "x"),
        ("json", "{}"),
        ("regex", 3),
        ("choice", "abc"),
        ("choice", []),
        ("choice", ["a", ""]),
        ("tools", []),
    ],
)
def test_a_grammar_of_the_wrong_shape_is_no_grammar(kind, value):
    with pytest.raises(RequestError, match=r"^grammar"):
        Grammar(kind, value)


def test_without_llguidance_the_extra_is_named(guides, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'openm3\[serve\]'"):
        guides.guide(Request([1], SamplingParams(), 5, grammar=KINDS["regex"][0]))
    assert guides.guide(Request([1], SamplingParams(thinking_budget=3), 5, thinking="enabled")) is not None


def test_a_prefix_of_thinking_is_shown_as_thinking(guides):
    """The parser reads a guided answer as it reads any other."""
    _, text = answer(guides, Script(guides, f"{THINK}hm{END_THINK}"), "adaptive", KINDS["choice"][0])
    parser = OutputParser(None, "adaptive")
    events = parser.feed(text) + parser.finish()
    assert isinstance(events[0], ThinkingDelta)
    assert KINDS["choice"][1](events[-1].text)
