"""Pictures and videos from data URLs, uploads and the web; what a fetch refuses. No test leaves this machine.

In the fetcher's tests 127.0.0.1 plays a public address and 127.0.0.2 a private one.
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from serving import EXAMPLES, data_url, serving

from openm3.serve import ServeOptions
from openm3.serve.errors import ApiError
from openm3.serve.files import FileStore
from openm3.serve.media import Fetcher, is_public

PICTURE = (EXAMPLES / "shapes.png").read_bytes()
STAR = {"type": "text", "text": "What colour is the star?"}
NANO = {"model": "openm3-nano", "temperature": 0}


@pytest.mark.parametrize(("address", "public"), [
    ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("10.1.2.3", False),
    ("192.168.0.1", False), ("172.16.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
    ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
    ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
    ("::127.0.0.1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False),
])  # fmt: skip
def test_only_addresses_of_the_open_internet_are_public(address, public):
    assert is_public(address) is public


class Web(BaseHTTPRequestHandler):
    """A small web of pictures, redirects and unpleasant surprises."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        port = self.server.server_port
        match self.path:
            case "/picture.png":
                self._answer(PICTURE)
            case "/page":
                self._answer(b"<html>", "text/html")
            case "/zipped":
                self._answer(b"x", extra={"Content-Encoding": "gzip"})
            case "/large":
                self._answer(b"x" * 5000)
            case "/undeclared":
                self.send_response(200)
                self.send_header("Content-Type", "image/png")
                self.end_headers()
                self.wfile.write(b"x" * 5000)
            case "/slow":
                self.send_response(200)
                self.send_header("Content-Type", "image/png")
                self.end_headers()
                for _ in range(20):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            case "/once":
                self._answer(b"", status=302, extra={"Location": "/picture.png"})
            case "/loop":
                self._answer(b"", status=302, extra={"Location": "/loop"})
            case "/inside":
                self._answer(b"", status=302, extra={"Location": f"http://private.test:{port}/picture.png"})
            case "/file":
                self._answer(b"", status=302, extra={"Location": "file:///etc/passwd"})
            case _:
                self._answer(b"", status=404)

    def _answer(self, body: bytes, kind: str = "image/png", status: int = 200, extra: dict | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | (extra or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


HOSTS = {"public.test": ["127.0.0.1"], "private.test": ["127.0.0.2"], "both.test": ["127.0.0.1", "127.0.0.2"]}


async def lookup(host: str, port: int) -> list[str]:
    return HOSTS.get(host, [host])


def fetcher(look: Any = lookup, **options: Any) -> Fetcher:
    settings = ServeOptions(allow_fetch=True, fetch_seconds=1.0, fetch_bytes=4000, fetch_redirects=2)
    settings = type(settings)(**(vars(settings) | options))
    return Fetcher(settings, look, lambda address: address == "127.0.0.1")


def fetch(web: ThreadingHTTPServer, path: str, host: str = "public.test", **options: Any) -> bytes:
    return asyncio.run(fetcher(**options)(f"http://{host}:{web.server_port}{path}"))


def test_a_picture_is_fetched_over_a_redirect(web):
    assert fetch(web, "/picture.png", fetch_bytes=1 << 20) == PICTURE
    assert fetch(web, "/once", fetch_bytes=1 << 20) == PICTURE


@pytest.mark.parametrize(("path", "said"), [
    ("/page", "not a picture"), ("/zipped", "not a picture"), ("/large", "more than 4,000"),
    ("/undeclared", "more than 4,000"), ("/slow", "within 1 seconds"), ("/loop", "over 2 redirects"),
    ("/inside", "not public"), ("/file", "no http or https URL"), ("/missing", "answered 404"),
])  # fmt: skip
def test_what_is_no_picture_or_no_end_is_refused(web, path, said):
    web.paths.clear()
    with pytest.raises(ApiError, match=said):
        fetch(web, path)
    assert len(web.paths) <= 3  # a refused hop is never asked


@pytest.mark.parametrize("host", ["private.test", "both.test", "127.0.0.2", "[::1]", "0.0.0.0", "2130706433"])
def test_a_host_with_an_address_that_is_not_public_is_never_asked(web, host):
    web.paths.clear()
    with pytest.raises(ApiError):
        fetch(web, "/picture.png", host, fetch_bytes=1 << 20)
    assert web.paths == []


def test_a_name_that_changes_its_mind_is_connected_to_where_it_was_checked(web):
    answers = [["127.0.0.1"], ["127.0.0.2"]]

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0)

    assert fetch(web, "/picture.png", look=rebinding, fetch_bytes=1 << 20) == PICTURE
    assert answers == [["127.0.0.2"]]  # one look is all there is
    answers.insert(0, ["127.0.0.1"])
    with pytest.raises(ApiError, match="not public"):
        fetch(web, "/once", look=rebinding, fetch_bytes=1 << 20)


@pytest.mark.parametrize("url", ["http://", "http://user@public.test/", "http://a b/", "http://public.test:99999/",
                                 "http://[::1", "http://\nx/", "https:///x"])  # fmt: skip
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(ApiError) as caught:
        asyncio.run(fetcher()(url))
    assert caught.value.status == 400


def test_fetching_is_off_unless_it_is_allowed(web, client):
    web.paths.clear()
    part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{web.server_port}/picture.png"}}
    with pytest.raises(openai.BadRequestError, match="fetches no URLs"):
        client.chat.completions.create(**NANO, messages=[{"role": "user", "content": [part, STAR]}])
    assert web.paths == []


def test_a_fetched_picture_is_seen_and_the_real_rules_refuse_this_machine(web, llm):
    part = {"type": "image_url", "image_url": {"url": f"http://public.test:{web.server_port}/once"}}
    body = NANO | {"messages": [{"role": "user", "content": [part, STAR]}]}
    options = ServeOptions(allow_fetch=True)
    with serving(lambda: llm, options, fetch=fetcher(fetch_bytes=1 << 20)) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "It is orange."
    part["image_url"]["url"] = f"http://localhost:{web.server_port}/picture.png"
    with pytest.raises(ApiError, match="not public"):
        asyncio.run(Fetcher(options)(part["image_url"]["url"]))


def test_an_uploaded_picture_is_seen_by_its_id(client):
    file = client.files.create(file=("shapes.png", PICTURE), purpose="vision")
    assert (file.filename, file.bytes, file.id[:5]) == ("shapes.png", len(PICTURE), "file-")
    assert file.id in [f.id for f in client.files.list()]
    assert client.files.content(file.id).content == PICTURE
    part = {"type": "image_url", "image_url": {"url": file.id}}
    question = [{"role": "user", "content": [part, STAR]}]
    assert client.chat.completions.create(**NANO, messages=question).choices[0].message.content == "It is orange."
    assert client.files.delete(file.id).deleted
    for gone in (lambda: client.files.retrieve(file.id),
                 lambda: client.chat.completions.create(**NANO, messages=question)):  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="no file has the id"):
            gone()


