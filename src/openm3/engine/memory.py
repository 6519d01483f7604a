"""How many tokens of cache a machine can spare: bytes a token, and what is free where the model lies."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from openm3.config import M3Config
from openm3.engine.request import RequestError

CONTEXTS = 4  # a default cache holds at most this many sequences of full length
CPU_SHARE, GPU_SHARE = 0.25, 0.8  # of the free memory, at most this


def cache_bytes_per_token(config: M3Config, dtype: torch.dtype) -> int:
    """Keys and values of every layer, index keys of the sparse ones."""
    text = config.text
    values = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
    return (values + text.sparse.index_dim * sum(text.sparse_layers)) * dtype.itemsize


def cache_pages(config: M3Config, device: torch.device, dtype: torch.dtype, cache_tokens: int | None = None) -> int:
    """Pages that hold `cache_tokens`, or by default as many as memory allows, up to CONTEXTS full contexts.

    RequestError where not even one page is possible.
    """
    page = config.text.sparse.block_size
    if cache_tokens is None:
        share = GPU_SHARE if device.type == "cuda" else CPU_SHARE
        affordable = int(free_memory(device) * share) // cache_bytes_per_token(config, dtype)
        cache_tokens = min(affordable // page * page, CONTEXTS * config.text.max_position_embeddings)
    if cache_tokens < 1:
        raise RequestError(
            f"cache_tokens = {cache_tokens}: the cache needs room for at least one page of {page} tokens"
        )
    return -(-cache_tokens // page)


def free_memory(device: torch.device) -> int:
    """Bytes free on the device now; on a CPU what can be had without swapping, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of what there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return max(0, min(free, limit - used))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return free
