"""transformers' own M3 with our selection and attention says what it says without, and needs no T x N of anything."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# 5.12 itself takes one selection for all groups of heads: there is nothing equal to be had.
transformers = pytest.importorskip("transformers", minversion="5.13")
minimax = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")

from openm3.integrations.transformers import NAME, disable, enable  # noqa: E402

CLOSE = 2e-5  # float32, other orders of sums
VOCAB = 90


def text_config(**changes):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=24, dense_intermediate_size=56, shared_intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_local_experts=5,
        num_experts_per_tok=2, mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], index_n_heads=2, index_head_dim=16,
        index_block_size=8, index_topk_blocks=2, rope_parameters=dict(rope_theta=900.0, partial_rotary_factor=0.5),
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.MiniMaxM3VLTextConfig(**sizes | changes)


def random_weights(model, seed=0):
    """Large enough for every term to show; norms and biases far from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "inv_freq" not in name:
                wide = "norm" in name or name.endswith("bias")
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.3 if wide else 0.15))
    return model.eval()


def language_model(seed=0, **changes):
    return random_weights(minimax.MiniMaxM3VLForCausalLM(text_config(**changes)), seed)


def pair(**changes):
    """The stock model, and the same one enabled."""
    stock = language_model(**changes)
    return stock, enable(deepcopy(stock))


def tokens(*shape, seed=0):
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(index_block_size=4, index_topk_blocks=5, index_local_blocks=2),
        dict(index_n_heads=1, num_key_value_heads=3),
        dict(num_attention_heads=2, num_key_value_heads=1, index_n_heads=1, index_topk_blocks=1),
        dict(layer_types=["full_attention"] * 3, tie_word_embeddings=True),
        dict(layer_types=["minimax_m3_sparse"] * 3, index_head_dim=8, index_block_size=16),
    ],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefill_gives_the_stock_logits(changes, implementation):
    for seed, length in enumerate((1, 8, 61)):
        stock, ours = pair(seed=seed, **changes)
        stock.set_attn_implementation(implementation)
        ids = tokens(2, length, seed=seed)
        assert gap(logits(ours, ids), logits(stock, ids)) <= CLOSE
        assert gap(logits(ours, ids, use_cache=False), logits(stock, ids)) <= CLOSE


def test_the_comparison_would_show_another_selection():
    stock, ours = pair()
    ids = tokens(1, 61)
    for text in (ours.model,):
        for layer in text.layers[1:]:
            layer.self_attn.indexer.q_proj.weight.data.neg_()
    assert gap(logits(ours, ids), logits(stock, ids)) > 100 * CLOSE


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing_for_the_tokens_that_are_real(side):
    """Each row as the stock model computes it alone: its own blocks shift under padding on the left."""
    stock, ours = pair()
    lens, width = (61, 17, 40, 1), 64
    ids, mask = torch.zeros(4, width, dtype=torch.int64), torch.zeros(4, width, dtype=torch.int64)
    rows = [tokens(n, seed=n) for n in lens]
    for i, row in enumerate(rows):
        at = dict(left=torch.arange(width - len(row), width), right=torch.arange(len(row))).get(
            side, torch.randperm(width, generator=torch.Generator().manual_seed(i))[: len(row)].sort().values
        )
        ids[i, at], mask[i, at] = row, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = logits(ours, ids, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        assert gap(found[i][mask[i].bool()], logits(stock, row[None])[0]) <= CLOSE
    if side == "right":  # where the stock model computes padded rows rightly, all of them at once
        wanted = logits(stock, ids, attention_mask=mask)
        assert gap(found[mask.bool()], wanted[mask.bool()]) <= CLOSE


def generated(model, ids, **more):
    """New tokens, never an end."""
    out = model.generate(
        input_ids=ids, max_new_tokens=40, min_new_tokens=40, **dict(do_sample=False, suppress_tokens=[2]) | more
    )
    return out[:, ids.shape[1] :]


def test_generation_gives_the_stock_tokens():
    stock, ours = pair()
    for length in (1, 7, 50):
        ids = tokens(2, length, seed=length)
        given = dict(attention_mask=torch.ones_like(ids))
        assert torch.equal(generated(ours, ids, **given), generated(stock, ids, **given))
        beams = dict(num_beams=3, max_new_tokens=12, min_new_tokens=12)
        beams = [model.generate(input_ids=ids, do_sample=False, suppress_tokens=[2], **given | beams)
                 for model in (ours, stock)]  # fmt: skip
        assert torch.equal(*beams)


def test_generation_of_a_padded_batch_gives_each_row_its_own_tokens():
    stock, ours = pair()
    rows = [tokens(n, seed=n) for n in (50, 9, 31)]
    ids = torch.stack([torch.nn.functional.pad(row, (50 - len(row), 0)) for row in rows])
    found = generated(ours, ids, attention_mask=(ids > 0).long())
    for row, mine in zip(rows, found):
        assert torch.equal(mine, generated(stock, row[None], attention_mask=torch.ones(1, len(row)).long())[0])


@torch.no_grad()
def test_a_cached_run_in_chunks_gives_the_logits_of_one_pass():
    stock, ours = pair()
    ids = tokens(2, 60)
    cache, parts = transformers.DynamicCache(config=ours.config), []
    for chunk in ids.split((1, 30, 1, 20, 8), dim=1):
        parts.append(ours(input_ids=chunk, past_key_values=cache).logits)
    assert gap(torch.cat(parts, 1), logits(stock, ids)) <= CLOSE


def test_images_go_through():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=56)
    config = transformers.MiniMaxM3VLConfig(
        text_config=text_config().to_dict(), vision_config=vision, projector_hidden_size=40, image_token_index=3,
        video_token_index=4,
    )  # fmt: skip
    stock = random_weights(transformers.MiniMaxM3SparseForConditionalGeneration(config))
    ours = enable(deepcopy(stock))
    ids = tokens(1, 40)
    ids[0, 4:10] = 3
    media = dict(pixel_values=torch.randn(24, 1176), image_grid_thw=torch.tensor([(1, 4, 6)]))
    assert gap(logits(ours, ids, **media), logits(stock, ids, **media)) <= CLOSE
    assert ours.config.vision_config._attn_implementation == stock.config.vision_config._attn_implementation
    mask = torch.ones_like(ids)
    assert torch.equal(
        generated(ours, ids, attention_mask=mask, **media), generated(stock, ids, attention_mask=mask, **media)
    )


