"""Everything that a run needs, found and checked before anything is written or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyaira import lora, optim, pretrained, trainer, weights
from easyaira import mesh as meshes
from easyaira.config import RunConfig
from easyaira.data import dataset
from easyaira.data.batches import Batches
from easyaira.data.build import Recipe
from easyaira.data.examples import Examples
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
    adapter: lora.Adapter | None

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
        return jax.device_put(self.adapter.read_peft(folder), shardings)

    @cached_property
    def base(self) -> lora.Base:
        """What adapters stand on, as it is held, and the head that goes on from `load`'s."""
        hold = self.adapter.holder(self.mesh, self.model.compute.dtype)
        found = weights.Fingerprint()

        def each(path: tuple, leaf: jax.Array) -> Any:
            if not self.adapter.replaces(meshes.path_of(path)):
                found.add(path, leaf)
            return hold(path, leaf)

        key = jax.random.key(self.config.seed)
        params = self.origin.load(self.model, self.mesh, head_key=key, each=each)
        return lora.Base(*self.adapter.parted(params), found.digest())

    def weights(self, params: Any) -> Any:
        """The model's weights, given those that are trained. Nothing is copied."""
        return params if self.adapter is None else self.adapter.on(self.base.params, params)

    def loss_fn(self, algorithm: Algorithm) -> trainer.LossFn:
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
        shardings = meshes.shardings(self.model.shapes, self.model.rules, self.mesh)
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


class Algorithm(NamedTuple):
    """What makes a run SFT, DPO or a reward model.

    Attributes:
        recipe: what becomes of a row, given the longest example in tokens.
        loss_fn: Setup -> the loss function.
        frozen: Setup -> the model whose weights the step takes as frozen, or None.
        begin: (Setup, params, run folder, first time?) -> (frozen weights, what is known of the
            training examples, of the held-out examples, metrics before the first update).
        scorer: the model gives a text one number, and does not write.
        known: Setup -> name -> shape of what `begin` will say of each example.
        summary: what is told of all held-out examples together (see trainer.PER_EXAMPLE).
    """

    recipe: Callable[[int], Recipe]
    loss_fn: Callable[[Setup], trainer.LossFn]
    frozen: Callable[[Setup], Model | None]
    begin: Callable[[Setup, Any, Path, bool], tuple[Any, Mapping, Mapping, Mapping[str, float]]]
    scorer: bool = False
    known: Callable[[Setup], Mapping[str, tuple[int, ...]]] = lambda setup: {}
    summary: trainer.Summary | None = None


class Found(NamedTuple):
    """The model of a run, and how it takes text."""

    origin: Pretrained
    stored: Model
    model: Model
    tokenizer: Any
    template: Template
    max_length: int


def find(config: RunConfig, mesh: Mesh, scorer: bool | None = None) -> Found:
    """Find and check model, tokenizer, template and lengths. No weight is read.

    Args:
        config: the run's.
        mesh: where it will run.
        scorer: the model is to score texts, or to write them; None: as its config.json says.

    Raises:
        EasyAiraError: whatever is wrong with them.
    """
    random = config.model.init == "random"
    name, revision = config.model.name_or_path, config.model.revision
    origin = pretrained.find(name, revision, weights_wanted=not random)
    where, compute = str(origin.folder), _compute(config, mesh)
    stored = model_of(origin.config, where, compute, scorer=scorer)
    if config.model.max_positions is not None:
        stored = _with_positions(stored, config.model.max_positions)
    if not random:
        origin.check(stored)
    tokenizer = origin.tokenizer(config.model.tokenizer)
    encoder = stored.architecture.encoder
    template = Template(
        tokenizer,
        _encoder_template(config, tokenizer, stored) if encoder else config.data.template,
        origin.config["model_type"],
        config.data.allowed_tokens,
        padded=stored.scorer and not encoder,
    )
    model = _resized(config, stored, template)
    positions = model.config.max_positions
    max_length = config.data.max_length or positions
    if max_length > positions:
        raise ConfigError(
            f"data.max_length: {max_length} is more than the model's {positions} positions"
        )
    return Found(origin, stored, model, tokenizer, template, max_length)


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
    meshes.shardings(model.shapes, model.rules, mesh)  # refuses a mesh that does not divide them
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
    schedule = optim.make_schedule(config.optimizer, total_steps)
    tx = optim.make_optimizer(config.optimizer, schedule)
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


