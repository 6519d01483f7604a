"""The examination: held-out cases answered through `LLM.chat_batch`, each figure with its Wilson 95 % interval.

Answers are greedy, and the thinking mode is the model's default, adaptive: what a user gets who chooses none. Only rows
that name a mode are asked in that one: arithmetic in all three, and counting and relations, for which adaptive thinks,
also with thinking disabled, over the same cases, so that the table shows what thinking is worth there. In a dialogue
the model's own earlier answers stand in the history. Results are written as JSON with the device's name, and rendered
into the table of docs/nano.md between its two marks.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openm3.train.recipes.nano.case import Case
from openm3.train.recipes.nano.tasks import Exam, exams

if TYPE_CHECKING:
    from openm3.engine import LLM

CASES = 2000
AT_ONCE = 256  # cases whose pictures are in memory together
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")


@dataclass(frozen=True)
class Row:
    """One figure: `right` of `total`, in percent with its interval; `bar` is what `low` must reach (None: nothing)."""

    name: str
    right: int
    total: int
    percent: float
    low: float
    high: float
    bar: float | None
    cases: int

    @property
    def reached(self) -> bool | None:
        return None if self.bar is None else self.low >= self.bar

    @classmethod
    def of(cls, exam: Exam, scores: Sequence[bool], cases: int) -> Row:
        low, high = wilson(sum(scores), len(scores))
        percent = 100 * sum(scores) / max(1, len(scores))
        return cls(exam.name, sum(scores), len(scores), percent, low, high, exam.bar, cases)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent (E. B. Wilson, JASA 22, 1927)."""
    if total == 0:
        return 0.0, 100.0
    p, zz = right / total, z * z / total
    middle = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / total + zz / (4 * total)) / (1 + zz)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def evaluate(
    llm: LLM, tasks: Iterable[str] | None = None, cases: int = CASES, seed: int = 0, progress: bool = True
) -> list[Row]:
    """Examines a model. tasks: rows by the beginning of their names (`picture`, `tool: the call`), default all.

    Raises ValueError for a name that no row begins with."""
    wanted = list(exams()) if tasks is None else chosen(tasks)
    rows: dict[str, Row] = {}
    done: dict[int, list[tuple[Case, list[Any]]]] = {}
    for exam in wanted:
        start = time.monotonic()
        if id(exam.sample) not in done:
            done = {id(exam.sample): answers(llm, exam, cases, seed)}  # rows over the same answers stand together
        row = Row.of(exam, [s for case, results in done[id(exam.sample)] for s in scored(exam, case, results)], cases)
        rows[exam.name] = row
        if progress:
            print(f"{row.name:42s} {row.percent:6.2f} % [{row.low:.2f}, {row.high:.2f}]  {mark(row):8s} "
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
    return list(rows.values())


def chosen(tasks: Iterable[str]) -> list[Exam]:
    everything = exams()
    for task in tasks:
        if not any(exam.name.startswith(task) for exam in everything):
            names = "; ".join(exam.name for exam in everything)
            raise ValueError(f"task {task!r}: no row begins with it; the rows are {names}")
    return [exam for exam in everything if any(exam.name.startswith(task) for task in tasks)]


def answers(llm: LLM, exam: Exam, cases: int, seed: int) -> list[tuple[Case, list[Any]]]:
    """Draws the cases and has every examined turn answered: (case, one result for each assistant turn or None)."""
    out: list[tuple[Case, list[Any]]] = []
    for first in range(0, cases, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, cases))
        drawn = [exam.sample(random.Random(f"exam {seed} {exam.seed or exam.name} {number}")) for number in numbers]
        for case, results in zip(drawn, ask(llm, drawn, exam.max_tokens)):
            light = Case(case.task, [], case.expects, case.thinking)  # the pictures may go
            out.append((light, results))
    return out


def ask(llm: LLM, cases: list[Case], max_tokens: int) -> list[list[Any]]:
    """The model's answers, turn after turn over all cases together; a turn without an expectation is given."""
    from openm3.engine import SamplingParams

    histories: list[list[dict]] = [[] for _ in cases]
    results: list[list[Any]] = [[] for _ in cases]
    at = [0] * len(cases)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    while True:
        waiting = []
        for i, case in enumerate(cases):
            while at[i] < len(case.messages):
                message = case.messages[at[i]]
                if message["role"] == "assistant" and case.expects[len(results[i])] is not None:
                    waiting.append(i)
                    break
                if message["role"] == "assistant":
                    results[i].append(None)
                histories[i].append(shown(message))
                at[i] += 1
        if not waiting:
            return results
        replies = llm.chat_batch([histories[i] for i in waiting], params, thinking=[cases[i].thinking for i in waiting],
                                 tools=[cases[i].tools for i in waiting])  # fmt: skip
        for i, reply in zip(waiting, replies):
            results[i].append(reply)
            own = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning}
            histories[i].append({key: value for key, value in own.items() if value is not None})
            at[i] += 1


