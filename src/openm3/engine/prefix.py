"""Keys of a sequence's blocks: equal keys mean equal tokens and media from the sequence's start to the block's end."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from openm3.engine.request import Request

KEY_BYTES = 16


def extend_keys(request: Request, page_size: int, blocks: int) -> list[bytes]:
    """`request.keys` with (at least) those of its first `blocks` blocks, each a hash of the one before it, the block's
    tokens, and for its placeholders the content of the picture or clip and the place in it."""
    keys = request.keys
    for block in range(len(keys), blocks):
        start, end = block * page_size, (block + 1) * page_size
        state = blake2b(keys[-1] if keys else b"", digest_size=KEY_BYTES)
        state.update(array("q", request.token_ids[start:end]).tobytes())
        if request.media is not None:
            state.update(request.media.content(start, end))
        keys.append(state.digest())
    return keys
