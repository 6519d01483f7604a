"""/v1/messages through Anthropic's own client, unmodified, on the bundled model."""

from __future__ import annotations

import base64
import json

import anthropic
import pytest
from serving import ASK_WEATHER, EXAMPLES, PARIS, RESULT, WEATHER

NANO = {"model": "openm3-nano", "max_tokens": 300, "extra_body": {"temperature": 0}}
SUM = [{"role": "user", "content": "What is 478 + 356?"}]
ENABLED, DISABLED = {"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}
TOOL = {"name": "get_weather", "description": "Get the weather.", "input_schema": WEATHER["function"]["parameters"]}


def test_a_question_is_thought_about_and_answered(claude):
    answer = claude.messages.create(**NANO, messages=SUM, thinking=ENABLED)
    thought, text = answer.content
    assert (thought.type, text.type, answer.stop_reason, answer.role) == ("thinking", "text", "end_turn", "assistant")
    assert thought.thinking
    assert "834" in text.text
    counted = claude.messages.count_tokens(model="openm3-nano", messages=SUM, thinking=ENABLED).input_tokens
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    assert usage.output_tokens > 5


def test_a_stream_builds_the_same_message(claude):
    whole = claude.messages.create(**NANO, messages=SUM, thinking=ENABLED)
    with claude.messages.stream(**NANO, messages=SUM, thinking=ENABLED) as stream:
        kinds = [event.type for event in stream]
        built = stream.get_final_message()
    assert [block.model_dump() for block in built.content] == [block.model_dump() for block in whole.content]
    assert (built.stop_reason, built.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_a_conversation_goes_on_with_its_thoughts(claude):
    first = claude.messages.create(**NANO, messages=SUM, thinking=ENABLED, system="You are a calculator.")
    messages = [*SUM, {"role": "assistant", "content": first.content}, {"role": "user", "content": "What is 2 + 3?"}]
    system = [{"type": "text", "text": "You are a calculator.", "cache_control": {"type": "ephemeral"}}]
    second = claude.messages.create(**NANO, messages=messages, thinking=DISABLED, system=system)
    assert [block.type for block in second.content] == ["text"]
    assert "5" in second.content[0].text


def test_a_picture_is_seen(claude):
    data = base64.b64encode((EXAMPLES / "shapes.png").read_bytes()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What colour is the star?"}]
    answer = claude.messages.create(**NANO, messages=[{"role": "user", "content": content}])
    assert answer.content[-1].text == "It is orange."


def test_a_tool_is_called_and_its_result_read(claude):
    messages = [{"role": "user", "content": ASK_WEATHER}]
    answer = claude.messages.create(**NANO, messages=messages, tools=[TOOL])
    assert answer.stop_reason == "tool_use"
    call = answer.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", PARIS)
    with claude.messages.stream(**NANO, messages=messages, tools=[TOOL]) as stream:
        assert stream.get_final_message().content[-1].input == PARIS
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": RESULT}]}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    last = claude.messages.create(**NANO, messages=messages, tools=[TOOL])
    assert "21" in last.content[-1].text


def test_a_stop_sequence_and_the_limit_are_told_apart(claude):
    stopped = claude.messages.create(**NANO, messages=SUM, thinking=DISABLED, stop_sequences=["zebra", "4"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "4")
    cut = claude.messages.create(**(NANO | {"max_tokens": 1}), messages=SUM, thinking=DISABLED)
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 1)


@pytest.mark.parametrize(("change", "kind", "said"), [
    ({"model": "claude-9"}, "not_found_error", "openm3-nano"),
    ({"messages": []}, "invalid_request_error", "messages: empty"),
    ({"max_tokens": 0}, "invalid_request_error", "max_tokens = 0"),
    ({"extra_body": {"temperature": 2, "top_p": 7}}, "invalid_request_error", "top_p = 7"),
    ({"extra_body": {"top_q": 1}}, "invalid_request_error", "top_q: unknown field"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "invalid_request_error", "this server runs none"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "1"}]}]},
     "invalid_request_error", "a tool result without its call"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "/etc/passwd"}}]}]},
     "invalid_request_error", "must be a data: URL"),
])  # fmt: skip
def test_a_mistake_is_told_in_anthropics_shape(claude, change, kind, said):
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.messages.create(**({**NANO, "messages": SUM} | change))
    body = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert said in body["error"]["message"]
    assert caught.value.request_id == body["request_id"]


def test_a_call_that_must_come_comes_and_an_answer_fits_its_schema(claude):
    greeting = [{"role": "user", "content": "Hello!"}]
    must = claude.messages.create(**NANO, messages=greeting, tools=[TOOL], tool_choice={"type": "any"})
    assert must.stop_reason == "tool_use"
    assert isinstance(must.content[-1].input["city"], str)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    shape = {"format": {"type": "json_schema", "schema": schema}}
    answer = claude.messages.create(**NANO, messages=greeting, output_config=shape, thinking=DISABLED)
    assert json.loads(answer.content[0].text)["ok"] in (True, False)
