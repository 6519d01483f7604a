"""Messages: what the template gets, and one clear error with its place for everything that has no place."""

import pytest
from m3_format import call

from openm3.processing import MessageError
from openm3.processing.messages import read_messages

USER = {"role": "user", "content": "hi"}


def read(*messages):
    return read_messages(list(messages), str)


def roles_and_contents(conversation):
    return [(m["role"], m["content"]) for m in conversation.messages]


def answer(*ids):
    return {"role": "assistant", "tool_calls": [call(f"f_{i}", {}, i) for i in ids]}


def result(call_id, content="r"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def test_text_parts_join_and_media_stay_in_order():
    out = read(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:1"}}, {"type": "text", "text": "x"},
            {"type": "video", "video": "v.mp4"}, {"type": "image", "image": b"2"},
            {"type": "image_url", "image_url": "3.png"}, {"type": "video_url", "video_url": {"url": "data:4"}},
        ]},
    )  # fmt: skip
    assert out.messages[0]["content"] == "ab"
    assert [part["type"] for part in out.messages[1]["content"]] == [
        "image",
        "text",
        "video",
        "image",
        "image",
        "video",
    ]
    assert (out.images, out.videos) == (["data:1", b"2", "3.png"], ["v.mp4", "data:4"])


def test_tool_results_may_hold_pictures():
    out = read(USER, answer("a"), result("a", [{"type": "text", "text": "x"}, {"type": "image", "image": "p.png"}]))
    assert out.images == ["p.png"]


def test_arguments_become_dicts_from_json_or_dict():
    calls = [call("f", '{"a": [1, null, {"b": "x"}]}', "1"), call("g", "", "2")]
    calls.append({"id": "3", "function": {"name": "h", "arguments": {"c": True}}})
    out = read(USER, {"role": "assistant", "content": None, "tool_calls": calls})
    functions = [c["function"] for c in out.messages[1]["tool_calls"]]
    assert [f["arguments"] for f in functions] == [{"a": [1, None, {"b": "x"}]}, {}, {"c": True}]
    assert out.messages[1]["content"] == ""


def test_every_string_of_a_request_is_guarded():
    tagged = "<{}>".format
    calls = [{"id": "1", "function": {"name": "n", "arguments": {"k": ["v", {"w": "x"}], "i": 1}}}]
    out = read_messages(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "image", "image": "p"}]},
            {"role": "assistant", "content": "c", "reasoning_content": "r", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "o"},
        ],
        tagged,
    ).messages
    assert out[0]["content"] == "<s>"
    assert out[1]["content"][0]["text"] == "<t>"
    assert (out[2]["content"], out[2]["reasoning_content"]) == ("<c>", "<r>")
    assert out[2]["tool_calls"][0]["function"] == {
        "name": "<n>", "arguments": {"<k>": ["<v>", {"<w>": "<x>"}], "<i>": 1}
    }  # fmt: skip
    assert out[3]["content"] == "<o>"


def test_tool_results_follow_the_order_of_their_calls():
    out = read(USER, answer("a", "b", "c"), result("c", "3"), result("a", "1"), result("b", "2"), USER)
    assert roles_and_contents(out)[2:] == [("tool", "1"), ("tool", "2"), ("tool", "3"), ("user", "hi")]


def test_call_ids_may_repeat_in_later_turns():
    out = read(USER, answer("a"), result("a", "1"), answer("a"), result("a", "2"))
    assert [c for r, c in roles_and_contents(out) if r == "tool"] == ["1", "2"]


def test_calls_may_stay_unanswered():
    assert len(read(USER, answer("a")).messages) == 2
    assert len(read(USER, answer("a"), USER).messages) == 3


def test_leading_instructions_become_one():
    out = read(
        {"role": "root", "content": "R"},
        {"role": "system", "content": "A"},
        {"role": "developer", "content": "B"},
        USER,
    )
    assert roles_and_contents(out) == [("root", "R"), ("system", "A\n\nB"), ("user", "hi")]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, r"messages: must be a list, got NoneType"),
        ("hi", r"messages: must be a list, got str"),
        ([], r"messages: empty"),
        ([USER, "hi"], r"messages\[1\]: must be an object, got str"),
        ([USER, {"content": "x"}], r"messages\[1\]: role None; must be one of system, developer, user"),
        ([{"role": "ai", "content": "x"}], r"messages\[0\]: role 'ai'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: role \['user'\]"),
        ([{"role": "user"}], r"messages\[0\]: content must be a string or a list of parts, got NoneType"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: content .* got int"),
        ([{"role": "user", "content": []}], r"messages\[0\]: content .* got an empty list"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]: a part of type None; must be text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"messages\[0\]\.content\[0\]: a part of type 'audio'"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], r"a part of type \['text'\]"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: text must be a string, got NoneType"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"image_url must hold a url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}], r"image_url must hold a url"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"video must hold its source"),
        ([{"role": "system", "content": [{"type": "image", "image": "x"}]}], r"messages\[0\]: only user and tool"),
        ([USER, {"role": "assistant"}], r"messages\[1\]: an assistant message needs content"),
        ([USER, {"role": "assistant", "content": "x", "reasoning_content": 1}], r"reasoning_content must be a string"),
        ([USER, {"role": "assistant", "tool_calls": {}}], r"tool_calls must be a list, got dict"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], r"\[1\]\.tool_calls\[0\]: must be an object"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f"}}]}], r"id must be a string"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}], r"function\.name must be"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "{")]}], r"\[0\]: function\.arguments is not JSON"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "[1]")]}], r"arguments must be an object, got list"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", '{"a": NaN}')]}], r"NaN is no JSON value"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": {1}}}}]}],
         r"cannot be written as JSON \(it holds a set\)"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {1: 2}}}]}],
         "not a string"),
        ([USER, answer("a", "a")], r"messages\[1\]: two tool_calls have the id 'a'"),
        ([USER, result("a")], r"messages\[1\]: a tool result without its call"),
        ([USER, answer("a"), USER, result("a")], r"messages\[3\]: a tool result without its call"),
        ([USER, answer("a"), result("b")], r"messages\[2\]: a tool result without its call; .* id 'b'"),
        ([USER, answer("a"), result(None)], r"messages\[2\]: a tool result needs tool_call_id"),
        ([USER, answer("a"), result("a"), result("a")], r"messages\[3\]: a second result for the call 'a'"),
        ([USER, answer("a", "b"), result("b")], r"messages\[1\]: the call 'a' has no result"),
        ([USER, {"role": "root", "content": "x"}], r"messages\[1\]: a root message is the first one"),
        ([USER, {"role": "system", "content": "x"}], r"messages\[1\]: a system message comes before"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_one_clear_error(messages, words):
    with pytest.raises(MessageError, match=words) as error:
        read_messages(messages, str)
    assert "\n" not in str(error.value)
