"""schemathesis, unmodified, over the served OpenAPI document: the answers are those that the document tells of, none is
a 500, a traceback or late, and the document is good enough that much of what it describes is answered."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import Running, record, serving

from openm3.engine import LLM

# These hold all of a request's rules to be in its schema; that a model's name or a file's id is known, that a tool's
# result follows its call and that a prompt fits are not.
LEFT_OUT = "positive_data_acceptance,negative_data_rejection"
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")


@pytest.fixture(scope="module")
def brief() -> Iterator[Running]:
    """A server whose cache holds 256 tokens: requests are answered, none at length."""
    with serving(lambda: LLM("openm3-nano", cache_tokens=256, max_batch_tokens=512)) as server:
        yield server


def schemathesis(running: Running, folder: Path, *command: str, seconds: float) -> Counter[tuple[str, str]]:
    """Runs schemathesis' command line against the server; how often which (route, status) came."""
    run = subprocess.run(
        [Path(sys.executable).parent / "schemathesis", "--no-color", *command, "--exclude-checks", LEFT_OUT,
         "--continue-on-failure", "--request-timeout", "60", f"{running.url}/openapi.json"],
        capture_output=True, text=True, timeout=seconds, cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_checks", "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    running.idle()
    counted = re.findall(r'^openm3_http_requests_total{route="(.*)",status="(\d+)"} (\d+)',
                         httpx.get(f"{running.url}/metrics").text, re.MULTILINE)  # fmt: skip
    return Counter({(route, status): int(count) for route, status, count in counted})


def test_the_answers_are_those_of_the_document(brief, tmp_path):
    statuses = schemathesis(brief, tmp_path, "run", "--phases", "examples,fuzzing,stateful", "--max-examples", "16",
                            "--generation-deterministic", seconds=300)  # fmt: skip
    answered = [statuses[path, "200"] for path in POSTS]
    assert min(answered) >= 1
    assert sum(answered) >= 10  # the document's examples are 5 of them


@pytest.mark.soak
def test_ten_minutes_find_no_answer_beside_the_document(brief, tmp_path):
    seed = random.randrange(2**32)
    statuses = schemathesis(brief, tmp_path, "fuzz", "--max-time", "600", "--seed", str(seed),
                            "--generation-database", "none", seconds=900)  # fmt: skip
    totals: Counter[str] = Counter()
    for (_, status), count in statuses.items():
        totals[status] += count
    record("10 minutes of schemathesis", seed=seed, requests=totals.total(), statuses=dict(sorted(totals.items())))
