"""MSA without the model: selection and attention over 32,768 keys, next to dense attention; on a GPU if there is one.

    python examples/msa_alone.py

One value is planted far back, where only one query's index branch points. Sparse attention finds it while it reads 16
of 256 blocks.
"""

from __future__ import annotations

import time

import torch

from openm3.msa import Plan, dense_attention, select_blocks, sparse_attention

TOKENS, QUERIES, HEADS, KV_HEADS, DIM = 32_768, 256, 8, 2, 64  # the queries are the last 256 of the sequence
PLANTED = 12_345


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    q, k, v = random(QUERIES, HEADS, DIM), random(TOKENS, KV_HEADS, DIM), random(TOKENS, KV_HEADS, DIM)
    index_q, index_k = random(QUERIES, KV_HEADS, DIM), random(TOKENS, DIM)
    index_q[-1] = index_k[PLANTED] * 2  # the last query's index heads look for this key
    q[-1] = k[PLANTED].repeat_interleave(HEADS // KV_HEADS, 0) * 4  # and so do its attention heads

    plan = Plan.packed([0, QUERIES], [0, TOKENS], block_size=128, topk=16, device=device)
    blocks, select_ms = timed(lambda: select_blocks(index_q, index_k, plan))
    sparse, attend_ms = timed(lambda: sparse_attention(q, k, v, blocks, plan))
    dense, dense_ms = timed(lambda: dense_attention(q, k, v, plan))

    print(f"{QUERIES} queries over {TOKENS:,} keys on {device}: blocks {list(blocks.shape)} {blocks.dtype}")
    print(f"dense attention {dense_ms:.1f} ms; MSA {select_ms:.1f} ms to select + {attend_ms:.1f} ms to attend")
    for head, chosen in enumerate(blocks[:, -1].tolist()):
        print(f"index head {head}, last query: blocks {chosen}; the planted key is in block {PLANTED // 128}")
    error = (sparse[-1] - dense[-1]).abs().max().item()
    print(f"the last query's output is the planted value in both: largest difference {error:.1e}")


def timed(call):
    """(result, milliseconds of the fastest of three calls)"""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return result, best * 1e3


if __name__ == "__main__":
    main()
