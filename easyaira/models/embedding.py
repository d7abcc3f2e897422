"""Embedding look-up with a bitwise deterministic gradient on every kind of device.

Shapes: S data shards, N tokens per shard, D width, V rows of the table.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, on_cpu, parts_of
from easyaira.models.layers import whole
from easyaira.models.parameter import parameter
from easyaira.models.product import packed, unpacked
from easyaira.models.token_rows import trained


class Embedding(nn.Module):
    """A table of vectors. The data layer refuses ids beyond the table; JAX would clamp them."""

    size: int
    width: int
    std: float
    padded_size: int | None = None

    def setup(self):
        def init(key, shape, dtype=jnp.float32):
            rows = jax.random.normal(key, (self.size, self.width), dtype) * self.std
            return jnp.zeros(shape, dtype).at[: self.size].set(rows)

        shape = (self.padded_size or self.size, self.width)
        self.embedding = trained(self, parameter(self, "embedding", init, shape))

    def __call__(self, ids: jax.Array, dtype: Any) -> jax.Array:
        # token tables are sharded over tp, like the head; position tables are small and replicated
        table, rows = self.embedding, "tp" if self.padded_size else None
        return whole(_look_up(table, ids, table.shape, table.dtype, dtype, rows))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _look_up(table_VD, ids, shape, stored, dtype, rows):
    """Gather rows of a table in `dtype`. The gradient is always accumulated in float32: a token may
    occur a thousand times in a batch, and bfloat16 cannot sum so many terms."""
    if on_cpu():  # to read a row of 16-bit floats, XLA's CPU converts the whole table
        return unpacked(constrain(packed(table_VD), rows, None)[ids], stored).astype(dtype)
    return constrain(table_VD.astype(dtype), rows, None)[ids]


def _look_up_forward(table_VD, ids, shape, stored, dtype, rows):
    return _look_up(table_VD, ids, shape, stored, dtype, rows), ids


def _look_up_backward(shape, stored, dtype, rows, ids, d_rows):
    d_rows = whole(d_rows).astype(jnp.float32)
    add = partial(_scatter_add, shape=shape)  # deterministic on CPUs and TPUs
    if not on_cpu():
        on_gpu = partial(_sum_by_id, shape=shape, rows=rows)
        add = partial(jax.lax.platform_dependent, default=add, cuda=on_gpu, rocm=on_gpu)
    return constrain(add(d_rows, ids), rows, None).astype(stored), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _scatter_add(d_rows, ids, *, shape):
    return jnp.zeros(shape, jnp.float32).at[ids].add(d_rows)


def _sum_by_id(d_rows, ids, *, shape, rows):
    """Deterministic scatter-add for GPUs. XLA's own uses atomics, whose order varies, and has been
    compiled into compare-and-swap loops (openxla/xla#46225)."""
    shards = parts_of(len(ids), BATCH_AXES)

    def by_shard(x: jax.Array) -> jax.Array:  # [S, N, ...]: each device sums its own tokens
        x = x.reshape(shards, -1, *x.shape[ids.ndim :])
        return constrain(x, BATCH_AXES, *(None,) * (x.ndim - 1))

    parts = sum_by_id(by_shard(d_rows), by_shard(ids), size=shape[0])
    return constrain(parts, BATCH_AXES, rows, None).sum(0)


def sum_by_id(
    values: Float[Array, "S N D"], ids: Int[Array, "S N"], *, size: int
) -> Float[Array, "S V D"]:
    """Sum of the values of each id below `size`: a scatter-add in a fixed order.

    Sort values by id. In steps with distances 1, 2, 4, ..., add to each value the one at that
    distance behind it, if both have the same id. After k steps, the first value of a run of up to
    2^k equal ids holds the sum of the run. The number of steps is the logarithm of the longest run.
    The rounding error, too, grows with that logarithm and not with the run's length (pairwise
    summation; Higham, 1993).
    """
    count = ids.shape[1]
    order = jnp.argsort(ids, axis=1, stable=True)
    ids = jnp.take_along_axis(ids, order, axis=1)
    values = jnp.take_along_axis(values, order[..., None], axis=1)
    places = jnp.arange(count, dtype=jnp.int32)
    begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    longest = (places - first).max() + 1

    def add(carry):
        distance, sums = carry
        other = jnp.minimum(places + distance, count - 1)
        same = (places + distance < count) & (ids[:, other] == ids)
        return 2 * distance, sums + jnp.where(same[..., None], sums[:, other], 0)

    _, sums = jax.lax.while_loop(lambda carry: carry[0] < longest, add, (jnp.int32(1), values))
    wanted = jnp.arange(size, dtype=ids.dtype)
    place = jax.vmap(jnp.searchsorted, in_axes=(0, None))(ids, wanted)
    place = jnp.minimum(place, count - 1)
    present = jnp.take_along_axis(ids, place, axis=1) == wanted
    return jnp.where(present[..., None], jnp.take_along_axis(sums, place[..., None], axis=1), 0)
