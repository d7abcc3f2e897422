"""The router's choice of experts. Shapes: see layers.py, and E experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def chosen(probabilities: jax.Array, count: int) -> jax.Array:
    """Mask [..., E] of the `count` experts of highest probability; of equal ones, the first.

    By comparing all pairs: a sort of few numbers is slower, and may gather a sharded array."""
    one, other = probabilities[..., :, None], probabilities[..., None, :]
    place = jnp.arange(probabilities.shape[-1])
    before = (other > one) | ((other == one) & (place < place[:, None]))
    return before.sum(-1) < count


def probabilities_of(logits: jax.Array) -> jax.Array:
    """Softmax [..., E] over all experts, in float32."""
    return jax.nn.softmax(logits.astype(jnp.float32))


def weights_of(logits: jax.Array, count: int) -> jax.Array:
    """Weight [..., E] of each expert for a token, float32: the softmax over the logits of the
    `count` largest, 0 for the others. Jiang et al. (2024), Mixtral of Experts, section 2.1; as in
    transformers, probabilities of the chosen experts divided by their sum."""
    probabilities = probabilities_of(logits)
    kept = jnp.where(chosen(probabilities, count), probabilities, 0)
    return kept / kept.sum(-1, keepdims=True)
