"""Pictures: equal to the reference's rows, every odd format upright and right, everything else one clear line."""

import ast
import base64
import functools
import importlib.util
import io
import json
import math
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file

from openm3.config import VisionConfig
from openm3.processing.images import (
    FORMATS,
    ImageOptions,
    MediaError,
    grid_of,
    image_pixels,
    load_image,
    normalize_rows,
    patch_rows,
    smart_resize,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "processor"
CASES = [case for case in json.loads((GOLDEN / "cases.json").read_text()) if case["kind"] == "image"]


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """A picture without any symmetry: red grows rightwards, green downwards, blue marks one corner."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.where((x < 9) & (y < 5), 255, 0)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png_header(width: int, height: int) -> bytes:
    """A valid PNG of this declared size whose data are a few bytes."""
    out = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


# The golden cases and the rows.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_rows_equal_the_reference_processors(case):
    golden = load_file(GOLDEN / case["file"].replace(".png", ".safetensors"))
    media = image_pixels(load_image(GOLDEN / case["file"]))
    assert media.grid_thw.tolist() == case["grid_thw"]
    assert media.grid_thw.dtype == torch.int64
    assert media.tokens == case["tokens"]
    assert media.pixels.shape == (case["rows"], 1176)
    assert media.pixels.dtype == torch.float32
    assert (media.pixels[golden["rows"]] - golden["values"]).abs().max() <= 1e-6
    assert (media.pixels.mean() - golden["mean"]).abs() <= 1e-6
    assert (media.pixels.std() - golden["std"]).abs() <= 1e-6


@functools.cache
def reference_smart_resize():
    """The reference's function alone: its module needs torchvision."""
    package = importlib.util.find_spec("transformers.models.minimax_m3_vl")
    source = (Path(package.origin).parent / "image_processing_minimax_m3_vl.py").read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "smart_resize"]
    scope = {"math": math}
    exec(compile(tree, "reference", "exec"), scope)
    return scope["smart_resize"]


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([(3136, 451584), (3136, 602112), (99_999, 99_999)]))
def test_smart_resize_equals_the_reference(height, width, bounds):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(MediaError, match="at most 200 times"):
            smart_resize(height, width, 28, *bounds)
        return
    size = smart_resize(height, width, 28, *bounds)
    assert size == reference_smart_resize()(height, width, 28, *bounds)
    assert min(size) >= 28
    assert size[0] % 28 == size[1] % 28 == 0


def test_smart_resize_rounds_half_to_even():
    assert smart_resize(28 * 2 + 14, 28 * 3 + 14, 28, 3136, 451584) == (56, 112)


