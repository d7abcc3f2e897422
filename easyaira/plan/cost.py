"""Memory, FLOPs and time of an update, from shapes and the compiled program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.algorithms.rollouts import OBJECTIVES
from easyaira.distributed.cards import Absent
from easyaira.distributed.chips import chip_of
from easyaira.distributed.sharding import like
from easyaira.distributed.tree import by_path
from easyaira.hf.table import pair_rows
from easyaira.losses.chunks import Sizes
from easyaira.losses.chunks import sizes_of as chunk_sizes
from easyaira.models.attention import LONG_BLOCK, block_of
from easyaira.models.layers import Scores, padded_vocab
from easyaira.models.model import Model
from easyaira.models.tiles import TILE
from easyaira.plan.counted import counted
from easyaira.plan.hlo import Program, compiled
from easyaira.train import loader
from easyaira.train import step as steps
from easyaira.train.algorithm import Algorithm
from easyaira.train.setup import Setup
from easyaira.train.step import abstract_state
from easyaira.train.trainable import FullWeights, Trainable


class Plan(NamedTuple):
    """Cost of a run's largest update, among the updates that were sampled.

    Attributes:
        update: see `Update`.
        sizes: bytes per device by purpose, from shapes and shardings.
        work: floating-point operations per device by purpose.
        program: the compiled program.
        failures: sharding mistakes found in the program.
    """

    update: Update
    sizes: Mapping[str, float]
    work: Mapping[str, float]
    program: Program
    failures: list[str]

    def moved(self) -> dict[str, tuple[int, float]]:
        """Map from kind of collective to its count and the bytes that a device sends."""
        total: dict[str, tuple[int, float]] = {}
        for c in self.program.collectives or []:
            times, size = total.get(c.kind, (0, 0.0))
            total[c.kind] = times + c.times, size + c.times * c.bytes
        return total


class Update(NamedTuple):
    """Shapes of an update.

    Attributes:
        batch: arrays of the whole batch, over all devices.
        parts: number of micro-batches.
        rows, length: shape of a device's share of a micro-batch.
        chunks: number of chunks in which positions with loss are projected.
        sizes: of chunks.
    """

    batch: Mapping[str, np.ndarray]
    parts: int
    rows: int
    length: int
    chunks: int
    sizes: Sizes


def largest_update(setup: Setup, algorithm: Algorithm) -> Update:
    """The most expensive update, with zeros for arrays that are not computed yet (reference
    log-probabilities)."""
    batches = replace(setup.batches, local=None)  # rows of all hosts
    batch = batches[batches.largest()]
    arrays, shape = dict(batch.arrays), batch.shape
    for name, sizes in algorithm.known(setup).items():
        arrays[name] = np.zeros(
            (batches.accumulation, batches.size // batches.accumulation, *sizes), np.float32
        )
    mask = arrays["loss_mask"].reshape(batches.accumulation, batches.shards, -1)
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
        sizes = chunk_sizes(
            shape.rows * (shape.length - 1),
            padded_vocab(setup.model.vocab_size),
            setup.model.compute.dtype.itemsize,
        )
    count = max(1, -(-int(mask.sum(-1).max()) // sizes.chunk))
    return Update(arrays, batches.accumulation, *shape, count, sizes)


def together_of(setup: Setup, algorithm: Algorithm) -> int:
    """Number of rows of train_batch_size that must be together in a device's micro-batch."""
    if algorithm.on_policy is None:
        return algorithm.together
    return OBJECTIVES[setup.config.rl.algorithm].together  # type: ignore[attr-defined]


def measure(setup: Setup, algorithm: Algorithm) -> Plan:
    """Compile the largest update, or count it for a device that is not there, and measure it."""
    update = largest_update(setup, algorithm)
    sizes = sizes_of(setup, algorithm, update)
    if isinstance(setup.mesh.devices.flat[0], Absent):
        depth = depth_of(setup.model)
        program = counted(setup, algorithm, update.batch, update.sizes.chunk, depth, sizes)
    else:
        program = compiled(lambda: lower_step(setup, algorithm, update.batch), update.chunks)
    in_step = algorithm.frozen(setup) is not None
    work = work_of(setup, update, in_step)
    return Plan(update, sizes, work, program, failures(setup, program))


def lower_step(setup: Setup, algorithm: Algorithm, arrays: Mapping[str, np.ndarray]) -> Any:
    """Lower the training step for a batch's shapes and the mesh's devices."""
    return trace_step(setup, algorithm, arrays).lower()


