"""Trainable parameters: all weights of the model, or adapters on a frozen base.

FullWeights and Adapters have the same interface, so other modules need not distinguish them.
`params` are the trainable arrays; `weights` are all weights of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.config.run import RunConfig
from easyaira.distributed import compiler, sharding
from easyaira.distributed.sharding import like
from easyaira.distributed.tree import by_path
from easyaira.lora import peft
from easyaira.lora.adapter import Adapter, joined, nested, to_record
from easyaira.lora.base import Base, check_base
from easyaira.lora.held import held_target, holder
from easyaira.lora.targets import LM_HEAD, module_of
from easyaira.models.model import Model, resize
from easyaira.storage import pretrained
from easyaira.storage.base import load_fingerprinted
from easyaira.storage.pretrained import Pretrained
from easyaira.train.step import LossFn


class Saved:
    """A checkpoint holds the trainable parameters and the optimizer state as they are."""

    def saved(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """Parameters and optimizer state of a checkpoint."""
        return params, opt_state

    def restored(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """The inverse of `saved`."""
        return params, opt_state


@dataclass(frozen=True)
class FullWeights(Saved):
    """All weights are trainable.

    Attributes:
        origin: location of the model's files.
        stored: the model as stored.
        model: the trained model, whose vocabulary may have been resized.
    """

    config: RunConfig
    mesh: Mesh
    origin: Pretrained
    stored: Model
    model: Model

    added = 0  # parameters that adapters add to the model
    backward = 2  # products in the backward pass, per weight of the model
    head = 0  # weights of the language model head with one product more than `backward`

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options of XLA for the steps on this mesh."""
        return compiler.REPRODUCIBLE.get(self.mesh.devices.flat[0].platform)

    @property
    def target(self) -> Any:
        """Shapes and shardings of `params`."""
        return self.model.target(self.mesh)

    @property
    def held(self) -> Any:
        """Shapes and shardings of all weights during a step, in storage precision."""
        return self.target

    def parameter_count(self) -> int:
        return self.model.parameter_count()

    def describe(self) -> str:
        """Line for the log about trainable and frozen parameters; empty for full weights."""
        return ""

    def start(self) -> Any:
        """`params` before the first update; deterministic."""
        key = jax.random.key(self.config.seed)
        shardings = sharding.shardings(self.model.shapes, self.model.rules, self.mesh)
        if self.config.model.init == "random":
            return jax.jit(self.model.init, out_shardings=shardings)(key)
        params = self.origin.load(self.stored, self.mesh, head_key=key)
        if self.stored.vocab_size == self.model.vocab_size:
            return params
        how = self.config.model.resize or "mean"
        resized = jax.jit(
            lambda params, key: resize(self.stored, params, self.model.vocab_size, how, key)[1],
            out_shardings=shardings,
        )
        return resized(params, key)

    def weights(self, params: Any) -> Any:
        """All weights of the model, without copying."""
        return params

    def loss_fn(self, of_weights: LossFn) -> LossFn:
        """Turn an algorithm's loss of `weights` into a loss of `params`."""
        return of_weights

    def frozen(self, of_algorithm: Any) -> Any:
        """All frozen weights of a step, including the algorithm's (a DPO reference)."""
        return of_algorithm

    def frozen_target(self, reference: Model | None) -> Any:
        """Shapes and shardings of `frozen`, given the reference model, if any."""
        return reference and reference.target(self.mesh)

    def to_meta(self) -> dict[str, Any]:
        """Metadata that identifies the frozen base in a checkpoint; empty for full weights."""
        return {}

    def check(self, saved: Mapping[str, Any], where: str) -> None:
        """Refuse a checkpoint of another frozen base; no-op for full weights."""

    def free_start(self) -> None:
        """Free the copy of the parameters that `start` returns; no update calls it."""

    def free(self) -> None:
        """Free memory that the export does not need."""


