"""Qwen3, dense (Yang et al., 2025): Llama with an RMS norm of each head's queries and keys, and a
head width of its own. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass

from easyaira.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    max_position_embeddings: int = 32768
    sliding_window: int | None = None  # without effect, since use_sliding_window is false

    qk_norm = property(lambda self: "each head")


class Qwen3(Llama):
    """Llama under Qwen3's name."""


HF_NEUTRAL = {"mlp_bias": False, "use_sliding_window": False}
