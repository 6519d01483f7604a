"""Draws scenes of coloured shapes into uint8 arrays, fast: shapes are alpha masks, drawn once at a size and kept.

A scene lives on a canvas of multiples of 28 pixels (one token of the language model sees 28 x 28), so the processor
leaves its pixels as they are. A place is one of nine, and every object lies in its own ninth, clear of the borders.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np

TILE = 28
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (220, 30, 35), "orange": (250, 140, 20), "yellow": (245, 225, 40), "green": (35, 155, 55),
    "cyan": (50, 205, 215), "blue": (35, 70, 215), "purple": (125, 40, 160), "pink": (250, 135, 190),
    "black": (18, 18, 20), "white": (250, 250, 250),
}  # fmt: skip
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
MARGIN = 0.07  # of a ninth's side: how far an object keeps from its borders
SIDES = (84, 112, 140)  # pixels of most pictures
BACKGROUNDS = ((255, 255, 255), (243, 243, 238), (232, 224, 205), (214, 226, 236), (205, 215, 200), (190, 190, 190),
               (128, 128, 128), (72, 72, 78), (44, 50, 62), (20, 20, 24))  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and where (place 0..8, centre and size in pixels)."""

    shape: str
    colour: str
    place: int
    x: float
    y: float
    size: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@functools.lru_cache(maxsize=4096)
