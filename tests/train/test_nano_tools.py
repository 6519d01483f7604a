"""Calls of made-up tools: decided by schema and request, scored by name, values and types."""

import ast
import random
import re

import numpy as np
from nano_cases import answers, questions

from openm3.train.recipes.nano import toolcalls
from openm3.train.recipes.nano.case import Expect


def test_calls_use_the_schema_and_the_words_of_the_request():
    for i in range(300):
        case = toolcalls.sample(random.Random(i), "test", "call")
        name, arguments = case.expects[0].value
        schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
        assert len(schema) == len(case.tools)
        properties = schema[name]["properties"]
        assert set(schema[name]["required"]) <= set(arguments) <= set(properties)
        request = questions(case)[0]
        assert all(toolcalls.spoken(value) in request for value in arguments.values())
        for key, value in arguments.items():
            kinds = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list}
            assert type(value) is kinds[properties[key]["type"]]
            assert value in properties[key].get("enum", [value])
        fits = [tool["function"]["name"] for tool in case.tools
                if tool["function"]["name"] in words(request)
                or tool["function"]["description"].lower().rstrip(".") in request.lower()]  # fmt: skip
        assert fits == [name], request


def test_adaptive_thinks_of_the_tool_and_its_types_before_a_call():
    for i in range(100):
        cases = {mode: toolcalls.sample(random.Random(i), "test", "answer", thinking=mode)
                 for mode in ("adaptive", "disabled")}  # fmt: skip
        turns, tools = {mode: case.messages for mode, case in cases.items()}, cases["adaptive"].tools
        call, answer = (m for m in turns["adaptive"] if m["role"] == "assistant")
        function = call["tool_calls"][0]["function"]
        types = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}
        told = ", ".join(f"{key} {types[type(value)]}" for key, value in function["arguments"].items())
        assert f"{call['reasoning_content']}; ".split(": ")[1] == (f"{told or 'nothing'}; ")
        read = [entry.split(" ", 1) for entry in call["reasoning_content"].split(": ")[0].split("; ")]
        assert read[-1][0] == function["name"]
        known = {f["name"]: f["description"][:-1] for f in (tool["function"] for tool in tools)}
        assert read == [[name, known[name]] for name in list(known)[: len(read)]]
        assert "reasoning_content" not in answer
        assert not any("reasoning_content" in message for message in turns["disabled"])


def test_training_describes_half_of_the_tools_as_people_do_and_reads_their_first_sentence():
    tools = [tool for i in range(400) for tool in toolcalls.make_tools(random.Random(i), "train", 0.5)]
    free = [tool for tool in tools if tool.description != f"{tool.verb.capitalize()} {tool.object}."]
    assert 0.4 < len(free) / len(tools) < 0.6
    assert all(tool.description.startswith(tool.purpose) for tool in tools)
    assert len({tool.purpose.split()[0] for tool in free if tool.purpose}) > 40
    bare = [tool for tool in free if not tool.description]
    assert bare
    assert all(tool.verb in tool.name.lower() and tool.read == tool.name for tool in bare)
    assert all("description" not in tool.schema()["function"] for tool in bare)
    notes = [parameter.schema().get("description") for tool in free for parameter in tool.parameters]
    assert 0.2 < sum(map(bool, notes)) / len(notes) < 0.6
    for i in range(200):  # what an examination row draws where it asks for it
        case = toolcalls.sample(random.Random(i), "test", "call", "adaptive", free=1.0)
        thought = case.messages[-1]["reasoning_content"]
        assert thought.split(": ")[0].split("; ")[-1] == case.facts["tool"].read


def words(text):
    return re.findall(r"[\w.]*\w", text)


def test_a_request_reads_one_way():
    for i in range(300):
        for tool in toolcalls.make_tools(random.Random(i), "train", 0.5):
            names = [parameter.name for parameter in tool.parameters]
            assert not any(b.startswith(a + "_") for a in names for b in names)
        tools = toolcalls.make_tools(random.Random(i), "test", 0.0)
        assert len({tool.object for tool in tools}) == len({tool.name for tool in tools}) == len(tools)


def test_training_has_more_of_what_is_hard_in_tools():
    def shares(split):
        tools = [tool for i in range(500) for tool in toolcalls.make_tools(random.Random(i), split, 0.0)]
        silent = np.mean([tool.object.split()[-1] not in tool.name.lower() for tool in tools])
        kinds = [{parameter.kind for parameter in tool.parameters} for tool in tools]
        return silent, np.mean(["list" in kind and bool(kind & {"string", "enum"}) for kind in kinds])

    (silent, mixed), (silent_test, mixed_test) = shares("train"), shares("test")
    assert silent > 0.4 > 0.2 > silent_test > 0.1
    assert mixed > 0.35 > 0.2 > mixed_test > 0.1


def test_every_call_of_a_longer_talk_is_decided_by_its_request():
    rounds = []
    for i in range(300):
        case = toolcalls.sample(random.Random(i), "train")
        calls = [(case.messages[at - 1]["content"], m["tool_calls"][0]["function"])
                 for at, m in enumerate(case.messages) if m.get("tool_calls")]  # fmt: skip
        made = {tool.name: tool for tool in case.facts["tools"]}
        for request, call in calls:
            meant, said = made[call["name"]], request.lower()
            assert meant.name in words(request) or (meant.verb in said and meant.object.split(" ", 1)[1] in said)
            assert all(toolcalls.spoken(value) in request for value in call["arguments"].values())
        rounds.append(len(calls))
    assert set(rounds) == {0, 1, 2, 3}


def test_the_answer_after_a_tool_holds_its_result():
    for i in range(100):
        case = toolcalls.sample(random.Random(i), "test", "answer")
        said = case.messages[-2]["content"]
        value = answers(case)[-1].rstrip(".").split(" is ", 1)[1]
        assert value in said
        if said.startswith("{"):
            assert str(ast.literal_eval(said)[case.facts["field"] or "result"]) == value
        assert case.expects[0] is None


class Call:
    def __init__(self, name, arguments):
        self.name, self.arguments = name, arguments


def test_a_call_is_right_only_with_the_same_name_values_and_types():
    expect = Expect("call", ("f", {"n": 1, "on": True, "l": ["a"]}))
    assert expect.score("", [Call("f", {"on": True, "n": 1, "l": ["a"]})])
    for wrong in ({"n": True, "on": True, "l": ["a"]}, {"n": 1, "on": 1, "l": ["a"]}, {"n": 1, "on": True},
                  {"n": "1", "on": True, "l": ["a"]}, {"n": 1, "on": True, "l": "a"}):  # fmt: skip
        assert not expect.score("", [Call("f", wrong)])
    assert not expect.score("", [])
    assert not expect.score("", [Call("g", expect.value[1])])
    assert not expect.score("", [Call(*expect.value)] * 2)
