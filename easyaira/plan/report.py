"""A plan in words: what a run is about to do, and what it takes."""

from __future__ import annotations

import jax

from easyaira.distributed.chips import memory_of
from easyaira.distributed.tree import by_path
from easyaira.lora.adapter import module_of
from easyaira.plan import cost
from easyaira.plan.cost import REACHED, Plan, added_by, seconds_of
from easyaira.plan.hlo import Program
from easyaira.train import optimizer
from easyaira.train.algorithm import Algorithm
from easyaira.train.setup import Setup


def describe(setup: Setup) -> str:
    """The run in three lines, or four."""
    config, model, told = setup.config, setup.model, setup.data.report["train"]
    sizes = ",".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    held_out = f", {len(setup.held_out.examples)} held out" if setup.held_out else ""
    dropped = f", dropped {told['dropped']}" if told["dropped"] else ""
    noted = f", noted {told['noted']}" if told["noted"] else ""
    shared = "; prompts stored once a pair" if setup.batches.share_prompt else ""
    learned = "" if model.scorer else f", {told['learned_tokens']:,} of them learned"
    warmup = optimizer.warmup_steps(config.optimizer, setup.total_steps)
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
    count, total = adapter.parameter_count(), setup.model.parameter_count() + added_by(adapter)
    held = jax.tree.leaves(adapter.held_target(setup.mesh, setup.model.compute.dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in held)
    names = ", ".join(module_of(row).partition("{}.")[2] for row in adapter.targets)
    if adapter.head:
        names += f", and all of {', '.join(adapter.head_modules)}"
    kind = adapter.config.quantize or setup.model.compute.dtype.name
    return (
        f"lora    {count:,} trainable parameters ({count / total:.4%}): rank "
        f"{adapter.config.r}, scale {adapter.scale:g}, on {names}; frozen linear layers held in "
        f"{kind}, all frozen weights take {size / 2**20:,.1f} MiB"
    )


def table(setup: Setup) -> str:
    """Every parameter, and over which axes of the mesh it is divided."""
    lines = ["", f"{'parameter':44}{'shape':28}divided by"]
    for path, leaf in by_path(setup.trainable.held).items():
        spec = ", ".join(str(axes or "-") for axes in leaf.sharding.spec)
        lines.append(f"{path:44}{str(leaf.shape):28}{spec}")
    return "\n".join(lines)


def plan(setup: Setup, algorithm: Algorithm) -> str:
    """Where parameters lie, and what the largest update takes, without allocating any of it."""
    return f"{table(setup)}\n\n{show(setup, cost.measure(setup, algorithm))}"


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
        lines += [
            f"time    no estimate: {device.device_kind} is not in easyaira/distributed/chips.py"
        ]
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
