"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024): rotary positions, RMS norm, gated
MLP, grouped-query attention. Other families differ in a few fields. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from easyaira.hf.table import SAME, TRANSPOSE, VOCAB, Op, Row
from easyaira.models import layers
from easyaira.models.attention import Near, attention
from easyaira.models.embedding import Embedding
from easyaira.models.layers import GATES, Compute, Dropout, RMSNorm, RopeScaling, Scores
from easyaira.models.linear import Linear


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    # names that all architectures share
    max_positions = property(lambda self: self.max_position_embeddings)
    width = property(lambda self: self.hidden_size)
    heads = property(lambda self: self.num_attention_heads)
    kv_heads = property(lambda self: self.num_key_value_heads or self.num_attention_heads)
    activation = property(lambda self: self.hidden_act)

    head_width = property(lambda self: self.head_dim or self.hidden_size // self.heads)

    # what differs between the families
    qkv_bias = output_bias = property(lambda self: self.attention_bias)
    qk_norm = property(lambda self: None)  # RMS norm of queries and keys: each head, or all heads
    # RMS norms before and after attention, before and after the MLP
    norms = property(lambda self: ("input_layernorm", None, "post_attention_layernorm", None))
    norm_offset = property(lambda self: 0.0)  # of the norms' scales
    embedding_factor = property(lambda self: 1.0)
    scores = property(lambda self: Scores())
    # module between the MLP norms, and its name in a layer
    feed_forward = property(lambda self: (MLP, "mlp"))
    # per layer: the window of its attention (None: no layer has one), and the index of its rotary
    # table (None: there is only one)
    windows = property(lambda self: None)
    table_of_layer = property(lambda self: None)
    rotary_tables = property(lambda self: ((self.rope_theta, self.rope_scaling),))


class Kind(NamedTuple):
    """What differs between the layers of a model: entries per layer, or None."""

    window: jax.Array | None
    table: jax.Array | None


class Attention(nn.Module):
    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, angles, segment_ids, sides, near):
        c = self.config
        R, T, D = x_RTD.shape
        x_RTD = layers.whole(x_RTD)

        def heads(name, count):
            linear = Linear(count * c.head_width, c.initializer_range, c.qkv_bias, name=name)
            return linear(x_RTD).reshape(R, T, count, c.head_width)

        def norm(name, x):
            shape = x.shape if c.qk_norm == "each head" else (R, T, -1)
            normed = RMSNorm(c.rms_norm_eps, c.norm_offset, name=name)(x.reshape(shape))
            return normed.reshape(x.shape)

        q_RTHN = heads("q_proj", c.num_attention_heads)
        k_RTKN = heads("k_proj", c.kv_heads)
        v_RTKN = heads("v_proj", c.kv_heads)
        if c.qk_norm:
            q_RTHN, k_RTKN = norm("q_norm", q_RTHN), norm("k_norm", k_RTKN)
        q_RTHN, k_RTKN = (layers.rotate(x, angles) for x in (q_RTHN, k_RTKN))
        rows = (q_RTHN, k_RTKN, v_RTKN, segment_ids, sides)
        out = attention(*rows, self.compute, scores=c.scores, near=near)
        return layers.between(Linear(D, c.initializer_range, c.output_bias, name="o_proj")(out))


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x_RTD):
        c = self.config
        x_RTD = layers.whole(x_RTD)
        linear = partial(Linear, std=c.initializer_range, use_bias=c.mlp_bias)
        gate_RTF = layers.by_features(linear(c.intermediate_size, name="gate_proj")(x_RTD))
        up_RTF = layers.by_features(linear(c.intermediate_size, name="up_proj")(x_RTD))
        h_RTF = GATES[c.activation](gate_RTF, up_RTF)
        return layers.between(linear(x_RTD.shape[-1], name="down_proj")(h_RTF))


