"""`openm3 chat`: the conversation and its commands. The prompt is there at once; the model loads behind it.

Ctrl-C stops the answer, not the program; at the prompt it drops the line, and a second one (or Ctrl-D) leaves.
"""

from __future__ import annotations

import contextlib
import difflib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from openm3.terminal.editor import Editor, history_path, quiet_keys
from openm3.terminal.paths import dropped_media, first_path, kind_of
from openm3.terminal.view import LiveView, PlainView, thinking_text
from openm3.terminal.worker import Job, Worker

if TYPE_CHECKING:
    from openm3.engine import LLM, SamplingParams

MODES = ("adaptive", "enabled", "disabled")
COMMANDS = {  # name: (what it takes, what it does, the words that complete it)
    "/image": ("PATH", "show the model a picture", ("PATH",)),
    "/video": ("PATH", "show the model a video", ("PATH",)),
    "/thinking": ("MODE", f"think before answering: {', '.join(MODES)}", MODES),
    "/fold": ("", "put thinking away, once the answer starts, as one line", ()),
    "/unfold": ("", "show the last thinking, and leave it open from now on", ()),
    "/reset": ("", "start over: forget the conversation", ()),
    "/help": ("", "this list", ()),
    "/quit": ("", "leave (Ctrl-D does too)", ()),
}
NEARLY_FULL = 0.8


@dataclass(frozen=True)
class Attachment:
    kind: str  # image | video
    label: str
    part: dict[str, Any]  # of the message's content


@dataclass
class Turn:
    """What the answer to one message has become so far."""

    content: str = ""
    thinking: str = ""
    finish: Any | None = None


