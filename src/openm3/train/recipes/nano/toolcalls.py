"""Calling a tool that the model has never seen: its name, its parameters and its purpose are made up for each case.

One to three tools stand in the request. The user's words name the purpose or the tool, and the values of the
parameters; the call follows in the order in which the user gave them. Then the tool answers and the model uses that.

Every request is decided by the schemas: no two tools of a case do something with the same object, no two have the same
name, and whether a value is a word or a list of one is what its parameter says. Two things are hard in it, and training
has more of both than the examination: a tool whose made-up name says nothing of its purpose, so that only the
description tells, and lists beside strings. The thought before a call settles both, and adaptive thinks it: it reads
the tools as they stand, name before purpose, up to the one that is meant, then the types of what is given:

    mibek.show Show the mail; vurir Send the parcel: tags array, speed string

Half of the tools of training are described as people do ("Sends a parcel to a user.", "Use this to find the old maps
Returns json.", nothing at all), some with descriptions of their parameters; the thought then reads the first sentence.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from typing import Any

from openm3.train.recipes.nano.case import Case, Expect, Talk, phrase
from openm3.train.recipes.nano.corpus import frequent_words
from openm3.train.recipes.nano.dialogue import small_talk
from openm3.train.recipes.nano.words import ADJECTIVES, CITIES, COLOURS, NAMES, NOUNS, a, distinct, listed, made_up

VERBS = listed("get find book send make check open close list count move start stop read set show buy sell plan fetch")
MORE_VERBS = listed("""
    execute run search create delete update write load save print test add remove call edit view lock join turn clear
""")
THINGS = listed("""
    weather ticket price route order room table flight song mail report photo meeting task stock recipe note file light
    timer user invoice score message ride parcel
""")
FIELDS = listed("""
    city name day count limit title unit date color size level topic amount user place speed kind mode tags items year
    week weight price start end key query page style target source rate command path file text message content url code
""")
RESULTS = listed("""
    result status total price time temperature id state level count answer rank share amount rate speed
""")
SORTS = listed("bash shell python json text user web house team city sales data local remote test email home")
FIRST = ("{v} {o}.", "{v} {o}", "{vs} {o}.", "{vs} {o}", "This tool {ls} {o}.", "Use this to {l} {o}.",
         "A tool to {l} {o}.", "Tool that {ls} {o}", "{v} {o} for a user.", "{v} {o} of a {n}.", "{v} {o} by its {f}.",
         "{vs} {o} in the {n}.")  # fmt: skip
SECOND = ("Returns the {f}.", "Returns json.", "It needs a {f}.", "Use it only when asked.", "The {f} comes first.",
          "Works for every {n}.")  # fmt: skip
NOTES = ("The {p}", "The {p} of {o}", "The {n} to {l}", "{P} to {l}", "The {k} to {l}.", "A {n}", "{P} of the {n}.",
         "Which {p} to use")  # fmt: skip
GRAMMAR = listed("""
    with where that this from which when will have been true false none null call tool please want need tell give know
    what then than them they your also such only must does used uses using into each other should would could there
""")
COMMANDS = listed("cat ls head tail grep find python rm cp mv mkdir touch wc sort echo git")
ENDINGS = listed(".txt .json .py .md .csv .log")
TYPES = ("string", "string", "integer", "integer", "number", "boolean", "enum", "list")


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    options: tuple[str, ...] = ()
    note: str = ""

    def schema(self) -> dict[str, Any]:
        noted = {"description": self.note} if self.note else {}
        if self.kind == "enum":
            return {"type": "string", "enum": list(self.options)} | noted
        if self.kind == "list":
            return {"type": "array", "items": {"type": "string"}} | noted
        return {"type": self.kind} | noted


@dataclass(frozen=True)
class Tool:
    name: str
    verb: str
    object: str  # with its article
    description: str
    parameters: tuple[Parameter, ...]
    required: tuple[str, ...]
    free: bool = False  # described as people do
    described_last: bool = False

    @property
    def purpose(self) -> str:
        """The description's first sentence, without the full stop."""
        return self.description.split(". ")[0].split("\n")[0].removesuffix(".")

    @property
    def read(self) -> str:
        """How a thought reads it."""
        return f"{self.name} {self.purpose}".rstrip()

    def schema(self) -> dict[str, Any]:
        """The tool in the OpenAI shape."""
        properties = {parameter.name: parameter.schema() for parameter in self.parameters}
        described = {"description": self.description} if self.description else {}
        takes = {"parameters": {"type": "object", "properties": properties, "required": list(self.required)}}
        rest = takes | described if self.described_last else described | takes
        return {"type": "function", "function": {"name": self.name} | rest}