class Block(nn.Module):
    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, kind, angles, positions, segment_ids, sides):
        x_RTD = layers.between(x_RTD)
        c = self.config
        dropout = Dropout(self.compute.dropout)
        before_attention, after_attention, before_mlp, after_mlp = c.norms

        def norm(name, x):
            return x if name is None else RMSNorm(c.rms_norm_eps, c.norm_offset, name=name)(x)

        if kind.table is not None:
            angles = jax.tree.map(lambda tables: tables[kind.table], angles)
        near = Near(positions, kind.window)
        attend = Attention(c, self.compute, name="self_attn")
        attended = attend(norm(before_attention, x_RTD), angles, segment_ids, sides, near)
        x_RTD += dropout(norm(after_attention, attended))
        feed_forward, name = c.feed_forward
        projected = feed_forward(c, name=name)(norm(before_mlp, x_RTD))
        x_RTD += dropout(norm(after_mlp, projected))
        return x_RTD, None


class Llama(nn.Module):
    """Map tokens to hidden states after the final norm [R, T, D] and the token table [V, D]."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c = self.config
        padded = layers.padded_vocab(c.vocab_size)
        table = Embedding(
            c.vocab_size, c.hidden_size, c.initializer_range, padded, name="embed_tokens"
        )
        x_RTD = layers.between(table(tokens, self.compute.dtype))
        x_RTD *= jnp.asarray(c.embedding_factor, x_RTD.dtype)
        x_RTD = Dropout(self.compute.dropout)(x_RTD)
        windows, table_of_layer = layers.hiding(c.windows, self.compute), c.table_of_layer
        kind = Kind(*(None if x is None else jnp.array(x) for x in (windows, table_of_layer)))
        angles = [layers.rotary(positions, c.head_width, *given) for given in c.rotary_tables]
        angles = angles[0] if kind.table is None else jax.tree.map(lambda *x: jnp.stack(x), *angles)
        rows = (angles, positions, segment_ids, sides)
        in_axes = (0, *(nn.broadcast,) * len(rows))
        blocks = layers.layers(Block, c.num_hidden_layers, self.compute, in_axes)
        x_RTD, _ = blocks(c, self.compute, name="layers")(x_RTD, kind, *rows)
        return RMSNorm(c.rms_norm_eps, c.norm_offset, name="norm")(x_RTD), table.embedding


PARTITION_RULES = (
    (r"embed_tokens/embedding$", P("tp", "fsdp")),
    (r"(q|k|v|gate|up)_proj/kernel$", P("fsdp", "tp")),
    (r"(o|down)_proj/kernel$", P("tp", "fsdp")),
    (r"norm/scale$", P()),
    (r"(q|k|v|gate|up)_proj/bias$", P("tp")),
    (r"(o|down)_proj/bias$", P()),
)

_qkv_bias, _output_bias = attrgetter("qkv_bias"), attrgetter("output_bias")
_mlp_bias, _qk_norm = attrgetter("mlp_bias"), attrgetter("qk_norm")


def _norm(name: str) -> Row:
    """Weight-table row of a layer's norm, where the configuration has it."""
    theirs = f"{_LAYER}{name}.weight"
    return Row(f"model/layers/{name}/scale", theirs, when=lambda config: name in config.norms)


