"""Where a request's pictures and videos come from: data URLs, uploaded files and, where allowed, the web.

Nothing a client writes is ever opened as a path. A fetch goes to public addresses only: each connection, those of
redirects too, resolves its host once, refuses it if any of its addresses is not public, and connects to an address
that was checked, so that a name which changes its mind in between gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from openm3.processing import ImageOptions, VideoOptions
from openm3.serve.errors import ApiError
from openm3.serve.files import FILE_PREFIX, FileStore
from openm3.serve.options import ServeOptions

DETAILS = {"low": ImageOptions(max_pixels=112896), "auto": None, "high": None}  # low: 336 x 336, 144 tokens of M3
VIDEO_OPTIONS = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")
TYPES = ("image/", "video/", "application/octet-stream")
KINDS = {"image_url": "image", "video_url": "video"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, and so is any IPv4 address that is written inside it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[Any] = []
    if ip.version == 6:
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64 or int(ip) >> 32 == 0:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return ip.is_global and not ip.is_multicast and all(is_public(str(i)) for i in inner if i is not None)


async def resolve(host: str, port: int) -> list[str]:
    """The host's addresses, as the system tells them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [entry[4][0] for entry in found]


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """TCP connections to public addresses only, each to an address that was checked."""

    def __init__(self, lookup: Callable[[str, int], Awaitable[list[str]]], allowed: Callable[[str], bool]) -> None:
        self._network = httpcore.AnyIOBackend()
        self._lookup, self._allowed = lookup, allowed

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:  # fmt: skip
        try:
            addresses = await self._lookup(host, port)
        except OSError:
            addresses = []
        if not addresses:
            raise ApiError(400, f"{host}: no such host")
        if not all(map(self._allowed, addresses)):
            raise ApiError(400, f"{host}: is or points to an address that is not public; only public ones are fetched")
        return await self._network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, path: str, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise ApiError(400, "only http and https URLs are fetched")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


