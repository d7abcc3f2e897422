"""The fastest mesh, accumulation and gradient checkpointing that fit, for `--search`.

Candidates are sorted by a rough time estimate. Those that cannot fit in memory are dropped. The
others are compiled in order until one fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from easyaira.distributed import chips
from easyaira.distributed import mesh as meshes
from easyaira.distributed.sharding import shardings
from easyaira.errors import ConfigError
from easyaira.plan import cost
from easyaira.plan import report as plan_report
from easyaira.train.algorithm import Algorithm
from easyaira.train.setup import Setup, prepare


class Candidate(NamedTuple):
    """One combination of settings.

    Attributes:
        setup: the run with these settings; complete enough for an estimate only.
        seconds: estimated seconds per update.
        least: lower bound of the bytes needed per device.
    """

    setup: Setup
    seconds: float
    least: float

    def flags(self) -> str:
        """The settings as command-line flags."""
        config = self.setup.config
        return (
            f"--mesh {config.mesh} --gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} --model.gradient_checkpointing "
            f"{config.model.gradient_checkpointing}"
        )


def check_chip(setup: Setup, room: float | None) -> None:
    """Raise ConfigError if the chip is unknown.

    Args:
        room: bytes of a device, if they are known.
    """
    kind = setup.mesh.devices.flat[0].device_kind
    if room is None or chips.chip_of(kind) is None:
        raise ConfigError(
            f"search: the chip {kind} is unknown, so settings cannot be compared; use --topology "
            "with a known pod or GPU"
        )


def search(setup: Setup, algorithm: Algorithm, room: float) -> Iterator[str]:
    """Yield a table of the fastest candidates, a log line per compiled one, and finally the
    proposed settings.

    Args:
        room: bytes of a device.

    Raises:
        ConfigError: no candidate fits.
    """
    devices = list(setup.mesh.devices.flat)
    ranked = sorted(candidates(setup, algorithm), key=lambda candidate: candidate.seconds)
    may_fit = [candidate for candidate in ranked if candidate.least <= room]
    yield f"search  {len(ranked)} settings; {len(may_fit)} may fit in {room / 2**30:,.2f} GiB"
    yield from ranking(setup, may_fit, ranked)
    refused: list[Setup] = []
    for candidate in may_fit:
        if any(_needs_more(candidate.setup, other) for other in refused):
            continue
        tried = prepare(candidate.setup.config, algorithm, devices, planned=True)
        fits, words = plan_report.fits(cost.measure(tried, algorithm).program, room)
        yield f"search  {candidate.flags()}: about {candidate.seconds:,.3g} s; {words}"
        if fits:
            yield f"propose {candidate.flags()}"
            return
        refused.append(candidate.setup)
    raise ConfigError("search: nothing fits; use more devices, a smaller data.max_length, or lora")


SHOWN = 10  # candidates


def ranking(
    setup: Setup, may_fit: Sequence[Candidate], ranked: Sequence[Candidate]
) -> Iterator[str]:
    """A table of the fastest candidates that may fit, and of the run's own settings."""
    yield f"{'rank':>6}{'s/update':>10}{'device hours':>14}{'GiB, at least':>15}  settings"
    best = {id(one) for one in may_fit[:SHOWN]}
    for rank, candidate in enumerate(ranked, 1):
        given = _settings(candidate.setup) == _settings(setup)
        if given or id(candidate) in best:
            hours = candidate.seconds * setup.total_steps * setup.mesh.size / 3600
            figures = f"{candidate.seconds:>10,.3g}{hours:>14,.3g}{candidate.least / 2**30:>15,.2f}"
            yield f"{rank:>6}{figures}  {candidate.flags()}{' (as given)' if given else ''}"


def _settings(setup: Setup) -> tuple[Any, ...]:
    return tuple(setup.mesh.shape.values()), setup.batches.accumulation, _keeps(setup)


