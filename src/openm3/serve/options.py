"""Every setting and limit of the server, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """What a server allows. Sizes are in bytes, times in seconds.

    api_keys: empty lets everyone in. allow_fetch: pictures and videos may be given as http(s) URLs, which the server
    then fetches from public addresses only. max_requests: answers under way at once; max_connections: requests of any
    kind. max_body: one request's body; body_seconds: how long it may take to arrive. fetch_*: bounds of one fetched
    file, all its redirects together. max_files, max_files_bytes: uploaded files kept, the oldest go first.
    max_media: pictures and videos of one request. drain_seconds: how long running answers may go on after SIGTERM.
    write_seconds: a reader that takes nothing for so long is hung up on. log_content: prompts and answers go to the
    log too.
    """

    api_keys: tuple[str, ...] = ()
    allow_fetch: bool = False
    max_requests: int = 256
    max_connections: int = 1024
    max_body: int = 64 << 20
    body_seconds: float = 30.0
    max_media: int = 64
    max_prompt_tokens: int | None = None
    max_choices: int = 16
    fetch_bytes: int = 32 << 20
    fetch_seconds: float = 20.0
    fetch_redirects: int = 3
    max_files: int = 256
    max_files_bytes: int = 1 << 30
    drain_seconds: float = 60.0
    write_seconds: float = 120.0
    log_content: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and (value < 0 or (value == 0 and field.name != "fetch_redirects")):
                raise ValueError(f"{field.name} = {value!r}: must be above 0")
        if not all(isinstance(key, str) and key.isascii() and key.strip() == key != "" for key in self.api_keys):
            raise ValueError("api_keys: must be texts of ASCII characters without outer white space")