@pytest.mark.parametrize("sizes", [(1, 14, 2, 2), (5, 4, 2, 2), (3, 2, 3, 1), (4, 3, 1, 3)])
def test_patch_rows_are_in_merge_order_with_channel_time_y_x_values(sizes):
    frames, patch, merge, temporal = sizes
    vision = VisionConfig(patch_size=patch, spatial_merge_size=merge, temporal_patch_size=temporal)
    height, width = patch * merge * 2, patch * merge * 3
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (frames, 3, height, width), dtype=np.uint8))
    t, h, w = grid_of(data, vision)
    assert (t, h, w) == (-(-frames // temporal), 2 * merge, 3 * merge)
    expected = []
    for ti in range(t):
        for block_y in range(h // merge):
            for block_x in range(w // merge):
                for dy in range(merge):
                    for dx in range(merge):
                        y, x = (block_y * merge + dy) * patch, (block_x * merge + dx) * patch
                        times = [min(ti * temporal + k, frames - 1) for k in range(temporal)]
                        expected.append(data[times, :, y : y + patch, x : x + patch].transpose(0, 1).flatten())
    assert torch.equal(patch_rows(data, vision), torch.stack(expected))


def test_patch_rows_refuse_sides_that_are_no_multiple():
    with pytest.raises(MediaError, match="multiples of 28"):
        patch_rows(torch.zeros(1, 3, 28, 30, dtype=torch.uint8))


def test_normalize_uses_clips_mean_and_deviation_per_channel():
    rows = torch.tensor([[0] * 392 + [255] * 392 + [128] * 392], dtype=torch.uint8)
    values = normalize_rows(rows)[0].view(3, 392)
    expected = [-0.48145466 / 0.26862954, (1 - 0.4578275) / 0.26130258, (128 / 255 - 0.40821073) / 0.27577711]
    assert torch.allclose(values, torch.tensor(expected)[:, None].expand(3, 392), atol=1e-6)
    assert rows[0, 400] == 255


def test_options_bound_the_area_of_the_resized_picture():
    small = image_pixels(gradient(400, 300), ImageOptions(min_pixels=784, max_pixels=20_000))
    large = image_pixels(gradient(400, 300), ImageOptions(min_pixels=200_000))
    assert small.grid_thw.prod() * 196 <= 20_000 < 120_000 < 200_000 <= large.grid_thw.prod() * 196
    assert small.tokens * 4 == len(small.pixels)


@pytest.mark.parametrize(
    "options",
    [{"min_pixels": 0}, {"max_pixels": -5}, {"max_pixels": 10**12}, {"min_pixels": 3.5}, {"min_pixels": True},
     {"min_pixels": 9000, "max_pixels": 5000}],
)  # fmt: skip
def test_options_out_of_range_name_the_field_and_value(options):
    with pytest.raises(MediaError, match=f"{next(iter(options))} = {next(iter(options.values()))}"):
        ImageOptions(**options)


def test_the_digest_names_the_content():
    media, again, other = (image_pixels(image) for image in (gradient(), gradient(), gradient().rotate(180)))
    assert media.digest == again.digest != other.digest


# Sources.


def test_all_kinds_of_sources_give_the_same_picture(tmp_path):
    data = saved(gradient(), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    wrapped = "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76))
    percent = "".join(f"%{byte:02x}" for byte in data)
    with path.open("rb") as stream:
        stream.read(5)
        given = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), stream, gradient()]
        urls = [f"data:image/png;base64,{encoded}", f"DATA:image/png;base64,{wrapped}", f"data:,{percent}"]
        for source in given + urls:
            assert np.array_equal(array(load_image(source)), array(gradient())), type(source)
        assert not stream.closed


def test_a_stream_that_cannot_seek_is_read():
    class Pipe(io.RawIOBase):
        def __init__(self, data):
            self.data = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.data.readinto(buffer)

    assert np.array_equal(array(load_image(Pipe(saved(gradient(), "PNG")))), array(gradient()))


@pytest.mark.parametrize(
    "url",
    ["http://example.com/a.png", "https://example.com/a.png", "file:///etc/hostname", "FILE:/etc/hostname", "s3://a/b"],
)
def test_no_url_but_data_is_opened(url):
    with pytest.raises(MediaError, match=r"path, bytes or a data: URL"):
        load_image(url)


def test_a_file_url_is_refused_even_if_a_file_of_that_name_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file:a.png").write_bytes(saved(gradient(), "PNG"))
    with pytest.raises(MediaError, match="no other URL is opened"):
        load_image("file:a.png")


def test_bad_sources_are_one_line_each(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture\n")
    (tmp_path / "empty.png").write_bytes(b"")
    for source, reason in [
        (tmp_path / "nowhere.png", "no such file"),
        (tmp_path, "not a file"),
        ("/dev/zero", "not a file"),
        (tmp_path / "notes.png", "not a picture in a format we read"),
        (tmp_path / "empty.png", "not a picture"),
        (b"", "0 bytes"),
        (42, "type int"),
        (None, "type NoneType"),
        ("a\0b", "no such file|null"),
        ("x" * 10_000, "too long|no such file"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@@", "base64 is damaged"),
        ("data:image/png;base64,iVBORw0KGgo", "base64 is damaged"),
    ]:
        with pytest.raises(MediaError, match=reason) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


# Modes and formats.


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000"])
def test_every_format_is_read(format):
    assert format in FORMATS
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100}}
    got = array(load_image(saved(gradient(), format, **lossless.get(format, {}))))
    assert np.abs(got - array(gradient())).mean() < (8 if format == "GIF" else 3)  # GIF has 256 colours


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICO"])
def test_formats_nobody_sends_are_not_run(kind):
    with pytest.raises(MediaError, match="format we read"):
        load_image(saved(gradient(), kind))


def test_modes_without_alpha_become_the_colours_they_show():
    source = gradient()
    for mode in ("1", "L", "P"):
        expected = array(source.convert(mode).convert("RGB"))
        assert np.array_equal(array(load_image(saved(source.convert(mode), "PNG"))), expected), mode
    for mode, format in (("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "TIFF")):
        assert np.abs(array(load_image(saved(source.convert(mode), format))) - array(source)).mean() < 4, (mode, format)
    for mode in ("HSV", "YCbCr", "CMYK", "RGBX"):
        assert np.abs(array(load_image(source.convert(mode))) - array(source)).mean() < 4, mode


WITH_ALPHA = [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("RGBa", None)]


@pytest.mark.parametrize(("mode", "format"), WITH_ALPHA)
def test_alpha_is_composited_over_white(mode, format):
    color = gradient().convert("L").convert("RGB") if mode == "LA" else gradient()
    alpha = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    layer = color.convert("RGBA")
    layer.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = array(color) * share + 255 * (1 - share)
    source = layer.convert(mode)
    options = {"lossless": True} if format == "WEBP" else {}
    got = array(load_image(saved(source, format, **options) if format else source))
    assert np.abs(got - expected).max() <= (3 if mode == "RGBa" else 1)


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    image.putdata([0, 1, 2, 1])
    for format in ("PNG", "GIF"):
        got = array(load_image(saved(image, format, transparency=1)))
        assert got[0].tolist() == [[10, 20, 30], [255] * 3, [0, 200, 0], [255] * 3], format
    got = array(load_image(saved(image, "PNG", transparency=bytes([255, 0, 128]))))
    assert np.abs(got[0] - [[10, 20, 30], [255] * 3, [127, 227, 127], [255] * 3]).max() <= 1


def test_a_transparent_colour_without_alpha_channel_is_white():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert array(load_image(saved(rgb, "PNG", transparency=(1, 2, 3)))).tolist() == [[[255] * 3, [9] * 3]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert array(load_image(saved(grey, "PNG", transparency=7))).tolist() == [[[255] * 3, [8] * 3]]
    bits = Image.new("1", (2, 1))
    bits.putdata([0, 255])
    assert array(load_image(saved(bits, "PNG", transparency=0))).tolist() == [[[255] * 3, [255] * 3]]


def test_wide_grey_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 256).reshape(16, 16)
    expected = np.rint(values / 257)
    wide = Image.fromarray(values.round().astype(np.uint16))
    assert wide.mode == "I;16"
    maxval = b"P5 16 16 65535\n" + values.round().astype(">u2").tobytes()
    for source in (saved(wide, "PNG"), saved(wide, "TIFF"), wide, maxval):
        assert np.abs(array(load_image(source))[..., 0] - expected).max() <= 1
    dark = Image.fromarray(np.full((4, 4), 300, np.uint16))
    assert array(load_image(saved(dark, "PNG"))).max() == 1


def test_int_and_float_grey_take_the_smallest_usual_range():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.rint(ramp * 255)
    for scale in (1, 255, 65535):
        assert np.abs(array(load_image(Image.fromarray(ramp * scale)))[..., 0] - expected).max() <= 1, scale
    for scale in (255, 65535, 2**31 - 1):
        ints = (ramp.astype(np.float64) * scale).astype(np.int32)
        assert np.abs(array(load_image(Image.fromarray(ints)))[..., 0] - expected).max() <= 1, scale
    signed = Image.fromarray(ramp * 20 - 10)
    assert np.abs(array(load_image(saved(signed, "TIFF")))[..., 0] - expected).max() <= 1
    broken = ramp.copy()
    broken[0, :3] = np.nan, np.inf, -np.inf
    assert array(load_image(Image.fromarray(broken)))[0, :3].tolist() == [[0] * 3] * 3


def test_sixteen_bit_grey_marks_its_transparent_value():
    wide = Image.fromarray(np.array([[1000, 40000]], np.uint16))
    data = saved(wide, "PNG")
    chunk = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = data[:33] + chunk + data[33:]
    assert array(load_image(data))[0, :, 0].tolist() == [255, round(40000 / 257)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = saved(gradient(), format, exif=exif, **options)
    plain = array(gradient())
    turned = {1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1], 5: plain.transpose(1, 0, 2),
              6: np.rot90(plain, -1), 7: np.rot90(plain[:, ::-1], -1), 8: np.rot90(plain)}[orientation]  # fmt: skip
    got = load_image(data)
    assert np.abs(array(got) - turned).max() <= 6
    assert np.array_equal(array(got), array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    assert np.array_equal(array(load_image(got)), array(got)), "a second pass must not turn it again"
    assert np.array_equal(array(load_image(Image.open(io.BytesIO(data)))), array(got))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger than file")
def test_broken_exif_leaves_the_picture_as_it_is():
    data = saved(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12" + bytes(range(60)))
    assert np.abs(array(load_image(data)) - array(gradient())).mean() < 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert array(load_image(data))[5, 5].tolist() == [255, 0, 0]


def test_the_callers_image_is_left_as_it_was():
    image = gradient().convert("RGBA")
    before = image.tobytes()
    load_image(image)
    assert image.mode == "RGBA"
    assert image.tobytes() == before


# What must be refused.


def test_a_bomb_is_refused_from_its_header():
    with pytest.raises(MediaError, match=r"60,000 x 60,000 pixels, over the limit of 150,000,000 pixels") as caught:
        load_image(png_header(60_000, 60_000))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_the_limit_can_be_lowered_and_warns_nowhere():
    with pytest.raises(MediaError, match=r"14,000 x 14,000"):
        load_image(png_header(14_000, 14_000))
    with pytest.raises(MediaError, match=r"40 x 30 pixels, over the limit of 1,199"):
        load_image(saved(gradient(), "PNG"), max_pixels=1199)
    assert load_image(saved(gradient(), "PNG"), max_pixels=1200).size == (40, 30)
    with pytest.raises(MediaError, match="over the limit"):
        load_image(gradient(), max_pixels=1199)


def test_a_webp_bomb_costs_no_memory():
    canvas = struct.pack("<I", 10) + bytes([0x12, 0, 0, 0]) + (16382).to_bytes(3, "little") * 2
    frame = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    anim = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    anmf = bytes(6) + (7).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + frame
    body = b"WEBPVP8X" + canvas + anim + b"ANMF" + struct.pack("<I", len(anmf)) + anmf
    before = psutil.Process().memory_info().rss
    with pytest.raises(MediaError, match=r"268402689 pixels\) exceeds limit of 178956970"):
        load_image(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert psutil.Process().memory_info().rss - before < 100e6


@pytest.mark.parametrize("format", [format for format in FORMATS if format not in ("AVIF",)])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_refused(format, share, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    data = saved(noise, format)
    path = tmp_path / "half"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MediaError, match=r"damaged|cut off") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_strip_of_over_200_to_1_is_refused():
    with pytest.raises(MediaError, match=r"2010 x 10 pixels.*200 times"):
        image_pixels(gradient(2010, 10))
    assert image_pixels(gradient(2000, 10)).tokens >= 1


def test_a_picture_that_is_not_rgb_must_be_loaded_first():
    with pytest.raises(MediaError, match="load_image"):
        image_pixels(gradient().convert("RGBA"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_a_picture_or_a_media_error(format, data):
    original = bytearray(saved(gradient(20, 12), format))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(original[: data.draw(st.integers(1, len(original)))])
    with suppress(MediaError):
        assert load_image(damaged, max_pixels=10**6).mode == "RGB"


def test_no_file_stays_open(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(saved(gradient(), "PNG"))
    bad.write_bytes(good.read_bytes()[:60])
    load_image(good)
    with pytest.raises(MediaError):
        load_image(bad)
    assert not [entry for entry in psutil.Process().open_files() if str(tmp_path) in entry.path]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "good.png"]


def test_importing_the_room_loads_neither_pillow_nor_av():
    code = "import sys, openm3.processing.video; print(sorted({'PIL', 'av'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
