"""Everything that a run needs, found and checked before anything is written or computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from easyaira.config.run import RunConfig
from easyaira.data import dataset
from easyaira.data.batches import Batches
from easyaira.data.packing import attention_cost, shares_prompt
from easyaira.data.recipe import Recipe
from easyaira.data.template import Template
from easyaira.distributed import mesh as meshes
from easyaira.distributed import sharding
from easyaira.distributed.tree import path_of
from easyaira.errors import ConfigError
from easyaira.lora import peft
from easyaira.lora.adapter import Adapter, adapter_of
from easyaira.lora.base import Base
from easyaira.models.model import Model, resize
from easyaira.storage import pretrained
from easyaira.storage.integrity import Fingerprint
from easyaira.storage.pretrained import Pretrained
from easyaira.train import optimizer
from easyaira.train.algorithm import Algorithm
from easyaira.train.resolve import ROW_MULTIPLE, Found, find
from easyaira.train.step import LossFn


@dataclass(frozen=True)
class Setup:
    """A run that has been checked and not begun.

    Attributes:
        origin: where the model's files are. `stored` is the model as it stands there, `model` the
            one that is trained, whose vocabulary may have been resized.
        batches, held_out: the data, in updates and in micro-batches.
        total_steps, schedule, tx: the optimizer's side.
        adapter: what is trained instead of the model's own weights.
    """

    config: RunConfig
    mesh: Mesh
    origin: Pretrained
    stored: Model
    model: Model
    tokenizer: Any
    template: Template
    data: dataset.Data
    batches: Batches
    held_out: Batches | None
    total_steps: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    adapter: Adapter | None

    def with_attention(self, attention: str) -> Setup:
        """The same run, with another way to compute attention."""
        model = replace(self.model, compute=replace(self.model.compute, attention=attention))
        adapter = self.adapter and replace(self.adapter, model=model)
        return replace(self, model=model, adapter=adapter)

    @property
    def micro_batch(self) -> int:
        """Examples that are computed at a time."""
        return self.config.train_batch_size // self.config.gradient_accumulation_steps

    @cached_property
    def dropout_key(self) -> jax.Array | None:
        dropout = self.config.model.dropout or (self.config.lora and self.config.lora.dropout)
        return jax.random.key(self.config.seed) if dropout else None

    def trained(self) -> Any:
        """Shapes and shardings of what an update changes."""
        return (self.adapter or self.model).target(self.mesh)

    def start(self) -> Any:
        """What an update changes, before the first one; the same however often it is asked for."""
        if self.adapter is None:
            return self.load()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.trained())
        if self.config.lora.adapter is None:
            key = jax.random.key(self.config.seed)
            return jax.jit(self.adapter.init, out_shardings=shardings)(key, self.base.head)
        folder = pretrained.find(self.config.lora.adapter).folder
        return jax.device_put(peft.read_peft(self.adapter, folder), shardings)

    @cached_property
    def base(self) -> Base:
        """What adapters stand on, as it is held, and the head that goes on from `load`'s."""
        hold = self.adapter.holder(self.mesh, self.model.compute.dtype)
        found = Fingerprint()

        def each(path: tuple, leaf: jax.Array) -> Any:
            if not self.adapter.replaces(path_of(path)):
                found.add(path, leaf)
            return hold(path, leaf)

        key = jax.random.key(self.config.seed)
        params = self.origin.load(self.model, self.mesh, head_key=key, each=each)
        return Base(*self.adapter.parted(params), found.digest())

    def weights(self, params: Any) -> Any:
        """The model's weights, given those that are trained. Nothing is copied."""
        return params if self.adapter is None else self.adapter.on(self.base.params, params)

    def loss_fn(self, algorithm: Algorithm) -> LossFn:
        """The algorithm's loss, as a function of what is trained."""
        loss_fn = algorithm.loss_fn(self)
        return loss_fn if self.adapter is None else self.adapter.over_base(loss_fn)

    def frozen(self, of_algorithm: Any) -> Any:
        """What the step takes as frozen, given what the algorithm wants frozen."""
        if self.adapter is None:
            return of_algorithm
        return self.adapter.frozen(self.base.params, of_algorithm)

    def frozen_target(self, algorithm: Algorithm) -> Any:
        """Shapes and shardings of `frozen`."""
        reference = algorithm.frozen(self)
        target = reference and reference.target(self.mesh)
        if self.adapter is None:
            return target
        base = self.adapter.held_target(self.mesh, self.model.compute.dtype)
        if reference is self.model:
            target = jax.eval_shape(self.adapter.applied, self.trained())
        return self.adapter.frozen(base, target)

    def load(self) -> Any:
        """The weights that training starts from, the same however often they are asked for."""
        if self.adapter is not None:
            return self.weights(self.start())
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


