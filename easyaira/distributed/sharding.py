"""Sharding of arrays over a mesh.

Models carry no mesh: their partition rules are a table of (path pattern, PartitionSpec), and inside
a traced function `constrain` uses axis names only."""

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
    """The PartitionSpec of every leaf: the first rule whose pattern is found in its path.

    A spec shorter than its leaf's rank speaks of the last axes: parameters of scanned layers carry
    the layer in front, which is never divided.

    Raises:
        WeightsError: a leaf has no rule, or a rule has no leaf.
    """
    unused = {pattern for pattern, _ in rules}
    homeless = []

    def spec(key_path, leaf):
        for pattern, spec in rules:
            if re.search(pattern, path_of(key_path)):
                unused.discard(pattern)
                return P(*(None,) * (leaf.ndim - len(spec)), *spec)
        homeless.append(path_of(key_path))
        return P()

    specs = jax.tree_util.tree_map_with_path(spec, tree)
    if homeless or unused:
        raise WeightsError(
            f"partition rules: parameters without a rule: {homeless}; rules without a parameter: "
            f"{sorted(unused)}. Mend PARTITION_RULES at the end of the model's file"
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
        ConfigError: a mesh axis does not divide the axis of the parameter that it is to cut.
    """
    for size, axes in zip(shape, spec, strict=True):
        if size % (parts := _parts(mesh, axes)):
            raise ConfigError(
                f"mesh: {name} has shape {tuple(shape)}, and {axes}={parts} does not divide "
                f"{size}; choose a size that does"
            )
    return NamedSharding(mesh, spec)


def like(tree: Any, specs: Any) -> Any:
    """`tree`'s shapes and dtypes with `specs`' shardings: what a loader is to fill."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        specs,
    )


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Advise the compiler how `x` is divided, one entry per axis of it.

    Without a mesh there is nothing to say, and an axis that the mesh does not divide (three prompts
    on eight devices) is left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _possible(mesh, x, axes))


def by_device(f: Callable[..., jax.Array], axes: Sequence[Sequence[Any]]) -> Callable:
    """`f` computed by each device for its part of the arguments: for kernels, which the compiler
    does not divide. `axes` are of each argument, as in `constrain`; the result's are those of the
    first."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f

    def divided(*arrays: jax.Array) -> jax.Array:
        specs = tuple(_possible(mesh, *of) for of in zip(arrays, axes, strict=True))
        return jax.shard_map(f, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return divided


def _possible(mesh: Any, x: jax.Array, axes: Sequence[Any]) -> P:
    """The axes, but for those that the mesh does not divide."""
    sizes = zip(x.shape, axes, strict=True)
    return P(*(entry if size % _parts(mesh, entry) == 0 else None for size, entry in sizes))


def parts_of(size: int, axes: Any) -> int:
    """Into how many parts these mesh axes cut an axis of this size; 1 where they cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else _parts(mesh, axes)
    return parts if size % parts == 0 else 1


def _parts(mesh: Any, entry: Any) -> int:
    """Into how many parts an entry of a PartitionSpec cuts an axis."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)