def candidates(setup: Setup, algorithm: Algorithm) -> Iterator[Candidate]:
    """Every combination of settings that the model and the batch size allow."""
    count, size = setup.mesh.size, setup.batches.size
    rows, together = setup.config.train_batch_size, cost.together_of(setup, algorithm)
    for tp in (n for n in range(1, count + 1) if count % n == 0):
        for fsdp in (n for n in range(1, count // tp + 1) if count // tp % n == 0):
            shards = count // tp
            text = f"dp={shards // fsdp},fsdp={fsdp},tp={tp}"
            try:
                mesh = meshes.make_mesh(text, list(setup.mesh.devices.flat), setup.config.dcn)
                shardings(setup.model.shapes, setup.model.rules, mesh)
            except ConfigError:
                continue
            if setup.model.config.kv_heads % tp:
                continue
            for parts in range(1, size // shards + 1):
                if size % (parts * shards) or rows % (parts * shards * together):
                    continue
                batches = replace(setup.batches, shards=shards, accumulation=parts)
                variant = replace(setup, mesh=mesh, batches=batches)
                variant = _with(variant, mesh=text, gradient_accumulation_steps=parts)
                update = cost.largest_update(variant, algorithm)
                for kept in ("none", "dots", "full"):
                    yield _candidate(_keeping(variant, kept), algorithm, update)


def _with(setup: Setup, **settings) -> Setup:
    return replace(setup, config=replace(setup.config, **settings))


def _keeping(setup: Setup, kept: str) -> Setup:
    config = replace(setup.config.model, gradient_checkpointing=kept)
    compute = replace(setup.model.compute, gradient_checkpointing=kept)
    return _with(replace(setup, model=replace(setup.model, compute=compute)), model=config)


def _candidate(setup: Setup, algorithm: Algorithm, update: cost.Update) -> Candidate:
    work = sum(cost.work_of(setup, update, algorithm.frozen(setup) is not None).values())
    seconds = cost.seconds_of(setup, update, work, moved(setup, update))
    sizes = cost.sizes_of(setup, algorithm, update)
    least = sum(sizes.values()) - sizes["logits"] + kept_bytes(setup, update)
    return Candidate(setup, seconds, least)


def moved(setup: Setup, update: cost.Update) -> float:
    """Estimated bytes that a device sends per update.

    fsdp all-gathers weights in the forward and backward pass and reduce-scatters gradients. dp
    all-reduces gradients. tp all-reduces the outputs of attention and MLP of each layer, forward
    and backward.
    """
    dp, fsdp, tp = (setup.mesh.shape[axis] for axis in ("dp", "fsdp", "tp"))
    itemsize, full = setup.model.compute.dtype.itemsize, _keeps(setup) == "full"
    weights = setup.model.parameter_count() * itemsize / tp
    trained = setup.trainable.parameter_count()
    gathered = (2 * weights + trained * itemsize / tp) * (fsdp - 1) / fsdp
    summed = 2 * trained * 4 / tp / fsdp * (dp - 1) / dp
    states = update.rows * update.length * setup.model.config.width * itemsize
    halves = cost.depth_of(setup.model) * 2 * (3 if full else 2)
    return update.parts * (gathered + summed + halves * states * 2 * (tp - 1) / tp)


def kept_bytes(setup: Setup, update: cost.Update) -> float:
    """Lower bound of the bytes of activations kept for the backward pass.

    These are the input of each layer and, unless products are recomputed, their results. tp shards
    both."""
    model, tp = setup.model, setup.mesh.shape["tp"]
    per_position = cost.depth_of(model) * model.config.width
    if _keeps(setup) != "full":
        kernels = cost.kernels_of(model)
        per_position += sum(kernel.size // kernel.shape[1] for kernel in kernels)
    return update.rows * update.length * per_position * model.compute.dtype.itemsize / tp


def _keeps(setup: Setup) -> str:
    return setup.model.compute.gradient_checkpointing


def _needs_more(one: Setup, other: Setup) -> bool:
    """Whether `one` needs at least as much memory as `other` on the same mesh."""
    order = ("full", "dots", "none")
    return (
        one.config.mesh == other.config.mesh
        and one.batches.accumulation <= other.batches.accumulation
        and order.index(_keeps(one)) >= order.index(_keeps(other))
    )
