"""The other kernels a model needs beside MSA, on tensors alone: they know no model and no engine.

    q, index_q = qk_norm_rope_store(q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, eps=1e-6, ...)

It is one launch of a Triton kernel (`backend="triton"`, on a GPU) or plain PyTorch anywhere (`rms_norm` and
`apply_rope` are its parts), and under `torch.compile` a registered op, opaque to the compiler.
"""

from openm3.ops.cache_write import qk_norm_rope_store
from openm3.ops.norm_rope import apply_rope, rms_norm

__all__ = ["apply_rope", "qk_norm_rope_store", "rms_norm"]
