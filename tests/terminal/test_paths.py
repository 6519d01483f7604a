"""Paths arrive in many spellings; what names a file is found, what does not is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm3.terminal.paths import clean_path, dropped_media, first_path


@pytest.fixture
def picture(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a b's (1).PNG"
    path.write_bytes(b"x")
    return path


def spellings(path: Path) -> list[str]:
    escaped = "".join("\\" + c if c in " '()" else c for c in str(path))
    name = escaped[len(str(path.parent)) + 1 :]
    address = f"file://{str(path).replace(' ', '%20')}"
    return [escaped, f'"{path}"', address, f"~/{name}", f'"~/{path.name}"', f"./{name}"]


def test_every_spelling_names_the_file_alone_with_a_question_and_dropped_into_one(picture):
    for text in spellings(picture):
        assert clean_path(text).resolve() == picture
        assert first_path(text)[1] == ""
        path, question = first_path(f"{text} what's this?")
        assert (path.resolve(), question) == (picture, "what's this?")
        paths, rest = dropped_media(f"what's on {text} there?")
        assert ([p.resolve() for p in paths], rest) == ([picture], "what's on there?")


def test_plain_spaces_are_understood_where_the_whole_text_is_a_file(picture):
    assert first_path(picture.name) == (Path(picture.name), "")


def test_single_quotes_around_a_path(tmp_path):
    (tmp_path / "a b.mp4").write_bytes(b"x")
    assert dropped_media(f"'{tmp_path}/a b.mp4'") == ([tmp_path / "a b.mp4"], "")


@pytest.mark.parametrize("text", [
    "what's up? isn't it", "1/2 and 3/4", "/tmp is a directory", "see ./nothing.png", "a 'quoted' word", "", "\0",
    "x" * 5000, "and/or", "http://example.com/a.png", "'/etc/passwd'", "~", "it\\'s",
])  # fmt: skip
def test_what_is_no_picture_or_video_stays_text(text, picture):
    assert dropped_media(text) == ([], text)


def test_a_path_that_is_not_there_is_kept_for_the_error(tmp_path):
    assert first_path("/no/such.png what is it?") == (Path("/no/such.png"), "what is it?")
