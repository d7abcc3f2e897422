"""Checks of a run folder's checkpoints: every bit of every array and record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.config.algorithms import OptimizerConfig
from easyaira.distributed import mesh as meshes
from easyaira.distributed.tree import by_path
from easyaira.errors import StorageError
from easyaira.export.checks import Result
from easyaira.lora.adapter import nested
from easyaira.storage.checkpoints import Checkpoints
from easyaira.train.optimizer import make_optimizer
from easyaira.train.step import abstract_state


def verify(place: Path | str) -> Iterator[Result]:
    """Restore each checkpoint at `place`, and compare it with the checksums of its save.

    Raises:
        StorageError: the checkpoints cannot be listed.
    """
    checkpoints = Checkpoints(place)
    try:
        for step in checkpoints.steps():
            try:
                yield Result(str(step), True, _compared(checkpoints, step))
            except StorageError as error:
                yield Result(str(step), False, str(error))
    finally:
        checkpoints.close()


def _compared(checkpoints: Checkpoints, step: int) -> str:
    shapes, meta = checkpoints.shapes(step), checkpoints.meta(step)
    mesh = meshes.make_mesh("fsdp=-1")
    here = NamedSharding(mesh, P())

    def placed(shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=here)

    target = nested({path: placed(shape) for path, shape in shapes.items()})
    if "opt_state" not in target:  # `convert from_hf` saves weights alone
        checkpoints.restore_params(step, target["params"])
        return f"{len(shapes)} arrays are as saved, bit for bit"
    config = OptimizerConfig(**meta["run"]["optimizer"])
    tx = make_optimizer(config)
    state = abstract_state(target["params"], tx, mesh)
    checkpoints.restore(step, target["params"], state.opt_state)
    weights = len(by_path(target["params"]))
    return f"{weights} arrays of weights, {len(shapes) - weights} of the optimizer are as saved"
