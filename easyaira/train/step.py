"""The training step, for any loss function.

A loss function maps (params, frozen, batch, key) to sums: `{name: (sum, count)}`, and `loss` is
minimised. Sums and counts are added up over micro-batches, devices and steps, and divided once.
Frozen weights (a DPO reference) are an argument, `frozen`, so they do not become constants of the
compiled program.

Values that are not averages go under PER_EXAMPLE, as `{name: [B, ...]}` for the examples of a
micro-batch. An evaluation passes them to the algorithm's summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.distributed.sharding import constrain, like
from easyaira.distributed.tree import abstract
from easyaira.train.adam import is_adam
from easyaira.train.quantized_adam import is_quantized, shardings_of

Sums = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array | None], Sums]
Summary = Callable[[Mapping[str, np.ndarray]], Mapping[str, float | None]]
PER_EXAMPLE = "examples"


class State(NamedTuple):
    """Training state.

    Attributes:
        step: number of completed updates.
        params: float32 trainable parameters.
        opt_state: optimizer state.
        failed: the first update with a loss or gradient that is not finite, or -1. Later updates
            change nothing.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    failed: jax.Array


def abstract_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of a state; the optimizer state is sharded like the params.

    Args:
        params: arrays, or ShapeDtypeStructs with shardings.
    """
    replicated = NamedSharding(mesh, P())
    opt_shapes = jax.eval_shape(tx.init, params)
    opt_shardings = optax.tree.map_params(
        tx,
        lambda moment, of: moment if _is_masked(moment) else shardings_of(moment, of),
        opt_shapes,
        jax.tree.map(lambda leaf: leaf.sharding, params),
        transform_non_params=lambda _: replicated,
        is_leaf=lambda moment: is_quantized(moment) or _is_masked(moment),
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return State(scalar, abstract(params), like(opt_shapes, opt_shardings), scalar)


def _is_masked(moment: Any) -> bool:
    """Whether it stands for a parameter that this part of the optimizer does not train."""
    return isinstance(moment, optax.MaskedNode)


def init_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state before the first update."""
    target = abstract_state(params, tx, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    return resume_state(0, params, opt_state, mesh)


def resume_state(step: int, params: Any, opt_state: Any, mesh: Mesh) -> State:
    """The state after `step` updates."""
    count, none = (jax.device_put(jnp.int32(n), NamedSharding(mesh, P())) for n in (step, -1))
    return State(count, params, opt_state, none)


def make_train_step(loss_fn: LossFn, tx: optax.GradientTransformation) -> Callable:
    """(state, frozen, batch, key, rate) -> (state, sums). The batch's first axis counts
    micro-batches.

    Gradients of the summed loss are accumulated and divided by the total count once, so an update
    does not depend on the division into micro-batches. `key` is for dropout; None: no dropout.
    `rate` is the learning rate.
    """

    def gradients(params, frozen, batch, key):
        def total(params):
            sums = loss_fn(params, frozen, batch, key)
            sums.pop(PER_EXAMPLE, None)
            return sums["loss"][0], sums

        return jax.grad(total, has_aux=True)(params)

    # once, for the shapes of the sums and for the loop over micro-batches
    traced_once = jax.jit(gradients, inline=True)

    def train_step(state: State, frozen: Any, batch: Mapping[str, jax.Array], key: Any, rate: Any):
        parts = batch["tokens"].shape[0]
        key = None if key is None else jax.random.fold_in(key, state.step)

        def micro(i, part):
            part_key = None if key is None else jax.random.fold_in(key, i)
            return traced_once(state.params, frozen, part, part_key)

        def add(total, numbered):
            return jax.tree.map(jnp.add, total, micro(*numbered)), None

        first = jax.tree.map(lambda array: jax.lax.index_in_dim(array, 0, keepdims=False), batch)
        if parts == 1:
            grads, sums = micro(0, first)
        else:
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(micro, 0, first))
            (grads, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), batch))
        loss, count = sums["loss"]
        per_count = 1 / jnp.maximum(count, 1)
        # the norm first: XLA's CPU would store the scaled gradients for both
        squares = (jnp.square(grad).sum() for grad in jax.tree.leaves(grads))
        grad_norm = jnp.sqrt(sum(squares)) * per_count
        grads = jax.tree.map(lambda grad: grad * per_count, grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (state.failed < 0)
        update = optax.with_extra_args_support(tx).update
        # for the transformations in optimizer.py that take them
        known = {"ok": ok, "grad_norm": grad_norm, "learning_rate": rate}
        updates, opt_state = update(grads, state.opt_state, state.params, **known)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: new if is_adam(new) else jnp.where(ok, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
            is_leaf=is_adam,
        )
        failed = jnp.where(ok | (state.failed >= 0), state.failed, state.step)
        state = State(state.step + 1, params, opt_state, failed)
        return state, sums | {"grad_norm": (grad_norm, jnp.float32(1)), "failed": (failed, 1)}

    return train_step


def jit_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    state: State,
    compiler_options: Mapping[str, Any] | None,
) -> Any:
    """Compile the training step; the state is donated and keeps its shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        make_train_step(loss_fn, tx),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options,
    )


def jit_eval_step(loss_fn: LossFn, compiler_options: Mapping[str, Any] | None) -> Callable:
    """(params, frozen, batch) -> (sums, per-example values), without gradients."""

    def eval_step(params, frozen, batch):
        sums = loss_fn(params, frozen, jax.tree.map(lambda array: array[0], batch), None)
        examples = sums.pop(PER_EXAMPLE, {})
        return sums, jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), examples)

    return jax.jit(eval_step, compiler_options=compiler_options)