def word(rng: random.Random, real: list[str], share: float = 0.4) -> str:
    """One of `real`, or a made-up one; one in eight is any frequent word: whatever a vocabulary has as one token
    must be copied, too."""
    roll = rng.random()
    if roll < 0.125:
        return rng.choice(anything())
    return rng.choice(real) if roll < 0.125 + 0.875 * share else made_up(rng)


@functools.cache
def anything() -> tuple[str, ...]:
    return tuple(w for w in frequent_words() if w not in GRAMMAR)


def path_or_command(rng: random.Random) -> str:
    """`notes.txt`, `/tmp/river`, `cat ledger.json`, `grep -n total src/main.py`."""
    names = [word(rng, NOUNS, 0.6) for _ in range(3)]
    end = rng.choice(("", "", *ENDINGS))
    path = rng.choice(("", "", "", "/", "./")) + "/".join(names[: rng.choice((1, 1, 1, 2))]) + end
    if rng.random() < 0.35:
        return path
    option = f" -{rng.choice('alnrvix')}" if rng.random() < 0.25 else ""
    pattern = f" {names[2]}" if rng.random() < 0.25 else ""
    return f"{rng.choice(COMMANDS)}{option}{pattern} {path}"


def make_tools(rng: random.Random, split: str, free: float) -> list[Tool]:
    """One to three tools with different names and different objects; `free` of them are described as people do."""
    n = rng.choice((1, 2, 2, 3) if split == "test" else (1, 2, 2, 3, 3))
    tools: list[Tool] = []
    while len(tools) < n:
        tool = make_tool(rng, split, free, [other.object.split()[-1] for other in tools])
        if tool.name not in [other.name for other in tools]:
            tools.append(tool)
    return tools


def make_tool(rng: random.Random, split: str, free: float, taken: list[str]) -> Tool:
    """A tool with one to four parameters; names are words, made-up words, or both joined as programmers do."""
    freely = rng.random() < free
    verb, thing = rng.choice(VERBS + MORE_VERBS if freely else VERBS), word(rng, THINGS)
    while thing in taken:
        thing = made_up(rng)
    if split == "train" and rng.random() < 0.35:
        name = made_up(rng)
    else:
        style = rng.random()
        name = (f"{verb}_{thing}" if style < 0.5 else f"{verb}{thing.capitalize()}" if style < 0.6 else made_up(rng)
                if style < 0.75 else f"{made_up(rng)}_{thing}" if style < 0.9 else f"{thing}.{verb}")  # fmt: skip
    object, description = f"the {thing}", f"{verb.capitalize()} the {thing}."
    if freely:
        object = free_object(rng, thing)
        said_by_name = verb in name.lower() and thing in name.lower()
        description = "" if said_by_name and rng.random() < 0.15 else described(rng, verb, object)
    n = rng.choice((1, 2, 2, 3, 3, 4))
    names = field_names(rng, n)
    kinds = [rng.choice(TYPES) for _ in range(n)]
    if split == "train" and n > 1 and rng.random() < 0.35:
        kinds = rng.sample(["list", rng.choice(("string", "string", "enum")), *kinds[2:]], n)
    noted = freely and rng.random() < 0.4
    parameters = []
    for field, kind in zip(names, kinds):
        options = (
            tuple(distinct(rng, lambda: word(rng, COLOURS + NOUNS, 0.5), rng.randint(2, 4))) if kind == "enum" else ()
        )
        note = filled(rng, rng.choice(NOTES), verb, object, field) if noted else ""
        parameters.append(Parameter(field, kind, options, note))
    required = tuple(p.name for p in parameters if rng.random() < 0.7)
    return Tool(name, verb, object, description, tuple(parameters), required, freely, freely and rng.random() < 0.15)


