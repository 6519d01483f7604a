"""A terminal to test against: what escape codes leave on the screen and in its scrollback, and a program behind it."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

CODES = re.compile(r"\x1b\[(?P<args>[?\d;]*)(?P<code>[@-~])|\x1b\](?:.*?)(?:\x07|\x1b\\)|\x1b(?P<single>[78=>])")
UNFINISHED = re.compile(r"\x1b(?:\[[?\d;]*|\][^\x07\x1b]*\x1b?)?\Z")


class Screen:
    """Lines are kept for ever; the cursor can move only in the last `height` of them, as in a real window."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.saved = (0, 0)
        self.pending = ""

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def feed(self, text: str) -> None:
        text = self.pending + text
        self.pending = ""
        if match := UNFINISHED.search(text):
            text, self.pending = text[: match.start()], match[0]
        while text:
            if match := CODES.match(text):
                self._code(match)
                text = text[match.end() :]
            else:
                self._char(text[0])
                text = text[1:]

    def _char(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._down()
        elif char == "\b":
            self.column = max(0, self.column - 1)
        elif char >= " ":
            if self.column == self.width:
                self.column = 0
                self._down()
            row = self.rows[self.row]
            row.extend(" " * (self.column + 1 - len(row)))
            row[self.column] = char
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _code(self, match: re.Match[str]) -> None:
        if match["single"] == "7":
            self.saved = (self.row, self.column)
        elif match["single"] == "8":
            self.row, self.column = self.saved
        code, args = match["code"], match["args"] or ""
        if code is None or args.startswith("?"):
            return
        n = int(args.split(";")[0] or 0)
        top = max(0, len(self.rows) - self.height)
        if code == "A":
            self.row = max(top, self.row - max(1, n))
        elif code == "B":
            self.row = min(len(self.rows) - 1, self.row + max(1, n))
        elif code == "C":
            self.column = min(self.width - 1, self.column + max(1, n))
        elif code == "D":
            self.column = max(0, self.column - max(1, n))
        elif code == "G":
            self.column = max(1, n) - 1
        elif code == "K":
            row = self.rows[self.row]
            kept = {0: row[: self.column], 1: [" "] * (self.column + 1) + row[self.column + 1 :], 2: []}
            self.rows[self.row] = kept[n]
        elif code == "J":
            self.rows[self.row] = self.rows[self.row][: self.column]
            del self.rows[self.row + 1 :]
        elif code == "P":
            del self.rows[self.row][self.column : self.column + max(1, n)]
        elif code == "@":
            self.rows[self.row][self.column : self.column] = [" "] * max(1, n)
        elif code != "m":
            raise AssertionError(f"the screen does not know {match[0]!r}")


class Program:
    """A program in a pseudo-terminal of its own, which it controls: Ctrl-C reaches it as a signal."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: str, width: int = 80, height: int = 24) -> None:
        self.screen = Screen(width, height)
        self.terminal, program_side = pty.openpty()
        fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=program_side, stdout=program_side, stderr=program_side, env=env, cwd=cwd,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(program_side)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self.seen = 0  # characters of the screen's text that `expect` has passed

    def send(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def press(self, key: str) -> None:
        """A key after a moment's pause: readline overlooks a signal that comes while it still draws."""
        time.sleep(0.2)
        self.send(key)

    def line(self, text: str) -> None:
        self.send(text + "\r")

    def expect(self, text: str, seconds: float = 60.0) -> str:
        """Waits until `text` stands on the screen, below what was expected before; returns the screen up to there."""
        end = time.monotonic() + seconds
        while (found := self.screen.text.find(text, self.seen)) < 0:
            if not self._read(end - time.monotonic()) and self.screen.text.find(text, self.seen) < 0:
                raise AssertionError(f"no {text!r} on the screen:\n{self.screen.text}")
        self.seen = found + len(text)
        return self.screen.text[: self.seen]

    def expect_more(self, characters: int, seconds: float = 60.0) -> None:
        """Waits until so much text, whatever it is, stands below what was expected before."""
        end = time.monotonic() + seconds
        while len(self.screen.text[self.seen :].strip()) < characters:
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"the answer does not grow:\n{self.screen.text}")

    def leave(self, seconds: float = 60.0) -> int:
        """Reads on until the program ends; its exit code."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(timeout=max(1.0, end - time.monotonic()))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self.terminal)

    def _read(self, seconds: float) -> bool:
        """Feeds the screen with what has come; False at the end or when time is up."""
        if seconds <= 0 or not select.select([self.terminal], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # Linux: the program has closed its side
            return False
        self.screen.feed(self._decode(data))
        return bool(data)
