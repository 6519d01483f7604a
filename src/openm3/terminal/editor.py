"""The line that is typed: readline's editing and history, completion of commands and paths, lines that go on.

Without readline (or without a terminal) it is plain `input`. A pasted text of several lines stays one message.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import readline
    import termios
except ImportError:  # Windows
    readline = termios = None

HISTORY_LINES = 1000


class Editor:
    """Reads one message after the other. `words(line)` are the completions that a half-typed command allows."""

    def __init__(self, commands: dict[str, Sequence[str]], history: Path | None = None) -> None:
        self.commands = commands  # command: the words it takes; ("PATH",) stands for any path
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.history = history
        plain = not self.terminal or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        mark = "❯ " if (sys.stdout.encoding or "").lower().startswith("utf") else "> "
        # \x01 and \x02 tell readline that what stands between them takes no room on the line.
        self.prompt = mark if plain else f"\x01\x1b[1;36m\x02{mark}\x01\x1b[0m\x02"
        self.more = "  "
        if self.terminal and readline is not None:
            self._set_up()

    def read(self) -> str:
        """One message; a line that ends in a backslash goes on in the next. Raises EOFError at the end of the input."""
        prompt = self.prompt if self.terminal else ""
        lines = [input(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1].rstrip()
            try:
                lines.append(input(self.more if self.terminal else ""))
            except EOFError:
                break
        return "\n".join(lines)

    def typed(self) -> str:
        """What stands on the line at this moment, unfinished."""
        return readline.get_line_buffer() if self.terminal and readline is not None else ""

    def save(self) -> None:
        """Keeps the history for the next time; a place that cannot be written is no reason to complain."""
        if self.history is None or not self.terminal or readline is None:
            return
        with contextlib.suppress(OSError):
            self.history.parent.mkdir(parents=True, exist_ok=True)
            self.history.touch(mode=0o600)
            readline.write_history_file(self.history)

    def _set_up(self) -> None:
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_completer(self._complete)
        readline.set_completer_delims("")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        readline.set_history_length(HISTORY_LINES)
        if self.history is not None:
            with contextlib.suppress(OSError):
                readline.read_history_file(self.history)

    def _complete(self, text: str, index: int) -> str | None:
        options = self.completions(text)
        return options[index] if index < len(options) else None

    def completions(self, line: str) -> list[str]:
        """What the line so far may become: a command, one of its words, or a path after it."""
        command, space, rest = line.partition(" ")
        if not space:
            names = [name for name in self.commands if line and name.startswith(line)]
            return [name + (" " if self.commands[name] else "") for name in names]
        takes = self.commands.get(command, ())
        if "PATH" not in takes:
            return [f"{command} {word}" for word in takes if word.startswith(rest)]
        home = os.path.expanduser(rest)
        found = sorted(glob.glob(glob.escape(home) + "*"))
        return [f"{command} {rest}{path[len(home) :]}" + ("/" if os.path.isdir(path) else "") for path in found]


@contextlib.contextmanager
def quiet_keys() -> Iterator[None]:
    """Keys pressed meanwhile, and the ^C of an interrupt, are not echoed into what is being drawn; none is lost."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def history_path() -> Path:
    """Where the chat's history lives: the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "openm3" / "history"
