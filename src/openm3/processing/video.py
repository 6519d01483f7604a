"""Videos to patch rows: frames sampled by time, resized as they are decoded, cut into segments for the tower.

At a constant rate, frame floor(k * total / n) is taken for k < n: the frame on screen at the instant k * duration / n.
A variable rate is sampled at these instants by its real timestamps. A frame then counts as often as its time on screen
deserves, and n is not bounded by the number of frames. Only the sampled frames are ever held, already resized.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from openm3.config import VisionConfig
from openm3.processing.containers import Reading, Timeline, readings
from openm3.processing.images import (
    DEFAULT_VISION,
    MediaError,
    MediaInput,
    grid_of,
    load_image,
    media_input,
    opened,
    require_pixel_range,
    resize,
    smart_resize,
    to_frames,
)

MAX_SAMPLED_PIXELS = 1 << 29  # of all sampled frames together, resized: 1.5 GB of uint8, 6 GB of pixel rows


@dataclass(frozen=True)
class VideoOptions:
    """Which frames are taken, and the bounds of a resized frame's area in pixels.

    `fps` frames of each second, within `min_frames` and `max_frames`. `segment_max_frames`: temporal patches that
    attend to each other; None is what the model was made with.
    """

    fps: float = 1.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 602112
    segment_max_frames: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.fps, bool) or not isinstance(self.fps, int | float) or not 0 < self.fps <= 1000:
            raise MediaError(f"fps = {self.fps!r}: must be a number over 0 and at most 1000")
        for name in ("min_frames", "max_frames", "segment_max_frames"):
            value = getattr(self, name)
            if name == "segment_max_frames" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
                raise MediaError(f"{name} = {value!r}: must be an integer from 1 to 65536")
        if self.min_frames > self.max_frames:
            raise MediaError(f"min_frames = {self.min_frames}: may not exceed max_frames = {self.max_frames}")
        require_pixel_range(self.min_pixels, self.max_pixels)


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames, uint8 [n, 3, H, W] RGB.

    indices: their numbers in the source, fps: its rate, seconds: the time of each (indices / fps if left out); all None
    for a list of frames, which has no times. source_size: (H, W) before `load_video` resized them, if it did.
    """

    frames: torch.Tensor
    indices: list[int] | None = None
    fps: float | None = None
    total_frames: int = 0
    seconds: list[float] | None = None
    source_size: tuple[int, int] | None = None


def load_video(source: Any, options: VideoOptions | None = None, vision: VisionConfig = DEFAULT_VISION) -> Video:
    """Samples a video from a path, bytes, `data:` URL or file object; GIF, WebP and PNG animations too.

    A sequence of frames (what `load_image` takes, uint8 arrays [H, W, 3], uint8 tensors [3, H, W]; or one array or
    tensor of all) is kept whole, a loaded Video returned. Frames come back upright, and resized for `video_pixels`
    under the same options.
    Raises MediaError for what is no video, is damaged or cut off, holds no frame, or is over the limits.
    """
    if isinstance(source, Video):
        return source
    options = options or VideoOptions()
    if isinstance(source, list | tuple | np.ndarray | torch.Tensor):
        return _from_frames(source, options, vision)
    with opened(source, "video") as (stream, name):
        for reading in readings(stream, name):
            video = _sampled(reading, options, vision)
            if video is not None:
                return video
    raise MediaError(f"{name}: some of its frames cannot be decoded; the file is damaged")


def video_pixels(
    video: Video, options: VideoOptions | None = None, vision: VisionConfig = DEFAULT_VISION
) -> tuple[MediaInput, list[float] | None]:
    """The tower's input, one grid row a segment, and the time in seconds of each temporal patch if there are times."""
    options = options or VideoOptions()
    if not len(video.frames):
        raise MediaError("a video without frames")
    size = video.source_size or tuple(video.frames.shape[-2:])
    frames = resize(video.frames, _target(size, len(video.frames), options, vision))
    t, h, w = grid_of(frames, vision)
    longest = options.segment_max_frames or vision.segment_max_frames
    grid = [(min(longest, t - start), h, w) for start in range(0, t, longest)]
    seconds = video.seconds
    if seconds is None and video.indices is not None and video.fps:
        seconds = [index / video.fps for index in video.indices]
    if seconds is not None:
        seconds = [seconds[patch * vision.temporal_patch_size] for patch in range(t)]
    return media_input(frames, grid, vision), seconds


