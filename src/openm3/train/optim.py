"""AdamW, and Muon for the hidden matrices, stacked experts included; who gets which is decided by name.

Muon here instead of torch.optim.Muon, which takes 2-D parameters only and one matrix at a time: the experts are stacks
[E, out, in], and a small model has hundreds of equal matrices that a few batched products serve. Fused projections are
treated as their parts (q, k, v; gate, up): each part is a map of its own, fused only for the speed of the product, and
so the update does not depend on how they are stored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from openm3.train.schedule import TrainConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: https://kellerjordan.github.io/posts/muon/
HIDDEN_MATRIX = re.compile(
    r"layers\.\d+\.attn\.(qkv_proj|o_proj)\.weight"
    r"|layers\.\d+\.mlp\.(shared\.)?(gate_up_proj|down_proj)\.weight"
    r"|layers\.\d+\.mlp\.experts\.(gate_up|down)"
    r"|vision\.layers\.\d+\.(attn\.(qkv|out)|mlp\.fc[12])\.weight"
    r"|projector\.(linear|merge)_[12]\.weight"
)


def is_index(name: str) -> bool:
    """Whether the parameter belongs to MSA's index branch, which learns from the index loss and nothing else."""
    return ".attn.index_" in name


def group_of(name: str, parameter: Tensor) -> str:
    """`muon` for hidden matrices, `plain` for norms and biases (no weight decay), `decay` for the other matrices:
    embeddings and head, router, index projections, patch embedding."""
    if HIDDEN_MATRIX.fullmatch(name):
        return "muon"
    return "decay" if parameter.dim() > 1 else "plain"


def parts_of(name: str, parameter: Tensor, config) -> list[int]:
    """Rows (of the axis before last) of each map that the matrix `name` of an M3 with `config` is fused from."""
    rows = parameter.shape[-2]
    text = config.text
    if name.endswith("attn.qkv_proj.weight"):
        kv = text.num_key_value_heads * text.head_dim
        return [text.num_attention_heads * text.head_dim, kv, kv]
    if name.endswith("attn.qkv.weight"):
        return [rows // 3] * 3
    if name.endswith(("gate_up_proj.weight", "experts.gate_up")):
        return [rows // 2] * 2
    return [rows]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; every trained parameter of `model` is in exactly one group of one of them."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name, parameter)].append((name, parameter))
    if config.optimizer == "adamw":
        groups["decay"] += groups.pop("muon", [])
    optimizers: list[torch.optim.Optimizer] = []
    if muon := groups.pop("muon", None):
        parts = [parts_of(name, parameter, model.config) for name, parameter in muon]
        parameters = [parameter for _, parameter in muon]
        optimizers.append(Muon(parameters, parts, config.lr, config.momentum, config.weight_decay))
    decays = {"decay": config.weight_decay, "plain": 0.0}
    adamw = [{"params": [p for _, p in named], "weight_decay": decays[kind]} for kind, named in groups.items() if named]
    optimizers.append(torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas, fused=True))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: every matrix of the update gets singular values near 1, times 0.2 * sqrt(max(out, in)),
    so that its root mean square is AdamW's and one learning rate serves both (arXiv 2502.16982, section 2.2).

    parameters: [..., out, in]. parts: for each the rows of its independent matrices (see `parts_of`). Nesterov
    momentum, decoupled weight decay. The products run in bfloat16 on a GPU, in float32 on a CPU.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        parts: list[list[int]],
        lr: float,
        momentum: float,
        weight_decay: float,
    ):
        parameters = list(parameters)
        for parameter, rows in zip(parameters, parts):
            if parameter.dim() < 2 or sum(rows) != parameter.shape[-2]:
                raise ValueError(f"Muon: a parameter of shape {list(parameter.shape)} in parts of {rows} rows")
        super().__init__([{"params": parameters}], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.parts = dict(zip(parameters, parts))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        moments = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, moments, momentum)  # Nesterov: the step momentum is about to take
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, update in zip(parameters, updates):
            rows = self.parts[parameter]
            for target, part in zip(parameter.split(rows, dim=-2), update.split(rows, dim=-2)):
                alike[part.shape[-2:]].append((target, part.reshape(-1, *part.shape[-2:])))
        for shape, pairs in alike.items():
            matrices = orthogonalize(torch.cat([part for _, part in pairs]))  # [n, out, in]
            steps = matrices.to(pairs[0][0].dtype).split([part.shape[0] for _, part in pairs])
            targets = [target for target, _ in pairs]
            shaped = [step.view(target.shape) for step, target in zip(steps, targets)]
            torch._foreach_add_(targets, shaped, alpha=-lr * 0.2 * max(shape) ** 0.5)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T of each matrix [n, out, in] nearly: its singular values brought to about 1 by Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)  # no singular value over 1
    x = x.bfloat16() if x.is_cuda else x.float()
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor | None:
    """Scales the gradients together to a norm of at most `largest`; returns their norm before, still on the device.

    None if there is no gradient at all.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