def shown(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a user would send it: arrays become pictures, clips lists of frames."""
    if message["role"] != "user" or isinstance(message["content"], str):
        return message
    from PIL import Image

    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            part = {"type": "image", "image": Image.fromarray(part["image"])}
        elif part["type"] == "video":
            part = {"type": "video", "video": [Image.fromarray(frame) for frame in part["video"]]}
        parts.append(part)
    return {"role": "user", "content": parts}


def scored(exam: Exam, case: Case, results: list[Any]) -> list[bool]:
    """What one case adds to a row."""
    turns = [(expect, result) for expect, result in zip(case.expects, results) if expect is not None]
    if exam.scores == "thinks":
        return [bool(result.reasoning) for _, result in turns]
    if exam.scores == "silent":
        return [not result.reasoning for _, result in turns]
    if exam.scores == "digits":
        return [score for expect, result in turns for score in expect.digit_scores(result.content)]
    right = [expect.score(result.content, result.tool_calls) for expect, result in turns]
    return [all(right)] if exam.scores == "all" else right


def mark(row: Row) -> str:
    return {None: "", True: "reached", False: "MISSED"}[row.reached]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| task | right | 95 % interval | lower bound to reach | |", "| --- | ---: | :---: | ---: | --- |"]
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:g} %"
        lines.append(f"| {row.name} | {row.percent:.2f} % of {row.total:,} | {row.low:.2f} to {row.high:.2f} | {bar} "
                     f"| {mark(row)} |")  # fmt: skip
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """How the three modes of arithmetic compare, on the same problems; empty where they were not all examined."""
    percent = {row.name.rpartition(" ")[2]: row.percent for row in rows if row.name.startswith("arithmetic, thinking ")}
    if len(percent) < 3:
        return ""
    adaptive, disabled = (percent["enabled"] - percent[mode] for mode in ("adaptive", "disabled"))
    return (f"Arithmetic on the same problems: adaptive is {adaptive:.2f} points below enabled (at most 1 is asked), "
            f"disabled {disabled:.2f} points.\n")  # fmt: skip


def write(rows: Sequence[Row], path: Path, facts: dict[str, Any]) -> None:
    """Writes the results as JSON: `facts` (model, device, seed, seconds) and the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = facts | {"rows": [asdict(row) | {"reached": row.reached} for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_table(rows: Sequence[Row], document: Path, device: str) -> None:
    """Replaces what stands between the marks of a Markdown file. Raises ValueError for a file without them."""
    text = document.read_text()
    begin, end = (text.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        raise ValueError(f"{document}: must hold the lines {MARKS[0]} and {MARKS[1]}, the table goes between them")
    middle = f"\n{table(rows)}\n\n{summary(rows)}Measured on {device}.\n"
    document.write_text(text[: begin + len(MARKS[0])] + middle + text[end:])


def engine_sizes() -> dict[str, int]:
    """What suits thousands of cases at once: on a GPU wide steps over many sequences, elsewhere what LLM does."""
    import torch

    return {"cache_tokens": 1_000_000, "max_batch_tokens": 16_384} if torch.cuda.is_available() else {}


def device_name(llm: LLM) -> str:
    """The device that a model runs on, in words."""
    import platform

    import torch

    device = next(llm.model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def run(
    name_or_dir: str = "openm3-nano",
    *,
    tasks: Sequence[str] | None = None,
    cases: int = CASES,
    seed: int = 0,
    results: Path | None = None,
    document: Path | None = None,
    **engine: int,
) -> list[Row]:
    """`openm3 eval nano`: examines a model, prints the rows, writes JSON to `results` and the table into `document`.

    engine: `cache_tokens` and `max_batch_tokens` of `LLM`, by default large ones on a GPU."""
    from openm3.engine import LLM

    llm = LLM(name_or_dir, **(engine_sizes() | engine))
    start = time.monotonic()
    rows = evaluate(llm, tasks, cases, seed)
    device = device_name(llm)
    facts = {"model": str(name_or_dir), "device": device, "seed": seed, "cases": cases,
             "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
    if results is not None:
        write(rows, results, facts)
    if document is not None:
        write_table(rows, document, device)
    return rows