class Chat:
    """One conversation in the terminal. `load()` gives the LLM; `about` is the model in a few words, for the banner.

    `params`: the SamplingParams of every answer; `console`: where to draw, default the terminal.
    """

    def __init__(
        self,
        name: str,
        about: str,
        load: Callable[[], LLM],
        *,
        params: SamplingParams | None = None,
        thinking: str = "adaptive",
        console: Console | None = None,
    ) -> None:
        self.name, self.about, self.params, self.thinking = name, about, params, thinking
        self.console = console or Console(highlight=False)
        history = history_path() if sys.stdin.isatty() else None
        self.editor = Editor({name: words for name, (_, _, words) in COMMANDS.items()}, history)
        self.messages: list[dict[str, Any]] = []
        self.attachments: list[Attachment] = []
        self.fold = True
        self.last_thinking = ""
        self._reading = False
        self._banner()
        self.worker = Worker(load, self._loaded)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Reads and answers until the user leaves. Raises what loading the model raised."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted = False
        try:
            while True:
                try:
                    line = self._read()
                    interrupted = False
                    if not self._handle(line.strip()):
                        return
                except EOFError:
                    if self.editor.terminal:
                        self.console.print()
                    return
                except KeyboardInterrupt:
                    self._check_loaded()
                    self.console.print()
                    if interrupted:
                        return
                    interrupted = True
                    self._note("Ctrl-C again, or Ctrl-D, leaves")
        finally:
            self.editor.save()

    def close(self) -> bool:
        """Ends the model's thread; False if it is busy with what cannot be interrupted, such as loading."""
        return self.worker.close()

    def _read(self) -> str:
        self._reading = True
        try:
            self._check_loaded()
            return self.editor.read()
        finally:
            self._reading = False

    def _handle(self, line: str) -> bool:
        """One message or command; False leaves."""
        command, _, rest = line.partition(" ")
        try:
            if line.startswith("/") and "/" not in command[1:]:
                return self._command(command, rest.strip())
            paths, text = dropped_media(line)
            for path in paths:
                self._attach(kind_of(path) or "image", path)
            if text:
                self._answer(text)
            elif paths:
                self._note("now ask about it")
        except (ValueError, OSError) as error:
            self._check_loaded()
            self._complain(str(error))
        return True

    def _command(self, command: str, rest: str) -> bool:
        if command in ("/image", "/video"):
            self._media(command, rest)
        elif command == "/thinking":
            self._set_thinking(rest)
        elif command == "/fold":
            self.fold = True
            self._note("thinking folds to one line once the answer starts")
        elif command == "/unfold":
            self._unfold()
        elif command == "/reset":
            self.messages, self.attachments, self.last_thinking = [], [], ""
            self._note("starting over")
        elif command == "/help":
            self._help()
        elif command in ("/quit", "/exit"):
            return False
        else:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            self._complain(f"there is no command {command}; {hint}/help lists them all")
        return True

    # -- an answer -----------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        message = {"role": "user", "content": text}
        if self.attachments:
            message["content"] = [*(a.part for a in self.attachments), {"type": "text", "text": text}]
        messages = [*self.messages, message]
        mode, params = self.thinking, self.params
        job = self.worker.submit(lambda llm: llm.chat(messages, params, thinking=mode, stream=True))
        turn = Turn()
        view = self._view()
        stopped = threading.Event()
        with _on_ctrl_c(stopped.set), quiet_keys():
            try:
                self._stream(job, turn, view, stopped)
            except BaseException:
                view.close()
                raise
            view.close("stopped" if stopped.is_set() else self._remark(turn))
        self.last_thinking = turn.thinking
        if not stopped.is_set() or turn.content:
            answer = {"role": "assistant", "content": turn.content}
            if turn.thinking:
                answer["reasoning_content"] = turn.thinking
            self.messages = [*messages, answer]
            self.attachments = []

    def _stream(self, job: Job, turn: Turn, view: LiveView | PlainView, stopped: threading.Event) -> None:
        view.wait(self._what_happens())
        while not job.done:
            event = job.poll(0.05)
            if stopped.is_set():
                return job.stop()
            if self.worker.error is not None:
                raise self.worker.error
            self._take(event, turn, view)
            view.draw()

    def _take(self, event: Any, turn: Turn, view: LiveView | PlainView) -> None:
        if event is None:
            return
        from openm3.processing import ContentDelta, ThinkingDelta, ToolCall  # the model's thread has loaded it by now

        if isinstance(event, ThinkingDelta):
            turn.thinking += event.text
            view.thinking(event.text)
        elif isinstance(event, ContentDelta):
            turn.content += event.text
            view.content(event.text)
        elif isinstance(event, ToolCall):  # nobody here can run it: it is shown as it was written
            turn.content += event.raw
            view.content(f"\n```\n{event.raw}\n```\n")
        else:
            turn.finish = event

    def _view(self) -> LiveView | PlainView:
        if self.console.is_terminal:
            return LiveView(self.console, fold=self.fold, count_tokens=self._count_tokens)
        return PlainView(sys.stdout)

    def _count_tokens(self, text: str) -> int:
        return len(self.worker.model.processor.tokenizer.encode(text))

    def _what_happens(self) -> str:
        if self.worker.loading:
            return f"loading {self.name}"
        kinds = {a.kind for a in self.attachments}
        return "watching" if "video" in kinds else "looking" if kinds else "reading"

    def _remark(self, turn: Turn) -> str:
        """A line under the answer, where there is something to say."""
        if turn.finish is None:
            return ""
        context = self.worker.model.config.text.max_position_embeddings
        used = turn.finish.prompt_tokens + turn.finish.completion_tokens
        if turn.finish.finish_reason == "length":
            if used >= context - 1:
                return f"cut off: the context of {context:,} tokens is full; /reset starts over"
            return f"cut off after {turn.finish.completion_tokens} tokens (--max-tokens)"
        if used > NEARLY_FULL * context:
            return f"the context is {used / context:.0%} full ({used:,} of {context:,} tokens); /reset starts over"
        return "" if turn.content.strip() else "(no answer)"

    # -- commands ------------------------------------------------------------------------------------------------------

    def _media(self, command: str, rest: str) -> None:
        if not rest:
            self._complain(f"{command} needs a path: {command} {'clip.mp4' if command == '/video' else 'picture.png'}")
            return
        path, question = first_path(rest)
        self._attach(command[1:], path)
        if question:
            self._answer(question)

    def _attach(self, kind: str, path: Path) -> None:
        """Reads the file now, so that a wrong one is told at once and a later change of it does no harm."""
        attachment = _load_image(path) if kind == "image" else _load_video(path)
        self.attachments.append(attachment)
        self._note(f"{kind}: {attachment.label}")

    def _set_thinking(self, mode: str) -> None:
        if mode not in MODES:
            self._complain(f"/thinking {mode}: the modes are {', '.join(MODES)}; it is {self.thinking} now")
            return
        self.thinking = mode
        self._note(f"thinking: {mode}")

    def _unfold(self) -> None:
        self.fold = False
        if self.last_thinking.strip():
            self.console.print(thinking_text(self.last_thinking))
            self.console.print()
        else:
            self._note("thinking stays open from now on; there was none in the last answer")

    def _help(self) -> None:
        for name, (takes, does, _) in COMMANDS.items():
            self.console.print(Text.assemble((f"  {name} {takes}".ljust(18), "cyan"), (does, "")))
        self._note("  A line that ends in \\ goes on in the next. A file dropped here is shown to the model.\n"
                   "  Ctrl-C stops an answer.")  # fmt: skip

    # -- small talk of the program itself ------------------------------------------------------------------------------

    def _banner(self) -> None:
        if self.editor.terminal:
            self.console.print(Text.assemble((self.name, "bold cyan"), (f" · {self.about}", "dim")), soft_wrap=True)
            self._note("/help lists the commands · Ctrl-C stops an answer · Ctrl-D leaves")

    def _loaded(self, llm: LLM | None) -> None:
        """On the model's thread: adds the device to the banner, or wakes the prompt to tell what went wrong."""
        if llm is None:
            while self._reading and hasattr(signal, "pthread_kill"):  # readline may miss one signal, not two
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.5)
            return
        device, used = f" · {llm.model.embed.weight.device}", len(self.name) + len(self.about) + 3
        typing = self._reading and self.editor.terminal and len(self.editor.typed()) + 4 < self.console.width
        if typing and used + len(device) < self.console.width:
            # The prompt stands three lines below: save the cursor, go up to the line's end, restore.
            sys.__stdout__.write(f"\x1b7\x1b[3A\r\x1b[{used}C\x1b[2m{device}\x1b[0m\x1b8")
            sys.__stdout__.flush()

    def _check_loaded(self) -> None:
        if self.worker.error is not None:
            raise self.worker.error

    def _note(self, text: str) -> None:
        if self.editor.terminal:
            self.console.print(Text(text, style="dim"), soft_wrap=True)
            self.console.print()

    def _complain(self, text: str) -> None:
        line = Text(" ".join(text.split()), style="red" if self.console.is_terminal else "")
        (self.console if self.console.is_terminal else Console(stderr=True)).print(line, soft_wrap=True)
        if self.console.is_terminal:
            self.console.print()


def _load_image(path: Path) -> Attachment:
    from openm3.processing.images import load_image

    image = load_image(path)
    return Attachment("image", f"{path.name}, {image.width} x {image.height}", {"type": "image", "image": image})


def _load_video(path: Path) -> Attachment:
    from openm3.processing.video import load_video

    video = load_video(path)
    label = f"{path.name}, {len(video.frames)} of {video.total_frames} frames"
    return Attachment("video", label, {"type": "video", "video": video})


@contextlib.contextmanager
def _on_ctrl_c(call: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `call` instead of raising, so that nothing is torn off in the middle of drawing."""
    before = signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
