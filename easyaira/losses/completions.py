"""Values of tokens by completion.

Shapes: R rows, T tokens, E examples of K completions each, B = E x K completions of at most C
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyaira.distributed.sharding import constrain
from easyaira.losses.token_logps import PerToken

PerCompletion = Float[Array, "B C"]


def completion_mask(lengths: Float[Array, " B"], longest: int) -> Bool[Array, "B C"]:
    """The real tokens of completions of these lengths."""
    return jnp.arange(longest) < lengths[:, None]


def completion_places(
    rows: Mapping[str, jax.Array], prompt_lengths: Float[Array, "E K"], longest: int
) -> Int[Array, "B C"]:
    """Place of each token of each completion among the R x T tokens of the rows, for `take`.

    Example e has segment id e + 1; of several completions, completion k has side k + 1. A place
    that has no token is R x T or more, and unique.
    """
    count, K = prompt_lengths.size, prompt_lengths.shape[1]
    whole = {
        name: constrain(rows[name], None, None).ravel()
        for name in ("segment_ids", "sides", "positions", "loss_mask")
    }
    completion = (whole["segment_ids"] - 1) * K + (whole["sides"] - 1 if K > 1 else 0)
    before = prompt_lengths.ravel().astype(jnp.int32)
    place = whole["positions"] - before[jnp.maximum(completion, 0)]
    size = len(completion)
    target = jnp.where(whole["loss_mask"], completion * longest + place, count * longest)
    beyond = size + jnp.arange(count * longest, dtype=jnp.int32)
    # every token has a target of its own, so the order of the writes does not matter
    places = beyond.at[target].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    return places.reshape(count, longest)


def take(values: PerToken, places: Int[Array, "B C"]) -> PerCompletion:
    """The values of completions, 0 where there is no token. Places are unique, so the gradient
    writes and does not sum."""
    flat = constrain(values, None, None).ravel()
    return flat.at[places].get(mode="fill", fill_value=0, unique_indices=True)
