"""The decoder: pre-norm layers over a packed run of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm3.config import TextConfig
from openm3.model.attention import Attention, Step
from openm3.model.cache import LayerCache
from openm3.model.layers import MLP, RMSNorm
from openm3.model.moe import MoE

PIECE = 16_384  # tokens that go through the experts together where no gradient is kept


class DecoderLayer(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)), each of the two dense or sparse as the config says."""

    def __init__(self, config: TextConfig, index: int, **factory):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.attn = Attention(config, config.sparse_layers[index], **factory)
        self.mlp: MoE | MLP
        if config.moe_layers[index]:
            self.mlp = MoE(config, **factory)
        else:
            sizes = (config.hidden_size, config.dense_intermediate_size)
            self.mlp = MLP(*sizes, config.swiglu_alpha, config.swiglu_limit, **factory)

    def forward(
        self, x: Tensor, step: Step, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """[T, H] -> [T, H], the index loss, and the router's (load, score sums)."""
        q, k, v, index_q, index_k = self.before(x, step.cos, step.sin, step.stage != "dense")
        attended, index_loss = self.attn.attend(q, k, v, index_q, index_k, step, cache)
        if len(x) <= PIECE or torch.is_grad_enabled():
            x, router = self.after(x, attended)
        else:  # the experts' intermediates of all tokens at once would be many times the hidden states
            parts = [self.after(*rows) for rows in zip(x.split(PIECE), attended.split(PIECE))]
            x = torch.cat([out for out, _ in parts])
            routers = [router for _, router in parts if router is not None]
            router = (sum(load for load, _ in routers), sum(sums for _, sums in routers)) if routers else None
        return x, index_loss, router

    def before(
        self, x: Tensor, cos: Tensor, sin: Tensor, index: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What leads to attention: tensors in, tensors out, so that it compiles as one piece."""
        return self.attn.project(self.attn_norm(x), cos, sin, index)

    def after(self, x: Tensor, attended: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What follows attention: [T, H] and [T, Hq, D] -> [T, H] and the router's (load, score sums)."""
        x = x + self.attn.o_proj(attended.flatten(1))
        if isinstance(self.mlp, MLP):
            return x + self.mlp(self.mlp_norm(x)), None
        out, load, scores = self.mlp(self.mlp_norm(x))
        return x + out, (load, scores)
