"""The network against transformers' MiniMaxM3SparseForConditionalGeneration, eager, on random tiny models.

Weights travel through files: saved by one side, read by the other, in the spelling of the side that saves.
"""

from __future__ import annotations

import pytest
import torch
from model_tiny import gap, logits, prompt, random_model, tiny

from openm3.checkpoint import load_model, save_model

transformers = pytest.importorskip("transformers", minversion="5.12")
TOLERANCE = 2e-5

SHAPES = {
    "6 heads over 3, three index heads": tiny(num_key_value_heads=3, sparse=dict(index_heads=3)),
    "4 heads over 1, two local blocks of 4, tied": tiny(
        num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True,
        sparse=dict(index_heads=1, block_size=4, topk_blocks=3, local_blocks=2),
    ),
    "8 heads over 4, two index heads serve two groups each, one block": tiny(
        num_attention_heads=8, num_key_value_heads=4, head_dim=12, rotary_dim=6,
        sparse=dict(index_heads=2, block_size=16, topk_blocks=1),
    ),
    "budget above the context, sparse throughout, every expert chosen": tiny(
        sparse_layers=(True,) * 3, moe_layers=(True,) * 3, num_local_experts=3, num_experts_per_tok=3,
        sparse=dict(index_heads=1, topk_blocks=40),
    ),
    "all channels rotate, sparse attention before a dense MLP": tiny(
        num_attention_heads=9, num_key_value_heads=3, head_dim=10, rotary_dim=10, hidden_size=44,
        sparse_layers=(True, False, True), moe_layers=(False, True, False), num_experts_per_tok=1,
        sparse=dict(index_heads=3, index_dim=14, topk_blocks=3),
    ),
    "another tower": tiny(
        vision=dict(hidden_size=54, num_attention_heads=3, num_hidden_layers=3, hidden_act="quick_gelu", patch_size=6,
                    temporal_patch_size=1, layer_norm_eps=1e-2),
    ),
}  # fmt: skip
MEDIA = (3, ("image", 1, 4, 6), 2, ("video", 2, 4, 4), ("image", 1, 2, 2), 7, ("video", 1, 2, 6), ("image", 1, 8, 4), 4)
PROMPTS = [(1,), (7,), (8,), (33,), (64,), (101,), MEDIA, (50, *MEDIA), (("image", 1, 6, 6),), (("video", 3, 2, 4), 40)]


def reference(directory):
    model = transformers.MiniMaxM3SparseForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def theirs(model, p):
    return model(input_ids=p.ids[None], **p.media).logits[0]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers_on_our_files(name, tmp_path):
    ours = random_model(SHAPES[name])
    save_model(ours, tmp_path)
    other = reference(tmp_path)
    for i, parts in enumerate(PROMPTS):
        p = prompt(ours.config, *parts, seed=i)
        assert gap(logits(ours, p), theirs(other, p)) <= TOLERANCE, parts


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers_on_its_files(name, tmp_path):
    save_model(random_model(SHAPES[name], seed=1), tmp_path / "ours")
    other = reference(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    for i, parts in enumerate([(33,), (70, *MEDIA)]):
        p = prompt(ours.config, *parts, seed=i)
        assert gap(logits(ours, p), theirs(other, p)) <= TOLERANCE, parts


def test_decode_is_that_of_transformers(tmp_path):
    from model_tiny import Paged

    ours = random_model(tiny())
    save_model(ours, tmp_path)
    other, p = reference(tmp_path), prompt(ours.config, 45)
    paged, cache = Paged(ours), None
    for piece in (p.ids[:20], *p.ids[20:].split(1)):
        with torch.no_grad():
            out = other(input_ids=piece[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert gap(paged.step({0: piece}), out.logits[0]) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["norm", "bias", "index_proj", "index_k_norm", "q_norm", "router", "shared", "merge_1", "qkv", "pre_norm"]
)
def test_a_wrong_weight_would_show(name):
    """The comparison above can fail: each kind of parameter moves the logits by far more than the tolerance."""
    config = tiny()
    model, p = random_model(config), prompt(config, 60, *MEDIA)
    before = logits(model, p)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in key:
                tensor.add_(torch.randn(tensor.shape, generator=torch.manual_seed(1)) * 0.1)
    assert gap(logits(model, p), before) > 100 * TOLERANCE
