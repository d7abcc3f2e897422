"""Sharding of arrays over a mesh.

Models hold no mesh. Their partition rules are a table of (path pattern, PartitionSpec), and
`constrain` uses only axis names inside a traced function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.distributed.tree import path_of
from easyaira.errors import ConfigError, WeightsError

Rules = Sequence[tuple[str, P]]


def partition_specs(tree: Any, rules: Rules) -> Any:
    """The PartitionSpec of every leaf: that of the first rule whose pattern matches its path.

    A spec shorter than its leaf's rank applies to the last axes. Scanned layers have the layer as
    their first axis, which is never sharded.

    Raises:
        WeightsError: a leaf has no rule, or a rule has no leaf.
    """
    unused = {pattern for pattern, _ in rules}
    unmatched = []

    def spec(key_path, leaf):
        for pattern, spec in rules:
            if re.search(pattern, path_of(key_path)):
                unused.discard(pattern)
                return P(*(None,) * (leaf.ndim - len(spec)), *spec)
        unmatched.append(path_of(key_path))
        return P()

    specs = jax.tree_util.tree_map_with_path(spec, tree)
    if unmatched or unused:
        raise WeightsError(
            f"partition rules: parameters without a rule: {unmatched}; rules without a parameter: "
            f"{sorted(unused)}. Fix PARTITION_RULES at the end of the model's file"
        )
    return specs


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf.

    Raises:
        ConfigError: see `sharding_of`.
    """
    specs = partition_specs(tree, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, spec: sharding_of(path_of(path), leaf.shape, spec, mesh), tree, specs
    )


def sharding_of(name: str, shape: Sequence[int], spec: P, mesh: Mesh) -> NamedSharding:
    """The NamedSharding of a parameter.

    Raises:
        ConfigError: the size of a parameter axis is not a multiple of its mesh axes' size.
    """
    for size, axes in zip(shape, spec, strict=True):
        if size % (parts := _parts(mesh, axes)):
            raise ConfigError(
                f"mesh: {name} has shape {tuple(shape)}, but {axes}={parts} does not divide "
                f"{size}; choose a size that does"
            )
    return NamedSharding(mesh, spec)


def like(tree: Any, specs: Any) -> Any:
    """Shapes and dtypes of `tree` with the shardings in `specs`: the target of a loader."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        specs,
    )


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Constrain the sharding of `x`, with one entry per axis.

    Does nothing without a mesh. An axis whose size the mesh does not divide (three prompts on eight
    devices) is left unsharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, _valid_spec(mesh, x, axes))


def by_device(f: Callable[..., jax.Array], axes: Sequence[Sequence[Any]]) -> Callable:
    """Run `f` on each device's shard of the arguments, for kernels that XLA cannot partition.

    `axes` holds the entries of each argument, as in `constrain`. The result is sharded like the
    first argument."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return f

    def sharded(*arrays: jax.Array) -> jax.Array:
        specs = tuple(_valid_spec(mesh, *pair) for pair in zip(arrays, axes, strict=True))
        return jax.shard_map(f, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return sharded


def _valid_spec(mesh: Any, x: jax.Array, axes: Sequence[Any]) -> P:
    """The entries of `axes`, with None where the mesh does not divide the size."""
    sizes = zip(x.shape, axes, strict=True)
    return P(*(entry if size % _parts(mesh, entry) == 0 else None for size, entry in sizes))


def parts_of(size: int, axes: Any) -> int:
    """Number of shards of an axis of this size over these mesh axes; 1 if they do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else _parts(mesh, axes)
    return parts if size % parts == 0 else 1


def on_cpu() -> bool:
    """True if the mesh is of CPUs; without a mesh, if JAX computes on them by default."""
    return device_kind() == "cpu"


def device_kind() -> str | None:
    """Kind of the mesh's devices; without a mesh, the platform on which JAX computes by default."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    return getattr(mesh.abstract_device, "device_kind", None)


def on_one_cpu() -> bool:
    """True if the mesh, or JAX without a mesh, is a single CPU: nothing is sharded."""
    return on_cpu() and jax.sharding.get_abstract_mesh().size <= 1  # 0: no mesh


def _parts(mesh: Any, entry: Any) -> int:
    """Number of shards that an entry of a PartitionSpec makes."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)
