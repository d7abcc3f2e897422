"""Reports in words: what a run will do, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping

from easyaira.distributed.cards import Absent
from easyaira.distributed.tree import by_path
from easyaira.plan.cost import REACHED, Plan, seconds_of
from easyaira.plan.counted import ERROR
from easyaira.plan.hlo import Program
from easyaira.train import optimizer
from easyaira.train.resolve import has_weights, lacks_bfloat16
from easyaira.train.setup import Setup


def describe(setup: Setup) -> str:
    """Summary of the run in three to five lines."""
    config, model, counts = setup.config, setup.model, setup.data.report["train"]
    sizes = ",".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    held_out = f", {len(setup.data.held_out):,} held out" if setup.data.held_out else ""
    dropped = f"; dropped {_counts(counts['dropped'])}" if counts["dropped"] else ""
    noted = f"; {_counts(counts['noted'])}" if counts["noted"] else ""
    who = "pair's" if setup.batches.examples.answers == 2 else "group's"
    shared = f"; each {who} prompt stored once" if setup.batches.share_prompt else ""
    # prompts have nothing to learn, nor do texts to score
    learned = counts["learned_tokens"] and not model.scorer
    learned = f", {counts['learned_tokens']:,} of them learned" if learned else ""
    warmup = optimizer.warmup_steps(config.optimizer, setup.total_steps)
    return (
        f"model   {config.model.name_or_path}: {model.parameter_count():,} parameters, vocabulary "
        f"{model.vocab_size:,}, {model.compute.dtype.name}, "
        f"attention by {model.compute.attention}, on {setup.mesh.size} x "
        f"{setup.mesh.devices.flat[0].device_kind} ({sizes})\n"
        f"{_new_head(setup)}{setup.trainable.describe()}"
        f"data    {len(setup.data.train):,} examples{held_out} of {counts['read']:,} rows{dropped}"
        f"{noted}; "
        f"{counts['tokens']:,} tokens{learned}{shared}\n"
        f"run     {setup.total_steps:,} updates of {config.train_batch_size} examples, {warmup} of "
        f"them warm-up, in {config.output_dir}"
    )


def _counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in rows.items())


def _new_head(setup: Setup) -> str:
    """Line about score head parameters that the initial model lacks, or ""."""
    adapters = setup.config.lora and setup.config.lora.adapter
    if not setup.model.scorer or setup.config.model.init == "random" or adapters:
        return ""  # saved adapters contain the head
    if not has_weights(setup.origin):  # a plan
        return ""
    missing = setup.origin.check(setup.stored)
    if not missing:
        return ""
    return (
        f"head    {', '.join(missing)} initialised with standard deviation "
        f"{setup.model.config.initializer_range} from seed {setup.config.seed}; biases 0\n"
    )


def table(setup: Setup) -> str:
    """Every parameter with its shape and, on several devices, the mesh axes that shard it."""
    rows = [("parameter", "shape", "sharded by")]
    for path, leaf in by_path(setup.trainable.held).items():
        spec = ", ".join(str(axes or "-") for axes in leaf.sharding.spec)
        rows.append((path, str(leaf.shape), spec))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    shown = 3 if setup.mesh.size > 1 else 2
    lines = ["".join(map(str.ljust, row[:shown], widths)).rstrip() for row in rows]
    return "\n".join(["", *lines])


def method(setup: Setup) -> str:
    """Line about how the memory will be found."""
    device, compute = setup.mesh.devices.flat[0], setup.model.compute
    if not isinstance(device, Absent):
        line = "plan    compiling the largest update; takes minutes for a large model"
    else:
        line = (
            "plan    counting the memory of the largest update, as no compiler for "
            f"{device.device_kind} is installed; the count may be wrong by {ERROR:.0%}"
        )
    if lacks_bfloat16(device) and compute.dtype.itemsize == 4:
        line += f"\nwarning: {device.device_kind} has no bfloat16; float32 is used, not float16"
    return line


def show(setup: Setup, plan: Plan, room: float | None) -> str:
    """Format a plan.

    Args:
        room: bytes of a device, or None.
    """
    update, program, device = plan.update, plan.program, setup.mesh.devices.flat[0]
    lines = [
        f"largest update: {_count(update.parts, 'micro-batch', 'es')} x "
        f"{_count(setup.batches.shards, 'data shard')} x {_count(update.rows, 'row')} x "
        f"{_count(update.length, 'token')}; {'counted' if program.counted else 'compiled'} in "
        f"{program.seconds:.0f} s"
    ]
    lines += ["", f"{'bytes per device':24}{'MiB':>10}"]

    def line(name: str, size: float, source: str) -> None:
        digits = 0 if size >= 10 * 2**20 else 2
        lines.append(f"{name:24}{size / 2**20:>10,.{digits}f}  {source}".rstrip())

    if program.refused:
        for name, size in plan.sizes.items():
            line(name, size, "from shapes")
        line("needed", program.memory, "at least, by the compiler's error")
    else:
        for name, size in split(plan).items():
            line(name, *size)
        line("total", program.memory, "")
    lines += ["", _communication(plan, setup.mesh.size)]
    total = sum(plan.work.values())
    parts = ", ".join(f"{name} {n / 1e12:,.4g}" for name, n in plan.work.items() if n)
    lines += [f"work    {total / 1e12:,.4g} TFLOP per device: {parts}"]
    moved = sum(size for _, size in plan.moved().values())
    seconds = seconds_of(setup, update, total, moved)
    if seconds is None:
        lines += [f"time    no estimate: the speed of a {device.device_kind} is unknown"]
    else:
        lines += [
            f"time    about {seconds:,.3g} s (estimate): products at {REACHED['products']:.0%} "
            f"of the peak of {device.device_kind}, communication not overlapped",
            _chip_hours(setup, seconds),
        ]
    lines += [f"failure {text}" for text in plan.failures]
    if not program.refused:
        held, used = (n / 2**20 for n in (program.arguments, program.temporaries))
        lines += [
            f"memory per device: {held:,.0f} MiB held (weights, optimizer, batch), {used:,.0f} MiB "
            "in a step"
        ]
    words = fits(program, room)[1]
    if room and isinstance(device, Absent) and room >= program.memory > room * JAX_TAKES:
        words += "; set XLA_PYTHON_CLIENT_MEM_FRACTION=.93, since JAX takes 75 % by default"
    return "\n".join([*lines, words])


JAX_TAKES = 0.75 / 0.93  # JAX's default share of a GPU, relative to what programs may use


def _chip_hours(setup: Setup, seconds: float) -> str:
    hours = seconds * setup.total_steps * setup.mesh.size / 3600
    device = setup.mesh.devices.flat[0].device_kind
    return (
        f"cost    at most about {hours:,.3g} device hours (estimate): {setup.total_steps:,} "
        f"updates as large as this one on {setup.mesh.size} x {device}; without compilation, "
        "evaluation and export"
    )


def fits(program: Program, room: float | None) -> tuple[bool, str]:
    """Whether a program fits in a device's memory, and a sentence that says so."""
    needed = f"{'about ' if program.counted else ''}{program.memory / 2**30:,.2f} GiB"
    if program.refused:
        return False, f"does not fit: {program.refused}"
    if room is None:
        return True, f"needs {needed} (this device's memory is unknown)"
    enough = program.memory <= room
    return enough, f"{'fits' if enough else 'does not fit'}: {needed} of {room / 2**30:,.2f} GiB"


