"""Gemma 2 (Riviere et al., 2024): Llama with norms before and after each sublayer, scaled
embeddings, soft caps and a sliding window in every other layer. Gemma 3 differs in a few fields.
Shapes: see layers.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from easyaira.models.layers import UNLIMITED, Scores
from easyaira.models.llama import Llama, LlamaConfig

NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


@dataclass(frozen=True)
class Gemma2Config(LlamaConfig):
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 8192
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: int = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    sliding_window: int | None = 4096
    layer_types: tuple | None = None  # overrides the pattern: sliding_ or full_attention, by layer
    tie_word_embeddings: bool = True

    sliding_window_pattern = property(lambda self: 2)  # one layer in this many has no window
    activation = property(lambda self: self.hidden_activation)
    norms = property(lambda self: tuple(f"{name}_layernorm" for name in NORMS))
    norm_offset = property(lambda self: 1.0)
    embedding_factor = property(lambda self: math.sqrt(self.hidden_size))

    @property
    def scores(self) -> Scores:
        usual = self.query_pre_attn_scalar == self.head_width
        divisor = None if usual else math.sqrt(self.query_pre_attn_scalar)
        return Scores(divisor, self.attn_logit_softcapping)

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Whether each layer has a window."""
        if self.layer_types is not None:
            return tuple(kind == "sliding_attention" for kind in self.layer_types)
        places = range(1, self.num_hidden_layers + 1)
        return tuple(place % self.sliding_window_pattern != 0 for place in places)

    @property
    def windows(self) -> tuple[int, ...] | None:
        if self.sliding_window is None or not any(self.sliding):
            return None
        return tuple(self.sliding_window if sliding else UNLIMITED for sliding in self.sliding)


class Gemma2(Llama):
    """Llama under Gemma 2's name."""


HF_NEUTRAL = {
    "mlp_bias": False,
    "hidden_act": "gelu_pytorch_tanh",  # ignored: hidden_activation decides
    "use_bidirectional_attention": False,
}
