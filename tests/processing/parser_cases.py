"""Texts for the parser and what they mean. `§` is NS; FORMAT and DEVIATIONS list events, NO_CALLS is all content.

An event in short: ("think", text), ("say", text), ("call", name, arguments).
"""

from m3_format import NS, tool

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
LINE = {"type": "object", "properties": {"sku": STRING, "qty": INTEGER}}
TOOLS = [
    tool("get_weather", {"city": STRING, "days": {"type": "array", "items": INTEGER}, "metric": {"type": "boolean"}}),
    tool("save_file", {"filename": STRING, "content": STRING, "mode": INTEGER}),
    tool("order", {
        "lines": {"type": "array", "items": LINE}, "note": {"type": ["string", "null"]},
        "ship": {"type": "object", "properties": {"zip": STRING, "tags": {"type": "array", "items": STRING}}},
        "matrix": {"type": "array", "items": {"type": "array", "items": INTEGER}},
    }),
]  # fmt: skip


def ns(text):
    return text.replace("§", NS)


def made(name, inside):
    """One block with one call."""
    return f'§<tool_call>§<invoke name="{name}">{inside}§</invoke>§</tool_call>'


def weather(inside):
    return made("get_weather", inside)


def save(inside):
    return made("save_file", inside)


def order(inside):
    return made("order", inside)


CALL = '§<invoke name="get_weather">§<city>Paris§</city>§</invoke>'
PARIS = ("call", "get_weather", {"city": "Paris"})

THINKING = [  # (mode, text, events)
    ("enabled", "I think.</mm:think>Hello", [("think", "I think."), ("say", "Hello")]),
    ("enabled", "<mm:think>I think.</mm:think>Hello", [("think", "I think."), ("say", "Hello")]),
    ("enabled", "\n<mm:think>I think.</mm:think>Hello", [("think", "I think."), ("say", "Hello")]),
    ("enabled", "I think <mm:think> so.</mm:think>Hello", [("think", "I think <mm:think> so."), ("say", "Hello")]),
    ("enabled", "I think", [("think", "I think")]),
    ("enabled", "</mm:think>Hello", [("say", "Hello")]),
    ("enabled", "\n</mm:think>\nHello", [("say", "\nHello")]),
    ("enabled", "a < b </mm:thin", [("think", "a < b </mm:thin")]),
    ("enabled", "x§<tool_call>y</mm:think>z", [("think", "x§<tool_call>y"), ("say", "z")]),
    ("adaptive", "<mm:think>Hm.</mm:think>Hello", [("think", "Hm."), ("say", "Hello")]),
    ("adaptive", " \n<mm:think>\nHm.\n</mm:think>\n\nHello", [("think", "\nHm.\n"), ("say", "\n\nHello")]),
    ("adaptive", "</mm:think>Hello", [("say", "Hello")]),
    ("adaptive", "Hello", [("say", "Hello")]),
    ("adaptive", "\n\nHello", [("say", "\n\nHello")]),
    ("adaptive", "<mm:think>Hm.", [("think", "Hm.")]),
    ("adaptive", "<mm:thi", [("say", "<mm:thi")]),
    ("adaptive", "<mm:thing>", [("say", "<mm:thing>")]),
    ("adaptive", "<mm:think> \n</mm:think>Hello", [("say", "Hello")]),
    ("adaptive", "<mm:think>a</mm:think></mm:think>Hello", [("think", "a"), ("say", "Hello")]),
    ("adaptive", "<mm:think>a</mm:think>\n<mm:think>b</mm:think>Hello", [("think", "ab"), ("say", "Hello")]),
    ("adaptive", f"<mm:think>a</mm:think>\n{weather('§<city>Paris§</city>')}", [("think", "a"), PARIS]),
    ("disabled", "Hello", [("say", "Hello")]),
    ("disabled", "</mm:think>Hello", [("say", "Hello")]),
    ("disabled", "<mm:think>Hm.</mm:think>Hello", [("think", "Hm."), ("say", "Hello")]),
    ("disabled", "The marker </mm:think> ends <mm:think>.", [("say", "The marker </mm:think> ends <mm:think>.")]),
    ("disabled", f"§<tool_call>{CALL}§</tool_call></mm:think>x", [PARIS, ("say", "</mm:think>x")]),
    ("disabled", " \n", []),
    ("disabled", "", []),
    ("enabled", "", []),
]

