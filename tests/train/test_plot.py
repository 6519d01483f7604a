"""The picture of a run, and the record it is drawn from."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openm3.train.metrics import MetricsLog, read_metrics
from openm3.train.plot import PlotError, plot_run, smoothed


def row(step: int, **values) -> dict:
    return dict(step=step, stage="warmup" if step < 20 else "train", lr=1e-3, loss=3 / step) | values


def write(run_dir, rows):
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_several_runs_with_different_records_make_one_picture(tmp_path):
    balance = dict(router_max=1.4, router_min=0.6)
    write(
        tmp_path / "msa",
        [row(s, index_loss=1 / s, **balance) for s in range(1, 200)] + [{"step": 199, "eval": {"loss": 1}}],
    )
    write(tmp_path / "dense", [row(s) for s in range(1, 100)])
    plot_run([tmp_path / "msa", tmp_path / "dense"], tmp_path / "plots" / "runs.png")
    with Image.open(tmp_path / "plots" / "runs.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # lines and text, not an empty page


def test_runs_without_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        plot_run([tmp_path], tmp_path / "out.png")
    write(tmp_path / "new", [])
    with pytest.raises(PlotError, match="no steps"):
        plot_run([tmp_path / "new"], tmp_path / "out.png")


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_smoothing_keeps_length_ends_and_range(values, reach):
    result = smoothed(values, reach)
    assert len(result) == len(values)
    assert result[0] == pytest.approx(values[0], abs=1e-9)
    assert result[-1] == pytest.approx(values[-1], abs=1e-9)
    assert min(values) - 1e-9 <= min(result) <= max(result) <= max(values) + 1e-9


def test_a_resumed_record_drops_what_came_after_the_state_and_a_line_cut_off(tmp_path):
    write(tmp_path / "run", [row(s) for s in range(1, 9)])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, 9))
    log = MetricsLog(tmp_path / "run", 5)
    log.write([row(6)])
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
