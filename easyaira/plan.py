"""What a run is about to do, in words and figures; and for `--dry_run`, what memory it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira import lora, losses, optim, trainer
from easyaira import mesh as meshes
from easyaira.chips import chip_of, memory_of
from easyaira.models.attention import BLOCK, MAX_BLOCKS
from easyaira.models.layers import padded_vocab
from easyaira.models.registry import Model
from easyaira.prepare import Algorithm, Setup
from easyaira.program import Program, compiled
from easyaira.weights import pair_rows


def describe(setup: Setup) -> str:
    """The run in three lines, or four."""
    config, model, told = setup.config, setup.model, setup.data.report["train"]
    sizes = ",".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    held_out = f", {len(setup.held_out.examples)} held out" if setup.held_out else ""
    dropped = f", dropped {told['dropped']}" if told["dropped"] else ""
    noted = f", noted {told['noted']}" if told["noted"] else ""
    shared = "; prompts stored once a pair" if setup.batches.share_prompt else ""
    learned = "" if model.scorer else f", {told['learned_tokens']:,} of them learned"
    warmup = optim.warmup_steps(config.optimizer, setup.total_steps)
    adapter = f"{describe_adapter(setup)}\n" if setup.adapter else ""
    return (
        f"model   {config.model.name_or_path}: {model.parameter_count():,} parameters, vocabulary "
        f"{model.vocab_size}, {model.compute.dtype.name}, attention by {model.compute.attention}, "
        f"on {setup.mesh.size} x "
        f"{setup.mesh.devices.flat[0].device_kind} ({sizes})\n"
        f"{_new_head(setup)}{adapter}"
        f"data    {len(setup.data.train)} examples{held_out} of {told['read']} rows{dropped}"
        f"{noted}; "
        f"{told['tokens']:,} tokens{learned}{shared}\n"
        f"run     {setup.total_steps} updates of {config.train_batch_size} examples, {warmup} of "
        f"them warm-up, in {config.output_dir}"
    )


def _new_head(setup: Setup) -> str:
    """What of a scorer's head the model that it begins with does not have."""
    adapters = setup.config.lora and setup.config.lora.adapter
    if not setup.model.scorer or setup.config.model.init == "random" or adapters:
        return ""  # adapters bring the head with them
    drawn = setup.origin.check(setup.stored)
    if not drawn:
        return ""
    return (
        f"head    {', '.join(drawn)} drawn with standard deviation "
        f"{setup.model.config.initializer_range} from seed {setup.config.seed}; biases 0\n"
    )