TAGS_IN_TEXT = "<html></item></content></invoke>\n</tool_call> 1 < 2 > 0 ]<] [>[ <mm:think>"
FORMAT = {
    "one call": (f"§<tool_call>\n{CALL}\n§</tool_call>", [PARIS]),
    "text before it": (f"Let me look.\n\n§<tool_call>\n{CALL}\n§</tool_call>\n", [("say", "Let me look.\n\n"), PARIS]),
    "text after it": (f"§<tool_call>\n{CALL}\n§</tool_call>\nDone.", [PARIS, ("say", "\nDone.")]),
    "two calls in a block": (f"§<tool_call>\n{CALL}\n{CALL}\n§</tool_call>", [PARIS, PARIS]),
    "two blocks": (f"§<tool_call>\n{CALL}\n§</tool_call>\n§<tool_call>\n{CALL}\n§</tool_call>", [PARIS, PARIS]),
    "text between blocks": (
        f"a §<tool_call>{CALL}§</tool_call> b §<tool_call>{CALL}§</tool_call> c",
        [("say", "a "), PARIS, ("say", " b "), PARIS, ("say", " c")],
    ),
    "a bare end of thinking first": (f"</mm:think>\n§<tool_call>\n{CALL}\n§</tool_call>", [PARIS]),
    "no arguments": (made("now", ""), [("call", "now", {})]),
    "white space everywhere": (
        '§<tool_call>\n\n§<invoke name="get_weather">\n  §<city>Paris§</city>\n  '
        "§<days>\n §<item> 1 §</item>\n §</days>\n§</invoke>\n\n§</tool_call>\n",
        [("call", "get_weather", {"city": "Paris", "days": [1]})],
    ),
    "types": (
        weather("§<city>42§</city>§<days>§<item>1§</item>§<item>2§</item>§</days>§<metric>true§</metric>"),
        [("call", "get_weather", {"city": "42", "days": [1, 2], "metric": True})],
    ),
    "empty elements": (
        order("§<lines>§</lines>§<ship>§</ship>§<note>§</note>"),
        [("call", "order", {"lines": [], "ship": {}, "note": ""})],
    ),
    "null": (order("§<note>null§</note>"), [("call", "order", {"note": None})]),
    "lists of objects": (
        order(
            "§<lines>§<item>§<sku>7§</sku>§<qty>2§</qty>§</item>§<item>§<sku>b§</sku>§<qty>1§</qty>§</item>§</lines>"
        ),
        [("call", "order", {"lines": [{"sku": "7", "qty": 2}, {"sku": "b", "qty": 1}]})],
    ),
    "objects with lists": (
        order("§<ship>§<zip>018956§</zip>§<tags>§<item>x§</item>§</tags>§</ship>"),
        [("call", "order", {"ship": {"zip": "018956", "tags": ["x"]}})],
    ),
    "lists of lists": (
        order("§<matrix>§<item>§<item>1§</item>§<item>2§</item>§</item>§<item>§</item>§</matrix>"),
        [("call", "order", {"matrix": [[1, 2], []]})],
    ),
    "a repeated name": (
        weather("§<days>1§</days>§<days>2§</days>§<city>a§</city>§<city>b§</city>"),
        [("call", "get_weather", {"days": [1, 2], "city": ["a", "b"]})],
    ),
    "an unknown tool": (
        made("other", "§<a>1§</a>§<b>x§</b>§<c>§<item>true§</item>§</c>"),
        [("call", "other", {"a": 1, "b": "x", "c": [True]})],
    ),
    "parameters named like tags": (
        made("t", "§<invoke>1§</invoke>§<tool_call>2§</tool_call>§<item>3§</item>§<name>4§</name>"),
        [("call", "t", {"invoke": 1, "tool_call": 2, "item": 3, "name": 4})],
    ),
    "unicode": (
        save("§<filename>日本語🙂.txt§</filename>§<größe-1.2>ü§</größe-1.2>"),
        [("call", "save_file", {"filename": "日本語🙂.txt", "größe-1.2": "ü"})],
    ),
    "values that hold tags": (
        save(f"§<filename>a<b>c§</filename>§<content>{TAGS_IN_TEXT}§</content>"),
        [("call", "save_file", {"filename": "a<b>c", "content": TAGS_IN_TEXT})],
    ),
    "text beside children": (
        order("§<ship>by mail §<zip>1§</zip> soon§</ship>"),
        [("call", "order", {"ship": {"zip": "1", "$text": "by mail soon"}})],
    ),
    "outer white space of strings": (
        save("§<content>\n  a\n§</content>"),
        [("call", "save_file", {"content": "\n  a\n"})],
    ),
}

