"""SmolLM3 (Bakouch et al., 2025): Llama in which some layers have no rotary positions, as in Yang
et al. (2025), Rope to Nope and Back Again. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass

from easyaira.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class SmolLM3Config(LlamaConfig):
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    rope_theta: float = 2e6
    no_rope_layers: tuple | None = None  # by layer: 1 with rotary positions, 0 without
    no_rope_layer_interval: int = 4  # otherwise: one layer in this many has none
    tie_word_embeddings: bool = True

    rotary_tables = property(lambda self: ((self.rope_theta, self.rope_scaling), (None,)))

    @property
    def table_of_layer(self) -> tuple[int, ...]:
        if self.no_rope_layers:
            return tuple(1 - rotated for rotated in self.no_rope_layers)
        places = range(1, self.num_hidden_layers + 1)
        return tuple(int(place % self.no_rope_layer_interval == 0) for place in places)


class SmolLM3(Llama):
    """Llama under SmolLM3's name."""


HF_NEUTRAL = {"use_sliding_window": False, "sliding_window": None}
