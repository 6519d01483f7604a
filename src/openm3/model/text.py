"""The decoder: pre-norm layers over a packed run of tokens."""

from __future__ import annotations

from torch import Tensor, nn

from openm3.config import TextConfig
from openm3.model.attention import Attention, Step
from openm3.model.cache import LayerCache
from openm3.model.layers import MLP, RMSNorm
from openm3.model.moe import MoE


class DecoderLayer(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)), each of the two dense or sparse as the config says."""

    def __init__(self, config: TextConfig, index: int, **factory):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.attn = Attention(config, config.sparse_layers[index], **factory)
        self.mlp: MoE | MLP
        if config.moe_layers[index]:
            self.mlp = MoE(config, **factory)
        else:
            sizes = (config.hidden_size, config.dense_intermediate_size)
            self.mlp = MLP(*sizes, config.swiglu_alpha, config.swiglu_limit, **factory)

    def forward(
        self, x: Tensor, step: Step, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """[T, H] -> [T, H], the index loss, and the router's (load, balance loss)."""
        attended, index_loss = self.attn(self.attn_norm(x), step, cache)
        x = x + attended
        if isinstance(self.mlp, MLP):
            return x + self.mlp(self.mlp_norm(x)), index_loss, None
        out, load, aux = self.mlp(self.mlp_norm(x))
        return x + out, index_loss, (load, aux)
