"""Writes a checkpoint directory so that a crash at any point leaves the old one readable.

Everything goes into a sibling directory first, is flushed to disk, and then takes the old directory's place in one
system call (Linux's renameat2 with RENAME_EXCHANGE; elsewhere two renames, the old directory being found under its
second name by `resolve` should the machine stop between them). Tensors are written one at a time, straight from the
model's parameters: safetensors' own writer would hold a whole shard in its new dtype, this holds one tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from openm3.checkpoint.hub import backup_of
from openm3.checkpoint.load import INDEX, SINGLE
from openm3.checkpoint.mxfp8 import quantization_config, quantize, scale_name, scale_shape
from openm3.checkpoint.names import CheckpointError, Entry, disk_entries

if TYPE_CHECKING:
    from openm3.model import M3

OURS = re.compile(r"config\.json|model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors")
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}  # fmt: skip


def save_model(
    model: M3,
    directory: str | Path,
    *,
    quantization: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra_files_from: str | Path | None = None,
) -> None:
    """Writes `model` as a Hugging Face directory: config.json and safetensors shards of at most `max_shard_bytes`.

    `dtype` None: each tensor as it is in the model; the router's bias stays float32. `quantization` "mxfp8" writes the
    text model's projections and experts in 8 bits, save those whose rows are no multiple of 32. Other files already in
    `directory` (tokenizer, template) stay, and those of `extra_files_from` are copied in. The directory changes from
    old to new in one step. A tensor larger than a shard gets one of its own. Raises CheckpointError, with the old
    directory untouched.
    """
    if quantization not in (None, "mxfp8"):
        raise CheckpointError(f"quantization = {quantization!r}: must be None or 'mxfp8'")
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes = {max_shard_bytes!r}: must be positive")
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; name a directory to save into")
    if Path.cwd().is_relative_to(directory):
        raise CheckpointError(f"{directory}: is the current directory or above it; save into another one")
    tensors = _plan(model, quantization, dtype)
    staging = directory.with_name(f".{directory.name}.saving")
    try:
        with _staged(staging, directory):
            _carry_over(staging, directory, extra_files_from)
            _write_config(model, staging, quantization, tensors)
            _write_shards(tensors, staging, max_shard_bytes)
            _sync_tree(staging)
    except OSError as error:
        raise CheckpointError(f"{directory}: not saved, nothing changed: {error}") from error


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor of the table with the model's own values, and what it becomes on disk: (name, dtype, shape) each."""

    entry: Entry
    own: torch.Tensor
    pieces: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @property
    def nbytes(self) -> int:
        return sum(piece_bytes(dtype, shape) for _, dtype, shape in self.pieces)

    def tensors(self) -> Iterator[torch.Tensor]:
        values = self.entry.view(self.own)
        if len(self.pieces) == 1:
            yield values.to(self.pieces[0][1])
        else:
            try:
                yield from quantize(values)
            except CheckpointError as error:
                raise CheckpointError(f"{self.entry.disk_name}: {error}") from None


def piece_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def _plan(model: M3, quantization: str | None, dtype: torch.dtype | None) -> list[Source]:
    own = {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers())}
    sources = []
    for entry in disk_entries(model.config):
        tensor = own[entry.own_name]
        kind = torch.float32 if entry.float32 else dtype or tensor.dtype
        if kind not in DTYPE_NAMES or not kind.is_floating_point:
            raise CheckpointError(f"dtype = {kind}: must be float32, bfloat16 or float16")
        pieces = [(entry.disk_name, kind, entry.disk_shape)]
        if quantization and entry.quantized:
            pieces = [(entry.disk_name, torch.float8_e4m3fn, entry.disk_shape),
                      (scale_name(entry.disk_name), torch.uint8, scale_shape(entry.disk_shape))]  # fmt: skip
        sources.append(Source(entry, tensor, tuple(pieces)))
    return sources


def _write_config(model: M3, staging: Path, quantization: str | None, sources: list[Source]) -> None:
    kind = str(sources[0].pieces[0][1]).removeprefix("torch.")  # the embeddings, which are never quantized
    quantized = quantization_config(model.config) if quantization else None
    dataclasses.replace(model.config, dtype=kind, quantization=quantized).save_pretrained(staging)


def _write_shards(sources: list[Source], staging: Path, max_shard_bytes: int) -> None:
    shards: list[list[Source]] = [[]]
    used = 0
    for source in sources:
        if shards[-1] and used + source.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(source)
        used += source.nbytes
    if len(shards) == 1:
        return _write_file(shards[0], staging / SINGLE)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_file(shard, staging / name)
        weight_map |= {piece: name for source in shard for piece, _, _ in source.pieces}
    index = {"metadata": {"total_size": sum(s.nbytes for s in sources)}, "weight_map": weight_map}
    (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(sources: list[Source], path: Path) -> None:
    """The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes without gaps.

    Wide dtypes come first, so that every tensor begins at a multiple of its item's size.
    """
    sources = sorted(sources, key=lambda source: -source.pieces[0][1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in (piece for source in sources for piece in source.pieces):
        end = offset + piece_bytes(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            for tensor in source.tensors():
                _write_tensor(tensor, file)


def _write_tensor(tensor: torch.Tensor, file: BinaryIO) -> None:
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    file.write(memoryview(flat.numpy()))


@contextlib.contextmanager
def _staged(staging: Path, directory: Path) -> Iterator[None]:
    """Gives a fresh `staging` directory to fill, which then takes `directory`'s place; removed if anything fails."""
    backup = backup_of(directory)
    if backup.is_dir() and not directory.exists():
        backup.rename(directory)  # an earlier save was cut off between its two renames
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left_over in (staging, backup):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.mkdir()
    try:
        yield
        _swap(staging, directory, backup)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(backup, ignore_errors=True)


def _swap(staging: Path, directory: Path, backup: Path) -> None:
    if not directory.exists():
        staging.rename(directory)
    elif not _exchange(staging, directory):
        directory.rename(backup)
        try:
            staging.rename(directory)
        except OSError:
            backup.rename(directory)
            raise
    _sync(directory.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step; False where the system cannot (not Linux, some network file systems)."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def _carry_over(staging: Path, directory: Path, extra_files_from: str | Path | None) -> None:
    """The files beside the weights: those `directory` has already, and over them those of `extra_files_from`."""
    if directory.is_dir():
        shutil.copystat(directory, staging)
        for path in directory.iterdir():
            if not OURS.fullmatch(path.name):
                _link(path, staging / path.name)
    if extra_files_from is None:
        return
    extra = Path(extra_files_from)
    if not extra.is_dir():
        raise CheckpointError(f"extra_files_from = {str(extra)!r}: no such directory")
    for path in extra.iterdir():
        if path.is_file() and not OURS.fullmatch(path.name) and path.suffix != ".safetensors":
            (staging / path.name).unlink(missing_ok=True)  # a link to the old directory's file, which stays as it is
            shutil.copy2(path, staging / path.name)


def _link(path: Path, to: Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, to, symlinks=True, copy_function=_link_file)
    else:
        _link_file(path, to)


def _link_file(path: str | Path, to: str | Path) -> None:
    try:
        os.link(path, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, to, follow_symlinks=False)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if OURS.fullmatch(path.name) or (path.is_file() and not path.is_symlink()):
            _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """Flushes a file or a directory's entries to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
