"""`qk_norm_rope_store` without a GPU: what the modules make of the same tensors, the registered op, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import FP8, Sizes, by_definition, changed

from openm3.ops import cache_write, qk_norm_rope_store

HERE = Path(__file__).parent
BASE = Sizes()
CASES = [BASE, BASE.but(hi=0), BASE.but(d=20, di=12, rotary=6), BASE.but(d=8, rotary=8), BASE.but(tokens=0),
         BASE.but(dtype=torch.bfloat16, cache=torch.bfloat16), BASE.but(dtype=torch.float16)]  # fmt: skip


def called(call):
    return qk_norm_rope_store(*call[:10], **dict(zip(call._fields[10:], call[10:])))


@pytest.mark.parametrize("sizes", CASES)
def test_it_is_what_the_definition_says(sizes):
    one, other = sizes.call(), sizes.call()
    with torch.no_grad():
        found, wanted = called(one), by_definition(other)
    assert (found[1] is None) == (not sizes.hi)
    for x, y in zip((*found, *changed(one)), (*wanted, *changed(other))):
        assert (x is None) == (y is None)
        if x is not None:  # two roundings, to x's dtype and to the cache's
            torch.testing.assert_close(x, y, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-6)


def test_an_fp8_cache_holds_values_over_their_scale_cut_at_448():
    wide, narrow = BASE.call(), BASE.but(cache=FP8, scale=0.003).call()
    called(wide), called(narrow)
    for x, y, scale in zip(changed(wide), changed(narrow), narrow.scales):
        written = x.movedim(-2, 1).flatten(0, 1)[wide.slots]
        held = y.movedim(-2, 1).flatten(0, 1)[narrow.slots]
        assert torch.equal(held.float(), (written / scale).clamp(-448, 448).to(FP8).float())
        assert bool(((written / scale).abs() > 500).any())


def test_a_token_with_a_negative_slot_changes_no_cache():
    whole, some = BASE.call(), BASE.but(skipped=(1, 4)).call()
    q, index_q = called(some)
    wanted = called(whole)
    assert torch.equal(q, wanted[0])
    assert torch.equal(index_q, wanted[1])
    untouched = changed(BASE.call())
    for x, y, z in zip(changed(some), changed(whole), untouched):
        x, y, z = (t.movedim(-2, 1).flatten(0, 1) for t in (x, y, z))
        y[whole.slots[[1, 4]]] = z[whole.slots[[1, 4]]]
        assert torch.equal(x, y)


@pytest.mark.parametrize("sizes", [BASE, BASE.but(hi=0), BASE.but(cache=FP8)])
def test_it_is_a_well_formed_op(sizes):
    call = sizes.call()
    scales = [None if x.dtype != FP8 else torch.tensor(0.5) for x in changed(call)]
    args = (*call[:-4], *scales, *[None] * (3 - len(scales)), None)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    wanted = checks[1:] if sizes.cache == FP8 else checks  # the first compares tensors, which it cannot in fp8
    torch.library.opcheck(torch.ops.openm3.qk_norm_rope_store.default, args, test_utils=wanted)


@pytest.mark.parametrize("sizes", [BASE, BASE.but(hi=0), BASE.but(cache=FP8, scale=0.5)])
def test_compiled_code_writes_the_same_caches_and_compiles_once(sizes):
    def step(call):
        q, index_q = called(call._replace(q=call.q * 2))
        return (q + 1, index_q) if index_q is None else (q + 1, index_q - 1)

    torch._dynamo.reset()
    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    for tokens in (7, 12, 9):
        one, other = sizes.but(tokens=tokens).call(), sizes.but(tokens=tokens).call()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=tokens == 9):
            found, wanted = run(one), step(other)
        for x, y in zip((*found, *changed(one)), (*wanted, *changed(other))):
            assert x is y is None or torch.equal(x.float(), y.float())


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "cache_write_interpreted.py"]
    run = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize(
    ("device", "capability", "cache", "reason"),
    [
        ("cpu", (9, 0), torch.bfloat16, "it needs a GPU, the tensors are on cpu"),
        ("cuda", (8, 0), torch.bfloat16, None),
        ("cuda", (8, 0), FP8, "it needs compute capability 8.9 or above, this GPU has 8.0"),
        ("cuda", (8, 9), FP8, None),
        ("cuda", (7, 5), torch.float16, "it needs compute capability 8.0 or above, this GPU has 7.5"),
        ("cuda", (9, 0), torch.float64, "it has no float64"),
    ],
)
def test_the_kernel_says_why_it_cannot_serve(device, capability, cache, reason, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(cache_write, "_capability", lambda device: capability)

    class There(torch.Tensor):
        device = property(lambda self: where)

    where = torch.device(device, 0)
    call = BASE.but(cache=torch.float32 if cache == torch.float64 else cache).call()
    q = call.q.double() if cache == torch.float64 else call.q
    assert cache_write._refusal(call._replace(q=q.as_subclass(There))) == reason


def test_the_best_backend_is_taken_and_a_named_one_or_none(monkeypatch):
    taken = []
    monkeypatch.setattr(cache_write, "launched", lambda call: taken.append("triton"))
    monkeypatch.setattr(cache_write, "plain", lambda call: taken.append("torch"))
    call = BASE.call()
    for preferred, refusal in (({}, None), ({"cpu": "triton"}, None), ({"cpu": "triton"}, "no")):
        monkeypatch.setattr(cache_write, "PREFERRED", preferred)
        monkeypatch.setattr(cache_write, "_refusal", lambda call, reason=refusal: reason)
        for name in (None, "torch"):
            cache_write.run(call._replace(backend=name))
    assert taken == ["torch", "torch", "triton", "torch", "torch", "torch"]
    with pytest.raises(ValueError, match="backend = 'triton': cannot serve this call: no"):
        cache_write.run(call._replace(backend="triton"))


Z = torch.zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend = 'cuda': must be one of triton, torch, or None"),
        ({"backend": "triton"}, "backend = 'triton': cannot serve this call: it needs a GPU"),
        ({"q": Z(7, 64)}, r"q: \[7, 64\], must be \[T, heads, dim\]"),
        ({"k": Z(7, 0, 16)}, r"k: \[7, 0, 16\], must be \[T, KV heads, dim\]"),
        ({"index_q": Z(7, 0, 8)}, r"index_q: \[7, 0, 8\], must be \[T, index heads, dim\]"),
        ({"v": Z(7, 3, 16)}, r"v: torch.float32 \[7, 3, 16\] on cpu, must be bfloat16, .* \[7, 2, 16\] on cpu"),
        ({"k_cache": Z(5, 2, 16)}, r"k_cache: \[5, 2, 16\], must be \[pages, KV heads, block, dim\]"),
        ({"v_cache": Z(4, 2, 4, 16)}, r"v_cache: torch.float32 \[4, 2, 4, 16\] .*float8_e4m3fn \[5, 2, 4, 16\]"),
        ({"q_norm": Z(8)}, r"q_norm: torch.float32 \[8\] .* \[16\]"),
        ({"slots": Z(7, dtype=torch.int32)}, r"slots: torch.int32 \[7\] on cpu, must be int64 \[7\]"),
        ({"slots": torch.arange(14, 21)}, "slots: up to 20, the caches have 5 pages of 4 tokens"),
        ({"cos": Z(7, 4).double()}, r"cos: torch.float64 \[7, 4\] on cpu, must be float32 \[7, 4\]"),
        ({"cos": Z(7, 5), "sin": Z(7, 5)}, "cos: 5 angles turn 10 channels, more than the 8 of a head"),
        ({"q": Z(7, 4, 16, dtype=torch.int8)}, "q: torch.int8 .* must be bfloat16, float16, float32, float64 "),
        ({"q": Z(7, 16, 4).mT}, "q: stride 4 along its last axis, must be 1"),
        ({"k": Z(7, 2, 16, device="meta")}, "k: torch.float32 .* on meta, must be .* on cpu"),
        ({"index_q": None}, "index_q: missing; the index branch comes whole"),
        ({"index_k_cache": None, "index_k_norm": None}, "index_k_norm, index_k_cache: missing"),
        ({"index_k_cache": Z(5, 4, 16)}, r"index_k_cache: .* \[5, 4, 16\] .* \[5, 4, 8\]"),
        ({"k_scale": 0.5}, "k_scale: given, but only a cache of float8_e4m3fn takes a scale; it is torch.float32"),
        ({"q_norm": Z(16, requires_grad=True)}, "a gradient is wanted"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        called(BASE.call()._replace(**change))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), True, Z(2)])
def test_a_scale_is_one_positive_number(scale):
    with pytest.raises(ValueError, match="v_scale"):
        called(BASE.but(cache=FP8).call()._replace(v_scale=scale))
