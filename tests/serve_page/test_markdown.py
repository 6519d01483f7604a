"""Markdown as the page shows it, and the events of a stream as it reads them: the modules themselves, in Chromium."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

RENDER = """async (texts) => {
    const { Markdown } = await import(new URL("markdown.js", location));
    const box = document.createElement("div");
    const markdown = new Markdown(box);
    for (const text of texts) markdown.show(text);
    return box.innerHTML;
}"""
READ = """async (pieces) => {
    const { events } = await import(new URL("api.js", location));
    const stream = new ReadableStream({
        start(controller) {
            for (const bytes of pieces) controller.enqueue(new Uint8Array(bytes));
            controller.close();
        },
    });
    const found = [];
    for await (const data of events(stream)) found.push(data);
    return found;
}"""
A = 'target="_blank" rel="noopener noreferrer nofollow"'
CASES = {
    "plain text": "<p>plain text</p>",
    "two\nlines": "<p>two<br>lines</p>",
    "*a* **b** ***c*** ~~d~~": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del></p>",
    "**bold with *both* inside**": "<p><strong>bold with <em>both</em> inside</strong></p>",
    "snake_case_name, 2 * 3 * 4, **open": "<p>snake_case_name, 2 * 3 * 4, **open</p>",
    "`a*b*` and ``a`b``": "<p><code>a*b*</code> and <code>a`b</code></p>",
    r"\*not\* \`this\`": "<p>*not* `this`</p>",
    "# One\n## Two ##\ntext": "<h3>One</h3><h4>Two</h4><p>text</p>",
    "#hashtag": "<p>#hashtag</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n\n   more\n2. b": "<ol><li>a<p>more</p></li><li>b</li></ol>",
    "text\n- a\n\nafter": "<p>text</p><ul><li>a</li></ul><p>after</p>",
    "In\n1984. A year": "<p>In<br>1984. A year</p>",
    "> a\n> - b\n\nc": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>",
    "---": "<hr>",
    "| a | b |\n|---|--:|\n| 1 | `x` |":
        '<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
        '<th class="left" scope="col">a</th><th class="right" scope="col">b</th></tr></thead>'
        '<tbody><tr><td class="left">1</td><td class="right"><code>x</code></td></tr></tbody></table></div>',
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "[x](https://e.org/a_b_(c) 'title')": f'<p><a href="https://e.org/a_b_(c)" {A}>x</a></p>',
    "see https://e.org/a_b_c.": f'<p>see <a href="https://e.org/a_b_c" {A}>https://e.org/a_b_c</a>.</p>',
    "<https://e.org>": f'<p><a href="https://e.org/" {A}>https://e.org</a></p>',
    r"\(a_1 * b_1\) and $$x_1 + x_2$$":
        r'<p><span class="math">\(a_1 * b_1\)</span> and <span class="math">$$x_1 + x_2$$</span></p>',
    "a<br>b": "<p>a<br>b</p>",
}  # fmt: skip
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "<svg onload=alert(1)>",
    "[x](data:text/html,<script>alert(1)</script>)", "![x](javascript:alert(1))", "<javascript:alert(1)>",
    "[x](vbscript:msgbox)", "[x](JaVaScRiPt:alert(1))", "[x]( java\tscript:alert(1))", "```\"><script>\n</code>\n```",
    "| <b>a</b> |\n|---|\n| <iframe src=x> |", "![picture](https://e.org/track.png)",
]  # fmt: skip
SAMPLE = """# Title

