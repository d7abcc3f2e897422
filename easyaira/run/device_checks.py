"""The self-test's checks of a device: repeatable sums, attention, speed.

Each check returns its findings in one line.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from easyaira import __version__
from easyaira.algorithms import sft
from easyaira.data.packing import Shape
from easyaira.distributed import mesh as meshes
from easyaira.distributed.compiler import REPRODUCIBLE
from easyaira.errors import CheckFailed
from easyaira.losses import preference
from easyaira.models.embedding import sum_by_id
from easyaira.models.layers import Compute
from easyaira.models.registry import model_of
from easyaira.plan import cost
from easyaira.train import kernel_check, metrics
from easyaira.train import step as steps
from easyaira.train.resolve import KERNELS, ROW_MULTIPLE
from easyaira.train.step import init_state

PACKAGES = "jax jaxlib flax optax orbax-checkpoint numpy transformers".split()


def kernels() -> tuple[str, ...]:
    """Attention implementations for this device, XLA's first."""
    return ("xla", *KERNELS.get(jax.default_backend(), ()))


def machine() -> str:
    devices = jax.devices()
    versions = ", ".join([f"easyaira {__version__}", *(f"{n} {version(n)}" for n in PACKAGES)])
    backend = " ".join(devices[0].client.platform_version.split())
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{len(devices)} x {devices[0].device_kind}; {backend}; Python {python}; {versions}"


