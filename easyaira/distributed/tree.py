"""Leaves of parameter trees, by path."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec as P


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays, as a target to restore."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def path_of(key_path: tuple[Any, ...]) -> str:
    """A leaf's path as text, such as `layers/mlp/up_proj/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by path. A PartitionSpec counts as a leaf.

    flax.traverse_util.flatten_dict takes dictionaries alone; trees here also hold tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, P))
    return {path_of(path): leaf for path, leaf in leaves}
