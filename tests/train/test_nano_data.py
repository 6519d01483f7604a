"""The tasks: right answers by an independent check, pools kept apart, everything a function of the seed."""

import random
import re
import time

import numpy as np
import pytest
import torch
from nano_cases import answers, questions

from openm3.train.recipes.nano import (
    arithmetic,
    clips,
    corpus,
    dialogue,
    digits,
    retrieval,
)
from openm3.train.recipes.nano.case import Expect, phrase, slip
from openm3.train.recipes.nano.source import MIX, NanoSource
from openm3.train.recipes.nano.tasks import TASKS, exams
from openm3.train.recipes.nano.tokenizer import load


@pytest.mark.parametrize("name", TASKS)
def test_a_case_is_a_function_of_its_seed(name):
    one, same, other = (TASKS[name](random.Random(seed), "train") for seed in (5, 5, 6))
    assert questions(one) == questions(same)
    assert answers(one) == answers(same)
    assert one.raw == same.raw
    assert (one.raw, questions(one)) != (other.raw, questions(other))


def test_batches_are_a_function_of_seed_and_index():
    source = NanoSource(seed=3, tokens_per_batch=4096, grow=10)
    a, b, c = source.batch(4), NanoSource(3, 4096, grow=10).batch(4), source.batch(5)
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.pixel_values, b.pixel_values)
    assert not torch.equal(a.input_ids[:200], c.input_ids[:200])
    assert torch.equal(NanoSource(3, 4096, grow=10, first=4).batch(0).input_ids, a.input_ids)
    assert not torch.equal(NanoSource(3, 4096, grow=10, split="test").batch(4).input_ids[:200], a.input_ids[:200])


def test_every_batch_mixes_text_pictures_and_clips_and_is_full():
    source = NanoSource(seed=0, tokens_per_batch=16384, grow=100)
    for index in (0, 57, 1000):
        batch = source.batch(index)
        assert batch.pixel_values is not None
        assert batch.pixel_values_videos is not None
        assert 0.97 * 16384 < batch.tokens <= 16384
        assert batch.targets > 0.1 * batch.tokens


def test_documents_grow_along_the_run():
    source = NanoSource(seed=0, tokens_per_batch=65536, grow=100)
    lengths = [source.longest(index) for index in (0, 50, 99, 5000)]
    assert lengths == sorted(lengths)
    assert lengths[0] < 1200
    assert lengths[-1] == retrieval.LONGEST


def test_a_mix_with_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="painting"):
        NanoSource(0, 4096, mix={"painting": 1.0})
    assert sum(MIX.values()) == pytest.approx(1.0)


# --- pools -------------------------------------------------------------------------------------------------------


def test_360_scans_are_held_out_36_of_each_digit():
    train, test = (set(sum(digits.pool(split), ())) for split in ("train", "test"))
    assert len(test) == 360
    assert not train & test
    assert len(train | test) == 1797
    assert all(len(scans) == 36 for scans in digits.pool("test"))
    for split in ("train", "test"):
        used = {n for i in range(50) for n in digits.sample(random.Random(i), split).facts["scans"]}
        assert used <= (train if split == "train" else test)


def test_modules_are_held_out_and_no_text_is_in_both():
    train, test = corpus.docstrings("train"), corpus.docstrings("test")
    assert not {module for module, _ in train} & corpus.HELD_OUT
    assert {module for module, _ in test} <= corpus.HELD_OUT
    assert not {text for _, text in train} & {text for _, text in test}
    assert sum(len(text) for _, text in test) > 100_000
    long = retrieval.sample(random.Random(1), "test", "8K").facts["document"]
    paragraphs = {p for doc in retrieval.paragraphs("train") for p, _ in doc if len(p) > 80}
    assert not any(p in long for p in paragraphs)


def test_no_sum_is_in_both_splits():
    problems = {split: {p for i in range(300) for p in arithmetic.sample(random.Random(i), split).facts["problems"]}
                for split in ("train", "test")}  # fmt: skip
    assert not problems["train"] & problems["test"]
    assert all(arithmetic.held_out(a, "+", b) == arithmetic.held_out(b, "+", a) for a in range(40) for b in range(40))
    share = np.mean([arithmetic.held_out(a, "-", b) for a in range(0, 9999, 97) for b in range(0, 9999, 89)])
    assert 0.08 < share < 0.12


# --- answers -----------------------------------------------------------------------------------------------------


def run_scratchpad(text):
    """Follows the steps as an examiner would: every equation true, the result so far consistent."""
    head, steps = text.split(": ")
    operands = re.fullmatch(r"(\d+)([+-])(\d+)(=-\((\d+)-(\d+)\))?", head)
    a, op, b = int(operands[1]), operands[2], int(operands[3])
    if operands[4]:
        assert (int(operands[5]), int(operands[6])) == (b, a)
    so_far = ""
    for step in steps.split(" "):
        equation, result = step.split(">")
        left, right = equation.split("=")
        assert eval(left) == int(right)
        assert result.endswith(so_far)
        so_far = result
    return (-1 if operands[4] else 1) * int(so_far), (a + b if op == "+" else a - b)


@pytest.mark.parametrize("split", ["train", "test"])
def test_sums_and_scratchpads_are_right(split):
    for i in range(400):
        case = arithmetic.sample(random.Random(f"{split}{i}"), split)
        turns = [m for m in case.messages if m["role"] == "assistant"]
        for (a, op, b), turn, question in zip(case.facts["problems"], turns, questions(case)):
            assert int(turn["content"]) == (a + b if op == "+" else a - b)
            assert turn["content"] == str(int(turn["content"]))
            assert set(re.findall(r"\d+", question)) == {str(a), str(b)}
            thought = turn.get("reasoning_content")
            thinks = case.thinking == "enabled" or (case.thinking == "adaptive" and arithmetic.carries(a, op, b) > 0)
            assert bool(thought) == thinks
            if thought:
                found, expected = run_scratchpad(thought)
                assert found == expected == int(turn["content"])


