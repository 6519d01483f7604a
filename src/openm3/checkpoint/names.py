"""One table between the names on disk and the model's own, derived from a config and read in both directions.

Every tensor of a checkpoint is one `Entry`: its name and shape on disk, and the slice of the model's own parameter that
holds it. Loading walks the table to fill the parameters, saving walks it to write them, counting walks it to add up
shapes. The names on disk are those of the released checkpoint, which transformers' `save_pretrained` writes as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openm3.config import M3Config, TextConfig, VisionConfig

if TYPE_CHECKING:
    import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or written; the message names the file or tensor and what to do."""


IGNORED = re.compile(r"(^|\.)mtp\.")  # multi-token-prediction heads: may be in the files, no part of this network
BLOCK = 32  # consecutive inputs of a row that share a scale in an MXFP8 checkpoint
SCALE_SUFFIX = "_scale_inv"  # X.weight is quantized if X.weight_scale_inv stands beside it

LAYERS = "language_model.model.layers"
TOWER = "vision_tower.vision_model"


@dataclass(frozen=True)
class Entry:
    """One tensor on disk and where it lives in the model.

    `index` cuts the model's own parameter: rows of a fused projection, one expert (and its rows) of a stack, nothing
    for a whole one. `part` groups tensors for counting. `quantizable`: a projection of the text model, which an MXFP8
    checkpoint holds in eight bits. `float32`: stays in float32 whatever the checkpoint's dtype.
    """

    disk_name: str
    own_name: str
    disk_shape: tuple[int, ...]
    part: str
    index: tuple[int | slice, ...] = ()
    quantizable: bool = False
    float32: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.disk_shape)

    @property
    def quantized(self) -> bool:
        """Whether an MXFP8 checkpoint of ours has it in eight bits: other readers want rows of whole blocks."""
        return self.quantizable and self.disk_shape[-1] % BLOCK == 0

    def view(self, own: torch.Tensor) -> torch.Tensor:
        """The entry's slice of the model's own tensor in the shape it has on disk; shares memory with `own`."""
        return own[self.index].view(self.disk_shape)


def disk_entries(config: M3Config) -> Iterator[Entry]:
    """Every tensor of a checkpoint of `config`, in the order it is written. Source of the names: the released files."""
    yield from _text(config.text)
    yield from _vision(config.vision)
    yield from _projector(config)


def _text(text: TextConfig) -> Iterator[Entry]:
    hidden, vocab = text.hidden_size, text.vocab_size
    yield Entry("language_model.model.embed_tokens.weight", "embed.weight", (vocab, hidden), "embedding")
    for i in range(text.num_hidden_layers):
        disk, own = f"{LAYERS}.{i}", f"layers.{i}"
        yield Entry(f"{disk}.input_layernorm.weight", f"{own}.attn_norm.weight", (hidden,), "norms")
        yield from _attention(text, disk, own, sparse=text.sparse_layers[i])
        yield Entry(f"{disk}.post_attention_layernorm.weight", f"{own}.mlp_norm.weight", (hidden,), "norms")
        if text.moe_layers[i]:
            yield from _moe(text, disk, own)
        else:
            size = text.dense_intermediate_size
            yield from _swiglu(f"{disk}.mlp", f"{own}.mlp", hidden, size, "dense MLP")
    yield Entry("language_model.model.norm.weight", "norm.weight", (hidden,), "norms")
    if not text.tie_word_embeddings:
        yield Entry("language_model.lm_head.weight", "lm_head.weight", (vocab, hidden), "head")


def _attention(text: TextConfig, disk: str, own: str, sparse: bool) -> Iterator[Entry]:
    disk, own, hidden, head = f"{disk}.self_attn", f"{own}.attn", text.hidden_size, text.head_dim
    q, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    yield from _fused(disk, f"{own}.qkv_proj.weight", rows, hidden, "attention", quantizable=True)
    yield Entry(f"{disk}.o_proj.weight", f"{own}.o_proj.weight", (hidden, q), "attention", quantizable=True)
    for name in ("q_norm", "k_norm"):
        yield Entry(f"{disk}.{name}.weight", f"{own}.{name}.weight", (head,), "norms")
    if not sparse:
        return
    width = text.sparse.index_dim
    rows = {"index_q_proj": text.sparse.index_heads * width, "index_k_proj": width}
    yield from _fused(disk, f"{own}.index_proj.weight", rows, hidden, "index", quantizable=True)
    for name in ("index_q_norm", "index_k_norm"):
        yield Entry(f"{disk}.{name}.weight", f"{own}.{name}.weight", (width,), "index")


