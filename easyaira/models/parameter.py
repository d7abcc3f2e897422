"""Parameters of modules."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
    """The parameter of this name, or during `Module.init` a new one.

    Flax's `Module.param` traces `init` at each use, to compare shapes. That is a tenth of the time
    that it takes to trace a training step.

    Raises:
        ValueError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(f"{module.path}: {name} has the shape {value.shape} instead of {shape}")
    return value
