"""Load balance of a router over its experts, per example.

Shapes: L layers, R rows, T tokens, E experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyaira.models.routing import chosen, probabilities_of


def balance(
    logits: Float[Array, "L R T E"],
    segment_ids: Int[Array, "R T"],
    loss_mask: Bool[Array, "R T"],
    *,
    count: int,
) -> Float[Array, ""]:
    """Sum over examples of their balance losses, each times its number of tokens with loss.

    The balance loss of an example is E sum_i f_i P_i, over its tokens in all layers: f_i is the
    share of tokens that choose expert i, and P_i the mean of its probability. Fedus et al. (2022),
    Switch Transformers, eq. 4 to 6, has both per batch; DeepSeek-V3, Liu et al. (2024), section
    2.1.2, per sequence. If all experts are used equally, the loss is `count`. For one example, it
    equals transformers' `load_balancing_loss_func`.

    Args:
        logits: the router's.
        segment_ids: index of each token's example, from 1; 0 is padding. An example's tokens are
            side by side in one row.
        loss_mask: tokens with loss.
        count: experts per token.
    """
    probabilities = probabilities_of(logits)
    choices = chosen(probabilities, count).astype(jnp.float32)
    ones = jnp.ones((*segment_ids.shape, 1), jnp.float32)
    learned = loss_mask.astype(jnp.float32)[..., None]
    summed = _sums_so_far([choices.sum(0), probabilities.sum(0), ones, learned], segment_ids)
    chosen_RTE, probability_RTE, tokens_RT1, learned_RT1 = summed
    of_all = (len(logits) * tokens_RT1) ** 2
    losses_RT = (logits.shape[-1] * chosen_RTE * probability_RTE / of_all).sum(-1)
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    last_RT = (segment_ids > 0) & (segment_ids != following)  # of its example
    return jnp.where(last_RT, losses_RT * learned_RT1[..., 0], 0).sum()


def _sums_so_far(values: list[jax.Array], segment_ids: jax.Array) -> list[jax.Array]:
    """Sums of values [R, T, ...] over each token's example up to that token. Summation is pairwise:
    no scatter, whose order may vary, and no difference of longer sums."""
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = (segment_ids != before)[..., None]

    def joined(left: tuple, right: tuple) -> tuple:
        (left_first, left_sums), (right_first, right_sums) = left, right
        pairs = zip(left_sums, right_sums, strict=True)
        return left_first | right_first, [jnp.where(right_first, b, a + b) for a, b in pairs]

    return jax.lax.associative_scan(joined, (first, values), axis=1)[1]
