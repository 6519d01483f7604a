"""The kernel of `qk_norm_rope_store` on the CPU, in Triton's interpreter, against the plain path.

`test_ops_cache_write.py` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from ops_cases import FP8, Sizes, changed
from triton.runtime import interpreter

from openm3.ops import cache_write

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Sizes()
ODD = Sizes(tokens=5, hq=6, hkv=3, hi=1, d=20, di=12, rotary=6, block=3)
WHOLE = BASE.but(d=8, di=8, rotary=8)  # every channel turns
M3 = Sizes(tokens=3, hq=16, hkv=1, hi=4, d=128, di=128, rotary=64, block=128, pages=2, dtype=BF16, cache=BF16)
STEP = {torch.float32: 2.0**-22, BF16: 2.0**-7, FP16: 2.0**-10, FP8: 2.0**-3}  # from a value to the next, at most


@pytest.fixture(scope="module", autouse=True)
def an_interpreter_that_rounds():
    """It cuts where a GPU rounds; and 3.6's takes scalars in a way that NumPy 2.4 forbids."""
    tensor_methods, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    narrow = {tl.bfloat16: (BF16, torch.int16), tl.float8e4nv: (FP8, torch.uint8)}

    def with_index(tensor, scope):
        tensor_methods(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(data, source, target, mode):
        if source != tl.float32 or target not in narrow:
            return convert(data, source, target, mode)
        dtype, bits = narrow[target]
        return torch.from_numpy(np.ascontiguousarray(data)).to(dtype).view(bits).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


def assert_same(sizes, seed=0, **changes):
    """Few values differ, by the one step that the order of a sum may cause; slots of no token are untouched."""
    one, other = (sizes.call(seed)._replace(**changes) for _ in range(2))
    before = [x.clone() for x in changed(one)]
    found, wanted = cache_write.launched(one), cache_write.plain(other)
    for x, y in zip((*found, *changed(one)), (*wanted, *changed(other))):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        gap = (x.float() - y.float()).abs()
        steps = max(STEP[x.dtype], STEP[sizes.dtype] if x.dtype != sizes.dtype else 0.0)
        assert bool((gap <= steps * y.float().abs() + 1e-6 + (2.0**-9 if x.dtype == FP8 else 0.0)).all())
        if x.dtype != torch.float32:
            assert float((gap > 0).float().mean()) <= 0.02
    for x, y, z in zip(before, changed(one), changed(other)):
        untouched = torch.ones(len(x) * sizes.block, dtype=torch.bool)
        untouched[one.slots[one.slots >= 0]] = False
        rows = (t.movedim(-2, 1).flatten(0, 1)[untouched].view(torch.uint8) for t in (x, y))
        assert torch.equal(*rows)
        assert bool(untouched.all()) == torch.equal(x.float(), z.float())


@pytest.mark.parametrize("sizes", [BASE, ODD, WHOLE, M3, BASE.but(hi=0), BASE.but(tokens=0), BASE.but(tokens=1)])
def test_the_kernel_does_what_the_plain_path_does(sizes):
    assert_same(sizes)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("cache", [BF16, FP16, torch.float32])
def test_half_precision_rounds_where_the_modules_round(dtype, cache):
    assert_same(ODD.but(tokens=14, dtype=dtype, cache=cache))


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_fp8_caches(dtype, scale):
    assert_same(BASE.but(tokens=19, dtype=dtype, cache=FP8, scale=scale))


def test_a_scale_on_the_device_and_values_beyond_fp8():
    sizes = BASE.but(tokens=19, cache=FP8, scale=1.0)
    scales = dict(k_scale=torch.tensor(0.5), v_scale=torch.tensor([0.003]), index_k_scale=torch.tensor(3.0))
    assert_same(sizes, **scales)
    call = sizes.call()._replace(**scales)
    cache_write.launched(call)
    assert float(call.v_cache.float().abs().max()) == 448.0


@pytest.mark.parametrize("sizes", [BASE.but(skipped=(0, 5)), BASE.but(skipped=tuple(range(7)))])
def test_tokens_with_negative_slots_are_not_stored(sizes):
    assert_same(sizes)


def test_several_tiles_a_kind(monkeypatch):
    monkeypatch.setattr(cache_write, "TILE", 32)
    for sizes in (BASE, ODD, M3):
        assert_same(sizes)


@pytest.mark.parametrize("sizes", [BASE, ODD])
def test_inputs_and_caches_of_any_strides(sizes):
    """k beside v by token, v within something wider by page, index keys with a gap; inputs that are no views of one."""

    def memory():
        pairs = torch.zeros(sizes.pages, sizes.block, sizes.hkv, 2 * sizes.d)
        wide = torch.zeros(sizes.pages, sizes.hkv + 1, sizes.block, sizes.d + 4)
        return pairs, wide, torch.zeros(sizes.pages, 2, sizes.block, sizes.di + 3)

    results = []
    for run in (cache_write.launched, cache_write.plain):
        pairs, wide, index = memory()
        call = sizes.call()
        k = torch.stack((call.k, call.k), dim=1)[:, 1]
        q = call.q.transpose(0, 1).contiguous().transpose(0, 1)
        index_q = torch.nn.functional.pad(call.index_q, (0, 5))[..., : sizes.di]
        v = torch.nn.functional.pad(call.v, (0, 3))[..., : sizes.d]
        call = call._replace(
            q=q, k=k, v=v, index_q=index_q, index_k=call.index_k.contiguous(),
            k_cache=pairs[..., : sizes.d].transpose(1, 2), v_cache=wide[:, 1:, :, : sizes.d],
            index_k_cache=index[:, 1, :, : sizes.di],
        )  # fmt: skip
        cache_write.check(call)
        results.append((*run(call), pairs, wide, index))
    for x, y in zip(*results):
        assert bool(y.any())
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)
