"""The optimizer: AdamW or Muon, decoupled decay, a schedule, clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from easyaira.config.algorithms import OptimizerConfig
from easyaira.distributed.tree import path_of
from easyaira.errors import ConfigError
from easyaira.train import adam, muon, quantized_adam

AT_ONCE = 1024  # learning rates that are computed together


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Number of warm-up updates."""
    return int(config.warmup_steps) or math.ceil(config.warmup_ratio * total_steps)


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update n, counted from 0; equals transformers' schedule of the same name.

    Raises:
        ConfigError: the warm-up is as long as the run, or warm-up and decay are longer.
    """
    warmup = warmup_steps(config, total_steps)
    if warmup and warmup >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {warmup} of {total_steps} updates; make it shorter than "
            "the run"
        )
    peak, floor, decay_steps = config.learning_rate, config.min_lr_rate, total_steps - warmup
    falling = math.ceil(config.decay_ratio * total_steps)
    stable = decay_steps - falling
    if config.lr_scheduler_type == "warmup_stable_decay" and stable < 0:
        raise ConfigError(
            f"optimizer.decay_ratio: {warmup} updates of warm-up and {falling} of decay are more "
            f"than the run's {total_steps}; make one shorter"
        )
    decay = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
        "cosine_with_min_lr": lambda: optax.cosine_decay_schedule(peak, decay_steps, floor),
        "warmup_stable_decay": lambda: optax.join_schedules(
            [
                optax.constant_schedule(peak),
                optax.cosine_decay_schedule(peak, max(falling, 1), floor),
            ],
            [stable],
        ),
        "inverse_sqrt": lambda: _inverse_sqrt(peak, warmup or 10_000),
        "constant": lambda: optax.constant_schedule(peak),
        "constant_with_warmup": lambda: optax.constant_schedule(peak),
    }[config.lr_scheduler_type]()
    if not warmup:
        return decay
    # transformers' warm-up begins at the floor where the schedule has a stable part
    first = floor * peak if config.lr_scheduler_type == "warmup_stable_decay" else 0.0
    return optax.join_schedules([optax.linear_schedule(first, peak, warmup), decay], [warmup])


def _inverse_sqrt(peak: float, timescale: int) -> optax.Schedule:
    """The peak times sqrt(timescale / (n + timescale)), n updates after the warm-up."""
    return lambda n: peak * jnp.sqrt(timescale / (n + jnp.float32(timescale)))


def on_host(schedule: optax.Schedule) -> Callable[[int], np.float32]:
    """The learning rate of update n as a number on the host, which a step takes as an argument: so
    runs that differ in learning rate, schedule or length share one compiled program."""
    of_all = jax.jit(jax.vmap(schedule))

    @lru_cache(maxsize=2)
    def block(number: int) -> np.ndarray:
        return np.asarray(of_all(number * AT_ONCE + np.arange(AT_ONCE)), np.float32)

    return lambda update: block(update // AT_ONCE)[update % AT_ONCE]


def scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_learning_rate of a schedule, the same bits and the same state. `update` takes
    the rate, `learning_rate`."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any):
        updates = jax.tree.map(lambda x: jnp.asarray(-learning_rate, x.dtype) * x, updates)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def decays(params: Any) -> Any:
    """Mask of weight decay: True for matrices and embeddings, False for norms and biases.

    Magnitudes of DoRA decay, too: transformers leaves out only norms and biases."""
    matrices = ("kernel", "embedding", "lora_a", "lora_b", "lora_magnitude", "token_rows")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_of(path).endswith(matrices), params
    )


def clip_by_global_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm by one factor: XLA would store its quotients. `update` takes the
    norm, `grad_norm`, if it is known."""

    def clip(grads: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any):
        norm = optax.tree.norm(grads) if grad_norm is None else grad_norm
        factor = jnp.minimum(largest / norm, 1)
        return jax.tree.map(lambda grad: grad * factor, grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clip, then AdamW: Loshchilov and Hutter (2019), Decoupled Weight Decay, algorithm 2; or Muon
    (see muon.py), with this AdamW for the parameters that are not matrices of hidden layers.

    `update` takes the learning rate, see `scale_by_learning_rate`."""
    constants = {"b1": config.adam_beta1, "b2": config.adam_beta2, "eps": config.adam_epsilon}
    if config.state_dtype == "8bit":
        scale = quantized_adam.scale_by_adam(**constants, matrices=decays)
    else:
        scale = adam.scale_by_adam(**constants)
    tx = adamw = optax.chain(
        scale,
        optax.add_decayed_weights(config.weight_decay, decays),
        scale_by_learning_rate(),
    )
    if config.name == "muon":
        hidden = optax.chain(
            muon.scale_by_muon(),
            optax.add_decayed_weights(config.weight_decay),
            scale_by_learning_rate(),
        )
        tx = optax.partition({"muon": hidden, "adamw": adamw}, muon.labels)
    if not config.max_grad_norm:
        return tx
    return optax.chain(clip_by_global_norm(config.max_grad_norm), tx)
