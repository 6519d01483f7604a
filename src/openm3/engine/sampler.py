"""Draws the next tokens, each as if its request were alone in the batch.

The one random number of a draw is a hash of the request's seed and of the draw's place in its answer (SplitMix64), and
the token is where that number falls in the distribution laid out by token id. So neither the batch, nor its order, nor
a preemption changes an answer, and no generator state needs keeping. No step sorts the vocabulary, and what a request
does not ask for costs nothing: penalties, biases and log-probabilities touch the rows of those that do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.engine.request import Request, SamplingParams, TokenLogprobs
from openm3.msa.plan import to_device

COLDEST = 1e-4  # temperatures below draw the likeliest token: logits divided by less may overflow
NUCLEUS_GUESS = 256  # candidates looked at first for top_p; more only where these hold too little probability


def sample(logits: Tensor, params: list[SamplingParams], seeds: list[int], places: list[int]) -> Tensor:
    """One token for each row of float32 logits [n, V], int64 [n]; places[i]: how many tokens answer i has already.

    min_p keeps the tokens of at least so much of the likeliest one's probability; top_k keeps the k highest logits and
    those equal to the lowest of them; top_p then keeps the likeliest tokens up to the one that reaches p, and those
    equal to it.
    """
    drawn = [i for i, p in enumerate(params) if p.temperature >= COLDEST]
    if not drawn:
        return logits.argmax(-1)
    rows = None if len(drawn) == len(params) else to_device(torch.tensor(drawn), logits.device)
    some = logits if rows is None else logits[rows]
    column = [(p.temperature, p.top_p, uniform(seeds[i], places[i])) for i in drawn for p in (params[i],)]
    columns = to_device(torch.tensor(column, dtype=torch.float64), logits.device)
    temperature, top_p, point = columns.T.unsqueeze(-1)
    scaled = some / temperature.float()  # [m, V]
    if any(params[i].min_p > 0 for i in drawn):
        scaled = _keep_min_p(scaled, [params[i].min_p for i in drawn])
    scaled = _keep_top_k(scaled, [params[i].top_k for i in drawn])
    if any(params[i].top_p < 1 for i in drawn):
        scaled = _keep_top_p(scaled, top_p, few=all(0 < params[i].top_k <= NUCLEUS_GUESS for i in drawn))
    mass = torch.softmax(scaled, -1, dtype=torch.float64).cumsum(-1)
    tokens = torch.searchsorted(mass, point * mass[:, -1:], right=True).squeeze(-1)
    if rows is None:
        return tokens
    out = logits.argmax(-1)
    out[rows] = tokens
    return out


class History:
    """How often each token stands in one request's answer, and whether it stands in its prompt; `update` catches up.

    counts float32 [V], prompt bool [V].
    """

    def __init__(self, prompt_ids: list[int], vocab: int, device: torch.device) -> None:
        self.counts = torch.zeros(vocab, device=device)
        self.prompt = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.prompt[torch.tensor(prompt_ids, device=device)] = True
        self._seen = 0

    def update(self, output_ids: list[int]) -> None:
        new = torch.tensor(output_ids[self._seen :], dtype=torch.int64, device=self.counts.device)
        self.counts.index_add_(0, new, torch.ones_like(new, dtype=torch.float32))
        self._seen = len(output_ids)


def adjust(logits: Tensor, row: int, request: Request) -> None:
    """Applies a request's logit_bias and penalties to its row of logits [n, V], in place."""
    params, line = request.params, logits[row]
    if params.logit_bias:
        known = {token: bias for token, bias in params.logit_bias.items() if token < len(line)}
        at = torch.tensor(list(known), dtype=torch.int64, device=line.device)
        line[at] += torch.tensor(list(known.values()), dtype=torch.float32, device=line.device)
    if params.penalizes:
        if request.history is None:
            request.history = History(request.prompt_ids, len(line), line.device)
        history = request.history
        history.update(request.output_ids)
        if params.repetition_penalty != 1:
            seen = history.prompt | (history.counts > 0)
            factor = torch.where(line > 0, 1 / params.repetition_penalty, params.repetition_penalty)
            line.copy_(torch.where(seen, line * factor, line))
        line -= params.frequency_penalty * history.counts + params.presence_penalty * (history.counts > 0)


def logprobs_of(logits: Tensor, tokens: list[int], top: int) -> list[TokenLogprobs]:
    """For each row of float32 logits [n, V] the log-probability of its token and of the `top` likeliest tokens."""
    logprobs = logits.double().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(min(top, logits.shape[1]))
    pairs = [tuple(zip(i, v)) for i, v in zip(ids.tolist(), values.tolist())]
    return [TokenLogprobs(*record) for record in zip(tokens, own, pairs)]


def uniform(seed: int, place: int) -> float:
    """Number `place` of the SplitMix64 stream of a seed, in [0, 1) with 52 bits (Steele, Lea, Flood, 2014)."""
    return (_mix(_mix(seed) + (place + 1) * 0x9E3779B97F4A7C15) >> 12) / 2**52


def _mix(x: int) -> int:
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return x ^ x >> 31


def _keep_min_p(logits: Tensor, min_p: list[float]) -> Tensor:
    share = to_device(torch.tensor(min_p), logits.device).unsqueeze(-1)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + share.log(), -torch.inf)


def _keep_top_k(logits: Tensor, top_k: list[int]) -> Tensor:
    vocab = logits.shape[-1]
    last = [min(k, vocab) - 1 if k else -1 for k in top_k]
    if max(last) < 0:
        return logits
    top = logits.topk(max(last) + 1).values  # descending
    lowest = top.gather(-1, to_device(torch.tensor([max(i, 0) for i in last]), logits.device).unsqueeze(-1))
    off = [i for i, place in enumerate(last) if place < 0]
    if off:
        lowest[off] = -torch.inf
    return logits.masked_fill(logits < lowest, -torch.inf)


def _keep_top_p(logits: Tensor, top_p: Tensor, few: bool) -> Tensor:
    """few: at most NUCLEUS_GUESS are left in each row, but for those equal to the last of them, which stay with it.
    Then nobody has to look, and wait for the device."""
    vocab = logits.shape[-1]
    total = logits.double().logsumexp(-1, keepdim=True)
    n = min(NUCLEUS_GUESS, vocab)
    while True:
        top = logits.topk(n).values  # descending
        mass = (top.double() - total).exp().cumsum(-1)
        if n == vocab or few or bool((mass[:, -1:] >= top_p).all()):
            break
        n = min(8 * n, vocab)
    crossing = (mass < top_p).sum(-1, keepdim=True).clamp(max=n - 1)
    return logits.masked_fill(logits < top.gather(-1, crossing), -torch.inf)
