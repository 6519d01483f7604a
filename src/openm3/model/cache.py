"""The paged cache's tensors: one page holds one block of keys, values and index keys of every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openm3.config import M3Config


@dataclass(frozen=True)
class LayerCache:
    """k, v [P, Hkv, block, D]; index_k [P, block, Di], None on dense layers.

    k and v lie in memory by head, [Hkv, P, block, D], so that a head's consecutive pages are one matrix.
    """

    k: Tensor
    v: Tensor
    index_k: Tensor | None

    def store(self, slots: Tensor, k: Tensor, v: Tensor, index_k: Tensor | None) -> None:
        """Writes tokens' k, v [T, Hkv, D] and index_k [T, Di] to their slots int64 [T] = page * block + offset."""
        page, offset = slots // self.k.shape[2], slots % self.k.shape[2]
        self.k[page, :, offset] = k.to(self.k.dtype)
        self.v[page, :, offset] = v.to(self.v.dtype)
        if index_k is not None:
            self.index_k[page, offset] = index_k.to(self.index_k.dtype)


class KVCache:
    """`num_pages` pages of `page_size` tokens for every layer, zeros at first. Who owns which page is the engine's."""

    def __init__(
        self,
        config: M3Config,
        num_pages: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        text = config.text
        self.page_size, self.num_pages = text.sparse.block_size, num_pages

        def zeros(*shape: int) -> Tensor:
            if torch.device(device).type != "cpu":
                return torch.zeros(*shape, device=device, dtype=dtype)
            # numpy takes zero pages from the system, which cost nothing until they are written.
            return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

        by_head = (text.num_key_value_heads, num_pages, self.page_size, text.head_dim)
        index = (num_pages, self.page_size, text.sparse.index_dim)
        self.layers = [
            LayerCache(
                zeros(*by_head).transpose(0, 1), zeros(*by_head).transpose(0, 1), zeros(*index) if sparse else None
            )
            for sparse in text.sparse_layers
        ]