def _moe(text: TextConfig, disk: str, own: str) -> Iterator[Entry]:
    disk, own = f"{disk}.block_sparse_moe", f"{own}.mlp"
    hidden, size, experts = text.hidden_size, text.intermediate_size, text.num_local_experts
    yield Entry(f"{disk}.gate.weight", f"{own}.router.weight", (experts, hidden), "router")
    yield Entry(f"{disk}.e_score_correction_bias", f"{own}.router.bias", (experts,), "router", float32=True)
    gate_up, down = f"{own}.experts.gate_up", f"{own}.experts.down"
    for e in range(experts):
        where, part = f"{disk}.experts.{e}", "experts"
        yield Entry(f"{where}.w1.weight", gate_up, (size, hidden), part, (e, slice(0, size)), quantizable=True)
        yield Entry(f"{where}.w3.weight", gate_up, (size, hidden), part, (e, slice(size, 2 * size)), quantizable=True)
        yield Entry(f"{where}.w2.weight", down, (hidden, size), part, (e,), quantizable=True)
    shared = text.shared_intermediate_size
    yield from _swiglu(f"{disk}.shared_experts", f"{own}.shared", hidden, shared, "shared experts")


def _swiglu(disk: str, own: str, hidden: int, size: int, part: str) -> Iterator[Entry]:
    rows = {"gate_proj": size, "up_proj": size}
    yield from _fused(disk, f"{own}.gate_up_proj.weight", rows, hidden, part, quantizable=True)
    yield Entry(f"{disk}.down_proj.weight", f"{own}.down_proj.weight", (hidden, size), part, quantizable=True)


def _fused(
    disk: str, own_name: str, rows: dict[str, int], columns: int | None, part: str, quantizable: bool = False
) -> Iterator[Entry]:
    """Projections apart on disk, consecutive rows of one parameter in the model; `columns` None: their biases."""
    suffix, start = own_name.rpartition(".")[2], 0
    for name, count in rows.items():
        shape = (count,) if columns is None else (count, columns)
        index = (slice(start, start + count),)
        yield Entry(f"{disk}.{name}.{suffix}", own_name, shape, part, index, quantizable)
        start += count


def _vision(vision: VisionConfig) -> Iterator[Entry]:
    hidden, wide, part = vision.hidden_size, vision.intermediate_size, "vision"
    patch = (hidden, vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield Entry(f"{TOWER}.embeddings.patch_embedding.weight", "vision.patch_embed.weight", patch, part)
    yield from _biased(f"{TOWER}.pre_layrnorm", "vision.pre_norm", (hidden,), part)  # spelled so on disk
    for i in range(vision.num_hidden_layers):
        disk, own = f"{TOWER}.encoder.layers.{i}", f"vision.layers.{i}"
        yield from _biased(f"{disk}.layer_norm1", f"{own}.norm1", (hidden,), part)
        rows = dict.fromkeys(("q_proj", "k_proj", "v_proj"), hidden)
        yield from _fused(f"{disk}.self_attn", f"{own}.attn.qkv.weight", rows, hidden, part)
        yield from _fused(f"{disk}.self_attn", f"{own}.attn.qkv.bias", rows, None, part)
        yield from _biased(f"{disk}.self_attn.out_proj", f"{own}.attn.out", (hidden, hidden), part)
        yield from _biased(f"{disk}.layer_norm2", f"{own}.norm2", (hidden,), part)
        yield from _biased(f"{disk}.mlp.fc1", f"{own}.mlp.fc1", (wide, hidden), part)
        yield from _biased(f"{disk}.mlp.fc2", f"{own}.mlp.fc2", (hidden, wide), part)


def _projector(config: M3Config) -> Iterator[Entry]:
    hidden, wide = config.text.hidden_size, config.projector_hidden_size
    merged = hidden * config.vision.spatial_merge_size**2
    for disk, own, columns in (("multi_modal_projector", "linear", config.vision.hidden_size),
                               ("patch_merge_mlp", "merge", merged)):  # fmt: skip
        yield from _biased(f"{disk}.linear_1", f"projector.{own}_1", (wide, columns), "projector")
        yield from _biased(f"{disk}.linear_2", f"projector.{own}_2", (hidden, wide), "projector")


def _biased(disk: str, own: str, shape: tuple[int, ...], part: str) -> Iterator[Entry]:
    yield Entry(f"{disk}.weight", f"{own}.weight", shape, part)
    yield Entry(f"{disk}.bias", f"{own}.bias", shape[:1], part)
