"""Generated text as events: M3's format, what checkpoints really emit instead, and what is no call at all."""

import time

import pytest
from m3_format import NS, block, invoke
from parser_cases import CALL, DEVIATIONS, FORMAT, NO_CALLS, PARIS, THINKING, TOOLS, ns

from openm3.processing import ContentDelta, OutputParser, ThinkingDelta, ToolCall


def events(text, thinking="disabled", tools=TOOLS):
    parser = OutputParser(tools, thinking)
    return parser.feed(text) + parser.finish()


def merged(all_events):
    out = []
    for event in all_events:
        if out and type(out[-1]) is type(event) and not isinstance(event, ToolCall):
            out[-1] = type(event)(out[-1].text + event.text)
        else:
            out.append(event)
    return out


def in_pieces(text, cuts, thinking="disabled", tools=TOOLS):
    parser = OutputParser(tools, thinking)
    edges = [0, *sorted(cuts), len(text)]
    out = [event for a, b in zip(edges, edges[1:]) for event in parser.feed(text[a:b])]  # noqa: RUF007
    return merged(out + parser.finish())


def shown(all_events):
    """Events in short: ("think", text), ("say", text), ("call", name, arguments)."""
    return [
        ("call", e.name, e.arguments)
        if isinstance(e, ToolCall)
        else ("think" if isinstance(e, ThinkingDelta) else "say", e.text)
        for e in merged(all_events)
    ]


def read(text, thinking="disabled", tools=TOOLS):
    return shown(events(ns(text), thinking, tools))


def meant(expected):
    return [tuple(ns(part) if isinstance(part, str) else part for part in event) for event in expected]


@pytest.mark.parametrize(("thinking", "text", "expected"), THINKING)
def test_thinking_is_told_from_content(thinking, text, expected):
    assert read(text, thinking) == meant(expected)


@pytest.mark.parametrize("name", FORMAT)
def test_the_format_is_read(name):
    text, expected = FORMAT[name]
    assert read(text) == expected


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviations_with_one_meaning_are_read(name):
    text, expected = DEVIATIONS[name]
    assert read(text) == meant(expected)


@pytest.mark.parametrize("name", NO_CALLS)
def test_what_is_no_call_comes_out_as_content(name):
    assert read(NO_CALLS[name]) == [("say", ns(NO_CALLS[name]))]


ALL = {name: case[0] for name, case in (FORMAT | DEVIATIONS).items()} | NO_CALLS


@pytest.mark.parametrize("name", ALL)
def test_every_split_gives_the_same_events(name):
    text = ns(ALL[name])
    whole = merged(events(text))
    assert in_pieces(text, range(1, len(text))) == whole
    for cut in range(1, len(text), 1 if len(text) < 400 else 7):
        assert in_pieces(text, [cut]) == whole


@pytest.mark.parametrize(("thinking", "text", "expected"), THINKING)
def test_every_split_of_thinking_gives_the_same_events(thinking, text, expected):
    whole = merged(events(ns(text), thinking))
    assert in_pieces(ns(text), range(1, len(ns(text))), thinking) == whole
    assert all(in_pieces(ns(text), [cut], thinking) == whole for cut in range(1, len(ns(text))))


def test_a_call_cut_off_anywhere_is_never_delivered_and_never_lost():
    first = '§<invoke name="get_weather">§<city>Paris§</city>§</invoke>'
    second = '§<invoke name="save_file">§<filename>a.txt§</filename>§<content>one two§</content>§</invoke>'
    text = ns(f"Look: §<tool_call>\n{first}\n{second}\n§</tool_call>")
    first_end, second_end = text.index("</invoke>") + len("</invoke>"), text.rindex("</invoke>") + len("</invoke>")
    for end in range(len(text)):
        got = events(text[:end])
        calls = [event.name for event in got if isinstance(event, ToolCall)]
        assert calls == ["get_weather", "save_file"][: (end >= first_end) + (end >= second_end)]
        said = "".join(event.text for event in got if isinstance(event, ContentDelta))
        begun = 0 if end < first_end else first_end if end < second_end else second_end
        left = text[begun:end] if text[begun:end].strip() else ""  # white space after a call is no text
        left = "" if left.strip() == ns("§</tool_call>") else left  # nor is the end of its block
        assert said == ("Look: " + left if begun else left)


