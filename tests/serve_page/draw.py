"""Draws docs/images/serve-*.png: the page of `openm3 serve`, with openm3-nano's own answers.

cd tests && python -m serve_page.draw
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from .conftest import CHROMIUM, FLAGS
from .steps import EXAMPLES, answered, ask, attached, drop, greedy, openm3_serve

IMAGES = EXAMPLES.parent / "docs" / "images"
FONTS = """addEventListener("DOMContentLoaded", () => {
    document.documentElement.style.setProperty("--sans", "Inter, system-ui, sans-serif");
})"""
WIDE = {"viewport": {"width": 1200, "height": 760}}
PHONE = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}


def save(page: Any, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)
    path = IMAGES / f"serve-{name}.png"
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def new(page: Any) -> None:
    page.locator("#new-chat").evaluate("button => button.click()")
    greedy(page)


def talk(page: Any) -> None:
    """A picture, a question that needs thought, and a clip."""
    new(page)
    drop(page, EXAMPLES / "shapes.png", "image/png")
    attached(page, 1)
    ask(page, "What is at the top left?")
    answered(page, 1)
    ask(page, "How many objects are there?")
    answered(page, 2)


def clip(page: Any) -> None:
    new(page)
    drop(page, EXAMPLES / "star.mp4", "video/mp4")
    attached(page, 1)
    ask(page, "In which direction does the star move?")
    answered(page, 1)


def tool(page: Any) -> None:
    new(page)
    page.get_by_role("button", name="Weather in Paris?").click()
    call = answered(page, 1).get_by_label("Tool call", exact=True)
    call.get_by_role("textbox").fill('{"city": "Paris", "temperature": 21}')
    page.get_by_role("button", name="Send result").click()
    answered(page, 2)


def sum_(page: Any) -> None:
    new(page)
    page.get_by_role("radio", name="On").check(force=True)
    ask(page, "What is 478 + 356?")
    answered(page, 1)
    page.get_by_role("radio", name="Auto").check(force=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, openm3_serve(Path(folder) / "log") as url, sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def visit(**options: Any) -> Any:
            page = browser.new_context(device_scale_factor=2, **options).new_page()
            page.add_init_script(FONTS)
            page.goto(url)
            page.wait_for_selector(".suggestion")
            return page

        page = visit(**WIDE)
        for act in (sum_, clip, tool, talk):
            act(page)
        page.locator(".answer summary").last.click()
        save(page, "light")
        page = visit(color_scheme="dark", **WIDE)
        for act in (sum_, clip, talk, tool):
            act(page)
        save(page, "dark")
        page = visit(**PHONE)
        talk(page)
        save(page, "phone")
        browser.close()


if __name__ == "__main__":
    main()
