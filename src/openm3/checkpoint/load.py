"""Fills an M3 from safetensors files, tensor by tensor: peak memory is the model plus its largest tensor.

Everything that can be wrong is found in the files' headers before any memory is taken, and comes out as one
CheckpointError: a model is returned whole or not at all. Files are memory-mapped; a mapping is dropped as soon as a few
tensors have been read through it, so that pages already copied do not count against the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from openm3.checkpoint.hub import resolve
from openm3.checkpoint.mxfp8 import check_quantization, dequantize, scale_name, scale_shape
from openm3.checkpoint.names import IGNORED, CheckpointError, Entry, disk_entries
from openm3.config import M3Config, read_json

if TYPE_CHECKING:
    from openm3.model import M3

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_DTYPES = ("F32", "BF16", "F16", "F64")
MAPPED = 64 << 20  # bytes read through mappings before they are dropped
SHOWN = 6  # names listed of each kind of problem
PROGRESS_FROM = 2 << 30  # bytes from which a terminal gets a progress bar


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says about one tensor: where it is, its safetensors dtype (`BF16`, `F8_E4M3`, ...) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_model(name_or_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> M3:
    """An M3 with the weights of a directory, a downloaded Hugging Face repo, or the bundled `openm3-nano`.

    `dtype` None: the checkpoint's own on a GPU, float32 on a CPU; the router's bias is float32 always. MXFP8 weights
    are dequantized. Raises CheckpointError, one line that names every missing, unexpected or misshaped tensor and
    every missing or damaged file; ConfigError for a config.json that describes no M3.
    """
    directory, device = resolve(name_or_dir), _device(device)
    config = M3Config.from_dict(read_json(directory / "config.json"))
    check_quantization(config.quantization)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else getattr(torch, config.dtype)
    headers, problems = _read_headers(directory)
    entries = list(disk_entries(config))
    _compare(entries, headers, problems)
    problems.raise_any(directory)
    _refuse_too_large(entries, device, dtype)
    model = _empty_model(dataclasses.replace(config, quantization=None), device, dtype)
    _fill(model, entries, headers)
    return model


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError:
        raise CheckpointError(f"device {device!r}: must be 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device '{device}': PyTorch sees no CUDA device here; use 'cpu'")
    return device


class Problems:
    """Collects what is wrong with a checkpoint, to be told in one line."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        self.found.setdefault(kind, []).append(name)

    def raise_any(self, directory: Path) -> None:
        if not self.found:
            return
        told = []
        for kind, names in self.found.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            told.append(f"{kind}: {len(names)} ({', '.join(names[:SHOWN])}{more})")
        raise CheckpointError(f"{directory}: not a whole checkpoint of this model: {'; '.join(told)}")


def _read_headers(directory: Path) -> tuple[dict[str, Header], Problems]:
    """The headers of all tensors in the files that hold the model; names in files that cannot be read are left out."""
    problems, headers, lost = Problems(), {}, set()
    weight_map = _weight_map(directory)
    for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]:
        try:
            found = _file_headers(directory / file)
        except FileNotFoundError:
            problems.add("files missing", file)
            lost.add(file)
            continue
        except (SafetensorError, OSError) as error:
            problems.add("files cut short or damaged", f"{file}: {error}")
            lost.add(file)
            continue
        for name, header in found.items():
            if name in headers:
                problems.add("tensors in two files", name)
            headers[name] = header
    for name, file in (weight_map or {}).items():
        if file in lost:
            headers[name] = Header(directory / file, "", ())  # its file has been named already
        elif name not in headers:
            problems.add("tensors that the index lists but its file does not hold", f"{name} in {file}")
    return _without_ignored(headers), problems


def _weight_map(directory: Path) -> dict[str, str] | None:
    """The index's map from tensor to file; None if the checkpoint is a single file."""
    if (directory / SINGLE).exists():
        return None
    if not (directory / INDEX).exists():
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{directory}: holds its weights as pickle files ({pickles[0]}), which can run code when read; "
                f"only safetensors are loaded: convert them, or get a safetensors copy"
            )
        raise CheckpointError(f"{directory}: holds neither {SINGLE} nor {INDEX}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX}: has no weight_map from tensor names to files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == PurePosixPath(file).name and "\\" not in file and "\0" not in file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / INDEX}: puts {name} into {file!r}: must be a .safetensors file beside the index"
            )
    return weight_map


