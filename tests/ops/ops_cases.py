"""Problems for `qk_norm_rope_store`: projections as views of one product, shuffled pages, caches by head in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openm3.model.cache import LayerCache
from openm3.model.layers import rope_angles
from openm3.ops.cache_write import Call

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Sizes:
    tokens: int = 7
    hq: int = 4
    hkv: int = 2
    hi: int = 2  # 0: no index branch
    d: int = 16
    di: int = 8
    rotary: int = 8
    block: int = 4
    pages: int = 5
    dtype: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32
    scale: float | None = None
    skipped: tuple[int, ...] = ()  # tokens that are not stored
    device: str = "cpu"

    def but(self, **changes) -> Sizes:
        return replace(self, **changes)

    def call(self, seed: int = 0) -> Call:
        """Random throughout; the caches are full of another random draw."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, width: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator) * width

        def typed(x: Tensor) -> Tensor:
            return x.to(self.device, self.dtype)

        t, sizes = self.tokens, (self.hq, self.hkv, self.hkv)
        q, k, v = typed(draw(t, sum(sizes), self.d, width=2.0)).split(sizes, dim=1)
        norms = [typed(draw(n, width=0.3)) for n in (self.d, self.d, self.di, self.di)]
        angles = rope_angles(torch.randint(0, 900, (t,), generator=generator), self.rotary, 500.0)
        cos, sin = (x.to(self.device) for x in angles)
        by_head = [
            draw(self.hkv, self.pages, self.block, self.d).to(self.device).to(self.cache).transpose(0, 1)
            for _ in range(2)
        ]
        slots = torch.randperm(self.pages * self.block, generator=generator)[:t].to(self.device)
        slots[list(self.skipped)] = -1
        index: list[Tensor | None] = [None] * 5
        if self.hi:
            heads = typed(draw(t, self.hi + 1, self.di, width=2.0))
            pages = draw(self.pages, self.block, self.di).to(self.device).to(self.cache)
            index = [heads[:, :-1], heads[:, -1], *norms[2:], pages]
        scales = (self.scale, None if self.scale is None else 2 * self.scale, self.scale if self.hi else None)
        return Call(q, k, v, *norms[:2], cos, sin, *by_head, slots, 1e-3, *index, *scales)


def changed(call: Call) -> list[Tensor]:
    return [x for x in (call.k_cache, call.v_cache, call.index_k_cache) if x is not None]


def by_definition(call: Call) -> tuple[Tensor, Tensor | None]:
    """The same in few words, without scales and skipped tokens: RoPE turns pairs of channels as complex numbers."""
    turns = torch.complex(call.cos, call.sin)[:, None]
    half = turns.shape[-1]

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        normal = (wide * (wide.square().mean(-1, keepdim=True) + call.eps).rsqrt() * (1 + weight.float())).to(x.dtype)
        pairs = torch.complex(normal[..., :half].float(), normal[..., half : 2 * half].float()) * turns
        return torch.cat((pairs.real.to(x.dtype), pairs.imag.to(x.dtype), normal[..., 2 * half :]), -1)

    index_k = None if call.index_k is None else turned(call.index_k[:, None], call.index_k_norm)[:, 0]
    LayerCache(call.k_cache, call.v_cache, call.index_k_cache).store(
        call.slots, turned(call.k, call.k_norm), call.v, index_k
    )
    return turned(call.q, call.q_norm), None if index_k is None else turned(call.index_q, call.index_q_norm)