Some *text* with `code`, [a link](https://e.org) and **more

- one
  1. two
     ```python
     def f():

         return 1
     ```
- three

| a | b |
|---|---|
| 1 | 2 |

```js
const x = "**";
```
> quoted
> - list

\\[ a_1 \\]

The end."""


@pytest.fixture(scope="module")
def page(browser):
    from .server import PageServer

    server = PageServer(lambda body: iter(()))
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    yield page
    context.close()
    server.stop()


@pytest.mark.parametrize("text", CASES)
def test_markdown(page, text):
    assert page.evaluate(RENDER, [text]) == CASES[text]


def test_a_code_block_keeps_its_text_and_names_its_language(page):
    html = page.evaluate(RENDER, ["~~~~py\n<b>&\n```\n\n  x\n~~~~\nafter"])
    assert "<code>&lt;b&gt;&amp;\n```\n\n  x</code>" in html
    assert "<span>py</span>" in html
    assert html.endswith("<p>after</p>")


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_an_answer_becomes_markup_or_is_fetched(page, text):
    """Whatever a model writes, the page has only the elements that Markdown has, and links to the web."""
    found = page.evaluate(
        """async (text) => {
            const { Markdown } = await import(new URL("markdown.js", location));
            const box = document.createElement("div");
            new Markdown(box).show(text);
            return [...box.querySelectorAll("*")].map((e) => [e.localName, [...e.attributes].map((a) => `${a.name}=${a.value}`)]);
        }""",  # noqa: E501
        text,
    )
    for name, attributes in found:
        assert name not in {"script", "img", "iframe", "object", "style", "form"}
        assert name == "svg" or not any(a.startswith(("on", "style", "src")) for a in attributes)
        assert all(a.startswith("href=https:") for a in attributes if a.startswith("href=") and name == "a")


def test_a_text_that_grows_shows_what_it_shows_at_once(page):
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, len(SAMPLE)), 30))
        assert page.evaluate(RENDER, [*(SAMPLE[:cut] for cut in cuts), SAMPLE]) == page.evaluate(RENDER, [SAMPLE])
    assert page.evaluate(RENDER, [SAMPLE, "short"]) == "<p>short</p>"


def test_finished_blocks_keep_their_nodes_while_a_text_grows(page):
    kept = page.evaluate("""async () => {
        const { Markdown } = await import(new URL("markdown.js", location));
        const box = document.createElement("div");
        const markdown = new Markdown(box);
        markdown.show("# A\\n\\n```\\nx");
        const [title, code] = box.children;
        markdown.show("# A\\n\\n```\\nx\\ny\\n```\\n\\nmore");
        return [title === box.children[0], code === box.children[1], code.querySelector("code").textContent];
    }""")
    assert kept == [True, True, "x\ny"]


@pytest.mark.parametrize("text", [
    "[" * 50_000, "*" * 50_000, "*a " * 20_000, "`" * 50_000, "<" * 50_000, "> " * 20_000, "- " * 20_000,
    "`a" * 20_000, "**a _b " * 10_000, "|" * 20_000 + "\n" + "|-" * 20_000, "\n".join(["- a"] * 20_000), "$$" * 20_001,
    "\n\n".join(["- a"] * 5_000), "1. " * 20_000, "- a" + "\n" * 50_000 + "  b", "(" * 20_000 + "[a](" * 5_000,
], ids=lambda text: text[:8])  # fmt: skip
def test_strange_texts_are_read_in_time(page, text):
    seconds = page.evaluate(
        """async (text) => {
            const { Markdown } = await import(new URL("markdown.js", location));
            const start = performance.now();
            new Markdown(document.createElement("div")).show(text);
            return (performance.now() - start) / 1000;
        }""",
        text,
    )
    assert seconds < 5


def test_events_are_read_however_the_bytes_are_split(page):
    stream = 'data: {"a": "ä€😀"}\n\n: comment\r\ndata:two\r\ndata: lines\r\n\r\nevent: x\ndata: [DONE]\n\n'.encode()
    rng = random.Random(0)
    for _ in range(20):
        cuts = [0, *sorted(rng.sample(range(1, len(stream)), rng.randint(1, 40))), len(stream)]
        pieces = [list(stream[a:b]) for a, b in pairwise(cuts)]
        assert page.evaluate(READ, pieces) == ['{"a": "ä€😀"}', "two\nlines", "[DONE]"]