def mask(shape: str, size: int, turn: int, smooth: bool) -> np.ndarray:
    """Alpha [size, size] float32 of a shape, turned by `turn` degrees; drawn eight times as large and averaged down."""
    from PIL import Image, ImageDraw

    n = size * 8
    image = Image.new("L", (n, n))
    draw, box = ImageDraw.Draw(image), (0, 0, n - 1, n - 1)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "ring":
        draw.ellipse(box, fill=255)
        rim = n * 0.24
        draw.ellipse((rim, rim, n - 1 - rim, n - 1 - rim), fill=0)
    elif shape == "heart":
        draw.ellipse((0, 0.05 * n, 0.54 * n, 0.58 * n), fill=255)
        draw.ellipse((0.46 * n, 0.05 * n, n - 1, 0.58 * n), fill=255)
        draw.polygon([(0.05 * n, 0.45 * n), (0.95 * n, 0.45 * n), (0.5 * n, 0.98 * n)], fill=255)
    else:
        draw.polygon([(x * n, y * n) for x, y in outline(shape)], fill=255)
    if turn:
        image = image.rotate(turn, Image.Resampling.BICUBIC)
    alpha = np.asarray(image, np.float32).reshape(size, 8, size, 8).mean((1, 3)) / 255
    return alpha if smooth else np.round(alpha)


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygon shape in the unit square."""
    if shape == "square":
        return [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    if shape == "triangle":
        return [(0.5, 0.04), (0.98, 0.94), (0.02, 0.94)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]
    if shape == "cross":
        near, far = 0.33, 0.67
        return [(near, 0), (far, 0), (far, near), (1, near), (1, far), (far, far), (far, 1), (near, 1), (near, far),
                (0, far), (0, near), (near, near)]  # fmt: skip
    points = []
    for i in range(10):
        radius, angle = (0.52, 0.21)[i % 2], math.pi * i / 5
        points.append((0.5 + radius * math.sin(angle), 0.53 - radius * math.cos(angle)))
    return points


@dataclass(frozen=True)
class Look:
    """How a picture is drawn, apart from what is in it."""

    height: int
    width: int
    background: tuple[int, int, int]
    gradient: float
    noise: float
    smooth: bool

    @classmethod
    def draw(cls, rng: random.Random, height: int, width: int) -> Look:
        shade = rng.randint(-8, 8)
        background = tuple(min(255, max(0, c + shade)) for c in rng.choice(BACKGROUNDS))
        gradient = rng.uniform(-30, 30) if rng.random() < 0.25 else 0.0
        noise = rng.uniform(2, 7) if rng.random() < 0.25 else 0.0
        return cls(height, width, background, gradient, noise, rng.random() < 0.8)

    def visible(self, colour: str) -> bool:
        """Whether a colour stands out from this background."""
        distance = sum(abs(a - b) for a, b in zip(COLOURS[colour], self.background))
        return distance > 130 + 2 * abs(self.gradient)

    def canvas(self, noise: np.random.Generator) -> np.ndarray:
        """The empty picture, float32 [H, W, 3]."""
        image = np.empty((self.height, self.width, 3), np.float32)
        image[:] = self.background
        if self.gradient:
            image += np.linspace(-self.gradient, self.gradient, self.width, dtype=np.float32)[None, :, None]
        if self.noise:
            image += noise.standard_normal(image.shape, np.float32) * self.noise
        return image


def paint(
    image: np.ndarray, shape: str, colour: tuple[int, ...], x: float, y: float, size: int, turn: int, smooth: bool
):
    """Blends one shape into a float32 canvas, centred at (x, y); parts outside are cut."""
    alpha = mask(shape, size, turn, smooth)
    height, width = image.shape[:2]
    top, left = round(y - size / 2), round(x - size / 2)
    up, down, near, far = max(top, 0), min(top + size, height), max(left, 0), min(left + size, width)
    if up < down and near < far:
        part = alpha[up - top : down - top, near - left : far - left, None]
        spot = image[up:down, near:far]
        spot += part * (np.asarray(colour, np.float32) - spot)


def shade(rng: random.Random, colour: str) -> tuple[int, ...]:
    """A colour as it comes: every channel a little off."""
    return tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[colour])


def spot(rng: random.Random, look: Look, place: int) -> tuple[float, float, int]:
    """Centre and size of an object at a place: anywhere in its ninth of the canvas, MARGIN away from the borders."""
    row, column = divmod(place, 3)
    cell = min(look.height, look.width) / 3
    size = max(18, round(rng.uniform(0.64, 0.84) * cell)) if cell < 56 else round(rng.uniform(0.45, 0.8) * cell)
    return within(rng, size, column, look.width), within(rng, size, row, look.height), size


def within(rng: random.Random, size: int, index: int, extent: int) -> float:
    """A coordinate at which an object of that size stays in third number `index` of the extent."""
    third = extent / 3
    slack = max(0.0, (0.5 - MARGIN) * third - size / 2)
    return (index + 0.5) * third + rng.uniform(-slack, slack)


def render(rng: random.Random, look: Look, things: list[Thing]) -> np.ndarray:
    """The picture, uint8 [H, W, 3]."""
    image = look.canvas(np.random.default_rng(rng.getrandbits(32)) if look.noise else None)
    for thing in things:
        turn = rng.choice((0, 0, 0, -10, 10)) if thing.shape != "circle" else 0
        paint(image, thing.shape, shade(rng, thing.colour), thing.x, thing.y, thing.size, turn, look.smooth)
    return np.clip(image, 0, 255).astype(np.uint8)


def canvas_size(rng: random.Random) -> tuple[int, int]:
    """Height and width: mostly small squares, now and then a large one, or one a token wider than high.

    A number of tokens means one size only: the tower's positions are relative and a plain background looks the same
    everywhere, so the decoder learns where a token lies from its number in the row of tokens and how many there are."""
    roll = rng.random()
    if roll < 0.04:
        return (side := TILE * rng.randint(6, 8), side)
    side = rng.choices(SIDES, (9, 5, 5))[0]
    if roll < 0.09:
        side = min(side, 112)
        return side, side + TILE
    return side, side


def scene(
    rng: random.Random, pairs: list[tuple[str, str]], places: list[int] | None = None
) -> tuple[Look, list[Thing]]:
    """Places (colour, shape) pairs on a background on which all of them stand out; places are drawn where not given."""
    height, width = canvas_size(rng)
    look = Look.draw(rng, height, width)
    while not all(look.visible(colour) for colour, _ in pairs):
        look = Look.draw(rng, height, width)
    places = places or rng.sample(range(9), len(pairs))
    things = []
    for (colour, shape), place in zip(pairs, places):
        things.append(Thing(shape, colour, place, *spot(rng, look, place)))
    return look, sorted(things, key=lambda thing: thing.place)
