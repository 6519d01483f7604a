"""transformers' own MiniMax-M3 with openm3's selection and attention: no mask and no scores of T x N, on CPU and GPU.

    from openm3.integrations.transformers import enable

    model = AutoModelForImageTextToText.from_pretrained(...)
    enable(model)                    # disable(model) puts transformers' own back
    model.generate(**inputs)

It goes through the places that transformers has for it: an attention function and a mask function under a name of ours.
The mask function gives a `Batch`, which says where each row's tokens are, instead of a mask; transformers hands it to
every layer. The index branch's `forward` gives its queries and keys instead of blocks, and the attention function does
the rest. transformers' own cache (`DynamicCache`) is used as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from openm3 import msa
from openm3.msa.plan import to_device

NAME = "openm3_msa"
_BEFORE = "_openm3_attention_before"

Rows = tuple[Tensor, Tensor]  # (row of the batch, place in it) of each real token, int64 [n] each


def enable(model: nn.Module) -> nn.Module:
    """Makes a MiniMax-M3 of transformers (>= 5.12) select and attend through openm3; returns the model.

    `model`: the whole one, its text model, or anything that holds one. Padding on either side, cached generation and
    gradients (without dropout) work as before. Raises ValueError for other models, for sizes of the selection that
    openm3 has not, and for attention over transformers' pages; ImportError without transformers. Later, a call raises
    ValueError for what cannot be honoured: `output_attentions`, dropout, 4-D masks, packed rows, a static cache.
    """
    decoders = _decoders(model)
    for text in decoders:
        _check_config(text.config)
    _register()
    for text in decoders:
        if hasattr(text, _BEFORE):
            continue
        setattr(text, _BEFORE, text.config._attn_implementation)
        text.set_attn_implementation(NAME)
        for indexer in _indexers(text):
            setattr(indexer, _BEFORE, vars(indexer).get("forward"))  # one that somebody else put there
            indexer.forward = MethodType(_index_branch, indexer)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Puts transformers' own attention back, the implementation that was set when `enable` came; returns the model."""
    for text in _decoders(model):
        if hasattr(text, _BEFORE):
            text.set_attn_implementation(getattr(text, _BEFORE))
            delattr(text, _BEFORE)
            for indexer in _indexers(text):
                del indexer.forward
                if getattr(indexer, _BEFORE) is not None:
                    indexer.forward = getattr(indexer, _BEFORE)
                delattr(indexer, _BEFORE)
    return model


