"""A run's record: metrics.jsonl, one line for each step, and what the terminal shows meanwhile."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The run's records in order; a last line cut off by a crash is left out. Raises ValueError if there is no file."""
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a training run writes it")
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty, or cut off


class MetricsLog:
    """Appends records to metrics.jsonl. Opened at a step: what an earlier attempt wrote past that step is dropped."""

    def __init__(self, run_dir: Path, step: int):
        path = run_dir / FILE
        kept = [row for row in read_metrics(run_dir) if row["step"] <= step] if path.is_file() else []
        rest = path.with_suffix(".tmp")
        rest.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(rest, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Display:
    """A progress bar on a terminal, a plain line now and then elsewhere (stderr). Use in a `with`."""

    def __init__(self, steps: int, done: int, log_every: int):
        from rich import progress
        from rich.console import Console

        self._console = Console(file=sys.stderr)
        self._bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, text="")
        self._log_every = log_every

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, row: dict[str, Any]) -> None:
        parts = [f"loss {row['loss']:.4f}"]
        if "index_loss" in row:
            parts.append(f"index {row['index_loss']:.4f}")
        text = "  ".join([*parts, f"lr {row['lr']:.2e}", f"{row['tokens_per_second']:,.0f} tokens/s"])
        self._bar.update(self._task, text=text)
        if not self._console.is_terminal:
            self.note(f"step {row['step']}  {text}")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)