def test_gradients_are_the_stock_ones():
    stock, ours = pair()
    ids = tokens(2, 45)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for model in (stock, ours):
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), stock.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        assert mine.grad is None or gap(mine.grad, other.grad) <= 1e-4, name


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            # A mask is often a view of few numbers: what counts is what lies in memory.
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_as_large_as_queries_times_keys_is_ever_made(padded):
    stock, ours = pair(index_block_size=32, index_topk_blocks=4)
    n = 2048
    largest = {}
    for model, lengths in ((ours, (n, 2 * n)), (stock, (n,))):
        for length in lengths:
            ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.int64)
            mask[:, : 100 if padded else 0] = 0
            with Largest() as seen:
                model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
            largest[model is ours, length] = seen.elements
    assert largest[False, n] >= n * n  # the measure sees what the stock model makes
    assert largest[True, 2 * n] < (2 * n) ** 2 / 4
    assert largest[True, 2 * n] <= 2.2 * largest[True, n]


def test_disable_puts_everything_back():
    model = language_model()
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    ids = tokens(1, 40)
    before = logits(model, ids)
    model.set_attn_implementation("eager")
    enable(enable(model))
    assert model.config._attn_implementation == NAME
    disable(disable(model))
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, ids), before)
    assert {name: dict(vars(module)) for name, module in model.named_modules()}.keys() == state.keys()
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys(), name


def enabled(**changes):
    return enable(language_model(**changes))


IDS = tokens(1, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: enable(torch.nn.Linear(2, 2)), "model: Linear, must be a MiniMax-M3 of transformers"),
        (lambda: enable("MiniMaxAI/MiniMax-M3"), "model: str, must be a MiniMax-M3"),
        (lambda: enabled(index_local_blocks=3), "init_blocks \\+ local_blocks = 3: may not exceed topk = 2"),
        (lambda: enabled(index_local_blocks=0), "local_blocks = 0: must be an integer of at least 1"),
        (lambda: enabled(index_n_heads=6), "index_n_heads = 6: must divide num_key_value_heads = 2"),
        (lambda: enabled(attention_dropout=0.1), "attention_dropout = 0.1"),
        (lambda: enabled()(input_ids=IDS, output_attentions=True), "output_attentions = True"),
        (
            lambda: enabled()(input_ids=IDS, attention_mask=torch.ones(1, 1, 20, 20).bool()),
            "attention_mask: \\[1, 1, 20, 20\\], must be None or \\[batch, tokens\\]",
        ),
        (
            lambda: enabled()(input_ids=IDS, attention_mask=torch.ones(1, 18)),
            "attention_mask: \\[1, 18\\], must be \\[1, 20\\]",
        ),
        (
            lambda: enabled()(input_ids=IDS, position_ids=torch.arange(20)[None] % 10, use_cache=False),
            "position_ids: they start anew",
        ),
        (
            lambda: enabled().generate(IDS, cache_implementation="static", max_new_tokens=3),
            "needs a cache that grows",
        ),
        (
            lambda: enabled()(input_ids=IDS, past_key_values=transformers.DynamicCache()),
            "past_key_values: layer 1 is a DynamicLayer, which keeps no index keys",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_attention_set_meanwhile_is_refused_by_name():
    model = enabled()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation = 'sdpa': set while openm3's attention is enabled"):
        model(input_ids=IDS)
    assert logits(disable(model), IDS).shape == (1, 20, VOCAB)


def test_a_model_that_shares_the_config_of_an_enabled_one_is_told_to_be_enabled():
    config = text_config()
    one, two = (random_weights(minimax.MiniMaxM3VLForCausalLM(config)) for _ in range(2))
    enable(one)
    with pytest.raises(ValueError, match="call enable\\(model\\) on it"):
        two(input_ids=IDS)
