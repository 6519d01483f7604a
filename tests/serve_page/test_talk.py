"""The page of `openm3 serve` with openm3-nano's real answers: text, a picture, a clip, thinking, a tool."""

from __future__ import annotations

import pytest

from .steps import EXAMPLES, answered, ask, attached, drop, greedy, openm3_serve, paste, text_of


@pytest.fixture(scope="module")
def url(browser, tmp_path_factory):
    with openm3_serve(tmp_path_factory.mktemp("serve") / "log") as url:
        yield url


def visit(open_page, url):
    """A page whose conversation is answered greedily, and the bodies of its requests."""
    page = open_page(url)
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    greedy(page)
    return page, bodies


def think(page, mode: str) -> None:
    page.get_by_role("radio", name=mode).check(force=True)


def test_a_dropped_picture_gets_the_right_answer_and_is_there_after_a_reload(url, open_page):
    page, _ = visit(open_page, url)
    drop(page, EXAMPLES / "shapes.png", "image/png")
    attached(page, 1)
    ask(page, "What is at the top left?")
    assert text_of(answered(page, 1)) == "It is a red circle."
    ask(page, "Where is the blue triangle?")
    assert text_of(answered(page, 2)) == "It is at the bottom right."
    page.reload()
    page.wait_for_selector("body.ready")
    assert [text_of(answer) for answer in page.locator(".answer").all()] == [
        "It is a red circle.",
        "It is at the bottom right.",
    ]
    picture = page.locator(".question img").first
    picture.wait_for()
    assert picture.evaluate("async image => (await image.decode(), image.naturalWidth)") == 140
    ask(page, "How many objects are there?")  # the picture is sent again, from the browser's store
    assert text_of(answered(page, 3)) == "There are 4."


def test_a_pasted_clip_gets_the_right_answer(url, open_page):
    page, bodies = visit(open_page, url)
    paste(page, EXAMPLES / "star.mp4", "video/mp4")
    attached(page, 1)
    ask(page, "In which direction does the star move?")
    assert "right" in text_of(answered(page, 1))
    assert bodies[-1]["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")


def test_thinking_is_folded_and_can_be_switched(url, open_page):
    page, bodies = visit(open_page, url)
    think(page, "On")
    ask(page, "What is 478 + 356?")
    answer = answered(page, 1)
    assert "834" in text_of(answer)
    thought = answer.locator(".thought")
    assert not thought.is_visible()
    answer.locator("summary").click()
    assert thought.is_visible()
    assert thought.inner_text().strip()
    think(page, "Off")
    ask(page, "What is 21 + 34?")
    answer = answered(page, 2)
    assert "55" in text_of(answer)
    assert not answer.locator(".thinking").is_visible()
    assert [r["thinking"]["type"] for r in bodies[-2:]] == ["enabled", "disabled"]
    page.reload()
    assert page.get_by_role("radio", name="Off").is_checked()  # kept with the conversation


def test_a_tool_call_there_and_back(url, open_page):
    page, bodies = visit(open_page, url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Fill in an example").click()
    page.get_by_role("button", name="Save").click()
    ask(page, "Get the weather with city Paris, unit celsius. What is the temperature?")
    call = answered(page, 1).get_by_label("Tool call", exact=True)
    assert call.locator(".name").inner_text() == "get_weather"
    assert call.locator("dd").all_inner_texts() == ["Paris", "celsius"]
    call.get_by_role("textbox").fill('{"city": "Paris", "temperature": 21}')
    page.get_by_role("button", name="Send result").click()
    assert text_of(answered(page, 2)) == "The temperature is 21."
    messages = bodies[-1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"]