def _file_headers(path: Path) -> dict[str, Header]:
    if not path.exists():
        raise FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        return {name: Header(path, str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}


def _without_ignored(headers: dict[str, Header]) -> dict[str, Header]:
    kept = {name: header for name, header in headers.items() if not IGNORED.search(name)}
    if len(kept) < len(headers):
        log.warning("%d multi-token-prediction tensors (mtp.) are in the checkpoint and are ignored",
                    len(headers) - len(kept))  # fmt: skip
    return kept


def _compare(entries: list[Entry], headers: dict[str, Header], problems: Problems) -> None:
    """Adds to `problems` whatever of the headers is not as the table of names has it."""
    unexpected = dict(headers)
    for entry in entries:
        header = unexpected.pop(entry.disk_name, None)
        if header is None:
            problems.add("tensors missing", entry.disk_name)
            continue
        scale = unexpected.pop(scale_name(entry.disk_name), None) if _is_fp8(header) else None
        if header.dtype == "":  # in a file that could not be read
            unexpected.pop(scale_name(entry.disk_name), None)
        elif header.shape != entry.disk_shape:
            problems.add("tensors misshaped", f"{entry.disk_name} {_x(header.shape)}, must be {_x(entry.disk_shape)}")
        elif _is_fp8(header):
            _compare_scale(entry, scale, problems)
        elif header.dtype not in WEIGHT_DTYPES:
            problems.add("tensors of a dtype that is not read", f"{entry.disk_name} {header.dtype}")
    for name in unexpected:
        problems.add("tensors unexpected", name)


def _is_fp8(header: Header) -> bool:
    return header.dtype == "F8_E4M3"


def _compare_scale(entry: Entry, scale: Header | None, problems: Problems) -> None:
    name, shape = scale_name(entry.disk_name), scale_shape(entry.disk_shape)
    if len(entry.disk_shape) != 2:
        problems.add("tensors of a dtype that is not read", f"{entry.disk_name} F8_E4M3")
    elif scale is None:
        problems.add("tensors missing", name)
    elif scale.dtype not in ("U8", "F8_E8M0", ""):
        problems.add("tensors of a dtype that is not read", f"{name} {scale.dtype}, must be U8 (E8M0)")
    elif scale.dtype and scale.shape != shape:
        problems.add("tensors misshaped", f"{name} {_x(scale.shape)}, must be {_x(shape)}")


def _x(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _refuse_too_large(entries: list[Entry], device: torch.device, dtype: torch.dtype) -> None:
    from openm3.checkpoint.info import device_bytes, gigabytes

    need, have = sum(entry.numel for entry in entries) * dtype.itemsize, device_bytes(device)
    if have is not None and need > have:
        raise CheckpointError(
            f"the weights take {gigabytes(need)} in {str(dtype).removeprefix('torch.')}, "
            f"device '{device}' has {gigabytes(have)}: see `openm3 info`"
        )


def _empty_model(config: M3Config, device: torch.device, dtype: torch.dtype) -> M3:
    from openm3.model import M3

    with _NoRandomStart():
        return M3(config, device=device, dtype=dtype)


class _NoRandomStart(TorchFunctionMode):
    """Modules made under it keep the memory they are given instead of drawing numbers that a checkpoint overwrites.

    The meta device would do as well, but its `normal_` imports the compiler: four seconds on a slow machine.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        drawn = (
            func in (torch.Tensor.normal_, torch.Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init"
        )
        return (args or (kwargs["tensor"],))[0] if drawn else func(*args, **kwargs)


@torch.no_grad()
def _fill(model: M3, entries: list[Entry], headers: dict[str, Header]) -> None:
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    position = {name: i for i, name in enumerate(headers)}  # file by file, in the order of the bytes
    read = MappedTensors(headers)
    total = sum(entry.numel for entry in entries) * 2
    with _progress(total) as advance:
        for entry in sorted(entries, key=lambda e: position[e.disk_name]):
            target = entry.view(own[entry.own_name])
            tensor = read(entry.disk_name)
            if tensor.dtype == torch.float8_e4m3fn:
                dequantize(tensor, read(scale_name(entry.disk_name)), target)
            else:
                target.copy_(tensor)
            advance(entry.numel * 2)


class MappedTensors:
    """Reads tensors by name through memory maps that are dropped after every MAPPED bytes."""

    def __init__(self, headers: dict[str, Header]) -> None:
        self.headers, self.maps, self.mapped = headers, {}, 0

    def __call__(self, name: str) -> torch.Tensor:
        file = self.headers[name].file
        if self.mapped > MAPPED:
            self.maps, self.mapped = {}, 0
        if file not in self.maps:
            self.maps[file] = safe_open(file, "pt")
        tensor = self.maps[file].get_tensor(name)
        self.mapped += tensor.nbytes
        return tensor


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], Any]]:
    """A bar on a terminal for a load that takes a while, nothing otherwise."""
    if total < PROGRESS_FROM or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = ("loading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("load", total=total)
        yield lambda done: bar.advance(task, done)
