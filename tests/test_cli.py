"""The command line as a script meets it: real processes, exit codes, which stream says what, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "processor"
EXAMPLES = Path(__file__).parent.parent / "examples"


class Cli:
    """Runs openm3 in a directory of its own, with a home and a place for temporary files that must stay empty."""

    def __init__(self, root: Path) -> None:
        self.cwd, self.home, self.tmp = (root / name for name in ("cwd", "home", "tmp"))
        for path in (self.cwd, self.home, self.tmp):
            path.mkdir(parents=True)
        self.env = os.environ | {"HOME": str(self.home), "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1"}
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME"):
            self.env.pop(name, None)

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "openm3.cli", *map(str, arguments)]

    def __call__(self, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), input=stdin, capture_output=True, text=True, timeout=120,
                              env=self.env, cwd=self.cwd)  # fmt: skip

    def left_behind(self) -> list[str]:
        return [str(path) for place in (self.cwd, self.home, self.tmp) for path in place.rglob("*") if path.is_file()]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "cli")


@pytest.fixture
def model(random_nano: Path, tmp_path: Path) -> Path:
    """A copy of the random model, to be damaged."""
    return Path(shutil.copytree(random_nano, tmp_path / "model"))


# -- what it does --------------------------------------------------------------------------------------------------


def test_generate_answers_on_stdout_and_as_json_the_same_from_argument_and_stdin(cli, random_nano):
    options = ["-m", random_nano, "--max-tokens", 12, "--seed", 3, "--thinking", "disabled"]
    plain = cli("generate", "Hello!", *options)
    assert (plain.returncode, plain.stderr) == (0, "")
    result = json.loads(cli("generate", "-", "--json", *options, stdin="Hello!\n").stdout)
    assert set(result) == {"content", "reasoning", "tool_calls", "finish_reason", "usage"}
    assert result["content"]
    assert plain.stdout == result["content"] + "\n"
    assert (result["reasoning"], result["tool_calls"], result["finish_reason"]) == (None, [], "length")
    usage = result["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert cli.left_behind() == []


def test_generate_shows_pictures_and_video_and_thinks_on_stderr(cli, random_nano):
    options = ["-m", random_nano, "--max-tokens", 6, "--seed", 3]
    media = ["--image", EXAMPLES / "shapes.png", "--image", GOLDEN / "image1.png", "--video", EXAMPLES / "star.mp4"]
    shown = json.loads(cli("generate", "What?", "--json", *options, *media).stdout)
    without = json.loads(cli("generate", "What?", "--json", *options).stdout)
    assert shown["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"] + 25 + 2 * 9
    thinks = cli("generate", "What?", *options, "--thinking", "enabled")
    assert thinks.returncode == 0
    assert thinks.stdout == ""  # six tokens, all of them thinking
    assert thinks.stderr.strip()
    assert "\x1b" not in thinks.stderr  # no colours where no terminal is


def test_generate_raw_continues_the_text_itself(cli, random_nano):
    options = ["--raw", "-m", random_nano, "--max-tokens", 5, "--temperature", 0]
    result = json.loads(cli("generate", "def f(x):", "--json", *options).stdout)
    assert 0 < result["usage"]["prompt_tokens"] < 10  # no chat format around it
    assert cli("generate", "def f(x):", *options).stdout == result["content"].rstrip("\n") + "\n"
    refused = cli("generate", "x", "--raw", "--image", "a.png", "-m", random_nano)
    assert (refused.returncode, "--raw continues a plain text" in refused.stderr) == (2, True)


def test_generate_prints_tool_calls_as_lines_of_json(capsys):
    from openm3.cli import _stream
    from openm3.processing import ContentDelta, ThinkingDelta, ToolCall

    call = ToolCall(name="f", arguments={"x": "é"}, index=0, raw="")
    _stream(iter([ThinkingDelta("hm"), ContentDelta("Wait."), call, object()]))
    out, err = capsys.readouterr()
    assert (out, err) == ('Wait.\n{"name": "f", "arguments": {"x": "é"}}\n', "hm\n")


def test_info_counts_and_plans(cli, random_nano):
    assert "parameters" in cli("info").stdout
    data = json.loads(cli("info", random_nano, "--context", 4096, "--json").stdout)
    assert data["context"] == 4096
    assert data["total"] < 16_000_000


def test_help_is_there_for_every_command(cli):
    commands = ("chat", "generate", "train", "eval", "bench", "info", "download")
    shown = cli("--help").stdout
    assert all(command in shown for command in commands)
    assert "Longest answer" in cli("generate", "-h").stdout


def test_ctrl_c_is_exit_code_130_without_a_traceback(cli, random_nano):
    command = cli.command("generate", "Hello!", "-m", random_nano, "--temperature", "1")
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.env, cwd=cli.cwd)
    assert run.stdout.read(5)  # it answers
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_closes_early_is_no_error_message(cli, random_nano):
    command = cli.command("generate", "Hello!", "-m", random_nano, "--temperature", "1", "--thinking", "disabled")
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.env, cwd=cli.cwd)
    assert run.stdout.read(5)
    run.stdout.close()
    assert run.stderr.read() == b""
    assert run.wait(timeout=60) == 1


# -- bad input: one clear line, exit code 2, no traceback, nothing left behind -----------------------------------------


def refused(cli: Cli, *arguments: object, says: str, stdin: str = "") -> None:
    """The command fails with one line that holds `says`, and leaves no file anywhere."""
    before = cli.left_behind()
    run = cli(*arguments, stdin=stdin)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    assert line.startswith("openm3: ")
    assert says in line
    assert cli.left_behind() == before


def huge_png(path: Path, side: int = 60_000) -> None:
    """A real 60,000 x 60,000 picture of 450 KB, black and white."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, squeeze = bytes(100 * (1 + side // 8)), zlib.compressobj(1)
    data = b"".join([*(squeeze.compress(rows) for _ in range(side // 100)), squeeze.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_a_truncated_png(cli, random_nano):
    whole = (GOLDEN / "image5.png").read_bytes()
    (cli.cwd / "cut.png").write_bytes(whole[: len(whole) // 2])
    refused(cli, "generate", "What?", "--image", "cut.png", "-m", random_nano, says="cut.png': damaged or cut off")


def test_a_text_file_named_mp4(cli, random_nano):
    (cli.cwd / "notes.mp4").write_text("This is no video.\n" * 100)
    refused(cli, "generate", "What?", "--video", "notes.mp4", "-m", random_nano, says="notes.mp4'")


def test_a_picture_of_60000_by_60000(cli, random_nano):
    huge_png(cli.cwd / "huge.png")
    refused(
        cli, "generate", "?", "--image", "huge.png", "-m", random_nano, says="60,000 x 60,000 pixels, over the limit"
    )


def test_a_video_without_frames(cli, random_nano):
    import av

    with av.open(str(cli.cwd / "sound.avi"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=1024)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with av.open(str(cli.cwd / "empty.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        container.start_encoding()
    for name in ("sound.avi", "empty.avi"):
        refused(cli, "generate", "What?", "--video", name, "-m", random_nano, says=f"{name}'")


def test_a_file_that_is_not_there(cli, random_nano):
    refused(cli, "generate", "?", "--image", "nowhere.png", "-m", random_nano, says="'nowhere.png': no such file")
    refused(cli, "generate", "?", "--tools", "none.json", "-m", random_nano, says="none.json: No such file")


def test_a_checkpoint_with_a_shard_missing(cli, model):
    (model / "model-00002-of-00007.safetensors").unlink()
    refused(cli, "generate", "Hello!", "-m", model, says="model-00002-of-00007.safetensors")
    refused(cli, "chat", model, stdin="Hello!\n", says="model-00002-of-00007.safetensors")


def test_a_checkpoint_with_a_shard_cut_in_half(cli, model):
    shard = model / "model-00003-of-00007.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    refused(cli, "generate", "Hello!", "-m", model, says="model-00003-of-00007.safetensors")


def test_a_template_that_raises(cli, model):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no such luck') }}")
    refused(cli, "generate", "Hello!", "-m", model, says="no such luck")


def test_an_unknown_special_token(cli, model):
    spec = json.loads((model / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        if token["content"] == "]<]start of image[>[":
            token["content"] = "]<]begin image[>["
    (model / "tokenizer.json").write_text(json.dumps(spec))
    refused(cli, "generate", "Hello!", "-m", model, says="]<]start of image[>[")


@pytest.mark.parametrize(("tools", "says"), [
    ("[42]", "tools[0]"),
    ('[{"type": "function", "function": {"name": "f", "parameters": "none"}}]', "parameters"),
    ('{"not": "a list"}', "tools"),
    ("[", "tools.json: not JSON"),
])  # fmt: skip
def test_a_tool_schema_that_is_not_an_object(cli, random_nano, tools, says):
    (cli.cwd / "tools.json").write_text(tools)
    refused(cli, "generate", "Hello!", "--tools", "tools.json", "-m", random_nano, says=says)


@pytest.mark.parametrize(("arguments", "says"), [
    (["generate", "x", "-m", "no/such"], "openm3 download no/such"),
    (["generate", "x", "-m", "./nothing"], "./nothing: no such directory"),
    (["chat", "./nothing"], "./nothing: no such directory"),
    (["info", "--context", "0"], "context = 0"),
    (["generate", "x", "--temperature", "-1"], "temperature = -1.0"),
    (["chat", "--top-p", "2"], "top_p = 2.0"),
    (["train", "m4"], "train m4: must be nano"),
    (["train", "nano", "--run", "other"], "run 'other': must be bundled, pt, full or cpt"),
    (["eval", "m4"], "eval m4: must be nano or comparison"),
    (["bench", "nothing"], "bench nothing: must be one of"),
    (["download", "not a repo"], "not a repo"),
])  # fmt: skip
def test_wrong_arguments(cli, arguments, says):
    refused(cli, *arguments, says=says)


def test_debug_shows_where_it_came_from(cli):
    run = cli("info", "nothing", "--debug")
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "CheckpointError" in run.stderr
