"""Muon for the matrices of layers: Jordan et al. (2024), Muon: An optimizer for hidden layers in
neural networks; with the scale of Liu et al. (2025), Muon is Scalable for LLM Training, under which
AdamW's learning rate and weight decay serve both.

Shapes: L layers are stacked on axis 0 of a kernel, [L, in, out]; a kernel that q, k and v share,
[L, in, 3, out], is three matrices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from easyaira.distributed.tree import path_of

MOMENTUM, STEPS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of an update in units of the learning rate, as AdamW's usually is
SMALLEST_NORM = 1e-7


def is_hidden(path: tuple, leaf: Any) -> bool:
    """Whether Muon trains a parameter: a layer's matrix, not an embedding, head, norm or bias."""
    return path_of(path).endswith("kernel") and leaf.ndim > 2


def orthogonalized(x: jax.Array) -> jax.Array:
    """Newton-Schulz iteration on matrices [..., m, n]: U V^T for U S V^T, with singular values from
    0.7 to 1.2 for those that were not near 0."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), SMALLEST_NORM)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _scaled(update: jax.Array) -> jax.Array:
    """Orthogonalised matrices of a kernel, with the scale. Layer by layer, so that no device holds
    more than one whole layer of a sharded kernel."""

    def layer(kernel: jax.Array) -> jax.Array:
        matrices = jnp.moveaxis(kernel, 0, -2)
        factor = RMS * math.sqrt(max(matrices.shape[-2:]))
        return jnp.moveaxis(factor * orthogonalized(matrices), -2, 0)

    return jax.lax.map(layer, update)


def scale_by_muon() -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum, without the learning rate."""
    return optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, params: jax.tree.map(_scaled, updates)),
    )


def labels(params: Any) -> Any:
    """`muon` or `adamw` for each parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "muon" if is_hidden(path, leaf) else "adamw", params
    )
