"""BLOOM (Le Scao et al., 2022): positions by linear biases of attention scores (ALiBi), and a norm
after the embedding. Shapes: see layers.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from easyaira.hf.table import VOCAB, Row
from easyaira.models import layers
from easyaira.models.attention import Near, attention
from easyaira.models.embedding import Embedding
from easyaira.models.gpt_neox import MLP, linear_rows, norm_rows
from easyaira.models.layers import Compute, Dropout, LayerNorm, Scores
from easyaira.models.linear import Linear


@dataclass(frozen=True)
class BloomConfig:
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 250880
    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    seq_length: int = 2048  # of the texts in pre-training; ALiBi itself has no longest text
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    # names that all architectures share
    max_positions = property(lambda self: self.seq_length)
    width = property(lambda self: self.hidden_size)
    intermediate_size = property(lambda self: 4 * self.hidden_size)
    heads = kv_heads = property(lambda self: self.n_head)
    activation = property(lambda self: "gelu_pytorch_tanh")

    scores = property(lambda self: Scores(slopes=alibi_slopes(self.n_head)))


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Slope of each head: Press et al. (2022), Train Short, Test Long, section 3.

    2^(-8 i / n) for i = 1 ... n, with n the number of heads; if that is no power of 2, those of the
    power below it, then every other one of the power above it, as in the authors' code."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return tuple(slopes)


class Attention(nn.Module):
    config: BloomConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, positions, segment_ids, sides):
        c = self.config
        R, T, D = x_RTD.shape
        x_RTD = layers.whole(x_RTD)
        linear = partial(Linear, std=c.initializer_range, use_bias=True)
        # q, k and v of a head lie together, so tensor parallelism shards heads
        qkv = linear(3 * D, name="query_key_value")(x_RTD).reshape(R, T, c.heads, 3, D // c.heads)
        # split, since the gradients of slices would be padded and added
        q, k, v = (part[:, :, :, 0] for part in jax.lax.split(qkv, (1, 1, 1), axis=3))
        rows = (q, k, v, segment_ids, sides)
        out_RTD = attention(*rows, self.compute, scores=c.scores, near=Near(positions))
        return layers.between(linear(D, name="dense")(out_RTD))


class Block(nn.Module):
    config: BloomConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, positions, segment_ids, sides):
        x_RTD = layers.between(x_RTD)
        c = self.config
        norm, dropout = partial(LayerNorm, c.layer_norm_epsilon), Dropout(self.compute.dropout)
        attend = Attention(c, self.compute, name="self_attention")
        normed = norm(name="input_layernorm")(x_RTD)
        x_RTD += dropout(attend(normed, positions, segment_ids, sides))
        normed = norm(name="post_attention_layernorm")(x_RTD)
        return x_RTD + dropout(MLP(c, name="mlp")(normed)), None


class Bloom(nn.Module):
    """Map tokens to hidden states after the final norm [R, T, D] and the token table [V, D]."""

    config: BloomConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c = self.config
        padded = layers.padded_vocab(c.vocab_size)
        size = (c.vocab_size, c.width)
        table = Embedding(*size, c.initializer_range, padded, name="word_embeddings")
        norm = partial(LayerNorm, c.layer_norm_epsilon)
        x_RTD = layers.between(table(tokens, self.compute.dtype))
        x_RTD = Dropout(self.compute.dropout)(norm(name="word_embeddings_layernorm")(x_RTD))
        blocks = layers.layers(Block, c.n_layer, self.compute)(c, self.compute, name="h")
        x_RTD, _ = blocks(x_RTD, positions, segment_ids, sides)
        return norm(name="ln_f")(x_RTD), table.embedding


PARTITION_RULES = (
    (r"word_embeddings/embedding$", P("tp", "fsdp")),
    (r"(query_key_value|dense_h_to_4h)/kernel$", P("fsdp", "tp")),
    (r"(dense|dense_4h_to_h)/kernel$", P("tp", "fsdp")),
    (r"(query_key_value|dense_h_to_4h)/bias$", P("tp")),
    (r"(dense|dense_4h_to_h)/bias$", P()),
    (r"(norm|ln_f)/(scale|bias)$", P()),
)

_LAYER = "transformer.h.{}."
HF_ROWS = (
    Row("model/word_embeddings/embedding", "transformer.word_embeddings.weight", VOCAB),
    *norm_rows("word_embeddings_layernorm", "transformer.word_embeddings_layernorm"),
    *norm_rows("h/input_layernorm", _LAYER + "input_layernorm"),
    *linear_rows("h/self_attention/query_key_value", _LAYER + "self_attention.query_key_value"),
    *linear_rows("h/self_attention/dense", _LAYER + "self_attention.dense"),
    *norm_rows("h/post_attention_layernorm", _LAYER + "post_attention_layernorm"),
    *linear_rows("h/mlp/dense_h_to_4h", _LAYER + "mlp.dense_h_to_4h"),
    *linear_rows("h/mlp/dense_4h_to_h", _LAYER + "mlp.dense_4h_to_h"),
    *norm_rows("ln_f", "transformer.ln_f"),
)
HF_PREFIX = "transformer."  # missing in BLOOM's own files
HF_IGNORED = ()
HF_ALIASES = {
    "n_embed": "hidden_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}

# unsupported config.json keys that change the numbers, with their only accepted value
HF_NEUTRAL = {
    "apply_residual_connection_post_layernorm": False,
    "slow_but_exact": False,
    # settings of the program that trained BLOOM; transformers does not read them
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "offset_alibi": 100,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
}
