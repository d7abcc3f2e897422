"""GPT-2 (Radford et al., 2019): learned positions, pre-norm blocks. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from easyaira.hf.table import SPLIT_QKV, VOCAB, Row
from easyaira.models import layers
from easyaira.models.attention import attention
from easyaira.models.embedding import Embedding
from easyaira.models.layers import ACTIVATIONS, Compute, Dropout, LayerNorm
from easyaira.models.linear import Linear


@dataclass(frozen=True)
class GPT2Config:
    """Sizes under Hugging Face's names, with its defaults."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    # names that all architectures share
    max_positions = property(lambda self: self.n_positions)
    width = property(lambda self: self.n_embd)
    heads = kv_heads = property(lambda self: self.n_head)
    activation = property(lambda self: self.activation_function)


class Attention(nn.Module):
    config: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, segment_ids, sides):
        c = self.config
        R, T, D = x_RTD.shape
        x_RTD = layers.whole(x_RTD)
        # [D, 3, D] and not [D, 3 D]: tensor parallelism shards heads and never separates q from k
        qkv = Linear((3, D), c.initializer_range, use_bias=True, name="c_attn")(x_RTD)
        # split, since the gradients of slices would be padded and added
        parts = jax.lax.split(qkv, (1, 1, 1), axis=2)
        q, k, v = (part.reshape(R, T, c.n_head, D // c.n_head) for part in parts)
        out_RTD = attention(q, k, v, segment_ids, sides, self.compute)
        residual_std = c.initializer_range / (2 * c.n_layer) ** 0.5
        out_RTD = Linear(D, residual_std, use_bias=True, name="c_proj")(out_RTD)
        return layers.between(out_RTD)


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x_RTD):
        c = self.config
        D = x_RTD.shape[-1]
        x_RTD = layers.whole(x_RTD)
        h_RTF = Linear(c.n_inner or 4 * D, c.initializer_range, use_bias=True, name="c_fc")(x_RTD)
        h_RTF = ACTIVATIONS[c.activation_function](layers.by_features(h_RTF))
        residual_std = c.initializer_range / (2 * c.n_layer) ** 0.5
        return layers.between(Linear(D, residual_std, use_bias=True, name="c_proj")(h_RTF))


class Block(nn.Module):
    config: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(self, x_RTD, segment_ids, sides):
        x_RTD = layers.between(x_RTD)
        norm = partial(LayerNorm, self.config.layer_norm_epsilon)
        dropout = Dropout(self.compute.dropout)
        attend = Attention(self.config, self.compute, name="attn")
        x_RTD += dropout(attend(norm(name="ln_1")(x_RTD), segment_ids, sides))
        x_RTD += dropout(MLP(self.config, name="mlp")(norm(name="ln_2")(x_RTD)))
        return x_RTD, None


class GPT2(nn.Module):
    """Map tokens to hidden states after the final norm [R, T, D] and the token table [V, D]."""

    config: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c, dtype = self.config, self.compute.dtype
        padded = layers.padded_vocab(c.vocab_size)
        wte = Embedding(c.vocab_size, c.n_embd, c.initializer_range, padded, name="wte")
        wpe = Embedding(c.n_positions, c.n_embd, c.initializer_range, name="wpe")
        x_RTD = layers.between(wte(tokens, dtype) + wpe(positions, dtype))
        x_RTD = Dropout(self.compute.dropout)(x_RTD)
        blocks = layers.layers(Block, c.n_layer, self.compute)(c, self.compute, name="h")
        x_RTD, _ = blocks(x_RTD, segment_ids, sides)
        return LayerNorm(c.layer_norm_epsilon, name="ln_f")(x_RTD), wte.embedding


PARTITION_RULES = (
    (r"wte/embedding$", P("tp", "fsdp")),
    (r"wpe/embedding$", P(None, ("fsdp", "tp"))),
    (r"c_attn/kernel$", P("fsdp", None, "tp")),
    (r"c_fc/kernel$", P("fsdp", "tp")),
    (r"c_proj/kernel$", P("tp", "fsdp")),
    (r"(c_attn|c_fc)/bias$", P("tp")),
    (r"c_proj/bias$", P()),
    (r"ln_(1|2|f)/(scale|bias)$", P()),
)

_LAYER = "transformer.h.{}."
HF_ROWS = (  # Conv1D stores [in, out], as here: no transposes
    Row("model/wte/embedding", "transformer.wte.weight", VOCAB),
    Row("model/wpe/embedding", "transformer.wpe.weight"),
    Row("model/h/ln_1/scale", _LAYER + "ln_1.weight"),
    Row("model/h/ln_1/bias", _LAYER + "ln_1.bias"),
    Row("model/h/attn/c_attn/kernel", _LAYER + "attn.c_attn.weight", SPLIT_QKV),
    Row("model/h/attn/c_attn/bias", _LAYER + "attn.c_attn.bias", SPLIT_QKV),
    Row("model/h/attn/c_proj/kernel", _LAYER + "attn.c_proj.weight"),
    Row("model/h/attn/c_proj/bias", _LAYER + "attn.c_proj.bias"),
    Row("model/h/ln_2/scale", _LAYER + "ln_2.weight"),
    Row("model/h/ln_2/bias", _LAYER + "ln_2.bias"),
    Row("model/h/mlp/c_fc/kernel", _LAYER + "mlp.c_fc.weight"),
    Row("model/h/mlp/c_fc/bias", _LAYER + "mlp.c_fc.bias"),
    Row("model/h/mlp/c_proj/kernel", _LAYER + "mlp.c_proj.weight"),
    Row("model/h/mlp/c_proj/bias", _LAYER + "mlp.c_proj.bias"),
    Row("model/ln_f/scale", "transformer.ln_f.weight"),
    Row("model/ln_f/bias", "transformer.ln_f.bias"),
)
HF_PREFIX = "transformer."  # missing in old files
HF_IGNORED = (r"\.attn\.(bias|masked_bias)$",)  # causal masks, not weights

# unsupported config.json keys that change the numbers, with their only accepted value
HF_NEUTRAL = {
    "add_cross_attention": False,
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}
