"""Short clips: what moves, in which direction, what happens first.

Frames come as a list (no times) or, in training, also with the times of a film sampled at some rate. Two frames share
one temporal patch, so an event lasts at least two frames.
"""

from __future__ import annotations

import random

import numpy as np

from openm3.train.recipes.nano.case import Case, Talk, phrase
from openm3.train.recipes.nano.drawing import COLOURS, SHAPES, Look, paint, shade
from openm3.train.recipes.nano.words import a, sentence

KINDS = ("what", "direction", "first")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WAYS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


class Actor:
    """One object of a clip: its path (one point a frame) and the frame from which it is seen."""

    def __init__(self, rng: random.Random, name: tuple[str, str], size: int) -> None:
        self.colour, self.shape = name
        self.size = size
        self.ink = shade(rng, self.colour)
        self.path: list[tuple[float, float]] = []
        self.appears = 0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def stage(rng: random.Random, n: int) -> tuple[Look, list[Actor], list[tuple[float, float, float, float]]]:
    """A background, n different actors that stand out from it, and for each a strip of the picture of its own."""
    side = rng.choice((56, 84)) if n == 1 else rng.choice((84, 84, 112))
    height, width = (side, side) if rng.random() < 0.7 else (side, rng.choice((84, 112)))
    names: set[tuple[str, str]] = set()
    while len(names) < n:
        names.add((rng.choice(list(COLOURS)), rng.choice(SHAPES)))
    look = Look.draw(rng, height, width)
    while not all(look.visible(colour) for colour, _ in names):
        look = Look.draw(rng, height, width)
    rows = rng.random() < 0.5
    strips = [
        (0, height * i / n, width, height / n) if rows else (width * i / n, 0, width / n, height) for i in range(n)
    ]
    actors = [
        Actor(rng, name, rng.randint(20, max(20, min(30, min(height, width) // n - 8)))) for name in sorted(names)
    ]
    rng.shuffle(actors)
    return look, actors, strips


def still(rng: random.Random, actor: Actor, strip: tuple[float, ...], frames: int) -> None:
    x, y, width, height = strip
    half = actor.size / 2
    point = (x + rng.uniform(half, max(half, width - half)), y + rng.uniform(half, max(half, height - half)))
    actor.path = [point] * frames


def move(rng: random.Random, actor: Actor, strip: tuple[float, ...], frames: int, start: int, stop: int) -> str:
    """The actor goes straight through its strip from frame `start` to `stop`, else rests; returns the direction."""
    x, y, width, height = strip
    half = actor.size / 2
    room = {"left": width, "right": width, "up": height, "down": height}
    direction = rng.choice([d for d in DIRECTIONS if room[d] - actor.size >= 18] or [max(room, key=room.get)])
    dx, dy = DIRECTIONS[direction]
    free = room[direction] - actor.size
    way = rng.uniform(min(16, free), free)
    along = rng.uniform(0, free - way)
    if dx + dy < 0:
        along = free - along
    px = x + half + (along if dx else rng.uniform(0, max(0, width - actor.size)))
    py = y + half + (along if dy else rng.uniform(0, max(0, height - actor.size)))
    for frame in range(frames):
        share = min(1.0, max(0.0, (frame - start) / max(1, stop - start)))
        actor.path.append((px + dx * way * share, py + dy * way * share))
    return direction


def film(rng: random.Random, look: Look, actors: list[Actor], frames: int) -> np.ndarray:
    """uint8 [frames, H, W, 3]"""
    noise = np.random.default_rng(rng.getrandbits(32)) if look.noise else None
    canvas = look.canvas(noise)
    out = np.empty((frames, look.height, look.width, 3), np.uint8)
    for frame in range(frames):
        image = canvas.copy()
        for actor in actors:
            if frame >= actor.appears:
                paint(image, actor.shape, actor.ink, *actor.path[frame], actor.size, 0, look.smooth)
        out[frame] = np.clip(image, 0, 255)
    return out


def sample(rng: random.Random, split: str, kind: str | None = None, thinking: str | None = None) -> Case:
    """One clip and a question (two or three in training); `kind` one of KINDS."""
    first = kind or rng.choice(KINDS)
    frames = rng.choice((4, 6, 8, 8)) if first != "first" else rng.choice((6, 8, 8))
    n = 2 if first == "first" else rng.choice((1, 2, 2)) if first == "direction" else rng.choice((2, 2, 3))
    look, actors, strips = stage(rng, n)
    order, direction, appear = list(actors), None, False
    if first == "first":
        appear = rng.random() < 0.5
        middle = frames // 2
        times = ((0, middle - 1), (middle, frames - 1))
        for actor, strip, (start, stop) in zip(actors, rng.sample(strips, n), times):
            if appear:
                still(rng, actor, strip, frames)
                actor.appears = rng.randint(0, 1) if start == 0 else rng.randint(middle, frames - 2)
            else:
                move(rng, actor, strip, frames, start, stop)
    else:
        for actor, strip in zip(actors, rng.sample(strips, n)):
            if actor is actors[0]:
                direction = move(rng, actor, strip, frames, 0, frames - 1)
            else:
                still(rng, actor, strip, frames)
    questions = ask(rng, first, order, direction, appear)
    talk = Talk(rng, f"clip {kind}" if kind else "clips", thinking)
    media = (video(rng, film(rng, look, actors, frames), timed=split == "train"),)
    thought = story(order, direction, appear)
    for text, answer in questions[:1] if kind else questions[: rng.randint(1, 3)]:
        talk.ask(text, *media).answer(answer, thought=thought)
        media = ()
    return talk.case(kind=first, actors=[actor.name for actor in order], direction=direction, appear=appear)


def video(rng: random.Random, frames: np.ndarray, timed: bool) -> dict:
    """A video part; timed: half of them with `seconds`, the time of every second frame, as films have."""
    part = {"type": "video", "video": frames}
    if timed and rng.random() < 0.5:
        step = rng.choice((0.1, 0.2, 0.25, 0.5, 0.5, 1.0, 1.0))
        part["seconds"] = [round(step * frame, 3) for frame in range(0, len(frames), 2)]
    return part


def story(actors: list[Actor], direction: str | None, appear: bool) -> str:
    if direction:
        rest = "".join(f", {actor.name} still" for actor in actors[1:])
        return f"{actors[0].name} moves {WAYS[direction]}{rest}"
    verb = "appears" if appear else "moves"
    return f"{actors[0].name} {verb}, then {actors[1].name}"


def ask(
    rng: random.Random, kind: str, actors: list[Actor], direction: str | None, appear: bool
) -> list[tuple[str, str]]:
    """Questions and answers about a clip, the one examined first."""
    if kind == "first":
        verb = "appear" if appear else "move"
        before = phrase(rng, ("What {v}s first?", "Which object {v}s first?", "What is the first to {v}?",
                              "What {v}s first, the {a} or the {b}?", "What happens first?", "Which one {v}s earlier?"),
                        v=verb, a=(order := rng.sample(actors, 2))[0].name, b=order[1].name)  # fmt: skip
        after = phrase(rng, ("What {v}s last?", "What {v}s second?", "And then?", "What {v}s after that?"), v=verb)
        return [(before, f"The {actors[0].name} {verb}s first."), (after, f"The {actors[1].name} {verb}s second.")]
    what = (phrase(rng, ("What moves?", "Which object moves?", "What is moving?", "Which one moves?",
                         "What is in motion?")),
            f"The {actors[0].name} moves.")  # fmt: skip
    where = (phrase(rng, ("Which way does the {n} move?", "In which direction does it move?", "Where does the {n} go?",
                          "Which direction does the {n} move in?", "Where is it moving?", "What is the direction?"),
                    n=actors[0].name), f"It moves {WAYS[direction]}.")  # fmt: skip
    seen = (phrase(rng, ("What happens?", "Describe the clip.", "What do you see in the video?")),
            sentence(f"{a(actors[0].name)} moves {WAYS[direction]}"))  # fmt: skip
    rest = [seen]
    if len(actors) > 1:
        rest.append((phrase(rng, ("What stays still?", "What does not move?", "Which one rests?")),
                     sentence("the " + " and the ".join(sorted(actor.name for actor in actors[1:]))
                              + (" stays still" if len(actors) == 2 else " stay still"))))  # fmt: skip
    return [what, where, rng.choice(rest)] if kind == "what" else [where, what, rng.choice(rest)]
