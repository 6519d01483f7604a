"""Pictures to patch rows: any source Pillow can read becomes upright RGB, is resized in uint8, and cut for the tower.

Resizing is torch's antialiased bicubic on uint8, the reference's own; float32 or Pillow's would differ by several grey
levels. Nothing is fetched here: a source is a path, bytes, a `data:` URL, a file object or a Pillow image. What is too
large is refused from its header, before a pixel is decoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes

import torch
import torch.nn.functional as F

from openm3.config import VisionConfig

if TYPE_CHECKING:
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")  # the first five load at once
MAX_SOURCE_PIXELS = 150_000_000  # a picture as it comes in: 450 MB of RGB
MAX_RESIZED_PIXELS = 16384 * 28 * 28  # a picture as the tower sees it: 16,384 tokens
MAX_ASPECT_RATIO = 200
DEFAULT_VISION = VisionConfig()
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|file:", re.IGNORECASE)


class MediaError(ValueError):
    """A picture or video that cannot be used, or a setting out of range; one line with the value and what to do."""


def require_pixel_range(min_pixels: Any, max_pixels: Any) -> None:
    """Raises MediaError unless 1 <= min_pixels <= max_pixels <= MAX_RESIZED_PIXELS, all integers."""
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RESIZED_PIXELS:
            raise MediaError(f"{name} = {value!r}: must be an integer from 1 to {MAX_RESIZED_PIXELS}")
    if min_pixels > max_pixels:
        raise MediaError(f"min_pixels = {min_pixels}: may not exceed max_pixels = {max_pixels}")


@dataclass(frozen=True)
class ImageOptions:
    """Bounds of a resized picture's area, in pixels; 28 x 28 pixels are one token of the released model."""

    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 451584

    def __post_init__(self) -> None:
        require_pixel_range(self.min_pixels, self.max_pixels)


@dataclass(frozen=True, eq=False)
class MediaInput:
    """One picture or video, ready for the tower.

    pixels: float32 [rows, channels * temporal * patch * patch], normalized; grid_thw: int64 [n, 3], each entry's
    patches; tokens: placeholders it takes in the prompt; digest: names the content, equal for equal pixels and grid.
    """

    pixels: torch.Tensor
    grid_thw: torch.Tensor
    tokens: int
    digest: str


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (H, W) a picture is resized to: multiples of `factor`, area within the bounds where that is possible.

    Source: smart_resize of transformers' minimax_m3_vl, a side that rounds to 0 included (the area then counts as too
    small). Raises MediaError for an empty picture and for sides further apart than 200 to 1.
    """
    if min(height, width) < 1:
        raise MediaError(f"a picture of {width} x {height} pixels: it is empty")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(f"a picture of {width} x {height} pixels: one side may be at most {MAX_ASPECT_RATIO} times "
                         "the other; crop it")  # fmt: skip
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Antialiased bicubic on uint8 frames [F, 3, H, W], to `size` (H, W)."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True)


def grid_of(frames: torch.Tensor, vision: VisionConfig = DEFAULT_VISION) -> tuple[int, int, int]:
    """Patches (t, h, w) of frames [F, C, H, W]; F counts as filled up to whole temporal patches."""
    count, _, height, width = frames.shape
    factor = vision.patch_size * vision.spatial_merge_size
    if count < 1 or height < factor or width < factor or height % factor or width % factor:
        raise MediaError(f"frames of shape {tuple(frames.shape)}: must be [F, C, H, W], F at least 1, "
                         f"H and W multiples of {factor}")  # fmt: skip
    return -(-count // vision.temporal_patch_size), height // vision.patch_size, width // vision.patch_size


def patch_rows(frames: torch.Tensor, vision: VisionConfig = DEFAULT_VISION) -> torch.Tensor:
    """Cuts frames [F, C, H, W] into rows [t*h*w, C * temporal * patch * patch] of the same dtype.

    Rows run over (t, h/merge, w/merge, merge, merge), so that a merged token's patches are neighbours; the values of a
    row over (channel, temporal, y, x). The last frame is repeated to fill the last temporal patch.
    """
    t, h, w = grid_of(frames, vision)
    temporal, merge, patch = vision.temporal_patch_size, vision.spatial_merge_size, vision.patch_size
    missing = t * temporal - len(frames)
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    blocks = frames.reshape(t, temporal, frames.shape[1], h // merge, merge, patch, w // merge, merge, patch)
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # [t, h/m, w/m, m, m, C, temporal, patch, patch]
    return rows.reshape(t * h * w, -1)


def normalize_rows(rows: torch.Tensor) -> torch.Tensor:
    """uint8 rows [R, 3 * n] -> float32 rows: scaled to 0..1, then CLIP's mean and deviation, channel by channel."""
    values = rows.to(torch.float32, copy=True).unflatten(1, (3, -1))  # [R, 3, n]
    for channel, (mean, std) in enumerate(zip(CLIP_MEAN, CLIP_STD)):  # as numbers: nothing to wait for on a device
        values[:, channel].sub_(255 * mean).div_(255 * std)
    return values.flatten(1)


def media_input(frames: torch.Tensor, grid: list[tuple[int, int, int]], vision: VisionConfig) -> MediaInput:
    """Resized uint8 frames [F, 3, H, W], cut along `grid`, as the tower's input."""
    rows = patch_rows(frames, vision)
    digest = hashlib.blake2b(repr(grid).encode(), digest_size=16)
    digest.update(rows.numpy())
    return MediaInput(
        pixels=normalize_rows(rows),
        grid_thw=torch.tensor(grid, dtype=torch.int64),
        tokens=len(rows) // vision.spatial_merge_size**2,
        digest=digest.hexdigest(),
    )


