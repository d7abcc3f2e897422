"""Weight-decomposed adapters (DoRA): one magnitude m for each output beside the matrices A and B.

The tuned kernel is m (W + A B) / ||W + A B||, with the norm of each output over its inputs: Liu et
al. (2024), DoRA: Weight-Decomposed Low-Rank Adaptation, eq. 5. The norm is a constant for the
gradient, as in section 4.3.

Shapes: L layers, K inputs, r rank, U outputs (one or two axes). B includes the adapter's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from easyaira.models.quantize import dequantize

TINY = jnp.finfo(jnp.float32).tiny  # norms are at least this: an output without weights remains 0


@partial(jax.jit, static_argnames="dtype")
def norms(held: Any, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Norms [L, U] of W + A B over inputs; float32. One layer after the other, so that memory holds
    W + A B of a single layer.

    Args:
        held: kernels [L, K, U], or their quantised form (models/quantize.py).
        a, b: [L, K, r] and [L, r, U].
        dtype: computing dtype, to which kernels are rounded.
    """

    def of_layer(layer: tuple) -> jax.Array:
        held, a, b = layer
        quantized = isinstance(held, Mapping)
        kernel = dequantize(held, len(a), dtype) if quantized else held.astype(dtype)
        # without the barrier, XLA's CPU takes longer for this sum than for a small model's update
        tuned = jax.lax.optimization_barrier(kernel.astype(jnp.float32) + _product(a, b))
        return jnp.maximum(jnp.sqrt(jnp.square(tuned).sum(0)), TINY)

    return jax.lax.map(of_layer, (held, a, b))


def gains(m: jax.Array, held: Any, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """m / ||W + A B||: factors [L, U] of the outputs of W + A B. Only m has a gradient."""
    return m / norms(held, *jax.lax.stop_gradient((a, b)), dtype)


@jax.jit
def merged(kernel: jax.Array, a: jax.Array, b: jax.Array, m: jax.Array | None) -> jax.Array:
    """W + A B [L, K, U] in float32; with magnitudes m [L, U], scaled to these norms."""
    tuned = kernel + jax.vmap(_product)(a, b)
    if m is None:
        return tuned
    return tuned * gains(m, kernel, a, b, kernel.dtype)[:, None]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("kr,r...->k...", a, b, precision="highest")
