"""The training loop: updates, evaluation, logging and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from easyaira.config.run import RunConfig
from easyaira.data.batches import Batches
from easyaira.distributed import hosts, watchdog
from easyaira.distributed.signals import StopSignal
from easyaira.errors import NonFiniteError, Preempted
from easyaira.storage.checkpoints import Checkpoints
from easyaira.train import loader, metrics
from easyaira.train import step as steps
from easyaira.train.loader import Ready
from easyaira.train.log import Log
from easyaira.train.step import LossFn, State, Summary, Sums, make_eval_step


def evaluate(
    eval_step: Callable,
    params: Any,
    frozen: Any,
    batches: Batches,
    mesh: Mesh,
    summary: Summary | None = None,
    stop: StopSignal | None = None,
) -> dict[str, float | None] | None:
    """Averages over all examples of `batches`, and what `summary` says of all of them together,
    named eval_...; None if a signal came meanwhile, to any host."""
    sums: metrics.Sums = {}
    known: dict[str, list[np.ndarray]] = {}
    for ready in loader.ahead(batches, 0, len(batches), mesh, "of the evaluation"):
        more, examples = jax.device_get(eval_step(params, frozen, ready.arrays))
        if stop and hosts.any_of(bool(stop.received), mesh):
            return None
        sums = metrics.add(sums, more)
        for name, values in examples.items():
            known.setdefault(name, []).append(values[ready.batch.slots[:, 1]])
    row: dict[str, float | None] = dict(metrics.averages(sums, "eval_"))
    if summary is not None:
        told = summary({name: np.concatenate(parts) for name, parts in known.items()})
        row |= {f"eval_{name}": value for name, value in told.items()}
    return row


def fit(
    state: State,
    frozen: Any,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    batches: Batches,
    held_out: Batches | None,
    total_steps: int,
    config: RunConfig,
    mesh: Mesh,
    key: jax.Array | None,
    flops_per_token: float,
    before: Mapping[str, float],
    window: metrics.Window,
    log: Log,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    stop: StopSignal,
    summary: Summary | None = None,
) -> State:
    """Train from `state` to `total_steps`; log, evaluate and save as `config` says.

    Raises:
        NonFiniteError: a loss or a gradient is not finite. Nothing of it entered the parameters.
        Preempted: a signal came, and the state is saved.
        StorageError: a checkpoint could not be written.
    """
    train_step = steps.jit_train_step(loss_fn, tx, state)
    eval_step = make_eval_step(loss_fn)
    peak = metrics.peak_flops(mesh.devices.flat[0].device_kind)
    start = int(state.step)
    pending: list[tuple[int, Ready, Sums]] = []  # updates whose numbers are still on the device
    shapes = set()  # of rows, each of which was compiled for
    asked: Any = False  # whether a host was told to stop before the update before
    step, stopping = start, False

    def due(step: int, every: int) -> bool:
        return step == total_steps or bool(every and step % every == 0)

    def measure() -> dict[str, float | None] | None:
        if held_out is None:
            return {}
        return evaluate(eval_step, state.params, frozen, held_out, mesh, summary, stop)

    def settle(until: int, measured: Mapping[str, float | None]) -> None:
        """Fetch the numbers of updates up to `until`, and write what is to be logged of them."""
        while pending and pending[0][0] <= until:
            step, ready, sums = pending.pop(0)
            sums = jax.device_get(sums)
            if (failed := int(sums.pop("failed")[0])) >= 0:
                raise NonFiniteError(_failure(failed, batches, checkpoints))
            window.add(sums, ready.batch, ready.waited, timed=step > start + 1)
            row = measured if step == until else {}
            if due(step, config.logging_steps):
                row = window.take() | row
                row |= {"learning_rate": float(schedule(step - 1)), "epoch": step / len(batches)}
                rate = row["tokens_per_second"]
                row["mfu"] = rate and peak and rate * flops_per_token / (peak * mesh.size)
                row["compilations"] = len(shapes)
            if row:
                log.write(step, row)

    if start == 0 or window.unmeasured:
        row = {**before, **(measure() or {})}
        window.unmeasured = False
        if row:
            log.write(start, row)
    for step, ready in enumerate(loader.ahead(batches, start, total_steps, mesh), start + 1):
        state, sums = train_step(state, frozen, ready.arrays, key)
        stop.deferred = True  # from here on, there is something to save
        shapes.add(ready.batch.shape)
        pending.append((step, ready, sums))
        log.advance(1)
        # read once: a signal that comes later is for the next update. What several hosts have
        # received is known to all of them one update later, since nobody waits for it
        before_last, asked = asked, hosts.any_of(bool(stop.received), mesh)
        stopping = bool(before_last if hosts.several() else asked)
        evaluating, saving = due(step, config.eval_steps), due(step, config.save_steps)
        settle(step - 1, {})  # one update behind, so that the device never waits for the host
        if stopping or evaluating or saving or step == start + 1:
            jax.block_until_ready(state.step)
            window.pause()
            measured = measure() if evaluating and not stopping else {}
            if measured is None:
                stopping = True
            window.unmeasured = evaluating and stopping
            settle(step, measured or {})
        if stopping or saving:
            position = {"seed": config.seed, "update": step}
            saved_meta = meta | {"window": window.to_save()}
            checkpoints.save(step, state.params, state.opt_state, position, saved_meta)
        if stopping:
            break
        window.run()
    watchdog.beat("saving")
    checkpoints.wait()
    stop.deferred = False
    told = hosts.problem_of_any(stop.received) if stopping else stop.received
    if told:
        raise Preempted(
            f"{told} after update {step} of {total_steps}; the state is saved, run the same "
            "command again"
        )
    return state


def _failure(failed: int, batches: Batches, checkpoints: Checkpoints) -> str:
    rows = batches.examples.rows[batches.members(failed)]
    kept = checkpoints.latest()
    where = f"checkpoint {kept} is from before it" if kept is not None else "nothing was saved yet"
    return (
        f"update {failed + 1}: loss or gradient is not finite (rows {rows[:16].tolist()} of "
        f"the data, counted from 0). The parameters were left as they were; {where}. A smaller "
        "optimizer.learning_rate or float32 usually mends it"
    )
