"""The Hopper backend's Gluon kernels on the CPU: their source run by Python, on an emulation of what they call.

Warps of a role are one thread, shared memory starts as NaN, a copy lands at once, and a product is computed as late as
its wait allows: an index that is wrong, a buffer given back too early and a barrier that waits for ever all show.
`test_msa_hopper.py` runs this file in a process of its own, with TRITON_INTERPRET=1 for the Triton kernels beside them.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import threading
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from msa_cases import Case, random_blocks, relative

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("for the interpreter", allow_module_level=True)

from triton_interpreted import an_interpreter_that_multiplies_bf16  # noqa: E402, F401

from openm3.msa import hopper_attend, hopper_backend, hopper_page, hopper_select, reference, triton_backend  # noqa: E402
from openm3.msa.hopper_gather import Cut  # noqa: E402
from openm3.msa.triton_tiles import tiles_of  # noqa: E402

PATIENCE = 20.0  # seconds until a wait counts as one without end


@dataclass(frozen=True)
class Pointer:
    data: torch.Tensor  # flat
    offset: object = 0

    def __add__(self, more):
        return Pointer(self.data, self.offset + more)

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.data.dtype)


def load(pointer, mask=None, other=None):
    offset = torch.as_tensor(pointer.offset)
    if mask is None:
        return pointer.data[offset]
    offset, mask = torch.broadcast_tensors(offset, torch.as_tensor(mask))
    return torch.where(mask, pointer.data[torch.where(mask, offset, 0)], torch.tensor(other, dtype=pointer.data.dtype))


def store(pointer, value, mask=True):
    offset, value, mask = torch.broadcast_tensors(pointer.offset, value, torch.as_tensor(mask))
    pointer.data[offset[mask]] = value[mask]


class Barrier:
    def __init__(self):
        self.changed, self.phase, self.count = threading.Condition(), 0, None

    def init(self, count):
        self.count = self.left = count
        self.bytes = 0

    def arrive(self, count=1, more_bytes=0):
        with self.changed:
            self.left -= count
            self.bytes += more_bytes
            self._turn()

    def landed(self, count):
        with self.changed:
            self.bytes -= count
            self._turn()

    def _turn(self):
        assert self.left >= 0
        if not self.left and not self.bytes:
            self.phase += 1
            self.left = self.count
            self.changed.notify_all()

    def wait(self, parity, pred=True):
        with self.changed:
            if pred and not self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE):
                raise TimeoutError("a barrier that nobody completes")


@dataclass(frozen=True)
class Shared:
    data: object

    @property
    def dtype(self):
        return self.data.dtype

    def index(self, i):
        return self.data[int(i)] if isinstance(self.data, list) else Shared(self.data[int(i)])

    def permute(self, order):
        return Shared(self.data.permute(order))

    def store(self, value):
        self.data.copy_(value)

    def load(self, layout):
        return self.data.clone()

    def reinterpret(self, dtype, shape, layout):
        return Shared(self.data.view(dtype).view(shape))


pending = threading.local()


class Product:
    """a @ b (+ acc), computed when it is waited for."""

    def __init__(self, a, b, acc):
        self.operands, self.value = (a, b, acc), None
        pending.products = [*getattr(pending, "products", []), self]

    def compute(self):
        a, b, acc = (x.data if isinstance(x, Shared) else x for x in self.operands)
        acc = acc.value if isinstance(acc, Product) else acc
        self.value = a.float() @ b.float() + (0 if acc is None else acc)


def product_wait(outstanding, deps):
    for product in pending.products[: len(pending.products) - outstanding]:
        product.compute()
    pending.products = pending.products[len(pending.products) - outstanding :]
    values = tuple(x.value if isinstance(x, Product) and x.value is not None else x for x in deps)
    return values if len(values) > 1 else values[0]


def box_of(pages, at):
    box = pages.base[tuple(slice(int(i), int(i) + n) for i, n in zip(at, pages.shape, strict=True))]
    assert list(box.shape) == pages.shape
    return box


def copy_page(pages, at, barrier, to):
    to.data.copy_(box_of(pages, at).view(to.data.shape))
    barrier.landed(pages.block_type.nbytes)


def store_box(pages, at, what):
    """A copy reads as late as the wait for it allows."""
    pending.copies = [*getattr(pending, "copies", []), (box_of(pages, at), what.data)]


def store_wait(outstanding):
    assert not outstanding
    for box, data in getattr(pending, "copies", []):
        box.copy_(data.view(box.shape))
    pending.copies = []


def specialize(roles, warps, registers):
    assert len(roles) == len(warps) + 1 == len(registers) + 1
    failures = []

    def run(function, args):
        try:
            function(*args)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=role) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Kernel:
    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            given = [self._given(x) for x in args]
            for ids in itertools.product(*map(range, grid)):
                language.program_id = lambda axis, ids=ids: torch.tensor(ids[axis])
                language.num_programs = lambda axis: grid[axis]
                self.function(*given, **constants)

        return launch

    def _given(self, x):
        if isinstance(x, torch.Tensor):
            return Pointer(
                torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize - x.storage_offset(),), (1,))
            )
        if hasattr(x, "block_shape"):
            size = SimpleNamespace(nbytes=math.prod(x.block_shape) * x.base.itemsize)
            return SimpleNamespace(base=x.base, dtype=x.base.dtype, shape=list(x.block_shape), block_type=size)
        return x


def anything(*args, **more):
    return None


class BarrierLayout:
    pass


def allocate(dtype, shape, layout):
    if isinstance(layout, BarrierLayout):
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def extreme(of):
    return lambda x, axis: getattr(x, of)(axis)


def jit(function=None, **options):
    return function if function else jit


language = ModuleType("language")
language.__dict__.update(
    constexpr=lambda x: x, int32=torch.int32, int64=torch.int64, float16=torch.float16, float32=torch.float32,
    load=load, store=store, minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    arange=lambda a, b, layout: torch.arange(a, b), zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype), where=torch.where,
    maximum=torch.maximum, abs=torch.abs, exp2=torch.exp2, log2=torch.log2, max=extreme("amax"),
    min=extreme("amin"), sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, layout: x, static_range=range,
    static_assert=anything, barrier=anything, warp_specialize=specialize, allocate_shared_memory=allocate,
    BlockedLayout=anything, SliceLayout=anything, NVMMADistributedLayout=anything, NVMMASharedLayout=anything,
    DotOperandLayout=anything, shared_memory_descriptor=Shared,
)  # fmt: skip
HOPPER = dict(
    fence_async_shared=anything,
    tma=SimpleNamespace(async_load=copy_page, async_store=store_box, store_wait=store_wait),
    mbarrier=SimpleNamespace(
        MBarrierLayout=BarrierLayout, init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, count: barrier.arrive(1, count), arrive=lambda barrier, count: barrier.arrive(count),
        wait=lambda barrier, parity, pred=True: barrier.wait(parity, pred),
    ),
    warpgroup_mma=lambda a, b, acc, use_acc=True, is_async=False: Product(a, b, acc if use_acc else None),
    warpgroup_mma_wait=product_wait,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    """The three modules' kernels are their own source, with Gluon's names standing for the emulation."""
    gluon, hopper = ModuleType("gluon"), ModuleType("hopper")
    gluon.jit, gluon.language = jit, language
    hopper.__dict__.update(HOPPER)
    for name, module in ((".language.nvidia.hopper", hopper), (".language", language), ("", gluon)):
        monkeypatch.setitem(sys.modules, "triton.experimental.gluon" + name, module)
    monkeypatch.setattr(triton.experimental, "gluon", gluon)
    found = {}
    for module in (hopper_select, hopper_attend, hopper_page):
        spec = importlib.util.spec_from_file_location("emulated", module.__file__)
        found[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[module])
        monkeypatch.setitem(sys.modules, module.__name__, found[module])
    monkeypatch.undo()
    monkeypatch.setattr(hopper_select, "score_tiles", Kernel(found[hopper_select].score_tiles))
    monkeypatch.setattr(hopper_attend, "attend_tiles", Kernel(found[hopper_attend].attend_tiles))
    monkeypatch.setattr(hopper_page, "attend_pages", Kernel(found[hopper_page].attend_pages))
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 4)


FAMILY = dict(d=128, di=128, block=128, topk=8, dtype=torch.bfloat16)
CHUNK = Case((20, 3, 1), (1300, 1030, 400), hkv=2, hi=2, group=16, **FAMILY)
CASES = [
    CHUNK,
    CHUNK.but(hi=4, hkv=4, group=8, lens_q=(9, 0, 3), lens_k=(1200, 5, 129)),
    CHUNK.but(lens_q=(5, 3), lens_k=(1200, 130), positions=(1100, 1101, 1101, 300, -1, 16, 15, 129)),
]


@pytest.mark.parametrize(("case", "stages"), [(CASES[0], 4), (CASES[0].but(hi=4, hkv=4), 2), (CASES[2], 3)])
def test_the_scores_of_a_prompt_select_what_the_definition_does(case, stages, monkeypatch):
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, tile_stages=stages))
    case = case.but(integers=True)
    t, plan = case.tensors().in_pages(), case.paged()
    wanted, scores = reference.select_blocks(t.index_q, t.index_k, plan)
    found, values = hopper_backend._select_tiles(t.index_q, t.index_k, plan, True)
    assert torch.equal(found, wanted)
    assert torch.equal(values, scores)
    assert torch.equal(hopper_backend._select_tiles(t.index_q, t.index_k, plan, False)[0], wanted)


@pytest.mark.parametrize(("case", "stages"), [(CASES[0], 2), (CASES[1], 3), (CASES[2], 2)])
def test_dense_attention_of_a_prompt_is_the_references(case, stages, monkeypatch):
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, union_stages=stages))
    t, plan = case.tensors().in_pages(), case.paged()
    k, v = torch.cat((t.k, t.v), dim=-1).split(128, dim=-1)  # as the engine's cache has them
    tiles = tiles_of(plan, 128 // case.group)
    out, lse = hopper_backend._results(t.q)
    hopper_backend._attend_tiles(t.q, k, v, plan, 0.05, tiles, 0, len(tiles), None, None, out, lse)
    wanted, wanted_lse = reference.attention(*(x.double() for x in (t.q, t.k, t.v)), None, plan, 0.05)
    assert relative(out, wanted) <= 5e-3
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize(("case", "union"), [(CASES[0], 1.125), (CASES[1], 8), (CASES[2], 8)])
def test_sparse_attention_of_a_prompt_is_the_references(case, union, monkeypatch):
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, union=union))
    monkeypatch.setattr(hopper_backend, "MOST_QUERIES", 1)
    case = case.but(hi=1, lens_q=tuple(min(n, 11) for n in case.lens_q)) if case.positions is None else case
    t, plan = case.tensors().in_pages(), case.paged()
    blocks = random_blocks(case, plan)
    blocks[:, :8] = blocks[:, :1]
    out, lse = hopper_backend.sparse_attention(t.q, t.k, t.v, blocks, plan, 0.05)
    wanted, wanted_lse = reference.attention(*(x.double() for x in (t.q, t.k, t.v)), blocks, plan, 0.05)
    assert relative(out, wanted) <= 5e-3
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize(("case", "windows"), [(CASES[0], 1), (CASES[1], 3), (CASES[2], 2)])
def test_queries_gathered_by_page_are_the_references(case, windows, monkeypatch):
    tuning = replace(hopper_backend.TUNING, union=1.125)
    cut = Cut(64 // case.group, 4 * windows, windows)
    monkeypatch.setattr(hopper_backend, "_cut", lambda *args: cut)
    monkeypatch.setattr(hopper_backend, "TUNING", tuning)
    monkeypatch.setattr(hopper_backend, "MOST_QUERIES", 1)
    monkeypatch.setattr(triton_backend, "_interpreted", lambda: False)
    t, plan = case.tensors().in_pages(), case.paged()
    blocks = random_blocks(case, plan)
    blocks[:, 8:16] = blocks[:, 8:9]  # a tile that is united
    out, lse = hopper_backend.sparse_attention(t.q, t.k, t.v, blocks, plan, 0.05)
    wanted, wanted_lse = reference.attention(*(x.double() for x in (t.q, t.k, t.v)), blocks, plan, 0.05)
    assert relative(out, wanted) <= 5e-3
    assert relative(lse, wanted_lse) <= 1e-5


def test_the_emulation_sees_a_buffer_that_is_given_back_too_early():
    ring = Shared(torch.zeros(1, 2, 2))
    pending.products = []
    product = Product(torch.eye(2), ring.index(0), None)
    ring.index(0).store(torch.ones(2, 2))
    assert product_wait(0, (product,)).sum() == 4