def trace_step(setup: Setup, algorithm: Algorithm, arrays: Mapping[str, np.ndarray]) -> Any:
    """Trace the training step for a batch's shapes without allocating arrays."""
    state = abstract_state(setup.trainable.target, setup.tx, setup.mesh)
    frozen = setup.trainable.frozen_target(algorithm.frozen(setup))
    batch = like(arrays, loader.batch_shardings(arrays, setup.mesh))
    everywhere = NamedSharding(setup.mesh, P())
    key = setup.dropout_key
    if key is not None:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    rate = jax.ShapeDtypeStruct((), np.float32)
    loss_fn, options = algorithm.loss_fn(setup), setup.trainable.compiler_options
    step = steps.jit_train_step(setup.trainable.loss_fn(loss_fn), setup.tx, state, options)
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):  # its devices may not exist
        return step.trace(state, frozen, batch, key, rate)


def per_device(tree: Any) -> int:
    """Bytes of a tree's leaves on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def sizes_of(setup: Setup, algorithm: Algorithm, update: Update) -> dict[str, float]:
    """Bytes per device by purpose, from shapes and shardings.

    Gradients are float32 and sharded like the weights. Accumulation doubles them: a micro-batch's
    gradients and their sum. Logits comprise the chunks that losses/chunks.py holds at a time,
    the logit gradients of a group of chunks and those cached for the backward pass, the head in
    the computing dtype, and the head's gradient, which is unsharded until it is reduced."""
    trained = setup.trainable.target
    state = abstract_state(trained, setup.tx, setup.mesh)
    batch = like(update.batch, loader.batch_shardings(update.batch, setup.mesh))
    sizes = {
        "weights": per_device(trained),
        "optimizer": per_device(state.opt_state),
        "frozen": per_device(setup.trainable.frozen_target(algorithm.frozen(setup))),
        "batch": per_device(batch),
        "gradients": per_device(trained) * (2 if update.parts > 1 else 1),
        "logits": 0,
    }
    if not setup.model.scorer:
        vocab = padded_vocab(setup.model.vocab_size)
        columns, width = vocab // setup.mesh.shape["tp"], _head(setup.model) // vocab
        itemsize = setup.model.compute.dtype.itemsize
        chunk, group, cached = update.sizes
        kept = (group if group > 1 else 0) + (cached if setup.data.train.answers > 1 else 0)
        sizes["logits"] = columns * (chunk * (4 + kept * itemsize) + width * (4 + itemsize))
    return sizes


def _head(model: Model) -> int:
    """Number of weights in the projection to logits; 0 for a scorer."""
    if model.scorer:
        return 0
    leaves = by_path(model.shapes)
    rows = padded_vocab(model.vocab_size)
    tables = [x for path, x in leaves.items() if path.endswith("embedding") and x.shape[0] == rows]
    return tables[0].size


def depth_of(model: Model) -> int:
    """Number of layers."""
    return next(leaf.shape[0] for row, leaf in pair_rows(model.shapes, model.rows) if row.stacked)


def kernels_of(model: Model) -> list[jax.ShapeDtypeStruct]:
    """Kernels of the layers, each [layers, in, ...]."""
    leaves = by_path(model.shapes["model"]).items()
    return [leaf for path, leaf in leaves if path.endswith("kernel") and leaf.ndim > 2]


def work_of(setup: Setup, update: Update, reference_in_step: bool) -> dict[str, float]:
    """Floating-point operations per device in an update, by purpose.

    Counts products with weights and attention scores as computed, including padding."""
    model, added = setup.model, setup.trainable.added
    leaves = by_path(model.shapes["model"])
    inner = sum(x.size for path, x in leaves.items() if path.endswith("kernel"))
    depth = depth_of(model)
    heads = model.config.heads * getattr(
        model.config, "head_width", model.config.width // model.config.heads
    )
    positions = update.parts * update.rows * update.length
    learned = update.parts * update.chunks * update.sizes.chunk * _head(model)
    scores = 4 * depth * heads * _keys(setup, update.length) * positions
    forward = 2 * (inner * positions + learned) + scores
    recompute = {"none": 0.0, "dots": scores, "full": forward - 2 * learned}
    # fused kernels recompute the scores for each gradient; blocks are recomputed
    block = block_of(update.length, not model.architecture.encoder)
    kernel = model.compute.attention != "xla" and not model.compute.dropout
    capped = 0.5 if getattr(model.config, "scores", Scores()).cap is not None else 0
    work = {
        "forward": forward + 2 * added * positions,
        "backward": 2 * setup.trainable.backward * inner * positions
        + 4 * learned
        + 4 * added * positions
        + scores * (3.5 if kernel else 2.5 + capped if update.length > block else 2 + capped),
        "recompute": recompute[model.compute.gradient_checkpointing],
        "reference": forward if reference_in_step else 0.0,
    }
    return {name: operations / setup.mesh.shape["tp"] for name, operations in work.items()}


