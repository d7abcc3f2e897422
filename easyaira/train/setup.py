"""Finds and checks everything that a run needs, before anything is written or computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from easyaira.config.run import RunConfig
from easyaira.data import dataset
from easyaira.data.batches import Batches
from easyaira.data.examples import Examples
from easyaira.data.packing import attention_cost, compilation_cost, shares_prompt
from easyaira.data.recipe import Recipe
from easyaira.data.template import Template
from easyaira.distributed import mesh as meshes
from easyaira.distributed import sharding
from easyaira.errors import ConfigError
from easyaira.lora import peft
from easyaira.lora.adapter import Adapter, adapter_of
from easyaira.lora.held import held_target
from easyaira.models.model import Model
from easyaira.storage import pretrained
from easyaira.storage.pretrained import Pretrained
from easyaira.train import optimizer
from easyaira.train.algorithm import Algorithm, OnPolicy
from easyaira.train.critic import ActorCritic, Critic, make_optimizer
from easyaira.train.resolve import ROW_MULTIPLE, Resolved, find, unroll_up_to
from easyaira.train.trainable import Adapters, FullWeights, Trainable


@dataclass(frozen=True)
class Setup:
    """A checked run that has not started.

    Attributes:
        origin: location of the model's files.
        stored: the model as stored.
        model: the trained model, whose vocabulary may have been resized.
        batches, held_out: the data, in updates and in micro-batches; on-policy, the largest update.
        total_steps, schedule, tx: number of updates, learning rate of update n, and optimizer.
        adapter: trained instead of the model's own weights.
        critic: value model that is trained beside the model.
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
    schedule: Callable[[int], np.float32]
    tx: optax.GradientTransformationExtraArgs
    adapter: Adapter | None
    critic: Critic | None = None

    def with_attention(self, attention: str) -> Setup:
        """The same run with another attention kernel."""
        model = replace(self.model, compute=replace(self.model.compute, attention=attention))
        return replace(self, model=model)

    @property
    def micro_batch(self) -> int:
        """Examples in a micro-batch."""
        return self.config.train_batch_size // self.config.gradient_accumulation_steps

    @cached_property
    def dropout_key(self) -> jax.Array | None:
        dropout = self.config.model.dropout or (self.config.lora and self.config.lora.dropout)
        return jax.random.key(self.config.seed) if dropout else None

    @cached_property
    def trainable(self) -> Trainable | ActorCritic:
        """Trainable parameters: all weights or adapters, and a value model if there is one. The
        only place that distinguishes them."""
        if self.critic is None:
            return self.policy
        return ActorCritic(self.policy, self.critic, self.mesh, self.config.seed)

    @cached_property
    def policy(self) -> Trainable:
        """Trainable parameters of the model."""
        if self.adapter is None:
            return FullWeights(self.config, self.mesh, self.origin, self.stored, self.model)
        adapter = replace(self.adapter, model=self.model)
        return Adapters(self.config, self.mesh, self.origin, self.model, adapter)

    def start_weights(self) -> Any:
        """All weights before the first update; deterministic."""
        return self.trainable.weights(self.trainable.start())


def read_data(config: RunConfig, resolved: Resolved, recipe: Recipe) -> dataset.Data:
    """Data of a run, from the cache if it is there; otherwise tokenised and cached."""
    return dataset.load(
        config.data,
        recipe,
        template=resolved.template,
        vocab_size=resolved.model.vocab_size,
        seed=config.seed,
        positions=resolved.model.config.max_positions,
    )


