"""vLLM's M3 ops on openm3's operator, against the definition written out over vLLM's caches, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from openm3.integrations import vllm as ops

BLOCK, HKV, GROUP, D, DI = 128, 2, 3, 16, 8
SCALE = 0.3


@dataclass
class Batch:
    """Sequences of `lens` tokens, the last `new` of each being queries, over shuffled pages."""

    lens: tuple[int, ...]
    new: tuple[int, ...]

    def __post_init__(self):
        g = torch.Generator().manual_seed(sum(self.lens))
        blocks = -(-max(self.lens) // BLOCK) + 1
        pages, tokens = len(self.lens) * blocks, sum(self.new)
        self.idx_q = torch.randint(-4, 5, (tokens, HKV, DI), generator=g).float()  # whole numbers: sums are exact
        self.index_cache = torch.randint(-4, 5, (pages, BLOCK, DI), generator=g).float()
        self.q = torch.randn(tokens, HKV * GROUP, D, generator=g)
        self.kv = torch.randn(pages, HKV, BLOCK, 2 * D, generator=g)
        self.table = torch.randperm(pages, generator=g).int().view(len(self.lens), blocks)
        self.cu = torch.tensor([0, *self.new]).cumsum(0).int()
        self.seq = torch.tensor(self.lens).int()
        self.prefix = self.seq - torch.tensor(self.new).int()
        self.max_len, self.max_new = max(self.lens), max(self.new)

    def rows(self):
        """(token, sequence, position)."""
        t = 0
        for s, (n, new) in enumerate(zip(self.lens, self.new)):
            for p in range(n - new, n):
                yield t, s, p
                t += 1

    def scores(self):
        """{(head, token): [score of each block that is seen]}"""
        found = {}
        for t, s, p in self.rows():
            keys = self.index_cache[self.table[s].long()].flatten(0, 1)[: p + 1]
            for h in range(HKV):
                found[h, t] = [float(x.max()) for x in (keys @ self.idx_q[t, h]).split(BLOCK)]
        return found

    def blocks(self, topk, init, local):
        out = {}
        for (h, t), scores in self.scores().items():
            n = len(scores)
            order = sorted(range(n), key=lambda b: (not (b < init or b >= n - local), -scores[b], b))
            taken = sorted(order[:topk])
            out[h, t] = taken + [-1] * (topk - len(taken))
        return torch.tensor([[out[h, t] for t in range(len(self.q))] for h in range(HKV)])

    def attended(self, blocks, kv):
        out = torch.zeros(len(self.q), HKV * GROUP, D, dtype=torch.float64)
        for t, s, p in self.rows():
            cache = kv.double()[self.table[s].long()].transpose(0, 1).flatten(1, 2)  # [Hkv, tokens, 2 D]
            for h in range(HKV * GROUP):
                g = h // GROUP
                keys = [
                    j for b in blocks[g, t].tolist() if b >= 0 for j in range(b * BLOCK, min(p + 1, (b + 1) * BLOCK))
                ]
                k, v = cache[g, keys, :D], cache[g, keys, D:]
                out[t, h] = (k @ self.q[t, h].double() * SCALE).softmax(0) @ v
        return out


PREFILL = Batch((700, 300, 128), (9, 300, 1))
ONE = Batch((520,), (20,))
DECODE = Batch((700, 1, 129, 400), (1, 1, 1, 1))
VERIFY = Batch((513, 260), (4, 4))


def decode_arguments(b):
    return b.idx_q, b.index_cache, b.table, b.seq, b.max_len


@pytest.mark.parametrize("batch", [PREFILL, ONE])
def test_prefill_scores_are_each_blocks_best(batch):
    b = batch
    score = ops.minimax_m3_index_score(
        b.idx_q, b.index_cache, b.table, b.cu, b.seq, b.prefix, b.max_new, b.max_len, HKV
    )
    assert score.shape == (HKV, len(b.q), 16)
    for (h, t), wanted in b.scores().items():
        assert score[h, t].tolist() == wanted + [-math.inf] * (16 - len(wanted))


@pytest.mark.parametrize(("topk", "init", "local"), [(2, 0, 1), (4, 1, 2), (9, 0, 1)])
@pytest.mark.parametrize("batch", [PREFILL, ONE])
def test_prefill_takes_the_best_blocks_and_the_forced_ones(batch, topk, init, local):
    b = batch
    score = ops.minimax_m3_index_score(
        b.idx_q, b.index_cache, b.table, b.cu, b.seq, b.prefix, b.max_new, b.max_len, HKV
    )
    wanted = b.blocks(topk, init, local)
    found = ops.minimax_m3_index_topk(score, b.cu, b.prefix, b.max_new, topk, init, local)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), wanted)
    whole = (b.idx_q, b.index_cache, b.table, b.cu, b.seq, b.prefix, b.max_new, b.max_len)
    assert torch.equal(ops.minimax_m3_index_prefill(*whole, topk, init, local, HKV).long(), wanted)
    out = torch.full((HKV, len(b.q) + 3, topk), 77, dtype=torch.int32)
    again = ops.minimax_m3_index_topk(score, b.cu, b.prefix, b.max_new, topk, init, local, out)
    assert again.data_ptr() == out.data_ptr()
    assert torch.equal(out[:, : len(b.q)].long(), wanted)
    assert bool((out[:, len(b.q) :] == 77).all())


@pytest.mark.parametrize(("topk", "init", "local"), [(2, 0, 1), (4, 1, 2)])
@pytest.mark.parametrize("batch", [DECODE, VERIFY])
def test_decode_takes_the_best_blocks_and_the_forced_ones(batch, topk, init, local):
    b, n = batch, batch.max_new
    wanted = b.blocks(topk, init, local)
    out = torch.full((HKV, len(b.q) + 3, topk), 77, dtype=torch.int32)
    scores = torch.zeros(8, len(b.q) + 1, HKV).permute(2, 1, 0)  # blocks first in memory
    for given in ({}, {"out": out, "score_out": scores}):
        found = ops.minimax_m3_index_decode(*decode_arguments(b), topk, init, local, HKV, n, n, **given)
        assert torch.equal(found.long(), wanted)
    assert torch.equal(out[:, : len(b.q)].long(), wanted)
    for (h, t), raw in b.scores().items():
        seen = len(raw)
        forced = [1e29 if i >= seen - local else 1e30 if i < init else x for i, x in enumerate(raw)]
        assert scores[h, t].tolist() == torch.tensor(forced + [-math.inf] * (8 - seen)).tolist()
    assert not scores[:, len(b.q)].any()


@pytest.mark.parametrize("batch", [PREFILL, ONE, DECODE, VERIFY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_attention_over_the_blocks(batch, dtype):
    b = batch
    blocks = b.blocks(3, 0, 1).int()
    kv, wide, scales = b.kv.to(dtype), b.kv, (None, None)
    if dtype != torch.float32:
        scales = (torch.tensor([0.5]), torch.tensor(2.0))
        wide = torch.cat((kv[..., :D].float() * 0.5, kv[..., D:].float() * 2.0), dim=-1)
    wanted = b.attended(blocks, wide)
    output = torch.full_like(b.q, torch.nan)
    assert ops.minimax_m3_sparse_attn(
        b.q, kv, blocks, b.table, b.cu, b.seq, b.prefix, b.max_new, HKV, SCALE, output, *scales
    ) is None  # fmt: skip
    assert float((output - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    if len(set(b.new)) == 1:
        again = torch.full_like(b.q, torch.nan)
        ops.minimax_m3_sparse_attn_decode(b.q, kv, blocks, b.table, b.seq, HKV, SCALE, again, b.max_new, *scales)
        assert float((again - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_lengths_and_pages_changed_in_place_are_followed():
    """An engine keeps its tables and lengths where they are, and so does a CUDA graph."""
    first, second = Batch((700, 400), (1, 1)), Batch((520, 399), (1, 1))
    table, seq = first.table.clone(), first.seq.clone()
    for b in (first, second):
        table[:, : b.table.shape[1]].copy_(b.table)
        seq.copy_(b.seq)
        found = ops.minimax_m3_index_decode(b.idx_q, b.index_cache, table, seq, 700, 2, 0, 1, HKV, 1, 1)
        assert torch.equal(found.long(), b.blocks(2, 0, 1))


def test_plans_made_in_inference_mode_serve_outside_of_it():
    ops._plans.clear()
    b, sizes = DECODE, (2, 0, 1, HKV, 1, 1)
    with torch.inference_mode():
        inside = ops.minimax_m3_index_decode(*decode_arguments(b), *sizes)
    assert torch.equal(ops.minimax_m3_index_decode(*decode_arguments(b), *sizes), inside)
    assert len(ops._plans) == 1


def test_rows_that_pad_a_captured_batch_see_nothing():
    b = Batch((300, 200), (1, 1))
    seq = torch.tensor([300, 0], dtype=torch.int32)
    blocks = ops.minimax_m3_index_decode(b.idx_q, b.index_cache, b.table, seq, 300, 2, 0, 1, HKV, 1, 1)
    assert bool((blocks[:, 1] == -1).all())
    output = torch.full_like(b.q, torch.nan)
    ops.minimax_m3_sparse_attn_decode(b.q, b.kv, blocks, b.table, seq, HKV, SCALE, output, 1)
    assert not output[1].any()
    assert bool(output[0].isfinite().all())


def test_plans_are_kept_and_bounded(monkeypatch):
    monkeypatch.setattr(ops, "PLANS", 3)
    ops._plans.clear()
    b = DECODE
    for topk in (1, 2, 3, 1, 4, 1):
        ops.minimax_m3_index_decode(*decode_arguments(b), topk, 0, 1, HKV, 1, 1)
    assert [dict(key[-3:])["topk"] for key in ops._plans] == [3, 4, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: ops.minimax_m3_index_decode(*decode_arguments(b), 2, 0, 1, 1, 1, 1), "idx_q has 2 heads"),
        (lambda b: ops.minimax_m3_index_decode(*decode_arguments(b), 2, 0, 1, HKV, 2, 2), "decode_query_len = 2"),
        (
            lambda b: ops.minimax_m3_sparse_attn_decode(
                b.q, b.kv, b.blocks(2, 0, 1).int(), b.table, b.seq, 4, SCALE, b.q.clone(), 1
            ),
            "num_kv_heads = 4: kv_cache has 2",
        ),
        (
            lambda b: ops.minimax_m3_sparse_attn_decode(
                b.q,
                b.kv.to(torch.float8_e4m3fn),
                b.blocks(2, 0, 1).int(),
                b.table,
                b.seq,
                HKV,
                SCALE,
                b.q.clone(),
                1,
                torch.ones(HKV, 9),
                torch.ones(HKV, 9),
            ),
            r"k_scale: \[2, 9\], must be one number",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_by_name_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(DECODE)
