"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on queries, keys and values. Shapes: see
layers.py."""

from __future__ import annotations

from dataclasses import dataclass

from easyaira.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    sliding_window: int | None = None  # without effect, since use_sliding_window is false

    qkv_bias = property(lambda self: True)
    output_bias = property(lambda self: False)


class Qwen2(Llama):
    """Llama under Qwen2's name."""


HF_NEUTRAL = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
