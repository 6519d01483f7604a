"""Video files to frames: when each frame is shown, and the wanted ones decoded.

A first pass reads packets, not pixels, and learns the times; the second decodes only the runs from a keyframe to a
wanted frame. Where packets do not tell the times, or a wanted frame does not come, everything is decoded, twice.
Libav sees an open stream, never a name, and only plain containers: no playlist or device makes it open anything else.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from openm3.processing.images import MAX_SOURCE_PIXELS, MediaError, damage_reported, decode, open_image, to_frames

if TYPE_CHECKING:
    import av
    from PIL import Image

MAX_FRAME_PIXELS = 8192 * 4352  # 8K
MAX_SECONDS = 12 * 3600
MAX_SOURCE_FRAMES = 2_000_000
EMPTY = "a video without frames, or cut off before the first"
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,m4v,mjpeg,nut,mxf,dv,rm,obu,av1"


@dataclass(frozen=True)
class Timeline:
    """When frames are shown: ticks (int64 [total], rising from 0) of `tick` seconds, the last one until `end`.

    rate: frames a second if constant, else None.
    """

    ticks: np.ndarray
    end: int
    tick: Fraction
    rate: Fraction | None


@dataclass(frozen=True)
class Reading:
    """A file's timeline, and how to get frames: `frames(numbers)` yields (number, uint8 [1, 3, H, W]) in any order."""

    timeline: Timeline
    frames: Callable[[Sequence[int]], Iterator[tuple[int, torch.Tensor]]]


def readings(stream: BinaryIO, name: str) -> Iterator[Reading]:
    """The ways to read a video, the cheap one first; the next is for when frames do not come. Raises MediaError."""
    start = stream.read(12)
    stream.seek(0)
    if start[:4] == b"GIF8" or start[:4] == b"\x89PNG" or (start[:4] == b"RIFF" and start[8:] == b"WEBP"):
        yield _read_animation(stream, name)
        return
    by_packets = _read_packets(stream, name)
    if by_packets is not None:
        yield by_packets
    yield _read_all(stream, name)


