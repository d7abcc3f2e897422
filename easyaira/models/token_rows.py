"""Trained rows of a token table: the vectors of a few tokens beside the frozen ones of all others.

Shapes: n trained tokens, V tokens, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def trained(module: nn.Module, table: jax.Array, axis: int = 0) -> jax.Array:
    """The table of a module with the rows that its parameters hold beside it, if any.

    Args:
        axis: axis of the table that counts tokens.
    """
    if not module.has_variable("params", "token_rows"):
        return table
    rows, ids = (module.get_variable("params", f"token_{name}") for name in ("rows", "ids"))
    return with_rows(table, rows, ids, axis)


def with_rows(table: jax.Array, rows_nD: jax.Array, ids_n: jax.Array, axis: int = 0) -> jax.Array:
    """Replace the rows of tokens `ids` in a table.

    A product with one-hot vectors, not a scatter: exact, as all but one term of each sum are 0, the
    same on each mesh, and in a fixed order in its gradient on each kind of device.
    """
    one_hot_Vn = jnp.arange(table.shape[axis])[:, None] == ids_n
    placed_VD = jnp.matmul(one_hot_Vn.astype(rows_nD.dtype), rows_nD, precision="highest")
    chosen, placed = one_hot_Vn.any(1), placed_VD.astype(table.dtype)
    if axis == 1:
        return jnp.where(chosen, placed.T, table)
    return jnp.where(chosen[:, None], placed, table)
