"""What a model needs: parameters by part, active a token, bytes of weights and caches, and where that fits.

Counts come from the table of names, which has every tensor's shape, so no model is built. Bytes are decimal
(1 GB = 10^9), as cards and files are sold.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openm3.checkpoint.names import BLOCK, CheckpointError, disk_entries
from openm3.config import M3Config

if TYPE_CHECKING:
    import torch

WIDTH = {"float32": 4, "bf16": 2, "fp8": 1}  # bytes a value
USABLE = 0.9  # of a device's memory; the rest is for activations and the runtime
CARDS = (80, 141)  # GB, the H100's and the H200's, to say how many would do
PER_TOKEN = ("attention", "index", "norms", "dense MLP", "router", "shared experts")  # parts every text token passes


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A model's sizes. Counts are parameters; bytes are for one sequence of `context` tokens.

    `active`: parameters a text token passes, without embedding and head; `active_with_head` adds the head's matrix (the
    embedding's, where they are tied). `weights`, `kv`, `index_keys`: bytes by precision.
    """

    parts: dict[str, int]
    active: int
    active_with_head: int
    context: int
    weights: dict[str, int]
    kv: dict[str, int]
    index_keys: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def cache(self, precision: str) -> int:
        return self.kv[precision] + self.index_keys[precision]


@dataclasses.dataclass(frozen=True)
class Device:
    """Memory that a model could run in: `name` is the torch device, `label` for people, `total` in bytes."""

    name: str
    label: str
    total: int


def model_info(config: M3Config, *, context: int | None = None) -> ModelInfo:
    """Counts `config`'s parameters and the memory of its weights and of one sequence's caches.

    `context`: tokens, the model's longest by default. Raises CheckpointError if it is not positive or longer than that.
    """
    text, limit = config.text, config.text.max_position_embeddings
    context = limit if context is None else context
    if not 0 < context <= limit:
        raise CheckpointError(f"context = {context}: must be from 1 to the model's {limit} tokens")
    parts: dict[str, int] = {}
    mxfp8 = 0
    for entry in disk_entries(config):
        parts[entry.part] = parts.get(entry.part, 0) + entry.numel
        mxfp8 += entry.numel + entry.numel // BLOCK if entry.quantized else entry.numel * (4 if entry.float32 else 2)
    total = sum(parts.values())
    routed = parts.get("experts", 0) * text.num_experts_per_tok // text.num_local_experts
    active = routed + sum(parts.get(part, 0) for part in PER_TOKEN)
    kv = context * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim
    index = context * sum(text.sparse_layers) * text.sparse.index_dim
    return ModelInfo(
        parts=parts,
        active=active,
        active_with_head=active + parts.get("head", parts["embedding"]),
        context=context,
        weights={"float32": 4 * total, "bf16": 2 * total, "mxfp8": mxfp8},
        kv={name: kv * width for name, width in WIDTH.items()},
        index_keys={name: index * width for name, width in WIDTH.items()},
    )


def devices() -> list[Device]:
    """The machine's CUDA devices and its RAM (a container's limit where there is one)."""
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found.append(Device(f"cuda:{i}", properties.name, properties.total_memory))
    memory = _ram()
    return found if memory is None else [*found, Device("cpu", "RAM", memory)]


