"""Values of tokens by completion. Shapes: R rows, T tokens, B completions of at most C tokens."""

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
    rows: Mapping[str, jax.Array], prompt_lengths: Float[Array, " B"], longest: int
) -> Int[Array, "B C"]:
    """Place of each token of each completion among the R x T tokens of the rows, for `take`.

    Completion b has segment id b + 1. A place that has no token is R x T or more, and unique.
    """
    count = len(prompt_lengths)
    whole = {
        name: constrain(rows[name], None, None).ravel()
        for name in ("segment_ids", "positions", "loss_mask")
    }
    example = whole["segment_ids"] - 1
    place = whole["positions"] - prompt_lengths.astype(jnp.int32)[jnp.maximum(example, 0)]
    size = len(example)
    target = jnp.where(whole["loss_mask"], example * longest + place, count * longest)
    beyond = size + jnp.arange(count * longest, dtype=jnp.int32)
    # every token has a target of its own, so the order of the writes does not matter
    places = beyond.at[target].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    return places.reshape(count, longest)


def take(values: PerToken, places: Int[Array, "B C"]) -> PerCompletion:
    """The values of completions, 0 where there is no token. Places are unique, so the gradient is a
    write and no sum."""
    flat = constrain(values, None, None).ravel()
    return flat.at[places].get(mode="fill", fill_value=0, unique_indices=True)
