"""Memory and time of generation: weights, keys and values, and the compiled decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.distributed.cards import Absent
from easyaira.distributed.chips import chip_of, memory_of
from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import like, parts_of
from easyaira.generation.forward import Weights
from easyaira.generation.programs import State
from easyaira.generation.sampler import Sampler
from easyaira.models.layers import padded_vocab
from easyaira.plan.cost import REACHED, per_device
from easyaira.plan.hlo import Program, compiled
from easyaira.plan.report import fits


class Decoding(NamedTuple):
    """Cost of decoding with a full cache, in bytes per device.

    Attributes:
        rows, slots: of the cache, over all devices.
        weights: matrices in the computing dtype, and the head.
        cache: keys and values: two numbers for each layer, row, key/value head, slot and element
            of a head.
        program: the compiled decoding, whose loop over tokens counts once; for an `Absent` device
            weights, cache and a step's logits.
    """

    rows: int
    slots: int
    weights: int
    cache: int
    program: Program

    @property
    def moved(self) -> float:
        """Bytes that a device sends per token of all rows."""
        return sum(c.times * c.bytes for c in self.program.collectives or [])

    def seconds(self, mesh: Mesh) -> float | None:
        """Estimated seconds per token of all rows: weights and cache are read once, and nothing
        overlaps with communication. None for an unknown chip."""
        chip = chip_of(mesh.devices.flat[0].device_kind)
        if chip is None:
            return None
        read = (self.weights + self.cache) / (chip.memory_bandwidth * REACHED["memory"])
        return read + self.moved / (chip.link_bandwidth * REACHED["links"])


def empty_state(sampler: Sampler, mesh: Mesh, rows: int, slots: int) -> State:
    """Shapes, dtypes and shardings of `rows` rows in `slots` slots, without allocating arrays."""
    programs = sampler.programs
    prompt = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)

    def made(params, *prompt):
        prefilled = programs.prefill(programs.weights(params), *prompt)
        return programs.empty(prefilled, rows, slots)

    def sharded(leaf):
        spec = P()
        if leaf.ndim == 4:  # of the cache, see generation/programs.py
            axes = zip(leaf.shape, (BATCH_AXES, "tp", None, None), strict=True)
            spec = P(*(names if parts_of(size, names) > 1 else None for size, names in axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(made, programs.forward.model.target(mesh), *prompt)
        return jax.tree.map(sharded, state)


def measure(sampler: Sampler, mesh: Mesh, rows: int, slots: int) -> Decoding:
    """Compile the decoding of `rows` rows in `slots` slots for a mesh without allocating arrays, or
    count it for a device that nothing can be compiled for."""
    programs = sampler.programs
    model = programs.forward.model
    state = empty_state(sampler, mesh, rows, slots)
    cache = per_device(state.cache)
    precision = jax.default_matmul_precision(model.compute.matmul_precision)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), precision:
        target = model.target(mesh)
        prepared = jax.eval_shape(programs.weights, target)
        if isinstance(mesh.devices.flat[0], Absent):
            weights = per_device(target) * _size(prepared) // _size(target)  # sharded alike
            logits = 4 * rows * padded_vocab(model.vocab_size) // mesh.size
            program = Program(0, weights + cache, logits, counted=True)
        else:
            compiled_weights = programs.weights.lower(target).compile()
            prepared = like(prepared, compiled_weights.output_shardings)
            weights = per_device(prepared)
            program = _compiled(sampler, prepared, state)
    return Decoding(rows, slots, weights, cache, program)


def _compiled(sampler: Sampler, weights: Weights, state: State) -> Program:
    number, seed = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.uint32))
    running = jax.ShapeDtypeStruct(state.tokens.shape, bool)
    decode = sampler.programs.decode
    return compiled(lambda: decode.lower(weights, state, seed, running, number, number), 1)


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cache(rows: int, slots: int, size: int) -> str:
    return (
        f"cache   keys and values of {rows:,} rows in {slots:,} slots, at most: {size:,} bytes "
        f"({size / 2**20:,.1f} MiB) per device"
    )


def show(decoding: Decoding, mesh: Mesh) -> str:
    """Format the cost of decoding."""
    program, device = decoding.program, mesh.devices.flat[0]
    lines = [_cache(*decoding[:2], decoding.cache)]
    lines += [f"weights {decoding.weights / 2**20:,.1f} MiB per device, prepared for generation"]
    if not (program.refused or program.counted):
        lines.append(
            f"memory  {program.arguments / 2**20:,.0f} MiB held per device, "
            f"{program.temporaries / 2**20:,.0f} MiB in a step; compiled in {program.seconds:.0f} s"
        )
    if (seconds := decoding.seconds(mesh)) is not None:
        lines.append(
            f"time    about {seconds * 1e3:,.2g} ms (estimate) per token of all rows: memory of a "
            f"{device.device_kind} at {REACHED['memory']:.0%} of its peak"
        )
    return "\n".join([*lines, fits(program, memory_of(device))[1]])