def prepare(
    config: RunConfig,
    algorithm: Algorithm,
    devices: Sequence[jax.Device] | None = None,
    *,
    planned: bool = False,
) -> Setup:
    """Find and check everything that a run needs. Nothing is computed, and no weight is read.

    Args:
        config: the run's.
        algorithm: SFT, DPO, reward modelling or on-policy training.
        devices: devices of the run, which may be mere descriptions; default: all available ones.
        planned: the run will not start, so that the model's weights may be absent.

    Raises:
        EasyAiraError: a fault in configuration, model, tokenizer or data.
    """
    mesh = meshes.make_mesh(config.mesh, devices, config.dcn)
    shards = meshes.data_shards(mesh)
    micro_batch = config.train_batch_size // config.gradient_accumulation_steps
    if micro_batch % shards:
        raise ConfigError(
            f"train_batch_size: {config.train_batch_size} in {config.gradient_accumulation_steps} "
            f"accumulation steps is {micro_batch} examples at a time, which dp x fsdp = {shards} "
            "devices cannot share equally; use a multiple of "
            f"{shards * config.gradient_accumulation_steps}"
        )
    resolved = find(config, mesh, algorithm.scorer, planned=planned)
    model = resolved.model
    if algorithm.balanced and not model.experts:
        raise ConfigError(
            f"sft.router_aux_loss: {resolved.origin.where} has no experts to balance; set it to "
            "false"
        )
    sharding.shardings(model.shapes, model.rules, mesh)  # raises if the mesh does not divide them
    adapter = None if config.lora is None else _adapter(config, resolved)
    if adapter:
        held_target(adapter, mesh, model.compute.dtype)  # raises, too
    if model.config.kv_heads % mesh.shape["tp"]:
        raise ConfigError(
            f"mesh: tp={mesh.shape['tp']} does not divide the model's {model.config.heads} heads "
            f"and {model.config.kv_heads} key/value heads"
        )
    critic = algorithm.critic and algorithm.critic(resolved, mesh)
    if micro_batch // shards % algorithm.together:
        raise ConfigError(
            f"train_batch_size: each device takes {micro_batch // shards} examples at a time, not "
            f"a multiple of dpo.kto_group {algorithm.together}; use a multiple of "
            f"{algorithm.together * shards * config.gradient_accumulation_steps}"
        )
    data = read_data(config, resolved, algorithm.recipe(resolved.max_length))
    parts = (data.train, data.held_out)
    train, held_out = (p and algorithm.arrange(p, resolved.max_length) for p in parts)
    data = replace(data, train=train, held_out=held_out)
    platform = mesh.devices.flat[0].platform
    layout = {
        "shards": shards,
        "local": meshes.local_shards(mesh),
        "packing": config.data.packing,
        "together": algorithm.together,
        "attention": attention_cost(
            model.config.width, model.config.heads, model.compute.attention
        ),
        "multiple": ROW_MULTIPLE.get(platform, 8),
    }
    own = algorithm.on_policy
    compilation = compilation_cost(model.parameter_count(), platform)
    batches = _batches(config, own, data.train, layout | {"compilation": compilation}, model)
    layout["share_prompt"] = batches.share_prompt
    shared = batches.examples.answers * batches.share_prompt
    unrolled = unroll_up_to(platform, data.train, compilation)
    compute = replace(model.compute, shared_prompt=shared, unroll_up_to=unrolled)
    model = replace(model, compute=compute)
    if not len(batches):
        raise ConfigError(
            f"train_batch_size: {config.train_batch_size} is more than the {len(data.train)} "
            "examples, and data.drop_last leaves out smaller updates"
        )
    held_out = None
    if data.held_out is not None and not own:
        held_out = Batches(data.held_out, micro_batch, **layout)
    total_steps = updates(config, own.epoch(data.train) if own else len(batches))
    schedule = optimizer.on_host(optimizer.make_schedule(config.optimizer, total_steps))
    tx = optimizer.make_optimizer(config.optimizer)
    if critic:
        rate = config.rl.value_learning_rate  # type: ignore[attr-defined]
        tx = make_optimizer(config.optimizer, rate)
    return Setup(
        config=config,
        mesh=mesh,
        origin=resolved.origin,
        stored=resolved.stored,
        model=model,
        tokenizer=resolved.tokenizer,
        template=resolved.template,
        data=data,
        batches=batches,
        held_out=held_out,
        total_steps=total_steps,
        schedule=schedule,
        tx=tx,
        adapter=adapter,
        critic=critic,
    )


