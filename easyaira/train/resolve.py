"""Finds the model, tokenizer and template that a configuration names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from easyaira.config.run import RunConfig
from easyaira.data.examples import Examples
from easyaira.data.template import Template
from easyaira.errors import ConfigError, TokenizerError
from easyaira.models.layers import Compute, Scores, hiding
from easyaira.models.model import Model, with_vocabulary
from easyaira.models.registry import model_of
from easyaira.storage import pretrained
from easyaira.storage.pretrained import Pretrained


class Resolved(NamedTuple):
    """The model of a run, its tokenizer, template and longest sequence."""

    origin: Pretrained
    stored: Model
    model: Model
    tokenizer: Any
    template: Template
    max_length: int


def find(
    config: RunConfig, mesh: Mesh, scorer: bool | None = None, *, planned: bool = False
) -> Resolved:
    """Find and check model, tokenizer, template and lengths. No weight is read.

    Args:
        config: the run's.
        mesh: the devices of the run.
        scorer: whether the model must score texts or generate them; None: as config.json says.
        planned: weights are not downloaded, and not checked if they are absent.

    Raises:
        EasyAiraError: a file is missing, or model, tokenizer and configuration do not fit.
    """
    random = config.model.init == "random"
    name, revision = config.model.name_or_path, config.model.revision
    origin = pretrained.find(name, revision, weights_wanted=not random and not planned)
    stored = model_of(origin.config, origin.where, scorer=scorer)
    if config.model.max_positions is not None:
        stored = _with_positions(stored, config.model.max_positions)
    positions = stored.config.max_positions
    max_length = config.data.max_length or positions
    if max_length > positions:
        raise ConfigError(
            f"data.max_length: {max_length} is more than the model's {positions} positions; set it "
            "to that or less"
        )
    stored = replace(stored, compute=_compute(config, mesh, stored, max_length))
    if not random and (has_weights(origin) or not planned):
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
    return Resolved(origin, stored, model, tokenizer, template, max_length)


def has_weights(origin: Pretrained) -> bool:
    """False for a Hugging Face folder without weights, which suffices for a plan."""
    return origin.step is not None or any(origin.folder.glob("*.safetensors"))


# attention kernels, in order of preference
KERNELS = {"tpu": ("splash",), "gpu": ("pallas",), "cpu": ("tiles",)}
BY_NAME = {"gpu": ("cudnn",)}  # not chosen by `auto`: slower than pallas, see docs/gpus.md
# cuDNN's backward pass gives NaN if length % 128 == 64, a mask is passed and a query is fully
# masked: pytorch/pytorch#196678
ROW_MULTIPLE = {"gpu": 128}
UNROLL_UP_TO = {"gpu": 24, "cpu": 12}  # layers, see models/layers.py
LONG = 100  # on a CPU, a pass over the pairs has to take as long as this many compilations


def _compute(config: RunConfig, mesh: Mesh, model: Model, max_length: int) -> Compute:
    device = mesh.devices.flat[0]
    platform, kernels = device.platform, KERNELS.get(device.platform, ())
    if device.device_kind in ("TPU v2", "TPU v3"):
        kernels = ()  # splash needs bfloat16 products, which these chips lack
    dtype, attention = config.model.dtype, config.model.attention
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" or lacks_bfloat16(device) else "bfloat16"
    if tf32 := dtype == "tf32":
        dtype = "float32"
    compute = Compute(
        jnp.dtype(dtype),
        config.model.gradient_checkpointing,
        config.model.dropout,
        tf32=tf32,
        max_length=max_length,
    )
    if attention == "auto":
        measured = () if platform == "gpu" and compute.dtype.itemsize > 2 else kernels
        usable = (kernel for kernel in measured if obstacle(kernel, model, compute) is None)
        attention = next(usable, "xla")
    elif attention != "xla" and attention not in (*kernels, *BY_NAME.get(platform, ())):
        where = device.device_kind if platform == "tpu" else platform
        raise ConfigError(f"model.attention: {attention} is not available on {where}; use auto")
    elif reason := obstacle(attention, model, compute):
        raise ConfigError(f"model.attention: {attention} {reason}; use auto")
    return replace(compute, attention=attention, unroll_up_to=unroll_up_to(platform))


def unroll_up_to(
    platform: str, train: Examples | None = None, compilation: float = math.inf
) -> int:
    """Largest number of layers that are computed without a loop. On a CPU, SFT hardly gains from
    it, and would start later.

    Args:
        train: the data of a run. The number of updates does not count: a run that is extended
            keeps its programs, and so its bits.
        compilation: cost of compiling a program, in positions.
    """
    pairs = train is not None and train.answers > 1
    if platform == "cpu" and not (pairs and train.lengths().sum() >= LONG * compilation):
        return 0
    return UNROLL_UP_TO.get(platform, 0)


def lacks_bfloat16(device: Any) -> bool:
    """True for GPUs before Ampere (T4, V100), which compute bfloat16 in float32, slowly."""
    capability = getattr(device, "compute_capability", None)
    return device.platform == "gpu" and capability is not None and float(capability) < 8


def obstacle(kernel: str, model: Model, compute: Compute) -> str | None:
    """Why an attention implementation cannot compute this model; None if it can."""
    config = model.config
    width = getattr(config, "head_width", config.width // config.heads)
    if kernel == "xla":
        return None
    if compute.dropout:
        return "has no dropout, and model.dropout is set"
    scores = getattr(config, "scores", Scores())
    if kernel == "tiles":
        return "has no biases, and this model's scores do" if scores.slopes else None
    if scores != Scores():
        return "computes plain scores, and this model's are scaled, capped or biased"
    if windows := hiding(getattr(config, "windows", None), compute):
        return f"has no windows, and texts may be longer than this model's of {min(windows)} tokens"
    if kernel != "cudnn":
        return "is causal, and encoders are not" if model.architecture.encoder else None
    if jnp.dtype(compute.dtype).itemsize != 2:
        return "needs 16 bits: model.dtype bfloat16 or float16"
    if width > 128 or width % 8:
        return f"needs heads of at most 128 features, a multiple of 8; this model's have {width}"
    return None


def _encoder_template(config: RunConfig, tokenizer: Any, model: Model) -> str:
    """Name of the only template for encoders.

    Raises:
        ConfigError: an option that does not apply to encoders.
        TokenizerError: tokenizer and config.json disagree about the padding token.
    """
    if config.data.template not in ("chat", "encoder"):
        raise ConfigError(
            f"data.template: {config.data.template} is for models that generate text; an encoder "
            "uses its tokenizer's own frame, so leave it out"
        )
    if config.data.share_prompt == "always":
        raise ConfigError(
            "data.share_prompt: an encoder's prompt attends to its answer, so two answers cannot "
            "share a prompt; leave it out"
        )
    known = getattr(model.config, "pad_token_id", tokenizer.pad_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != known:
        raise TokenizerError(
            f"tokenizer: pads with {tokenizer.pad_token_id}, but config.json has pad_token_id "
            f"{known}, which positions depend on; use the model's own tokenizer"
        )
    return "encoder"


def _with_positions(model: Model, count: int) -> Model:
    """The model with another max_position_embeddings; no weight depends on it."""
    if not hasattr(model.config, "rope_theta"):
        raise ConfigError(
            "model.max_positions: applies to rotary positions; this model has no others than its "
            f"{model.config.max_positions}, so leave it out"
        )
    return replace(model, config=replace(model.config, max_position_embeddings=int(count)))


def _resized(config: RunConfig, stored: Model, template: Template) -> Model:
    """The model with the vocabulary size that tokenizer and configuration require."""
    length = len(template.tokenizer)
    if config.model.resize is None and not template.added:
        if length > stored.vocab_size:
            raise TokenizerError(
                f"tokenizer: has {length} tokens, but the embedding has {stored.vocab_size} rows; "
                "use the model's own tokenizer, or set model.resize to mean"
            )
        return stored
    rows = max(template.tokenizer.get_vocab().values()) + 1  # ids may have holes
    if config.lora is not None:
        rows = max(rows, stored.vocab_size)  # the base keeps its rows
    return with_vocabulary(stored, rows)