DEVIATIONS = {
    "the first opening tag left out": (
        save("§offer.docx§</filename>§<content>Hello§</content>"),
        [("call", "save_file", {"filename": "offer.docx", "content": "Hello"})],
    ),
    "the first opening tag and its NS left out": (
        save("offer.docx§</filename>§<content>Hello§</content>"),
        [("call", "save_file", {"filename": "offer.docx", "content": "Hello"})],
    ),
    "the only opening tag left out": (weather("§Paris§</city>"), [PARIS]),
    "an opening tag left out before a path": (
        save("§/tmp/a.txt§</filename>"),
        [("call", "save_file", {"filename": "/tmp/a.txt"})],
    ),
    "an opening tag left out before a value that begins like one": (
        save("§<b>x</b> y§</content>"),
        [("call", "save_file", {"content": "<b>x</b> y"})],
    ),
    "an opening tag left out before a value that begins like invoke": (
        save("§invoke the spirits§</content>"),
        [("call", "save_file", {"content": "invoke the spirits"})],
    ),
    "an object's opening tag left out": (order("§§<zip>1§</zip>§</ship>"), [("call", "order", {"ship": {"zip": "1"}})]),
    "an opening tag left out inside an object": (
        order("§<ship>§123§</zip>§<tags>§<item>x§</item>§</tags>§</ship>"),
        [("call", "order", {"ship": {"zip": "123", "tags": ["x"]}})],
    ),
    "items without opening tags": (
        weather("§<days>§1§</item>§<item>2§</item>3§</item>§</days>"),
        [("call", "get_weather", {"days": [1, 2, 3]})],
    ),
    "an item's opening tag left out right after another": (
        order("§<matrix>§<item>§1§</item>§</matrix>"),
        [("call", "order", {"matrix": [[1]]})],
    ),
    "< dropped from invoke": (
        '§<tool_call>\n§invoke name="get_weather">§<city>Paris§</city>§</invoke>\n§</tool_call>',
        [PARIS],
    ),
    "< dropped from tool_call": (f"§tool_call>\n{CALL}\n§/tool_call>", [PARIS]),
    "< dropped from closing tags": (
        '§<tool_call>§<invoke name="get_weather">§<city>Paris§/city>§/invoke>§/tool_call>',
        [PARIS],
    ),
    "< dropped from a parameter": (weather("§city>Paris§</city>"), [PARIS]),
    "< dropped from a parameter and its end": (
        weather("§city>Paris§/city>§<metric>true§</metric>"),
        [("call", "get_weather", {"city": "Paris", "metric": True})],
    ),
    "< dropped from an object": (
        order("§ship>§<zip>1§</zip>§tags>§item>a§</item>§</tags>§</ship>"),
        [("call", "order", {"ship": {"zip": "1", "tags": ["a"]}})],
    ),
    "white space between NS and <": (
        '§ <tool_call>\n§\n<invoke name="get_weather">§  <city>Paris§\t</city>§ </invoke>\n§ </tool_call>',
        [PARIS],
    ),
    "white space in tags": (
        '§<tool_call >\n§< invoke  name = "get_weather" >§< city >Paris§</ city >§</invoke >\n§</ tool_call>',
        [PARIS],
    ),
    "a name in single quotes": (CALL.replace('"', "'"), [PARIS]),
    "a name without quotes": (CALL.replace('"', ""), [PARIS]),
    "no block around a call": (f"Now {CALL} then", [("say", "Now "), PARIS, ("say", " then")]),
    "no opening of the block": (f"{CALL}\n§</tool_call>", [PARIS]),
    "no end of the block": (f"§<tool_call>\n{CALL}\n", [PARIS]),
    "a block in a block": (f"§<tool_call>§<tool_call>{CALL}§</tool_call>", [("say", "§<tool_call>"), PARIS]),
    "NS twice": (
        weather("§§<city>Paris§§</city>§<metric>true§</metric>§"),
        [("call", "get_weather", {"city": "Paris", "metric": True})],
    ),
    "NS inside a text": (save("§<content>a § b§</content>"), [("call", "save_file", {"content": f"a {NS} b"})]),
}

NO_CALLS = {
    "a block of text": "§<tool_call>hello§</tool_call>",
    "an empty block": "§<tool_call>\n§</tool_call>",
    "a stray end": "a§</tool_call>b",
    "a stray NS": "a§b§",
    "tags without NS": '<tool_call><invoke name="get_weather"><city>x</city></invoke></tool_call>',
    "a call without a name": "§<tool_call>§<invoke>§<city>x§</city>§</invoke>§</tool_call>",
    "a call with an empty name": made("", "§<city>x§</city>"),
    "a wrong closing tag": weather("§<city>x§</town>"),
    "a wrong closing tag after an unknown one": weather("§<b>x§</town>"),
    "a value whose block ends before its call": weather("§Paris§</tool_call>"),
    "a parameter that never ends": weather("§<city>x"),
    "a call that never ends": '§<tool_call>§<invoke name="get_weather">§<city>x§</city>§</tool_call>',
    "a value without tags": weather("Paris"),
    "a value after NS without tags": weather("§Paris"),
    "a value without tags beside others": save("§<content>x§</content>a.txt"),
    "a value after NS without tags beside others": save("§<content>x§</content>§a.txt"),
    "elements out of order": made("t", "§<a>§<b>§</a>§</b>"),
    "too deep": made("t", "§<a>" * 100 + "§</a>" * 100),
    "a tag that is too long": made("t", f"§<{'a' * 600}>1"),
    "a partial NS at the end": "a]<]minimax[>",
    "a partial tag at the end": "a§<tool_ca",
    "a block at the end": "a §<tool_call>\n",
    "white space before no call": "\n §<tool_call>x",
}
