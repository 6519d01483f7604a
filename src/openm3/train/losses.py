"""What a step minimises, and the router's balance, which is kept without a gradient.

The language loss makes logits for labelled positions only, a bounded chunk at a time (longer ones are recomputed in the
backward pass), so [T, vocab] never exists.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openm3.msa.plan import to_device
from openm3.train.data import Batch

LOGITS_AT_ONCE = 1 << 26  # values of a chunk of logits: 256 MiB in float32


def language_loss(model: nn.Module, hidden: Tensor, batch: Batch, *, logits_at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Sum of the cross-entropy over the batch's labelled positions, float32 scalar (divide by `batch.targets`).

    hidden [T, H] after the final norm; `model.logits` maps [n, H] to float32 [n, vocab].
    """
    learned = to_device(batch.loss_positions, hidden.device)
    rows = hidden.index_select(0, learned)  # [n, H]
    targets = batch.labels.index_select(0, learned)
    chunk = max(1, logits_at_once // model.config.text.vocab_size)

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(rows).float(), targets, reduction="sum")

    if batch.targets <= chunk:
        return chunk_loss(rows, targets)
    pairs = zip(rows.split(chunk), targets.split(chunk))
    return torch.stack([checkpoint(chunk_loss, r, t, use_reentrant=False) for r, t in pairs]).sum()


def forward(model: nn.Module, batch: Batch, **options):
    """`model.forward` over a batch sent to the model's device; pixels are normalized there. Returns M3Output."""
    from openm3.processing.images import normalize_rows

    pixels, videos = batch.pixel_values, batch.pixel_values_videos
    return model(
        batch.input_ids,
        cu_seqlens=batch.cu_seqlens,
        pixel_values=None if pixels is None else normalize_rows(pixels),
        image_grid_thw=batch.image_grid_thw,
        pixel_values_videos=None if videos is None else normalize_rows(videos),
        video_grid_thw=batch.video_grid_thw,
        **options,
    )


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], *, msa: str = "infer", autocast: bool = False) -> float:
    """Mean cross-entropy over the labelled positions of all the batches: a held-out loss for an `evaluate` hook."""
    device = model.device
    total, targets = torch.zeros((), device=device), 0
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            total += language_loss(model, forward(model, batch, msa=msa).hidden, batch)
        targets += batch.targets
    return total.item() / max(1, targets)


def sample_queries(seed: int, index: int, batch: Batch, count: int | None) -> Tensor | None:
    """The positions of batch `index` that the index loss looks at: int64 [count], ascending; None means all.

    Half are drawn from the positions with a target, where an answer must find what it speaks of; half from all.
    """
    if count is None or count >= batch.tokens:
        return None
    rng = np.random.default_rng((seed, index))
    targets = batch.loss_positions.numpy()
    answers = rng.choice(targets, min(count // 2, len(targets)), replace=False, shuffle=False)
    others = np.setdiff1d(np.arange(batch.tokens), answers, assume_unique=True)
    rest = rng.choice(others, count - len(answers), replace=False, shuffle=False)
    return torch.from_numpy(np.sort(np.concatenate((answers, rest))))


def router_biases(model: nn.Module) -> list[Tensor]:
    """The routers' e_score_correction_bias buffers, float32 [E] each, in the order of M3Output.router_load."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(".mlp.router.bias")]


@torch.no_grad()
def balance_routers(biases: list[Tensor], load: Tensor, rate: float) -> None:
    """Raises the bias of every expert that got less than the mean load [n_moe_layers, E], lowers the others, by `rate`.

    The bias takes part in the choice of experts only, so no gradient disturbs the language loss (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2).
    """
    change = rate * torch.sign(load.mean(dim=1, keepdim=True) - load)
    torch._foreach_add_(biases, list(change.unbind()))
