"""Questions about a rendered picture: shape, colour, place, relation of two objects, counting, describing.

One picture carries several questions in training (it costs more tokens than they do) and one in the examination.
A thought names what the question is about, step by step, so that the answer is a copy of its end:

    one object      red circle: top left        (what was named, then what was asked for)
    how many        red things: 1 red circle top left, 2 red star right: 2          (in reading order)
    relation        red circle top left, blue star right: left of; yes

Counting and relations are the hard ones, and a question that stands ahead of its picture (the thought says it again
behind the picture, where it is easy to follow): adaptive thinks for these only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from openm3.train.recipes.nano.case import Case, Talk, phrase
from openm3.train.recipes.nano.drawing import COLOURS, PLACES, SHAPES, Look, Thing, render, scene
from openm3.train.recipes.nano.words import a, sentence

KINDS = ("shape", "colour", "position", "relation", "count")
TAUGHT = (*KINDS, "position", "relation", "count")  # what training asks: the harder kinds twice as often
MOST = 6  # the largest count asked for


class Question(NamedTuple):
    """What is asked, the right answer, what to think before it, and whether adaptive thinks it."""

    text: str
    answer: str
    thought: str
    hard: bool = False


def picture(rng: random.Random, look: Look, things: list[Thing]) -> dict:
    return {"type": "image", "image": render(rng, look, things)}


def listing(things: list[Thing]) -> str:
    """What the picture shows, in reading order: `red circle top left, blue star right`."""
    return ", ".join(map(seen, things))


def seen(thing: Thing) -> str:
    """An object and its place, as thoughts write it."""
    return f"{thing.name} {PLACES[thing.place]}"


def at(place: int) -> str:
    """in the centre, on the left, at the top, at the top left"""
    return {3: "on the left", 4: "in the centre", 5: "on the right"}.get(place, f"at the {PLACES[place]}")


def free_pairs(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """n (colour, shape) pairs; repeats of a colour or a shape are common, so that questions need both."""
    colours = rng.sample(list(COLOURS), min(len(COLOURS), max(1, rng.randint(1, n + 1))))
    shapes = rng.sample(SHAPES, min(len(SHAPES), max(1, rng.randint(1, n + 1))))
    return [(rng.choice(colours), rng.choice(shapes)) for _ in range(n)]


def unique(things: list[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    counts = Counter(map(key, things))
    return [thing for thing in things if counts[key(thing)] == 1]


def ask_shape(rng: random.Random, things: list[Thing]) -> Question | None:
    by_colour = unique(things, lambda thing: thing.colour)
    if len(things) == 1 and rng.random() < 0.5:
        thing, named = things[0], "object"
        text = phrase(rng, ("What shape is this?", "What shape do you see?", "Which shape is in the picture?",
                            "What is the shape of the object?", "Name the shape."))  # fmt: skip
    elif by_colour and rng.random() < 0.6:
        thing = rng.choice(by_colour)
        named = thing.colour
        text = phrase(rng, ("What shape is {c}?", "What shape is the {c} object?", "Which shape is {c}?",
                            "What is the shape of the {c} one?", "What is the {c} thing?",
                            "The {c} object has what shape?"),
                      c=thing.colour)  # fmt: skip
    else:
        thing = rng.choice(things)
        named = PLACES[thing.place]
        text = phrase(rng, ("What shape is {p}?", "Which shape is {p}?", "What shape is the object {p}?",
                            "What shape do you see {p}?", "Name the shape {p}."), p=at(thing.place))  # fmt: skip
    return Question(text, sentence(f"it is {a(thing.shape)}"), f"{named}: {thing.shape}")


def ask_colour(rng: random.Random, things: list[Thing]) -> Question | None:
    by_shape = unique(things, lambda thing: thing.shape)
    word = rng.choice(("colour", "color"))
    if len(things) == 1 and rng.random() < 0.5:
        thing, named = things[0], "object"
        text = phrase(rng, ("What {w} is it?", "What {w} is this?", "Which {w} do you see?", "What is its {w}?",
                            "Name the {w} of the object."), w=word)  # fmt: skip
    elif by_shape and rng.random() < 0.6:
        thing = rng.choice(by_shape)
        named = thing.shape
        text = phrase(rng, ("What {w} is the {s}?", "Which {w} does the {s} have?", "What is the {w} of the {s}?",
                            "The {s} is what {w}?", "Name the {w} of the {s}."), w=word, s=thing.shape)  # fmt: skip
    else:
        thing = rng.choice(things)
        named = PLACES[thing.place]
        text = phrase(rng, ("What {w} is the object {p}?", "What {w} is {p}?", "Which {w} do you see {p}?",
                            "What is the {w} of the object {p}?"), w=word, p=at(thing.place))  # fmt: skip
    return Question(text, f"It is {thing.colour}.", f"{named}: {thing.colour}")


def ask_position(rng: random.Random, things: list[Thing]) -> Question | None:
    named = [(thing, name) for key, form in ((lambda t: t.name, "{}"), (lambda t: t.shape, "{}"),
                                             (lambda t: t.colour, "{} object"))
             for thing in unique(things, key) for name in [form.format(key(thing))]]  # fmt: skip
    if not named:
        return None
    thing, name = rng.choice(named)
    text = phrase(rng, ("Where is the {n}?", "Where do you see the {n}?", "In which place is the {n}?",
                        "What is the position of the {n}?", "Where in the picture is the {n}?", "Find the {n}.",
                        "Tell me where the {n} is."), n=name)  # fmt: skip
    return Question(text, f"It is {at(thing.place)}.", f"{name}: {PLACES[thing.place]}")


RELATIONS = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}  # axis of a place, sign
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MORE = {"left of": "more to the left", "right of": "more to the right", "above": "higher", "below": "lower"}


def ask_relation(rng: random.Random, things: list[Thing]) -> Question | None:
    named = unique(things, lambda thing: thing.name)
    if len(named) < 2:
        return None
    one, other = rng.sample(named, 2)
    relation = rng.choice(list(RELATIONS))
    axis, sign = RELATIONS[relation]
    apart = sign * (divmod(one.place, 3)[axis] - divmod(other.place, 3)[axis])
    if apart == 0:
        return None
    holds = apart > 0
    thought = f"{seen(one)}, {seen(other)}: {relation if holds else OPPOSITE[relation]}; "
    if rng.random() < 0.65:
        text = phrase(rng, ("Is the {a} {r} the {b}?", "Is the {a} {r} the {b} or not?",
                            "The {a} is {r} the {b}, right?",
                            "Would you say the {a} is {r} the {b}?"), a=one.name, b=other.name, r=relation)  # fmt: skip
        answer = (f"Yes, the {one.name} is {relation} the {other.name}." if holds else
                  f"No, the {one.name} is not {relation} the {other.name}.")  # fmt: skip
        return Question(text, answer, thought + ("yes" if holds else "no"), hard=True)
    asks = ("Which is {d}, the {a} or the {b}?", "What is {d}: the {a} or the {b}?")
    text = phrase(rng, asks, d=MORE[relation], a=one.name, b=other.name)
    name = (one if holds else other).name
    return Question(text, f"The {name}.", thought + name, hard=True)


def ask_count(rng: random.Random, things: list[Thing], what: str | None = None) -> Question | None:
    """`what`: "all", a colour or a shape; drawn where not given. Never more than six."""
    if what is None:
        choices = ["all", rng.choice(things).colour, rng.choice(things).shape]
        if rng.random() < 0.1:
            choices = [rng.choice(list(COLOURS)), rng.choice(SHAPES)]  # often none of these
        what = rng.choice(choices)
    noun = rng.choice(("objects", "shapes", "things"))
    if what == "all":
        counted, name = things, noun
    elif what in COLOURS:
        counted, name = [thing for thing in things if thing.colour == what], f"{what} {noun}"
    else:
        counted, name = [thing for thing in things if thing.shape == what], plural(what)
    n = len(counted)
    if n > MOST:
        return None
    text = phrase(rng, ("How many {n} are there?", "How many {n} do you see?", "Count the {n}.", "How many {n}?",
                        "How many {n} are in the picture?", "What is the number of {n}?"), n=name)  # fmt: skip
    steps = ", ".join(f"{i} {seen(thing)}" for i, thing in enumerate(counted, 1)) or "none"
    return Question(text, f"There are {n}." if n != 1 else "There is 1.", f"{name}: {steps}: {n}", hard=True)


def ask_all(rng: random.Random, things: list[Thing]) -> Question:
    text = phrase(rng, ("What do you see?", "Describe the picture.", "What is in this picture?", "Describe this image.",
                        "List the objects.", "What does the image show?"))  # fmt: skip
    answer = sentence(", ".join(f"{a(thing.name)} {at(thing.place)}" for thing in things))
    return Question(text, answer, listing(things))


def plural(shape: str) -> str:
    return {"cross": "crosses"}.get(shape, shape + "s")


ASKS = {
    "shape": ask_shape,
    "colour": ask_colour,
    "position": ask_position,
    "relation": ask_relation,
    "count": ask_count,
}


def counting_scene(rng: random.Random) -> tuple[Look, list[Thing], str]:
    """A scene for counting: the right answer is drawn first, evenly, then what else stands there."""
    n = rng.randint(1, MOST) if rng.random() < 0.95 else 0
    what = rng.choice(("all", "colour", "shape")) if n else rng.choice(("colour", "shape"))
    if what == "all":
        return *scene(rng, free_pairs(rng, n)), what
    others = rng.randint(0 if n else 1, 9 - n)
    names = list(COLOURS) if what == "colour" else list(SHAPES)
    counted, rest = names.pop(rng.randrange(len(names))), names
    rest = rng.sample(rest, rng.randint(1, 3))
    kinds = [counted] * n + [rng.choice(rest) for _ in range(others)]
    free = list(SHAPES) if what == "colour" else list(COLOURS)
    free = rng.sample(free, rng.randint(1, 4))
    pairs = [(kind, rng.choice(free)) if what == "colour" else (rng.choice(free), kind) for kind in kinds]
    return *scene(rng, pairs), counted


def sample(
    rng: random.Random, split: str, kind: str | None = None, turns: int | None = None, thinking: str | None = None
) -> Case:
    """Questions about pictures. `kind` one of KINDS (a single question, as examined) or None (a mix).

    In training, half of the cases are one picture with several questions after it; in the others, one to three
    pictures, the question stands before its picture: it is harder to learn, and only one question each can be so."""
    talk = Talk(rng, f"picture {kind}" if kind else "pictures", thinking)
    ahead = None if kind or turns else rng.random() < 0.5
    for _ in range(rng.choice((1, 2, 2, 3)) if ahead else 1):
        count = 1 if kind else turns or (rng.choice((1, 1, 2)) if ahead else rng.randint(3, 6))
        facts = ask_about(rng, talk, kind, count, ahead)
    return talk.case(**facts)


def ask_about(rng: random.Random, talk: Talk, kind: str | None, turns: int, ahead: bool | None) -> dict:
    """Adds one picture and up to `turns` questions about it to the talk; returns the facts of the scene.

    To describe the whole picture is asked last only, as its answer would give away all later ones."""
    first, question = kind or rng.choice(TAUGHT), None
    while question is None:
        what = None
        if first == "count":
            look, things, what = counting_scene(rng)
        else:
            n = rng.choice((1, 2, 2, 3, 3, 4, 5, 6) if first != "relation" else (2, 3, 4, 5))
            look, things = scene(rng, free_pairs(rng, n))
        question = ask_count(rng, things, what) if what else ASKS[first](rng, things)
    if kind is None and rng.random() < 0.06:
        question, turns = ask_all(rng, things), 1
    media, given = (picture(rng, look, things),), []
    while question is not None:
        talk.ask(question.text, *media, ahead=ahead)
        talk.answer(question.answer, thought=question.thought, hard=question.hard or talk.ahead)
        given, media = [*given, question.answer], ()
        question = another(rng, things, given, turns - len(given))
    return {"things": things, "look": look, "kind": first}


def another(rng: random.Random, things: list[Thing], given: list[str], left: int) -> Question | None:
    """The next question, its answer not `given` before, while `left` of them are to come and the scene allows one."""
    if left == 1 and rng.random() < 0.35:
        return ask_all(rng, things)
    for _ in range(8 if left else 0):
        question = ASKS[rng.choice(TAUGHT)](rng, things)
        if question is not None and question.answer not in given:
            return question
    return None
