"""Everything that a run needs, found and checked before anything is written or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyaira import mesh as meshes
from easyaira import optim, pretrained, trainer
from easyaira.config import RunConfig
from easyaira.data import examples
from easyaira.data.batches import Batches
from easyaira.data.templates import Template
from easyaira.errors import ConfigError, TokenizerError
from easyaira.models.layers import Compute
from easyaira.models.registry import Model, model_of, resize
from easyaira.pretrained import Pretrained


@dataclass(frozen=True)
class Setup:
    """A run that has been checked and not begun.

    Attributes:
        origin: where the model's files are. `stored` is the model as it stands there, `model` the
            one that is trained, whose vocabulary may have been resized.
        batches, held_out: the data, in updates and in micro-batches.
        total_steps, schedule, tx: the optimizer's side.
    """

    config: RunConfig
    mesh: Mesh
    origin: Pretrained
    stored: Model
    model: Model
    tokenizer: Any
    template: Template
    data: examples.Data
    batches: Batches
    held_out: Batches | None
    total_steps: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation

    @property
    def micro_batch(self) -> int:
        """Examples that are computed at a time."""
        return self.config.train_batch_size // self.config.gradient_accumulation_steps

    @cached_property
    def dropout_key(self) -> jax.Array | None:
        return jax.random.key(self.config.seed) if self.config.model.dropout else None

    def target(self, model: Model) -> Any:
        """Shapes and shardings of a model's parameters on the mesh."""
        return meshes.like(model.shapes, meshes.shardings(model.shapes, model.rules, self.mesh))

    def load(self) -> Any:
        """The parameters that training starts from, the same however often they are asked for."""
        key = jax.random.key(self.config.seed)
        shardings = meshes.shardings(self.model.shapes, self.model.rules, self.mesh)
        if self.config.model.init == "random":
            return jax.jit(self.model.init, out_shardings=shardings)(key)
        params = self.origin.load(self.stored, self.mesh)
        if self.stored.vocab_size == self.model.vocab_size:
            return params
        how = self.config.model.resize or "mean"
        resized = jax.jit(
            lambda params, key: resize(self.stored, params, self.model.vocab_size, how, key)[1],
            out_shardings=shardings,
        )
        return resized(params, key)


class Algorithm(NamedTuple):
    """What makes a run SFT or DPO.

    Attributes:
        pairs: examples are pairs.
        learn_prompts: prompts carry loss, too.
        loss_fn: Setup -> the loss function.
        frozen: Setup -> the model whose weights the step takes as frozen, or None.
        begin: (Setup, params, run folder, first time?) -> (frozen weights, what is known of the
            training examples, of the held-out examples, metrics before the first update).
    """

    pairs: bool
    learn_prompts: bool
    loss_fn: Callable[[Setup], trainer.LossFn]
    frozen: Callable[[Setup], Model | None]
    begin: Callable[[Setup, Any, Path, bool], tuple[Any, Mapping, Mapping, Mapping[str, float]]]


def prepare(config: RunConfig, algorithm: Algorithm) -> Setup:
    """Find and check all that a run needs. Nothing is written, and no weight is read.

    Raises:
        EasyAiraError: whatever is wrong with configuration, model, tokenizer or data.
    """
    mesh = meshes.make_mesh(config.mesh)
    shards = meshes.data_shards(mesh)
    micro_batch = config.train_batch_size // config.gradient_accumulation_steps
    if micro_batch % shards:
        raise ConfigError(
            f"train_batch_size: {config.train_batch_size} in {config.gradient_accumulation_steps} "
            f"accumulation steps is {micro_batch} examples at a time, which dp x fsdp = {shards} "
            "devices cannot share alike; use a multiple of "
            f"{shards * config.gradient_accumulation_steps}"
        )
    random = config.model.init == "random"
    name, revision = config.model.name_or_path, config.model.revision
    origin = pretrained.find(name, revision, weights_wanted=not random)
    stored = model_of(origin.config, str(origin.folder), _compute(config, mesh))
    if not random:
        origin.check(stored)
    tokenizer = origin.tokenizer(config.model.tokenizer)
    template = Template(tokenizer, config.data.template, origin.config["model_type"])
    model = _resized(config, stored, template)
    meshes.shardings(model.shapes, model.rules, mesh)  # refuses a mesh that does not divide them
    if model.config.kv_heads % mesh.shape["tp"]:
        raise ConfigError(
            f"mesh: tp={mesh.shape['tp']} does not divide the model's {model.config.heads} heads "
            f"and {model.config.kv_heads} key/value heads"
        )
    positions = model.config.max_positions
    max_length = config.data.max_length or positions
    if max_length > positions:
        raise ConfigError(
            f"data.max_length: {max_length} is more than the model's {positions} positions"
        )
    data = examples.load(
        config.data,
        pairs=algorithm.pairs,
        template=template,
        vocab_size=model.vocab_size,
        max_length=max_length,
        seed=config.seed,
        learn_prompts=algorithm.learn_prompts,
    )
    batches = Batches(
        data.train,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        shards,
        config.data.packing,
        config.seed,
        config.data.drop_last,
    )
    if not len(batches):
        raise ConfigError(
            f"train_batch_size: {config.train_batch_size} is more than the {len(data.train)} "
            "examples, and data.drop_last leaves out smaller updates"
        )
    held_out = None
    if data.held_out is not None:
        held_out = Batches(data.held_out, micro_batch, 1, shards, config.data.packing)
    total_steps = config.max_steps
    if total_steps == -1:
        total_steps = max(1, round(config.num_train_epochs * len(batches)))
    schedule = optim.make_schedule(config.optimizer, total_steps)
    tx = optim.make_optimizer(config.optimizer, schedule)
    return Setup(
        config=config,
        mesh=mesh,
        origin=origin,
        stored=stored,
        model=model,
        tokenizer=tokenizer,
        template=template,
        data=data,
        batches=batches,
        held_out=held_out,
        total_steps=total_steps,
        schedule=schedule,
        tx=tx,
    )


def _compute(config: RunConfig, mesh: Mesh) -> Compute:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    return Compute(jnp.dtype(dtype), config.model.gradient_checkpointing, config.model.dropout)


def _resized(config: RunConfig, stored: Model, template: Template) -> Model:
    """The model with the vocabulary that the tokenizer and the configuration ask for."""
    length = len(template.tokenizer)
    if config.model.resize is None and not template.added:
        if length > stored.vocab_size:
            raise TokenizerError(
                f"tokenizer: has {length} tokens and the embedding {stored.vocab_size} rows; use "
                "the model's own tokenizer, or set model.resize to mean"
            )
        return stored
    return replace(stored, config=replace(stored.config, vocab_size=length))
