"""The vocabulary and the template, and that the recipe's shortcut writes exactly what the processor writes."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openm3.config import NANO_SPECIALS, SPECIAL_TOKENS, M3Config
from openm3.processing import OutputParser, Processor
from openm3.processing.images import normalize_rows
from openm3.processing.images import patch_rows as processor_rows
from openm3.train.recipes.nano.evaluate import shown
from openm3.train.recipes.nano.render import learned, patch_rows, render, to_sample
from openm3.train.recipes.nano.tasks import TASKS
from openm3.train.recipes.nano.tokenizer import FILE, load
from openm3.train.recipes.nano.words import made_up

CONFIG = M3Config.preset("nano")


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(FILE.parent, CONFIG)


def test_the_committed_config_is_the_preset():
    assert json.loads((FILE.parent / "config.json").read_text()) == CONFIG.to_dict()
    generation = json.loads((FILE.parent / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["bos_token_id"]) == (
        CONFIG.text.eos_token_id,
        CONFIG.text.bos_token_id,
    )
    assert (generation["temperature"], generation["top_p"], generation["top_k"]) == (1.0, 0.95, 40)


def test_the_vocabulary_has_3072_ids_the_last_14_special():
    assert load().get_vocab_size() == CONFIG.text.vocab_size == 3072
    assert [load().token_to_id(token) for token in SPECIAL_TOKENS] == list(range(3058, 3072))
    assert all(load().encode(token).ids == [NANO_SPECIALS[token]] for token in SPECIAL_TOKENS)


def test_every_digit_is_a_token_of_its_own():
    for token in load().get_vocab():
        assert not any(c.isdigit() for c in token) or len(token) == 1 or token in SPECIAL_TOKENS, token


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_text_comes_back_as_it_was(text):
    ids = load().encode(text).ids
    if not any(token in text for token in SPECIAL_TOKENS):
        assert load().decode(ids, skip_special_tokens=False) == text


def test_a_made_up_word_has_the_same_pieces_wherever_it_stands():
    rng = random.Random(0)
    for _ in range(300):
        word = made_up(rng)
        bare = load().encode(word).tokens
        for before in ("<", '"', "_", "=", "\n"):
            tokens = load().encode(before + word + ">").tokens
            assert tokens[1:-1] == bare
        spaced = load().encode("x " + word).tokens[1:]
        assert spaced in (["Ġ", *bare], ["Ġ" + bare[0], *bare[1:]])


def conversations(seed: int, each: int):
    for name in TASKS:
        for i in range(each):
            case = TASKS[name](random.Random(f"{seed} {name} {i}"), "test" if name == "clips" else "train")
            if case.raw is None:
                yield case


def test_the_shortcut_gives_the_processors_tokens_loss_and_pixels(processor):
    for case in conversations(0, 12):
        fast = to_sample(case)
        slow = processor.prepare_training([shown(m) for m in case.messages], tools=case.tools, thinking=case.thinking)
        assert list(slow.input_ids) == list(fast.input_ids), case.task
        assert list(slow.loss_mask) == list(fast.loss_mask), case.task
        for theirs, ours in zip([*slow.images, *slow.videos], [*fast.images, *fast.videos], strict=True):
            assert torch.equal(theirs.pixels, normalize_rows(ours.rows))
            assert torch.equal(theirs.grid_thw, ours.grid_thw)


def test_a_prompt_is_the_beginning_of_what_was_learned(processor):
    for case in conversations(1, 6):
        last = [shown(m) for m in case.messages[:-1]]
        if case.thinking == "enabled" and not case.messages[-1].get("reasoning_content"):
            continue
        prompt = processor.prepare(last, tools=case.tools, thinking=case.thinking).input_ids
        sample = to_sample(case)
        assert list(sample.input_ids[: len(prompt)]) == list(prompt)
        assert all(sample.loss_mask[len(prompt) : -1])
        assert sample.input_ids[-2] == NANO_SPECIALS["[e~["]


def test_answers_parse_back_to_what_they_were(processor):
    for case in conversations(2, 12):
        for message in case.messages:
            if message["role"] != "assistant":
                continue
            text = render([message], None, case.thinking).rpartition("]~b]ai\n")[2].removesuffix("[e~[\n")
            if case.thinking == "enabled":
                text = text.removeprefix("<mm:think>")
            elif case.thinking == "disabled":
                text = text.removeprefix("</mm:think>")
            parser = OutputParser(case.tools, case.thinking)
            events = [*parser.feed(text), *parser.finish()]
            calls = [(e.name, e.arguments) for e in events if hasattr(e, "arguments")]
            content = "".join(e.text for e in events if type(e).__name__ == "ContentDelta")
            thought = "".join(e.text for e in events if type(e).__name__ == "ThinkingDelta")
            expected = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            assert calls == expected
            assert content.strip() == message["content"].strip()
            assert thought == message.get("reasoning_content", "")


def test_the_template_follows_m3s_order(processor):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    calls = [{"id": str(i), "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(2)]
    messages = [
        {"role": "root", "content": "ROOT"},
        {"role": "system", "content": "SYSTEM"},
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "second"},
        {"role": "tool", "tool_call_id": "0", "content": "first"},
        {"role": "assistant", "content": "done", "reasoning_content": "think"},
    ]
    text = processor.prepare(messages, tools=tools, thinking="enabled").text
    ns = "]<]minimax[>["
    invoke = f'{ns}<invoke name="f">{ns}</invoke>\n'
    assert text == (
        "]~!b[]~b]system\nROOT\nThinking: enabled.[e~[\n"
        "]~b]developer\nSYSTEM\nTools:\n"
        '<tool>{"name": "f", "parameters": {"type": "object", "properties": {}}}</tool>\n'
        f"Call: {ns}<tool_call>[e~[\n]~b]user\nask[e~[\n"
        f"]~b]ai\n</mm:think>{ns}<tool_call>\n{invoke}{invoke}{ns}</tool_call>[e~[\n"
        "]~b]tool\n<response>first</response>\n<response>second</response>[e~[\n"
        "]~b]ai\n<mm:think>think</mm:think>done[e~[\n]~b]ai\n<mm:think>"
    )
    for mode, mark in (("adaptive", ""), ("disabled", "</mm:think>")):
        assert processor.prepare(messages[2:3], thinking=mode).text.endswith(f"]~b]ai\n{mark}")


def test_patch_rows_are_the_processors():
    frames = np.random.default_rng(0).integers(0, 256, (5, 56, 84, 3), np.uint8)
    theirs = processor_rows(torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert np.array_equal(patch_rows(frames), theirs.numpy())


def test_forgotten_thinking_is_not_learned():
    def case(i):
        return TASKS["pictures"](random.Random(i), "train", turns=3)

    for i in range(40):
        whole = to_sample(case(i))
        for seed in range(6):
            part = to_sample(case(i), random.Random(seed))
            if len(part.input_ids) < len(whole.input_ids):
                assert case(i).thinking in ("enabled", "adaptive")
                assert 0 < sum(part.loss_mask) < sum(whole.loss_mask)
                return
    raise AssertionError("no thinking was forgotten")


def test_only_the_assistants_turns_are_learned():
    text = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, "adaptive")
    ids = load().encode(text).ids
    kept = [i for i, mask in zip(ids, learned(ids, "adaptive")) if mask]
    assert load().decode(kept, skip_special_tokens=False) == "</mm:think>b[e~["
    kept = [i for i, mask in zip(ids, learned(ids, "disabled")) if mask]
    assert load().decode(kept, skip_special_tokens=False) == "b[e~["
