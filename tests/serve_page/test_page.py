"""What the page does with answers that a test dictates: streams, stops, faults, several conversations, reloads."""

from __future__ import annotations

import threading

from .server import Broken, Refused
from .steps import EXAMPLES, answered, ask, attached, drop, shows, text_of

PICTURE = (EXAMPLES / "shapes.png", "image/png")

AT_END = """() => {
    const box = document.querySelector("#scroll");
    return box.scrollHeight - box.scrollTop - box.clientHeight < 2;
}"""


def echo(body):
    """Answers with the last question's text."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1].get("text", "a picture")
    yield {"content": f"You said: {text}"}


class Gate:
    """An answer that begins, then waits until it is let go (or the test is long over)."""

    def __init__(self, *before, after="and the rest."):
        self.before, self.after, self.open = before, after, threading.Event()

    def __call__(self, body):
        yield from self.before
        self.open.wait(20)
        for word in self.after.split():
            yield {"content": f" {word}"}


def conversation(page, title):
    return page.get_by_label("Conversations").get_by_role("button", name=title, exact=True)


# Streaming, stop, retry, edit


def test_an_answer_is_shown_while_it_comes(serve, open_page):
    gate = Gate({"reasoning_content": "Let me see."}, {"content": "The first part"})
    page = open_page(serve(gate))
    ask(page, "Tell me")
    shows(page, "The first part")
    assert page.get_by_role("button", name="Stop the answer").is_enabled()
    gate.open.set()
    assert text_of(answered(page, 1)) == "The first part and the rest."
    assert page.locator("#announcer").inner_text() == "The first part and the rest."


def test_stop_keeps_what_has_come_and_lets_the_server_stop_too(serve, open_page):
    gate = Gate({"content": "Half an answer"}, after="more " * 2000)
    server = serve(gate)
    page = open_page(server)
    ask(page, "Tell me")
    shows(page, "Half an answer")
    page.get_by_role("button", name="Stop the answer").click()
    answer = answered(page, 1)
    assert text_of(answer) == "Half an answer"
    answer.get_by_text("Stopped.").wait_for()
    gate.open.set()
    assert server.left.wait(10)  # its write failed: the connection is closed
    assert text_of(answer) == "Half an answer"


def test_escape_stops_too(serve, open_page):
    gate = Gate({"content": "Half"})
    page = open_page(serve(gate))
    ask(page, "Tell me")
    shows(page, "Half")
    page.keyboard.press("Escape")
    answered(page, 1).get_by_text("Stopped.").wait_for()
    gate.open.set()


def test_a_retry_replaces_the_last_answer_only(serve, open_page):
    count = iter(range(1, 9))
    server = serve(lambda body: iter([{"content": f"Answer {next(count)}"}]))
    page = open_page(server)
    for question in ("One", "Two"):
        ask(page, question)
        answered(page)
    page.locator(".answer").last.get_by_role("button", name="Answer again").click()
    shows(page, "Answer 3")
    assert [text_of(answer) for answer in page.locator(".answer").all()] == ["Answer 1", "Answer 3"]
    assert server.requests[1]["messages"] == server.requests[2]["messages"]


def test_a_retry_that_fails_brings_the_answer_back(serve, open_page):
    answers = iter([[{"content": "A good answer"}], [Refused(503, "the server is closing")], [{"content": "Another"}]])
    page = open_page(serve(lambda body: iter(next(answers))))
    ask(page, "Hello")
    answered(page, 1)
    again = page.get_by_role("button", name="Answer again")
    again.click()
    page.get_by_text("the server is closing").wait_for()
    assert text_of(answered(page, 1)) == "A good answer"
    page.reload()
    assert text_of(answered(page, 1)) == "A good answer"
    again.click()
    shows(page, "Another")


def test_the_last_question_can_be_edited_with_its_picture(serve, open_page):
    server = serve(echo)
    page = open_page(server)
    drop(page, *PICTURE)
    attached(page, 1)
    ask(page, "What is thsi?")
    answered(page, 1)
    page.get_by_label("Question", exact=True).fill("a draft of something else")
    page.get_by_role("button", name="Edit this question").click()
    box = page.get_by_label("Question", exact=True)
    assert box.input_value() == "What is thsi?"
    box.press("Escape")
    assert box.input_value() == "a draft of something else"
    page.get_by_role("button", name="Edit this question").click()
    attached(page, 1)
    box.fill("What is this?")
    box.press("Enter")
    assert text_of(answered(page, 1)) == "You said: What is this?"
    assert box.input_value() == "a draft of something else"
    (message,) = server.requests[-1]["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    page.reload()
    assert text_of(answered(page, 1)) == "You said: What is this?"
    assert page.get_by_role("heading", level=1).inner_text() == "What is this?"


# Nothing is lost


def test_a_reload_in_the_middle_of_an_answer_loses_nothing(serve, open_page):
    gate = Gate({"reasoning_content": "Thinking."}, {"content": "The first part"})
    page = open_page(serve(gate))
    ask(page, "Tell me")
    shows(page, "The first part")
    page.get_by_label("Question", exact=True).fill("and my next question")
    page.reload()
    page.wait_for_selector("body.ready")
    answer = page.locator(".answer")
    assert text_of(answer) == "The first part"
    assert answer.locator(".label").inner_text().startswith("Thought for")
    assert page.get_by_label("Question", exact=True).input_value() == "and my next question"
    gate.open.set()
    answer.get_by_role("button", name="Try again").click()
    shows(page, "and the rest.")
    assert text_of(answered(page, 1)) == "The first part and the rest."


def test_a_picture_not_yet_sent_is_there_after_a_reload(serve, open_page):
    page = open_page(serve(echo))
    drop(page, *PICTURE)
    attached(page, 1)
    page.get_by_label("Question", exact=True).fill("What is")
    page.reload()
    page.wait_for_selector("body.ready")
    attached(page, 1)
    assert page.get_by_label("Question", exact=True).input_value() == "What is"
    page.get_by_role("button", name="Remove shapes.png").click()
    attached(page, 0)


def test_conversations_are_kept_apart_renamed_deleted_and_brought_back(serve, open_page):
    gate = Gate({"content": "Slowly"})
    page = open_page(serve(lambda body: gate(body) if body["messages"][-1]["content"] == "Slow one" else echo(body)))
    ask(page, "Slow one")
    shows(page, "Slowly")
    page.get_by_role("button", name="New conversation").first.click()
    ask(page, "Quick one")
    assert text_of(answered(page, 1)) == "You said: Quick one"
    gate.open.set()  # the other goes on while it is not looked at
    page.get_by_label("Conversations").get_by_text("Slow one").click()
    assert text_of(answered(page, 1)) == "Slowly and the rest."
    row = page.get_by_role("listitem").filter(has_text="Quick one")
    row.hover()
    row.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the conversation").fill("Renamed")
    page.keyboard.press("Enter")
    page.reload()
    conversation(page, "Renamed").click()
    assert text_of(answered(page, 1)) == "You said: Quick one"
    page.get_by_role("button", name="Delete Renamed").click()
    conversation(page, "Renamed").wait_for(state="detached")
    page.get_by_role("button", name="Undo").click()
    conversation(page, "Renamed").wait_for()
    page.get_by_role("button", name="Delete Renamed").click()
    page.reload()
    conversation(page, "Slow one").wait_for()
    assert conversation(page, "Renamed").count() == 0


def test_two_tabs_show_the_same_conversations(serve, open_page):
    gate = Gate({"content": "Slowly"})
    server = serve(gate)
    one = open_page(server)
    ask(one, "Tell me")
    shows(one, "Slowly")
    two = open_page(server, context=one.context)
    conversation(two, "Tell me being answered").click()
    two.get_by_text("This is being answered in another tab.").wait_for()
    gate.open.set()
    shows(two, "and the rest.")
    assert not two.get_by_text("This is being answered in another tab.").is_visible()


def test_without_storage_the_page_still_talks_and_says_so(serve, open_page, browser):
    context = browser.new_context()
    context.add_init_script(
        "delete Window.prototype.indexedDB; Object.defineProperty(window, 'indexedDB', {value: null})"
    )
    page = open_page(serve(echo), context=context)
    page.get_by_text("This browser keeps nothing").wait_for()
    drop(page, *PICTURE)
    attached(page, 1)
    ask(page, "Hello")
    assert text_of(answered(page, 1)) == "You said: Hello"
    context.close()


# Faults


def test_a_refusal_says_the_servers_words_and_can_be_tried_again(serve, open_page):
    answers = iter([[Refused(400, "the prompt has 99 tokens too many")], [{"content": "Now it works."}]])
    page = open_page(serve(lambda body: iter(next(answers))))
    ask(page, "Hello")
    page.get_by_role("alert").get_by_text("the prompt has 99 tokens too many").wait_for()
    page.get_by_role("button", name="Try again").click()
    shows(page, "Now it works.")


def test_a_fault_in_the_middle_keeps_what_has_come(serve, open_page):
    faults = {"Break": Broken(), "Fail": Refused(500, "out of memory")}

    def answer(body):
        yield {"content": "Half an answer"}
        yield faults[body["messages"][-1]["content"]]

    page = open_page(serve(answer))
    for count, (question, words) in enumerate({"Break": "The connection broke", "Fail": "out of memory"}.items(), 1):
        ask(page, question)
        last = answered(page, count)
        last.get_by_text(words).wait_for()
        assert text_of(last) == "Half an answer"


def test_a_server_that_is_not_there_is_said_and_found_again(serve, open_page):
    page = open_page(serve(echo))
    page.route("**/v1/**", lambda route: route.abort())
    ask(page, "Hello")
    page.get_by_text("The server cannot be reached.").wait_for()
    page.reload()
    page.locator("#notice").get_by_text("The server cannot be reached.").wait_for()
    page.unroute("**/v1/**")
    page.locator("#notice").get_by_role("button", name="Try again").click()
    page.locator("#notice").wait_for(state="hidden")
    page.locator(".answer").get_by_role("button", name="Try again").click()
    shows(page, "You said: Hello")


def test_a_key_is_asked_for_and_kept(serve, open_page):
    server = serve(echo)
    server.key = "secret"
    page = open_page(server)
    page.get_by_text("This server asks for an API key.").wait_for()
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    page.locator("#notice").wait_for(state="hidden")
    page.reload()
    ask(page, "Hello")
    assert text_of(answered(page, 1)) == "You said: Hello"


def test_a_file_that_is_no_picture_is_refused_with_its_name(serve, open_page, tmp_path):
    page = open_page(serve(echo))
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "broken.png").write_text("no picture")
    drop(page, tmp_path / "notes.txt", "text/plain")
    page.get_by_text("notes.txt is neither a picture nor a video.").wait_for()
    drop(page, tmp_path / "broken.png", "image/png")
    page.get_by_text("broken.png cannot be read as a picture.").wait_for()


def test_tools_that_are_no_tools_are_refused(serve, open_page):
    page = open_page(serve(echo))
    page.get_by_role("button", name="Settings").click()
    tools = page.get_by_label("Tools")
    for text in ("{", "{}", '[{"name": "f"}]'):
        tools.fill(text)
        page.get_by_role("button", name="Save").click()
        assert not tools.evaluate("box => box.validity.valid")
        assert page.get_by_role("dialog").is_visible()


def test_settings_reach_the_request(serve, open_page):
    server = serve(echo)
    page = open_page(server)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("Answer in verse.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("64")
    page.get_by_role("button", name="Save").click()
    ask(page, "Hello")
    answered(page, 1)
    (body,) = server.requests
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 64, "openm3-nano")
    assert body["messages"][0] == {"role": "system", "content": "Answer in verse."}


def test_a_call_the_user_does_not_answer_is_answered_for_them(serve, open_page):
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    turns = iter([[{"tool_calls": [call]}, {"finish_reason": "tool_calls"}], [{"content": "Never mind."}]])
    server = serve(lambda body: iter(next(turns)))
    page = open_page(server)
    ask(page, "Look")
    answered(page, 1).get_by_label("Tool call", exact=True).wait_for()
    ask(page, "Forget it")
    assert text_of(answered(page, 2)) == "Never mind."
    messages = server.requests[-1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "user"]
    assert messages[2]["tool_call_id"] == "c1"


# For everyone


def test_every_control_has_a_name_and_the_page_works_from_the_keyboard(serve, open_page):
    page = open_page(serve(echo))
    page.keyboard.press("Control+Shift+O")
    page.keyboard.type("Hello there")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("friend")
    page.keyboard.press("Enter")
    assert text_of(answered(page, 1)) == "You said: Hello there\nfriend"
    page.keyboard.press("ArrowUp")
    assert page.get_by_label("Question", exact=True).input_value() == "Hello there\nfriend"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input:not([hidden]), textarea, select")].filter(
            (e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.[0]?.textContent.trim())
        ).map((e) => e.outerHTML)"""
    )
    assert nameless == []


