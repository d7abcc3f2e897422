"""Mistral (Jiang et al., 2023): Llama with a sliding window. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass

from easyaira.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Sizes under Hugging Face's names, with its defaults."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    @property
    def windows(self) -> tuple[int, ...] | None:
        window = self.sliding_window
        return None if window is None else (window,) * self.num_hidden_layers


class Mistral(Llama):
    """Llama under Mistral's name."""


HF_NEUTRAL = {"attention_bias": False, "mlp_bias": False}