def device_bytes(device: torch.device) -> int | None:
    """All memory of a device in bytes, None where it cannot be told."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return _ram() if device.type == "cpu" else None


def _ram() -> int | None:
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return memory


def fits(info: ModelInfo, device: Device) -> tuple[bool, str]:
    """Whether the model runs on `device` at its context, and one line that says so.

    A GPU holds weights and caches in bf16, a CPU in float32; a tenth of the memory is left for activations.
    """
    precision = "float32" if device.name == "cpu" else "bf16"
    weights, cache, room = info.weights[precision], info.cache(precision), int(device.total * USABLE)
    where = f"{device.name} ({device.label}, {gigabytes(device.total)})"
    need = f"{gigabytes(weights)} of {precision} weights and {gigabytes(cache)} of cache"
    if weights + cache <= room:
        return True, f"fits {where}: {need}"
    tokens = max(0, room - weights) * info.context // cache
    if tokens:
        return (
            True,
            f"fits {where} with up to {tokens:,} tokens of context: {gigabytes(weights)} of {precision} weights",
        )
    return False, f"does not fit {where}: needs {need}"


def cards_needed(info: ModelInfo, precision: str, card: int) -> int:
    """GPUs of `card` GB, a power of two, that hold weights in `precision` (`bf16`, `mxfp8`) and bf16 caches."""
    need = info.weights[precision] + info.cache("bf16")
    return 2 ** max(0, math.ceil(math.log2(need / (card * 1e9 * USABLE))))


def info_dict(config: M3Config, *, context: int | None = None, found: list[Device] | None = None) -> dict[str, Any]:
    """`model_info` and the fit on this machine's devices (or on `found`) as JSON-able data."""
    info = model_info(config, context=context)
    found = devices() if found is None else found
    return dataclasses.asdict(info) | {
        "total": info.total,
        "devices": [dataclasses.asdict(d) | dict(zip(("fits", "verdict"), fits(info, d))) for d in found],
        "gpus_needed": {p: {f"{card} GB": cards_needed(info, p, card) for card in CARDS} for p in ("bf16", "mxfp8")},
    }


def info_lines(config: M3Config, *, context: int | None = None, found: list[Device] | None = None) -> list[str]:
    """The same as aligned lines of text."""
    info = model_info(config, context=context)
    found = devices() if found is None else found
    lines = [
        f"parameters       {count(info.total)}",
        f"active a token   {count(info.active)} without embedding and head, {count(info.active_with_head)} with head",
        "",
        *(f"  {part:<15}{count(n):>9}" for part, n in sorted(info.parts.items(), key=lambda item: -item[1])),
        "",
        f"memory           {'bf16':>9} {'8 bits':>9} {'float32':>9}",
        _row("weights", info.weights["bf16"], info.weights["mxfp8"], info.weights["float32"]),
        _row("keys, values", info.kv["bf16"], info.kv["fp8"], info.kv["float32"]),
        _row("index keys", info.index_keys["bf16"], info.index_keys["fp8"], info.index_keys["float32"]),
        f"  caches are for one sequence of {info.context:,} tokens; 8 bits: MXFP8 weights, fp8 caches",
        "",
    ]
    verdicts = [fits(info, device) for device in found]
    lines += [line for _, line in verdicts]
    if not any(good for good, _ in verdicts):
        bf16, mxfp8 = ([f"{cards_needed(info, p, card)} x {card} GB" for card in CARDS] for p in ("bf16", "mxfp8"))
        lines.append(f"would fit, spread over GPUs: {' or '.join(bf16)} in bf16, {' or '.join(mxfp8)} in MXFP8")
        lines.append("(this version runs on one device and widens MXFP8 weights to bf16 as it loads them)")
    return lines


def _row(name: str, *sizes: int) -> str:
    return f"  {name:<15}" + " ".join(f"{gigabytes(size):>9}" for size in sizes)


def count(n: int) -> str:
    """427040140160 -> `427.0 B`."""
    return _scaled(n, ("", " K", " M", " B", " T"))


def gigabytes(n: int) -> str:
    """854080280320 -> `854 GB`; three digits at least."""
    return _scaled(n, (" B", " KB", " MB", " GB", " TB"), places=0)


def _scaled(n: int, units: tuple[str, ...], places: int = 1) -> str:
    power = 0
    while power < len(units) - 1 and n >= 999.5 * 1000**power:
        power += 1
    value = n / 1000**power
    if power == 0:
        return f"{n}{units[0]}"
    digits = max(places, 1 if value < 100 else 0) if value >= 10 else max(places, 2)
    return f"{value:.{digits}f}{units[power]}"