def free_object(rng: random.Random, thing: str) -> str:
    """The thing with an article, perhaps with a word before it: `a bash command`, `the old map`."""
    words = (rng.choice(ADJECTIVES + SORTS) + " " if rng.random() < 0.5 else "") + thing
    return rng.choice((f"the {words}", a(words)))


def described(rng: random.Random, verb: str, object: str) -> str:
    """A description as people write it, of one sentence or two, with or without full stops."""
    first = filled(rng, rng.choice(FIRST), verb, object)
    if rng.random() < 0.7:
        return first
    second = filled(rng, rng.choice(SECOND), verb, object)
    return f"{first}{rng.choice((' ', chr(10)))}{second}" if first.endswith(".") else f"{first}\n{second}"


def filled(rng: random.Random, form: str, verb: str, object: str, field: str = "") -> str:
    """A form with its slots filled: {v} {l} verb, {vs} {ls} its third person, {o} object, {k} without its article."""
    third = verb + ("es" if verb.endswith(("ch", "sh", "s", "x")) else "s")
    plain = field.replace("_", " ")
    return form.format(v=verb.capitalize(), l=verb, vs=third.capitalize(), ls=third, o=object, n=rng.choice(NOUNS),
                       k=object.split(" ", 1)[1], f=rng.choice(FIELDS), p=plain, P=plain.capitalize())  # fmt: skip


def field_names(rng: random.Random, n: int) -> list[str]:
    """n parameter names; none is the beginning of another (`user`, `user_place`), so that a request reads one way."""
    while True:
        names = distinct(rng, lambda: word(rng, FIELDS) + (f"_{word(rng, FIELDS)}" if rng.random() < 0.15 else ""), n)
        if not any(longer.startswith(f"{name}_") for name in names for longer in names):
            return names


