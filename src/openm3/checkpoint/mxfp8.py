"""MXFP8 weights: float8_e4m3fn values, one power-of-two scale (uint8 E8M0, 2^(byte - 127)) for 32 inputs of a row.

A quantized `X.weight` stands beside `X.weight_scale_inv` (the released MXFP8 checkpoint's layout; the format is OCP's
Microscaling Formats v1.0). Both directions work in pieces, so that no float32 copy of a large weight ever exists.

The scale is the smallest power of two under which the block's largest magnitude is at most 448, e4m3's largest value.
The OCP text suggests 2^(floor(log2 amax) - 8), which cuts magnitudes of 1.75 to 2 times a power of two down to 448.
Measured on 4 M values, relative RMS error and the worst error over its block's amax: normal 2.65 % and 5.9 % here,
2.93 % and 12.5 % with the floor; Student t (3 degrees) 2.66 % against 3.38 %. Choosing the better of the two for each
block gains nothing more (equal to four digits): one binade less at the bottom costs less than any saturation.
"""

from __future__ import annotations

from typing import Any

import torch

from openm3.checkpoint.names import BLOCK, SCALE_SUFFIX, CheckpointError, disk_entries
from openm3.config import M3Config

LARGEST = 448.0  # of float8_e4m3fn
PIECE = 1 << 20  # values handled at a time
KEPT = ("vision_tower", "multi_modal_projector", "patch_merge_mlp", "language_model.lm_head")
SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu)


def check_quantization(config: dict[str, Any] | None) -> None:
    """Refuses a `quantization_config` of any other format than the released MXFP8 checkpoint's."""
    if config is None:
        return
    method, block = config.get("quant_method"), config.get("weight_block_size", [1, BLOCK])
    if method != "mxfp8" or list(block or ()) != [1, BLOCK]:
        raise CheckpointError(
            f"quantization_config has quant_method = {method!r}, weight_block_size = {block!r}: only unquantized "
            f"checkpoints and 'mxfp8' with blocks [1, {BLOCK}] are read; load the model's bf16 or MXFP8 checkpoint"
        )


def quantization_config(config: M3Config) -> dict[str, Any]:
    """The `quantization_config` of an MXFP8 checkpoint; `ignored_layers` has every matrix that stays as it is."""
    kept = [e.disk_name.removesuffix(".weight") for e in disk_entries(config)
            if not e.quantized and len(e.disk_shape) > 1]  # fmt: skip
    return {
        "quant_method": "mxfp8",
        "weight_block_size": [1, BLOCK],
        "activation_scheme": "dynamic",
        "ignored_layers": [*KEPT, *(name for name in kept if name not in KEPT)],
    }


def scale_name(weight_name: str) -> str:
    return weight_name + SCALE_SUFFIX


def scale_shape(weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """One scale for each 32 inputs of a row; a row's last block may be shorter."""
    return (*weight_shape[:-1], -(-weight_shape[-1] // BLOCK))


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A floating weight [rows, n] as float8_e4m3fn [rows, n] and uint8 scales [rows, ceil(n / 32)].

    Rounds to nearest even. Raises CheckpointError for a weight with infinities or NaNs.
    """
    rows, n = weight.shape
    values = torch.empty(rows, n, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(scale_shape((rows, n)), dtype=torch.uint8, device=weight.device)
    for piece in _pieces(rows, n):
        blocks = _blocks(weight[piece].float())  # [r, blocks, 32]
        amax = blocks.abs().amax(-1)
        if not bool(amax.isfinite().all()):
            raise CheckpointError("a weight holds infinities or NaNs: it cannot be quantized")
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1); 448 = 0.875 * 2^9
        exponent = (exponent - 8 - (mantissa <= LARGEST / 512).int()).clamp(-127, 127)
        scaled = (blocks / _power(exponent)[..., None]).clamp(-LARGEST, LARGEST)
        values[piece] = scaled.flatten(1)[:, :n].to(torch.float8_e4m3fn)
        scales[piece] = (exponent + 127).to(torch.uint8)
    return values, scales


def dequantize(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Writes values [rows, n] times their blocks' scales [rows, ceil(n / 32)] into `out` [rows, n] of any float dtype.

    Exact in float32 and bfloat16 wherever the product is a normal number. Raises CheckpointError for a NaN scale (255).
    """
    rows, n = values.shape
    scales = scales.view(torch.uint8)
    if bool((scales == 255).any()):
        raise CheckpointError("a block's scale is 255, which E8M0 reserves for NaN: the checkpoint is damaged")
    for piece in _pieces(rows, n):
        blocks = _blocks(values[piece].to(out.device).float())
        power = _power(scales[piece].to(out.device).int() - 127)
        out[piece].copy_((blocks * power[..., None]).flatten(1)[:, :n])


def _pieces(rows: int, n: int) -> list[slice]:
    step = max(1, PIECE // n)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[rows, n] -> [rows, ceil(n / 32), 32], zeros after a row's end."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, exact from 2^-127 (a subnormal) to 2^127."""
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu).float()