@dataclass(frozen=True)
class Adapters(Saved):
    """Adapters, and parameters that are trained in full, are trainable; the base is frozen.

    Attributes:
        origin: location of the base's files.
    """

    config: RunConfig
    mesh: Mesh
    origin: Pretrained
    model: Model
    adapter: Adapter

    backward = 1

    @property
    def added(self) -> int:
        shapes = by_path(self.adapter.shapes)
        return sum(leaf.size for path, leaf in shapes.items() if "/lora_" in path)

    @property
    def head(self) -> int:
        trained = LM_HEAD in self.adapter.modules_to_save
        return self.model.vocab_size * self.model.config.width if trained else 0

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        return compiler.ADAPTERS.get(self.mesh.devices.flat[0].platform)

    @property
    def target(self) -> Any:
        return self.adapter.target(self.mesh)

    @property
    def held(self) -> Any:
        return joined(self._base_target, self.target)

    @property
    def _base_target(self) -> Any:
        return held_target(self.adapter, self.mesh, self.model.compute.dtype)

    def parameter_count(self) -> int:
        return self.adapter.parameter_count()

    def describe(self) -> str:
        adapter = self.adapter
        count, total = adapter.parameter_count(), self.model.parameter_count() + self.added
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._base_target))
        names = ", ".join(module_of(row).partition("{}.")[2] for row in adapter.targets)
        if adapter.whole:
            names += f", and all of {', '.join(adapter.modules_to_save)}"
        if adapter.tokens:
            names += f", and the vectors of {len(adapter.tokens)} tokens"
        kind = adapter.config.quantize or self.model.compute.dtype.name
        ranks, scales = (
            " and ".join(f"{value:g}" for value in sorted({*values.values()}))
            for values in (adapter.ranks, adapter.scales)
        )
        return (
            f"lora    {count:,} trainable parameters ({count / total:.4%}): rank "
            f"{ranks}, scale {scales}, on {names}; frozen linear layers held "
            f"in {kind}, all frozen weights take {size / 2**20:,.1f} MiB\n"
        )

    def start(self) -> Any:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.target)
        if self.config.lora.adapter is None:
            key = jax.random.key(self.config.seed)
            return jax.jit(self.adapter.init, out_shardings=shardings)(key, self.base.start)
        folder = pretrained.find(self.config.lora.adapter).folder
        return jax.device_put(peft.read_peft(self.adapter, folder), shardings)

    @cached_property
    def base(self) -> Base:
        """Frozen base weights in storage precision, and an adapter's initial values from them."""
        params, fingerprint = load_fingerprinted(
            self.origin,
            self.model,
            self.mesh,
            key=jax.random.key(self.config.seed),
            how=self.config.model.resize or "mean",
            each=holder(self.adapter, self.mesh, self.model.compute.dtype),
        )
        base, whole = self.adapter.parted(params)
        start = joined(whole, jax.jit(self.adapter.of_base)(base))
        return Base(base, start, fingerprint)

    def weights(self, params: Any) -> Any:
        return self.adapter.on(self.base.params, params)

    def loss_fn(self, of_weights: LossFn) -> Callable:
        return self.adapter.over_base(of_weights)

    def frozen(self, of_algorithm: Any) -> Any:
        return self.adapter.frozen(self.base.params, of_algorithm)

    def frozen_target(self, reference: Model | None) -> Any:
        if reference is not self.model:
            return self.adapter.frozen(self._base_target, reference and reference.target(self.mesh))
        shapes = jax.eval_shape(self.adapter.applied, self._base_target, self.target)
        targets, everywhere = by_path(self.target), NamedSharding(self.mesh, P())
        shardings = {
            path: targets[path].sharding if path in targets else everywhere
            for path in by_path(shapes)
        }
        return self.adapter.frozen(self._base_target, like(shapes, nested(shardings)))

    def to_meta(self) -> dict[str, Any]:
        """Settings of the adapter, and location and fingerprint of its base."""
        base = self.origin.location()
        return {"lora": to_record(self.adapter, base, self.base.fingerprint)}

    def check(self, saved: Mapping[str, Any], where: str) -> None:
        """Raises:
        WeightsError: the base's files have changed since the checkpoint was saved.
        """
        check_base(saved["lora"], self.base.fingerprint, where)

    def free_start(self) -> None:
        vars(self)["base"] = self.base._replace(start=None)

    def free(self) -> None:
        vars(self).pop("base", None)


Trainable = FullWeights | Adapters
