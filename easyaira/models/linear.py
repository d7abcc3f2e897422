"""Linear layers, with optional adapters and quantised kernels. Shapes: see layers.py."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from easyaira.models.product import linear
from easyaira.models.quantize import dequantize


class Linear(nn.Module):
    """x @ kernel + bias; `features` may have several axes, for fused products.

    A frozen kernel may be quantised (models/quantize.py). If the parameters include an adapter
    (lora/adapter.py), its product is added: Hu et al. (2021), LoRA, eq. 3.
    """

    features: int | tuple[int, ...]
    std: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        if isinstance(quantized := self.get_variable("params", "kernel"), Mapping):
            y = _quantized_product(x, quantized)
        else:
            init = nn.initializers.normal(self.std)
            kernel = self.param("kernel", init, (x.shape[-1], *features))
            y = linear(x, kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, features).astype(x.dtype)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", f"lora_{m}") for m in "ab")
            y += linear(linear(self._drop(x), a), b)
        return y

    def _drop(self, x: jax.Array) -> jax.Array:
        """Apply `Dropout` to the adapter's input; the rate is stored with the adapter."""
        rate = self.get_variable("params", "lora_dropout")
        if rate is None or not self.has_rng("dropout"):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)


@partial(jax.checkpoint, prevent_cse=False)
def _quantized_product(x: jax.Array, quantized: Mapping[str, jax.Array]) -> jax.Array:
    """x @ kernel. The backward pass stores the codes and recomputes the kernel, instead of storing
    the dequantised kernel of every layer."""
    return linear(x, dequantize(quantized, x.shape[-1], x.dtype))