def image_pixels(image: Image.Image, options: ImageOptions | None = None,
                 vision: VisionConfig = DEFAULT_VISION) -> MediaInput:  # fmt: skip
    """An RGB picture (of `load_image`) as the tower's input. Raises MediaError for sides over 200 to 1."""
    options = options or ImageOptions()
    frames = to_frames(image)
    factor = vision.patch_size * vision.spatial_merge_size
    frames = resize(frames, smart_resize(*frames.shape[-2:], factor, options.min_pixels, options.max_pixels))
    return media_input(frames, [grid_of(frames, vision)], vision)


def to_frames(image: Image.Image) -> torch.Tensor:
    """An RGB Pillow image as uint8 [1, 3, H, W], channels last in memory (torch resizes that five times faster)."""
    if image.mode != "RGB":
        raise MediaError(f"a picture of mode {image.mode!r}: must be RGB; pass it through load_image")
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)


def load_image(source: Any, *, max_pixels: int = MAX_SOURCE_PIXELS) -> Image.Image:
    """A picture from a path, bytes, `data:` URL, binary file object or Pillow image, as upright RGB.

    EXIF orientation is applied, transparency composited over white, 16-bit grey scaled; of an animation the first frame
    is taken. Raises MediaError for what is no picture, is damaged, or has more than `max_pixels` pixels.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return decode(source, "the picture", max_pixels)
    with opened(source, "picture") as (stream, name), open_image(stream, name) as image:
        return decode(image, name, max_pixels)


@contextmanager
def opened(source: Any, kind: str) -> Iterator[tuple[BinaryIO, str]]:
    """A seekable stream over `source`, and its name for messages. A file object of the caller's stays open.

    `kind` ("picture", "video") words the messages. Raises MediaError for a URL that is not `data:`, a path that is no
    readable file, base64 that is none.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        source = _data_url(source, kind)
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise MediaError(f"the {kind}: 0 bytes")
        yield io.BytesIO(source), f"the {kind}"
    elif isinstance(source, str | os.PathLike):
        path = _local_path(source, kind)
        try:
            stream = path.open("rb")
        except OSError as error:
            raise MediaError(f"{str(path)!r}: cannot be read ({error.strerror})") from error
        with stream:
            yield stream, repr(str(path))
    elif hasattr(source, "read"):
        seekable = hasattr(source, "seek") and getattr(source, "seekable", lambda: True)()
        stream = source if seekable else io.BytesIO(source.read())
        stream.seek(0)
        yield stream, f"the {kind}"
    else:
        found = type(source).__name__
        raise MediaError(f"a {kind} of type {found}: must be a path, bytes, a data: URL or a file object")


def _data_url(url: str, kind: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(f"{_short(url)}: a data: URL needs a comma before its data")
    data = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{_short(url)}: the {kind}'s base64 is damaged ({error})") from error


def _local_path(source: str | os.PathLike, kind: str) -> Path:
    if isinstance(source, str) and _URL.match(source):
        raise MediaError(f"{_short(source)}: a {kind} is given as a path, bytes or a data: URL; no other URL is opened")
    path = Path(source)
    try:
        found = path.exists()
        if found and path.is_file():
            return path
    except OSError as error:  # too long, or in a folder that may not be read
        raise MediaError(f"{_short(str(source))}: cannot be read ({error.strerror})") from error
    raise MediaError(f"{_short(str(source))}: {'not a file' if found else 'no such file'}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:60] + "...")


@contextmanager
def damage_reported(name: str) -> Iterator[None]:
    """Around calls into Pillow, which raises anything over a damaged file, from SyntaxError to IndexError."""
    try:
        yield
    except Exception as error:
        raise MediaError(f"{name}: damaged or cut off ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """An error's message cut to its first line, or its type's name."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def open_image(stream: BinaryIO, name: str) -> Image.Image:
    """Reads the header only. Not Image.open: that also runs formats we do not want (EPS starts an interpreter), and
    reports a bomb without its size."""
    from PIL import Image

    Image.preinit()
    prefix = stream.read(16)
    damage = ""
    for kind in FORMATS:
        if kind not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[kind]
        if accept(prefix) is not True:  # a string says why this build of Pillow cannot
            continue
        stream.seek(0)
        try:
            return factory(stream, "")
        except Image.DecompressionBombError as error:  # of formats that allocate at once
            raise MediaError(f"{name}: {first_line(error)}") from error
        except Exception as error:
            damage = f"a damaged {kind} file ({first_line(error)})"
    raise MediaError(f"{name}: {damage or 'not a picture in a format we read (' + ', '.join(FORMATS) + ')'}")


def decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The current frame of an opened picture as upright RGB."""
    from PIL import ImageOps

    width, height = image.size
    if width * height > max_pixels:
        raise MediaError(f"{name}: {width:,} x {height:,} pixels, over the limit of {max_pixels:,} pixels; "
                         "make it smaller")  # fmt: skip
    with damage_reported(name):
        image.load()
    with suppress(Exception):  # broken EXIF data says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    try:
        return _to_rgb(image)
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: mode {image.mode!r} cannot be turned into RGB ({first_line(error)})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey8(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _grey8(image: Image.Image) -> Image.Image:
    """Wide grey (I;16*, I, F) scaled to 8 bits; Pillow's own convert would clip at 255.

    I;16 is full range. I and F do not state theirs: the smallest of the usual ones that holds the values (F: 0..1,
    both: 0..255, 0..65535), else from the lowest value to the highest.
    """
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=0.0, neginf=0.0).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        usual = (65535,)
    else:
        usual = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    span = next((top for top in usual if low >= 0 and high <= top), None)
    if span is not None:
        low, high = 0, span
    grey = np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