@pytest.mark.parametrize(("a", "op", "b", "expected"), [
    (12, "+", 34, 0), (18, "+", 4, 1), (95, "+", 5, 2), (999, "+", 1, 3), (9999, "+", 1, 4),
    (34, "-", 12, 0), (30, "-", 1, 1), (1, "-", 30, 1), (1000, "-", 1, 3), (5, "-", 5, 0),
])  # fmt: skip
def test_carries_are_counted_by_place(a, op, b, expected):
    assert arithmetic.carries(a, op, b) == expected


def test_the_classes_of_adaptive_thinking_are_what_they_say():
    for i in range(100):
        for least, most in ((2, 9), (0, 0)):
            case = arithmetic.sample(random.Random(i), "test", "adaptive", least=least, most=most)
            assert least <= arithmetic.carries(*case.facts["problems"][0]) <= most


def test_what_moves_in_a_clip_moves_that_way():
    for i in range(150):
        case = clips.sample(random.Random(i), "test", "direction")
        frames = next(p["video"] for p in case.messages[-2]["content"] if p["type"] == "video").astype(int)
        change = np.abs(frames[-1] - frames[0]).sum(-1) > 60
        first, last = (np.abs(frames[k] - np.median(frames, 0)).sum(-1) * change for k in (0, -1))
        at = [np.array([(w.sum(1) @ np.arange(len(w))), (w.sum(0) @ np.arange(w.shape[1]))]) / max(1, w.sum())
              for w in (first, last)]  # fmt: skip
        step = at[1] - at[0]
        name = case.facts["direction"]
        axis, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}[name]
        assert step[axis] * sign > 4, (i, name, step)
        assert abs(step[axis]) > abs(step[1 - axis])


def test_what_happens_first_in_a_clip_happens_first():
    for i in range(100):
        case = clips.sample(random.Random(i), "test", "first")
        assert answers(case)[0].startswith(f"The {case.facts['actors'][0]} ")
        frames = next(p["video"] for p in case.messages[-2]["content"] if p["type"] == "video").astype(int)
        half = len(frames) // 2
        early = np.abs(frames[half - 1] - frames[0]).max()
        late = np.abs(frames[-1] - frames[half - 1]).max()
        assert late > 60
        assert early > 60 or case.facts["appear"]


@pytest.mark.parametrize("size", retrieval.SIZES)
def test_documents_have_their_length_and_hold_each_fact_once(size):
    for i in range(12):
        case = retrieval.sample(random.Random(i), "test", size)
        text, known = case.facts["document"], case.facts["facts"]
        assert abs(len(load().encode(text).ids) / retrieval.SIZES[size] - 1) < 0.05
        assert all(text.count(retrieval.state(fact)) == 1 for fact in known)
        assert len({(kind, entity) for kind, entity, _ in known}) == len(known)
        asked = [fact for fact in known if fact[0] in questions(case)[0].rpartition("\n\n")[2]
                 and fact[1] in questions(case)[0].rpartition("\n\n")[2]]  # fmt: skip
        assert answers(case)[0] in [retrieval.state(fact) for fact in asked]
        assert len(known) >= 4


def test_the_fact_asked_for_stands_anywhere():
    places = []
    for i in range(200):
        case = retrieval.sample(random.Random(i), "test", "1K")
        text = case.facts["document"]
        places.append(text.index(answers(case)[0]) / len(text))
    assert np.histogram(places, 5, (0, 1))[0].min() > 15


def test_dialogues_have_three_turns_one_about_the_picture():
    for i in range(100):
        case = dialogue.sample(random.Random(i), "test")
        assert len(answers(case)) == len(case.expects) == 3
        assert any(
            a not in dialogue.INTENTS and not a.startswith(("No, I cannot", "Yes, I can", "Hello, "))
            for a in answers(case)
        )


# --- scoring and wording -----------------------------------------------------------------------------------------


def test_digits_are_scored_place_by_place():
    expect = Expect("digits", "It is 407.")
    assert expect.digit_scores("It is 407.") == [True] * 3
    assert expect.digit_scores("It is 417.") == [True, False, True]
    assert expect.digit_scores("It is 47.") == [False] * 3
    assert expect.digit_scores("") == [False] * 3


def test_wording_varies_but_keeps_what_is_filled_in():
    rng = random.Random(0)
    texts = {phrase(rng, ("What colour is the {s}?",), s="TOVIK") for _ in range(200)}
    assert len(texts) > 15
    assert all("TOVIK" in text for text in texts)
    assert all("{s}" in slip(rng, "Name the colour of the {s}.") for _ in range(100))


def test_exams_cover_every_bar():
    rows = exams()
    assert len({row.name for row in rows}) == len(rows)
    bars = [row.bar for row in rows if row.bar is not None]
    assert (bars.count(95), bars.count(93), bars.count(92), bars.count(97)) == (9, 1, 3, 1)
    for row in rows:
        case = row.sample(random.Random(0))
        assert any(case.expects), row.name


def test_the_generators_rate_is_printed(capsys):
    source = NanoSource(seed=0, tokens_per_batch=32768)
    source.batch(0)
    start = time.process_time()
    tokens = sum(source.batch(index).tokens for index in (1, 2))
    with capsys.disabled():
        print(f" [{tokens / (time.process_time() - start):,.0f} tokens a CPU second] ", end="")
    assert tokens > 60_000
