"""Compares an accelerator's attention kernel with XLA's attention on the rows of a run.

Kernels fail at some shapes, and the shapes vary with the release: cuDNN's backward pass has given
NaN at rows of 192 tokens with a fully masked query (pytorch/pytorch#196678). So with
`model.attention: auto`, a run compares output and gradients of two attention layers, on one update
of each row shape, before its first update. A kernel that disagrees is not used.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira.distributed.compiler import REPRODUCIBLE, UNTIMED
from easyaira.models.attention import attention
from easyaira.models.layers import Compute
from easyaira.models.layout import UNATTENDED
from easyaira.models.model import Model
from easyaira.train import loader
from easyaira.train.resolve import KERNELS, obstacle
from easyaira.train.setup import Setup

OPTIONS = {"gpu": UNTIMED["gpu"] | REPRODUCIBLE["gpu"]}
BOUND = 4  # largest allowed relative error, in units of the compute dtype's epsilon


def choose(setup: Setup) -> tuple[Setup, dict[str, str]]:
    """Select the first kernel that agrees with XLA's attention, and print why others were rejected.

    Nothing is checked if the configuration names a kernel, if XLA computes attention, or on a CPU.

    Returns:
        the setup with the kernel, and the fact for metrics.jsonl.
    """
    compute, device = setup.model.compute, setup.mesh.devices.flat[0]
    if setup.config.model.attention != "auto" or compute.attention in ("xla", "tiles"):
        return setup, {}
    updates = setup.batches.of_each_shape()
    problems = []
    for kernel in KERNELS[device.platform]:
        if obstacle(kernel, setup.model, compute):
            continue
        fault = next(filter(None, (check(setup, kernel, update) for update in updates)), None)
        if fault is None:
            break
        problems.append(f"{kernel}: {fault}")
    else:
        kernel = "xla"
    fact = f"{kernel} ({'; '.join(problems)})" if problems else kernel
    if problems:
        print(f"attention: {fact}", flush=True)
    return setup.with_attention(kernel), {"attention": fact}


def check(setup: Setup, kernel: str, update: int) -> str | None:
    """Describe a kernel's fault on the first micro-batch of an update; None if there is none."""
    rows = loader.to_device(setup.batches[update], setup.mesh)
    of_kernel = replace(setup.model.compute, attention=kernel)
    causal = not setup.model.architecture.encoder
    return problem(
        rows["segment_ids"][0], rows["sides"][0], heads_of(setup.model), of_kernel, causal
    )


def problem(
    segment_ids: Any, sides: Any, heads: Heads, of_kernel: Compute, causal: bool = True
) -> str | None:
    """Describe a kernel's fault on these rows; None if there is none."""
    length = segment_ids.shape[1]
    try:
        errors, same = jax.device_get(
            compare(segment_ids, sides, heads=heads, of_kernel=of_kernel, causal=causal)
        )
    except (IndexError, NotImplementedError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or ["no message"]  # fails to compile or run
        return f"{type(error).__name__}: {lines[0][:120]}"
    if not same:
        return f"the kernel gave different bits in a second call on rows of {length}"
    return judge(errors, jnp.finfo(of_kernel.dtype).eps, length=length)


def judge(errors: dict[str, tuple[bool, float]], rounding: float, *, length: int) -> str | None:
    """Describe the first of `compare`'s errors that is out of bounds; None if none is."""
    for name, (finite, error) in errors.items():
        if not finite:
            return f"the kernel's {name} was not finite on rows of {length}"
        if not error <= BOUND * rounding:
            return (
                f"the kernel's {name} was off by {float(error):.2g} on rows of {length}; rounding "
                f"explains {BOUND * float(rounding):.2g}"
            )
    return None


class Heads(NamedTuple):
    """Numbers of query and key/value heads of an attention layer, and their width."""

    queries: int
    keys: int
    width: int


def heads_of(model: Model) -> Heads:
    config = model.config
    width = getattr(config, "head_width", config.width // config.heads)
    return Heads(config.heads, config.kv_heads, width)


def compare(
    segment_ids: jax.Array, sides: jax.Array, *, heads: Heads, of_kernel: Compute, causal: bool
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], jax.Array]:
    """Output and gradients of a kernel: whether all are finite, and the relative error outside
    padding, ||x - y|| / ||y|| with y by XLA in float32. And whether a second call gives the same
    bits.

    Args:
        segment_ids, sides: [R, T] of a micro-batch, on the devices.
    """
    layer = partial(_layers, segment_ids, sides, heads, causal, of_kernel.dtype)
    actual, repeated, expected = layer(of_kernel), layer(of_kernel), layer(Compute())
    same = jax.tree.map(partial(jnp.array_equal, equal_nan=True), actual, repeated)
    return _errors(segment_ids, sides, actual, expected), jnp.stack(jax.tree.leaves(same)).all()


def _layers(segment_ids, sides, heads, causal, dtype, compute: Compute) -> list[jax.Array]:
    """Outputs and gradients of two attention layers on random inputs, rounded to `dtype`."""
    backend = jax.default_backend()
    program = _program(heads, causal, jnp.dtype(dtype), compute, backend)
    return program(segment_ids, sides)


@lru_cache(maxsize=64)
def _program(heads: Heads, causal: bool, dtype: Any, compute: Compute, backend: str) -> Any:
    def layers(segment_ids, sides):
        R, T = segment_ids.shape
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(R, T, count, heads.width) for count in (heads.queries, heads.keys, heads.keys)]
        inputs = [
            jax.random.normal(key, shape).astype(dtype)
            for key, shape in zip(keys, shapes, strict=False)
        ]
        # padding has no loss, so its output gradient is zero
        d_out = jax.random.normal(keys[3], (R, T, heads.queries * heads.width))
        d_out = jnp.where(_real(segment_ids, sides), d_out, 0).astype(dtype)

        def out(*inputs):
            return attention(*inputs, segment_ids, sides, compute, causal=causal)

        results = []
        with jax.default_matmul_precision(compute.matmul_precision):
            for scale in (1, 0.5):  # programs of two equal calls have failed, see models/cudnn.py
                q, k, v = (x.astype(compute.dtype) for x in inputs)
                value, pull = jax.vjp(out, scale * q, k, v)
                results += [value, *pull(d_out.astype(compute.dtype))]
        return results

    return jax.jit(layers, compiler_options=OPTIONS.get(backend))


def _real(segment_ids, sides) -> jax.Array:
    return ((segment_ids > 0) & (sides != UNATTENDED))[..., None]


@jax.jit
def _errors(segment_ids, sides, actual, expected) -> dict[str, tuple[jax.Array, jax.Array]]:
    real, (R, T) = _real(segment_ids, sides), segment_ids.shape

    def compared(x, y):
        x32, y32 = (jnp.where(real, z.reshape(R, T, -1).astype(jnp.float32), 0) for z in (x, y))
        error, size = jnp.linalg.norm(x32 - y32), jnp.linalg.norm(y32)
        return jnp.isfinite(x).all(), jnp.where(size > 0, error / size, error)

    names = ["output", "gradient of q", "gradient of k", "gradient of v"]
    names += [f"second {name}" for name in names]
    pairs = zip(names, actual, expected, strict=True)
    return {name: compared(x, y) for name, x, y in pairs}