def _keys(setup: Setup, length: int) -> float:
    """Average number of keys per query that attention computes, masked ones included."""
    model = setup.model
    how, causal = model.compute.attention, not model.architecture.encoder
    if how == "tiles" and not model.compute.dropout:
        texts = setup.batches.block_lengths.astype(float)
        own = (texts**2).sum() / max(texts.sum(), 1)
        return min(length, (own / 2 if causal else own) + TILE / 2)
    if model.compute.dropout or not causal or how == "cudnn":
        return length
    if how == "splash":
        return (length + LONG_BLOCK) / 2 * max(model.compute.shared_prompt, 1)
    block = block_of(length)
    ends = [min(start + block, length) for start in range(0, length, block)]
    starts = [0, *ends[:-1]]
    return sum((end - start) * end for start, end in zip(starts, ends, strict=True)) / length


# Fraction of the peak figures in the data sheet that a step is expected to reach. These are rough:
# a plan compares settings and does not replace a measurement.
REACHED = {"products": 0.6, "memory": 0.8, "links": 0.6}


def seconds_of(setup: Setup, update: Update, work: float, moved: float) -> float | None:
    """Estimated seconds per update: the longer of products and memory traffic, plus communication
    without overlap. None for an unknown chip.

    Args:
        work: floating-point operations per device.
        moved: bytes that a device sends.
    """
    chip = chip_of(setup.mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    tp, itemsize = setup.mesh.shape["tp"], setup.model.compute.dtype.itemsize
    kernels = kernels_of(setup.model)
    passes = update.parts * (3 + (setup.model.compute.gradient_checkpointing == "full"))
    weights = passes * itemsize * sum(x.size for x in kernels) / tp
    states = sum(x.shape[0] * x.shape[1] + x.size // x.shape[1] for x in kernels)  # in and out
    states *= passes * itemsize * update.rows * update.length / tp
    trained = per_device(setup.trainable.target)
    traffic = weights + states + trained * (7 + 3 * update.parts)  # AdamW; accumulating gradients
    products = work / (chip.flops * REACHED["products"])
    memory = traffic / (chip.memory_bandwidth * REACHED["memory"])
    return max(products, memory) + moved / (chip.link_bandwidth * REACHED["links"])


def failures(setup: Setup, program: Program) -> list[str]:
    """Sharding mistakes worth failing on."""
    problems = [f"XLA gathers a whole array to reshard it: {how}" for how in program.rematerialized]
    parts = setup.mesh.shape["fsdp"] * setup.mesh.shape["tp"]
    leaves = by_path(setup.trainable.held)
    total = sum(leaf.size for leaf in leaves.values())
    stacks = {}
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or leaf.size < total / 100:
            continue
        if parts > 1 and not any(leaf.sharding.spec):
            problems.append(f"{path} {leaf.shape} is not sharded, although fsdp x tp = {parts}")
        if leaf.ndim > 2:  # stacked over layers
            tp = setup.mesh.shape["tp"] if "'tp'" in str(leaf.sharding.spec) else 1
            stacks[leaf.size // tp, leaf.shape[0]] = path
    for c in program.collectives or []:
        for _, sizes in c.shapes if c.kind == "all-gather" else ():
            if path := stacks.get((math.prod(sizes), sizes[0] if sizes else 0)):
                problems.append(f"{path} is gathered for all layers at once: {sizes}")
    return sorted(set(problems))


def flops_per_token(
    model: Model,
    reference_in_step: bool,
    trainable: Trainable | type[FullWeights] = FullWeights,
) -> float:
    """Floating-point operations of an update per real token.

    Per weight of a product: two forward, four backward (two if frozen), and two more for a
    reference computed in the step. Attention scores are left out, and so is a score head that is
    applied once per text."""
    if model.scorer:
        every = model.architecture.score_head.every_token
        leaves = by_path(model.shapes if every else model.shapes["model"])
        products = sum(leaf.size for at, leaf in leaves.items() if not at.endswith("embedding"))
    else:
        tied = model.config.tie_word_embeddings
        products = model.parameter_count() - (0 if tied else model.vocab_size * model.config.width)
    forward = 4 if reference_in_step else 2
    products = (forward + 2 * trainable.backward) * products + 2 * trainable.head
    return products + (forward + 4) * trainable.added


def flops_of(setup: Setup, reference_in_step: bool) -> float:
    """Operations of an update of a run per real token; with a value model, those of both models."""
    policy = flops_per_token(setup.model, reference_in_step, setup.trainable)
    if setup.critic is None:
        return policy
    return policy + flops_per_token(setup.trainable.value, False)
