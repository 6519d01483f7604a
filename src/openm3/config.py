"""The network's sizes as frozen data: read from either spelling of config.json, written in the released one.

`M3Config.from_pretrained` reads a directory (or a model's name), `M3Config.preset` gives the known sizes. Every value
is checked once, here; what passes can be built. The spellings and their precedence: docs/checkpoints.md.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that no M3 network can be built from: names the field, the value and what is allowed."""


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r}: {allowed}")


def _positive_ints(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
        _require(ok, f"{type(config).__name__}.{name}", value, "must be a positive integer")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _numbers(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(_is_number(value), f"{type(config).__name__}.{name}", value, "must be a positive finite number")


@dataclass(frozen=True)
class SparseConfig:
    """MSA's index branch: `topk_blocks` blocks of `block_size` keys for each query and KV group (report section 3)."""

    index_heads: int = 4
    index_dim: int = 128
    block_size: int = 128
    topk_blocks: int = 16
    local_blocks: int = 1
    init_blocks: int = 0

    def __post_init__(self) -> None:
        _positive_ints(self, "index_heads", "index_dim", "block_size", "topk_blocks", "local_blocks")
        ok = isinstance(self.init_blocks, int) and self.init_blocks >= 0
        _require(ok, "SparseConfig.init_blocks", self.init_blocks, "must be an integer of at least 0")
        forced = self.init_blocks + self.local_blocks
        _require(forced <= self.topk_blocks, "SparseConfig.init_blocks + local_blocks", forced,
                 f"may not exceed topk_blocks = {self.topk_blocks}")  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `sparse_layers[i]`: layer i attends through MSA; `moe_layers[i]`: its MLP is a mixture."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    dense_intermediate_size: int
    intermediate_size: int
    shared_intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    sparse_layers: tuple[bool, ...]
    moe_layers: tuple[bool, ...]
    sparse: SparseConfig = field(default_factory=SparseConfig)
    routed_scaling_factor: float = 2.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rope_theta: float = 5e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1_048_576
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 200034
    eos_token_id: int | tuple[int, ...] | None = 200020
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _positive_ints(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                       "num_key_value_heads", "head_dim", "rotary_dim", "dense_intermediate_size", "intermediate_size",
                       "shared_intermediate_size", "num_local_experts", "num_experts_per_tok",
                       "max_position_embeddings")  # fmt: skip
        _numbers(self, "routed_scaling_factor", "swiglu_alpha", "swiglu_limit", "rope_theta", "rms_norm_eps")
        n = self.num_hidden_layers
        for name in ("sparse_layers", "moe_layers"):
            value = getattr(self, name)
            _require(len(value) == n, f"TextConfig.{name}", value, f"must have one entry for each of {n} layers")
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        _require(heads % kv == 0, "TextConfig.num_attention_heads", heads,
                 f"must be a multiple of num_key_value_heads = {kv}")  # fmt: skip
        _require(self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0, "TextConfig.rotary_dim",
                 self.rotary_dim, f"must be even and at most head_dim = {self.head_dim}")  # fmt: skip
        _require(self.num_experts_per_tok <= self.num_local_experts, "TextConfig.num_experts_per_tok",
                 self.num_experts_per_tok, f"may not exceed num_local_experts = {self.num_local_experts}")  # fmt: skip
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, ids in (("bos", (self.bos_token_id,)), ("eos", eos), ("pad", (self.pad_token_id,))):
            ok = all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in ids)
            _require(ok, f"TextConfig.{name}_token_id", getattr(self, f"{name}_token_id"), "must be a token id or null")
        if any(self.sparse_layers):
            index_heads = self.sparse.index_heads
            _require(kv % index_heads == 0, "SparseConfig.index_heads", index_heads,
                     f"must divide num_key_value_heads = {kv}")  # fmt: skip
            _require(self.rotary_dim <= self.sparse.index_dim, "SparseConfig.index_dim", self.sparse.index_dim,
                     f"must be at least rotary_dim = {self.rotary_dim}")  # fmt: skip

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


@dataclass(frozen=True)
class VisionConfig:
    """The CLIP-style tower with 3D RoPE that reads images and video alike."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 2016
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    segment_max_frames: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        _positive_ints(self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                       "num_channels", "image_size", "patch_size", "temporal_patch_size", "spatial_merge_size",
                       "segment_max_frames")  # fmt: skip
        _numbers(self, "layer_norm_eps", "rope_theta")
        _require(self.hidden_size % self.num_attention_heads == 0, "VisionConfig.hidden_size", self.hidden_size,
                 f"must be a multiple of num_attention_heads = {self.num_attention_heads}")  # fmt: skip
        _require(self.head_dim >= 6, "VisionConfig.hidden_size / num_attention_heads", self.head_dim,
                 "must be at least 6, two rotated channels for each axis")  # fmt: skip
        _require(self.hidden_act in VISION_ACTIVATIONS, "VisionConfig.hidden_act", self.hidden_act,
                 f"must be one of {', '.join(VISION_ACTIVATIONS)}")  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_values(self) -> int:
        """Values of one row of pixels: channels x temporal x height x width of a patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2


VISION_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")


@dataclass(frozen=True)
class M3Config:
    """A whole M3: decoder, vision tower, projector. Raises ConfigError for values that no network can be built from."""

    text: TextConfig
    vision: VisionConfig
    projector_hidden_size: int = 6144
    image_token_id: int = 200025
    video_token_id: int = 200026
    quantization: dict[str, Any] | None = None  # quantization_config of the checkpoint this was read from, as it stands
    dtype: str = "bfloat16"  # the checkpoint's own dtype

    def __post_init__(self) -> None:
        _positive_ints(self, "projector_hidden_size")
        for name in ("image_token_id", "video_token_id"):
            value = getattr(self, name)
            _require(isinstance(value, int) and 0 <= value < self.text.vocab_size, f"M3Config.{name}", value,
                     f"must be a token id under vocab_size = {self.text.vocab_size}")  # fmt: skip
        _require(self.image_token_id != self.video_token_id, "M3Config.video_token_id", self.video_token_id,
                 "must differ from image_token_id")  # fmt: skip
        _require(self.dtype in ("float32", "bfloat16", "float16"), "M3Config.dtype", self.dtype,
                 "must be float32, bfloat16 or float16")  # fmt: skip

    @classmethod
    def preset(cls, name: str) -> M3Config:
        """The sizes known by name: `m3` as released, `msa-109b` of the report's evaluation, `nano` as bundled."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r}: must be one of {', '.join(PRESETS)}")
        return PRESETS[name]()

    @classmethod
    def from_pretrained(cls, dir_or_name: str | Path) -> M3Config:
        """Reads config.json of a directory, of a downloaded Hugging Face repo, or of the bundled `openm3-nano`."""
        from openm3.checkpoint import resolve  # a name is the checkpoint room's to resolve

        return cls.from_dict(read_json(resolve(dir_or_name) / "config.json"))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json in the released spelling."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> M3Config:
        """Reads a config.json's content in either spelling, the released one or transformers'."""
        if not isinstance(raw, dict) or raw.get("model_type") != "minimax_m3_vl":
            kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise ConfigError(f"model_type = {kind!r}: must be 'minimax_m3_vl'")
        text, vision = _section(raw, "text_config"), _section(raw, "vision_config")
        tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return cls(
            text=_text_from_dict(text, tied),
            vision=_vision_from_dict(vision),
            projector_hidden_size=raw.get("projector_hidden_size", 6144),
            image_token_id=_first(raw, "image_token_index", "image_token_id", default=200025),
            video_token_id=_first(raw, "video_token_index", "video_token_id", default=200026),
            quantization=raw.get("quantization_config"),
            dtype=str(_first(raw, "dtype", "torch_dtype", default="bfloat16")).removeprefix("torch."),
        )

    def to_dict(self) -> dict[str, Any]:
        """config.json's content in the released spelling, which serving engines and transformers read."""
        out = {
            "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
            "model_type": "minimax_m3_vl",
            "dtype": self.dtype,
            "image_token_index": self.image_token_id,
            "video_token_index": self.video_token_id,
            "projector_hidden_size": self.projector_hidden_size,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": _text_to_dict(self.text),
            "vision_config": _vision_to_dict(self.vision),
        }
        if self.quantization is not None:
            out["quantization_config"] = self.quantization
        return out


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a checkpoint's directory; a missing or broken file is one clear ConfigError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model's directory holds it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, must be a JSON object")
    return raw


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name) or {}
    _require(isinstance(section, dict), name, section, "must be a JSON object")
    return section


