"""mini-swe-agent, a published coding agent, unmodified, does a small task by bash calls of the bundled model.

The task of a seed: read a value from a file by a command that the request gives, say it, and end the work by the
command that the agent's reminder gives. It is done where just these two commands ran and nothing but the right answer
was said; the agent may remind more than once, of an empty reply or one given twice. Files, names and values are the
seed's; prompts and temperature (0.5) are those of examples/coding_agent.yaml.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import EXAMPLES, Running, record

os.environ |= {"MSWEA_SILENT_STARTUP": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # as these are imported: no fetches

from minisweagent.agents import get_agent
from minisweagent.environments import get_environment
from minisweagent.models import get_model

CONFIG = yaml.safe_load((EXAMPLES / "coding_agent.yaml").read_text())
FILES = ("river", "garden", "piano", "ticket", "window", "basket", "candle", "harbour", "market", "ladder")
FIELDS = ("total", "count", "price", "rate", "level", "amount")


def work(running: Running, folder: Path, seed: int, **more: Any) -> dict[str, Any]:
    """One run of the agent in a folder of its own: what it ran, what the model said, and whether that was the task."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(seed)
    file, field, value = rng.choice(FILES), rng.choice(FIELDS), rng.randrange(100, 10_000)
    (folder / file).write_text(json.dumps({field: value}))
    (folder / "submit").write_text("#!/bin/sh\necho COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT\ncat *\n")
    (folder / "submit").chmod(0o755)
    options = {"api_base": f"{running.url}/v1", "seed": seed} | more
    model = get_model(config=CONFIG["model"] | {"model_kwargs": CONFIG["model"]["model_kwargs"] | options})
    environment = get_environment(CONFIG["environment"] | {"cwd": str(folder)}, default_type="local")
    agent = get_agent(model, environment, CONFIG["agent"], default_type="default")
    end = agent.run(f"Please execute a bash command, with command = cat {file}. What is the {field}?")
    notes = [message.get("extra", {}) for message in agent.messages]
    ran = [action["command"] for note in notes for action in note.get("actions", ())]
    replies = [note["response"]["choices"][0]["message"]["content"] for note in notes if note.get("interrupt_type")]
    done = end["exit_status"] == "Submitted" and ran == [f"cat {file}", "submit"]
    done = done and {reply for reply in replies if reply} == {f"The {field} is {value}."}
    done = done and json.dumps({field: value}) in end["submission"]
    return {"done": done, "ran": ran, "replies": replies, "end": end}


@pytest.mark.parametrize("seed", range(3))
def test_the_agent_reads_a_file_says_what_is_in_it_and_submits(running, tmp_path, seed):
    run = work(running, tmp_path, seed)
    assert run["done"], run
    running.idle()


@pytest.mark.soak
def test_the_agent_completes_its_task_on_19_of_20_seeds(running, tmp_path):
    done = {}
    for temperature in (0.5, 1.0):  # the configuration's, and the model's default for comparison
        folder = tmp_path / str(temperature)
        folder.mkdir()
        runs = [work(running, folder / str(seed), seed, temperature=temperature) for seed in range(300, 320)]
        done[temperature] = sum(run["done"] for run in runs)
        record(f"mini-swe-agent, 20 seeds, temperature {temperature}", completed=done[temperature],
               with_one_reminder=sum(run["done"] and len(run["replies"]) == 1 for run in runs),
               others=[{"ran": run["ran"], "replies": run["replies"]} for run in runs if not run["done"]])  # fmt: skip
    running.idle()
    assert done[0.5] >= 19
