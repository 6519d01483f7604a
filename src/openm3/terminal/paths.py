"""Paths as people give them: typed, quoted, with escaped spaces, with ~, as file:// addresses, dropped here."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}

QUOTED = r"""'[^']+'|"[^"]+\""""
ONE_PATH = re.compile(rf"(?:{QUOTED}|(?:\\.|[^\s\\])+)(?!\S)")  # a space in it is escaped
DROPPED = re.compile(rf"(?<!\S)(?:{QUOTED}|(?:file://|~/|\.{{0,2}}/|[A-Za-z]:[\\/])(?:\\.|[^\s\\])+)(?!\S)")


def kind_of(path: Path) -> str | None:
    """ "image", "video", or None by the file's ending."""
    ending = path.suffix.lower()
    return "image" if ending in IMAGES else "video" if ending in VIDEOS else None


def clean_path(text: str) -> Path:
    """A path from its text: quotes, escapes, ~ and file:// undone. The text as it stands wins if it names a file."""
    text = text.strip()
    if is_file(Path(text).expanduser()):
        return Path(text).expanduser()
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    if re.fullmatch(QUOTED, text):
        return Path(text[1:-1]).expanduser()
    return Path(re.sub(r"\\(.)", r"\1", text)).expanduser()


def first_path(text: str) -> tuple[Path, str]:
    """Splits `PATH question` into both. Plain spaces in a path are understood when all of the text names a file."""
    whole = clean_path(text)
    match = ONE_PATH.match(text)
    if is_file(whole) or match is None:
        return whole, ""
    return clean_path(match[0]), text[match.end() :].strip()


def dropped_media(text: str) -> tuple[list[Path], str]:
    """Takes the paths of existing pictures and videos out of a message: (paths, the text without them)."""
    found: list[Path] = []

    def take(match: re.Match[str]) -> str:
        path = clean_path(match[0])
        if kind_of(path) is None or not is_file(path):
            return match[0]
        found.append(path)
        return ""

    rest = DROPPED.sub(take, text)
    return found, (re.sub(r"[ \t]{2,}", " ", rest).strip() if found else text)


def is_file(path: Path) -> bool:
    """Whether the path names a file; a text that is no path at all (too long, a null byte) does not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
