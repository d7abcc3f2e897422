"""Prefetches batches to the devices."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.data.batches import LAYOUT, Batch, Batches
from easyaira.distributed import watchdog
from easyaira.distributed.mesh import BATCH_AXES, data_shards, local_shards


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Rows are sharded over dp and fsdp; per-example arrays are small and replicated."""
    rows = NamedSharding(mesh, P(None, BATCH_AXES, None))
    return {name: rows if name in LAYOUT else NamedSharding(mesh, P()) for name in batch}


def to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Put a batch on the devices. Each process contributes its own rows."""
    per_shard, own = batch.shape.rows, local_shards(mesh)

    def put(name: str, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if name not in LAYOUT:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        micro_batches, _, length = array.shape
        rows = array.reshape(micro_batches, len(own), per_shard, length)
        shape = (micro_batches, data_shards(mesh) * per_shard, length)
        return jax.make_array_from_callback(
            shape, sharding, lambda index: rows[:, own.index((index[1].start or 0) // per_shard)]
        )

    shardings = batch_shardings(batch.arrays, mesh)
    return {name: put(name, array, shardings[name]) for name, array in batch.arrays.items()}


class Ready(NamedTuple):
    """A batch that is on the devices.

    Attributes:
        batch: metadata; its host arrays are dropped.
        arrays: on the devices.
        waited: seconds that the loop was blocked waiting for this batch.
    """

    batch: Batch
    arrays: dict[str, jax.Array]
    waited: float


class Stored:
    """Batches start..stop - 1 of stored examples, as `loop.fit` asks for them.

    A source of batches has these methods. One that depends on the weights makes its batch when it
    is asked, and returns None if a signal interrupted that.
    """

    def __init__(self, batches: Batches, start: int, stop: int, mesh: Mesh):
        self.batches = batches
        self._coming = ahead(batches, start, stop, mesh)

    def __call__(self, update: int, params: Any) -> Ready | None:
        """The batch of the next update."""
        return next(self._coming)

    def __len__(self) -> int:
        """Updates in an epoch."""
        return len(self.batches)

    def rows(self, update: int) -> np.ndarray:
        """Rows of the data that an update is made of."""
        return self.batches.examples.rows[self.batches.members(update)]


def ahead(
    batches: Batches, start: int, stop: int, mesh: Mesh, what: str = "of the training"
) -> Iterator[Ready]:
    """Batches start..stop - 1; a thread makes each while the device computes the previous one."""

    def make(update: int) -> tuple[Batch, dict[str, jax.Array]]:
        batch = batches[update]
        return batch._replace(arrays={}), to_device(batch, mesh)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming: Future | None = pool.submit(make, start) if start < stop else None
        for update in range(start, stop):
            watchdog.beat(f"making batch {update + 1} {what}")
            requested = time.perf_counter()
            batch, arrays = coming.result()
            waited = time.perf_counter() - requested
            coming = pool.submit(make, update + 1) if update + 1 < stop else None
            watchdog.beat(f"computing batch {update + 1} {what}")
            yield Ready(batch, arrays, waited)
