"""A tiny M3 (one dense layer, one with MSA and experts) and a copy task, shared by the tests of training."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from openm3.config import M3Config, SparseConfig, TextConfig, VisionConfig
from openm3.model import M3
from openm3.train import Batch, Sample, TrainConfig, pack

VOCAB, LETTERS, START, MIDDLE = 48, 16, 40, 41


def tiny_config(**text) -> M3Config:
    values = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, rotary_dim=8, dense_intermediate_size=64, intermediate_size=16, shared_intermediate_size=16,
        num_local_experts=4, num_experts_per_tok=2, sparse_layers=(False, True), moe_layers=(False, True),
        sparse=SparseConfig(index_heads=2, index_dim=16, block_size=8, topk_blocks=2), rope_theta=1e3,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = VisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return M3Config(TextConfig(**values | text), vision, projector_hidden_size=32, image_token_id=46, video_token_id=47)


def tiny_model(seed: int = 0, **text) -> M3:
    torch.manual_seed(seed)
    return M3(tiny_config(**text))


def train_config(**values) -> TrainConfig:
    return TrainConfig(**dict(steps=12, tokens_per_batch=512, lr=5e-3, log_every=4, save_every=100) | values)


def copy_sample(rng: np.random.Generator, length: int = 12) -> Sample:
    letters = rng.integers(0, LETTERS, length).tolist()
    ids = [START, *letters, MIDDLE, *letters]
    return Sample(ids, [False] * (length + 2) + [True] * length)


@dataclass
class CopySource:
    """Samples that repeat their first half: 26 tokens, of which a sparse layer sees at most 16."""

    seed: int = 0
    samples: int = 8

    def batch(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, index))
        return pack([copy_sample(rng) for _ in range(self.samples)], 512)


@dataclass
class BrokenSource(CopySource):
    """Fails at one index, with an exception or by the death of its process."""

    bad: int = 3
    die: bool = False

    def batch(self, index: int) -> Batch:
        if index == self.bad:
            if self.die:
                os._exit(13)
            raise KeyError("the well is dry")
        return super().batch(index)
