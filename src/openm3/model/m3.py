"""M3 whole: embeddings with images and video in their places, the decoder, the head.

A batch is one flat run of tokens [T] with `cu_seqlens`; training, chunked prefill and decode are the same forward. With
a cache the new tokens' keys go into their pages first and attention reads pages; without one it reads the run itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openm3.config import M3Config
from openm3.model.attention import STAGES, Stage, Step
from openm3.model.cache import KVCache
from openm3.model.layers import RMSNorm, rope_angles
from openm3.model.moe import balance_loss
from openm3.model.text import DecoderLayer
from openm3.model.vision import Grid, Projector, VisionTower
from openm3.msa import Plan
from openm3.msa.plan import to_device


@dataclass(frozen=True)
class M3Output:
    """hidden [T, H] after the final norm; index_loss float32 scalar, summed over layers (stages train, warmup);
    router_load float32 [MoE layers, E], tokens an expert received; router_aux float32 scalar, mean balance loss."""

    hidden: Tensor
    index_loss: Tensor | None
    router_load: Tensor | None
    router_aux: Tensor | None


def plan_args(config: M3Config) -> dict[str, int]:
    """The selection's sizes as Plan takes them."""
    s = config.text.sparse
    return dict(block_size=s.block_size, topk=s.topk_blocks, local_blocks=s.local_blocks, init_blocks=s.init_blocks)


