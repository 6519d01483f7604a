"""Small M3s with odd sizes, and directories to save them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from openm3.config import M3Config, SparseConfig, TextConfig, VisionConfig


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., M3Config]:
    """Makes a config of three small layers, dense then MSA + MoE; keywords replace fields of the text config."""

    def make(**changes: Any) -> M3Config:
        text: dict[str, Any] = dict(
            vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            head_dim=16, rotary_dim=8, dense_intermediate_size=80, intermediate_size=40, shared_intermediate_size=56,
            num_local_experts=5, num_experts_per_tok=2, sparse_layers=(False, True, True),
            moe_layers=(False, True, True), bos_token_id=1, eos_token_id=2,
            sparse=SparseConfig(index_heads=2, index_dim=16, block_size=8, topk_blocks=2),
        )  # fmt: skip
        vision = VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56
        )
        return M3Config(
            text=TextConfig(**text | changes), vision=vision, projector_hidden_size=40, image_token_id=3,
            video_token_id=4, dtype="float32",
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Callable[..., Any]:
    """Makes a small M3 whose every number, norms and router bias included, is random and far from its start."""
    from openm3.model import M3

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> M3:
        model = M3(tiny_config(**changes), dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        return model

    return make


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A directory with a small model in it, cut into many shards."""
    from openm3.checkpoint import save_model

    save_model(tiny_model(), tmp_path / "saved", max_shard_bytes=100_000)
    return tmp_path / "saved"
