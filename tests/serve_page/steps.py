"""What a person does on the page, for tests to read like a visit."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@contextmanager
def openm3_serve(log: Path) -> Iterator[str]:
    """`openm3 serve` on a free port, ready; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, "-m", "openm3.cli", "serve", "--port", port], stderr=out)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                with urlopen(f"{url}ready", timeout=5):
                    break
            except URLError:  # not listening yet, or 503 while it loads
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        assert server.wait(20) == 0, log.read_text()


def greedy(page: Any) -> None:
    """Sets the open conversation's temperature to 0."""
    page.locator("#open-settings").evaluate("button => button.click()")  # on a phone it lies in the closed list
    page.get_by_role("spinbutton", name="Temperature").fill("0")
    page.get_by_role("button", name="Save").click()


def ask(page: Any, text: str) -> None:
    """Types a question and sends it."""
    page.get_by_label("Question", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def answered(page: Any, count: int | None = None) -> Any:
    """Waits until nothing is being answered (and there are `count` answers); the last answer."""
    page.wait_for_selector("#send:not(.stop)")
    answers = page.get_by_role("article", name="Answer", exact=True)
    if count is not None:
        answers.nth(count - 1).wait_for()
        page.wait_for_selector("#send:not(.stop)")
        assert answers.count() == count
    return answers.last


def shows(page: Any, text: str) -> None:
    """Waits until the conversation has this text somewhere."""
    page.locator("#thread").get_by_text(text).wait_for()


def text_of(answer: Any) -> str:
    return answer.locator(".text").inner_text()


def drop(page: Any, file: Path, kind: str) -> None:
    """Drops a file on the page, as from the desktop."""
    page.evaluate(
        """([bytes, name, type]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            for (const event of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(event, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",  # noqa: E501
        [list(file.read_bytes()), file.name, kind],
    )


def paste(page: Any, file: Path, kind: str) -> None:
    """Pastes a file into the question."""
    page.evaluate(
        """([bytes, name, type]) => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], name, { type }));
            const box = document.querySelector("#question");
            box.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }""",
        [list(file.read_bytes()), file.name, kind],
    )


def attached(page: Any, count: int) -> None:
    """Waits until so many pictures and videos wait to be sent."""
    page.wait_for_function("n => document.querySelectorAll('#attachments .remove').length === n", arg=count)