_LAYER = "model.layers.{}."
HF_ROWS = (
    Row("model/embed_tokens/embedding", "model.embed_tokens.weight", VOCAB),
    _norm("input_layernorm"),
    Row("model/layers/self_attn/q_proj/kernel", _LAYER + "self_attn.q_proj.weight", TRANSPOSE),
    Row("model/layers/self_attn/k_proj/kernel", _LAYER + "self_attn.k_proj.weight", TRANSPOSE),
    Row("model/layers/self_attn/v_proj/kernel", _LAYER + "self_attn.v_proj.weight", TRANSPOSE),
    Row("model/layers/self_attn/o_proj/kernel", _LAYER + "self_attn.o_proj.weight", TRANSPOSE),
    Row("model/layers/self_attn/q_proj/bias", _LAYER + "self_attn.q_proj.bias", when=_qkv_bias),
    Row("model/layers/self_attn/k_proj/bias", _LAYER + "self_attn.k_proj.bias", when=_qkv_bias),
    Row("model/layers/self_attn/v_proj/bias", _LAYER + "self_attn.v_proj.bias", when=_qkv_bias),
    Row("model/layers/self_attn/o_proj/bias", _LAYER + "self_attn.o_proj.bias", when=_output_bias),
    Row("model/layers/self_attn/q_norm/scale", _LAYER + "self_attn.q_norm.weight", when=_qk_norm),
    Row("model/layers/self_attn/k_norm/scale", _LAYER + "self_attn.k_norm.weight", when=_qk_norm),
    _norm("post_attention_layernorm"),
    _norm("pre_feedforward_layernorm"),
    _norm("post_feedforward_layernorm"),
    Row("model/layers/mlp/gate_proj/kernel", _LAYER + "mlp.gate_proj.weight", TRANSPOSE),
    Row("model/layers/mlp/up_proj/kernel", _LAYER + "mlp.up_proj.weight", TRANSPOSE),
    Row("model/layers/mlp/down_proj/kernel", _LAYER + "mlp.down_proj.weight", TRANSPOSE),
    Row("model/layers/mlp/gate_proj/bias", _LAYER + "mlp.gate_proj.bias", when=_mlp_bias),
    Row("model/layers/mlp/up_proj/bias", _LAYER + "mlp.up_proj.bias", when=_mlp_bias),
    Row("model/layers/mlp/down_proj/bias", _LAYER + "mlp.down_proj.bias", when=_mlp_bias),
    Row("model/norm/scale", "model.norm.weight"),
)
HF_PREFIX = "model."
HF_IGNORED = (r"\.rotary_emb\.inv_freq$",)  # a buffer in old files, derived from rope_theta

# unsupported config.json keys that change the numbers, with their only accepted value
HF_NEUTRAL = {"sliding_window": None, "rope_interleaved": False}


def easylm_rows(config: LlamaConfig) -> tuple[Row, ...]:
    """Weight table of EasyLM's checkpoints, whose kernels are [in, out] like ours.

    They rotate neighbouring features of a head, (0, 1), (2, 3), ...; `layers.rotate` and Hugging
    Face rotate (0, N/2), (1, N/2 + 1), ... So the columns of q and k are reordered."""
    half = config.head_width // 2

    def reordered(kernel: np.ndarray, *pairs: int) -> np.ndarray:
        shape = kernel.shape
        return kernel.reshape(shape[0], -1, *pairs).swapaxes(2, 3).reshape(shape)

    rotated = Op(lambda x: reordered(x, half, 2), lambda x: reordered(x, 2, half))
    layer, h = "model/layers/", "transformer/h/{}/"
    return (
        Row("model/embed_tokens/embedding", "transformer/wte/embedding", VOCAB),
        Row(f"{layer}input_layernorm/scale", h + "attention_norm/kernel"),
        Row(f"{layer}self_attn/q_proj/kernel", h + "attention/wq/kernel", rotated),
        Row(f"{layer}self_attn/k_proj/kernel", h + "attention/wk/kernel", rotated),
        Row(f"{layer}self_attn/v_proj/kernel", h + "attention/wv/kernel"),
        Row(f"{layer}self_attn/o_proj/kernel", h + "attention/wo/kernel"),
        Row(f"{layer}post_attention_layernorm/scale", h + "ffn_norm/kernel"),
        Row(f"{layer}mlp/gate_proj/kernel", h + "feed_forward/w1/kernel"),
        Row(f"{layer}mlp/down_proj/kernel", h + "feed_forward/w2/kernel"),
        Row(f"{layer}mlp/up_proj/kernel", h + "feed_forward/w3/kernel"),
        Row("model/norm/scale", "transformer/ln_f/kernel"),
        Row("lm_head/kernel", "lm_head/kernel", replace(SAME, vocab_axis=1)),
        Row("score/linear/kernel", "score/kernel"),
    )