def describe_adapter(setup: Setup) -> str:
    """What is trained instead of the model's weights, and how those are held."""
    adapter = setup.adapter
    count, total = adapter.parameter_count(), setup.model.parameter_count() + _added(adapter)
    held = jax.tree.leaves(adapter.held_target(setup.mesh, setup.model.compute.dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in held)
    names = ", ".join(lora.module_of(row).partition("{}.")[2] for row in adapter.targets)
    if adapter.head:
        names += f", and all of {', '.join(adapter.head_modules)}"
    kind = adapter.config.quantize or setup.model.compute.dtype.name
    return (
        f"lora    {count:,} trainable parameters ({count / total:.4%}): rank "
        f"{adapter.config.r}, scale {adapter.scale:g}, on {names}; frozen linear layers held in "
        f"{kind}, all frozen weights take {size / 2**20:,.1f} MiB"
    )


def _added(adapter: lora.Adapter) -> int:
    """Parameters of adapters beside the model's own; its head is one of those."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.shapes["model"]))


class Plan(NamedTuple):
    """One update of a run: the largest that its data hold, so far as they were sampled.

    Attributes:
        update: see `Update`.
        sizes: bytes on a device, by what they are for, from shapes and shardings.
        work: floating-point operations of a device, by what they are for.
        program: what the compiler says.
        failures: what should not be in it.
    """

    update: Update
    sizes: Mapping[str, float]
    work: Mapping[str, float]
    program: Program
    failures: list[str]

    def moved(self) -> dict[str, tuple[int, float]]:
        """Kind of communication -> how often it happens, and the bytes that a device sends."""
        total: dict[str, tuple[int, float]] = {}
        for c in self.program.collectives or []:
            times, size = total.get(c.kind, (0, 0.0))
            total[c.kind] = times + c.times, size + c.times * c.bytes
        return total


class Update(NamedTuple):
    """What an update computes on a device, and in how many parts.

    Attributes:
        batch: of all devices.
        parts: micro-batches.
        rows, length: of a device in a micro-batch.
        chunks: in which positions with loss are projected, and how many there are in one.
    """

    batch: Mapping[str, np.ndarray]
    parts: int
    rows: int
    length: int
    chunks: tuple[int, int]


def largest_update(setup: Setup, algorithm: Algorithm) -> Update:
    """The update that costs most, with room for what is not yet known of its examples."""
    batches = replace(setup.batches, local=None)  # of all hosts
    found = batches[batches.largest()]
    arrays, shape = dict(found.arrays), found.shape
    for name, sizes in algorithm.known(setup).items():
        arrays[name] = np.zeros((batches.accumulation, setup.micro_batch, *sizes), np.float32)
    mask = arrays["loss_mask"].reshape(batches.accumulation, batches.shards, -1)
    chunk = losses.chunk_size(shape.rows * (shape.length - 1), padded_vocab(setup.model.vocab_size))
    chunks = max(1, -(-int(mask.sum(-1).max()) // chunk))
    return Update(arrays, batches.accumulation, *shape, (chunks, chunk))


def table(setup: Setup) -> str:
    """Every parameter, and over which axes of the mesh it is divided."""
    lines = ["", f"{'parameter':44}{'shape':28}divided by"]
    for path, leaf in meshes.by_path(_parameters(setup)).items():
        spec = ", ".join(str(axes or "-") for axes in leaf.sharding.spec)
        lines.append(f"{path:44}{str(leaf.shape):28}{spec}")
    return "\n".join(lines)


def plan(setup: Setup, algorithm: Algorithm) -> str:
    """Where parameters lie, and what the largest update takes, without allocating any of it."""
    return f"{table(setup)}\n\n{show(setup, measure(setup, algorithm))}"


def _parameters(setup: Setup) -> Any:
    """Shapes and shardings of the weights, as they are held."""
    if setup.adapter is None:
        return setup.model.target(setup.mesh)
    held = setup.adapter.held_target(setup.mesh, setup.model.compute.dtype)
    return lora.joined(held, setup.trained())


def measure(setup: Setup, algorithm: Algorithm) -> Plan:
    """Compile the largest update, and look at it."""
    update = largest_update(setup, algorithm)
    sizes = sizes_of(setup, algorithm, update)
    program = compiled(lambda: lower_step(setup, algorithm, update.batch), update.chunks[0])
    in_step = algorithm.frozen(setup) is not None
    work = work_of(setup, update, in_step)
    return Plan(update, sizes, work, program, failures(setup, program))


def lower_step(setup: Setup, algorithm: Algorithm, arrays: Mapping[str, np.ndarray]) -> Any:
    """The training step for a batch's shapes, lowered for the mesh's devices."""
    return trace_step(setup, algorithm, arrays).lower()


def trace_step(setup: Setup, algorithm: Algorithm, arrays: Mapping[str, np.ndarray]) -> Any:
    """The training step, traced for a batch's shapes without any array."""
    state = trainer.abstract_state(setup.trained(), setup.tx, setup.mesh)
    frozen = setup.frozen_target(algorithm)
    batch = meshes.like(arrays, trainer.batch_shardings(arrays, setup.mesh))
    everywhere = NamedSharding(setup.mesh, P())
    key = setup.dropout_key
    if key is not None:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    step = trainer.jit_train_step(setup.loss_fn(algorithm), setup.tx, state)
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):  # its devices may not be there
        return step.trace(state, frozen, batch, key)


def per_device(tree: Any) -> int:
    """Bytes of a tree's leaves on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def sizes_of(setup: Setup, algorithm: Algorithm, update: Update) -> dict[str, float]:
    """Bytes on a device that shapes and shardings tell.

    Gradients are float32 and divided like the weights; with accumulation there are those of the
    micro-batch and their sum. Logits are those that losses.py holds at a time, with what it keeps
    for the backward pass, the head in the computing dtype, and its gradient, which is whole until
    the devices have added theirs up."""
    trained = setup.trained()
    state = trainer.abstract_state(trained, setup.tx, setup.mesh)
    batch = meshes.like(update.batch, trainer.batch_shardings(update.batch, setup.mesh))
    sizes = {
        "weights": per_device(trained),
        "optimizer": per_device(state.opt_state),
        "frozen": per_device(setup.frozen_target(algorithm)),
        "batch": per_device(batch),
        "gradients": per_device(trained) * (2 if update.parts > 1 else 1),
        "logits": 0,
    }
    if not setup.model.scorer:
        vocab = padded_vocab(setup.model.vocab_size)
        columns, width = vocab // setup.mesh.shape["tp"], _head(setup.model) // vocab
        chunk, itemsize = update.chunks[1], setup.model.compute.dtype.itemsize
        most = -(-update.rows * (update.length - 1) // chunk)
        kept = min(losses.KEPT_CHUNKS, most) if setup.data.train.answers == 2 else 0
        sizes["logits"] = columns * (chunk * (4 + kept * itemsize) + width * (4 + itemsize))
    return sizes


def _head(model: Model) -> int:
    """Weights of the product that turns states into logits; 0 for a scorer."""
    if model.scorer:
        return 0
    leaves = meshes.by_path(model.shapes)
    rows = padded_vocab(model.vocab_size)
    tables = [x for path, x in leaves.items() if path.endswith("embedding") and x.shape[0] == rows]
    return tables[0].size


def depth_of(model: Model) -> int:
    """Layers."""
    return next(leaf.shape[0] for row, leaf in pair_rows(model.shapes, model.rows) if row.stacked)


def kernels_of(model: Model) -> list[jax.ShapeDtypeStruct]:
    """Weights of the layers' products, [layers, in, ...]."""
    leaves = meshes.by_path(model.shapes["model"]).items()
    return [leaf for path, leaf in leaves if path.endswith("kernel") and leaf.ndim > 2]


