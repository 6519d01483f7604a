"""Claim: on two CPU cores the bundled model answers within 4 s of starting the process, then at 60 tokens/s or more.

Each run is a fresh `openm3 generate` whose output is read as it comes: the time to its first visible character, and
the time a question about examples/shapes.png takes from process start to the end. Decode speed is taken in one process,
over 200 tokens of a raw continuation, prompt left out. Medians.

    python benchmarks/first_token.py        # writes benchmarks/results/first_token.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from cpu_prefill import cpu_name

HERE = Path(__file__).parent
PICTURE = HERE.parent / "examples" / "shapes.png"
TOKENS = 200


def start(arguments: list[str]) -> tuple[float, float]:
    """Seconds from process start to the first character of the answer, and to the end."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "openm3.cli", "generate", *arguments, "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.read(1)
        first = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return first, time.perf_counter() - begin


def decode_rate() -> float:
    """Tokens a second of greedy continuation, from the first token to the last."""
    from openm3 import LLM, SamplingParams

    llm = LLM(device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    begin, count = 0.0, 0
    llm.generate("Return the", SamplingParams(temperature=0.0, max_tokens=8))
    prefill = time.perf_counter()
    llm.generate("Return the", SamplingParams(temperature=0.0, max_tokens=1))
    begin = time.perf_counter()
    prefill = begin - prefill
    count = len(llm.generate("Return the", params)[0].token_ids)
    return (count - 1) / (time.perf_counter() - begin - prefill)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "first_token.json")
    args = parser.parse_args()
    text = [start(["Hello! Who are you?"])[0] for _ in range(args.runs + 1)][1:]
    picture = [start(["What is at the top left?", "--image", str(PICTURE)])[1] for _ in range(args.runs)]
    rates = [decode_rate() for _ in range(args.runs)]
    result = {
        "cpu": cpu_name(), "runs": args.runs,
        "first_token_seconds": statistics.median(text), "picture_answer_seconds": statistics.median(picture),
        "decode_tokens_per_second": statistics.median(rates), "all": {"first": text, "picture": picture, "rate": rates},
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
