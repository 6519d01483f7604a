"""The examination, by models that know everything and nothing, and the recipe's schedule."""

import dataclasses
import json
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from openm3.train.recipes.nano import compare, recipe
from openm3.train.recipes.nano import evaluate as examination
from openm3.train.recipes.nano.tasks import Exam, exams


@dataclass
class Reply:
    content: str
    reasoning: str | None = None
    tool_calls: list = field(default_factory=list)


@dataclass
class Call:
    name: str
    arguments: dict


class Knowing:
    """Answers every case as it should be answered; the cases are drawn again and found by their messages."""

    def __init__(self, cases, wrong=frozenset()):
        self.expected, self.wrong = {}, wrong
        for exam in exams():
            for number in range(cases):
                case = exam.sample(random.Random(f"exam 0 {exam.seed or exam.name} {number}"))
                for i, message in enumerate(case.messages):
                    if message["role"] == "assistant":
                        self.expected[self.key(case.messages[:i], case.thinking)] = message

    @staticmethod
    def key(messages, thinking):
        def text(content):
            if not isinstance(content, list):
                return content
            return [p["text"] if p["type"] == "text" else pixels(p[p["type"]]) for p in content]

        def pixels(media):
            frames = media if isinstance(media, list) else [media]
            return zlib.crc32(b"".join(np.asarray(frame).tobytes() for frame in frames))

        return json.dumps([[m["role"], text(m["content"])] for m in messages]) + thinking

    def chat_batch(self, conversations, params, *, thinking, tools):
        assert params.temperature == 0.0
        return [self.reply(messages, mode) for messages, mode in zip(conversations, thinking)]

    def reply(self, messages, mode):
        message = self.expected[self.key(messages, mode)]
        calls = [Call(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        return Reply(message["content"], message.get("reasoning_content"), calls)


class Unknowing:
    def chat_batch(self, conversations, params, *, thinking, tools):
        return [Reply("no") for _ in conversations]


def test_right_answers_reach_every_bar_and_wrong_ones_none():
    rows = examination.evaluate(Knowing(8), cases=8, progress=False)
    assert {row.name for row in rows} == {exam.name for exam in exams()}
    assert all(row.percent == 100 for row in rows), [row for row in rows if row.percent < 100]
    dialogue = {row.name: row.total for row in rows if row.name.startswith("dialogue")}
    assert dialogue == {"dialogue: each answer": 24, "dialogue: all three answers": 8}
    rows = examination.evaluate(Unknowing(), cases=8, progress=False)
    assert all(row.percent == 0 for row in rows if row.name != "adaptive is silent: no carry")
    assert not any(row.reached for row in rows)


def test_rows_are_chosen_by_the_beginning_of_their_names():
    rows = examination.evaluate(Unknowing(), ["picture: c", "tool: the call"], cases=3, progress=False)
    assert [row.name for row in rows] == ["picture: colour", "picture: count", "picture: count, thinking disabled",
                                          "tool: the call"]  # fmt: skip
    with pytest.raises(ValueError, match="juggling"):
        examination.evaluate(Unknowing(), ["juggling"], cases=1)


def test_the_modes_of_arithmetic_are_compared():
    row = examination.Row("", 0, 0, 0.0, 0.0, 0.0, None, 0)
    rows = [dataclasses.replace(row, name=f"arithmetic, thinking {mode}", percent=percent)
            for mode, percent in (("enabled", 98.0), ("disabled", 71.5), ("adaptive", 97.25))]  # fmt: skip
    assert "adaptive is 0.75 points" in examination.summary(rows)
    assert "disabled 26.50 points" in examination.summary(rows)
    assert examination.summary(rows[:2]) == ""


def test_all_three_modes_of_arithmetic_see_the_same_problems():
    rows = [exam for exam in exams() if exam.name.startswith("arithmetic")]
    for number in range(20):
        cases = [exam.sample(random.Random(f"exam 0 {exam.seed} {number}")) for exam in rows]
        assert len({str(case.facts["problems"]) for case in cases}) == 1
        assert [case.thinking for case in cases] == ["enabled", "disabled", "adaptive"]


def test_the_mode_is_adaptive_unless_the_row_names_another():
    for exam in exams():
        named = exam.name.rpartition("thinking ")[2] if "thinking " in exam.name else "adaptive"
        assert {exam.sample(random.Random(number)).thinking for number in range(5)} == {named}, exam.name


def test_what_thinking_is_worth_is_measured_on_the_same_pictures():
    rows = {exam.name: exam for exam in exams()}
    for kind in ("count", "relation"):
        pair = [rows[f"picture: {kind}"], rows[f"picture: {kind}, thinking disabled"]]
        assert pair[1].bar is None
        for number in range(10):
            cases = [exam.sample(random.Random(f"exam 0 {exam.seed} {number}")) for exam in pair]
            assert len({str(case.facts["things"]) + str(case.expects) for case in cases}) == 1


def test_wilson_is_the_known_interval():
    low, high = examination.wilson(8, 10)  # a textbook value: 0.4902 to 0.9433
    assert (low, high) == (pytest.approx(49.02, abs=0.01), pytest.approx(94.33, abs=0.01))
    assert examination.wilson(0, 0) == (0.0, 100.0)
    assert examination.wilson(2000, 2000)[0] == pytest.approx(99.81, abs=0.01)
    assert examination.wilson(1920, 2000)[0] > 95 > examination.wilson(1919, 2000)[0]


def test_the_table_is_written_between_its_marks(tmp_path):
    rows = examination.evaluate(Unknowing(), ["clip"], cases=3, progress=False)
    document = tmp_path / "nano.md"
    document.write_text("before\n" + "\nold\n".join(examination.MARKS) + "\nafter\n")
    for _ in range(2):
        examination.write_table(rows, document, "a test")
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("clip: what moves") == 1
    assert "MISSED" in text
    with pytest.raises(ValueError, match="must hold the lines"):
        examination.write_table(rows, tmp_path / "other.md", "x") if (tmp_path / "other.md").write_text("x") else None
    examination.write(rows, tmp_path / "results" / "r.json", {"device": "a test"})
    assert json.loads((tmp_path / "results" / "r.json").read_text())["rows"][0]["bar"] == 92


def test_the_page_of_the_model_has_a_place_for_the_table():
    text = (Path(__file__).parents[2] / "docs" / "nano.md").read_text()
    assert all(text.count(mark) == 1 for mark in examination.MARKS)


def test_the_compared_runs_see_equally_many_tokens():
    pt, full, cpt = (recipe.plan(name, 400) for name in ("pt", "full", "cpt"))
    assert pt.config.steps == full.config.steps == full.stop_at + cpt.config.steps
    assert pt.config.tokens_per_batch == full.config.tokens_per_batch == cpt.config.tokens_per_batch
    assert (full.config.attention, pt.config.attention, cpt.config.attention) == ("dense", "msa", "msa")
    assert cpt.first == full.stop_at
    assert pt.source() == full.source()
    assert 0 < cpt.config.warmup_msa_steps < cpt.config.steps
    pieces = [round(plan.config.decay_fraction * plan.config.steps) for plan in (pt, cpt)]
    assert abs(pieces[0] - pieces[1]) <= 1
    with pytest.raises(ValueError, match="huge"):
        recipe.plan("huge")


def tiny_model(seed=0, device="cpu"):
    import torch

    from openm3.config import M3Config
    from openm3.model import M3

    torch.manual_seed(seed)
    nano = M3Config.preset("nano")
    text = dataclasses.replace(
        nano.text, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, rotary_dim=4,
        dense_intermediate_size=32, intermediate_size=16, shared_intermediate_size=16, sparse_layers=(False, True),
        moe_layers=(False, True), sparse=dataclasses.replace(nano.text.sparse, index_dim=8),
    )  # fmt: skip
    vision = dataclasses.replace(nano.vision, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    return M3(dataclasses.replace(nano, text=text, vision=vision, projector_hidden_size=32), device=device)


def test_recall_is_one_for_the_best_blocks_and_low_for_the_worst():
    import torch

    torch.manual_seed(0)
    q, k = torch.randn(5, 4, 8), torch.randn(64, 2, 8)
    rows = torch.tensor([63, 62, 60, 50, 45])
    p = torch.einsum("nghd,mgd->ghnm", q.view(5, 2, 2, 8), k) * 8**-0.5
    p = p.masked_fill(torch.arange(64)[None] > rows[:, None], -float("inf")).softmax(-1).mean(1)
    mass = p.view(2, 5, 8, 8).sum(-1)
    best = mass.topk(3, -1).indices.int()
    assert compare.recall(q, k, rows, best, 8) == pytest.approx((1.0, 1.0))
    worst = (-mass[:, :, :6]).topk(3, -1).indices.int()
    block, score = compare.recall(q, k, rows, worst, 8)
    assert 0 <= score < 0.6
    assert block < 0.6
    one = best.clone()
    one[:, :, 1:] = -1
    assert compare.recall(q, k, rows, one, 8)[0] == pytest.approx(1 / 3)


def test_the_indexer_is_measured_in_every_sparse_layer():
    found = compare.recalls(tiny_model(), "1K", documents=1, queries=16)
    assert [layer["layer"] for layer in found] == [1]
    assert 0 < found[0]["block_recall"] < 1
    assert 0 < found[0]["score_recall"] <= 1


def test_the_three_runs_train_resume_and_leave_checkpoints(tmp_path, monkeypatch):
    import torch

    from openm3.checkpoint import load_model

    monkeypatch.setattr(recipe, "TOKENS", 2048)
    monkeypatch.setattr(recipe, "fresh_model", tiny_model)
    monkeypatch.setattr(recipe, "held_out_losses", lambda config: None)
    original = recipe.plan

    def small(name, steps=None):
        plan = original(name, steps)
        return recipe.replace(plan, config=recipe.replace(plan.config, workers=0, warmup_steps=1))

    monkeypatch.setattr(recipe, "plan", small)
    with pytest.raises(ValueError, match="train the run `full` first"):
        recipe.run("cpt", runs_dir=tmp_path, steps=4, device="cpu")
    recipe.run("full", runs_dir=tmp_path, steps=4, device="cpu", until=2)
    with pytest.raises(ValueError, match="holds a run already"):
        recipe.run("full", runs_dir=tmp_path, steps=4, device="cpu")
    full = recipe.run("full", runs_dir=tmp_path, steps=4, device="cpu", resume=True)
    cpt = recipe.run("cpt", runs_dir=tmp_path, steps=4, device="cpu")
    pt = recipe.run("pt", runs_dir=tmp_path, steps=4, device="cpu", weights=tmp_path / "weights")
    assert pt == tmp_path / "weights"
    sparse = [any(load_model(path).config.text.sparse_layers) for path in (full, cpt, pt)]
    assert sparse == [False, True, True]
    assert (cpt / "tokenizer.json").exists()
    before, after = load_model(tmp_path / "full" / recipe.BRANCH), load_model(cpt)
    assert not torch.equal(before.embed.weight, after.embed.weight)


def test_a_real_engine_sits_the_examination():
    import torch

    from openm3.engine import LLM
    from openm3.processing import Processor
    from openm3.train.recipes.nano.tokenizer import FILE

    torch.manual_seed(0)
    model = tiny_model().eval()
    llm = LLM.from_model(model, Processor.from_pretrained(FILE.parent, model.config), cache_tokens=20_000)
    rows = examination.evaluate(llm, ["picture: s", "clip: d", "adaptive", "dialogue"], cases=1, progress=False)
    assert [row.total for row in rows] == [1, 1, 1, 1, 3, 1]
    assert "CPU" in examination.device_name(llm)


def test_the_comparison_is_written_of_what_each_run_found(tmp_path):
    def row(name, right):
        return vars(examination.Row.of(Exam(name, None, 95), [True] * right + [False] * (100 - right), 100))

    result = {}
    for i, run in enumerate(compare.RUNS):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "loss": 2.0, "lr": 0.1, "stage": "train"}) + "\n"
        )
        indexer = [{"layer": 2, "block_recall": 0.5, "score_recall": 0.75}] if i else []
        result[run] = {"rows": [row("fact in 1K tokens", 97 + i)], "losses": {"loss": 0.5 + i}, "indexer": indexer,
                       "device": "a device"}  # fmt: skip
    compare.report(result, tmp_path, tmp_path / "out")
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == result
    assert (tmp_path / "out/comparison.md").read_text().splitlines() == [
        "| | Full | MSA-PT | MSA-CPT |",
        "| --- | ---: | ---: | ---: |",
        "| fact in 1K tokens, % | 97.00 | 98.00 | 99.00 |",
        "| loss: mean | 0.5000 | 1.5000 | 2.5000 |",
        "| block recall |  | 0.500 | 0.500 |",
        "| score recall |  | 0.750 | 0.750 |",
    ]
    for name in ("comparison.png", "losses.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
