"""The state a run resumes from: weights, optimizer, random states, position. Tensors as safetensors, the rest as JSON.

`save_state` writes a whole new directory beside the old one and then swaps them, so a crash at any moment leaves a
complete state. Parameters are stored under the model's own names: this is not a checkpoint, see `openm3.save_model`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1


class StateError(ValueError):
    """A saved state that cannot be read, or is another model's; the message names the file and the reason."""


def save_state(
    directory: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], facts: dict[str, Any]
) -> None:
    """Replaces the state in `directory`, atomically. facts: what else to keep, as JSON."""
    new, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, new / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizers), new / "optimizer.safetensors")
    content = {"format": FORMAT, "random": _random_states(), **facts}
    (new / "state.json").write_text(json.dumps(content) + "\n")
    for path in [*new.iterdir(), new]:
        _sync(path)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_facts(directory: Path) -> dict[str, Any] | None:
    """What `save_state` was given, or None if there is no state."""
    found = _existing(directory)
    if found is None:
        return None
    try:
        content = json.loads((found / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise StateError(f"{found / 'state.json'}: not readable ({error}); remove {found} to start over") from None
    if content.get("format") != FORMAT:
        raise StateError(f"{found}: state of format {content.get('format')!r}, must be {FORMAT}")
    return content


def load_state(directory: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Puts a saved state back into model, optimizers and the random generators; returns the facts."""
    facts, found = read_facts(directory), _existing(directory)
    if facts is None:
        raise StateError(f"{directory}: no saved state")
    try:
        weights, tensors = (load_file(found / f"{name}.safetensors") for name in ("model", "optimizer"))
    except (OSError, SafetensorError) as error:
        raise StateError(f"{found}: not readable ({error}); remove it to start over") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise StateError(f"{found}: the state of another model ({error})") from None
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = names[parameter] + "/"
                saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in saved.items()}
    _restore_random_states(facts["random"])
    return facts


def _existing(directory: Path) -> Path | None:
    old = directory.with_name(directory.name + ".old")  # a crash between the two renames leaves only this one
    return next((path for path in (directory, old) if path.is_dir()), None)


def _optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.contiguous()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  the global generator is state, too
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": [bytes(state.tolist()).hex() for state in torch.cuda.get_rng_state_all()],
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_bytes(states["torch"]))
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes(state), device)


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
