"""The small parts: Gemma-style RMSNorm, rotary positions, SwiGLU-OAI and the dense MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm3.ops import rms_norm


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (1 + w) over the last axis, in float32, cast back last: every norm of M3."""

    def __init__(self, size: int, eps: float, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, rotary_dim / 2].

    The angles are float32(position) * float32(theta^(-2i / rotary_dim)), rounded as in the reference.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponent)
    return angles.cos(), angles.sin()


def swiglu_oai(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """[..., 2I] -> [..., I]: (clamp(up, -l, l) + 1) * g * sigmoid(alpha * g) with g = min(gate, l)."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1.0) * gate * torch.sigmoid(alpha * gate)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class MLP(nn.Module):
    """SwiGLU-OAI MLP [T, H] -> [T, H]; gate and up are one matrix."""

    def __init__(self, hidden: int, intermediate: int, alpha: float, limit: float, **factory):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False, **factory)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, **factory)
        self.alpha, self.limit = alpha, limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu_oai(self.gate_up_proj(x), self.alpha, self.limit))