def test_files_make_room_for_new_ones_and_go_with_the_store():
    store = FileStore(ServeOptions(max_files=2, max_files_bytes=100))
    first, second, third = (store.add(b"x" * 40, f"{i}", "vision") for i in range(3))
    assert [f.id for f in store.list()] == [second.id, third.id]
    with pytest.raises(ApiError, match="no file"):
        store.read(first.id)
    big = store.add(b"y" * 90, "big", "vision")
    assert [f.id for f in store.list()] == [big.id]
    for data in (b"", b"z" * 101):
        with pytest.raises(ApiError):
            store.add(data, "no", "vision")
    directory = Path(store._directory.name)
    assert [path.name for path in directory.iterdir()] == [big.id]
    store.close()
    assert not directory.exists()


@pytest.mark.parametrize(("part", "said"), [
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "picture"),
    ({"type": "image_url", "image_url": {"url": "DATA:image/png;base64,%%%"}}, "base64"),
    ({"type": "image_url", "image_url": {"url": "data:nothing"}}, "comma"),
    ({"type": "image_url", "image_url": {"url": 5}}, "must hold a url"),
    ({"type": "image_url", "image_url": {"url": "file-none"}}, "no file"),
    ({"type": "image_url", "image_url": {"url": "data:,", "detail": "ultra"}}, "detail"),
    ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "video"),
    ({"type": "video_url", "video_url": {"url": "data:,", "fps": -1}}, "fps"),
    ({"type": "video_url", "video_url": {"url": "data:,", "max_frames": "all"}}, "max_frames"),
])  # fmt: skip
def test_media_that_cannot_be_used_are_told(client, part, said):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=said):
        client.chat.completions.create(**NANO, messages=[{"role": "user", "content": [part, STAR]}])


def test_low_detail_takes_fewer_tokens_and_too_many_pictures_are_refused(client):
    buffer = io.BytesIO()
    Image.new("RGB", (900, 900), "red").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def tokens(detail: str) -> int:
        part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        answer = client.chat.completions.create(**NANO, messages=[{"role": "user", "content": [part]}], max_tokens=1)
        return answer.usage.prompt_tokens

    assert 3 * tokens("low") < tokens("high")
    part = {"type": "image_url", "image_url": {"url": data_url("shapes.png", "image/png")}}
    with pytest.raises(openai.BadRequestError, match="more than 64"):
        client.chat.completions.create(**NANO, messages=[{"role": "user", "content": [part] * 65}])
