"""Samples packed into flat runs of tokens, and an ordered loader over worker processes.

A source is any object with `batch(index) -> Batch`, a pure function of its own seed and the index; so the position in
the data is one number, resuming is starting at it, and workers need no shared state. Batches cross processes as plain
bytes (no shared memory, which containers keep small).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DEVICE_FIELDS = ("labels", "pixel_values", "pixel_values_videos")
NO_LOSS = -100  # the label of a position without a target


class DataError(ValueError):
    """Samples that cannot be packed, or a batch larger than the run allows; the message names the sizes."""


class Media(NamedTuple):
    """One image or one video: `rows` uint8 [n, patch values] as `processing.images.patch_rows` makes them, and its
    `grid_thw` int64 [g, 3] (one line for an image, one for each segment of a video)."""

    rows: Tensor
    grid_thw: Tensor


@dataclass(frozen=True)
class Sample:
    """One conversation or document. `loss_mask[i]`: token i is to be learned, from the ones before."""

    input_ids: Sequence[int]
    loss_mask: Sequence[bool]
    images: Sequence[Media] = ()
    videos: Sequence[Media] = ()

    def __post_init__(self) -> None:
        n = len(self.input_ids)
        if n == 0 or len(self.loss_mask) != n:
            raise DataError(
                f"a sample of {n} tokens with a loss mask of {len(self.loss_mask)}: must be equal and not 0"
            )
        for rows, grid in itertools.chain(self.images, self.videos):
            expected = int(grid.prod(-1).sum())
            if rows.dtype != torch.uint8 or rows.shape[0] != expected:
                raise DataError(f"media rows {list(rows.shape)} of {rows.dtype}: the grid {grid.tolist()} "
                                f"needs {expected} rows of uint8")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Batch:
    """A flat run of T tokens, several samples one after the other; the names are those of `M3.forward`.

    `labels[i]` is the target predicted at position i (already shifted; NO_LOSS where there is none). `input_ids`,
    `cu_seqlens` and the grids always stay on the host, where the model checks them and makes its plan without waiting
    for the device. `loss_positions`, those with a target, stays there too; it is filled in.
    """

    input_ids: Tensor  # int64 [T]
    labels: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [B+1]
    pixel_values: Tensor | None = None  # uint8 [rows, patch values]
    image_grid_thw: Tensor | None = None  # int64 [n, 3]
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    loss_positions: Tensor | None = None  # int64 [targets]

    def __post_init__(self) -> None:
        if self.loss_positions is None:
            object.__setattr__(self, "loss_positions", (self.labels != NO_LOSS).nonzero().squeeze(-1))

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def targets(self) -> int:
        """How many positions have a target."""
        return self.loss_positions.numel()

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with labels and pixels on `device`; the copy overlaps with compute if the batch is pinned."""
        if torch.device(device).type == "cpu":
            return self
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking), DEVICE_FIELDS)

    def pin_memory(self) -> Batch:
        return self._mapped(Tensor.pin_memory, ("input_ids", "loss_positions", *DEVICE_FIELDS))

    def _mapped(self, function, names: tuple[str, ...]) -> Batch:
        values = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **{n: function(v) for n, v in values.items() if v is not None})

    def __reduce__(self):
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return _batch_of_arrays, tuple(None if v is None else v.numpy() for v in values)


def _batch_of_arrays(*arrays) -> Batch:
    return Batch(*(None if a is None else torch.from_numpy(a) for a in arrays))


class Source(Protocol):
    def batch(self, index: int) -> Batch: ...


def pack(samples: Iterable[Sample], max_tokens: int) -> Batch:
    """One batch of all the samples, in order. Raises DataError if there are none, or more than `max_tokens` in all.

    No target crosses samples: the last token of each has none.
    """
    ids, labels, lengths, images, videos = [], [], [], [], []
    for sample in samples:
        tokens = torch.as_tensor(sample.input_ids, dtype=torch.int64)
        learned = torch.as_tensor(sample.loss_mask, dtype=torch.bool)[1:]
        ids.append(tokens)
        labels.append(torch.cat([tokens[1:].masked_fill(~learned, NO_LOSS), tokens.new_tensor([NO_LOSS])]))
        lengths.append(len(tokens))
        images += sample.images
        videos += sample.videos
        if sum(lengths) > max_tokens:
            raise DataError(f"samples of {lengths} tokens: more than max_tokens = {max_tokens}; use `take` to choose")
    if not ids:
        raise DataError("no samples to pack")
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Batch(torch.cat(ids), torch.cat(labels), cu_seqlens, *_joined(images), *_joined(videos))


def _joined(media: list[Media]) -> tuple[Tensor | None, Tensor | None]:
    if not media:
        return None, None
    rows, grids = zip(*media)
    return torch.cat(rows), torch.cat(grids)


def take(samples: Iterator[Sample], max_tokens: int) -> list[Sample]:
    """Samples from an endless iterator until the next one would not fit into `max_tokens`; that one is dropped.

    Raises DataError if the very first does not fit.
    """
    chosen, total = [], 0
    for sample in samples:
        total += len(sample.input_ids)
        if total > max_tokens:
            break
        chosen.append(sample)
    if not chosen:
        raise DataError(f"a sample of {total} tokens: longer than max_tokens = {max_tokens}")
    return chosen


class BatchLoader:
    """Iterates `source.batch(start), source.batch(start + 1), ...`, made ahead by `workers` processes, always in order.

    workers: 0 makes each batch in this process when asked. Otherwise the source is pickled to spawned processes (the
    caller's script needs the usual `if __name__ == "__main__"` guard), each with one torch thread and `prefetch`
    batches ahead. What a worker raises is raised here with its traceback; one that dies is a RuntimeError. pin: batches
    arrive in pinned memory (CUDA only), copied by a thread. Close it, or use it in a `with`.
    """

    def __init__(self, source: Source, start: int = 0, workers: int = 0, prefetch: int = 2, *, pin: bool = False):
        if workers == 0:
            pinned = Batch.pin_memory if pin else (lambda batch: batch)
            self._batches = (pinned(source.batch(index)) for index in itertools.count(start))
            return
        loader = torch.utils.data.DataLoader(
            _Indexed(source),
            sampler=itertools.count(start),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            multiprocessing_context="spawn",
            pin_memory=pin,
            worker_init_fn=partial(_start_worker, os.getpid()),
            generator=torch.Generator(),  # else it would draw from the global one, and a resumed run would differ
        )
        with _ignored(signal.SIGINT):  # inherited: a Ctrl-C during their start is the parent's to handle, too
            self._batches = iter(loader)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the workers. (Letting go of the iterator would, too, but a traceback may still hold it.)"""
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        self._batches = iter(())

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Indexed(torch.utils.data.Dataset):
    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, index: int) -> Batch:
        return self.source.batch(index)


def _start_worker(parent: int, _: int) -> None:
    # Leaves before C++ destructors run: in some builds of PyTorch they abort, which the parent takes for a crash.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C goes to a whole process group: the parent saves its state, then ends its workers itself

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # a queue nobody reads any more would keep a plain exit waiting

    threading.Thread(target=leave_with_parent, daemon=True).start()


@contextlib.contextmanager
def _ignored(number: signal.Signals):
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