def read_data(config: RunConfig, found: Found, recipe: Recipe) -> dataset.Data:
    """The data of a run, from the cache or into it."""
    return dataset.load(
        config.data,
        recipe,
        template=found.template,
        vocab_size=found.model.vocab_size,
        seed=config.seed,
    )


def prepare(
    config: RunConfig, algorithm: Algorithm, devices: Sequence[jax.Device] | None = None
) -> Setup:
    """Find and check all that a run needs. Nothing is computed, and no weight is read.

    Args:
        config: the run's.
        algorithm: what makes it SFT, DPO or a reward model.
        devices: where it shall run, perhaps devices that are not there; default: all there are.

    Raises:
        EasyAiraError: whatever is wrong with configuration, model, tokenizer or data.
    """
    mesh = meshes.make_mesh(config.mesh, devices, config.dcn)
    shards = meshes.data_shards(mesh)
    micro_batch = config.train_batch_size // config.gradient_accumulation_steps
    if micro_batch % shards:
        raise ConfigError(
            f"train_batch_size: {config.train_batch_size} in {config.gradient_accumulation_steps} "
            f"accumulation steps is {micro_batch} examples at a time, which dp x fsdp = {shards} "
            "devices cannot share alike; use a multiple of "
            f"{shards * config.gradient_accumulation_steps}"
        )
    found = find(config, mesh, algorithm.scorer)
    model = found.model
    sharding.shardings(model.shapes, model.rules, mesh)  # refuses a mesh that does not divide them
    adapter = None
    if config.lora is not None:
        adapter = _adapter(config, found)
        adapter.held_target(mesh, model.compute.dtype)  # likewise
    if model.config.kv_heads % mesh.shape["tp"]:
        raise ConfigError(
            f"mesh: tp={mesh.shape['tp']} does not divide the model's {model.config.heads} heads "
            f"and {model.config.kv_heads} key/value heads"
        )
    data = read_data(config, found, algorithm.recipe(found.max_length))
    layout = {
        "shards": shards,
        "local": meshes.local_shards(mesh),
        "packing": config.data.packing,
        "share_prompt": not model.architecture.encoder
        and shares_prompt(config.data.share_prompt, data.train),
        "attention": attention_cost(model.config.width, model.config.heads),
        "multiple": ROW_MULTIPLE.get(mesh.devices.flat[0].platform, 8),
    }
    compute = replace(model.compute, shared_prompt=layout["share_prompt"])
    model = replace(model, compute=compute)
    batches = Batches(
        data.train,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        seed=config.seed,
        drop_last=config.data.drop_last,
        **layout,
    )
    if not len(batches):
        raise ConfigError(
            f"train_batch_size: {config.train_batch_size} is more than the {len(data.train)} "
            "examples, and data.drop_last leaves out smaller updates"
        )
    held_out = None
    if data.held_out is not None:
        held_out = Batches(data.held_out, micro_batch, **layout)
    total_steps = updates(config, len(batches))
    schedule = optimizer.make_schedule(config.optimizer, total_steps)
    tx = optimizer.make_optimizer(config.optimizer, schedule)
    return Setup(
        config=config,
        mesh=mesh,
        origin=found.origin,
        stored=found.stored,
        model=model,
        tokenizer=found.tokenizer,
        template=found.template,
        data=data,
        batches=batches,
        held_out=held_out,
        total_steps=total_steps,
        schedule=schedule,
        tx=tx,
        adapter=adapter,
    )


def updates(config: RunConfig, epoch: int) -> int:
    """Updates of a run, given those of an epoch."""
    if config.max_steps != -1:
        return config.max_steps
    return max(1, round(config.num_train_epochs * epoch))


def _adapter(config: RunConfig, found: Found) -> Adapter:
    """The adapter of a run, compared with the one that it goes on with."""
    if found.model.vocab_size != found.stored.vocab_size:
        if found.stored.scorer and config.model.resize is None:
            raise ConfigError(
                "lora: the tokenizer has no padding token of its own, and adapters give the model "
                "no new one; set pad_token in its tokenizer_config.json to a control token that no "
                "text ends with, or name a tokenizer that has one in model.tokenizer"
            )
        raise ConfigError(
            f"lora: the tokenizer's {found.model.vocab_size - found.stored.vocab_size:+} tokens "
            "would have embeddings that adapters do not train; use a template without new tokens, "
            "such as plain, or start from a model that has been trained with them"
        )
    adapter = adapter_of(config.lora, found.model)
    if config.lora.adapter is not None:
        peft.read_peft(adapter, pretrained.find(config.lora.adapter).folder)
    return adapter
