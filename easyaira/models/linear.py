"""Linear layers, with optional adapters and quantised kernels. Shapes: see layers.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from easyaira.models.parameter import parameter
from easyaira.models.product import add_bias, by_rows, linear
from easyaira.models.quantize import dequantize


class Linear(nn.Module):
    """x @ kernel + bias; `features` may have several axes, for fused products.

    A frozen kernel may be quantised (models/quantize.py) or held by rows. If the parameters include
    an adapter (lora/adapter.py), its product is added: Hu et al. (2021), LoRA, eq. 3. If they
    include gains (lora/dora.py), the sum is multiplied by them: Liu et al. (2024), DoRA, eq. 5.
    """

    features: int | tuple[int, ...]
    std: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        if isinstance(held := self.get_variable("params", "kernel"), Mapping):
            product = partial(_held_product, held)
        else:
            init = nn.initializers.normal(self.std)
            kernel = parameter(self, "kernel", init, (x.shape[-1], *features))
            product = partial(_product, kernel)
        y = product(x)
        if self.has_variable("params", "lora_a"):
            y = self._adapted(x, y, product)
        if self.use_bias:
            y = add_bias(y, parameter(self, "bias", nn.initializers.zeros, features))
        return y

    def _adapted(self, x: jax.Array, y: jax.Array, product: Callable) -> jax.Array:
        """Add the adapter to y = x @ kernel."""
        a, b, gain = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "gain"))
        dropped = self._drop(x)
        added = linear(linear(dropped, a), b)
        if gain is None:
            return y + added
        if dropped is x:
            return _scaled(y + added, gain)
        # as in peft, dropout acts on all that is multiplied by the gain, and not on the base
        of_dropped = product(dropped)
        return y - of_dropped + _scaled(of_dropped + added, gain)

    def _drop(self, x: jax.Array) -> jax.Array:
        """Apply `Dropout` to the adapter's input; the rate is stored with the adapter."""
        rate = self.get_variable("params", "lora_dropout")
        if rate is None or not self.has_rng("dropout"):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)


BY_ROWS = "by_rows"  # a kernel [..., K] with the inputs as its last axis


def _held_product(held: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    if BY_ROWS in held:
        return by_rows(x, held[BY_ROWS], x.dtype)
    return _quantized_product(held, x)


def _product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return linear(x, kernel)


@jax.checkpoint
def _scaled(y: jax.Array, gain: jax.Array) -> jax.Array:
    """gain * y in float32, rounded once. The backward pass stores y in its own dtype."""
    return (y.astype(jnp.float32) * gain).astype(y.dtype)


@jax.checkpoint
def _quantized_product(held: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """x @ kernel. The backward pass stores the codes and recomputes the kernel, instead of storing
    the dequantised kernel of every layer."""
    return linear(x, dequantize(held, x.shape[-1], x.dtype))
