"""Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in the place of each MLP.

Every expert computes every token, and its result has weight 0 where the router did not choose it.
So the order of sums and the sharding are those of dense MLPs, whatever the router chooses; with 2
of 8 experts per token, 4 times as many products are computed as needed. Shapes: see layers.py, and
E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from easyaira.hf.table import TRANSPOSE, Row
from easyaira.models import layers, llama
from easyaira.models.layers import GATES
from easyaira.models.linear import Linear
from easyaira.models.llama import Llama
from easyaira.models.mistral import MistralConfig
from easyaira.models.product import packed, row_dot, unpacked
from easyaira.models.routing import weights_of


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Sizes under Hugging Face's names, with its defaults."""

    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False  # ignored: sft.router_aux_loss decides

    feed_forward = property(lambda self: (Experts, "block_sparse_moe"))


@jax.custom_vjp
def _weighted(y_RTD: jax.Array, weight_RT: jax.Array) -> jax.Array:
    """weight * y in float32. The backward pass keeps y in its own dtype."""
    return y_RTD.astype(jnp.float32) * weight_RT[..., None]


def _weighted_backward(saved, d_sum):
    y, weight, of_dtype = saved
    y = unpacked(y, of_dtype.dtype)
    return (d_sum * weight[..., None]).astype(y.dtype), row_dot(d_sum, y)


_weighted.defvjp(
    lambda y, weight: (_weighted(y, weight), (packed(y), weight, jnp.zeros((), y.dtype))),
    _weighted_backward,
)


class Expert(nn.Module):
    config: MixtralConfig

    @nn.compact
    def __call__(self, x_RTD):
        c = self.config
        linear = partial(Linear, std=c.initializer_range)
        gate_RTF = layers.by_features(linear(c.intermediate_size, name="w1")(x_RTD))
        up_RTF = layers.by_features(linear(c.intermediate_size, name="w3")(x_RTD))
        h_RTF = GATES[c.activation](gate_RTF, up_RTF)
        return layers.between(linear(x_RTD.shape[-1], name="w2")(h_RTF))


class Experts(nn.Module):
    """Sum of the experts' results, with the router's weights. The router's logits are stored in the
    collection `router` if the caller makes it mutable."""

    config: MixtralConfig

    @nn.compact
    def __call__(self, x_RTD):
        c = self.config
        x_RTD = layers.whole(x_RTD)
        logits_RTE = Linear(c.num_local_experts, c.initializer_range, name="gate")(x_RTD)
        self.sow("router", "logits", logits_RTE.astype(jnp.float32))
        weights_RTE = weights_of(logits_RTE, c.num_experts_per_tok)
        total_RTD = jnp.zeros(x_RTD.shape, jnp.float32)
        for i in range(c.num_local_experts):
            y_RTD = Expert(c, name=f"experts_{i}")(x_RTD)
            total_RTD += _weighted(y_RTD, weights_RTE[..., i])
        return layers.between(total_RTD.astype(x_RTD.dtype))


class Mixtral(Llama):
    """Llama under Mixtral's name."""


PARTITION_RULES = (
    *llama.PARTITION_RULES,
    (r"/w(1|3)/kernel$", P("fsdp", "tp")),
    (r"/w2/kernel$", P("tp", "fsdp")),
    (r"/gate/kernel$", P("fsdp", None)),
)

_MOE, _THEIRS = "model/layers/block_sparse_moe/", "model.layers.{}.block_sparse_moe."
# Only attention has adapters. The router is not quantised: its weights are few, and its choice is
# sensitive to their rounding.
HF_ROWS = (
    *(row for row in llama.HF_ROWS if "/mlp/" not in row.ours),
    Row(
        _MOE + "gate/kernel", _THEIRS + "gate.weight", TRANSPOSE, adaptable=False, quantizable=False
    ),
    *(
        Row(
            f"{_MOE}experts_{{expert}}/{name}/kernel",
            f"{_THEIRS}experts.{{expert}}.{name}.weight",
            TRANSPOSE,
            adaptable=False,
        )
        for name in ("w1", "w2", "w3")
    ),
)
HF_PREFIX, HF_IGNORED = llama.HF_PREFIX, llama.HF_IGNORED
HF_NEUTRAL = {"attention_bias": False, "mlp_bias": False, "router_jitter_noise": 0.0}
