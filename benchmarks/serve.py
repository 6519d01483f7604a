"""Claim: on two CPU cores `openm3 serve` gives many streams several times the tokens of one, and none waits long.

A fresh `openm3 serve` (the bundled model), asked over HTTP by a client on the same machine: so many streams at once,
and each asks again when its answer has ended. For each concurrency, after a start that is not counted: tokens a second
by the server's own counter, the time from a request to its first token, and the time between the pieces of an answer
(nearly always a token; characters of several tokens come together), as their reader sees them.

    python benchmarks/serve.py                   # writes benchmarks/results/serve.json and serve.svg beside it
    python benchmarks/serve.py --draw            # only the picture, again
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from cpu_prefill import cpu_name
from plot_msa import COLOURS

RESULTS = Path(__file__).parent / "results" / "serve.json"
WORDS = ["the", "code", "of", "a", "blue", "lantern", "and", "green", "kite", "was", "on", "that", "red", "door"]
PROMPT_WORDS, ANSWER_TOKENS = (5, 20, 80), (32, 128, 256)
COUNTER = re.compile(rb"^openm3_generated_tokens_total (\S+)", re.MULTILINE)


@contextlib.contextmanager
def served(seconds: float = 120.0) -> Iterator[str]:
    """`openm3 serve` in a process of its own, until the block ends; its address, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "openm3.cli", "serve", "--port", str(port), "--device", "cpu", "--drain", "1",
               "--cache-tokens", "131072"]  # fmt: skip
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)}: not ready, exit code {process.poll()}")
                time.sleep(0.1)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)


class Client:
    """So many streams at once; `first` and `gaps`: seconds, of what was begun while `counting`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http, self.counting = http, False
        self.first: list[float] = []
        self.gaps: list[float] = []

    async def answer(self, rng: random.Random) -> None:
        text = " ".join(rng.choices(WORDS, k=rng.choice(PROMPT_WORDS)))
        request = {"messages": [{"role": "user", "content": text}], "max_tokens": rng.choice(ANSWER_TOKENS),
                   "seed": rng.getrandbits(30), "temperature": 2, "top_p": 1, "top_k": 0, "reasoning_effort": "none",
                   "stream": True}  # fmt: skip
        seen, times, counted = time.perf_counter(), self.first, self.counting
        async with self.http.stream("POST", "/v1/chat/completions", json=request) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if '"delta":{"content":' not in line or '"content":""' in line:
                    continue
                now = time.perf_counter()
                if counted:
                    times.append(now - seen)
                seen, times, counted = now, self.gaps, self.counting

    async def stream(self, rng: random.Random) -> None:
        while True:
            await self.answer(rng)

    async def generated(self) -> float:
        found = COUNTER.search((await self.http.get("/metrics")).content)
        return float(found[1]) if found else 0.0


async def measure(url: str, streams: int, start: float, seconds: float) -> dict:
    """One concurrency; the first `start` seconds are not counted."""
    limits = httpx.Limits(max_connections=streams + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        client = Client(http)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client.stream(random.Random(1000 * streams + i))) for i in range(streams)]
            await asyncio.sleep(start)
            before, begun, client.counting = await client.generated(), time.perf_counter(), True
            await asyncio.sleep(seconds)
            client.counting = False
            tokens, passed = await client.generated() - before, time.perf_counter() - begun
            for task in tasks:
                task.cancel()
    return {"streams": streams, "tokens_per_second": tokens / passed, "seconds": passed,
            "first_token_ms": spread(client.first), "inter_token_ms": spread(client.gaps)}  # fmt: skip


def spread(seconds: list[float]) -> dict | None:
    if not seconds:
        return None
    values = 1e3 * np.percentile(seconds, (50, 95, 99))
    return dict(zip(("median", "p95", "p99"), (round(float(v), 1) for v in values))) | {"count": len(seconds)}


def draw(data: dict, output: Path) -> None:
    """Three panels over the number of streams: tokens a second, first token, between tokens."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.9), layout="constrained", dpi=150)
    rate, *waits = figure.subplots(1, 3)
    rows = data["results"]
    streams = [row["streams"] for row in rows]
    rate.plot(streams, [row["tokens_per_second"] for row in rows], "o-", color=COLOURS["layer"])
    rate.set(title="throughput", ylabel="tokens/s, all streams", yscale="log")
    names = {"median": COLOURS["layer"], "p95": COLOURS["model"], "p99": COLOURS["gqa"]}
    for axis, key, title in zip(waits, ("first_token_ms", "inter_token_ms"), ("first token", "between tokens")):
        for name, colour in names.items():
            points = [(row["streams"], row[key][name]) for row in rows if row[key]]
            axis.plot(*zip(*points), "o-", color=colour, label=name)
        axis.set(title=title, ylabel="ms", yscale="log")
        axis.legend(fontsize=8, loc="upper left")
    for axis in (rate, *waits):
        axis.set_xscale("log", base=2)
        axis.set_xticks(streams, [str(n) for n in streams])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.xaxis.minorticks_off()
        axis.set_xlabel("streams at once")
        axis.grid(alpha=0.25, which="both")
    figure.suptitle(f"openm3 serve, openm3-nano, {data['device']}", fontsize=11)
    with matplotlib.rc_context({"svg.hashsalt": "openm3"}):
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,2,4,8,16,32,64", help="how many at once, one after the other")
    parser.add_argument("--start", type=float, default=15.0, help="seconds before counting, each")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds counted, each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    args = parser.parse_args()
    if not args.draw:
        data = {"device": f"{cpu_name()}, {os.cpu_count()} cores", "model": "openm3-nano",
                "prompt_words": PROMPT_WORDS, "answer_tokens": ANSWER_TOKENS, "results": []}  # fmt: skip
        with served() as url:
            for streams in map(int, args.streams.split(",")):
                data["results"].append(asyncio.run(measure(url, streams, args.start, args.seconds)))
                args.output.write_text(json.dumps(data, indent=1) + "\n")
                print(json.dumps(data["results"][-1]), flush=True)
    draw(json.loads(args.output.read_text()), args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
