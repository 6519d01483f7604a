"""/v1/chat/completions through OpenAI's own client, unmodified, on the bundled model."""

from __future__ import annotations

import json

import openai
import pytest
from serving import ASK_WEATHER, PARIS, RESULT, WEATHER, data_url

NANO = {"model": "openm3-nano", "temperature": 0}
SUM = [{"role": "user", "content": "What is 478 + 356?"}]


def test_a_question_is_answered_and_counted(client):
    answer = client.chat.completions.create(**NANO, messages=SUM, reasoning_effort="high")
    [choice] = answer.choices
    assert "834" in choice.message.content
    assert choice.message.reasoning_content
    assert choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert answer.model == "openm3-nano"


def test_a_stream_gives_the_same_answer_piece_by_piece(client):
    whole = client.chat.completions.create(**NANO, messages=SUM, reasoning_effort="high").choices[0].message
    chunks = list(client.chat.completions.create(**NANO, messages=SUM, reasoning_effort="high", stream=True,
                                                 stream_options={"include_usage": True}))  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.content
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == whole.reasoning_content
    assert len(deltas) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 5
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("switch", [
    {"reasoning_effort": "none"}, {"extra_body": {"thinking": {"type": "disabled"}}},
    {"extra_body": {"chat_template_kwargs": {"thinking_mode": "disabled"}}},
    {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, {"extra_body": {"enable_thinking": False}},
])  # fmt: skip
def test_every_spelling_turns_thinking_off(client, switch):
    answer = client.chat.completions.create(**NANO, messages=SUM, **switch)
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_picture_and_a_video_are_seen(client):
    picture = {"type": "image_url", "image_url": {"url": data_url("shapes.png", "image/png"), "detail": "high"}}
    question = {"type": "text", "text": "What colour is the star?"}
    answer = client.chat.completions.create(**NANO, messages=[{"role": "user", "content": [picture, question]}])
    video = {"type": "video_url", "video_url": {"url": data_url("star.mp4", "video/mp4"), "fps": 1, "max_frames": 8}}
    question = {"type": "text", "text": "Which way does it move?"}
    clip = client.chat.completions.create(**NANO, messages=[{"role": "user", "content": [video, question]}])
    assert (answer.choices[0].message.content, clip.choices[0].message.content) == (
        "It is orange.",
        "It moves to the right.",
    )


def test_a_tool_is_called_and_its_result_read(client):
    messages = [{"role": "user", "content": ASK_WEATHER}]
    answer = client.chat.completions.create(**NANO, messages=messages, tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == PARIS
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    last = client.chat.completions.create(**NANO, messages=messages, tools=[WEATHER]).choices[0]
    assert "21" in last.message.content


def test_a_streamed_call_is_whole(client):
    stream = client.chat.completions.create(**NANO, tools=[WEATHER], stream=True,
                                            messages=[{"role": "user", "content": ASK_WEATHER}])  # fmt: skip
    deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(d.index, d.function.name, json.loads(d.function.arguments)) for d in deltas] == [(0, "get_weather", PARIS)]


def test_several_answers_have_seeds_of_their_own(client):
    options = {"model": "alias", "messages": [{"role": "user", "content": "Tell me about yourself."}], "max_tokens": 12,
               "temperature": 3, "top_p": 1, "reasoning_effort": "none"}  # fmt: skip
    three = client.chat.completions.create(**options, n=3, seed=5)
    alone = client.chat.completions.create(**options, seed=5)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts[0] == alone.choices[0].message.content
    assert len(set(texts)) > 1
    assert three.usage.completion_tokens > alone.usage.completion_tokens
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, n=3, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_and_length_end_an_answer(client):
    short = client.chat.completions.create(**NANO, messages=SUM, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    stopped = client.chat.completions.create(**NANO, messages=SUM, stop="4", reasoning_effort="none")
    assert (stopped.choices[0].finish_reason, "4" in stopped.choices[0].message.content) == ("stop", False)


@pytest.mark.parametrize(("change", "status", "said"), [
    ({"model": "gpt-9"}, 404, "openm3-nano"),
    ({"messages": []}, 400, "messages: empty"),
    ({"temperature": -1}, 400, "temperature = -1.0"),
    ({"temperature": "hot"}, 400, "temperature: "),
    ({"n": 99}, 400, "n = 99"),
    ({"extra_body": {"temprature": 1}}, 400, "temprature: unknown field"),
    ({"extra_body": {"chat_template_kwargs": {"thinking_mode": "deep"}}}, 400, "thinking mode 'deep'"),
    ({"reasoning_effort": "heroic"}, 400, "reasoning_effort 'heroic'"),
    ({"messages": [{"role": "user", "content": "word " * 20000}]}, 400, "max_position_embeddings"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages[0].content[0]"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0]"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
])  # fmt: skip
def test_a_mistake_is_told_in_openais_shape(client, change, status, said):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**({**NANO, "messages": SUM} | change))
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert said in caught.value.body["message"]
    assert caught.value.request_id.startswith("req_")


def test_no_path_of_a_client_is_ever_opened(client):
    for url in ("/etc/passwd", "file:///etc/passwd", "../shapes.png", "ftp://example.com/a.png"):
        for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image", "image": url}):
            with pytest.raises(openai.BadRequestError, match="must be") as caught:
                client.chat.completions.create(**NANO, messages=[{"role": "user", "content": [part]}])
            assert "no such file" not in str(caught.value)


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["openm3-nano", "alias"]
    assert client.models.retrieve("alias").max_model_len == 12288
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


# -- what the answer is held to --------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "things", "schema": SCHEMA, "strict": True}}
WILD = {"model": "openm3-nano", "temperature": 2, "top_p": 1, "max_tokens": 400}


@pytest.mark.parametrize("mode", ["enabled", "adaptive", "disabled"])
def test_an_answer_fits_its_schema_in_every_mode(client, mode):
    options = {"extra_body": {"thinking": {"type": mode, "budget_tokens": 20}, "top_k": 0}, "seed": 4}
    answer = client.chat.completions.create(**WILD, messages=SUM, response_format=FORMAT, **options)
    choice = answer.choices[0]
    found = json.loads(choice.message.content)
    assert set(found) == {"colour", "count"}
    assert found["colour"] in ("red", "blue")
    assert found["count"] in range(10)
    assert choice.finish_reason == "stop"
    assert hasattr(choice.message, "reasoning_content") is (mode == "enabled") or mode == "adaptive"


def test_a_choice_a_regex_and_any_object_are_kept_to(client):
    def ask(**more) -> str:
        return client.chat.completions.create(**WILD, messages=SUM, reasoning_effort="none", seed=1, **more).choices[
            0
        ].message.content  # fmt: skip

    assert ask(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")
    assert ask(extra_body={"structured_outputs": {"regex": "[A-C]{3}-[0-9]{2}"}})[3] == "-"
    assert isinstance(json.loads(ask(response_format=FORMAT)), dict)
    with pytest.raises(openai.BadRequestError, match="one of json, regex and choice"):
        ask(extra_body={"structured_outputs": {}})
    with pytest.raises(openai.BadRequestError, match="grammar"):
        ask(extra_body={"structured_outputs": {"regex": "("}})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("effort", ["none", "medium"])
def test_a_call_that_must_come_comes(client, choice, effort):
    answer = client.chat.completions.create(
        model="openm3-nano", messages=[{"role": "user", "content": "Hello!"}], tools=[WEATHER], tool_choice=choice,
        reasoning_effort=effort, max_tokens=300, seed=2, parallel_tool_calls=False,
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert isinstance(arguments["city"], str)
    assert arguments.get("unit", "celsius") in ("celsius", "fahrenheit")
    assert answer.choices[0].finish_reason == "tool_calls"


def test_no_call_comes_where_none_is_wanted(client):
    question = [{"role": "user", "content": ASK_WEATHER}]
    answer = client.chat.completions.create(**NANO, messages=question, tools=[WEATHER], tool_choice="none",
                                            max_tokens=60)  # fmt: skip
    assert answer.choices[0].message.tool_calls is None


def test_thinking_ends_at_its_budget(client):
    def thought(budget: int) -> int:
        answer = client.chat.completions.create(
            **NANO, messages=SUM, extra_body={"thinking": {"type": "enabled", "budget_tokens": budget}}
        )
        assert answer.choices[0].message.content
        return answer.usage.completion_tokens_details.reasoning_tokens

    assert thought(5) <= 6 < thought(500)


def test_logprobs_are_those_of_the_content(client):
    options = NANO | {"messages": SUM, "reasoning_effort": "none", "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**options).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert token.logprob <= 0
        assert token.top_logprobs[0].token == token.token  # greedy
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
    streamed = [token for chunk in client.chat.completions.create(**options, stream=True)
                if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]  # fmt: skip
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_bias_and_penalties_are_heard(client, llm):
    ids = {llm.processor.tokenizer.encode("4")[0]: -100}
    answer = client.chat.completions.create(**NANO, messages=SUM, reasoning_effort="none", logit_bias=ids)
    assert "4" not in answer.choices[0].message.content


def test_a_second_turn_reuses_the_first(client):
    talk = [{"role": "user", "content": "Some words to remember, one after the other. " * 12}]
    first = client.chat.completions.create(**NANO, messages=talk, max_tokens=8, reasoning_effort="none")
    talk += [first.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(**NANO, messages=talk, max_tokens=2, reasoning_effort="none")
    assert second.usage.prompt_tokens_details.cached_tokens > 0.8 * first.usage.prompt_tokens