def sample(timeline: Timeline, options: VideoOptions) -> tuple[list[int], list[float]]:
    """Numbers of the frames to take, and the time of each in seconds: its own, at a variable rate the instant's."""
    total, rate = len(timeline.ticks), timeline.rate
    duration = timeline.end * timeline.tick
    wanted = total / float(rate) * options.fps if rate else float(duration) * options.fps
    count = min(max(int(wanted), options.min_frames), options.max_frames)
    if rate:
        count = min(count, total)
        indices = [k * total // count for k in range(count)]
        return indices, [index / float(rate) for index in indices]
    instants = np.array([k * timeline.end // count for k in range(count)])  # rounded down: ticks are whole
    indices = (np.searchsorted(timeline.ticks, instants, side="right") - 1).tolist()
    return indices, [float(k * duration / count) for k in range(count)]


def _sampled(reading: Reading, options: VideoOptions, vision: VisionConfig) -> Video | None:
    """The sampled frames of a file; None if one of them did not come."""
    timeline = reading.timeline
    indices, seconds = sample(timeline, options)
    places: dict[int, list[int]] = {}  # frame number -> its places among the sampled ones
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    found = ((places.pop(number), frame) for number, frame in reading.frames(list(places)))
    frames, size = _stack(len(indices), found, options, vision)
    if places:
        return None
    rate = timeline.rate or len(timeline.ticks) / (timeline.end * timeline.tick)
    return Video(frames, indices, float(rate), len(timeline.ticks), seconds, size)


def _stack(
    count: int, found: Iterable[tuple[Sequence[int], torch.Tensor]], options: VideoOptions, vision: VisionConfig
) -> tuple[torch.Tensor | None, tuple[int, int] | None]:
    """Frames [1, 3, H, W], each for some places, resized into one tensor [count, 3, h, w]; and the first's (H, W)."""
    frames, size = None, None
    for places, frame in found:
        if frames is None:
            size = (frame.shape[2], frame.shape[3])
            frames = torch.empty(count, 3, *_target(size, count, options, vision), dtype=torch.uint8)
        frames[list(places)] = resize(frame, tuple(frames.shape[-2:]))
    return frames, size


def _target(size: tuple[int, int], count: int, options: VideoOptions, vision: VisionConfig) -> tuple[int, int]:
    factor = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(*size, factor, options.min_pixels, options.max_pixels)
    if count * height * width > MAX_SAMPLED_PIXELS:
        raise MediaError(f"{count} frames of {width} x {height} pixels: over the limit of {MAX_SAMPLED_PIXELS:,} pixels"
                         " in all; lower max_frames, fps or max_pixels")  # fmt: skip
    return height, width


def _from_frames(source: Sequence[Any], options: VideoOptions, vision: VisionConfig) -> Video:
    if not len(source):
        raise MediaError("a video without frames: the list is empty")
    frames, size = _stack(len(source), _given(source), options, vision)
    return Video(frames, total_frames=len(source), source_size=size)


def _given(source: Sequence[Any]) -> Iterable[tuple[list[int], torch.Tensor]]:
    first = None
    for number, item in enumerate(source):
        is_array = isinstance(item, np.ndarray | torch.Tensor)
        frame = _array_frame(item, number) if is_array else to_frames(load_image(item))
        first = frame.shape if first is None else first
        if frame.shape != first:
            raise MediaError(f"frame {number} of the video is {frame.shape[3]} x {frame.shape[2]} pixels, frame 0 "
                             f"{first[3]} x {first[2]}: all must be of one size")  # fmt: skip
        yield [number], frame


def _array_frame(item: np.ndarray | torch.Tensor, number: int) -> torch.Tensor:
    """A frame [H, W, 3] (array) or [3, H, W] (tensor) as uint8 [1, 3, H, W]."""
    is_array = isinstance(item, np.ndarray)
    if item.ndim != 3 or item.shape[2 if is_array else 0] != 3 or item.dtype not in (np.uint8, torch.uint8):
        allowed = "an array [H, W, 3]" if is_array else "a tensor [3, H, W]"
        raise MediaError(f"frame {number} of the video is {item.dtype} {tuple(item.shape)}: must be {allowed} of uint8")
    frame = torch.from_numpy(np.ascontiguousarray(item)).permute(2, 0, 1) if is_array else item.cpu()
    return frame[None]
