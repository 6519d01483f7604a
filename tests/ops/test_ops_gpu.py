"""The kernels of `ops` on a GPU: what the plain path gives, no wait for the device, and within a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from ops_cases import FP8, Sizes, changed

from openm3.ops import cache_write, qk_norm_rope_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M3 = Sizes(tokens=700, hq=64, hkv=4, hi=4, d=128, di=128, rotary=64, block=128, pages=9, dtype=BF16, cache=BF16,
           device="cuda")  # fmt: skip
ODD = Sizes(tokens=50, hq=6, hkv=3, hi=1, d=80, di=20, rotary=12, block=24, pages=5, dtype=FP16, cache=FP16,
            device="cuda")  # fmt: skip
STEP = {FP32: 2.0**-22, BF16: 2.0**-7, FP16: 2.0**-10, FP8: 2.0**-3}  # from a value to the next, at most


def before_rope(x, half):
    """Bounds of the values that RoPE made x of: their rounding stays, also where the two of a pair cancel out."""
    pair = torch.hypot(x[..., :half], x[..., half : 2 * half])
    return torch.cat((pair, pair, x[..., 2 * half :].abs()), -1)


def called(call):
    call = call._replace(backend="triton")
    return qk_norm_rope_store(*call[:10], **dict(zip(call._fields[10:], call[10:])))


@pytest.mark.parametrize(
    "sizes",
    [M3, ODD, M3.but(tokens=1), M3.but(hi=0), M3.but(dtype=FP32, cache=FP32), ODD.but(cache=FP32), M3.but(cache=FP8),
     M3.but(cache=FP8, scale=0.37), M3.but(skipped=(0, 3, 699)), M3.but(tokens=0)],
)  # fmt: skip
def test_one_launch_does_what_the_plain_path_does(sizes):
    if sizes.cache == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 caches go the plain way below sm_89")
    one, other = sizes.call(), sizes.call()
    found, wanted = called(one), cache_write.plain(other)
    outputs = 1 + bool(sizes.hi)
    for x, y in zip((*found[:outputs], *changed(one)), (*wanted[:outputs], *changed(other)), strict=True):
        gap = (x.float() - y.float()).abs()
        steps = STEP[x.dtype] + STEP[sizes.dtype]
        allowed = steps * before_rope(y.float(), sizes.rotary // 2) + 1e-6 + (2.0**-9 if x.dtype == FP8 else 0.0)
        assert bool((gap <= allowed).all())
        if x.dtype != FP32 and x.numel():
            assert float((gap > 0).float().mean()) <= 0.02
    again = called(sizes.call())
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, again))


def test_no_call_waits_for_the_device():
    call = M3.call()
    called(call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        called(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_call_follows_its_slots():
    call, other = M3.but(tokens=8).call(), M3.but(tokens=8).call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        called(call)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        called(call)
    call.slots.copy_((call.slots + 1) % (9 * 128))
    graph.replay()
    torch.cuda.synchronize()
    called(other)
    called(other._replace(slots=call.slots))
    assert all(torch.equal(x, y) for x, y in zip(changed(call), changed(other)))


def test_pages_beyond_two_gigabytes_of_values():
    pages = (2**31 + 2**27) // (128 * 128)
    try:
        caches = [torch.zeros(1, pages, 128, 128, device="cuda", dtype=BF16).transpose(0, 1) for _ in range(2)]
        index = torch.zeros(pages, 128, 128, device="cuda", dtype=BF16)
    except torch.OutOfMemoryError:
        pytest.skip("needs 14 GB of GPU memory")
    small = M3.but(tokens=5, hkv=1, hi=1)
    call, other = small.call(), small.call()
    shift = (pages - small.pages) * 128
    far = call._replace(k_cache=caches[0], v_cache=caches[1], index_k_cache=index, slots=call.slots + shift)
    called(far)
    called(other)
    for x, y in zip(changed(far), changed(other)):
        x, y = (t.movedim(-2, 1).flatten(0, 1) for t in (x, y))
        assert torch.equal(x[far.slots], y[other.slots])
        assert int(x.any(-1).sum()) == 5
