"""/v1/completions through OpenAI's own client, unmodified, on the bundled model."""

from __future__ import annotations

import openai
import pytest

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
