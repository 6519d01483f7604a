"""The vision tower, for images and video alike: patches in, one embedding for each 2x2 patches out.

Rows of all images travel packed; attention is full within one grid entry (an image, or a video segment). Entries with
the same number of rows are brought together first, so that they attend as one batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from openm3.config import M3Config, VisionConfig
from openm3.msa.plan import to_device
from openm3.ops import apply_rope

# All but cuDNN, which builds a plan for every new number of entries.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Grid = tuple[tuple[int, int, int], ...]
Groups = list[tuple[int, int]]  # (entries, rows of each), one after the other


def activation(name: str, x: Tensor) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


@lru_cache(maxsize=256)
def _coordinates(t: int, h: int, w: int, merge: int) -> Tensor:
    """float32 [t * h * w, 3]: each row's (t, h, w) in the order (t, h / merge, w / merge, merge, merge)."""
    grid = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
    grid = grid.view(t, h // merge, merge, w // merge, merge, 3).transpose(2, 3)
    return grid.reshape(-1, 3).float()


def vision_rope(grid: Grid, config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [rows, 3 * (head_dim // 3 // 2)]: the angles of t, h and w, with the same frequencies."""
    each = 2 * ((config.head_dim // 3) // 2)
    exponent = torch.arange(0, each, 2).float() / each
    frequencies = to_device(1.0 / config.rope_theta**exponent, device)
    where = to_device(torch.cat([_coordinates(*entry, config.spatial_merge_size) for entry in grid]), device)
    angles = (where[..., None] * frequencies).flatten(1)
    return angles.cos(), angles.sin()


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig, **factory):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, **factory)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: Groups) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)  # [rows, heads, D]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        outs, start = [], 0
        for entries, length in groups:
            rows = slice(start, start + entries * length)
            batch = [y[rows].unflatten(0, (entries, length)).transpose(1, 2) for y in (q, k, v)]
            outs.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
            start = rows.stop
        return self.out(torch.cat(outs).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig, **factory):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, **factory)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, **factory)
        self.act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activation(self.act, self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer as in CLIP."""

    def __init__(self, config: VisionConfig, **factory):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **factory)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **factory)
        self.attn = VisionAttention(config, **factory)
        self.mlp = VisionMLP(config, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: Groups) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Patch rows [rows, C * T * P * P] -> [rows, hidden]; no class token, no norm at the end."""

    def __init__(self, config: VisionConfig, **factory):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_values, config.hidden_size, bias=False, **factory)
        self.pre_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **factory)
        self.layers = nn.ModuleList(VisionLayer(config, **factory) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        order, groups = _by_length(grid)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        order, back = (to_device(rows, pixel_values.device) for rows in (order, back))
        x = self.pre_norm(self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)))[order]
        cos, sin = (angles[order] for angles in vision_rope(grid, self.config, x.device))
        with sdpa_kernel(KERNELS):
            for layer in self.layers:
                x = layer(x, cos, sin, groups)
        return x[back]


def _by_length(grid: Grid) -> tuple[Tensor, Groups]:
    """An order of the rows that brings entries of one length together, int64 [rows], and the groups in that order."""
    starts: dict[int, list[int]] = {}
    at = 0
    for t, h, w in grid:
        starts.setdefault(t * h * w, []).append(at)
        at += t * h * w
    rows = [(torch.tensor(first)[:, None] + torch.arange(n)).flatten() for n, first in starts.items()]
    return torch.cat(rows), [(len(first), n) for n, first in starts.items()]


class Projector(nn.Module):
    """Each patch to the decoder's width, then `spatial_merge_size`^2 neighbours to one token."""

    def __init__(self, config: M3Config, **factory):
        super().__init__()
        hidden, inner = config.text.hidden_size, config.projector_hidden_size
        self.merge = config.vision.spatial_merge_size**2
        self.linear_1 = nn.Linear(config.vision.hidden_size, inner, **factory)
        self.linear_2 = nn.Linear(inner, hidden, **factory)
        self.merge_1 = nn.Linear(hidden * self.merge, inner, **factory)
        self.merge_2 = nn.Linear(inner, hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_2(F.gelu(self.linear_1(x)))
        return self.merge_2(F.gelu(self.merge_1(x.reshape(-1, self.merge * x.shape[-1]))))
