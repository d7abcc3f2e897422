"""Positions with loss in chunks, whose logits are computed at a time, and chunks in groups.

Shapes: S shards, N positions per shard, C positions per chunk."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from easyaira.distributed.sharding import on_cpu
from easyaira.models.product import NOT_NEGATIVE

CHUNK_LOGITS = 2**25  # logits that a device stores at a time, 128 MiB
KEPT_BYTES = 16  # for each of these: of logit gradients cached for the backward pass
# Most positions of a chunk on a CPU: its caches hold their logits, and the last chunk has few
# positions without loss.
CPU_CHUNK = 256
# Chunks on a CPU that are one product in the head's gradient: adding a product to the gradient
# takes as long as computing that of one chunk.
CPU_GROUP = 3


class Sizes(NamedTuple):
    """Sizes of chunks.

    Attributes:
        chunk: positions that a device projects at a time.
        group: chunks that are one product in the head's gradient.
        kept: chunks whose logit gradients are cached for the backward pass, in whole groups.
    """

    chunk: int
    group: int
    kept: int


def sizes_of(
    positions: int, columns: int, itemsize: int, chunk_logits: int = CHUNK_LOGITS
) -> Sizes:
    """Sizes for the positions of a device, whose logit gradients have `itemsize` bytes each."""
    at_once = max(1, chunk_logits // columns)
    chunk = max(1, min(positions, at_once, CPU_CHUNK if on_cpu() else at_once))
    chunks = -(-positions // chunk)
    group = max(1, min(CPU_GROUP if on_cpu() else 1, chunks))
    groups = min(KEPT_BYTES // itemsize * at_once // chunk // group, -(-chunks // group))
    return Sizes(chunk, group, groups * group)


class Chunks(NamedTuple):
    """The order of positions for chunking: positions with loss first, then out-of-range indices."""

    order: jax.Array  # [S, multiple of a group]; unique, and N or more where there is no position
    count: jax.Array  # chunks that have a position with loss, on any shard
    sizes: Sizes

    @property
    def groups(self) -> jax.Array:
        """Groups that have a position with loss."""
        return -(-self.count // self.sizes.group)

    def of_group(self, g: jax.Array) -> jax.Array | int:
        """Number of chunks in group g that have a position with loss."""
        most = self.sizes.group
        return most if most == 1 else jnp.minimum(most, self.count - g * most)

    def index(self, i: jax.Array, chunks: int = 1) -> jax.Array:
        """Positions of chunks from i on, [S, chunks x C]."""
        start, size = i * self.sizes.chunk, chunks * self.sizes.chunk
        return jax.lax.dynamic_slice_in_dim(self.order, start, size, axis=1, **NOT_NEGATIVE)


def chunks_of(wanted: jax.Array, sizes: Sizes) -> Chunks:
    """Chunks of the wanted positions [S, N]."""
    wanted = jnp.pad(wanted, ((0, 0), (0, -wanted.shape[1] % (sizes.chunk * sizes.group))))
    place = jnp.arange(wanted.shape[1], dtype=jnp.int32)
    order = jnp.sort(jnp.where(wanted, place, len(place) + place), axis=1)
    count = (wanted.sum(1).max() + sizes.chunk - 1) // sizes.chunk
    return Chunks(order, count, sizes)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gather x[s, index[s, c]], with zero where the index is out of range."""
    fill = {"mode": "fill", "fill_value": 0, "wrap_negative_indices": False}
    return jax.vmap(lambda row, at: row.at[at].get(**fill))(x, index)


def put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Scatter `values` into x. Indices are unique, so the result is deterministic."""

    def put(row, at, new):
        return row.at[at].set(new, mode="drop", unique_indices=True, wrap_negative_indices=False)

    return jax.vmap(put)(x, index, values)