@dataclass(eq=False)
class Batch:
    """Which tokens of a padded batch are real, as a plan of openm3: what layers get in place of a mask.

    `queries`, `keys`: None where all are. `where` keeps plan and rows on each device that a layer asked from.
    """

    shape: tuple[int, int]
    lens_q: list[int]
    lens_k: list[int]
    queries: Rows | None
    keys: Rows | None
    sizes: dict[str, int]
    where: dict[torch.device, tuple[msa.Plan, Rows | None, Rows | None]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[msa.Plan, Rows | None, Rows | None]:
        if device not in self.where:
            offsets = ([0, *torch.tensor(lens).cumsum(0).tolist()] for lens in (self.lens_q, self.lens_k))
            rows = (r and tuple(to_device(x, device) for x in r) for r in (self.queries, self.keys))
            self.where[device] = (msa.Plan.packed(*offsets, device=device, **self.sizes), *rows)
        return self.where[device]


def batch_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **_: Any,
) -> Batch:
    """The mask function: real tokens are those that the 2-D `attention_mask` [B, kv_length] holds 1 for.

    A row's real tokens are one sequence, whatever padding lies before, behind or between them.
    """
    from transformers.masking_utils import causal_mask_function

    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_length:
        raise ValueError(
            f"past_key_values: {kv_length} keys for {q_length} queries at {q_offset}; openm3's attention needs a cache "
            "that grows (DynamicCache), not a static one"
        )
    if mask_function is not causal_mask_function:
        raise ValueError(
            "position_ids: they start anew within a row, which packs sequences; openm3's attention takes each sequence "
            "as a row of its own, with an attention_mask [batch, tokens]"
        )
    sizes = _sizes(config)
    if attention_mask is None:
        return Batch((batch_size, q_length), [q_length] * batch_size, [kv_length] * batch_size, None, None, sizes)
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask: {list(attention_mask.shape)}, must be [{batch_size}, {kv_length}], a value for each "
            "token seen so far"
        )
    real = attention_mask.cpu().bool()
    new = real[:, kv_length - q_length :]
    lens_q, lens_k = new.sum(1).tolist(), real.sum(1).tolist()
    queries, keys = (None if bool(x.all()) else x.nonzero(as_tuple=True) for x in (new, real))
    return Batch((batch_size, q_length), lens_q, lens_k, queries, keys, sizes)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    block_indices: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, S, D], key and value [B, Hkv, N, D] -> [B, S, Hq, D]; zeros for padding.

    `block_indices`: the index branch's queries [B, Hi, S, Di] and keys [B, 1, N, Di], None in dense layers.
    """
    if not isinstance(attention_mask, Batch):
        found = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask: {found}, must be None or [batch, tokens] while openm3's attention is enabled"
        )
    if isinstance(block_indices, Tensor):
        raise ValueError("this model's config is set to openm3's attention, the model is not: call enable(model) on it")
    if dropout:
        raise ValueError(f"attention_dropout = {dropout}: must be 0 while openm3's attention is enabled")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions = True: openm3's attention has no matrix of weights; call disable(model)")
    plan, new, seen = attention_mask.on(query.device)
    q, k, v = _packed(query, new), _packed(key, seen), _packed(value, seen)
    with torch.autocast(query.device.type, enabled=False):
        if block_indices is None:
            out = msa.dense_attention(q, k, v, plan, softmax_scale=scaling)
        else:
            index_q, index_k = _packed(block_indices[0], new), _packed(block_indices[1], seen)[:, 0]
            blocks = msa.select_blocks(index_q, index_k, plan)
            out = msa.sparse_attention(q, k, v, blocks, plan, softmax_scale=scaling)
    if new is None:
        return out.unflatten(0, attention_mask.shape), None
    return out.new_zeros(*attention_mask.shape, *out.shape[1:]).index_put(new, out), None


def _packed(x: Tensor, rows: Rows | None) -> Tensor:
    """[B, H, S, D] -> [n, H, D]: the real tokens, row after row; a view of a batch of one."""
    x = x.transpose(1, 2)
    return x.flatten(0, 1) if rows is None else x[rows]


@torch.no_grad()
def _index_branch(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any,
    position_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """In place of the indexer's `forward`: queries [B, Hi, S, Di], and keys [B, 1, N, Di] of all seen tokens."""
    if self.config._attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation = {self.config._attn_implementation!r}: set while openm3's attention is enabled; "
            "call disable(model) first"
        )
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
    q = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
    k = self.k_norm(self.k_proj(hidden_states))[:, None]
    q, k = rotate(q, k, *(x[..., : self.head_dim] for x in position_embeddings))
    if past_key_values is None:
        return q, k
    layer = past_key_values.layers[self.layer_idx]
    if not hasattr(layer, "update_index"):
        raise ValueError(
            f"past_key_values: layer {self.layer_idx} is a {type(layer).__name__}, which keeps no index keys; use "
            "DynamicCache(config=model.config), or leave it to the model"
        )
    return q, layer.update_index(k)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, batch_of)


def _decoders(model: nn.Module) -> list[nn.Module]:
    """The MiniMax-M3 text models within `model`."""
    try:
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel
    except ImportError as error:
        raise ImportError(
            "openm3.integrations.transformers needs transformers >= 5.12, which has MiniMax-M3"
        ) from error
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, MiniMaxM3VLTextModel)]
    if not found:
        raise ValueError(f"model: {type(model).__name__}, must be a MiniMax-M3 of transformers (minimax_m3_vl)")
    return found


def _indexers(text: nn.Module) -> list[nn.Module]:
    return [layer.self_attn.indexer for layer in text.layers if layer.self_attn.indexer is not None]


def _sizes(config: Any) -> dict[str, int]:
    return dict(
        block_size=config.index_block_size, topk=config.index_topk_blocks, local_blocks=config.index_local_blocks
    )


def _check_config(config: Any) -> None:
    """ValueError for what openm3's operator cannot compute."""
    implementation = config._attn_implementation or ""
    if implementation.startswith("paged|"):
        raise ValueError(
            f"attn_implementation = {implementation!r}: openm3's attention takes transformers' plain caches"
        )
    msa.Plan.packed([0, 1], **_sizes(config))  # refuses sizes that cannot be, by name
    if config.num_key_value_heads % config.index_n_heads:
        raise ValueError(
            f"index_n_heads = {config.index_n_heads}: must divide num_key_value_heads = {config.num_key_value_heads}"
        )
    if config.attention_dropout:
        raise ValueError(f"attention_dropout = {config.attention_dropout}: must be 0 for openm3's attention")