class M3(nn.Module):
    """MiniMax-M3 on one device. Parameters start as N(0, 0.02), norms as identity; `load_model` fills in others."""

    def __init__(
        self,
        config: M3Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config = config
        text = config.text
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.embed = nn.Embedding(text.vocab_size, text.hidden_size, **factory)
        self.layers = nn.ModuleList(DecoderLayer(text, i, **factory) for i in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, **factory)
        if not text.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False, **factory)
        self.vision = VisionTower(config.vision, **factory)
        self.projector = Projector(config, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws all parameters anew (torch's global generator); does nothing on the meta device."""
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0 if name.startswith("vision") and name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.normal_(0.0, std)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor | list[int] | None = None,
        positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        media_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        plan: Plan | None = None,
        msa: Stage = "infer",
        index_queries: Tensor | None = None,
    ) -> M3Output:
        """One packed forward.

        input_ids int64 [T]; cu_seqlens int32 [B+1], by default one sequence; positions int64 [T], by default 0.. in
        each sequence. pixel_values [rows, C*T*P*P] with image_grid_thw int64 [images, 3] fill the image tokens in
        order, the videos' likewise; or media_embeds [placeholders, H] fills all placeholders in `input_ids`, so that an
        image may straddle two chunks. With `cache`, `plan` is a paged plan whose last tokens are these.

        `msa`: "infer" selects blocks; "train" also gives the index loss over them, at `index_queries` int64 [n] only
        where given; "warmup" attends densely with the index loss over the prefix; "dense" has no index branch.

        Raises ValueError, before any compute, for ids outside the vocabulary, grids that do not divide, and counts of
        media and placeholders that differ. Ids that already lie on an accelerator are taken as checked.
        """
        if msa not in STAGES:
            raise ValueError(f"msa = {msa!r}: must be one of {', '.join(STAGES)}")
        plan = self._plan(input_ids, cu_seqlens, positions, cache, plan)
        images = check_grid("image", pixel_values, image_grid_thw, self.config)
        videos = check_grid("video", pixel_values_videos, video_grid_thw, self.config)
        where = self._places(input_ids, images, videos, media_embeds)

        x = self.embed(to_device(input_ids, self.device))
        for rows, media in zip(where, self._media(pixel_values, images, pixel_values_videos, videos, media_embeds)):
            x = x.index_copy(0, to_device(rows, x.device), media.to(x.device, x.dtype))

        cos, sin = rope_angles(plan.positions, self.config.text.rotary_dim, self.config.text.rope_theta)
        step = Step(plan, cos, sin, msa, None if cache is None else plan.slots, index_queries)
        losses, routers = [], []
        for i, layer in enumerate(self.layers):
            x, loss, router = layer(x, step, None if cache is None else cache.layers[i])
            losses += [] if loss is None else [loss]
            routers += [] if router is None else [router]
        load, scores = (torch.stack(part) for part in zip(*routers)) if routers else (None, None)
        return M3Output(
            hidden=self.norm(x),
            index_loss=torch.stack(losses).sum() if losses else None,
            router_load=load,
            router_aux=None if load is None else balance_loss(load, scores).mean(),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] after the final norm -> float32 [n, vocab]. Give it the rows you need: all of 1 M would be 839 GB."""
        head = self.embed.weight if self.config.text.tie_word_embeddings else self.lm_head.weight
        return torch.nn.functional.linear(hidden.to(head.dtype), head).float()

    def encode_media(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patch rows [rows, C*T*P*P] and grids int64 [n, 3] of images or video segments -> embeddings [tokens, H]."""
        return self._encode(pixel_values, check_grid("media", pixel_values, grid_thw, self.config))

    def _encode(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        return self.projector(self.vision(to_device(pixel_values, self.device), grid))

    def _media(
        self, images: Tensor | None, image_grid: Grid, videos: Tensor | None, video_grid: Grid, ready: Tensor | None
    ):
        if ready is not None:
            return [ready]
        pairs = ((images, image_grid), (videos, video_grid))
        return [self._encode(pixels, grid) for pixels, grid in pairs if pixels is not None]

    def _plan(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | list[int] | None,
        positions: Tensor | None,
        cache: KVCache | None,
        plan: Plan | None,
    ) -> Plan:
        if input_ids.dim() != 1 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids: {input_ids.dtype} {list(input_ids.shape)}, must be int64 [T]")
        if plan is None:
            if cache is not None:
                raise ValueError("cache: needs a paged plan that says which pages hold which sequence")
            cu_seqlens = [0, len(input_ids)] if cu_seqlens is None else cu_seqlens
            plan = Plan.packed(cu_seqlens, positions=positions, device=self.device, **plan_args(self.config))
        elif cu_seqlens is not None or positions is not None:
            raise ValueError("cu_seqlens and positions belong to the plan, which is given too")
        if (plan.page_table is None) != (cache is None):
            raise ValueError("plan and cache: a paged plan goes with a cache, a packed one without")
        if cache is not None and plan.block_size != cache.page_size:
            raise ValueError(f"plan: blocks of {plan.block_size} tokens, the cache has pages of {cache.page_size}")
        if plan.num_queries != len(input_ids):
            raise ValueError(f"input_ids: {len(input_ids)} tokens, the plan has {plan.num_queries}")
        vocab = self.config.text.vocab_size
        if input_ids.device.type == "cpu" and len(input_ids):
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= vocab:
                raise ValueError(f"input_ids: token id {low if low < 0 else high}, must be in 0..{vocab - 1}")
        limit = self.config.text.max_position_embeddings
        if plan.max_k > limit:
            raise ValueError(f"a sequence of {plan.max_k} tokens: the model's context is {limit}")
        return plan

    def _places(self, ids: Tensor, images: Grid, videos: Grid, media_embeds: Tensor | None) -> list[Tensor]:
        """Rows of the run that take media: all placeholders for ready embeddings, else images', then videos'."""
        is_image, is_video = ids == self.config.image_token_id, ids == self.config.video_token_id
        if media_embeds is not None:
            if images or videos:
                raise ValueError("media_embeds: given together with pixels; give one of the two")
            wanted = [("media", is_image | is_video, len(media_embeds))]
        else:
            merge = self.config.vision.spatial_merge_size**2
            kinds = (("image", is_image, images), ("video", is_video, videos))
            wanted = [(name, mask, sum(t * h * w for t, h, w in grid) // merge) for name, mask, grid in kinds]
        places = []
        for name, mask, count in wanted:
            rows = mask.nonzero().squeeze(-1) if count or mask.device.type == "cpu" else mask.new_empty(0)
            if len(rows) != count:
                raise ValueError(
                    f"{name}: {len(rows)} placeholder tokens in input_ids, {count} embeddings to put there"
                )
            if count:
                places.append(rows)
        return places


def check_grid(name: str, pixels: Tensor | None, grid_thw: Tensor | None, config: M3Config) -> Grid:
    """The grid as host integers, checked against the rows of pixels; () where there is none."""
    if pixels is None and grid_thw is None:
        return ()
    if pixels is None or grid_thw is None:
        raise ValueError(f"{name}: pixels and grid_thw go together; one of them is missing")
    vision, merge = config.vision, config.vision.spatial_merge_size
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"{name} grid_thw: {list(grid_thw.shape)}, must be [n, 3]")
    grid = tuple((int(t), int(h), int(w)) for t, h, w in grid_thw.tolist())
    for t, h, w in grid:
        if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
            raise ValueError(f"{name} grid_thw ({t}, {h}, {w}): must be positive, h and w multiples of {merge}")
    rows = sum(t * h * w for t, h, w in grid)
    if pixels.dim() != 2 or pixels.shape != (rows, vision.patch_values):
        raise ValueError(
            f"{name} pixels: {list(pixels.shape)}, must be [{rows}, {vision.patch_values}] for these grids"
        )
    return grid
