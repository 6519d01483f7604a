"""The chat with the stand-in model, in a terminal of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from screen import Program


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts the chat; arguments are the stand-in's, and it runs in `tmp_path` with its home there."""
    started = []

    def start(*arguments: str, **size: int) -> Program:
        env = os.environ | {"HOME": str(tmp_path), "TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path / "state")}
        env.pop("NO_COLOR", None)
        script = Path(__file__).with_name("standin.py")
        started.append(Program([sys.executable, str(script), *arguments], env, str(tmp_path), **size))
        return started[-1]

    yield start
    for program in started:
        program.close()
