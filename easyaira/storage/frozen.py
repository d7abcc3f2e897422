"""Weights that are not trained, in the precision in which they are used.

Matrices are held in the computing dtype. The model casts them to it anyway, so no result changes,
and no float32 copy takes memory. Norms, biases and score heads stay float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from easyaira.distributed.tree import by_path, path_of
from easyaira.models.layers import is_matrix
from easyaira.models.model import Model

if TYPE_CHECKING:
    from easyaira.storage.pretrained import Pretrained


def load_frozen(origin: Pretrained, model: Model, mesh: Mesh) -> Any:
    """`origin.load(model, mesh)` in the precision of use. Of a Hugging Face folder, at most one
    parameter is in memory as float32."""
    matrices = _matrices(model)

    def held(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf.astype(model.compute.dtype) if path_of(path) in matrices else leaf

    return origin.load(model, mesh, each=held)


def frozen_target(model: Model, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of what `load_frozen` returns."""
    matrices = _matrices(model)

    def held(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = model.compute.dtype if path_of(path) in matrices else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(held, model.target(mesh))


def _matrices(model: Model) -> set[str]:
    return {name for name in by_path(model.shapes) if is_matrix(name)} - {
        row.ours for row in model.score_rows
    }
