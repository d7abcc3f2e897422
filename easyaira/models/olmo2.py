"""OLMo 2 (Walsh et al., 2024): Llama with norms after each sublayer instead of before it, and RMS
norms of all heads' queries and keys. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass

from easyaira.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class Olmo2Config(LlamaConfig):
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5

    qk_norm = property(lambda self: "all heads")
    norms = property(
        lambda self: (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    )


class Olmo2(Llama):
    """Llama under OLMo 2's name."""


HF_NEUTRAL = {"mlp_bias": False, "sliding_window": None}
