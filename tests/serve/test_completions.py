"""/v1/completions through OpenAI's own client, unmodified, on the bundled model."""

from __future__ import annotations

from itertools import chain

import openai
import pytest

from openm3.engine import SamplingParams

NANO = {"model": "openm3-nano", "temperature": 0}
TEXT = "The colour of the"


def test_texts_and_ids_are_continued_prompt_by_prompt(client, llm):
    expected = llm.processor.tokenizer
    ids = expected.encode(TEXT)
    one = client.completions.create(**NANO, prompt=TEXT, max_tokens=6)
    [choice] = one.choices
    assert choice.text
    assert (choice.finish_reason, one.usage.completion_tokens, one.usage.prompt_tokens) == ("length", 6, len(ids))
    several = client.completions.create(**NANO, prompt=[ids, expected.encode("Hello")], max_tokens=6, n=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert [c.text for c in several.choices[:2]] == [choice.text] * 2
    assert several.choices[2].text != choice.text
    assert several.usage.prompt_tokens == len(ids) + len(expected.encode("Hello"))


def test_an_echo_is_the_prompt_and_no_token_need_follow(client):
    echoed = client.completions.create(**NANO, prompt=TEXT, max_tokens=4, echo=True)
    plain = client.completions.create(**NANO, prompt=TEXT, max_tokens=4)
    assert echoed.choices[0].text == TEXT + plain.choices[0].text
    nothing = client.completions.create(**NANO, prompt=TEXT, max_tokens=0, echo=True)
    assert (nothing.choices[0].text, nothing.usage.completion_tokens) == (TEXT, 0)


def test_a_stream_gives_the_same_text(client):
    whole = client.completions.create(**NANO, prompt=[TEXT, "Hello"], max_tokens=8)
    texts = ["", ""]
    for chunk in client.completions.create(**NANO, prompt=[TEXT, "Hello"], max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(("change", "said"), [
    ({"prompt": []}, "prompt: empty"), ({"prompt": ""}, "the prompt is empty"), ({"prompt": [999999]}, "token 999999"),
    ({"prompt": [[1], "a"]}, "prompt"), ({"suffix": "end"}, "suffix"), ({"best_of": 3}, "best_of"),
    ({"logprobs": 99}, "logprobs"), ({"max_tokens": -1}, "max_tokens"),
])  # fmt: skip
def test_a_mistake_is_told(client, change, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**({**NANO, "prompt": TEXT} | change))
    assert said in caught.value.body["message"]


def test_an_echoed_text_is_scored_as_lm_eval_reads_it(client, llm):
    ids = llm.processor.tokenizer.encode(TEXT)
    scored = client.completions.create(**NANO, prompt=[ids], max_tokens=1, logprobs=1, echo=True, seed=1).choices[0]
    logprobs = scored.logprobs
    count = len(ids) + 1
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == count
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert "".join(logprobs.tokens) == scored.text
    assert [scored.text[start:][: len(token)] for start, token in zip(logprobs.text_offset, logprobs.tokens)] == (
        logprobs.tokens
    )
    [own] = llm.generate(TEXT, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, logprobs=1))
    expected = [record.logprob for record in (*own.prompt_logprobs[1:], *own.logprobs)]
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    best = [max(top, key=top.get) for top in logprobs.top_logprobs[1:]]
    assert best[-1] == logprobs.tokens[-1]  # greedy
    alone = client.completions.create(**NANO, prompt=[ids], max_tokens=0, logprobs=1, echo=True).choices[0]
    assert alone.logprobs.token_logprobs[1:] == pytest.approx(expected[:-1], abs=1e-4)


def test_an_answer_that_ends_shows_the_token_that_ended_it(client):
    asked = "]~b]user\nWhat is 59 + 63?[e~[\n]~b]ai\n</mm:think>"
    [choice] = client.completions.create(**NANO, prompt=asked, max_tokens=9, logprobs=0).choices
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens[-1]) == ("122", "stop", "[e~[")
    assert choice.logprobs.token_logprobs[-1] > -0.1
    one_more = client.completions.create(**NANO, prompt=asked + "122", max_tokens=1, logprobs=0, echo=True).choices[0]
    assert one_more.logprobs.tokens[-1] == "[e~["  # where it ends at once too: one token was asked for, one is scored


def test_streamed_logprobs_are_those_of_the_whole_answer(client):
    options = NANO | {"prompt": TEXT, "max_tokens": 8, "logprobs": 2}
    whole = client.completions.create(**options).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert list(chain(*(getattr(chunk, name) for chunk in chunks))) == getattr(whole, name)


def test_an_answer_is_held_to_a_choice(client):
    answer = client.completions.create(
        **NANO, prompt=TEXT, extra_body={"structured_outputs": {"choice": ["cat", "dog"]}}
    )
    assert answer.choices[0].text in ("cat", "dog")
