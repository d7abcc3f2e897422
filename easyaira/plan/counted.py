"""Memory of an update by counting, for devices that cannot be compiled for on this machine.

Arguments are exact. Arrays kept for the backward pass are read from JAX's own derivative, without
computing anything; a compiler may keep less, or need more at once. ERROR is the difference from
programs that were compiled or run (docs/gpus.md)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from easyaira.models.layers import padded_vocab
from easyaira.plan.hlo import Program
from easyaira.train.algorithm import Algorithm
from easyaira.train.setup import Setup

ERROR = 0.2  # largest relative difference seen, rounded up


def counted(
    setup: Setup,
    algorithm: Algorithm,
    batch: Mapping[str, np.ndarray],
    chunk: int,
    depth: int,
    sizes: Mapping[str, float],
) -> Program:
    """Stand-in for the compiled program of an update.

    Args:
        batch: arrays of the whole batch, [micro-batches, ...].
        chunk: positions whose logits a device computes at a time.
        depth: number of layers.
        sizes: bytes per device by purpose.
    """
    begun = time.perf_counter()
    arguments = sum(sizes[name] for name in ("weights", "optimizer", "frozen", "batch"))
    kept = kept_bytes(setup, algorithm, batch)
    if setup.model.compute.gradient_checkpointing == "full":  # recomputes one layer at a time
        compute = replace(setup.model.compute, gradient_checkpointing="none")
        whole = replace(setup, model=replace(setup.model, compute=compute))
        kept += kept_bytes(whole, algorithm, batch) / depth
    logits = 0 if setup.model.scorer else 4 * chunk * padded_vocab(setup.model.vocab_size)
    temporaries = kept + sizes["gradients"] + logits / setup.mesh.shape["tp"]
    seconds = time.perf_counter() - begun
    return Program(seconds, int(arguments), int(temporaries), counted=True)


def kept_bytes(setup: Setup, algorithm: Algorithm, batch: Mapping[str, np.ndarray]) -> float:
    """Bytes per device that the backward pass of a micro-batch reads, other than arguments."""
    trained, key = setup.trainable.target, setup.dropout_key
    frozen = setup.trainable.frozen_target(algorithm.frozen(setup))
    part = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    loss_fn = setup.trainable.loss_fn(algorithm.loss_fn(setup))

    def pulled_back(params: Any, frozen: Any, part: Any, key: Any) -> Any:
        def total(params: Any) -> jax.Array:
            return loss_fn(params, frozen, part, key)["loss"][0]

        return jax.vjp(total, params)[1]

    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):  # its devices may not exist
        kept = jax.tree.leaves(jax.eval_shape(pulled_back, trained, frozen, part, key))
    arguments = {_kind(leaf) for leaf in jax.tree.leaves((trained, frozen))}
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in kept if _kind(leaf) not in arguments)
    return size / setup.mesh.size


def _kind(leaf: Any) -> tuple[Any, ...]:
    """Equal for an array and its transpose."""
    return leaf.dtype, *sorted(leaf.shape)
