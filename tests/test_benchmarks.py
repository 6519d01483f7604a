"""The benchmarks on a CPU: formulas by hand, their JSON, their pictures. The figures of most need a GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import m3_slice
import msa_attention
import msa_sides
import msa_training
import plot_msa
from msa_attention import Bench, DeviceLost, Settings
from msa_sides import Geometry, make_case

import serve as serve_bench
from openm3.model import M3
from openm3.msa import Plan, reference

TINY = Geometry(heads=4, kv_heads=2, dim=32, index_heads=2, index_dim=32, block=16, topk=4)
SETTINGS = Settings(
    device="cpu", geometry=TINY, backends=("torch",), chunk=64, ends=(256,), steps=((1, 256), (2, 128)),
    fp8_steps=((1, 256),), dense_ends=(64, 256), whole=(64,), prompts=(128, 256), product=32, copied=1 << 12,
    budget_ms=0.0, repeats=(2, 2),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_engines(monkeypatch):
    """Whatever engines are installed here, they are not started."""
    monkeypatch.setattr(msa_attention, "missing", lambda peer: "not looked for")


def rows(run: dict, **fields: object) -> list[dict]:
    return [row for row in run["results"] if all(row.get(key) == value for key, value in fields.items())]


def test_flops_and_bytes_of_m3_by_hand():
    m3 = Geometry()
    # 8192 queries before 1 M: 1,040,384 keys before the chunk, and 1 + 2 + ... + 8192 in it.
    visible = 8192 * 1_040_384 + 33_558_528
    assert m3.select_flops(1_040_384, 8192) == 2 * 4 * 128 * visible == 8_761_737_478_144
    assert m3.dense_flops(1_040_384, 8192) == 4 * 64 * 128 * visible
    # 15 whole blocks, and of the own one 1 to 128 keys, 64.5 in the mean.
    assert m3.attend_flops(1_040_384, 8192) == 4 * 64 * 128 * 8192 * (15 * 128 + 64.5)
    assert m3.selected(0, 2048) == 2048 * 2049 // 2  # all blocks, as in dense attention
    assert m3.select_bytes(1, 1 << 20) == 268_435_456
    assert m3.attend_bytes(8, 131_072) == 8 * 4 * 2048 * 2 * 128 * 2
    assert m3.attend_bytes(1, 100) == 4 * 100 * 2 * 128 * 2
    assert m3.dense_bytes(1, 1 << 20) == 2_147_483_648
    million = plot_msa.compute(m3, 1 << 20)
    assert million["gqa"] / million["layer"] == pytest.approx(28.5, abs=0.2)


def test_a_run_measures_every_section_rightly_and_draws(tmp_path, monkeypatch, capsys):
    data = Bench(SETTINGS, tmp_path / "results.json").run()
    assert data == json.loads((tmp_path / "results.json").read_text())
    failed = [row for row in data["results"] if "error" in row]
    assert {row["side"] for row in failed} == {"cudnn"}  # a CPU has no cuDNN; the run went on
    sections = {"prefill": 2, "decode": 2, "fp8": 2, "dense decode": 4, "dense prefill": 4, "prompts": 2}
    for what, data_kinds in sections.items():
        measured = [row for row in rows(data, what=what) if row not in failed]
        assert len(measured) == data_kinds, what
    checks = [row["check"] for row in data["results"] if "check" in row]
    assert len(checks) == 15
    assert max(check["relative_error"] for check in checks) < 5e-3
    exact = [row["check"] for row in data["results"] if row.get("keys") != "fp8" and "check" in row]
    assert {check["agreement"] for check in exact if "agreement" in check} == {1.0}
    both = rows(data, keys="both")[0]
    assert both["differ"] == 0
    assert both["select"]["bytes"] == 256 * 32
    prefill = rows(data, what="prefill", data="random")[0]
    select, ceiling = prefill["select"], rows(data, side="matmul")[0]["tflops"]
    assert select["flops"] == 2 * 2 * 32 * (64 * 192 + 64 * 65 // 2)
    assert select["tflops"] == pytest.approx(select["flops"] / select["ms"] / 1e9)
    assert select["of_ceiling"] == pytest.approx(select["tflops"] / ceiling)
    assert prefill["total_ms"] == select["ms"] + prefill["attend"]["ms"]
    decode = rows(data, what="decode", batch=2)[0]
    assert decode["both"]["bytes"] == 2 * 128 * 32 * 2 + 2 * 2 * 64 * 2 * 32 * 2
    walk = rows(data, what="prompts", data="clustered")[0]
    assert walk["sums"]["128"]["select_ms"] == sum(walk["select_ms"][:2])
    assert len(walk["attend_ms"]) == 4

    monkeypatch.setattr(sys, "argv", ["plot_msa.py", str(tmp_path / "results.json")])
    plot_msa.main()
    assert "prefill 256: a sparse layer" in capsys.readouterr().out
    drawn = (tmp_path / "results.svg").read_text()
    assert drawn.startswith("<?xml")
    assert len(drawn) > 10_000
    found = plot_msa.speedups(data)
    assert set(found["prefill"]) == {128, 256}
    assert set(found["decode"]) == {(1, 256), (2, 128)}


@pytest.mark.gpu
def test_a_run_on_a_gpu_measures_our_kernels_in_graphs(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings = dataclasses.replace(SETTINGS, device="cuda", backends=("triton",), cold=1 << 16)
    data = Bench(settings, tmp_path / "results.json").run()
    assert [row for row in data["results"] if "error" in row and row["side"] != "cudnn"] == []
    assert max(row["check"]["relative_error"] for row in data["results"] if "check" in row) < 5e-3
    assert rows(data, what="decode")[0]["copies"] == 2
    assert all(row["both"]["ms"] > 0 for row in rows(data, what="decode"))


def test_a_wrong_result_shows_in_the_check():
    case = make_case(TINY, "cpu", torch.bfloat16, 1, 256, 64)
    calls = msa_sides.ours("torch", case)
    blocks = calls.select()
    out = calls.attend(blocks)
    wrong = blocks.clone()
    wrong[:, -1] = torch.tensor([0, 1, 2, 3])
    assert msa_sides.check_selection(case, wrong)["agreement"] < 1
    assert msa_sides.check_selection(case, wrong)["shortfall"] > 0
    assert msa_sides.check_attention(case, blocks, out * 1.02)["relative_error"] == pytest.approx(0.02, abs=3e-3)
    assert msa_sides.check_attention(case, wrong, out)["relative_error"] > 0.1
    q, k, v = (torch.randn(heads, 8, 32) for heads in (4, 2, 2))
    assert msa_sides.check_dense(q, k, v, torch.zeros_like(q), 0)["relative_error"] == 1


def test_clustered_neighbours_agree_on_sinks_and_stripes():
    union = {}
    for data in ("random", "clustered"):
        case = make_case(TINY, "cpu", torch.float32, 1, 2048, 64, data)
        blocks = msa_sides.ours("torch", case).select()
        union[data] = msa_sides.union(blocks, 8)
    assert union["random"] > 1.5 * union["clustered"]
    assert (blocks == 0).any(-1).float().mean() > 0.9
    assert msa_sides.union(torch.tensor([[[0, 1], [1, 2], [4, -1], [4, 5]]]), 2) == 2.5


def test_peers_are_called_with_what_they_take_and_one_that_fails_costs_its_own_record(tmp_path, monkeypatch):
    seen = []

    def plan(table, seq, queries):
        return Plan.paged(table, seq, [s * queries for s in range(len(seq) + 1)], block_size=16, topk=4)

    def index_score(index_q, index_k, table, cu_q, seq, prefix, max_q, max_k, kv_heads):
        assert max_k == int(seq.max())
        assert prefix.tolist() == [n - max_q for n in seq.tolist()]
        return reference.select_blocks(index_q, index_k, plan(table, seq, max_q))[0]

    def index_topk(scores, cu_q, prefix, max_q, topk, init, local):
        assert (topk, init, local) == (4, 0, 1)
        return scores.transpose(0, 1)  # the other order of its axes

    def attend(q, kv, blocks, table, cu_q, seq, prefix, max_q, kv_heads, scale, out):
        assert kv_heads == 2
        k, v = kv.chunk(2, -1)
        out.copy_(reference.attention(q, k, v, blocks.transpose(0, 1), plan(table, seq, max_q), scale)[0])
        seen.append("attend")

    def decode(*args):
        raise RuntimeError("no such thing")

    fake = SimpleNamespace(minimax_m3_index_score=index_score, minimax_m3_index_topk=index_topk)
    fake.minimax_m3_index_decode = decode
    for name, module in (("index_topk", fake), ("sparse_attn", SimpleNamespace(minimax_m3_sparse_attn=attend))):
        monkeypatch.setitem(sys.modules, f"vllm.{name}", module)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setattr(msa_attention, "missing", {"vllm": None, "sglang": "absent"}.get)
    settings = dataclasses.replace(SETTINGS, what=("prefill", "decode"), data=("random",), steps=((1, 256),))
    data = Bench(settings, tmp_path / "results.json").run()
    assert data["not_importable"] == {"sglang": "absent"}
    check = rows(data, side="vllm", what="prefill")[0]["check"]
    assert seen
    assert check["agreement"] == 1
    assert check["relative_error"] < 5e-3
    assert rows(data, side="vllm", what="decode")[0]["error"] == "RuntimeError: no such thing"
    assert "error" not in rows(data, side="torch", what="decode")[0]


def test_caches_by_token_hold_the_same_numbers():
    case = make_case(TINY, "cpu", torch.bfloat16, 2, 64, 16)
    k, v, index_k, slots = msa_sides._by_token(case)
    page, inside = int(case.page_table[1, 2]), 5
    slot = int(slots[1, 2 * 16 + inside])
    assert torch.equal(k[slot], case.k[page, :, inside])
    assert torch.equal(v[slot], case.v[page, :, inside])
    assert torch.equal(index_k[slot, 0], case.index_k[page, inside])
    packed = msa_sides.Packed.of(case)
    assert torch.equal(packed.v[1, :, 37], case.v[page, :, inside])


def test_a_stopped_run_keeps_what_it_has_and_resumes_without_measuring_twice(tmp_path):
    path = tmp_path / "results.json"
    settings = dataclasses.replace(SETTINGS, what=("ceilings", "decode"))
    over = Bench(dataclasses.replace(settings, seconds=0.0), path).run()
    assert over["results"] == []
    assert "stopped" in over
    first = Bench(dataclasses.replace(settings, what=("ceilings",)), path).run()
    stopped = first | {"running": dict(what="decode", side="torch", batch=1, context=256)}
    path.write_text(json.dumps(stopped))
    resumed = Bench(settings, path, resume=True).run()
    assert resumed["results"][: len(first["results"])] == first["results"]
    assert "while this was measured" in rows(resumed, what="decode", context=256)[0]["error"]
    assert len(rows(resumed, what="decode")) == 2


def test_the_command_takes_its_options_and_writes_where_it_was_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    command = (
        f"msa_attention.py --what ceilings,decode --backends torch --quick --seconds 0 --device cpu --output {path}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    assert msa_attention.main() == 0
    data = json.loads(path.read_text())
    assert data["device"].endswith("CPU")
    assert data["settings"]["what"] == ["ceilings", "decode"]
    assert data["settings"]["ends"] == [131072, 1048576]
    monkeypatch.setattr(sys, "argv", ["msa_attention.py", "--what", "speed"])
    with pytest.raises(SystemExit):
        msa_attention.main()
    assert "must be among ceilings" in capsys.readouterr().err


def test_a_lost_device_ends_the_run_with_the_error_on_disk(tmp_path, monkeypatch):
    bench = Bench(dataclasses.replace(SETTINGS, what=("decode",)), tmp_path / "results.json")

    def broken(*args):
        raise RuntimeError("illegal memory access")

    bench.sides["torch"] = broken
    monkeypatch.setattr(bench.clock, "sync", broken)
    with pytest.raises(DeviceLost):
        bench.run()
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["error"] for row in data["results"]] == ["RuntimeError: illegal memory access"]
    assert "running" not in data


def test_speedups_by_hand():
    """One chunk costs 2 ms sparse; dense ones 1 ms after 8 K and 4 ms after 16 K; ours dense twice that."""
    dense = [("cudnn", 8, 1.0), ("cudnn", 16, 4.0), ("triton", 8, 2.0), ("triton", 16, 8.0)]
    results = [dict(what="dense prefill", side=s, context=n << 10, total_ms=ms) for s, n, ms in dense]
    results.append(dict(what="dense prefill", side="flash", context=8 << 10, error="none"))
    results.append(dict(what="prompts", side="triton", data="random", sums={"16384": {"total_ms": 2.0}}))
    at = dict(batch=1, context=64)
    results += [
        dict(what="decode", side="triton", total_ms=1.0, **at),
        dict(what="dense decode", side="flash", total_ms=8.0, **at),
    ]
    settings = dict(backends=["triton"], chunk=8192, prompts=[16384], steps=[[1, 64]])
    found = plot_msa.speedups({"settings": settings, "results": results})
    assert found["prefill"][16384]["layer"] == pytest.approx(5 / 2)
    assert found["prefill"][16384]["model"] == pytest.approx(60 * 5 / (57 * 2 + 3 * 10))
    assert found["decode"][1, 64] == {"layer": 8.0, "model": None, "sparse_ms": 1.0, "dense_ms": 8.0}


def test_the_slice_decodes_beside_transformers_on_the_same_weights_and_caches(tmp_path, monkeypatch, capsys):
    path = tmp_path / "slice.json"
    command = f"m3_slice.py --tiny --device cpu --output {path}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert m3_slice.main() == 0
    data = json.loads(path.read_text())
    assert "tokens/s" in capsys.readouterr().out
    for batch, context in ((1, 64), (3, 40)):
        [ours], [theirs] = (
            rows(data, what="decode", side=side, batch=batch, context=context) for side in ("openm3", "transformers")
        )
        assert ours["tokens_per_second"] == pytest.approx(1e3 * batch / ours["ms"])
        assert len(ours["experts_hit"]) == 3
        if theirs.get("error") != "RuntimeError: transformers missing":
            assert theirs["logits"] == pytest.approx(ours["logits"], abs=1e-5)
            assert theirs["ours_times_as_fast"] == pytest.approx(theirs["ms"] / ours["ms"])
    monkeypatch.setattr(sys, "argv", [*command.split(), "--resume"])
    assert m3_slice.main() == 0
    assert json.loads(path.read_text())["results"] == data["results"]


def test_the_floor_of_a_decode_step_by_hand():
    model = M3(m3_slice.slice_config(tiny=True))
    case = m3_slice.Slice(model, batch=2, context=40, steps=4)
    hit = torch.tensor([[2, 0, 0, 0, 0, 0, 0, 2], [1, 1, 1, 1, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]])
    attention = 4 * ((4 + 2 * 2) * 16 * 64 + 64 * 64 + 2 * 16 + 2 * 64) + 3 * ((2 + 1) * 16 * 64 + 2 * 16)
    mlps = 3 * 64 * 96 + 3 * (3 * 64 * 32 + 8 * 64)
    weights = attention + mlps + 64 + 256 * 64
    keys = 40 * 2 * 2 * 16 + 3 * (24 * 2 * 2 * 16 + 40 * 16)
    assert case.floor_bytes(hit) == 4 * (weights + (2 + 4 + 1) * 3 * 64 * 32 + 2 * keys)


def test_the_server_benchmark_measures_a_server_and_draws(tmp_path, monkeypatch):
    path = tmp_path / "serve.json"
    command = f"serve.py --streams 1,3 --start 1 --seconds 2 --output {path}"
    monkeypatch.setattr(sys, "argv", command.split())
    serve_bench.main()
    one, three = json.loads(path.read_text())["results"]
    assert (one["streams"], three["streams"]) == (1, 3)
    for row in (one, three):
        assert row["tokens_per_second"] > 0
        assert row["inter_token_ms"]["median"] <= row["inter_token_ms"]["p99"]
    assert path.with_suffix(".svg").read_text().startswith("<?xml")


def test_training_is_measured_on_selections_as_a_layer_makes_them(tmp_path, monkeypatch):
    blocks = msa_training.random_blocks(TINY, 100, torch.Generator().manual_seed(0))
    assert blocks.shape == (2, 100, 4)
    for row, chosen in enumerate(blocks[0].tolist()):
        wanted = [b for b in chosen if b >= 0]
        assert len(wanted) == min(4, row // 16 + 1)
        assert wanted == sorted(set(wanted))
        assert wanted[-1] == row // 16
        assert chosen[len(wanted) :] == [-1] * (4 - len(wanted))
    monkeypatch.setattr(msa_training, "GEOMETRIES", {"tiny": TINY})
    output = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", f"msa_training.py --device cpu --lengths 64 --output {output}".split())
    msa_training.main()
    found = {row["side"]: row for row in json.loads(output.read_text())["rows"]}
    assert found.keys() == {"dense, PyTorch", *(f"{k}, {b}" for k in ("sparse", "dense") for b in ("triton", "torch"))}
    assert min(found["sparse, torch"]["both_ms"], found["sparse, torch"]["forward_ms"]) > 0
    assert "it needs a GPU" in found["sparse, triton"]["error"]
