"""Bad input is refused with its value before anything is computed."""

from __future__ import annotations

import pytest
import torch
from model_tiny import IMAGE, VIDEO, VOCAB, prompt, random_model, tiny

from openm3.model import KVCache, plan_args
from openm3.msa import Plan

CONFIG = tiny()
P = prompt(CONFIG, 5, ("image", 1, 4, 6), 3, ("video", 2, 4, 4), 2)
GRID = torch.tensor([[1, 4, 6]])
ROWS = torch.zeros(24, CONFIG.vision.patch_values)
TEXT = torch.arange(10, 30)
SIZES = plan_args(CONFIG)


@pytest.fixture(scope="module")
def cold():
    """A model that may not compute anything."""
    model = random_model(CONFIG)

    def computed(*_):
        raise AssertionError("computed before the check")

    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(computed)
    return model


def ids_with(value: int) -> torch.Tensor:
    ids = TEXT.clone()
    ids[3] = value
    return ids


def paged_plan(tokens: int = 20) -> Plan:
    return Plan.paged(torch.zeros(1, 8, dtype=torch.int32), [tokens], [0, tokens], **SIZES)


REFUSED = {
    "one embedding too few": (P.ids, dict(media_embeds=torch.zeros(13, 40)), "media: 14 placeholder.*13 embeddings"),
    "image tokens without an image": (ids_with(IMAGE), {}, "image: 1 placeholder tokens in input_ids, 0 embeddings"),
    "video tokens without a video": (ids_with(VIDEO), {}, "video: 1 placeholder tokens in input_ids, 0 embeddings"),
    "an image without its tokens": (TEXT, dict(pixel_values=ROWS, image_grid_thw=GRID), "image: 0 placeholder.*6 emb"),
    "a video as an image": (P.ids, dict(pixel_values=P.videos, image_grid_thw=P.video_grid), "image: 6 placeholder"),
    "a grid that does not divide": (
        TEXT, dict(pixel_values=ROWS, image_grid_thw=torch.tensor([[1, 3, 8]])), "\\(1, 3, 8\\).*multiples of 2"),
    "an empty grid": (TEXT, dict(pixel_values=ROWS, image_grid_thw=torch.tensor([[0, 4, 6]])), "\\(0, 4, 6\\)"),
    "a negative grid": (TEXT, dict(pixel_values=ROWS, image_grid_thw=torch.tensor([[-1, -4, 6]])), "\\(-1, -4, 6\\)"),
    "rows that do not fill the grid": (
        TEXT, dict(pixel_values=ROWS[:20], image_grid_thw=GRID), "image pixels: \\[20, 96\\], must be \\[24, 96\\]"),
    "rows of another patch": (
        TEXT, dict(pixel_values=torch.zeros(24, 95), image_grid_thw=GRID), "\\[24, 95\\], must be \\[24, 96\\]"),
    "pixels without a grid": (TEXT, dict(pixel_values=ROWS), "image: pixels and grid_thw go together"),
    "a grid without pixels": (TEXT, dict(video_grid_thw=GRID), "video: pixels and grid_thw go together"),
    "a flat grid": (TEXT, dict(pixel_values=ROWS, image_grid_thw=torch.tensor([1, 4, 6])), "must be \\[n, 3\\]"),
    "media given twice": (
        P.ids, dict(P.media, media_embeds=torch.zeros(14, 40)), "media_embeds: given together with pixels"),
    "a token above the vocabulary": (ids_with(VOCAB), {}, "token id 90, must be in 0..89"),
    "a negative token": (ids_with(-1), {}, "token id -1, must be in 0..89"),
    "tokens as floats": (TEXT.float(), {}, "input_ids: torch.float32 \\[20\\], must be int64 \\[T\\]"),
    "tokens with a batch axis": (TEXT[None], {}, "\\[1, 20\\], must be int64 \\[T\\]"),
    "an unknown stage": (TEXT, dict(msa="full"), "msa = 'full': must be one of infer, train, warmup, dense"),
    "a cache without a plan": (TEXT, dict(cache=KVCache(CONFIG, 4)), "cache: needs a paged plan"),
    "a paged plan without a cache": (TEXT, dict(plan=paged_plan()), "a paged plan goes with a cache"),
    "a packed plan with a cache": (
        TEXT, dict(plan=Plan.packed([0, 20], **SIZES), cache=KVCache(CONFIG, 4)), "a paged plan goes with a cache"),
    "a plan for other tokens": (
        TEXT, dict(plan=paged_plan(19), cache=KVCache(CONFIG, 4)), "20 tokens, the plan has 19"),
    "offsets that do not end at the last token": (TEXT, dict(cu_seqlens=[0, 19]), "20 tokens, the plan has 19"),
    "a position without a key": (TEXT, dict(positions=torch.arange(1, 21)), "positions\\[19\\] = 20"),
    "a plan and offsets": (TEXT, dict(plan=Plan.packed([0, 20], **SIZES), cu_seqlens=[0, 20]), "cu_seqlens"),
    "a plan and positions": (
        TEXT, dict(plan=Plan.packed([0, 20], **SIZES), positions=torch.arange(20)), "positions"),
    "more tokens than the context": (torch.zeros(513, dtype=torch.int64), {}, "513 tokens: the model's context is 512"),
    "a plan of another block size": (
        TEXT, dict(plan=Plan.paged(torch.zeros(1, 8, dtype=torch.int32), [20], [0, 20], block_size=16, topk=2),
                   cache=KVCache(CONFIG, 4)), "blocks of 16 tokens, the cache has pages of 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_bad_input_is_refused_before_any_compute(cold, name):
    ids, arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refused:
        cold(ids, **arguments)
    assert "\n" not in str(refused.value)


def test_media_alone_is_checked_too(cold):
    with pytest.raises(ValueError, match="media pixels: \\[20, 96\\]"):
        cold.encode_media(ROWS[:20], GRID)


def test_no_tokens_give_no_hidden_states():
    model = random_model(CONFIG)
    assert model(torch.zeros(0, dtype=torch.int64)).hidden.shape == (0, 40)