def value(rng: random.Random, parameter: Parameter, free: bool) -> Any:
    """free: a string may be a path or a command, too."""
    if parameter.kind == "integer":
        return rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(100, 9999)))
    if parameter.kind == "number":
        return rng.randint(1, 999) / 10 if rng.random() < 0.8 else rng.randint(1, 99) / 100
    if parameter.kind == "boolean":
        return rng.random() < 0.5
    if parameter.kind == "enum":
        return rng.choice(parameter.options)
    if parameter.kind == "list":
        return distinct(rng, lambda: word(rng, COLOURS + NOUNS + NAMES, 0.5), rng.randint(1, 3))
    if free and rng.random() < 0.2:
        return path_or_command(rng)
    parts = [word(rng, CITIES + NAMES + NOUNS, 0.6) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    return " ".join(parts)


def spoken(item: Any) -> str:
    if isinstance(item, bool):
        return "true" if item else "false"
    return ", ".join(item) if isinstance(item, list) else str(item)


def request(rng: random.Random, tool: Tool, arguments: dict[str, Any], field: str | None) -> str:
    """The user's words: which tool, which values, and what to report."""
    style = rng.choice(("{n} {v}", "{n}: {v}", "{n} = {v}", "{n}={v}", "{n} is {v}"))
    listed = any(isinstance(item, list) for item in arguments.values())
    mark = rng.choice(("; ", "\n")) if listed else rng.choice((", ", ", ", "; ", "\n", " and "))
    plain = rng.random() < 0.3
    values = mark.join(style.format(n=name.replace("_", " ") if plain else name, v=spoken(item))
                       for name, item in arguments.items())  # fmt: skip
    glue = "\n" if mark == "\n" else " "
    if rng.random() < 0.65:
        object = tool.object if rng.random() < 0.8 else f"the {tool.object.split(' ', 1)[1]}"
        lead = phrase(rng, ("{b} {o}", "Please {b} {o}", "Can you {b} {o}", "I want to {b} {o}", "{b} {o} for me",
                            "I need you to {b} {o}"), b=tool.verb, o=object)  # fmt: skip
    else:
        lead = phrase(rng, ("Use {n}", "Call {n}", "Run {n}", "Please call {n}", "Use the tool {n}"), n=tool.name)
    lead = lead.rstrip("?!. ")
    text = lead + (rng.choice((" with", ":", ",", " where")) + glue + values if values else "")
    if field:
        asks = ("What is the {f}?", "Tell me the {f}.", "I want to know the {f}.", "Give me the {f}.")
        text += rng.choice((". ", "\n", ". ")) + phrase(rng, asks, f=field)
    elif rng.random() < 0.6:
        text += "."
    return text[:1].upper() + text[1:] if rng.random() < 0.7 else text


def response(rng: random.Random, field: str | None) -> tuple[str, str]:
    """What the tool says, and the answer that uses it."""

    def drawn() -> Any:
        return rng.choice((rng.randint(0, 99), rng.randint(100, 9999), rng.randint(1, 999) / 10, made_up(rng),
                           rng.choice(NAMES), rng.choice(CITIES), rng.choice(NOUNS)))  # fmt: skip

    if field is None:
        said = drawn()
        return (str(said) if rng.random() < 0.5 else json.dumps({"result": said})), f"The result is {said}."
    others = distinct(rng, lambda: word(rng, RESULTS), rng.randint(0, 3), (field,))
    content = {name: drawn() for name in rng.sample([*others, field], len(others) + 1)}
    return json.dumps(content), f"The {field} is {content[field]}."


def sample(
    rng: random.Random, split: str, kind: str | None = None, thinking: str | None = None, free: float | None = None
) -> Case:
    """`kind`: "call" examines the call, "answer" the use of the result (the call is given); None teaches both.

    free: the share of tools that are described as people do, by default 0.5 in training and 0 in the examination.

    In training up to three requests go to the same tools; sometimes it is asked which tool does what, or just talk."""
    tools = make_tools(rng, split, (0.5 if split == "train" else 0.0) if free is None else free)
    talk = Talk(rng, f"tool {kind}" if kind else "tools", thinking, tools=[tool.schema() for tool in tools])
    roll = rng.random() if split == "train" else 1.0
    if roll < 0.06:
        question, answer = small_talk(rng)
        return talk.ask(question).answer(answer, thought="No tool is needed.").case(tools=tools, arguments=None)
    if roll < 0.16:
        return which(rng, talk, tools)
    for _ in range(1 if split == "test" else rng.choice((1, 2, 2, 3))):
        tool = rng.choice(tools)
        given = [p for p in tool.parameters if p.name in tool.required or rng.random() < 0.6]
        given = rng.sample(given, len(given)) if rng.random() < 0.4 else given
        arguments = {parameter.name: value(rng, parameter, tool.free) for parameter in given}
        field = word(rng, RESULTS) if rng.random() < 0.75 else None
        call = {"id": f"call_{rng.randrange(10**6)}", "type": "function",
                "function": {"name": tool.name, "arguments": arguments}}  # fmt: skip
        talk.ask(request(rng, tool, arguments, field))
        types = ", ".join(f"{parameter.name} {parameter.schema()['type']}" for parameter in given)
        talk.answer("", thought=f"{reading(tools, tool)}: {types or 'nothing'}", hard=True, calls=[call],
                    expect=Expect("call", (tool.name, arguments)) if kind != "answer" else None)  # fmt: skip
        if kind != "call":
            said, answer = response(rng, field)
            talk.messages.append({"role": "tool", "tool_call_id": call["id"], "content": said})
            talk.answer(answer, thought=f"The tool gave the {field or 'result'}.")
    return talk.case(tools=tools, tool=tool, arguments=arguments, field=field)


def reading(tools: list[Tool], meant: Tool) -> str:
    """The tools in their order up to the one that is meant."""
    return "; ".join(tool.read for tool in tools[: tools.index(meant) + 1])


def which(rng: random.Random, talk: Talk, tools: list[Tool]) -> Case:
    """Each tool is asked for by its purpose, or the other way round."""
    for tool in rng.sample(tools, len(tools)):
        if rng.random() < 0.75 or not tool.purpose:
            asks = ("Which tool can {b} {o}?", "What do I use to {b} {o}?", "Which one can {b} {o}?",
                    "Name the tool to {b} {o}.")  # fmt: skip
            talk.ask(phrase(rng, asks, b=tool.verb, o=tool.object))
            talk.answer(f"Use {tool.name}.", thought=reading(tools, tool))
        else:
            talk.ask(phrase(rng, ("What does {n} do?", "What is {n} for?", "What can {n} do?"), n=tool.name))
            talk.answer(f"{tool.purpose}.", thought=reading(tools, tool))
    return talk.case(tools=tools, arguments=None)
