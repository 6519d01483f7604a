"""Makes docs/chat.svg, the README's picture of the chat: a real session in tmux, typed line by line, then captured.

python docs/make_chat_svg.py [MODEL]        # needs tmux; run it in the repository's root
"""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

LINES = (
    "/image examples/shapes.png",
    "What is at the top left?",
    "Where is the blue triangle?",
    "What is 478 + 356?",
    "/video examples/star.mp4",
    "In which direction does the star move?",
)
WIDTH, HEIGHT = 84, 40
PROMPT = "❯"
SERVER = ["tmux", "-L", "openm3-svg"]


def tmux(*arguments: str) -> str:
    return subprocess.run([*SERVER, *arguments], check=True, capture_output=True, text=True).stdout


def screen(*options: str) -> str:
    """What stands on the screen, with its colours if `-e` is given."""
    return tmux("capture-pane", "-p", *options).rstrip()


def wait_for_prompt(count: int, seconds: float = 60.0) -> None:
    """Waits for an empty prompt below `count` others."""
    end = time.monotonic() + seconds
    while True:
        prompts = [line for line in screen().splitlines() if line.startswith(PROMPT)]
        if len(prompts) > count and prompts[-1].strip() == PROMPT:
            return
        if time.monotonic() > end:
            sys.exit(f"the chat did not come back to its prompt:\n{screen()}")
        time.sleep(0.1)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "openm3-nano"
    chat = shlex.join([sys.executable, "-m", "openm3.cli", "chat", model, "--temperature", "0"])
    tmux("new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), f"env TERM=xterm-256color {chat}")
    try:
        wait_for_prompt(0)
        time.sleep(5)  # the model is there: the banner says where it runs
        for count, line in enumerate(LINES, 1):
            tmux("send-keys", "-l", line)
            tmux("send-keys", "Enter")
            wait_for_prompt(count)
        picture = Text.from_ansi(screen("-e").removesuffix(PROMPT))
    finally:
        tmux("kill-server")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(picture)
    out = Path(__file__).with_name("chat.svg")
    console.save_svg(str(out), title="openm3 chat")
    print(out)


if __name__ == "__main__":
    main()