def test_a_good_call_after_a_malformed_one_is_delivered():
    bad = '§<invoke name="save_file">§<content>x§</filename>§</invoke>'
    assert read(f"§<tool_call>\n{bad}\n{CALL}\n§</tool_call>") == [("say", ns(f"§<tool_call>\n{bad}\n")), PARIS]
    assert read(f"§<tool_call>{CALL}{bad}{CALL}§</tool_call>") == [PARIS, ("say", ns(bad)), PARIS]
    unfinished = '§<tool_call>\n§<invoke name="save_file">§<content>x'
    assert read(f"{unfinished}§<tool_call>\n{CALL}\n§</tool_call>") == [
        ("say", ns(f"{unfinished}§<tool_call>\n")),
        PARIS,
    ]
    assert read(f"{unfinished}{CALL}") == [("say", ns(unfinished)), PARIS]
    assert read(f"§<tool_call>no§</tool_call>\n§<tool_call>{CALL}§</tool_call>") == [
        ("say", ns("§<tool_call>no§</tool_call>\n")),
        PARIS,
    ]


def test_calls_are_numbered_and_carry_their_raw_text():
    calls = [
        event for event in events(ns(f"§<tool_call>\n{CALL}\n{CALL}\n§</tool_call>")) if isinstance(event, ToolCall)
    ]
    assert [call.index for call in calls] == [0, 1]
    assert {call.raw for call in calls} == {ns(CALL)}


def test_the_tests_writer_and_the_parser_agree():
    arguments = {"lines": [{"sku": "1", "qty": 2}], "ship": {"zip": "x", "tags": []}, "note": None, "matrix": [[1], []]}
    del arguments["note"]
    assert shown(events(block(invoke("order", arguments)))) == [("call", "order", arguments)]


def test_text_streams_at_once_where_it_is_certain():
    parser = OutputParser()
    assert parser.feed("Hello ") == [ContentDelta("Hello ")]
    assert parser.feed("world]<]mini") == [ContentDelta("world")]
    assert parser.feed("max") == []
    assert parser.feed(" no") == [ContentDelta("]<]minimax no")]
    assert parser.feed(f"{NS}<tool_call>") == []
    assert parser.feed("\n") == []
    assert parser.feed("nothing") == [ContentDelta(f"{NS}<tool_call>\nnothing")]
    assert parser.finish() == []


def test_a_call_is_delivered_with_its_last_character():
    parser = OutputParser(TOOLS)
    text = ns(f"§<tool_call>{CALL}")
    assert parser.feed(text[:-1]) == []
    assert [type(event) for event in parser.feed(text[-1])] == [ToolCall]


def test_thinking_streams_without_its_marker():
    parser = OutputParser(thinking="enabled")
    assert parser.feed("I ") == [ThinkingDelta("I ")]
    assert parser.feed("am</mm:") == [ThinkingDelta("am")]
    assert parser.feed("think>So") == [ContentDelta("So")]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="thinking = 'auto': must be one of"):
        OutputParser(thinking="auto")


LONG = {
    "content": "word ",
    "white space": " ",
    "calls": ns(f"§<tool_call>{CALL}"),
    "NS": NS,
    "unclosed tags": ns("§<aaaaaaaa"),
    "nearly NS": "]<]minimax[>",
}
LONG_INSIDE = {  # what begins, what repeats, what ends
    "a value": ('§<tool_call>§<invoke name="save_file">§<content>', "word ", "§</content>§</invoke>"),
    "a value that never ends": ('§<tool_call>§<invoke name="save_file">§<content>', "word ", ""),
    "items": ('§<tool_call>§<invoke name="get_weather">§<days>', "§<item>1§</item>", "§</days>§</invoke>"),
    "one name": ('§<tool_call>§<invoke name="t">', "§<a>1§</a>", "§</invoke>"),
    "NS in a call": ('§<tool_call>§<invoke name="t">', "§", ""),
    "depth": ('§<tool_call>§<invoke name="t">', "§<a>", ""),
    "a tag": ("§<", "a", ""),
}


def seconds_to_read(text, thinking="disabled"):
    parser = OutputParser(TOOLS, thinking)
    start = time.perf_counter()
    for i in range(0, len(text), 4):
        parser.feed(text[i : i + 4])
    parser.finish()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", [*LONG, *LONG_INSIDE])
def test_long_text_in_small_pieces_takes_linear_time(name):
    start, unit, end = LONG_INSIDE.get(name, ("", LONG.get(name), ""))
    text = ns(start) + ns(unit) * (250_000 // len(ns(unit))) + ns(end)
    assert seconds_to_read(text) < 5  # half a second on an idle core; quadratic work would take minutes


def test_a_megabyte_in_small_pieces_takes_seconds():
    assert seconds_to_read("hm < " * 200_000, "enabled") < 15  # two on an idle core
    assert seconds_to_read(ns('§<tool_call>§<invoke name="save_file">§<content>') + "word " * 200_000) < 15
