"""Packing and the loader: targets, order, workers and what happens when they fail."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BrokenSource, CopySource

from openm3.train.data import NO_LOSS, Batch, BatchLoader, DataError, Media, Sample, pack, take

HERE = Path(__file__).parent
masked_tokens = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=20)


def sample(pairs) -> Sample:
    ids, mask = zip(*pairs)
    return Sample(list(ids), list(mask))


def image(t, h, w, value=0) -> Media:
    return Media(torch.full((t * h * w, 1176), value, dtype=torch.uint8), torch.tensor([[t, h, w]]))


@given(st.lists(masked_tokens, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_every_learned_token_is_the_target_of_the_position_before_it_in_the_same_sample(documents):
    batch = pack([sample(document) for document in documents], 1000)
    expected, ids = [], []
    for document in documents:
        for (_, _), (token, learned) in itertools.pairwise(document):
            expected.append(token if learned else NO_LOSS)
        expected.append(NO_LOSS)
        ids += [token for token, _ in document]
    assert batch.input_ids.tolist() == ids
    assert batch.labels.tolist() == expected
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(len(d) for d in documents)]
    assert batch.loss_positions.tolist() == [i for i, target in enumerate(expected) if target != NO_LOSS]
    assert (batch.tokens, batch.targets) == (len(ids), sum(target != NO_LOSS for target in expected))


@given(st.lists(masked_tokens, min_size=1, max_size=6), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_take_fills_up_to_the_limit_and_never_over_it(documents, limit):
    samples = [sample(document) for document in documents]
    lengths = [len(s.input_ids) for s in samples]
    if lengths[0] > limit:
        with pytest.raises(DataError, match="longer than"):
            take(iter(samples), limit)
        return
    chosen = take(iter(samples), limit)
    assert chosen == samples[: len(chosen)]
    assert pack(chosen, limit).tokens <= limit
    assert len(chosen) == len(samples) or sum(lengths[: len(chosen) + 1]) > limit


def test_media_keep_the_order_of_the_samples():
    first = Sample([1, 2], [False, True], images=[image(1, 2, 2, 7), image(1, 2, 4, 8)], videos=[image(2, 2, 2, 9)])
    batch = pack([first, Sample([3], [False]), Sample([4], [False], images=[image(1, 4, 2, 5)])], 10)
    assert batch.image_grid_thw.tolist() == [[1, 2, 2], [1, 2, 4], [1, 4, 2]]
    assert batch.pixel_values[:, 0].tolist() == [7] * 4 + [8] * 8 + [5] * 8
    assert batch.pixel_values_videos.shape == (8, 1176)
    assert batch.video_grid_thw.tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample([], []), "0 tokens"),
        (lambda: Sample([1, 2], [True]), "loss mask of 1"),
        (
            lambda: Sample([1], [True], images=[Media(image(1, 2, 2).rows[:3], torch.tensor([[1, 2, 2]]))]),
            "needs 4 rows",
        ),
        (lambda: pack([], 10), "no samples"),
        (
            lambda: pack(itertools.repeat(Sample([1] * 6, [True] * 6)), 10),
            r"\[6, 6\] tokens: more than max_tokens = 10",
        ),
    ],
)
def test_bad_samples_are_named(make, message):
    with pytest.raises(DataError, match=message):
        make()


def same(a: Batch, b: Batch) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def test_a_batch_survives_pickling():
    batch = pack([Sample([1, 2], [False, True], images=[image(1, 2, 2, 7)])], 10)
    assert same(pickle.loads(pickle.dumps(batch)), batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_source_s_batches_in_order_from_any_start(workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    source = CopySource(seed=3)
    with BatchLoader(source, start=5, workers=workers) as loader:
        for index in range(5, 12):
            assert same(next(loader), source.batch(index))
    assert torch.equal(torch.get_rng_state(), before)  # a run's random state must not depend on the loader


def test_an_error_in_a_worker_arrives_with_its_traceback_after_the_batches_before_it():
    with BatchLoader(BrokenSource(bad=3), workers=2) as loader:
        for _ in range(3):
            next(loader)
        with pytest.raises(KeyError, match=r"(?s)Traceback.*in batch.*the well is dry"):
            next(loader)


def test_the_death_of_a_worker_is_an_error():
    with BatchLoader(BrokenSource(bad=1, die=True), workers=1) as loader:
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            list(itertools.islice(loader, 3))


def wait_for(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


READER = """
import sys
from tiny import CopySource
from openm3.train.data import BatchLoader
if __name__ == "__main__":
    with BatchLoader(CopySource(samples=18), workers=2, prefetch=200) as loader:
        next(loader), next(loader)  # both workers are up
        try:
            print("ready", flush=True)  # inside: Ctrl-C comes as soon as this line is read
            while True:
                pass
        except KeyboardInterrupt:
            next(loader)
            print("stopped", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals to process groups")
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_no_worker_outlives_the_reader(how, tmp_path):
    script = tmp_path / "reader.py"
    script.write_text(READER)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    reader = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    assert reader.stdout.readline() == "ready\n", reader.stderr.read()
    children = psutil.Process(reader.pid).children(recursive=True)
    assert len(children) >= 2
    if how == "ctrl-c":
        os.killpg(reader.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        assert reader.stdout.readline() == "stopped\n", reader.stderr.read()
        assert reader.wait(30) == 0
        # A semaphore that was being given back may be named by Python's own tracker; nothing else says anything.
        said = reader.stderr.read().splitlines()
        assert [x for x in said if "resource_tracker" not in x and not x.startswith("  warnings.warn(")] == []
    else:
        reader.kill()
        reader.wait()
    assert wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
