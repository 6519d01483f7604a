"""Mixture of experts: sigmoid scores, a selection bias without gradient, and experts as two grouped matrix products.

Tokens are sorted by expert, multiplied group by group in one call and put back by the inverse permutation: no Python
loop over experts, no host sync, and the same order of sums every time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm3.config import TextConfig
from openm3.model.layers import MLP, compute_dtype, swiglu_oai


class Router(nn.Module):
    """Chooses experts by sigmoid(x W^T) + bias and weighs them by the unbiased score (m3.md section 1)."""

    def __init__(self, config: TextConfig, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size, **factory))
        # e_score_correction_bias on disk; kept in float32 and moved by the trainer, not by a gradient.
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(config.num_local_experts, device=factory.get("device")))
        self.topk, self.scale = config.num_experts_per_tok, config.routed_scaling_factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves as every module does, but `model.to(torch.bfloat16)` leaves the bias in float32, unrounded."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H] -> chosen experts int64 [T, k], their weights float32 [T, k], all scores float32 [T, E]."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.weight.float()))
        chosen = (scores.detach() + self.bias).topk(self.topk, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.scale, scores


class Experts(nn.Module):
    """All experts' weights stacked: gate_up [E, 2I, H], down [E, H, I]."""

    def __init__(self, config: TextConfig, **factory):
        super().__init__()
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up = nn.Parameter(torch.empty(e, 2 * i, h, **factory))
        self.down = nn.Parameter(torch.empty(e, h, i, **factory))
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows x [R, H] sorted by expert; `ends` int32 [E]: where each expert's rows end. Returns [R, H]."""
        dtype = compute_dtype(x)
        up = F.grouped_mm(x.to(dtype), self.gate_up.to(dtype).transpose(1, 2), offs=ends)
        return F.grouped_mm(swiglu_oai(up, self.alpha, self.limit), self.down.to(dtype).transpose(1, 2), offs=ends)


class MoE(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: TextConfig, **factory):
        super().__init__()
        self.router = Router(config, **factory)
        self.experts = Experts(config, **factory)
        self.shared = MLP(
            config.hidden_size, config.shared_intermediate_size, config.swiglu_alpha, config.swiglu_limit, **factory
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H] -> [T, H]; tokens an expert received and the sum of its normalized scores, float32 [E] each."""
        chosen, weights, scores = self.router(x)
        t, k = chosen.shape
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        load = torch.zeros_like(self.router.bias).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
        routed = self.experts(x[order // k], load.cumsum(0).int())
        back = torch.empty_like(order).scatter_(0, order, torch.arange(t * k, device=x.device))
        routed = (routed[back].unflatten(0, (t, k)).float() * weights[..., None]).sum(1).to(x.dtype)
        return routed + self.shared(x), load, (scores / scores.sum(-1, keepdim=True)).sum(0)


def balance_loss(load: Tensor, scores: Tensor) -> Tensor:
    """E * sum(share of tokens * mean normalized score) of [..., E] each; 1 when balanced (Switch Transformer)."""
    shares, means = (x / x.sum(-1, keepdim=True).clamp(min=1.0) for x in (load, scores))
    return load.shape[-1] * (shares * means).sum(-1)
