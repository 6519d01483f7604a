"""Draws the next tokens, each as if its request were alone in the batch.

The one random number of a draw is a hash of the request's seed and of the draw's place in its answer (SplitMix64), and
the token is where that number falls in the distribution laid out by token id. So neither the batch, nor its order, nor
a preemption changes an answer, and no generator state needs keeping. No step sorts the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.engine.request import SamplingParams

NUCLEUS_GUESS = 256  # candidates looked at first for top_p; more only where these hold too little probability


def sample(logits: Tensor, params: list[SamplingParams], seeds: list[int], places: list[int]) -> list[int]:
    """One token for each row of float32 logits [n, V]; places[i]: how many tokens answer i has already.

    top_k keeps the k highest logits and those equal to the lowest of them; top_p then keeps the likeliest tokens up to
    the one that reaches p, and those equal to it.
    """
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if not drawn:
        return logits.argmax(-1).tolist()
    some = logits if len(drawn) == len(params) else logits[drawn]
    column = [(p.temperature, p.top_p, uniform(seeds[i], places[i])) for i in drawn for p in (params[i],)]
    temperature, top_p, point = torch.tensor(column, dtype=torch.float64, device=logits.device).T.unsqueeze(-1)
    scaled = some / temperature.float()  # [m, V]
    scaled = _keep_top_k(scaled, [params[i].top_k for i in drawn])
    if any(params[i].top_p < 1 for i in drawn):
        scaled = _keep_top_p(scaled, top_p)
    mass = torch.softmax(scaled, -1, dtype=torch.float64).cumsum(-1)
    tokens = torch.searchsorted(mass, point * mass[:, -1:], right=True).squeeze(-1)
    if len(drawn) == len(params):
        return tokens.tolist()
    out = logits.argmax(-1)
    out[drawn] = tokens
    return out.tolist()


def uniform(seed: int, place: int) -> float:
    """Number `place` of the SplitMix64 stream of a seed, in [0, 1) with 52 bits (Steele, Lea, Flood, 2014)."""
    return (_mix(_mix(seed) + (place + 1) * 0x9E3779B97F4A7C15) >> 12) / 2**52


def _mix(x: int) -> int:
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return x ^ x >> 31


def _keep_top_k(logits: Tensor, top_k: list[int]) -> Tensor:
    vocab = logits.shape[-1]
    last = [min(k, vocab) - 1 if k else -1 for k in top_k]
    if max(last) < 0:
        return logits
    top = logits.topk(max(last) + 1).values  # descending
    lowest = top.gather(-1, torch.tensor([max(i, 0) for i in last], device=logits.device).unsqueeze(-1))
    off = [i for i, place in enumerate(last) if place < 0]
    if off:
        lowest[off] = -torch.inf
    return logits.masked_fill(logits < lowest, -torch.inf)


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    vocab = logits.shape[-1]
    total = logits.double().logsumexp(-1, keepdim=True)
    n = min(NUCLEUS_GUESS, vocab)
    while True:
        top = logits.topk(n).values  # descending
        mass = (top.double() - total).exp().cumsum(-1)
        if n == vocab or bool((mass[:, -1:] >= top_p).all()):
            break
        n = min(8 * n, vocab)
    crossing = (mass < top_p).sum(-1, keepdim=True).clamp(max=n - 1)
    return logits.masked_fill(logits < top.gather(-1, crossing), -torch.inf)
