"""Configs: two spellings that read as one network, refusals that name the field, and the sizes known by name."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openm3.config import ConfigError, M3Config, SparseConfig, TextConfig, VisionConfig

TEXT = dict(
    vocab_size=320, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    rotary_dim=8, dense_intermediate_size=80, intermediate_size=40, shared_intermediate_size=56, num_local_experts=5,
    num_experts_per_tok=2, sparse_layers=(False, True, True), moe_layers=(True, False, True),
    sparse=SparseConfig(index_heads=1, index_dim=24, block_size=8, topk_blocks=5, local_blocks=2),
    routed_scaling_factor=1.5, swiglu_alpha=1.25, swiglu_limit=6.0, rope_theta=3e5, rms_norm_eps=1e-5,
    max_position_embeddings=4096, bos_token_id=1, eos_token_id=(2, 9), pad_token_id=0,
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=2, image_size=56,
              temporal_patch_size=1, spatial_merge_size=4, rope_theta=500.0, layer_norm_eps=1e-6)  # fmt: skip


def small(**changes) -> M3Config:
    top = dict(projector_hidden_size=40, image_token_id=3, video_token_id=4, dtype="float32")
    return M3Config(text=TextConfig(**TEXT | changes), vision=VisionConfig(**VISION), **top)


def edited(changes: dict, config: M3Config | None = None) -> dict:
    """The released spelling of a small config with dotted fields replaced; None takes a field out."""
    raw = copy.deepcopy((config or small()).to_dict())
    for path, value in changes.items():
        *parents, name = path.split(".")
        where = raw
        for parent in parents:
            where = where.setdefault(parent, {})
        if value is None:
            where.pop(name, None)
        else:
            where[name] = value
    return raw


# Two spellings -------------------------------------------------------------------------------------------------------


def test_transformers_own_spelling_and_the_released_one_read_as_the_same_network(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.12")
    ours = small()
    ours.save_pretrained(tmp_path / "released")
    transformers.AutoConfig.from_pretrained(tmp_path / "released").save_pretrained(tmp_path / "flat")
    raw = json.loads((tmp_path / "flat" / "config.json").read_text())
    assert raw["text_config"]["layer_types"] == ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
    assert not {"sparse_attention_config", "moe_layer_freq", "rope_theta"} & set(raw["text_config"])
    assert M3Config.from_pretrained(tmp_path / "released") == ours
    # transformers knows no fields for the two that it does not use.
    vision = dataclasses.replace(ours.vision, segment_max_frames=4)
    assert M3Config.from_pretrained(tmp_path / "flat") == dataclasses.replace(ours, vision=vision)


def test_a_config_that_transformers_made_itself_reads_as_its_fields_say(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.12")
    transformers.MiniMaxM3VLConfig(
        text_config=dict(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=24, dense_intermediate_size=40, shared_intermediate_size=28,
            num_local_experts=6, num_experts_per_tok=3, layer_types=["minimax_m3_sparse", "full_attention"],
            mlp_layer_types=["dense", "sparse"], index_n_heads=2, index_head_dim=20, index_block_size=16,
            index_topk_blocks=7, index_local_blocks=3, rms_norm_eps=1e-4,
            rope_parameters={"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.25},
        ),
        vision_config=dict(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=20,
                           rope_parameters={"rope_type": "axial", "rope_theta": 99.0}),
        image_token_index=5, video_token_index=6, projector_hidden_size=36,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = M3Config.from_pretrained(tmp_path)
    text = config.text
    assert text.sparse == SparseConfig(
        index_heads=2, index_dim=20, block_size=16, topk_blocks=7, local_blocks=3, init_blocks=0
    )
    assert (text.sparse_layers, text.moe_layers) == ((True, False), (False, True))
    assert (text.rotary_dim, text.rope_theta, text.rms_norm_eps) == (4, 777.0, 1e-4)
    assert (text.num_local_experts, text.num_experts_per_tok, text.shared_intermediate_size) == (6, 3, 28)
    assert (config.vision.hidden_size, config.vision.head_dim, config.vision.rope_theta) == (24, 12, 99.0)
    assert (config.image_token_id, config.video_token_id, config.projector_hidden_size) == (5, 6, 36)


def test_transformers_reads_the_released_spelling_back_field_by_field(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.12")
    ours = small()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    text = theirs.text_config
    same = set(TEXT) - {"sparse", "sparse_layers", "moe_layers", "rope_theta", "rotary_dim", "eos_token_id"}
    assert {n: getattr(text, n) for n in same} == {n: TEXT[n] for n in same}
    assert list(text.eos_token_id) == [2, 9]
    assert text.rope_parameters["rope_theta"] == 3e5
    assert text.rope_parameters["partial_rotary_factor"] == 0.5
    assert text.rotary_dim == 8
    assert text.layer_types == ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
    assert text.mlp_layer_types == ["sparse", "dense", "sparse"]
    sizes = (text.index_n_heads, text.index_head_dim, text.index_block_size, text.index_topk_blocks)
    assert (*sizes, text.index_local_blocks) == (1, 24, 8, 5, 2)
    assert theirs.vision_config.rope_parameters["rope_theta"] == 500.0
    assert (theirs.vision_config.temporal_patch_size, theirs.vision_config.spatial_merge_size) == (1, 4)
    assert (theirs.image_token_index, theirs.video_token_index, theirs.projector_hidden_size) == (3, 4, 40)


@pytest.mark.parametrize("name", ["m3", "msa-109b", "nano"])
def test_presets_survive_writing_and_reading(name, tmp_path):
    config = M3Config.preset(name)
    config.save_pretrained(tmp_path)
    assert M3Config.from_pretrained(tmp_path) == config


def test_the_quantization_of_a_checkpoint_is_kept_as_it_stands(tmp_path):
    quantization = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]}
    config = dataclasses.replace(small(), quantization=quantization)
    config.save_pretrained(tmp_path)
    assert M3Config.from_pretrained(tmp_path).quantization == quantization


# Precedence --------------------------------------------------------------------------

MSA = "text_config.sparse_attention_config."


def text_of(changes: dict) -> TextConfig:
    return M3Config.from_dict(edited(changes)).text


def test_sparse_attention_config_goes_before_the_flat_index_fields():
    flat = {"text_config.index_topk_blocks": 9, "text_config.index_block_size": 64, "text_config.index_n_heads": 2}
    assert text_of(flat).sparse == TEXT["sparse"]
    without = {MSA + "sparse_topk_blocks": None, MSA + "sparse_block_size": None, MSA + "sparse_num_index_heads": None}
    sparse = text_of(flat | without).sparse
    assert (sparse.topk_blocks, sparse.block_size, sparse.index_heads) == (9, 64, 2)


def test_layer_lists_of_the_flat_spelling_go_before_the_frequencies():
    layers = {"text_config.layer_types": ["minimax_m3_sparse", "full_attention", "full_attention"]}
    assert text_of(layers).sparse_layers == (True, False, False)
    mlps = {"text_config.mlp_layer_types": ["dense", "dense", "sparse"]}
    assert text_of(mlps).moe_layers == (False, False, True)


def test_without_any_list_all_layers_attend_densely_and_all_are_moe():
    text = text_of({MSA + "sparse_attention_freq": None, "text_config.moe_layer_freq": None})
    assert text.sparse_layers == (False, False, False)
    assert text.moe_layers == (True, True, True)


def test_use_sparse_attention_false_turns_msa_off():
    assert not any(text_of({MSA + "use_sparse_attention": False}).sparse_layers)
    flat = {"text_config.layer_types": ["minimax_m3_sparse"] * 3, MSA + "use_sparse_attention": False}
    assert not any(text_of(flat).sparse_layers)


def test_the_rotated_width_follows_the_factor_and_never_rotary_dim():
    assert text_of({"text_config.rotary_dim": 12}).rotary_dim == 8
    assert text_of({"text_config.rope_parameters": {"partial_rotary_factor": 0.25}}).rotary_dim == 4
    whole = {"text_config.partial_rotary_factor": None, MSA + "sparse_index_dim": 16}
    assert text_of(whole).rotary_dim == 16


def test_rope_parameters_go_before_the_flat_theta():
    assert text_of({"text_config.rope_parameters": {"rope_theta": 123.0}}).rope_theta == 123.0


def test_fields_left_out_take_the_references_values():
    config = M3Config.from_dict({"model_type": "minimax_m3_vl"})
    released = M3Config.preset("m3")
    same = ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "intermediate_size", "swiglu_limit")
    for name in same:
        assert getattr(config.text, name) == getattr(released.text, name)
    assert config.vision == released.vision
    assert (config.image_token_id, config.video_token_id) == (200025, 200026)


@pytest.mark.parametrize("where", ["tie_word_embeddings", "text_config.tie_word_embeddings"])
def test_tied_embeddings_are_read_from_either_level(where):
    raw = edited({"tie_word_embeddings": None, "text_config.tie_word_embeddings": None, where: True})
    assert M3Config.from_dict(raw).text.tie_word_embeddings


# Refusals ------------------------------------------------------------------------------------------------------------

REFUSED = [  # (changed field, value, what the message must name: the field, and what is allowed)
    ("model_type", "llama", "model_type", "minimax_m3_vl"),
    ("text_config.hidden_size", -1, "hidden_size", "positive integer"),
    ("text_config.hidden_size", "48", "hidden_size", "positive integer"),
    ("text_config.hidden_size", True, "hidden_size", "positive integer"),
    ("text_config.vocab_size", 1.5, "vocab_size", "positive integer"),
    ("text_config.num_hidden_layers", "three", "num_hidden_layers", "integer"),
    ("text_config.num_attention_heads", 7, "num_attention_heads", "multiple of num_key_value_heads = 2"),
    ("text_config.num_experts_per_tok", 6, "num_experts_per_tok", "num_local_experts = 5"),
    ("text_config.rms_norm_eps", 0, "rms_norm_eps", "positive finite number"),
    ("text_config.rope_theta", float("inf"), "rope_theta", "positive finite number"),
    ("text_config.swiglu_limit", float("nan"), "swiglu_limit", "positive finite number"),
    ("text_config.moe_layer_freq", [1, 1], "moe_layers", "each of 3 layers"),
    ("text_config.moe_layer_freq", 1, "moe_layer_freq", "list"),
    ("text_config.layer_types", ["sliding_attention"] * 3, "layer_types", "minimax_m3_sparse"),
    ("text_config.mlp_layer_types", ["moe"] * 3, "mlp_layer_types", "sparse"),
    ("text_config.partial_rotary_factor", 1.5, "rotary_dim", "at most head_dim = 16"),
    ("text_config.partial_rotary_factor", 0.2, "rotary_dim", "even"),
    ("text_config.partial_rotary_factor", "half", "partial_rotary_factor", "number"),
    ("text_config.rope_parameters", {"rope_type": "yarn"}, "rope_type", "default"),
    ("text_config.scoring_func", "softmax", "scoring_func", "sigmoid"),
    ("text_config.hidden_act", "gelu", "hidden_act", "swigluoai"),
    ("text_config.use_gemma_norm", False, "use_gemma_norm", "True"),
    ("text_config.attention_bias", True, "attention_bias", "False"),
    ("text_config.n_shared_experts", 2, "n_shared_experts", "1"),
    ("text_config.eos_token_id", "end", "eos_token_id", "token id"),
    (MSA + "sparse_topk_blocks", 0, "topk_blocks", "positive integer"),
    (MSA + "sparse_topk_blocks", 1, "local_blocks", "topk_blocks = 1"),
    (MSA + "sparse_init_block", 4, "init_blocks", "topk_blocks = 5"),
    (MSA + "sparse_init_block", -1, "init_blocks", "at least 0"),
    (MSA + "sparse_num_index_heads", 3, "index_heads", "divide num_key_value_heads = 2"),
    (MSA + "sparse_index_dim", 4, "index_dim", "rotary_dim = 8"),
    (MSA + "sparse_score_type", "mean", "sparse_score_type", "max"),
    (MSA + "sparse_disable_index_value", False, "sparse_disable_index_value", "true"),
    (MSA + "sparse_attention_freq", [0, 1, 1, 1], "sparse_layers", "each of 3 layers"),
    ("vision_config.num_attention_heads", 5, "VisionConfig.hidden_size", "multiple of num_attention_heads = 5"),
    ("vision_config.num_attention_heads", 8, "num_attention_heads", "at least 6"),
    ("vision_config.hidden_act", "relu", "VisionConfig.hidden_act", "gelu"),
    ("vision_config.patch_size", 0, "patch_size", "positive integer"),
    ("image_token_index", 320, "image_token_id", "vocab_size = 320"),
    ("image_token_index", 4, "video_token_id", "differ"),
    ("projector_hidden_size", 0, "projector_hidden_size", "positive integer"),
    ("dtype", "int8", "dtype", "bfloat16"),
]


@pytest.mark.parametrize(("path", "value", "field", "allowed"), REFUSED)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(path, value, field, allowed):
    with pytest.raises(ConfigError) as refused:
        M3Config.from_dict(edited({path: value}))
    message = str(refused.value)
    assert "\n" not in message
    assert field in message
    assert allowed in message.partition(field)[2]


FIELDS = [
    *(f"text_config.{name}" for name in small().to_dict()["text_config"]),
    *(MSA + name for name in small().to_dict()["text_config"]["sparse_attention_config"]),
    *(f"vision_config.{name}" for name in small().to_dict()["vision_config"]),
    "text_config.layer_types", "text_config.mlp_layer_types", "text_config.rope_parameters", "text_config",
    "vision_config", "image_token_index", "video_token_index", "projector_hidden_size", "dtype",
    "vision_config.rope_parameters", "text_config.index_topk_blocks",
]  # fmt: skip
JUNK = st.one_of(
    st.integers(-3, 10**7), st.floats(), st.booleans(), st.text(max_size=4), st.lists(st.integers(-1, 3), max_size=4),
    st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "x"]), st.one_of(st.integers(), st.text(max_size=3))),
    st.lists(st.one_of(st.none(), st.text(max_size=3), st.lists(st.integers(), max_size=1)), max_size=3),
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(path=st.sampled_from(FIELDS), value=JUNK)
def test_any_value_in_any_field_gives_a_config_or_a_clear_refusal(path, value):
    with contextlib.suppress(ConfigError):
        M3Config.from_dict(edited({path: value}))


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{", b"\xff\xfe{}", b'"text"', b'{"model_type": null}'])
def test_a_broken_config_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        M3Config.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"preset 'm4': must be one of m3, msa-109b, nano"):
        M3Config.preset("m4")


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_the_released_model_has_427_b_parameters_of_which_23_5_b_work_on_a_token():
    from openm3.checkpoint import model_info
    from openm3.model import M3

    config = M3Config.preset("m3")
    model = M3(config, device="meta")
    total = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert round(total / 1e9) == 427
    info = model_info(config)
    assert info.total == total
    assert round(info.active / 1e9, 1) == 23.5


def test_the_reports_evaluation_model_has_109_b_parameters():
    from openm3.model import M3

    model = M3(M3Config.preset("msa-109b"), device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e9) == 109


def test_nano_is_small_and_its_queries_see_at_most_an_eighth_of_the_context():
    from openm3.model import M3

    config = M3Config.preset("nano")
    assert sum(p.numel() for p in M3(config, device="meta").parameters()) < 16e6
    sparse = config.text.sparse
    assert 8 * sparse.topk_blocks * sparse.block_size <= config.text.max_position_embeddings
    assert not config.text.sparse_layers[0]
    assert any(config.text.sparse_layers)
