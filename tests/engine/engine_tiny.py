"""The sizes of the tests' model: M3 in small, sparse from 24 tokens on."""

from openm3.config import M3Config, SparseConfig, TextConfig, VisionConfig

VOCAB, IMAGE, VIDEO, EOS = 300, 290, 291, 292
CONTEXT, PAGE = 256, 8


def tiny_config() -> M3Config:
    layers = (False, True, True)
    text = TextConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, rotary_dim=8, dense_intermediate_size=96, intermediate_size=32, shared_intermediate_size=32,
        num_local_experts=4, num_experts_per_tok=2, sparse_layers=layers, moe_layers=layers,
        sparse=SparseConfig(index_heads=2, index_dim=16, block_size=PAGE, topk_blocks=3),
        max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    vision = VisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return M3Config(text=text, vision=vision, projector_hidden_size=32, image_token_id=IMAGE, video_token_id=VIDEO)


def next_token(tokens: list[int], vocab: int = 1000) -> int:
    """What a stand-in for a model says after these tokens: it depends on all of them."""
    return hash(tuple(tokens)) % vocab


def continued(prompt: list[int], n: int, vocab: int = 1000) -> list[int]:
    """Its answer of n tokens."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens, vocab))
    return tokens[len(prompt) :]
