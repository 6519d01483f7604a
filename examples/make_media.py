"""Draws the picture and the clip of the examples, in the style of the scenes that openm3-nano was trained on.

    python examples/make_media.py

Writes shapes.png (four coloured shapes) and star.mp4 (a star crosses the picture above a square that stays, 4 seconds).
"""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from openm3.train.recipes.nano.drawing import COLOURS, Look, Thing, paint, render

HERE = Path(__file__).parent
RATE = 12  # frames a second


def picture() -> np.ndarray:
    """uint8 [H, W, 3]: a red circle and an orange star at the top, a green square, a blue triangle below."""
    look = Look(140, 140, background=(243, 243, 238), gradient=0.0, noise=0.0, smooth=True)
    things = [
        Thing("circle", "red", 0, 27, 28, 36),
        Thing("star", "orange", 2, 112, 27, 40),
        Thing("square", "green", 4, 70, 72, 36),
        Thing("triangle", "blue", 8, 113, 114, 38),
    ]
    return render(random.Random(0), look, things)


def clip(seconds: int = 4) -> list[np.ndarray]:
    """uint8 frames [H, W, 3]: the star moves to the right."""
    look = Look(84, 84, background=(44, 50, 62), gradient=0.0, noise=0.0, smooth=True)
    frames = []
    for i in range(seconds * RATE):
        x = 16 + 52 * i / (seconds * RATE - 1)
        image = look.canvas(np.random.default_rng(0))
        paint(image, "square", COLOURS["red"], 42, 64, 26, 0, True)
        paint(image, "star", COLOURS["yellow"], x, 21, 28, 0, True)
        frames.append(np.clip(image, 0, 255).astype(np.uint8))
    return frames


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """H.264 in MP4, at a quality that keeps the edges of small shapes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "6"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, RATE)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    Image.fromarray(picture()).save(HERE / "shapes.png", optimize=True)
    write_video(HERE / "star.mp4", clip())
    print(f"{HERE / 'shapes.png'}, {HERE / 'star.mp4'}")
