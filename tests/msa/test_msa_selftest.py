"""The self-test passes on this machine, sees what is wrong, and says what it could not run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from openm3.msa import BACKENDS, dispatch, selftest


@pytest.fixture
def fewer(monkeypatch):
    """The quick problems only."""
    monkeypatch.setattr(selftest, "PROBLEMS", selftest.PROBLEMS[1:3])


def table(capsys):
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_torch_backend_passes_and_the_rows_are_written(capsys, tmp_path):
    assert selftest.main(["--device", "cpu", "--backend", "torch", "--json", str(tmp_path / "rows.json")]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["device"] == "cpu"
    rows = written["rows"]
    assert {row["backend"] for row in rows} == {"torch"}
    assert {row["problem"] for row in rows} == {problem.name for problem in (*selftest.PROBLEMS, selftest.LONG)}
    for kind in (
        "selection, packed",
        "selection, pages, fp8 + bf16",
        "sparse, pages, fp8",
        "dense, pages, bf16",
        "gradient, sparse",
        "index loss, dense",
    ):
        found = [row for row in rows if row["check"].startswith(kind)]
        assert found
        assert all(0.0 <= row["error"] <= row["tolerance"] for row in found)
    # The measure is not vacuous: rounding shows.
    assert all(row["error"] > 0 for row in rows if row["check"].endswith("bf16") and "selection" not in row["check"])
    assert "0 failed" in table(capsys)


def wrong_selection(index_q, index_k, plan, scale, scores):
    blocks, values = dispatch.BACKENDS["torch"].select_blocks(index_q, index_k, plan, scale, scores)
    return blocks.flip(1), values


def wrong_attention(*args):
    out, lse = dispatch.BACKENDS["torch"].sparse_attention(*args)
    return out * 1.02, lse


def no_kernel(*args):
    raise RuntimeError("out of [shared] memory")


@pytest.mark.parametrize(
    ("function", "instead", "said"),
    [
        ("select_blocks", wrong_selection, "differ none FAILED"),
        ("sparse_attention", wrong_attention, "2.0e-02 1e-05 FAILED"),
        ("dense_attention", no_kernel, "FAILED RuntimeError: out of [shared] memory"),
    ],
)
def test_a_backend_that_is_wrong_fails_and_the_others_run_on(fewer, monkeypatch, capsys, function, instead, said):
    broken = replace(dispatch.BACKENDS["torch"], **{function: instead})
    monkeypatch.setitem(dispatch.BACKENDS, "broken", broken)
    monkeypatch.setattr(selftest, "BACKENDS", ("torch", "broken"))
    monkeypatch.setenv("COLUMNS", "200")
    assert selftest.main(["--device", "cpu"]) == 1
    text = table(capsys)
    assert said in text
    assert "torch dense, packed, fp32" in text
    assert "broken index loss, dense, fp32" in text


def test_what_cannot_run_here_says_why_and_is_no_failure(fewer, monkeypatch, capsys):
    def nowhere(queries, keys, plan, values):
        return "needs a GPU"

    def not_half(queries, keys, plan, values):
        return "no half precision" if queries.dtype == torch.bfloat16 else None

    monkeypatch.setitem(dispatch.BACKENDS, "absent", replace(dispatch.BACKENDS["torch"], refusal=nowhere))
    some = replace(dispatch.BACKENDS["torch"], refusal=not_half, index_loss=None)
    monkeypatch.setitem(dispatch.BACKENDS, "some", some)
    monkeypatch.setattr(selftest, "BACKENDS", (*BACKENDS, "absent", "some"))
    monkeypatch.setenv("COLUMNS", "200")
    assert selftest.main(["--device", "cpu"]) == 0
    text = table(capsys)
    assert "absent all cannot run here: needs a GPU" in text
    assert "cannot run here: no half precision" in text
    assert "cannot run here: it has no index_loss" in text


def test_a_device_that_is_not_there_is_a_usage_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        selftest.main(["--device", "cuda"])
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
