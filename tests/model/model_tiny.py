"""Tiny M3s whose every term shows: weights large enough, norms, biases and router bias random, limits that bind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openm3.config import M3Config, SparseConfig, TextConfig, VisionConfig
from openm3.model import M3, KVCache, plan_args
from openm3.msa import Plan

IMAGE, VIDEO, VOCAB = 3, 4, 90


def tiny(*, sparse: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **text: Any) -> M3Config:
    """Three layers, dense then MSA + MoE; two of 8-token blocks for a query. Keywords replace fields."""
    index = dict(index_heads=2, index_dim=12, block_size=8, topk_blocks=2) | (sparse or {})
    decoder = dict(
        vocab_size=VOCAB, hidden_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, rotary_dim=8, dense_intermediate_size=56, intermediate_size=24, shared_intermediate_size=32,
        num_local_experts=5, num_experts_per_tok=2, sparse_layers=(False, True, True), moe_layers=(False, True, True),
        routed_scaling_factor=1.7, swiglu_alpha=1.3, swiglu_limit=0.8, rope_theta=900.0, rms_norm_eps=1e-3,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    ) | text  # fmt: skip
    tower = dict(hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                 patch_size=4, rope_theta=50.0) | (vision or {})  # fmt: skip
    return M3Config(
        text=TextConfig(sparse=SparseConfig(**index), **decoder), vision=VisionConfig(**tower),
        projector_hidden_size=44, image_token_id=IMAGE, video_token_id=VIDEO, dtype="float32",
    )  # fmt: skip


def random_model(config: M3Config, seed: int = 0) -> M3:
    """Parameters N(0, 0.15), norms N(their start, 0.3), biases and the router's bias N(0, 0.3)."""
    model = M3(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            wide = "norm" in name or name.endswith("bias")
            start = 1.0 if "norm" in name and name.startswith("vision") and name.endswith("weight") else 0.0
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.3 if wide else 0.15) + start)
    return model


@dataclass(frozen=True)
class Prompt:
    """ids int64 [T]; pixel rows and grids of its images and videos, in the order of their placeholders."""

    ids: Tensor
    image_grid: Tensor
    images: Tensor
    video_grid: Tensor
    videos: Tensor

    @property
    def media(self) -> dict[str, Tensor]:
        out = {}
        if len(self.image_grid):
            out |= dict(pixel_values=self.images, image_grid_thw=self.image_grid)
        if len(self.video_grid):
            out |= dict(pixel_values_videos=self.videos, video_grid_thw=self.video_grid)
        return out

    def truncated(self, ids: Tensor) -> Prompt:
        return replace(self, ids=ids)


def prompt(config: M3Config, *parts: int | tuple[str, int, int, int], seed: int = 0) -> Prompt:
    """Parts in order: a number of text tokens, or ("image" | "video", t, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    ids, grids = [], {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids.append(torch.randint(5, VOCAB, (part,), generator=generator))
            continue
        kind, *grid = part
        grids[kind].append(grid)
        tokens = grid[0] * grid[1] * grid[2] // config.vision.spatial_merge_size**2
        ids.append(torch.full((tokens,), IMAGE if kind == "image" else VIDEO))
    grid = {kind: torch.tensor(g, dtype=torch.int64).view(-1, 3) for kind, g in grids.items()}
    rows = {
        kind: torch.randn(int(g.prod(1).sum()), config.vision.patch_values, generator=generator)
        for kind, g in grid.items()
    }
    return Prompt(torch.cat(ids), grid["image"], rows["image"], grid["video"], rows["video"])


def media_embeds(model: M3, p: Prompt) -> Tensor:
    """The embeddings of all placeholders in the order in which they stand in the prompt."""
    out = torch.zeros(len(p.ids), model.config.text.hidden_size)
    for token, pixels, grid in ((IMAGE, p.images, p.image_grid), (VIDEO, p.videos, p.video_grid)):
        if len(grid):
            out[p.ids == token] = model.encode_media(pixels, grid)
    return out[(p.ids == IMAGE) | (p.ids == VIDEO)]


@torch.no_grad()
def logits(model: M3, p: Prompt, **more: Any) -> Tensor:
    return model.logits(model(p.ids, **p.media, **more).hidden)


class Paged:
    """Sequences over one cache whose pages are handed out in a shuffled order; `step` feeds some of them new tokens."""

    def __init__(self, model: M3, sequences: int = 1, seed: int = 0, pages: int = 48):
        self.model, self.lens = model, [0] * sequences
        self.cache = KVCache(model.config, pages * sequences)
        order = torch.randperm(pages * sequences, generator=torch.Generator().manual_seed(seed))
        self.table = order.int().view(sequences, pages)

    @torch.no_grad()
    def step(self, new: dict[int, Tensor], **more: Any) -> Tensor:
        """New tokens of some sequences -> their logits, in the order given."""
        for s, ids in new.items():
            self.lens[s] += len(ids)
        offsets = torch.tensor([0, *(len(ids) for ids in new.values())]).cumsum(0).tolist()
        rows = list(new)
        plan = Plan.paged(self.table[rows], [self.lens[s] for s in rows], offsets, **plan_args(self.model.config))
        out = self.model(torch.cat(list(new.values())), cache=self.cache, plan=plan, **more)
        return self.model.logits(out.hidden)


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())
