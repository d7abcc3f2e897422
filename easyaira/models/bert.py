"""BERT (Devlin et al., 2019): bidirectional attention, learned positions, post-norm blocks, and a
score from the first token. RoBERTa shares the encoder. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from easyaira.hf.table import TRANSPOSE, VOCAB, Row
from easyaira.models import layers
from easyaira.models.attention import attention
from easyaira.models.embedding import Embedding
from easyaira.models.heads import ScoreHead
from easyaira.models.layers import ACTIVATIONS, Compute, Dropout, LayerNorm
from easyaira.models.linear import Linear


@dataclass(frozen=True)
class BertConfig:
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    # names that all architectures share
    max_positions = property(lambda self: self.max_position_embeddings - self.offset)
    width = property(lambda self: self.hidden_size)
    heads = kv_heads = property(lambda self: self.num_attention_heads)
    activation = property(lambda self: self.hidden_act)

    offset = 0  # row of the position table for the first token


class Attention(nn.Module):
    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, segment_ids, sides):
        c = self.config
        R, T, D = x_RTD.shape
        x_RTD = layers.whole(x_RTD)
        linear = partial(Linear, D, c.initializer_range, use_bias=True)
        heads = (R, T, c.num_attention_heads, D // c.num_attention_heads)
        q, k, v = (linear(name=name)(x_RTD).reshape(heads) for name in ("query", "key", "value"))
        out = attention(q, k, v, segment_ids, sides, self.compute, causal=False)
        return layers.between(linear(name="output")(out))


class Block(nn.Module):
    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, segment_ids, sides):
        x_RTD = layers.between(x_RTD)
        c = self.config
        dropout = Dropout(self.compute.dropout)
        norm = partial(LayerNorm, c.layer_norm_eps)
        linear = partial(Linear, std=c.initializer_range, use_bias=True)
        attended = Attention(c, self.compute, name="attention")(x_RTD, segment_ids, sides)
        x_RTD = norm(name="attention_norm")(x_RTD + dropout(attended))
        h_RTF = linear(c.intermediate_size, name="intermediate")(layers.whole(x_RTD))
        h_RTF = ACTIVATIONS[c.hidden_act](layers.by_features(h_RTF))
        fed = layers.between(linear(c.hidden_size, name="out")(h_RTF))
        x_RTD = norm(name="output_norm")(x_RTD + dropout(fed))
        return x_RTD, None


class Bert(nn.Module):
    """Map tokens to hidden states [R, T, D] and the token table [V, D]. All tokens have type 0."""

    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c, dtype = self.config, self.compute.dtype
        table = partial(Embedding, width=c.hidden_size, std=c.initializer_range)
        padded = layers.padded_vocab(c.vocab_size)
        words = table(c.vocab_size, padded_size=padded, name="word_embeddings")
        places = table(c.max_position_embeddings, name="position_embeddings")
        types = table(c.type_vocab_size, name="token_type_embeddings")
        x_RTD = words(tokens, dtype) + places(positions + c.offset, dtype)
        x_RTD += types(jnp.zeros_like(tokens), dtype)
        x_RTD = LayerNorm(c.layer_norm_eps, name="embeddings_norm")(layers.between(x_RTD))
        x_RTD = Dropout(self.compute.dropout)(x_RTD)
        blocks = layers.layers(Block, c.num_hidden_layers, self.compute)
        x_RTD, _ = blocks(c, self.compute, name="layer")(x_RTD, segment_ids, sides)
        return x_RTD, words.embedding


class PooledScore(nn.Module):
    """Map states of first tokens [..., D] to scores [...]: a tanh layer, then a linear layer."""

    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, states):
        c = self.config
        linear = partial(Linear, std=c.initializer_range, use_bias=True)
        pooled = jnp.tanh(linear(c.hidden_size, name="pooler")(states))
        return linear(1, name="classifier")(Dropout(self.compute.dropout)(pooled))[..., 0]


PARTITION_RULES = (
    (r"word_embeddings/embedding$", P("tp", "fsdp")),
    (r"(position|token_type)_embeddings/embedding$", P(None, ("fsdp", "tp"))),
    (r"attention/(query|key|value)/kernel$", P("fsdp", "tp")),
    (r"layer/intermediate/kernel$", P("fsdp", "tp")),
    (r"(attention/output|layer/out)/kernel$", P("tp", "fsdp")),
    (r"(attention/(query|key|value)|layer/intermediate)/bias$", P("tp")),
    (r"(attention/output|layer/out)/bias$", P()),
    (r"_norm/(scale|bias)$", P()),
)


def dense_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """Weight-table rows of a linear layer: weight and bias."""
    return (
        Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE),
        Row(f"{ours}/bias", f"{theirs}.bias"),
    )


def norm_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """Weight-table rows of a norm: weight and bias."""
    return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


def encoder_rows(prefix: str) -> tuple[Row, ...]:
    """Weight-table rows of the encoder, whose tensor names start with `prefix`."""
    embeddings, layer = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{}}."
    return (
        Row("model/word_embeddings/embedding", embeddings + "word_embeddings.weight", VOCAB),
        Row("model/position_embeddings/embedding", embeddings + "position_embeddings.weight"),
        Row("model/token_type_embeddings/embedding", embeddings + "token_type_embeddings.weight"),
        *norm_rows("model/embeddings_norm", embeddings + "LayerNorm"),
        *dense_rows("model/layer/attention/query", layer + "attention.self.query"),
        *dense_rows("model/layer/attention/key", layer + "attention.self.key"),
        *dense_rows("model/layer/attention/value", layer + "attention.self.value"),
        *dense_rows("model/layer/attention/output", layer + "attention.output.dense"),
        *norm_rows("model/layer/attention_norm", layer + "attention.output.LayerNorm"),
        *dense_rows("model/layer/intermediate", layer + "intermediate.dense"),
        *dense_rows("model/layer/out", layer + "output.dense"),
        *norm_rows("model/layer/output_norm", layer + "output.LayerNorm"),
    )


HF_ROWS = encoder_rows("bert.")
HF_PREFIX = "bert."  # missing in files of a bare BertModel
HF_IGNORED = (r"^bert\.cls\.",)  # heads of the pretraining tasks
# names in old files -> today's
HF_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

# unsupported config.json keys that change the numbers, with their only accepted value
HF_NEUTRAL = {
    "add_cross_attention": False,
    "is_decoder": False,
    "position_embedding_type": "absolute",
}

SCORE_HEAD = ScoreHead(
    PooledScore,
    rules=(
        (r"^score/pooler/kernel$", P("fsdp", "tp")),
        (r"^score/pooler/bias$", P("tp")),
        (r"^score/classifier/kernel$", P("tp", None)),
        (r"^score/classifier/bias$", P()),
    ),
    rows=(
        *dense_rows("score/pooler", "bert.pooler.dense"),
        *dense_rows("score/classifier", "classifier"),
    ),
    first_token=True,
)