def split(plan: Plan) -> dict[str, tuple[float, str]]:
    """Bytes per device by purpose, each with the source of the figure. They add up to
    `Program.memory`."""
    sizes, program = plan.sizes, plan.program
    held = ("weights", "optimizer", "frozen", "batch")
    rows = {name: (sizes[name], "from shapes") for name in held}
    rest = program.arguments - sum(sizes[name] for name in held)
    rows["padding"] = rest, "of the rows above, by difference"
    left = program.temporaries
    for name in ("gradients", "logits"):
        size = min(left, sizes[name])
        rows[name] = size, "from shapes, part of the temporaries"
        left -= size
    rows["activations, other"] = left, "all other temporaries"
    rows["outputs"] = program.outputs, "except those that alias arguments"
    return rows


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n:,} {noun}{plural if n != 1 else ''}"


def _communication(plan: Plan, devices: int) -> str:
    if plan.program.counted and devices > 1:
        return "communication is not counted"
    if plan.program.refused or devices == 1:
        return "" if devices > 1 else "no communication: one device"
    if plan.program.collectives is None:
        return "communication unknown: the installed libtpu does not match this version of JAX"
    lines = [f"{'communication':24}{'times':>10}{'MiB sent per device':>24}"]
    for kind, (times, size) in sorted(plan.moved().items()):
        lines.append(f"{kind:24}{times:>10,}{size / 2**20:>24,.0f}")
    return "\n".join(lines)