def sums() -> str:
    """Sums over the answers of pairs and over rows of an embedding: 20 equal calls, and float64."""
    rng = np.random.default_rng(0)
    rows, length, pairs = 32, 640, 64
    segment_ids = np.repeat(np.arange(1, pairs + 1), rows * length // pairs).reshape(rows, length)
    sides = np.tile(np.repeat([1, 2], length // 4), (rows, 2))
    logps = -rng.exponential(5, (rows, length)).astype(np.float32)
    mask = np.ones((rows, length), bool)
    values = rng.normal(size=(1, rows * length, 64)).astype(np.float32)
    ids = rng.zipf(1.3, (1, rows * length)).clip(0, 4095).astype(np.int32)
    of_pairs = jax.jit(partial(preference.answer_sums, examples=pairs))
    of_rows = jax.jit(partial(sum_by_id, size=4096))

    rows_of_pairs = [jnp.asarray(x) for x in (logps, mask, segment_ids, sides)]
    tokens = [jnp.asarray(x) for x in (values, ids)]

    def both() -> list[np.ndarray]:
        return [np.asarray(x) for x in (of_pairs(*rows_of_pairs), of_rows(*tokens))]

    first = both()
    for _ in range(19):
        if any((x != y).any() for x, y in zip(first, both(), strict=True)):
            raise CheckFailed("the same sum has different bits the second time")
    answers = np.zeros((pairs, 2))
    np.add.at(answers, (segment_ids - 1, sides - 1), logps.astype(np.float64))
    table = np.zeros((4096, 64))
    np.add.at(table, ids[0], values[0].astype(np.float64))
    errors = [
        np.abs(x - y).max() / np.abs(y).max()
        for x, y in zip(first, (answers, table[None]), strict=True)
    ]
    if max(errors) > 1e-5:
        raise CheckFailed(f"a sum is off by {max(errors):.1g} of the largest value")
    scatter = jax.jit(lambda v, i: jnp.zeros((4096, 64)).at[i].add(v))
    differing = sum(
        (np.asarray(scatter(values[0], ids[0])) != np.asarray(scatter(values[0], ids[0]))).any()
        for _ in range(5)
    )
    return (
        f"20 calls, one result; relative error {max(errors):.1g}; "
        f"a plain scatter-add differed in {differing} of 5 pairs of calls"
    )


LENGTHS = (24, 64, 128, 192, 640)


def layouts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, tuple[Any, Any]]:
    """Rows of typical runs, and rows on which kernels have failed: (segment ids, sides)."""
    rng = np.random.default_rng(0)
    layouts = {}
    for length in lengths:
        for shared in (True, False):
            segments, sides = np.zeros((2, 4, length), np.int32)
            for row in range(3):  # the last row is padding
                at, number = 0, 1 + 8 * row
                while at < length and number <= 8 * (row + 1):
                    most = max(3, length // (3 * (row + 1)))
                    sizes = rng.integers(1, most, 3) if shared else (rng.integers(2, most), 0, 0)
                    block = np.repeat([0, 1, 2], sizes)[: length - at]
                    segments[row, at : at + len(block)] = number
                    sides[row, at : at + len(block)] = block
                    at, number = at + len(block), number + 1
            layouts[f"{length}{', prompts shared' if shared else ''}"] = segments, sides
    full = np.ones((2, length), np.int32)
    layouts[f"{length}, full"] = full, 0 * full
    return layouts


def attention_by(name: str, dtype: str) -> str:
    """Count the layouts on which a kernel agrees with XLA in float32, and list its faults.

    Faults fail the check only for XLA's own attention: a run does not use a kernel that is wrong on
    its rows, and falls back to XLA."""
    sizes = [kernel_check.Heads(4, 4, 64), kernel_check.Heads(4, 2, 128)]
    multiple = ROW_MULTIPLE.get(jax.default_backend(), 8)
    lengths = tuple(length for length in LENGTHS if length % multiple == 0)  # as rows of a run
    if name == "xla":
        lengths = lengths[:-1]  # the same at every length
    cases = [(heads, *layout) for heads in sizes for layout in layouts(lengths).items()]

    def fault(case: tuple[kernel_check.Heads, str, tuple[Any, Any]]) -> str | None:
        heads, shape, (segment_ids, sides) = case
        shared = 2 * (name == "splash" and "shared" in shape)
        compute = Compute(jnp.dtype(dtype), attention=name, shared_prompt=shared)
        problem = kernel_check.problem(segment_ids, sides, heads, compute)
        return problem and f"{problem} ({shape}; heads of {heads.width})"

    faults = list(filter(None, map(fault, cases)))
    passed = f"{len(cases) - len(faults)} of {len(cases)} layouts within rounding"
    result = "; ".join([passed, *faults])
    if faults and name == "xla":
        raise CheckFailed(result)
    return result


def speed(dtype: str) -> str:
    """Tokens per second of SFT updates on rows without padding, after two warm-up updates; the
    first update, made twice, must give the same bits."""
    on_cpu = jax.default_backend() == "cpu"
    rows, length, updates = (1, 128, 2) if on_cpu else (32, 640, 10)
    shape = Shape(rows, length)
    kernel = (*KERNELS.get(jax.default_backend(), ()), "xla")[0]
    model = model_of(
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        "GPT-2",
        Compute(jnp.dtype(dtype), attention=kernel),
    )
    mesh = meshes.make_mesh("fsdp=-1", jax.devices()[:1])
    ids = np.random.default_rng(0).integers(0, 50257, (1, *shape), np.int32)
    batch = {
        "tokens": ids,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
        "segment_ids": np.ones_like(ids),
        "sides": np.zeros_like(ids),
        "loss_mask": np.ones(ids.shape, bool),
    }
    with model.on(mesh):
        tx, options = optax.adamw(1e-5), REPRODUCIBLE.get(jax.default_backend())
        init = jax.jit(model.init)
        state, repeated = (init_state(init(jax.random.key(0)), tx, mesh) for _ in range(2))
        step = steps.jit_train_step(sft.sft(model), tx, state, options)
        times = []
        for update in range(2 + updates):
            start = time.perf_counter()
            state, sums = step(state, None, batch, None, 1e-5)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - start)
            if update == 0:
                repeated, _ = step(repeated, None, batch, None, 1e-5)
                if not jax.tree.all(jax.tree.map(jnp.array_equal, state, repeated)):
                    raise CheckFailed("the same update has different bits the second time")
                del repeated
    loss = float(sums["loss"][0]) / float(sums["loss"][1])
    if not np.isfinite(loss):
        raise CheckFailed("the loss is not finite")
    rate = rows * length / sorted(times[2:])[updates // 2]
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    mfu = f", MFU {rate * cost.flops_per_token(model, False) / peak:.0%}" if peak else ""
    result = f"{rate:,.0f} tokens/s in {dtype}, {rows} rows of {length}{mfu}"
    return f"{result}; first update after {times[0]:.0f} s"
