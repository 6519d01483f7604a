"""Videos: the right frames at the right times from every container, and one clear line for what is no video."""

import base64
import io
import json
import struct
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from openm3.config import VisionConfig
from openm3.processing import containers
from openm3.processing.containers import Timeline
from openm3.processing.images import MediaError, image_pixels, load_image
from openm3.processing.video import Video, VideoOptions, load_video, sample, video_pixels

GOLDEN = Path(__file__).parents[1] / "golden" / "processor"
CASES = [case for case in json.loads((GOLDEN / "cases.json").read_text()) if case["kind"] == "video"]
STEP = 4  # grey levels from one frame to the next: more than any codec here loses
SIZE = (56, 84)  # height, width: kept as it is by the resize


def grey_frame(number: int) -> np.ndarray:
    """A frame that tells its number by its grey level, upright by a dark left upper quarter."""
    frame = np.full((*SIZE, 3), 20 + STEP * number, np.uint8)
    frame[: SIZE[0] // 2, : SIZE[1] // 2] = 0
    return frame


def numbers_of(frames: torch.Tensor) -> list[int]:
    """The numbers that frames [n, 3, H, W] tell."""
    quarter = frames[:, :, frames.shape[2] * 3 // 4 :, frames.shape[3] * 3 // 4 :]
    return [round((level - 20) / STEP) for level in quarter.float().mean((1, 2, 3)).tolist()]


def encoded(
    count=50, container="mp4", codec="libx264", rate=10, pts=None, time_base=None, rotation=None, **options
) -> bytes:
    """A video of grey frames; `pts` in `time_base` makes the rate variable."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=options.pop("muxer", {})) as target:
        stream = target.add_stream(codec, rate=rate, options={"crf": "10"} | options if "26" in codec else options)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 4_000_000
        if time_base:
            stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        target.start_encoding()
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(grey_frame(number), format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[number], time_base
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return out.getvalue()


def audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as target:
        stream = target.add_stream("aac", rate=16000)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return out.getvalue()


def reads_all(monkeypatch) -> list[str]:
    """Records when the slow way is taken, which decodes everything."""
    taken = []
    slow = containers._read_all
    monkeypatch.setattr(containers, "_read_all", lambda stream, name: taken.append(name) or slow(stream, name))
    return taken


# The golden cases and the rows.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
@pytest.mark.parametrize("kind", ["array", "pictures", "tensor"])
def test_rows_equal_the_reference_processors(case, kind):
    golden = load_file(GOLDEN / case["file"].replace(".npy", ".safetensors"))
    frames = np.load(GOLDEN / case["file"])
    source = {"array": frames, "pictures": [Image.fromarray(frame) for frame in frames],
              "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2)}[kind]  # fmt: skip
    media, seconds = video_pixels(load_video(source))
    assert media.grid_thw.tolist() == case["grid_thw"]
    assert seconds is None
    assert media.tokens * 4 == len(media.pixels) == case["rows"]
    assert (media.pixels[golden["rows"]] - golden["values"]).abs().max() <= 1e-6
    assert (media.pixels.mean() - golden["mean"]).abs() <= 1e-6
    assert (media.pixels.std() - golden["std"]).abs() <= 1e-6


def test_resizing_while_decoding_equals_resizing_the_decoded_frames():
    options = VideoOptions(max_pixels=28 * 28 * 4, min_pixels=28 * 28)
    path = encoded(9)
    early = load_video(path, options)
    late = load_video(path, VideoOptions(fps=1.0))
    assert early.frames.shape[-2:] != late.frames.shape[-2:]
    assert early.source_size == late.source_size == SIZE
    assert torch.equal(video_pixels(early, options)[0].pixels, video_pixels(late, options)[0].pixels)


def test_segments_follow_the_checkpoint_unless_asked():
    frames = np.zeros((21, 56, 56, 3), np.uint8)  # 11 temporal patches
    segments = {
        None: [4, 4, 3],
        3: [3, 3, 3, 2],
        11: [11],
    }
    for asked, expected in segments.items():
        options = VideoOptions(segment_max_frames=asked)
        assert video_pixels(load_video(frames, options), options)[0].grid_thw[:, 0].tolist() == expected
    vision = VisionConfig(segment_max_frames=6)
    assert video_pixels(load_video(frames, vision=vision), vision=vision)[0].grid_thw[:, 0].tolist() == [6, 5]


def test_a_video_of_one_repeated_picture_equals_the_picture():
    picture = load_image(GOLDEN / "image1.png")
    media, _ = video_pixels(load_video([picture]))
    assert torch.equal(media.pixels, image_pixels(picture).pixels)


def test_the_time_of_a_patch_is_that_of_its_first_frame():
    video = Video(torch.zeros(5, 3, 56, 56, dtype=torch.uint8), indices=[0, 7, 14, 21, 28], fps=10.0, total_frames=35)
    assert video_pixels(video)[1] == pytest.approx([0.0, 1.4, 2.8])
    assert video_pixels(load_video(encoded(50)))[1] == pytest.approx([0.0, 2.0, 4.0])


# Which frames.


@settings(deadline=None)
@given(st.integers(1, 5000), st.fractions(1, 120, max_denominator=1001), st.floats(0.01, 60))
def test_constant_rates_follow_the_formula(total, rate, fps):
    options = VideoOptions(fps=fps)
    ticks = np.array([round(i / rate * 90_000) for i in range(total)])
    timeline = containers._timeline(ticks, 0, Fraction(1, 90_000), [rate], "x")
    assert timeline.rate == rate
    indices, seconds = sample(timeline, options)
    count = min(max(int(total / float(rate) * fps), 4), 768, total)
    assert indices == [k * total // count for k in range(count)]
    assert seconds == pytest.approx([index / float(rate) for index in indices])


@settings(deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=2, max_size=200), st.floats(0.1, 30))
def test_variable_rates_show_what_is_on_screen_at_even_instants(gaps, fps):
    ends = np.cumsum(gaps)
    timeline = Timeline(ends - gaps, int(ends[-1]), Fraction(1, 1000), None)
    indices, seconds = sample(timeline, VideoOptions(fps=fps))
    assert len(indices) == min(max(int(ends[-1] / 1000 * fps), 4), 768)
    assert indices[0] == 0
    for place, (index, second) in enumerate(zip(indices, seconds, strict=True)):
        instant = Fraction(int(ends[-1]) * place, len(indices))
        assert ends[index] - gaps[index] <= instant < ends[index]
        assert second == pytest.approx(float(instant) / 1000)


def test_a_constant_rate_sampled_by_its_timestamps_gives_the_formulas_frames():
    for total, count in ((90, 7), (100, 33), (31, 31), (1000, 768)):
        ticks = np.arange(total) * 512
        by_time = Timeline(ticks, total * 512, Fraction(1, 15360), None)
        options = VideoOptions(min_frames=count, max_frames=count)
        assert sample(by_time, options)[0] == [k * total // count for k in range(count)]


CONTAINERS = [
    ("mp4", "libx264", {}),
    ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=4"}),
    ("mp4", "libx264", {"x264-params": "keyint=7"}),
    ("mp4", "libx264", {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    ("mp4", "mpeg4", {}),
    ("mp4", "libx265", {"x265-params": "log-level=none:keyint=15"}),
    ("mov", "mjpeg", {}),
    ("matroska", "libx264", {}),
    ("webm", "libvpx-vp9", {}),
    ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("avi", "mpeg4", {"bf": "2"}),
    ("avi", "libx264", {}),
    ("mpegts", "libx264", {}),
    ("flv", "libx264", {}),
    ("h264", "libx264", {}),
]


@pytest.mark.parametrize(("container", "codec", "options"), CONTAINERS)
def test_every_container_gives_the_frames_of_the_formula(container, codec, options, monkeypatch):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    data = encoded(50, container, codec, **options)
    taken = reads_all(monkeypatch)
    for fps in (0.5, 1.0, 3.7, 10):
        video = load_video(data, VideoOptions(fps=fps))
        count = max(int(50 / 10 * fps), 4)
        assert video.indices == [k * 50 // count for k in range(count)]
        assert numbers_of(video.frames) == video.indices
        assert video.total_frames == 50
        assert video.fps == pytest.approx(10)
        assert video.seconds == pytest.approx([index / 10 for index in video.indices])
        assert video.frames.dtype == torch.uint8
        assert video.frames.shape[1:] == (3, *SIZE)
    assert len(taken) == (4 if container in ("avi", "h264") else 0), "only where packets do not tell the times"


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), 25, 7])
def test_rates_that_do_not_fit_the_tick_are_constant_all_the_same(container, rate):
    video = load_video(encoded(50, container, rate=rate), VideoOptions(fps=4))
    assert video.fps == pytest.approx(float(rate), rel=1e-9)
    count = max(int(50 / float(rate) * 4), 4)
    assert video.indices == [k * 50 // count for k in range(count)]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_rate_is_sampled_by_its_timestamps(container):
    times = [*range(0, 1000, 50), 1000, 3000, 3500, 6000, 9000]  # ms: 20 frames in a second, then 5 in nine
    video = load_video(encoded(25, container, pts=times, time_base=Fraction(1, 1000)), VideoOptions(fps=2))
    assert video.seconds == pytest.approx([k * video.seconds[1] for k in range(len(video.seconds))])
    shown = [max(i for i, time in enumerate(times) if time <= second * 1000 + 1e-6) for second in video.seconds]
    assert video.indices == shown
    assert numbers_of(video.frames) == shown
    assert shown.count(20) == 4, "the frame that stays for two seconds counts four times"
    assert len(shown) >= 18, "two a second, however few frames there are"


def test_frames_that_an_edit_list_hides_do_not_count(monkeypatch):
    taken = reads_all(monkeypatch)
    times = [(number - 7) * 100 for number in range(30)]
    muxer = {"avoid_negative_ts": "disabled"}
    video = load_video(encoded(30, pts=times, time_base=Fraction(1, 1000), muxer=muxer), VideoOptions(fps=4))
    assert video.total_frames == 23
    assert numbers_of(video.frames) == [7 + index for index in video.indices] == [7, 9, 12, 14, 17, 19, 22, 24, 27]
    assert taken == []


def test_only_the_runs_to_the_wanted_frames_are_decoded(monkeypatch):
    taken = reads_all(monkeypatch)
    fed = []
    decoded = containers._decoded
    monkeypatch.setattr(containers, "_decoded", lambda video, packet: fed.append(packet) or decoded(video, packet))
    data = encoded(50, **{"x264-params": "keyint=5:min-keyint=5:scenecut=0"})
    assert numbers_of(load_video(data).frames) == [0, 10, 20, 30, 40]
    assert len([packet for packet in fed if packet is not None]) == 5
    assert taken == []


def test_frames_that_do_not_come_by_packets_are_found_by_decoding_all(monkeypatch):
    taken = reads_all(monkeypatch)
    monkeypatch.setattr(containers, "_frames_by_packets", lambda *_: iter(()))
    video = load_video(encoded(50))
    assert len(taken) == 1
    assert numbers_of(video.frames) == video.indices == [0, 10, 20, 30, 40]


def test_short_videos_give_all_their_frames_and_long_ones_no_more_than_the_bound():
    assert load_video(encoded(1)).indices == [0]
    assert load_video(encoded(3)).indices == [0, 1, 2]
    assert load_video(encoded(50), VideoOptions(fps=100)).indices == list(range(50))
    assert load_video(encoded(50), VideoOptions(fps=100, max_frames=5)).indices == [0, 10, 20, 30, 40]
    assert load_video(encoded(50), VideoOptions(fps=0.01, min_frames=2)).indices == [0, 25]


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write a rotation")
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_metadata_is_applied(rotation):
    plain = torch.from_numpy(grey_frame(0))
    video = load_video(encoded(4, rotation=rotation))
    expected = torch.rot90(plain, rotation // 90, (0, 1)).permute(2, 0, 1)
    assert video.source_size == tuple(expected.shape[1:])
    assert (video.frames[0].int() - expected.int()).abs().float().mean() < 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_videos(format):
    frames = [Image.fromarray(grey_frame(number)) for number in range(8)]
    options = {"lossless": True} if format == "WEBP" else {}
    out = io.BytesIO()
    frames[0].save(out, format, save_all=True, append_images=frames[1:], duration=250, **options)
    video = load_video(out.getvalue(), VideoOptions(fps=2))
    assert video.fps == pytest.approx(4)
    assert numbers_of(video.frames) == video.indices == [0, 2, 4, 6]
    assert video.seconds == pytest.approx([0, 0.5, 1, 1.5])
    out = io.BytesIO()
    frames[0].save(out, format, save_all=True, append_images=frames[1:3], duration=[100, 1700, 200], **options)
    assert numbers_of(load_video(out.getvalue()).frames) == [0, 1, 1, 1]


# Sources.


def test_all_kinds_of_sources_give_the_same_frames(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encoded(20))
    data = path.read_bytes()
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    expected = load_video(data).frames
    with path.open("rb") as stream:
        for source in (path, str(path), io.BytesIO(data), stream, url):
            assert torch.equal(load_video(source).frames, expected)
        assert not stream.closed


def test_the_streams_name_does_not_decide_its_format(tmp_path):
    path = tmp_path / "clip.txt"
    path.write_bytes(encoded(20))
    assert numbers_of(load_video(path).frames) == [0, 5, 10, 15]


def test_lists_take_whatever_an_image_may_be(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(grey_frame(3)).save(path)
    video = load_video([path, grey_frame(1), torch.from_numpy(grey_frame(2)).permute(2, 0, 1), path.read_bytes()])
    assert numbers_of(video.frames) == [3, 1, 2, 3]
    assert (video.indices, video.fps, video.seconds, video.total_frames) == (None, None, None, 4)


def test_a_loaded_video_is_not_loaded_again():
    video = load_video(encoded(20))
    assert load_video(video) is video


# What must be refused.


def playlist(tmp_path: Path) -> bytes:
    (tmp_path / "secret.ts").write_bytes(encoded(20, "mpegts"))
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n".encode()


def test_what_is_no_video_is_one_line_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    still = io.BytesIO()
    Image.fromarray(grey_frame(0)).save(still, "PNG")
    for data, reason in [
        (b"This is a text file.\n" * 50, "not a video we can read"),
        (b"", "not a video we can read"),
        (audio_only(), "no video in it, only audio"),
        (encoded(0, "matroska", "mpeg4"), "without frames"),
        (encoded(0, "mp4", "mpeg4"), "without frames"),
        (still.getvalue(), r"a still picture \(PNG\)"),
        (playlist(tmp_path), "not a video we can read"),
        (b"ffconcat version 1.0\nfile secret.ts\n", "not a video we can read"),
    ]:
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        with pytest.raises(MediaError, match=reason) as caught:
            load_video(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("container", ["mp4", "faststart", "matroska", "avi", "flv"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_truncated_video_is_refused(container, share):
    muxer = {"movflags": "faststart"} if container == "faststart" else {}
    codec = "mpeg4" if container == "avi" else "libx264"
    if muxer:
        data = faststart(encoded(50))
    else:
        data = encoded(50, container, codec)
    with pytest.raises(MediaError, match=r"cut off|damaged") as caught:
        load_video(data[: int(len(data) * share)])
    assert "\n" not in str(caught.value)


def faststart(data: bytes) -> bytes:
    """The MP4 with its index moved before its data, as servers deliver it."""
    boxes, at = [], 0
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        boxes.append(data[at : at + size])
        at += size
    (index,) = (box for box in boxes if box[4:8] == b"moov")
    start = bytearray(index)
    at = start.index(b"stco") + 8
    for entry in range(struct.unpack(">I", start[at : at + 4])[0]):
        place = slice(at + 4 + 4 * entry, at + 8 + 4 * entry)
        start[place] = struct.pack(">I", struct.unpack(">I", start[place])[0] + len(index))
    return boxes[0] + bytes(start) + b"".join(box for box in boxes[1:] if box is not index)


def test_an_index_before_the_data_reads_the_same():
    assert torch.equal(load_video(faststart(encoded(50))).frames, load_video(encoded(50)).frames)


def test_limits_name_the_size_and_the_limit(monkeypatch):
    data = encoded(50)
    monkeypatch.setattr(containers, "MAX_FRAME_PIXELS", 56 * 84 - 1)
    with pytest.raises(MediaError, match="84 x 56 pixels, over the limit of 4,703"):
        load_video(data)
    monkeypatch.undo()
    monkeypatch.setattr(containers, "MAX_SOURCE_FRAMES", 49)
    with pytest.raises(MediaError, match="50 frames, over the limit of 49"):
        load_video(data)
    monkeypatch.undo()
    monkeypatch.setattr(containers, "MAX_SECONDS", 4)
    with pytest.raises(MediaError, match="5 seconds long, over the limit of 4"):
        load_video(data)
    monkeypatch.undo()
    monkeypatch.setattr("openm3.processing.video.MAX_SAMPLED_PIXELS", 5 * 56 * 84 - 1)
    with pytest.raises(MediaError, match="5 frames of 84 x 56 pixels: over the limit of 23,519"):
        load_video(data)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "the list is empty"),
        (np.zeros((0, 56, 56, 3), np.uint8), "the list is empty"),
        ([grey_frame(0), grey_frame(1)[:50]], "frame 1 of the video is 84 x 50 pixels, frame 0 84 x 56"),
        ([np.zeros((56, 56, 3))], "float64"),
        ([np.zeros((3, 56, 56), np.uint8)], r"\(3, 56, 56\): must be an array \[H, W, 3\]"),
        ([torch.zeros(56, 56, 3, dtype=torch.uint8)], r"must be a tensor \[3, H, W\]"),
        ([b"nothing"], "not a picture"),
    ],
)
def test_bad_lists_of_frames_are_refused(frames, reason):
    with pytest.raises(MediaError, match=reason):
        load_video(frames)


@pytest.mark.parametrize(
    "options",
    [{"fps": 0}, {"fps": float("nan")}, {"fps": "fast"}, {"min_frames": 0}, {"max_frames": 10**9}, {"min_frames": 800},
     {"segment_max_frames": 0}, {"max_pixels": 0}, {"min_pixels": 10**6}],
)  # fmt: skip
def test_options_out_of_range_name_the_field_and_value(options):
    (name, value), *_ = options.items()
    with pytest.raises(MediaError, match=f"{name} = {value!r}"):
        VideoOptions(**options)


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi", "webm"])
def test_damaged_files_give_a_video_or_a_media_error(container, data):
    original = bytearray(encoded_once(container))
    for _ in range(data.draw(st.integers(1, 6))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(original[: data.draw(st.integers(1, len(original)))])
    with suppress(MediaError):
        assert len(load_video(damaged).frames)


_MADE: dict[str, bytes] = {}


def encoded_once(container: str) -> bytes:
    if container not in _MADE:
        _MADE[container] = encoded(12, container, "libvpx-vp9" if container == "webm" else "mpeg4")
    return _MADE[container]


def test_nothing_is_left_behind(tmp_path, capfd):
    good, bad = tmp_path / "good.mp4", tmp_path / "bad.mp4"
    good.write_bytes(encoded(20))
    bad.write_bytes(good.read_bytes()[:900])
    capfd.readouterr()
    threads = psutil.Process().num_threads()
    for _ in range(5):
        load_video(good)
        with pytest.raises(MediaError):
            load_video(bad)
    assert not [entry for entry in psutil.Process().open_files() if str(tmp_path) in entry.path]
    assert psutil.Process().num_threads() <= threads + 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.mp4", "good.mp4"]
    assert capfd.readouterr() == ("", "")
