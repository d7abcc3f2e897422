"""Adam whose moments are written in place on CPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from easyaira.distributed.sharding import on_cpu


class AdamState(NamedTuple):
    """optax.ScaleByAdamState, kept by `scale_by_adam` itself where an update is not applied.

    Attributes:
        count: number of updates.
        mu, nu: float32 moments of each parameter.
    """

    count: jax.Array
    mu: Any
    nu: Any


def is_adam(node: Any) -> bool:
    return isinstance(node, AdamState)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, the same bits: Kingma and Ba (2015), algorithm 1.

    `update` takes `ok`; where it is False, the state stays as it is. On CPUs the update is computed
    from the state that is kept, so nothing reads the old moments after the new ones are known.
    Otherwise XLA's CPU would copy all moments before it writes the new ones in their place.
    """

    def init(params: Any) -> AdamState:
        return AdamState(*optax.scale_by_adam().init(params))

    def update(grads: Any, state: AdamState, params: Any = None, *, ok: Any = True, **_: Any):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        new = AdamState(count, mu, nu)
        kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
        if on_cpu():
            mu, nu = jax.lax.optimization_barrier((kept.mu, kept.nu))
        mu = optax.tree.bias_correction(mu, b1, count)
        nu = optax.tree.bias_correction(nu, b2, count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), kept

    return optax.GradientTransformationExtraArgs(init, update)
