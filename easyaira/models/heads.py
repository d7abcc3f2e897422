"""What stands on a backbone. Shapes: see layers.py."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from easyaira.models.layers import Compute
from easyaira.weights import VOCAB_TRANSPOSE, Row


class Kernel(nn.Module):
    """A matrix that is multiplied elsewhere."""

    shape: tuple[int, int]
    std: float
    columns: int  # the rest is padding, zero

    @nn.compact
    def __call__(self) -> jax.Array:
        def init(key, shape, dtype=jax.numpy.float32):
            drawn = jax.random.normal(key, (shape[0], self.columns), dtype) * self.std
            return jax.numpy.zeros(shape, dtype).at[:, : self.columns].set(drawn)

        return self.param("kernel", init, self.shape)


class CausalLM(nn.Module):
    """Tokens to hidden states [R, T, D] and the head [D, V] that turns them into logits.

    The product of the two is left to the loss, which never holds all of it (losses.token_logps).
    A tied head is the token table itself.
    """

    backbone: type[nn.Module]
    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c = self.config
        backbone = self.backbone(c, self.compute, name="model")
        hidden_RTD, table_VD = backbone(tokens, positions, segment_ids, sides)
        if c.tie_word_embeddings:
            return hidden_RTD, table_VD.T
        shape = (hidden_RTD.shape[-1], table_VD.shape[0])
        return hidden_RTD, Kernel(shape, c.initializer_range, c.vocab_size, name="lm_head")()


LM_HEAD_RULES = ((r"^lm_head/kernel$", P("fsdp", "tp")),)
LM_HEAD_ROWS = (Row("lm_head/kernel", "lm_head.weight", VOCAB_TRANSPOSE),)
