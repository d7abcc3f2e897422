"""Linear layers, with an adapter or a quantised kernel. Shapes: see layers.py."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from easyaira.models.quantize import dequantize


class Linear(nn.Module):
    """x @ kernel + bias; `features` may have several axes, for products that are cut apart.

    A frozen kernel may be held in fewer bits (models/quantize.py). If an adapter's matrices stand
    beside the kernel (lora/adapter.py), their product is added: Hu et al. (2021), LoRA, eq. 3.
    """

    features: int | tuple[int, ...]
    std: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        if isinstance(held := self.get_variable("params", "kernel"), Mapping):
            y = _quantized_product(x, held)
        else:
            init = nn.initializers.normal(self.std)
            kernel = self.param("kernel", init, (x.shape[-1], *features))
            y = jnp.tensordot(x, kernel.astype(x.dtype), 1)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, features).astype(x.dtype)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", f"lora_{m}").astype(x.dtype) for m in "ab")
            y += jnp.tensordot(self._drop(x) @ a, b, 1)
        return y

    def _drop(self, x: jax.Array) -> jax.Array:
        """Dropout of the adapter's input, whose rate stands beside the adapter; as `Dropout`."""
        rate = self.get_variable("params", "lora_dropout")
        if rate is None or not self.has_rng("dropout"):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)


@partial(jax.checkpoint, prevent_cse=False)
def _quantized_product(x: jax.Array, held: Mapping[str, jax.Array]) -> jax.Array:
    """x @ kernel. What is kept for the backward pass are the codes and not the kernel, of which
    there would be one for each layer."""
    return jnp.tensordot(x, dequantize(held, x.shape[-1], x.dtype), 1)