def _first(raw: dict[str, Any], *names: str, default: Any) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), default)


SPARSE_NAMES = {  # ours: (released, inside sparse_attention_config; transformers', flat)
    "index_heads": ("sparse_num_index_heads", "index_n_heads"),
    "index_dim": ("sparse_index_dim", "index_head_dim"),
    "block_size": ("sparse_block_size", "index_block_size"),
    "topk_blocks": ("sparse_topk_blocks", "index_topk_blocks"),
    "local_blocks": ("sparse_local_block", "index_local_blocks"),
    "init_blocks": ("sparse_init_block", None),
}
TEXT_DEFAULTS: dict[str, Any] = {  # what the reference assumes for a field that config.json leaves out
    "vocab_size": 200064, "hidden_size": 6144, "num_hidden_layers": 60, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "dense_intermediate_size": 12288, "intermediate_size": 3072,
    "shared_intermediate_size": 3072, "num_local_experts": 128, "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.0, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 524288, "bos_token_id": 200034, "eos_token_id": 200020, "pad_token_id": None,
}  # fmt: skip


def _text_from_dict(raw: dict[str, Any], tied: bool) -> TextConfig:
    values = {name: raw.get(name, default) for name, default in TEXT_DEFAULTS.items()}
    if isinstance(values["eos_token_id"], list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    rope = _section(raw, "rope_parameters")
    kind = rope.get("rope_type", "default")
    _require(kind == "default", "rope_parameters.rope_type", kind, "must be 'default'; M3 scales no positions")
    head_dim, n = values["head_dim"], values["num_hidden_layers"]
    _require(isinstance(head_dim, int) and isinstance(n, int), "text_config.head_dim, num_hidden_layers",
             (head_dim, n), "must be integers")  # fmt: skip
    factor = _first(rope, "partial_rotary_factor", default=_first(raw, "partial_rotary_factor", default=1.0))
    _require(_is_number(factor), "text_config.partial_rotary_factor", factor, "must be a positive finite number")
    theta = _first(rope, "rope_theta", default=_first(raw, "rope_theta", default=5e6))
    released = _section(raw, "sparse_attention_config")
    defaults = SparseConfig()
    sparse = {
        ours: _first({**_flat(raw, flat), **_flat(released, nested)}, nested, flat or nested,
                     default=getattr(defaults, ours))
        for ours, (nested, flat) in SPARSE_NAMES.items()
    }  # fmt: skip
    on = released.get("use_sparse_attention", raw.get("use_sparse_attention", True)) is not False
    attention = _layers(raw, "layer_types", {"full_attention": False, "minimax_m3_sparse": True})
    declared = _freq(released, "sparse_attention_freq")
    attention = attention or declared or (False,) * n
    _refuse_other_networks(raw, released, declared or attention)
    mlp = _layers(raw, "mlp_layer_types", {"dense": False, "sparse": True})
    mlp = mlp or _freq(raw, "moe_layer_freq") or (True,) * n
    return TextConfig(
        **values,
        rotary_dim=int(head_dim * factor),
        rope_theta=theta,
        sparse=SparseConfig(**sparse),
        sparse_layers=attention if on else (False,) * n,
        moe_layers=mlp,
        tie_word_embeddings=tied,
    )


def _refuse_other_networks(raw: dict[str, Any], released: dict[str, Any], sparse_layers: tuple[bool, ...]) -> None:
    """Settings under which the files would describe another network than the one built here."""
    kind = released.get("sparse_score_type", "max")
    _require(kind == "max", "sparse_attention_config.sparse_score_type", kind, "must be 'max'")
    given = released.get("sparse_disable_index_value")
    each = given if isinstance(given, list) else [given] * len(sparse_layers)
    _require(all(v in (None, True) for v, on in zip(each, sparse_layers) if on),
             "sparse_attention_config.sparse_disable_index_value", given,
             "must be true on every sparse layer; M3's index branch has no values")  # fmt: skip
    scoring = raw.get("scoring_func", "sigmoid")
    _require(scoring == "sigmoid", "text_config.scoring_func", scoring, "must be 'sigmoid'")
    act = raw.get("hidden_act", "swigluoai")
    allowed = "must be 'swigluoai' (or 'silu', as transformers writes it)"
    _require(act in ("swigluoai", "silu"), "text_config.hidden_act", act, allowed)
    for name, allowed in (("use_qk_norm", True), ("use_gemma_norm", True), ("attention_bias", False)):
        _require(raw.get(name, allowed) in (allowed, None), f"text_config.{name}", raw.get(name), f"must be {allowed}")
    shared = raw.get("n_shared_experts", 1)
    _require(shared in (1, None), "text_config.n_shared_experts", shared, "must be 1")


def _flat(raw: dict[str, Any], name: str | None) -> dict[str, Any]:
    return {name: raw[name]} if name is not None and raw.get(name) is not None else {}


def _layers(raw: dict[str, Any], name: str, kinds: dict[str, bool]) -> tuple[bool, ...] | None:
    types = raw.get(name)
    if types is None:
        return None
    _require(isinstance(types, list), f"text_config.{name}", types, "must be a list with one entry for each layer")
    for kind in types:
        ok = isinstance(kind, str) and kind in kinds
        _require(ok, f"text_config.{name}", kind, f"must be one of {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in types)


def _freq(raw: dict[str, Any], name: str) -> tuple[bool, ...] | None:
    freq = raw.get(name)
    ok = freq is None or (isinstance(freq, list) and all(f in (0, 1) for f in freq))
    _require(ok, f"text_config.{name}", freq, "must be a list with a 0 or 1 for each layer")
    return None if freq is None else tuple(bool(f) for f in freq)


def _text_to_dict(text: TextConfig) -> dict[str, Any]:
    out = {name: getattr(text, name) for name in TEXT_DEFAULTS}
    if isinstance(out["eos_token_id"], tuple):
        out["eos_token_id"] = list(out["eos_token_id"])
    sparse = {nested: getattr(text.sparse, ours) for ours, (nested, _) in SPARSE_NAMES.items()}
    return out | {
        "model_type": "minimax_m3_vl_text",
        "hidden_act": "swigluoai",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "swiglu_beta": 1.0,
        "qk_norm_type": "per_head",
        "use_qk_norm": True,
        "use_gemma_norm": True,
        "n_shared_experts": 1,
        "rope_theta": text.rope_theta,
        "rotary_dim": text.rotary_dim,
        "partial_rotary_factor": text.rotary_dim / text.head_dim,
        "tie_word_embeddings": text.tie_word_embeddings,
        "moe_layer_freq": [int(f) for f in text.moe_layers],
        "sparse_attention_config": sparse | {
            "use_sparse_attention": any(text.sparse_layers),
            "sparse_score_type": "max",
            "sparse_attention_freq": [int(f) for f in text.sparse_layers],
            "sparse_disable_index_value": [int(f) for f in text.sparse_layers],
        },
    }  # fmt: skip


def _vision_from_dict(raw: dict[str, Any]) -> VisionConfig:
    defaults = VisionConfig()
    plain = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
             "image_size", "patch_size", "hidden_act", "layer_norm_eps")  # fmt: skip
    compression, rope = _section(raw, "img_token_compression_config"), _section(raw, "rope_parameters")
    return VisionConfig(
        **{name: raw.get(name, getattr(defaults, name)) for name in plain},
        temporal_patch_size=_first(compression, "temporal_patch_size", default=raw.get("temporal_patch_size", 2)),
        spatial_merge_size=_first(compression, "spatial_merge_size", default=raw.get("spatial_merge_size", 2)),
        segment_max_frames=_first(raw, "vision_segment_max_frames", default=4),
        rope_theta=_first(rope, "rope_theta", default=_first(raw, "rope_theta", default=1e4)),
    )


def _vision_to_dict(vision: VisionConfig) -> dict[str, Any]:
    out = dataclasses.asdict(vision)
    out["vision_segment_max_frames"] = out.pop("segment_max_frames")
    sizes = ("spatial_merge_size", "temporal_patch_size")  # flat too: the reference reads only those
    out["img_token_compression_config"] = {name: out[name] for name in sizes}
    return out | {"model_type": "clip_vision_model", "rope_mode": "3d"}


def _m3() -> M3Config:
    layers = (False,) * 3 + (True,) * 57
    text = TextConfig(
        vocab_size=200064, hidden_size=6144, num_hidden_layers=60, num_attention_heads=64, num_key_value_heads=4,
        head_dim=128, rotary_dim=64, dense_intermediate_size=12288, intermediate_size=3072,
        shared_intermediate_size=3072, num_local_experts=128, num_experts_per_tok=4,
        sparse_layers=layers, moe_layers=layers,
    )  # fmt: skip
    return M3Config(text=text, vision=VisionConfig())


def _msa_109b() -> M3Config:
    """The report's evaluation model (arXiv 2606.13392, section 5.1): 41 layers of width 3072, 128 experts, 109 B.

    The report leaves out the widths of experts and dense layers, the index dim and the tower. Here they follow M3's own
    proportions: 0.75 and 3 times the hidden size, 128, M3's tower.
    """
    layers = (False,) * 3 + (True,) * 38
    text = TextConfig(
        vocab_size=200064, hidden_size=3072, num_hidden_layers=41, num_attention_heads=64, num_key_value_heads=4,
        head_dim=128, rotary_dim=64, dense_intermediate_size=9216, intermediate_size=2304,
        shared_intermediate_size=2304, num_local_experts=128, num_experts_per_tok=4,
        sparse_layers=layers, moe_layers=layers,
    )  # fmt: skip
    return M3Config(text=text, vision=VisionConfig(), projector_hidden_size=3072)


def _nano() -> M3Config:
    """The bundled model: 16 M parameters; 512 of at most 12,288 keys for a query (train/recipes/nano, docs/nano.md)."""
    layers = (False,) * 2 + (True,) * 6
    text = TextConfig(
        vocab_size=3072, hidden_size=320, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, rotary_dim=32, dense_intermediate_size=800, intermediate_size=128, shared_intermediate_size=256,
        num_local_experts=8, num_experts_per_tok=2, sparse_layers=layers, moe_layers=layers,
        sparse=SparseConfig(index_heads=2, index_dim=64, block_size=32, topk_blocks=16),
        rope_theta=1e5, max_position_embeddings=12288, tie_word_embeddings=True,
        pad_token_id=NANO_SPECIALS["]!p~["], bos_token_id=NANO_SPECIALS["]~!b["], eos_token_id=NANO_SPECIALS["[e~["],
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=4, image_size=336
    )
    return M3Config(
        text=text, vision=vision, projector_hidden_size=320,
        image_token_id=NANO_SPECIALS["]<]image[>["], video_token_id=NANO_SPECIALS["]<]video[>["],
    )  # fmt: skip


# M3's special tokens, at the end of the bundled model's vocabulary of 3072.
SPECIAL_TOKENS = ("]!p~[", "]~b]", "[e~[", "]!d~[", "]<]image[>[", "]<]video[>[", "]<]start of image[>[",
                  "]<]end of image[>[", "]<]start of video[>[", "]<]end of video[>[", "]~!b[", "]<]minimax[>[",
                  "<mm:think>", "</mm:think>")  # fmt: skip
NANO_SPECIALS = {token: 3072 - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
PRESETS = {"m3": _m3, "msa-109b": _msa_109b, "nano": _nano}
