"""Gemma 3, text (Kamath et al., 2025): Gemma 2 without soft caps, with RMS norms of each head's
queries and keys, and with rotary positions of their own in layers with a window. Shapes: see
layers.py."""

from __future__ import annotations

from dataclasses import dataclass

from easyaira.models import gemma2
from easyaira.models.gemma2 import Gemma2Config
from easyaira.models.llama import Llama


@dataclass(frozen=True)
class Gemma3TextConfig(Gemma2Config):
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    rope_local_base_freq: float = 10000.0  # rope_theta of layers with a window
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window_pattern: int = 6  # one layer in this many has no window

    qk_norm = property(lambda self: "each head")
    rotary_tables = property(
        lambda self: ((self.rope_theta, self.rope_scaling), (self.rope_local_base_freq, None))
    )
    table_of_layer = property(lambda self: tuple(map(int, self.sliding)))


# transformers reads a soft cap of attention, but does not apply it
HF_NEUTRAL = gemma2.HF_NEUTRAL | {"attn_logit_softcapping": None}


class Gemma3(Llama):
    """Llama under Gemma 3's name."""