WORTH_SHARING = 0.15  # of the positions; below it, the longer rows cost more than is saved


def shares_prompt(choice: str, examples: Examples) -> bool:
    """Whether pairs are stored with their prompt once."""
    if examples.answers != 2 or choice == "never":
        return False
    prompts = int((examples.bounds[:, 1] - examples.bounds[:, 0]).sum())
    return choice == "always" or prompts > WORTH_SHARING * int(examples.lengths().sum())


def attention_cost(width: int, heads: int) -> float:
    """What a position's attention costs for each position it may look at, as a share of the
    products with weights: 4 D against 24 D^2 operations a layer, and about 30 for a score."""
    return (4 * width + 30 * heads) / (24 * width**2)


def _adapter(config: RunConfig, found: Found) -> lora.Adapter:
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
    adapter = lora.adapter_of(config.lora, found.model)
    if config.lora.adapter is not None:
        adapter.read_peft(pretrained.find(config.lora.adapter).folder)
    return adapter


KERNELS = {"tpu": ("splash",), "gpu": ("cudnn", "pallas")}  # of attention, the first choice first
# cuDNN's backward pass gives NaN at lengths with a remainder of 64 by 128, where a mask is passed
# and a query sees nothing: pytorch/pytorch#196678
ROW_MULTIPLE = {"gpu": 128}


def _compute(config: RunConfig, mesh: Mesh) -> Compute:
    device = mesh.devices.flat[0]
    platform, kernels = device.platform, KERNELS.get(device.platform, ())
    if device.device_kind in ("TPU v2", "TPU v3"):
        kernels = ()  # splash multiplies in bfloat16, for which these have no instruction
    dtype, attention = config.model.dtype, config.model.attention
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    if attention == "auto":
        attention = (*kernels, "xla")[0]
    if attention not in ("xla", *kernels):
        where = device.device_kind if platform == "tpu" else platform
        raise ConfigError(f"model.attention: there is no {attention} on {where}; use auto")
    if tf32 := dtype == "tf32":
        dtype = "float32"
    return Compute(
        jnp.dtype(dtype),
        config.model.gradient_checkpointing,
        config.model.dropout,
        attention,
        tf32=tf32,
    )


def _encoder_template(config: RunConfig, tokenizer: Any, model: Model) -> str:
    """The one template that an encoder has.

    Raises:
        ConfigError: options that an encoder does not have.
        TokenizerError: it pads with another token than the model knows.
    """
    if config.data.template not in ("chat", "encoder"):
        raise ConfigError(
            f"data.template: {config.data.template} is for models that write; an encoder takes "
            "text as its tokenizer frames it, so leave it out"
        )
    if config.data.share_prompt == "always":
        raise ConfigError(
            "data.share_prompt: in an encoder a prompt sees the answer, so two answers cannot "
            "share one; leave it out"
        )
    known = getattr(model.config, "pad_token_id", tokenizer.pad_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != known:
        raise TokenizerError(
            f"tokenizer: pads with {tokenizer.pad_token_id}, and config.json has pad_token_id "
            f"{known}, from which positions count; use the model's own tokenizer"
        )
    return "encoder"


def _with_positions(model: Model, count: int) -> Model:
    """The model with another longest sequence; no weight depends on it."""
    if not hasattr(model.config, "rope_theta"):
        raise ConfigError(
            "model.max_positions: is for rotary positions; this model has a table of "
            f"{model.config.max_positions} learned ones, so leave it out"
        )
    return replace(model, config=replace(model.config, max_position_embeddings=int(count)))


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