def work_of(setup: Setup, update: Update, reference_in_step: bool) -> dict[str, float]:
    """Floating-point operations of a device in an update, padding too: of products with weights,
    and of attention's scores, as they are computed."""
    model, adapter = setup.model, setup.adapter
    leaves = meshes.by_path(model.shapes["model"])
    inner = sum(x.size for path, x in leaves.items() if path.endswith("kernel"))
    added = _added(adapter) if adapter else 0
    depth = depth_of(model)
    heads = model.config.heads * getattr(
        model.config, "head_width", model.config.width // model.config.heads
    )
    positions = update.parts * update.rows * update.length
    learned = update.parts * math.prod(update.chunks) * _head(model)
    scores = 4 * depth * heads * _keys(model, update.length) * positions
    forward = 2 * (inner * positions + learned) + scores
    trained = 2 if adapter is None else 1  # products of the backward pass, for each weight
    again = {"none": 0.0, "dots": scores, "full": forward - 2 * learned}
    # a kernel computes scores again for each gradient, and long rows are computed again in blocks
    kernel = model.compute.attention != "xla" and not model.compute.dropout
    work = {
        "forward": forward + 2 * added * positions,
        "backward": 2 * trained * inner * positions
        + 4 * learned
        + 4 * added * positions
        + scores * (3.5 if kernel else 2.5 if update.length > BLOCK else 2),
        "recompute": again[model.compute.gradient_checkpointing],
        "reference": forward if reference_in_step else 0.0,
    }
    return {name: operations / setup.mesh.shape["tp"] for name, operations in work.items()}


def _keys(model: Model, length: int) -> float:
    """Positions that attention compares one with, on average, seen or not."""
    how, causal = model.compute.attention, not model.architecture.encoder
    if model.compute.dropout or not causal or how == "cudnn":
        return length
    if how == "splash":
        return (length + BLOCK) / 2 * (2 if model.compute.shared_prompt else 1)
    block = max(BLOCK, math.ceil(length / MAX_BLOCKS))
    ends = [min(start + block, length) for start in range(0, length, block)]
    starts = [0, *ends[:-1]]
    return sum((end - start) * end for start, end in zip(starts, ends, strict=True)) / length


# Shares of the data sheet's figures that a step is expected to reach. Rough ones: a plan compares
# settings, and does not replace a measurement.
REACHED = {"products": 0.6, "memory": 0.8, "links": 0.6}


