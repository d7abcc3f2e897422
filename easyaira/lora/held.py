"""The base of an adapter in storage precision.

Linear layers of the blocks are quantised if `lora.quantize` is set. Otherwise they, like
embeddings, are stored in the computing dtype. The model casts them to that dtype anyway, so no
result changes, and a frozen weight needs no float32 copy. Norms and biases are small and stay
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.distributed.sharding import partition_specs, sharding_of
from easyaira.distributed.tree import path_of
from easyaira.lora.adapter import Adapter
from easyaira.lora.targets import kernels
from easyaira.models.layers import is_matrix
from easyaira.models.quantize import quantize


def hold(adapter: Adapter, path: tuple, leaf: jax.Array, dtype: Any) -> Any:
    """Convert a float32 weight of the base to its storage precision."""
    return _held(leaf, _precision(adapter, path, dtype))


def held_target(adapter: Adapter, mesh: Mesh, dtype: Any) -> Any:
    """Shapes and shardings of the stored base. Scales are sharded like the outputs."""
    model = adapter.model
    specs = partition_specs(model.shapes, model.rules)
    (shapes, _), (specs, _) = adapter.parted(model.shapes), adapter.parted(specs)

    def held(path, leaf, spec):
        kept = jax.eval_shape(lambda x: hold(adapter, path, x, dtype), leaf)
        if not isinstance(kept, dict):
            return _sharded(kept, mesh, spec, path)
        layer, _, *outputs = spec
        scale = P(layer, None, *outputs)
        return {
            name: _sharded(shape, mesh, scale if name == "scale" else spec, path)
            for name, shape in kept.items()
        }

    return jax.tree_util.tree_map_with_path(held, shapes, specs)


def holder(adapter: Adapter, mesh: Mesh, dtype: Any) -> Callable[[tuple, jax.Array], Any]:
    """`hold` for a loader: jitted, called weight by weight, so that at most one weight is in memory
    as float32. Parameters that are trained in full stay unchanged."""
    target = held_target(adapter, mesh, dtype)

    def held(path: tuple, leaf: jax.Array) -> Any:
        if adapter.replaces(path_of(path)):
            return leaf
        node = target
        for key in path:
            node = node[key.key]
        out = jax.tree.map(lambda shape: shape.sharding, node)
        precision = _precision(adapter, path, dtype)
        if precision == leaf.dtype and out == leaf.sharding:
            return leaf
        shardings, structure = jax.tree.flatten(out)
        return _holder(precision, structure, *shardings)(leaf)

    return held


def _precision(adapter: Adapter, path: tuple, dtype: Any) -> Any:
    """Storage precision of a weight of the base: int8, nf4 or a dtype."""
    name, how = path_of(path), adapter.config.quantize
    if how and name in {row.ours for row in kernels(adapter.model) if row.quantizable}:
        return how
    return jnp.dtype(dtype if is_matrix(name) else jnp.float32)


def _held(leaf: jax.Array, precision: Any) -> Any:
    if isinstance(precision, str):
        return quantize(leaf, precision, axis=1)
    return leaf.astype(precision)


@lru_cache
def _holder(precision: Any, structure: Any, *shardings: NamedSharding) -> Callable:
    """A compiled `_held`, for all weights with this precision and these shardings."""
    out = jax.tree.unflatten(structure, shardings)
    return jax.jit(partial(_held, precision=precision), out_shardings=out)


def _sharded(shape: Any, mesh: Mesh, spec: P, path: tuple) -> Any:
    sharding = sharding_of(path_of(path), shape.shape, spec, mesh)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
