"""Cases to training samples, fast: the chat template in plain Python, one tokenizer call, pixels without a processor.

`openm3.processing` is the definition; tests hold this shortcut to it token by token. It may be short because the
recipe's pictures are already of a size the processor leaves alone, and its messages are well formed.
"""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import numpy as np
import torch

from openm3.config import NANO_SPECIALS
from openm3.train.data import Media, Sample
from openm3.train.recipes.nano.case import Case
from openm3.train.recipes.nano.tokenizer import load

NS = "]<]minimax[>["
START, END = "]<]start of image[>[", "]<]end of image[>["
SEGMENT = 4  # temporal patches of a video segment, one line of its grid


def render(messages: list[dict[str, Any]], tools: list | None, thinking: str, media: list[str] | None = None) -> str:
    """The conversation as the chat template writes it; `media` replaces the image and video marks, in order."""
    media = iter(media or ())
    texts = {"system": [], "root": []}
    for message in messages:
        if message["role"] in ("root", "system", "developer"):
            texts["root" if message["role"] == "root" else "system"].append(message["content"])
    root, developer = "\n".join(texts["root"]), "\n".join(texts["system"])
    out = [f"]~!b[]~b]system\n{root or 'You are openm3-nano.'}\nThinking: {thinking}.[e~[\n"
           f"]~b]developer\n{developer or 'Be brief.'}"]  # fmt: skip
    if tools:
        lines = (f"\n<tool>{json.dumps(tool['function'], ensure_ascii=False)}</tool>" for tool in tools)
        out.append(f"\nTools:{''.join(lines)}\nCall: {NS}<tool_call>")
    out.append("[e~[\n")
    before = None
    for message in messages:
        role, content = message["role"], message["content"]
        if before == "tool" != role:
            out.append("[e~[\n")
        if role == "user":
            text = content if isinstance(content, str) else "".join(_part(part, media) for part in content)
            out.append(f"]~b]user\n{text}[e~[\n")
        elif role == "assistant":
            thought = message.get("reasoning_content")
            out.append(f"]~b]ai\n{'<mm:think>' + thought if thought else ''}</mm:think>{content}")
            out.append(f"{_calls(message, content)}[e~[\n")
        elif role == "tool":
            out.append(("\n" if before == "tool" else "]~b]tool\n") + f"<response>{content}</response>")
        before = role
    if before == "tool":
        out.append("[e~[\n")
    return "".join(out)


def _part(part: dict[str, Any], media) -> str:
    return part["text"] if part["type"] == "text" else next(media, f"]<]{part['type']}[>[")


def _calls(message: dict[str, Any], content: str) -> str:
    if not message.get("tool_calls"):
        return ""
    functions = [call["function"] for call in message["tool_calls"]]
    invokes = "".join(f'{NS}<invoke name="{f["name"]}">{_inside(f["arguments"])}{NS}</invoke>\n' for f in functions)
    return ("\n" if content else "") + f"{NS}<tool_call>\n{invokes}{NS}</tool_call>"


def _inside(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"{NS}<{k}>{_inside(v)}{NS}</{k}>" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "".join(f"{NS}<item>{_inside(v)}{NS}</item>" for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def patch_rows(frames: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] -> rows uint8 [t*h*w, 1176], as `openm3.processing.images.patch_rows` orders them."""
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    t, h, w = len(frames) // 2, frames.shape[1] // 14, frames.shape[2] // 14
    grid = frames.reshape(t, 2, h // 2, 2, 14, w // 2, 2, 14, 3)
    return grid.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 1176)


def media_of(part: dict[str, Any]) -> tuple[str, Media]:
    """What a part's mark becomes in the prompt, and its pixels."""
    kind = part["type"]
    frames = part[kind] if kind == "video" else part[kind][None]
    rows = torch.from_numpy(np.ascontiguousarray(patch_rows(frames)))
    h, w = frames.shape[1] // 14, frames.shape[2] // 14
    if kind == "image":
        return START + "]<]image[>[" * (h * w // 4) + END, Media(rows, torch.tensor([[1, h, w]]))
    t = (len(frames) + 1) // 2
    seconds = [f"]<]{second:.1f} seconds[>[" for second in part.get("seconds", ())] or [""] * t
    text = "".join(second + START + "]<]video[>[" * (h * w // 4) + END for second in seconds)
    grid = [[min(SEGMENT, t - at), h, w] for at in range(0, t, SEGMENT)]
    return text, Media(rows, torch.tensor(grid))


@functools.cache
def _marks() -> tuple[int, int, int, int, tuple[int, ...]]:
    """Ids: turn start, end of turn, <mm:think>, </mm:think>, and the two tokens of `ai` and the line's end."""
    ids = [NANO_SPECIALS[token] for token in ("]~b]", "[e~[", "<mm:think>", "</mm:think>")]
    return *ids, tuple(load().encode("ai\n").ids)


def learned(ids: list[int], thinking: str, skipped: frozenset[int] = frozenset()) -> list[bool]:
    """Which tokens are to be learned: each assistant turn up to its end mark, without what the generation prompt gives.

    The turns numbered in `skipped` are not."""
    turn, end, opens, closes, ai = _marks()
    mask = [False] * len(ids)
    given = {"enabled": opens, "disabled": closes}.get(thinking)
    at, number = 0, -1
    while turn in ids[at:]:
        at = ids.index(turn, at) + 1
        if tuple(ids[at : at + len(ai)]) != ai:
            continue
        number += 1
        start = at + len(ai)
        stop = ids.index(end, start) + 1
        if number in skipped:
            continue
        if given is not None and ids[start] == given:
            start += 1
        mask[start:stop] = [True] * (stop - start)
    return mask


def to_sample(case: Case, rng: random.Random | None = None) -> Sample:
    """Tokens, loss mask and pixels of a case.

    rng: if given, the thinking of the earlier turns is sometimes left out, as clients do that send back
    the answers only; those turns are then not learned."""
    if case.raw is not None:
        ids = load().encode(f"]~!b[{case.raw}[e~[").ids
        return Sample(ids, [False] + [True] * (len(ids) - 1))
    messages, skipped = case.messages, frozenset()
    if rng is not None and rng.random() < 0.2:
        messages, skipped = forget(messages)
    texts, images, videos = [], [], []
    for message in messages:
        if message["role"] == "user" and not isinstance(message["content"], str):
            for part in message["content"]:
                if part["type"] != "text":
                    text, media = media_of(part)
                    texts.append(text)
                    (images if part["type"] == "image" else videos).append(media)
    ids = load().encode(render(messages, case.tools, case.thinking, texts)).ids
    return Sample(ids, learned(ids, case.thinking, skipped), images, videos)


def forget(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """The messages without the thinking of all assistant turns but the last; the numbers of the turns that had any."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    skipped = frozenset(n for n, i in enumerate(turns[:-1]) if messages[i].get("reasoning_content"))
    drop = {turns[n] for n in skipped}
    kept = [
        {k: v for k, v in m.items() if k != "reasoning_content"} if i in drop else m for i, m in enumerate(messages)
    ]
    return kept, skipped
