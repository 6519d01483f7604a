"""One network, many ways through it: packed, in chunks over pages, token by token, with media in pieces."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_tiny import Paged, gap, logits, media_embeds, prompt, random_model, tiny

from openm3.model import KVCache, plan_args
from openm3.msa import Plan

SAME = 1e-5  # the same sums in another order, relative to the largest logit
IMAGES = (3, ("image", 1, 4, 6), 2, ("video", 2, 4, 4), ("image", 1, 8, 4), 9)


@pytest.fixture(scope="module")
def model():
    return random_model(
        tiny(num_hidden_layers=4, sparse_layers=(False, True, True, True), moe_layers=(False,) + (True,) * 3)
    )


def text(length: int, seed: int = 0) -> torch.Tensor:
    return prompt(tiny(), length, seed=seed).ids


@pytest.mark.parametrize("lengths", [(1, 40, 8), (33, 33), (16, 0, 65, 3)])
def test_a_packed_batch_equals_each_sequence_alone(model, lengths):
    alone = [text(n, seed=i) for i, n in enumerate(lengths)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.no_grad():
        packed = model.logits(model(torch.cat(alone), cu_seqlens=cu_seqlens).hidden)
        for ids, found in zip(alone, packed.split(lengths)):
            if len(ids):
                assert gap(found, model.logits(model(ids).hidden)) <= SAME


def test_a_packed_batch_with_media_equals_each_prompt_alone(model):
    parts = [IMAGES, (40,), (("video", 1, 4, 8), 20, ("image", 1, 2, 6))]
    alone = [prompt(model.config, *p, seed=i) for i, p in enumerate(parts)]
    lengths = [len(p.ids) for p in alone]
    with torch.no_grad():
        packed = model(
            torch.cat([p.ids for p in alone]), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).tolist(),
            pixel_values=torch.cat([p.images for p in alone]), image_grid_thw=torch.cat([p.image_grid for p in alone]),
            pixel_values_videos=torch.cat([p.videos for p in alone]),
            video_grid_thw=torch.cat([p.video_grid for p in alone]),
        )  # fmt: skip
        for p, found in zip(alone, model.logits(packed.hidden).split(lengths)):
            assert gap(found, logits(model, p)) <= SAME


@settings(deadline=None, max_examples=25)
@given(data=st.data(), length=st.integers(1, 90), seed=st.integers(0, 99))
def test_chunked_prefill_equals_one_pass(model, data, length, seed):
    ids = text(length, seed)
    with torch.no_grad():
        wanted = model.logits(model(ids).hidden)
    paged, found = Paged(model, seed=seed), []
    while paged.lens[0] < length:
        size = data.draw(st.integers(1, length - paged.lens[0]))
        found.append(paged.step({0: ids[paged.lens[0] : paged.lens[0] + size]}))
    assert gap(torch.cat(found), wanted) <= SAME


@pytest.mark.parametrize("length", [9, 41])
def test_cached_decode_equals_prefill(model, length):
    ids = text(length)
    paged = Paged(model)
    found = torch.cat([paged.step({0: token}) for token in ids.split(1)])
    with torch.no_grad():
        assert gap(found, model.logits(model(ids).hidden)) <= SAME


def test_decode_and_prefill_of_several_sequences_share_a_step(model):
    """As an engine mixes them: one decodes, one is in the middle of its prompt, one begins."""
    lengths = (50, 70, 20, 33)
    ids = [text(n, seed=i) for i, n in enumerate(lengths)]
    paged = Paged(model, len(lengths))
    paged.step({0: ids[0][:49], 1: ids[1][:30]})
    mixed = paged.step({1: ids[1][30:57], 0: ids[0][49:], 2: ids[2], 3: ids[3][:32]}).split([27, 1, 20, 32])
    decoded = paged.step({1: ids[1][57:58], 3: ids[3][32:]}).split(1)
    with torch.no_grad():
        whole = [model.logits(model(x).hidden) for x in ids]
    wanted = (whole[1][30:57], whole[0][49:], whole[2], whole[3][:32], whole[1][57:58], whole[3][32:])
    for found, right in zip((*mixed, *decoded), wanted):
        assert gap(found, right) <= SAME


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40))
@example(1)
@example(4)  # cuts the first image
def test_an_image_may_straddle_chunks(model, size):
    p = prompt(model.config, *IMAGES)
    ready = media_embeds(model, p).detach()
    is_media = (p.ids == 3) | (p.ids == 4)
    paged, found, used = Paged(model), [], 0
    for piece, mask in zip(p.ids.split(size), is_media.split(size)):
        count = int(mask.sum())
        found.append(paged.step({0: piece}, media_embeds=ready[used : used + count]))
        used += count
    assert used == len(ready)
    assert gap(torch.cat(found), logits(model, p)) <= SAME


def test_ready_embeddings_equal_pixels(model):
    p = prompt(model.config, *IMAGES)
    ready = media_embeds(model, p).detach()
    with torch.no_grad():
        assert gap(model.logits(model(p.ids, media_embeds=ready).hidden), logits(model, p)) <= SAME
        elsewhere = model.logits(model(p.ids, media_embeds=ready.flip(0)).hidden)
    assert gap(elsewhere, logits(model, p)) > 1e-2


def test_the_order_of_images_of_one_size_is_kept(model):
    """Entries of one length are brought together in the tower, and must come back to their places."""
    grids = [(1, 4, 6), (1, 2, 2), (1, 6, 4), (1, 2, 2), (2, 2, 2), (1, 4, 6)]
    p = prompt(model.config, *(("image", *g) for g in grids))
    rows = p.images.split([t * h * w for t, h, w in grids])
    with torch.no_grad():
        whole = model.encode_media(p.images, p.image_grid)
        alone = [model.encode_media(x, torch.tensor([g])) for x, g in zip(rows, grids)]
    assert gap(whole, torch.cat(alone)) <= SAME


def test_given_positions_equal_the_default_ones(model):
    ids = text(50)
    cu_seqlens, positions = [0, 20, 50], torch.cat((torch.arange(20), torch.arange(30)))
    with torch.no_grad():
        found = model(ids, cu_seqlens=cu_seqlens, positions=positions).hidden
        assert gap(found, model(ids, cu_seqlens=cu_seqlens).hidden) <= SAME


def test_tokens_of_a_chunk_may_come_in_any_order_with_their_positions(model):
    """Their keys go to the slots of their positions, so only the rows are permuted."""
    ids = text(60)
    order = torch.randperm(25, generator=torch.manual_seed(0))
    results = []
    for shuffled in (torch.arange(25), order):
        paged = Paged(model)
        paged.step({0: ids[:35]})
        plan = Plan.paged(paged.table, [60], [0, 25], positions=35 + shuffled, **plan_args(model.config))
        with torch.no_grad():
            results.append(model(ids[35:][shuffled], cache=paged.cache, plan=plan).hidden)
    assert gap(results[1], results[0][order]) <= SAME


def test_the_dense_stage_sees_all_of_the_context(model):
    dense = random_model(tiny(sparse=dict(topk_blocks=64)))
    sparse = random_model(tiny())
    ids = text(80)
    with torch.no_grad():
        everything = dense(ids).hidden
        assert gap(sparse(ids, msa="dense").hidden, everything) <= SAME
        assert gap(sparse(ids, msa="warmup").hidden, everything) <= SAME
        assert gap(sparse(ids).hidden, everything) > 1e-2


def test_the_same_input_gives_the_same_bits(model):
    p = prompt(model.config, *IMAGES, 40)
    assert torch.equal(logits(model, p), logits(model, p))


def test_only_sparse_layers_keep_index_keys(model):
    cache = KVCache(model.config, 3)
    assert [layer.index_k is not None for layer in cache.layers] == [False, True, True, True]
    assert cache.page_size == model.config.text.sparse.block_size
    assert cache.layers[1].k.shape == (3, 2, 8, 16)
    assert cache.layers[1].index_k.shape == (3, 8, 12)


def test_a_bf16_model_follows_the_float32_one():
    # Without choices: near a tie of experts or blocks the two may choose otherwise.
    wide = random_model(tiny(num_local_experts=2, sparse=dict(topk_blocks=40)))
    p, half = prompt(wide.config, 40), copy.deepcopy(wide).to(torch.bfloat16)
    found = logits(half, p)
    assert found.dtype == torch.float32
    assert gap(found, logits(wide, p)) < 5e-2