class Fetcher:
    """Fetches http(s) URLs within the options' bounds. lookup and allowed: how hosts are resolved and checked."""

    def __init__(
        self,
        options: ServeOptions,
        lookup: Callable[[str, int], Awaitable[list[str]]] = resolve,
        allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._options = options
        self._network = _CheckedNetwork(lookup, allowed)

    async def __call__(self, url: str) -> bytes:
        """The body behind a URL. ApiError for what is refused, missing, too large, too slow or no media."""
        options, first = self._options, _short(url)
        if not options.allow_fetch:
            raise ApiError(400, f"{first}: this server fetches no URLs; send the data itself as a data: URL, or a "
                                "file's id")  # fmt: skip
        try:
            async with asyncio.timeout(options.fetch_seconds):
                for _ in range(options.fetch_redirects + 1):
                    body, url = await self._once(url)
                    if body is not None:
                        return body
        except TimeoutError:
            raise ApiError(400, f"{first}: did not arrive within {options.fetch_seconds:g} seconds") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise ApiError(400, f"{first}: cannot be fetched ({type(error).__name__})") from None
        raise ApiError(400, f"{first}: over {options.fetch_redirects} redirects")

    async def _once(self, url: str) -> tuple[bytes | None, str]:
        """(the body, or None for a redirect, the URL to go on with)."""
        _check_url(url)
        headers = {"Accept": "image/*, video/*", "Accept-Encoding": "identity", "User-Agent": "openm3"}
        async with (
            httpcore.AsyncConnectionPool(network_backend=self._network) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in (301, 302, 303, 307, 308) and "location" in found:
                return None, urljoin(url, found["location"])
            if response.status != 200:
                raise ApiError(400, f"{_short(url)}: answered {response.status}")
            kind = found.get("content-type", "").lower()
            if not kind.startswith(TYPES) or found.get("content-encoding", "identity").lower() != "identity":
                raise ApiError(400, f"{_short(url)}: is of type {kind[:60]!r}, not a picture or a video")
            return await self._read(response, found.get("content-length", "0"), url), url

    async def _read(self, response: httpcore.Response, length: str, url: str) -> bytes:
        limit = self._options.fetch_bytes
        too_large = ApiError(400, f"{_short(url)}: has more than {limit:,} bytes, the most that is fetched")
        if length.isdigit() and int(length[:19]) > limit:
            raise too_large
        pieces, size = [], 0
        async for piece in response.aiter_stream():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise too_large
        return b"".join(pieces)


@dataclass
class _Seen:
    """What one request says of its media: how many, the details of its pictures, its videos' sampling options."""

    count: int = 0
    details: set[str] = field(default_factory=set)
    videos: dict[str, Any] = field(default_factory=dict)


class MediaSource:
    """Replaces what messages say of media by the media's bytes."""

    def __init__(self, options: ServeOptions, files: FileStore, fetch: Fetcher) -> None:
        self._options, self._files, self._fetch = options, files, fetch

    async def resolve(self, messages: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """(messages with bytes or data: URLs for media, `Processor.prepare`'s image_options and video_options).

        Media are OpenAI's parts, `image_url` and `video_url`. One request has one setting for its pictures and one
        for its videos: where details differ, the highest counts. Raises ApiError.
        """
        seen = _Seen()
        out = []
        for i, message in enumerate(messages):
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                parts = [await self._part(part, f"messages[{i}].content[{j}]", seen) for j, part in enumerate(content)]
                message = message | {"content": parts}
            out.append(message)
        options: dict[str, Any] = {}
        if seen.details == {"low"}:
            options["image_options"] = DETAILS["low"]
        if seen.videos:
            options["video_options"] = VideoOptions(**seen.videos)
        return out, options

    async def _part(self, part: Any, where: str, seen: _Seen) -> dict[str, Any]:
        """A part of a message, its medium's bytes in place of where they are."""
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            return part
        if not isinstance(kind, str) or kind not in KINDS:
            raise ApiError(400, f"{where}: a part of type {kind!r}; must be text, image_url or video_url",
                           param="messages")  # fmt: skip
        seen.count += 1
        if seen.count > self._options.max_media:
            raise ApiError(400, f"{where}: more than {self._options.max_media} pictures and videos", param="messages")
        given = part.get(kind)
        given = {"url": given} if isinstance(given, str) else given
        if not isinstance(given, dict) or not isinstance(given.get("url"), str):
            raise ApiError(400, f"{where}: {kind} must hold a url, a string", param="messages")
        if kind == "image_url":
            seen.details.add(_detail(given.get("detail"), where))
        else:
            _merge(seen.videos, given, where)
        return {"type": KINDS[kind], KINDS[kind]: await self._bytes(given["url"], where)}

    async def _bytes(self, url: str, where: str) -> bytes | str:
        """What a URL or a file's id stands for; a data: URL stays as it is, the processor reads it."""
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return "data:" + url[5:]
        if url.startswith(FILE_PREFIX):
            return await asyncio.to_thread(self._files.read, url)
        if scheme.startswith(("http://", "https://")):
            return await self._fetch(url)
        raise ApiError(400, f"{where}: {_short(url)} must be a data: URL, an http(s) URL or a file's id",
                       param="messages")  # fmt: skip


def _detail(value: Any, where: str) -> str:
    if value is None:
        return "auto"
    if not isinstance(value, str) or value not in DETAILS:
        raise ApiError(400, f"{where}: detail {_short(str(value))}: must be one of {', '.join(DETAILS)}",
                       param="messages")  # fmt: skip
    return value


def _merge(options: dict[str, Any], given: dict[str, Any], where: str) -> None:
    """Adds a video's sampling options to the request's."""
    for name in VIDEO_OPTIONS:
        if given.get(name) is None:
            continue
        if options.setdefault(name, given[name]) != given[name]:
            raise ApiError(400, f"{where}: {name} differs between the videos of one request", param="messages")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc
        bad = bad or not url.isascii() or any(char <= " " for char in url) or (parts.port or 1) < 1
    except ValueError:
        bad = True
    if bad:
        raise ApiError(400, f"{_short(url)}: is no http or https URL that can be fetched")


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:60] + "...")
