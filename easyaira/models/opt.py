"""OPT (Zhang et al., 2022): learned positions with an offset, pre-norm blocks. The 350M model has
post-norm blocks instead, and projections before and after its layers. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from easyaira.hf.table import TRANSPOSE, VOCAB, Row
from easyaira.models import layers
from easyaira.models.attention import attention
from easyaira.models.embedding import Embedding
from easyaira.models.layers import ACTIVATIONS, Compute, Dropout, LayerNorm
from easyaira.models.linear import Linear

OFFSET = 2  # row of the position table for the first token


@dataclass(frozen=True)
class OPTConfig:
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    word_embed_proj_dim: int | None = None
    num_attention_heads: int = 12
    activation_function: str = "relu"
    init_std: float = 0.02
    tie_word_embeddings: bool = True

    # names that all architectures share
    max_positions = property(lambda self: self.max_position_embeddings)
    width = property(lambda self: self.hidden_size)
    heads = kv_heads = property(lambda self: self.num_attention_heads)
    activation = property(lambda self: self.activation_function)
    initializer_range = property(lambda self: self.init_std)

    embedding_width = property(lambda self: self.word_embed_proj_dim or self.hidden_size)
    projected = property(lambda self: self.embedding_width != self.hidden_size)


class Attention(nn.Module):
    config: OPTConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, segment_ids, sides):
        c = self.config
        R, T, D = x_RTD.shape
        x_RTD = layers.whole(x_RTD)
        linear = partial(Linear, D, c.init_std, use_bias=True)
        heads = (R, T, c.num_attention_heads, D // c.num_attention_heads)
        q, k, v = (linear(name=f"{name}_proj")(x_RTD).reshape(heads) for name in "qkv")
        out_RTD = attention(q, k, v, segment_ids, sides, self.compute)
        return layers.between(linear(name="out_proj")(out_RTD))


class Block(nn.Module):
    config: OPTConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, segment_ids, sides):
        x_RTD = layers.between(x_RTD)
        c = self.config
        dropout = Dropout(self.compute.dropout)

        def add(x, branch, norm):
            if c.do_layer_norm_before:
                return x + dropout(branch(norm(x)))
            return norm(x + dropout(branch(x)))

        def feed_forward(x):
            linear = partial(Linear, std=c.init_std, use_bias=True)
            h_RTF = layers.by_features(linear(c.ffn_dim, name="fc1")(layers.whole(x)))
            h_RTF = ACTIVATIONS[c.activation_function](h_RTF)
            return layers.between(linear(c.hidden_size, name="fc2")(h_RTF))

        attend = partial(
            Attention(c, self.compute, name="self_attn"), segment_ids=segment_ids, sides=sides
        )
        x_RTD = add(x_RTD, attend, LayerNorm(1e-5, name="self_attn_layer_norm"))
        x_RTD = add(x_RTD, feed_forward, LayerNorm(1e-5, name="final_layer_norm"))
        return x_RTD, None


class OPT(nn.Module):
    """Map tokens to the hidden states for the head [R, T, E] and the token table [V, E]."""

    config: OPTConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c, dtype = self.config, self.compute.dtype
        padded = layers.padded_vocab(c.vocab_size)
        embed = Embedding(c.vocab_size, c.embedding_width, c.init_std, padded, name="embed_tokens")
        rows = c.max_position_embeddings + OFFSET
        places = Embedding(rows, c.hidden_size, c.init_std, name="embed_positions")
        x_RTD = embed(tokens, dtype)
        if c.projected:
            x_RTD = Linear(c.hidden_size, c.init_std, name="project_in")(x_RTD)
        x_RTD = layers.between(x_RTD + places(positions + OFFSET, dtype))
        x_RTD = Dropout(self.compute.dropout)(x_RTD)
        blocks = layers.layers(Block, c.num_hidden_layers, self.compute)
        x_RTD, _ = blocks(c, self.compute, name="layers")(x_RTD, segment_ids, sides)
        if c.do_layer_norm_before:
            x_RTD = LayerNorm(1e-5, name="final_layer_norm")(x_RTD)
        if c.projected:
            x_RTD = Linear(c.embedding_width, c.init_std, name="project_out")(x_RTD)
        return x_RTD, embed.embedding


PARTITION_RULES = (
    (r"embed_tokens/embedding$", P("tp", "fsdp")),
    (r"embed_positions/embedding$", P(None, ("fsdp", "tp"))),
    (r"(q_proj|k_proj|v_proj|fc1|project_in)/kernel$", P("fsdp", "tp")),
    (r"(out_proj|fc2|project_out)/kernel$", P("tp", "fsdp")),
    (r"(q_proj|k_proj|v_proj|fc1)/bias$", P("tp")),
    (r"(out_proj|fc2)/bias$", P()),
    (r"layer_norm/(scale|bias)$", P()),
)


def _projected(config: OPTConfig) -> bool:
    return config.projected


def _pre_norm(config: OPTConfig) -> bool:
    return config.do_layer_norm_before


def _rows(ours: str, theirs: str, matrix: bool) -> tuple[Row, Row]:
    """Weight-table rows of a linear layer or a norm: weight and bias."""
    weight = Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE)
    if not matrix:
        weight = Row(f"{ours}/scale", f"{theirs}.weight")
    return weight, Row(f"{ours}/bias", f"{theirs}.bias")


_LAYER = "model.decoder.layers.{}."
HF_ROWS = (
    Row("model/embed_tokens/embedding", "model.decoder.embed_tokens.weight", VOCAB),
    Row("model/embed_positions/embedding", "model.decoder.embed_positions.weight"),
    Row("model/project_in/kernel", "model.decoder.project_in.weight", TRANSPOSE, _projected),
    *_rows("model/layers/self_attn/q_proj", _LAYER + "self_attn.q_proj", True),
    *_rows("model/layers/self_attn/k_proj", _LAYER + "self_attn.k_proj", True),
    *_rows("model/layers/self_attn/v_proj", _LAYER + "self_attn.v_proj", True),
    *_rows("model/layers/self_attn/out_proj", _LAYER + "self_attn.out_proj", True),
    *_rows("model/layers/self_attn_layer_norm", _LAYER + "self_attn_layer_norm", False),
    *_rows("model/layers/fc1", _LAYER + "fc1", True),
    *_rows("model/layers/fc2", _LAYER + "fc2", True),
    *_rows("model/layers/final_layer_norm", _LAYER + "final_layer_norm", False),
    Row("model/final_layer_norm/scale", "model.decoder.final_layer_norm.weight", when=_pre_norm),
    Row("model/final_layer_norm/bias", "model.decoder.final_layer_norm.bias", when=_pre_norm),
    Row("model/project_out/kernel", "model.decoder.project_out.weight", TRANSPOSE, _projected),
)
HF_PREFIX = "model."  # missing in old files
HF_IGNORED = ()

# unsupported config.json keys that change the numbers, with their only accepted value
HF_NEUTRAL = {
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}