def test_a_phone_has_no_sideways_scrolling_and_the_list_opens_and_closes(serve, open_page):
    long = "`" + "x" * 300 + "`\n\n" + "|a|b|\n|-|-|\n|" + "y" * 200 + "|1|\n\n```\n" + "z" * 200 + "\n```"
    page = open_page(
        serve(lambda body: iter([{"content": long}])),
        viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True,
    )  # fmt: skip
    ask(page, "w" * 200)
    answered(page, 1)
    assert page.evaluate("document.scrollingElement.scrollWidth") == 360
    assert page.evaluate(
        "() => [...document.querySelectorAll('#scroll, #thread')].every((e) => e.scrollWidth <= e.clientWidth)"
    )
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="Close the list").click()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_label("Conversations", exact=True).get_by_text("New conversation").click()
    page.get_by_text("What would you like to know?").wait_for()


def test_the_end_stays_in_view_where_the_conversation_grows_by_a_picture(serve, open_page):
    page = open_page(serve(lambda body: iter([{"content": "Line\n\n" * 12}])))
    for count in (1, 2):
        drop(page, EXAMPLES / "star.mp4", "video/mp4")
        drop(page, *PICTURE)
        attached(page, 2)
        ask(page, "Tell me")
        answered(page, count)
        page.wait_for_timeout(300)  # the pictures are there
        assert page.evaluate(AT_END)


def test_the_reader_may_scroll_up_while_an_answer_comes(serve, open_page):
    gate = Gate(*({"content": f"Line {i}\n\n"} for i in range(60)))
    page = open_page(serve(gate))
    ask(page, "Tell me")
    shows(page, "Line 59")
    page.wait_for_function(AT_END)
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -400)
    page.get_by_role("button", name="To the end of the conversation").wait_for()
    gate.open.set()
    answered(page, 1)
    assert not page.evaluate(AT_END)
    page.get_by_role("button", name="To the end of the conversation").click()
    page.wait_for_function(AT_END)
