"""Grouped-query attention with per-head norms and partial RoPE, dense or through MSA with its index branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openm3 import msa
from openm3.config import TextConfig
from openm3.model.cache import LayerCache
from openm3.model.layers import RMSNorm
from openm3.ops import apply_rope

Stage = Literal["infer", "train", "warmup", "dense"]
STAGES = ("infer", "train", "warmup", "dense")


@dataclass(frozen=True)
class Step:
    """What all layers of one forward share. cos, sin float32 [T, rotary_dim / 2]; slots int64 [T] with a cache."""

    plan: msa.Plan
    cos: Tensor
    sin: Tensor
    stage: Stage
    slots: Tensor | None
    index_queries: Tensor | None


class Attention(nn.Module):
    """One layer's attention. `index_proj` holds the index branch's query and key rows (sparse layers only)."""

    def __init__(self, config: TextConfig, sparse: bool, **factory):
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.q_heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
        self.qkv_proj = nn.Linear(h, (self.q_heads + 2 * self.kv_heads) * d, bias=False, **factory)
        self.o_proj = nn.Linear(self.q_heads * d, h, bias=False, **factory)
        self.q_norm = RMSNorm(d, config.rms_norm_eps, **factory)
        self.k_norm = RMSNorm(d, config.rms_norm_eps, **factory)
        self.index_heads = config.sparse.index_heads if sparse else 0
        if sparse:
            di = config.sparse.index_dim
            self.index_proj = nn.Linear(h, (self.index_heads + 1) * di, bias=False, **factory)
            self.index_q_norm = RMSNorm(di, config.rms_norm_eps, **factory)
            self.index_k_norm = RMSNorm(di, config.rms_norm_eps, **factory)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, index: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """[T, H] -> q [T, Hq, D], k and v [T, Hkv, D], index queries [T, Hi, Di] and keys [T, Di] (or None).

        The index branch never sends a gradient into x.
        """
        sizes = (self.q_heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(sizes, dim=1)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        if not (self.index_heads and index):
            return q, k, v, None, None
        heads = self.index_proj(x.detach()).unflatten(-1, (self.index_heads + 1, -1))
        index_q = apply_rope(self.index_q_norm(heads[:, :-1]), cos, sin)
        index_k = apply_rope(self.index_k_norm(heads[:, -1:]), cos, sin).squeeze(1)
        return q, k, v, index_q, index_k

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, index_q: Tensor | None, index_k: Tensor | None, step: Step,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """[T, Hq, D] attended, and this layer's index loss in the stages "train" and "warmup"."""
        with torch.autocast(q.device.type, enabled=False):
            if cache is not None:
                cache.store(step.slots, k, v, index_k)
                k, v, index_k = cache.k, cache.v, cache.index_k
            if index_q is None:
                return msa.dense_attention(q, k, v, step.plan), None
            if step.stage == "warmup":
                loss = msa.index_loss(index_q, index_k, q, k, None, step.plan, queries=step.index_queries)
                return msa.dense_attention(q, k, v, step.plan), loss
            blocks = msa.select_blocks(index_q, index_k, step.plan)
            loss = None
            if step.stage == "train":
                loss = msa.index_loss(index_q, index_k, q, k, blocks, step.plan, queries=step.index_queries)
            return msa.sparse_attention(q, k, v, blocks, step.plan), loss
