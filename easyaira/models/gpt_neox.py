"""GPT-NeoX (Black et al., 2022) and Pythia (Biderman et al., 2023): rotary positions on a part of
each head, attention and MLP in parallel. Shapes: see layers.py; M rotated features of a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from easyaira.hf.table import TRANSPOSE, VOCAB, Row
from easyaira.models import layers
from easyaira.models.attention import attention
from easyaira.models.embedding import Embedding
from easyaira.models.layers import ACTIVATIONS, Compute, Dropout, LayerNorm, RopeScaling
from easyaira.models.linear import Linear


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.25
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    # names that all architectures share
    max_positions = property(lambda self: self.max_position_embeddings)
    width = property(lambda self: self.hidden_size)
    heads = kv_heads = property(lambda self: self.num_attention_heads)
    activation = property(lambda self: self.hidden_act)

    rotated = property(lambda self: int(self.width // self.heads * self.partial_rotary_factor))


class Attention(nn.Module):
    config: GPTNeoXConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, angles, segment_ids, sides):
        c = self.config
        R, T, D = x_RTD.shape
        x_RTD = layers.whole(x_RTD)
        linear = partial(Linear, std=c.initializer_range, use_bias=c.attention_bias)
        # q, k and v of a head lie together, so tensor parallelism shards heads
        qkv = linear(3 * D, name="query_key_value")(x_RTD).reshape(R, T, c.heads, 3, D // c.heads)
        # split, since the gradients of slices would be padded and added
        q, k, v = (part[:, :, :, 0] for part in jax.lax.split(qkv, (1, 1, 1), axis=3))

        def rotate(x_RTHN):
            turned_RTHM = layers.rotate(x_RTHN[..., : c.rotated], angles)
            return jnp.concatenate([turned_RTHM, x_RTHN[..., c.rotated :]], axis=-1)

        out_RTD = attention(rotate(q), rotate(k), v, segment_ids, sides, self.compute)
        return layers.between(linear(D, name="dense")(out_RTD))


class MLP(nn.Module):
    config: Any  # GPTNeoXConfig or BloomConfig

    @nn.compact
    def __call__(self, x_RTD):
        c = self.config
        x_RTD = layers.whole(x_RTD)
        linear = partial(Linear, std=c.initializer_range, use_bias=True)
        h_RTF = layers.by_features(linear(c.intermediate_size, name="dense_h_to_4h")(x_RTD))
        h_RTF = ACTIVATIONS[c.activation](h_RTF)
        return layers.between(linear(x_RTD.shape[-1], name="dense_4h_to_h")(h_RTF))


class Block(nn.Module):
    config: GPTNeoXConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, angles, segment_ids, sides):
        x_RTD = layers.between(x_RTD)
        c = self.config
        norm, dropout = partial(LayerNorm, c.layer_norm_eps), Dropout(self.compute.dropout)
        attend = Attention(c, self.compute, name="attention")
        attended = dropout(attend(norm(name="input_layernorm")(x_RTD), angles, segment_ids, sides))
        before_mlp = x_RTD if c.use_parallel_residual else x_RTD + attended
        normed = norm(name="post_attention_layernorm")(before_mlp)
        return x_RTD + attended + dropout(MLP(c, name="mlp")(normed)), None


class GPTNeoX(nn.Module):
    """Map tokens to hidden states after the final norm [R, T, D] and the token table [V, D]."""

    config: GPTNeoXConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c = self.config
        padded = layers.padded_vocab(c.vocab_size)
        table = Embedding(c.vocab_size, c.width, c.initializer_range, padded, name="embed_in")
        x_RTD = layers.between(table(tokens, self.compute.dtype))
        x_RTD = Dropout(self.compute.dropout)(x_RTD)
        angles = layers.rotary(positions, c.rotated, c.rope_theta, c.rope_scaling)
        blocks = layers.layers(Block, c.num_hidden_layers, self.compute)
        x_RTD, _ = blocks(c, self.compute, name="layers")(x_RTD, angles, segment_ids, sides)
        return LayerNorm(c.layer_norm_eps, name="final_layer_norm")(x_RTD), table.embedding


PARTITION_RULES = (
    (r"embed_in/embedding$", P("tp", "fsdp")),
    (r"(query_key_value|dense_h_to_4h)/kernel$", P("fsdp", "tp")),
    (r"(dense|dense_4h_to_h)/kernel$", P("tp", "fsdp")),
    (r"(query_key_value|dense_h_to_4h)/bias$", P("tp")),
    (r"(dense|dense_4h_to_h)/bias$", P()),
    (r"norm/(scale|bias)$", P()),
)


def linear_rows(
    ours: str, theirs: str, when: Callable[[Any], bool] = lambda config: True
) -> tuple[Row, Row]:
    """Weight-table rows of a linear layer; `when`: configurations that have its bias."""
    kernel = Row(f"model/{ours}/kernel", f"{theirs}.weight", TRANSPOSE)
    return kernel, Row(f"model/{ours}/bias", f"{theirs}.bias", when=when)


def norm_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """Weight-table rows of a layer norm."""
    return Row(f"model/{ours}/scale", f"{theirs}.weight"), Row(
        f"model/{ours}/bias", f"{theirs}.bias"
    )


_attention_bias = attrgetter("attention_bias")
_LAYER = "gpt_neox.layers.{}."
HF_ROWS = (
    Row("model/embed_in/embedding", "gpt_neox.embed_in.weight", VOCAB),
    *norm_rows("layers/input_layernorm", _LAYER + "input_layernorm"),
    *norm_rows("layers/post_attention_layernorm", _LAYER + "post_attention_layernorm"),
    *linear_rows(
        "layers/attention/query_key_value", _LAYER + "attention.query_key_value", _attention_bias
    ),
    *linear_rows("layers/attention/dense", _LAYER + "attention.dense", _attention_bias),
    *linear_rows("layers/mlp/dense_h_to_4h", _LAYER + "mlp.dense_h_to_4h"),
    *linear_rows("layers/mlp/dense_4h_to_h", _LAYER + "mlp.dense_4h_to_h"),
    *norm_rows("final_layer_norm", "gpt_neox.final_layer_norm"),
)
HF_PREFIX = "gpt_neox."
HF_IGNORED = (r"\.attention\.(bias|masked_bias)$", r"\.rotary_emb\.inv_freq$")  # buffers
HF_SAVED = {"lm_head.weight": "embed_out.weight"}  # as every version of transformers reads it
HF_ALIASES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
HF_NEUTRAL: dict = {}
