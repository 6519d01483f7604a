"""/v1/responses through OpenAI's own client, unmodified, on the bundled model."""

from __future__ import annotations

import json

import openai
import pytest
from serving import ASK_WEATHER, PARIS, RESULT, WEATHER, data_url

NANO = {"model": "openm3-nano", "temperature": 0}
HARD, OFF = {"effort": "high"}, {"effort": "none"}
TOOL = {"type": "function", "strict": False, **WEATHER["function"]}


def test_a_question_is_answered_with_its_reasoning(client):
    answer = client.responses.create(**NANO, input="What is 478 + 356?", reasoning=HARD, instructions="Calculate.")
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text
    assert "834" in answer.output_text
    assert answer.status == "completed"
    usage = answer.usage
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_stream_builds_the_same_response(client):
    whole = client.responses.create(**NANO, input="What is 478 + 356?", reasoning=HARD)
    with client.responses.stream(**NANO, input="What is 478 + 356?", reasoning=HARD) as stream:
        events = list(stream)
        built = stream.get_final_response()
    assert built.output_text == whole.output_text
    assert built.output[0].content[0].text == whole.output[0].content[0].text
    assert built.usage.output_tokens == whole.usage.output_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text


def test_a_picture_is_seen(client):
    content = [{"type": "input_image", "image_url": data_url("shapes.png", "image/png"), "detail": "auto"},
               {"type": "input_text", "text": "What colour is the star?"}]  # fmt: skip
    answer = client.responses.create(**NANO, input=[{"role": "user", "content": content}])
    assert answer.output_text == "It is orange."


def test_a_tool_is_called_and_its_result_read_with_the_items_sent_back(client):
    items = [{"role": "user", "content": ASK_WEATHER}]
    answer = client.responses.create(**NANO, input=items, tools=[TOOL], reasoning=HARD)
    call = answer.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", PARIS)
    with client.responses.stream(**NANO, input=items, tools=[TOOL], reasoning=HARD) as stream:
        assert json.loads(stream.get_final_response().output[-1].arguments) == PARIS
    items += [item.model_dump(exclude_none=True) for item in answer.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": RESULT})
    last = client.responses.create(**NANO, input=items, tools=[TOOL], reasoning=HARD)
    assert "21" in last.output_text


def test_a_conversation_goes_on(client):
    first = client.responses.create(**NANO, input="What is 1 + 1?", reasoning=OFF)
    items = [{"role": "user", "content": "What is 1 + 1?"}, *[item.model_dump() for item in first.output],
             {"role": "user", "content": "What is 2 + 3?"}]  # fmt: skip
    assert "5" in client.responses.create(**NANO, input=items, reasoning=OFF).output_text


def test_a_cut_off_answer_is_incomplete(client):
    answer = client.responses.create(**NANO, input="Hello!", max_output_tokens=2, reasoning=OFF)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize(("change", "said"), [
    ({"input": []}, "messages: empty"),
    ({"input": [{"type": "computer_call"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}]}, "must be a data"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "must hold a url"),
])  # fmt: skip
def test_a_mistake_is_told(client, change, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({**NANO, "input": "Hello!"} | change))
    assert said in caught.value.body["message"]
