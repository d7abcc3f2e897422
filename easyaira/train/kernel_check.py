"""The attention kernel of an accelerator, compared with XLA's attention on a run's own rows.

Kernels are wrong at some shapes, and others with every release: cuDNN's backward pass has given NaN
at rows of 192 tokens where a query saw nothing (pytorch/pytorch#196678). So a run whose kernel was
not named by `model.attention` compares, before its first update, the output and the gradients of
one layer's attention on one update of each shape. A kernel that differs is not used.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira.models.attention import attention
from easyaira.models.layers import Compute
from easyaira.models.model import Model
from easyaira.train import loader
from easyaira.train.resolve import KERNELS
from easyaira.train.setup import Setup

BOUND = 4  # relative errors that are allowed, in roundings of the computing dtype


def choose(setup: Setup) -> tuple[Setup, dict[str, str]]:
    """The setup with the first kernel that agrees with XLA's attention, and what metrics.jsonl says
    of it. Says in a line why a kernel was passed over.

    Nothing is checked where the configuration names a kernel, and where XLA computes attention.
    """
    compute, device = setup.model.compute, setup.mesh.devices.flat[0]
    if setup.config.model.attention != "auto" or compute.attention == "xla" or compute.dropout:
        return setup, {}
    updates = setup.batches.of_each_shape()
    problems = []
    for kernel in KERNELS[device.platform]:
        found = next(filter(None, (check(setup, kernel, update) for update in updates)), None)
        if found is None:
            break
        problems.append(f"{kernel}: {found}")
    else:
        kernel = "xla"
    fact = f"{kernel} ({'; '.join(problems)})" if problems else kernel
    if problems:
        print(f"attention: {fact}", flush=True)
    return setup.with_attention(kernel), {"attention": fact}


def check(setup: Setup, kernel: str, update: int) -> str | None:
    """What is wrong with a kernel on the first micro-batch of an update, or None."""
    rows = loader.to_device(setup.batches[update], setup.mesh)
    of_kernel = replace(setup.model.compute, attention=kernel)
    causal = not setup.model.architecture.encoder
    return problem(
        rows["segment_ids"][0], rows["sides"][0], heads_of(setup.model), of_kernel, causal
    )


def problem(
    segment_ids: Any, sides: Any, heads: Heads, of_kernel: Compute, causal: bool = True
) -> str | None:
    """What is wrong with a kernel on these rows, in words, or None."""
    try:
        errors = compare(segment_ids, sides, heads=heads, of_kernel=of_kernel, causal=causal)
        errors = jax.device_get(errors)
    except (NotImplementedError, RuntimeError, ValueError) as error:  # it does not compile or run
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return judge(errors, jnp.finfo(of_kernel.dtype).eps, length=segment_ids.shape[1])


def judge(errors: dict[str, tuple[bool, float]], rounding: float, *, length: int) -> str | None:
    """Errors as `compare` gives them, in words; None if they are in bounds."""
    for name, (finite, error) in errors.items():
        if not finite:
            return f"the kernel's {name} was not finite on rows of {length}"
        if not error <= BOUND * rounding:
            return (
                f"the kernel's {name} was off by {float(error):.2g} on rows of {length}, where "
                f"{BOUND * float(rounding):.2g} is rounding"
            )
    return None


class Heads(NamedTuple):
    """Of one layer's attention."""

    queries: int
    keys: int
    width: int


def heads_of(model: Model) -> Heads:
    config = model.config
    width = getattr(config, "head_width", config.width // config.heads)
    return Heads(config.heads, config.kv_heads, width)


@partial(jax.jit, static_argnames=("heads", "of_kernel", "causal"))
def compare(
    segment_ids: jax.Array, sides: jax.Array, *, heads: Heads, of_kernel: Compute, causal: bool
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Output and gradients of a kernel: whether all numbers are finite, and the error of those that
    count, ||x - y|| / ||y|| with y XLA's in float32.

    Args:
        segment_ids, sides: [R, T] of a micro-batch, as it lies on the devices.
    """
    R, T = segment_ids.shape
    real = ((segment_ids > 0) & (sides != 3))[..., None]
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(R, T, count, heads.width) for count in (heads.queries, heads.keys, heads.keys)]
    inputs = [
        jax.random.normal(key, shape).astype(of_kernel.dtype)
        for key, shape in zip(keys, shapes, strict=False)
    ]
    # padding is never learned from, so no gradient comes back to it
    d_out = jnp.where(real, jax.random.normal(keys[3], (R, T, heads.queries * heads.width)), 0)
    d_out = d_out.astype(of_kernel.dtype)

    def run(compute: Compute):
        def out(*inputs):
            return attention(*inputs, segment_ids, sides, compute, causal=causal)

        value, pull = jax.vjp(out, *(x.astype(compute.dtype) for x in inputs))
        return value, *pull(d_out.astype(compute.dtype))

    found = run(of_kernel)
    with jax.default_matmul_precision("highest"):
        wanted = run(Compute())

    def compared(x, y):
        x32, y32 = (jnp.where(real, z.reshape(R, T, -1).astype(jnp.float32), 0) for z in (x, y))
        error, size = jnp.linalg.norm(x32 - y32), jnp.linalg.norm(y32)
        return jnp.isfinite(x).all(), jnp.where(size > 0, error / size, error)

    names = "output", "gradient of q", "gradient of k", "gradient of v"
    pairs = zip(names, found, wanted, strict=True)
    return {name: compared(x, y) for name, x, y in pairs}
