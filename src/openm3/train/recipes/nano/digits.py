"""One to three handwritten digits on a canvas: scikit-learn's 1,797 scans, 360 of them kept for the examination.

Every use of a scan is turned, sheared, stretched and inked anew, in training and in the examination alike.
"""

from __future__ import annotations

import functools
import math
import random

import numpy as np

from openm3.train.recipes.nano.case import Case, Expect, Talk, phrase
from openm3.train.recipes.nano.drawing import TILE, Look

HELD_OUT = 36  # scans of each digit kept for the examination: 360 in all
ASKS = (
    "What number is this?", "Read the digits.", "Which digits do you see?", "What is written here?", "Read the number.",
    "What number is written in the picture?", "Which number do you see?", "Type the digits.", "What does it say?",
    "Read this.", "What are the digits?", "Which number was written by hand?",
)  # fmt: skip


@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [1797, 8, 8] scaled to 0..255, labels [1797])."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the handwritten digits need scikit-learn: pip install 'openm3[train]'") from None
    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target


@functools.cache
def pool(split: str) -> tuple[tuple[int, ...], ...]:
    """For each digit, the numbers of its scans in `split`; the same 360 are held out always."""
    labels = scans()[1]
    out = []
    for digit in range(10):
        numbers = np.flatnonzero(labels == digit).tolist()
        random.Random(f"digits {digit}").shuffle(numbers)
        out.append(tuple(sorted(numbers[:HELD_OUT] if split == "test" else numbers[HELD_OUT:])))
    return tuple(out)


@functools.cache
def enlarged() -> list:
    """Every scan as a 48 x 48 picture with an empty margin, to be turned and cut to size."""
    from PIL import Image

    padded = np.pad(scans()[0], ((0, 0), (2, 2), (2, 2)))
    return [Image.fromarray(scan).resize((48, 48), Image.Resampling.BICUBIC) for scan in padded]


def ink(rng: random.Random, number: int, size: int) -> np.ndarray:
    """Alpha [size, size] float32 of one scan under a small random affine map."""
    from PIL import Image

    angle, shear = math.radians(rng.uniform(-13, 13)), rng.uniform(-0.15, 0.15)
    scale = 38 / size  # the scan fills 32 of 48 pixels: some margin is left
    sx, sy = scale * rng.uniform(0.88, 1.14), scale * rng.uniform(0.88, 1.14)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = sx * cos, sx * (shear - sin), sy * sin, sy * cos
    middle, half = 24, size / 2
    c = middle + rng.uniform(-1.2, 1.2) - a * half - b * half
    f = middle + rng.uniform(-1.2, 1.2) - d * half - e * half
    turned = enlarged()[number].transform(
        (size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )
    alpha = np.asarray(turned, np.float32) / 255
    return np.clip(alpha * rng.uniform(0.9, 1.25), 0, 1) ** rng.uniform(0.75, 1.3)


def digits_image(rng: random.Random, numbers: list[int]) -> np.ndarray:
    """The scans side by side on a canvas, uint8 [H, W, 3]."""
    n = len(numbers)
    height = rng.choice((56, 56, 84)) if n > 1 else rng.choice((56, 84))
    size = rng.randint(32, 48)
    least = math.ceil(n * (size + 1) / TILE)
    width = TILE * max(2, rng.randint(least, min(6, least + 1)))
    look = Look.draw(rng, height, width)
    dark = sum(look.background) < 384
    colour = [rng.randint(200, 255) if dark else rng.randint(0, 55) for _ in range(3)]
    image = look.canvas(np.random.default_rng(rng.getrandbits(32)) if look.noise else None)
    slack = width - n * size
    x = rng.uniform(0, slack / 2 + 1)
    gap = rng.uniform(0, max(0.0, slack - x) / n)
    base = rng.uniform(0, height - size)
    for number in numbers:
        top = round(min(max(0, base + rng.uniform(-4, 4)), height - size))
        left = min(round(x), width - size)
        spot = image[top : top + size, left : left + size]
        spot += ink(rng, number, size)[:, :, None] * (np.asarray(colour, np.float32) - spot)
        x += size + gap
    return np.clip(image, 0, 255).astype(np.uint8)


def sample(rng: random.Random, split: str, thinking: str | None = None) -> Case:
    """Two or three pictures with a question each in training, one in the examination."""
    talk = Talk(rng, "digits", thinking)
    used, texts = [], []
    for _ in range(1 if split == "test" else rng.choice((1, 2, 3))):
        values = [rng.randrange(10) for _ in range(rng.randint(1, 3))]
        numbers = [rng.choice(pool(split)[value]) for value in values]
        text = "".join(map(str, values))
        talk.ask(phrase(rng, ASKS), {"type": "image", "image": digits_image(rng, numbers)})
        talk.answer(
            f"It is {text}.", thought=f"{len(values)}: {' '.join(text)}", expect=Expect("digits", f"It is {text}.")
        )
        used += numbers
        texts.append(text)
    return talk.case(scans=used, digits=texts)