def _batches(
    config: RunConfig,
    own: OnPolicy | None,
    train: Examples,
    layout: Mapping[str, Any],
    model: Model,
) -> Batches:
    """The batches of a run; on-policy, the largest update. More than two answers share their prompt
    where that costs less: sharing saves tokens, makes rows longer, and copies splash's keys."""
    choice, shards = config.data.share_prompt, layout["shards"]
    whole = partial(
        Batches,
        accumulation=config.gradient_accumulation_steps,
        seed=config.order_seed,
        drop_last=config.data.drop_last,
        **layout,
    )
    size = config.train_batch_size
    if own is None:
        share = not model.architecture.encoder and shares_prompt(
            choice, train, model.compute.attention
        )
        plans = [whole(train, size, share_prompt=share)]
        if share and train.answers > 2 and choice == "auto":
            plans.append(replace(plans[0], share_prompt=False))
    else:
        counts = own.together(size // config.gradient_accumulation_steps // shards)
        counts = {"never": counts[:1], "always": counts[-1:]}.get(choice, counts)
        plans = [whole(own.largest(train, n), size // n, share_prompt=n > 1) for n in counts]

    def cost(plan: Batches) -> float:
        copied = plan.share_prompt and model.compute.attention == "splash"
        copies = plan.examples.answers if copied else 1
        return replace(plan, attention=copies * plan.attention).sampled_cost()

    return plans[0] if len(plans) == 1 else min(plans, key=cost)


def updates(config: RunConfig, epoch: int) -> int:
    """Number of updates of a run, given that of an epoch."""
    if config.max_steps != -1:
        return config.max_steps
    count = max(1, math.ceil(config.num_train_epochs * epoch))  # as transformers does
    if count >= 2**31:
        raise ConfigError(
            f"num_train_epochs: {config.num_train_epochs:g} of {epoch} updates each are {count:g} "
            "updates; the limit is 2**31"
        )
    return count


def _adapter(config: RunConfig, resolved: Resolved) -> Adapter:
    """Adapter of a run, which trains the vectors of new tokens, too; checked against the stored
    adapter that it starts from, if any.

    Raises:
        ConfigError: it would be released on another adapter, or differs from the stored one.
    """
    origin = resolved.origin
    if origin.adapter is not None and (config.export or origin.step is None):
        raise ConfigError(_stacked(origin))
    new = {*resolved.template.added, *range(resolved.stored.vocab_size, resolved.model.vocab_size)}
    ids = sorted(new.union(config.lora.trainable_token_indices or ()))
    adapter = adapter_of(replace(config.lora, trainable_token_indices=ids or None), resolved.model)
    if config.lora.adapter is not None:
        peft.read_peft(adapter, pretrained.find(config.lora.adapter).folder)
    return adapter


def _stacked(origin: Pretrained) -> str:
    """Error that advises against an adapter on an adapter, which peft cannot load."""
    released, made = origin.folder / "hf", ""
    merging = f"it first: `easyaira convert to_hf {origin.name} MERGED --merge`, and name MERGED"
    if origin.step is None:
        released, merging = Path(origin.name), "it in peft first"
    elif origin.name != str(origin.folder) or not (released / peft.ADAPTER_CONFIG).exists():
        released, made = (
            Path("ADAPTER"),
            f" (made by `easyaira convert to_hf {origin.name} ADAPTER`)",
        )
    return (
        f"model.name_or_path: {origin.name} holds an adapter, and peft loads none on another. "
        f"To train it further, name its base, {origin.adapter['base']['name']}, in "
        f"model.name_or_path and {released} in lora.adapter{made}; to train a new one, merge "
        f"{merging}"
    )
