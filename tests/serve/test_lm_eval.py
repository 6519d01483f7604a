"""lm-eval, unmodified, scores tasks of examples/lm_eval through /v1/completions on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from serving import Running

from openm3.engine import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src" / "openm3" / "weights" / "openm3-nano"
HOW = [{"num_concurrent": 4, "batch_size": 3}, {"tokenized_requests": False, "limit": 6}]


def scored(
    running: Running, task: str, limit: int | None = None, **how: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(a task's metrics, its samples) by lm-eval's own evaluator."""
    args = {"model": "openm3-nano", "base_url": f"{running.url}/v1/completions", "tokenizer": str(MODEL),
            "tokenizer_backend": "huggingface", "max_length": 8192} | how  # fmt: skip
    tasks = TaskManager(include_path=str(ROOT / "examples" / "lm_eval"), include_defaults=False)
    found = lm_eval.simple_evaluate("local-completions", args, [task], task_manager=tasks, limit=limit,
                                    bootstrap_iters=0)  # fmt: skip
    running.idle()
    return found["results"][task], found["samples"][task]


def own_score(llm: LLM, context: str, continuation: str) -> tuple[float, bool]:
    """(log-probability of the continuation, whether it is the likeliest) by the network alone, without the engine."""
    encode = llm.processor.tokenizer.encode
    ids = torch.tensor(encode(context + continuation, specials=True))
    start = len(encode(context, specials=True))
    with torch.inference_mode():
        logits = llm.model.logits(llm.model(ids).hidden[start - 1 : -1])  # [continuation, vocab]
    chosen = logits.log_softmax(-1).gather(-1, ids[start:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == ids[start:]).all())


@pytest.mark.parametrize("how", HOW, ids=["as ids", "as text"])
def test_every_choice_is_scored_as_the_network_scores_it(running, llm, how, monkeypatch):
    monkeypatch.chdir(ROOT)
    results, samples = scored(running, "sums", **how)
    right = 0
    for sample in samples:
        own = [own_score(llm, *choice) for choice in sample["arguments"]]
        [given] = zip(*sample["resps"])
        assert [value for value, _ in given] == pytest.approx([value for value, _ in own], abs=1e-3)
        assert [greedy for _, greedy in given] == [greedy for _, greedy in own]
        right += max(range(4), key=lambda i: own[i][0]) == sample["doc"]["answer"]
    assert results["acc,none"] == pytest.approx(right / len(samples))
    assert right >= 0.8 * len(samples)  # a quarter by chance


def test_written_answers_are_those_of_the_model(running, llm, monkeypatch):
    monkeypatch.chdir(ROOT)
    results, samples = scored(running, "sums_written")
    prompts = [sample["arguments"][0][0] for sample in samples]
    own = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, stop=["\n"]))
    assert [sample["resps"] for sample in samples] == [[[answer.text]] for answer in own]
    assert results["exact_match,none"] >= 14 / 16
