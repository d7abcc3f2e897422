"""The one training step and the one loop. An algorithm is the loss function they are given.

A loss function maps (params, frozen, batch, key) to sums: `{name: (sum, count)}`, where `loss` is
what is minimised. Sums and counts are added up over micro-batches, devices and steps, and divided
once. Weights that are not trained (a DPO reference) are `frozen`, an argument and no constant of
the compiled program.

What is no average may be left under PER_EXAMPLE, as `{name: [B, ...]}` for the examples of a
micro-batch: an evaluation hands all of them to the algorithm's summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira import hosts, metrics, watch
from easyaira.checkpoint import Checkpoints, abstract
from easyaira.config import RunConfig
from easyaira.data.batches import LAYOUT, Batch, Batches
from easyaira.errors import NonFiniteError, Preempted
from easyaira.mesh import BATCH_AXES, constrain, data_shards, like, local_shards
from easyaira.stop import StopSignal

Sums = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array | None], Sums]
Summary = Callable[[Mapping[str, np.ndarray]], Mapping[str, float | None]]
PER_EXAMPLE = "examples"


class State(NamedTuple):
    """What a step changes.

    Attributes:
        step: updates done.
        params: float32 weights.
        opt_state: the optimizer's.
        failed: the first update whose numbers were not finite, or -1. From then on nothing changes.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    failed: jax.Array


def abstract_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of a state: the optimizer's part is divided like the weights.

    Args:
        params: arrays, or their shapes with shardings.
    """
    replicated = NamedSharding(mesh, P())
    opt_shapes = jax.eval_shape(tx.init, params)
    opt_shardings = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        opt_shapes,
        jax.tree.map(lambda leaf: leaf.sharding, params),
        transform_non_params=lambda _: replicated,
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return State(scalar, abstract(params), like(opt_shapes, opt_shardings), scalar)


def init_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state before the first update."""
    target = abstract_state(params, tx, mesh)
    of = jax.tree.map(lambda leaf: leaf.sharding, target)
    opt_state = jax.jit(tx.init, out_shardings=of.opt_state)(params)
    return resume_state(0, params, opt_state, mesh)


def resume_state(step: int, params: Any, opt_state: Any, mesh: Mesh) -> State:
    """The state after `step` updates."""
    at, none = (jax.device_put(jnp.int32(n), NamedSharding(mesh, P())) for n in (step, -1))
    return State(at, params, opt_state, none)


def make_train_step(loss_fn: LossFn, tx: optax.GradientTransformation) -> Callable:
    """(state, frozen, batch, key) -> (state, sums). The batch's first axis counts micro-batches.

    Gradients of the summed loss are added up and divided by its count once, so that an update does
    not depend on how it was cut into micro-batches. `key` is for dropout; None trains without.
    """

    def gradients(params, frozen, batch, key):
        def total(params):
            sums = loss_fn(params, frozen, batch, key)
            sums.pop(PER_EXAMPLE, None)
            return sums["loss"][0], sums

        return jax.grad(total, has_aux=True)(params)

    def train_step(state: State, frozen: Any, batch: Mapping[str, jax.Array], key: Any):
        parts = batch["tokens"].shape[0]
        key = None if key is None else jax.random.fold_in(key, state.step)

        def micro(i):
            part_key = None if key is None else jax.random.fold_in(key, i)
            part = jax.tree.map(lambda array: array[i], batch)
            return gradients(state.params, frozen, part, part_key)

        def add(total, i):
            return jax.tree.map(jnp.add, total, micro(i)), None

        if parts == 1:
            grads, sums = micro(0)
        else:
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(micro, 0))
            (grads, sums), _ = jax.lax.scan(add, zeros, jnp.arange(parts))
        loss, count = sums["loss"]
        grads = jax.tree.map(lambda grad: grad / jnp.maximum(count, 1), grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (state.failed < 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        failed = jnp.where(ok | (state.failed >= 0), state.failed, state.step)
        state = State(state.step + 1, params, opt_state, failed)
        return state, sums | {"grad_norm": (grad_norm, jnp.float32(1)), "failed": (failed, 1)}

    return train_step


def jit_train_step(loss_fn: LossFn, tx: optax.GradientTransformation, state: State) -> Any:
    """The training step as a program; the state comes back as it lay, in the memory it lay in."""
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(loss_fn, tx)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Rows are divided over the mesh; what is known of examples is small, and everywhere."""
    rows = NamedSharding(mesh, P(None, BATCH_AXES, None))
    return {name: rows if name in LAYOUT else NamedSharding(mesh, P()) for name in batch}


def to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on the devices. Each process brings the rows of its own."""
    per_shard, own = batch.shape.rows, local_shards(mesh)

    def put(name: str, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if name not in LAYOUT:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        micro_batches, _, length = array.shape
        rows = array.reshape(micro_batches, len(own), per_shard, length)
        shape = (micro_batches, data_shards(mesh) * per_shard, length)
        return jax.make_array_from_callback(
            shape, sharding, lambda index: rows[:, own.index((index[1].start or 0) // per_shard)]
        )

    shardings = batch_shardings(batch.arrays, mesh)
    return {name: put(name, array, shardings[name]) for name, array in batch.arrays.items()}


def make_eval_step(loss_fn: LossFn) -> Callable:
    """(params, frozen, batch) -> (sums, what is known of each example), without gradients."""

    def eval_step(params, frozen, batch):
        sums = loss_fn(params, frozen, jax.tree.map(lambda array: array[0], batch), None)
        examples = sums.pop(PER_EXAMPLE, {})
        return sums, jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), examples)

    return jax.jit(eval_step)


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
    for ready in ahead(batches, 0, len(batches), mesh, "of the evaluation"):
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


class Ready(NamedTuple):
    """An update to be computed.

    Attributes:
        batch: without its arrays, which are not needed twice.
        arrays: on the devices.
        waited: seconds that nobody could do anything but wait for it.
    """

    batch: Batch
    arrays: dict[str, jax.Array]
    waited: float


def ahead(
    batches: Batches, start: int, stop: int, mesh: Mesh, what: str = "of the training"
) -> Iterator[Ready]:
    """Updates start..stop - 1, each made on a thread while the one before it is computed."""

    def make(update: int) -> tuple[Batch, dict[str, jax.Array]]:
        batch = batches[update]
        return batch._replace(arrays={}), to_device(batch, mesh)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming: Future | None = pool.submit(make, start) if start < stop else None
        for update in range(start, stop):
            watch.beat(f"making batch {update + 1} {what}")
            asked = time.perf_counter()
            batch, arrays = coming.result()
            waited = time.perf_counter() - asked
            coming = pool.submit(make, update + 1) if update + 1 < stop else None
            watch.beat(f"computing batch {update + 1} {what}")
            yield Ready(batch, arrays, waited)


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
    log: metrics.Log,
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
    train_step = jit_train_step(loss_fn, tx, state)
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
    for step, ready in enumerate(ahead(batches, start, total_steps, mesh), start + 1):
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
    watch.beat("saving")
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
