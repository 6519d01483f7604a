"""What every GPU backend is held to on a GPU, whatever its sizes."""

from __future__ import annotations

import torch
from msa_cases import relative

from openm3.msa import reference


def attend(backend, t, blocks, plan, *scales):
    """(output, lse) of a backend's module; blocks None: dense."""
    if backend is reference:
        return reference.attention(t.q, t.k, t.v, blocks, plan, 0.1, *scales)
    assert backend.refusal(t.q, t.k, plan, t.v) is None
    if blocks is None:
        return backend.dense_attention(t.q, t.k, t.v, plan, 0.1, *scales)
    return backend.sparse_attention(t.q, t.k, t.v, blocks, plan, 0.1, *scales)


def waits_for_nothing(backend, t, plan):
    torch.cuda.set_sync_debug_mode("error")
    try:
        blocks, _ = backend.select_blocks(t.index_q, t.index_k, plan)
        attend(backend, t, blocks, plan)
        attend(backend, t, None, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured_step_follows_lengths(backend, t, plan, lens_k):
    """A decode step of integer-valued index branches, captured once, after the sequences have become shorter."""

    def step():
        blocks, _ = backend.select_blocks(t.index_q, t.index_k, plan, scores=False)
        return blocks, *attend(backend, t, blocks, plan), *attend(backend, t, None, plan)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        blocks, out, lse, dense, dense_lse = step()
    for shorter in (0, 1, 40, 63):
        plan.positions.copy_(torch.tensor(lens_k) - 1 - shorter)
        graph.replay()
        torch.cuda.synchronize()
        wanted = reference.select_blocks(t.index_q, t.index_k, plan)[0]
        assert torch.equal(blocks, wanted)
        for found, chosen in (((out, lse), wanted), ((dense, dense_lse), None)):
            exact, exact_lse = attend(reference, t.double(), chosen, plan)
            assert relative(found[0], exact) <= 5e-3
            assert torch.allclose(found[1], exact_lse, rtol=1e-4, atol=1e-4)