def seconds_of(setup: Setup, update: Update, work: float, moved: float) -> float | None:
    """An estimate of an update's duration: products or memory, whichever takes longer, and then
    communication, as if nothing of it were hidden. None for a chip that is not known.

    Args:
        work: operations of a device.
        moved: bytes that it sends.
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
    trained = per_device(setup.trained())
    traffic = weights + states + trained * (7 + 3 * update.parts)  # AdamW; adding gradients up
    products = work / (chip.flops * REACHED["products"])
    memory = traffic / (chip.memory_bandwidth * REACHED["memory"])
    return max(products, memory) + moved / (chip.link_bandwidth * REACHED["links"])


def failures(setup: Setup, program: Program) -> list[str]:
    """What costs much and should not be there."""
    found = [f"the compiler gathers an array to move it: {said}" for said in program.rematerialized]
    parts = setup.mesh.shape["fsdp"] * setup.mesh.shape["tp"]
    leaves = meshes.by_path(_parameters(setup))
    total = sum(leaf.size for leaf in leaves.values())
    stacks = {}
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or leaf.size < total / 100:
            continue
        if parts > 1 and not any(leaf.sharding.spec):
            found.append(f"{path} {leaf.shape} is not divided, although fsdp x tp = {parts}")
        if leaf.ndim > 2:  # of all layers
            tp = setup.mesh.shape["tp"] if "'tp'" in str(leaf.sharding.spec) else 1
            stacks[leaf.size // tp, leaf.shape[0]] = path
    for c in program.collectives or []:
        for _, sizes in c.shapes if c.kind == "all-gather" else ():
            if path := stacks.get((math.prod(sizes), sizes[0] if sizes else 0)):
                found.append(f"{path} is gathered for all layers at once: {sizes}")
    return sorted(set(found))


def show(setup: Setup, found: Plan) -> str:
    """A plan in words and figures."""
    update, program, device = found.update, found.program, setup.mesh.devices.flat[0]
    lines = [
        f"the largest update: {update.parts} micro-batches of {setup.batches.shards} x "
        f"{update.rows} rows of {update.length:,} tokens; compiled in {program.seconds:.0f} s"
    ]
    lines += ["", f"{'bytes per device':24}{'MiB':>10}"]

    def line(name: str, size: float, source: str) -> None:
        digits = 0 if size >= 10 * 2**20 else 2
        lines.append(f"{name:24}{size / 2**20:>10,.{digits}f}  {source}".rstrip())

    if program.refused:
        for name, size in found.sizes.items():
            line(name, size, "from shapes")
        line("needed", program.memory, "at least, by the compiler, which gives up")
    else:
        for name, size in split(found).items():
            line(name, *size)
        line("in all", program.memory, "")
    lines += ["", _communication(found, setup.mesh.size)]
    total = sum(found.work.values())
    parts = ", ".join(f"{name} {n / 1e12:,.4g}" for name, n in found.work.items() if n)
    lines += [f"work    {total / 1e12:,.4g} TFLOP per device: {parts}"]
    moved = sum(size for _, size in found.moved().values())
    seconds = seconds_of(setup, update, total, moved)
    if seconds is None:
        lines += [f"time    no estimate: {device.device_kind} is not in easyaira/chips.py"]
    else:
        lines += [
            f"time    about {seconds:,.3g} s, an estimate: products at {REACHED['products']:.0%} "
            f"of a {device.device_kind}'s peak, no communication hidden"
        ]
    lines += [f"failure {text}" for text in found.failures]
    if not program.refused:
        held, used = (n / 2**20 for n in (program.arguments, program.temporaries))
        lines += [
            f"memory per device: {held:,.0f} MiB held (weights, optimizer, batch), {used:,.0f} MiB "
            "in a step"
        ]
    return "\n".join([*lines, fits(setup, program)[1]])


def fits(setup: Setup, program: Program) -> tuple[bool, str]:
    """Whether a step has room on a device, and that in words."""
    device = setup.mesh.devices.flat[0]
    needed, there = f"{program.memory / 2**30:,.2f} GiB", memory_of(device)
    if program.refused:
        return False, f"does not fit: {program.refused}"
    if there is None:
        return True, f"needs {needed}; what a {device.device_kind} has is not known"
    enough = program.memory <= there
    return enough, f"{'fits' if enough else 'does not fit'}: {needed} of {there / 2**30:,.2f} GiB"


def split(found: Plan) -> dict[str, tuple[float, str]]:
    """What a device's memory is for, in bytes, and how that is known; adds up to all of it."""
    sizes, program = found.sizes, found.program
    held = ("weights", "optimizer", "frozen", "batch")
    rows = {name: (sizes[name], "from shapes") for name in held}
    rest = program.arguments - sum(sizes[name] for name in held)
    rows["padding of these"] = rest, "by difference"
    left = program.temporaries
    for name in ("gradients", "logits"):
        size = min(left, sizes[name])
        rows[name] = size, "from shapes, within the temporaries"
        left -= size
    rows["activations, all else"] = left, "temporaries less these"
    rows["outputs"] = program.outputs, "beside those in the place of arguments"
    return rows


def _communication(found: Plan, devices: int) -> str:
    if found.program.refused or devices == 1:
        return "" if devices > 1 else "no communication: one device"
    if found.program.collectives is None:
        return "communication cannot be read: libtpu is not the one that this JAX was made for"
    lines = [f"{'communication':24}{'times':>10}{'MiB sent per device':>24}"]
    for kind, (times, size) in sorted(found.moved().items()):
        lines.append(f"{kind:24}{times:>10,}{size / 2**20:>24,.0f}")
    return "\n".join(lines)


def flops_per_token(
    model: Model, reference_in_step: bool, adapter: lora.Adapter | None = None
) -> float:
    """Operations of an update per real token: two per weight of a product forward and four
    backward (two if it is frozen), and two more for a reference that is computed in the step.
    Attention scores are left out, and a scorer's head, which is applied once a text."""
    if model.scorer:
        leaves = meshes.by_path(model.shapes["model"])
        products = sum(leaf.size for at, leaf in leaves.items() if not at.endswith("embedding"))
    else:
        tied = model.config.tie_word_embeddings
        products = model.parameter_count() - (0 if tied else model.vocab_size * model.config.width)
    forward = 4 if reference_in_step else 2
    if adapter is None:
        return (forward + 4) * products
    return (forward + 2) * products + (forward + 4) * _added(adapter)