def _timeline(ticks: np.ndarray, last: int, tick: Fraction, rates: Sequence[Fraction | None], name: str) -> Timeline:
    """ticks: int64, rising; last: ticks the last frame lasts, 0 if unknown; rates: what the file states, if it does."""
    ticks = ticks - ticks[0]
    steps, span = len(ticks) - 1, int(ticks[-1])
    if span * tick > MAX_SECONDS:
        raise MediaError(f"{name}: {float(span * tick):,.0f} seconds long, over the limit of {MAX_SECONDS:,}; cut it")
    end = span + (last or max(1, span // max(steps, 1)))
    measured = Fraction(steps, span) / tick if span else None
    for rate in (*rates, measured):
        if not rate:
            continue
        step = float(1 / (rate * tick))
        if np.abs(ticks - np.arange(steps + 1) * step).max() <= min(1, step / 2):  # constant, rounded to ticks
            return Timeline(ticks, end, tick, Fraction(rate))
    return Timeline(ticks, end, tick, None)


def _check_size(width: int, height: int, frames: int, name: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(f"{name}: frames of {width:,} x {height:,} pixels, over the limit of {MAX_FRAME_PIXELS:,}; "
                         "make them smaller")  # fmt: skip
    if frames > MAX_SOURCE_FRAMES:
        raise MediaError(f"{name}: {frames:,} frames, over the limit of {MAX_SOURCE_FRAMES:,}; cut it")


# Animations, through Pillow.


def _read_animation(stream: BinaryIO, name: str) -> Reading:
    with open_image(stream, name) as image:
        _check_size(image.width, image.height, 0, name)
        with damage_reported(name):
            total = getattr(image, "n_frames", 1)
        if total < 2:
            raise MediaError(f"{name}: a still picture ({image.format}), not a video; give it as an image")
        _check_size(0, 0, total, name)
        starts = np.zeros(total + 1, dtype=np.int64)
        for number in range(total):
            _seek(image, number, name)
            starts[number + 1] = starts[number] + max(1, round(image.info.get("duration") or 100))
    timeline = _timeline(starts[:-1], int(starts[-1] - starts[-2]), Fraction(1, 1000), (), name)

    def frames(numbers: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        stream.seek(0)
        with open_image(stream, name) as image:
            for number in sorted(numbers):
                _seek(image, number, name)
                yield number, to_frames(decode(image.copy(), name, MAX_SOURCE_PIXELS))

    return Reading(timeline, frames)


def _seek(image: Image.Image, number: int, name: str) -> None:
    with damage_reported(name):
        image.seek(number)
        image.load()


# Containers, through PyAV.


class _Unnamed:
    """A stream without its `name`, by which libav would also guess the format."""

    def __init__(self, stream: BinaryIO) -> None:
        self.read, self.seek, self.tell = stream.read, stream.seek, stream.tell


@contextmanager
def _container(stream: BinaryIO, name: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream; what libav raises inside becomes a MediaError."""
    import av

    stream.seek(0)
    limit = {"max_pixels": str(MAX_FRAME_PIXELS)}
    try:
        options = {"format_whitelist": CONTAINERS} | limit
        with av.open(_Unnamed(stream), options=options, metadata_errors="replace") as container:
            covers = av.stream.Disposition.attached_pic
            pictures = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not pictures:
                found = ", ".join(stream.type for stream in container.streams)
                raise MediaError(f"{name}: no video in it, only {found}" if found else f"{name}: {EMPTY}")
            video = pictures[0]
            if video.codec_context is None:
                raise MediaError(f"{name}: its video codec is not known here")
            _check_size(video.codec_context.width, video.codec_context.height, video.frames, name)
            video.codec_context.options = limit
            video.thread_type = "SLICE"  # threads over frames make libav crash on damaged VP9
            yield container, video
    except av.error.EOFError as error:
        raise MediaError(f"{name}: {EMPTY}") from error
    except av.FFmpegError as error:
        raise MediaError(f"{name}: not a video we can read, or damaged ({error.strerror})") from error


@dataclass(frozen=True)
class _Packets:
    """What the packets say, in decoding order; `shown`: the positions of those whose frames are shown, by time."""

    pts: np.ndarray
    keyframe: np.ndarray
    shown: np.ndarray


def _read_packets(stream: BinaryIO, name: str) -> Reading | None:
    """Reads the times off the packets, decoding nothing.

    None where these do not tell: no timestamps, equal ones, or AVI's, which count packets as they are stored.
    """
    times, keyframe, hidden, length, cut, reached = array("q"), bytearray(), bytearray(), 0, False, 0.0
    with _container(stream, name) as (container, video):
        told = container.format.name != "avi"
        for packet in _packets(container):
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                reached = max(reached, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == video.index:
                told = told and packet.pts is not None
                times.append(packet.pts or 0)
                keyframe.append(packet.is_keyframe)
                hidden.append(packet.is_discard)
                length, cut = packet.duration or 0, packet.is_corrupt
                _check_size(0, 0, len(times), name)
        if all(hidden):
            raise MediaError(f"{name}: {EMPTY}")
        stated = (container.duration or 0) / 1e6
        if cut or 0 < reached < 0.9 * stated - 0.5:
            of = f" of {stated:.1f}" if stated else ""
            raise MediaError(f"{name}: cut off: its data end after {reached:.1f}{of} seconds")
        rates, tick = (video.average_rate, video.guessed_rate), Fraction(video.time_base)
    pts = np.frombuffer(times, dtype=np.int64)
    shown = np.argsort(pts, kind="stable")
    shown = shown[np.frombuffer(hidden, dtype=np.uint8)[shown] == 0]
    if not told or (np.diff(pts[shown]) <= 0).any():
        return None
    packets = _Packets(pts, np.frombuffer(keyframe, dtype=np.uint8) > 0, shown)
    timeline = _timeline(pts[shown], length, tick, rates, name)
    return Reading(timeline, lambda numbers: _frames_by_packets(stream, name, packets, numbers))


def _frames_by_packets(
    stream: BinaryIO, name: str, packets: _Packets, numbers: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Decodes the runs of packets that the wanted frames need. A frame that does not come is left out."""
    positions = [int(packets.shown[number]) for number in numbers]
    wanted = {int(packets.pts[position]): number for position, number in zip(positions, numbers)}
    runs = _runs(packets, positions)
    begin, end = runs.pop(0)
    position = -1
    with _container(stream, name) as (container, video):
        for packet in _packets(container, video):
            position += 1
            if position < begin:
                continue
            video.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"  # that nothing refers to
            frames = _decoded(video, packet)
            if position == end:
                frames += _decoded(video, None)
                video.codec_context.flush_buffers()
                begin, end = runs.pop(0) if runs else (None, None)
            for frame in frames:
                if frame.pts in wanted:
                    yield wanted.pop(frame.pts), _to_tensor(frame)
            if end is None:
                return


def _runs(packets: _Packets, positions: Sequence[int]) -> list[list[int]]:
    """Runs [begin, end] of packets to decode for the frames at `positions`.

    A run begins at the last keyframe before the frame in the file that is also shown no later: a frame that follows a
    keyframe in the file but is shown before it needs the earlier keyframe as well.
    """
    keys = np.flatnonzero(packets.keyframe)
    runs: list[list[int]] = []
    for position in sorted(positions):
        at = int(np.searchsorted(keys, position, side="right")) - 1
        while at >= 0 and packets.pts[keys[at]] > packets.pts[position]:
            at -= 1
        begin = int(keys[at]) if at >= 0 else 0
        while runs and begin <= runs[-1][1] + 1:
            begin = min(begin, runs.pop()[0])
        runs.append([begin, position])
    return runs


def _read_all(stream: BinaryIO, name: str) -> Reading:
    """Decodes everything once for the times alone, and again for the frames, which are then known by their order."""
    times: list[int | None] = []
    with _container(stream, name) as (container, video):
        for frame in _all_frames(container, video):
            times.append(frame.pts)
            _check_size(0, 0, len(times), name)
        rates, tick = (video.guessed_rate, video.average_rate), Fraction(video.time_base)
    if not times:
        raise MediaError(f"{name}: no frame can be decoded; the file is damaged")
    if None in times or any(after <= before for before, after in pairwise(times)):
        rate = Fraction(next((rate for rate in rates if rate), 25))
        timeline = _timeline(np.arange(len(times)), 1, 1 / rate, (rate,), name)
    else:
        timeline = _timeline(np.array(times, dtype=np.int64), 0, tick, rates, name)

    def frames(numbers: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        wanted, last = set(numbers), max(numbers)
        with _container(stream, name) as (container, video):
            for number, frame in enumerate(_all_frames(container, video)):
                if number in wanted:
                    yield number, _to_tensor(frame)
                if number == last:
                    return

    return Reading(timeline, frames)


def _all_frames(container: av.container.InputContainer, video: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in _packets(container, video):
        yield from _decoded(video, packet)
    yield from _decoded(video, None)


def _packets(container: av.container.InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of the streams, or of all, without the empty ones that end them."""
    try:
        yield from (packet for packet in container.demux(*streams) if packet.size)
    except IndexError:  # PyAV's, after the last packet, where a stream appeared midway
        return


def _decoded(video: av.VideoStream, packet: av.Packet | None) -> list[av.VideoFrame]:
    """What the decoder gives for a packet (None: what it still holds). A packet it refuses gives nothing."""
    import av

    try:
        return list(video.codec_context.decode(packet))
    except av.FFmpegError:
        return []


def _to_tensor(frame: av.VideoFrame) -> torch.Tensor:
    """A decoded frame as upright RGB, uint8 [1, 3, H, W]."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # [H, W, 3]
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    if turns:
        pixels = torch.rot90(pixels, turns, (0, 1))
    return pixels.permute(2, 0, 1)[None]
