"""The architectures, by Hugging Face's `model_type`, and what the rest of the project sees of one.

To add one: a file beside this one with a config, a backbone, PARTITION_RULES and HF_ROWS at its
end, and a line in MODELS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from easyaira.errors import ConfigError
from easyaira.mesh import Rules, path_of
from easyaira.models import gpt2, llama, opt
from easyaira.models.heads import LM_HEAD_ROWS, LM_HEAD_RULES, CausalLM
from easyaira.models.layers import ACTIVATIONS, Compute
from easyaira.weights import Row


@dataclass(frozen=True)
class Architecture:
    config: type
    backbone: type[nn.Module]
    rules: Rules
    rows: Sequence[Row]
    prefix: str  # in front of tensor names, left out by old files
    ignored: Sequence[str]  # patterns of stored tensors that are no weights
    neutral: Mapping[
        str, Any
    ]  # config keys that are not built, with the value that changes nothing


def _architecture(module: Any, config: type, backbone: type[nn.Module]) -> Architecture:
    return Architecture(
        config,
        backbone,
        module.PARTITION_RULES,
        module.HF_ROWS,
        module.HF_PREFIX,
        module.HF_IGNORED,
        module.HF_NEUTRAL,
    )


MODELS = {
    "gpt2": _architecture(gpt2, gpt2.GPT2Config, gpt2.GPT2),
    "llama": _architecture(llama, llama.LlamaConfig, llama.Llama),
    "opt": _architecture(opt, opt.OPTConfig, opt.OPT),
}

# config.json keys that do not change the numbers of a forward pass
HARMLESS = """
    _name_or_path _num_labels architectures attention_dropout attn_pdrop bos_token_id
    chunk_size_feed_forward dtype embd_pdrop eos_token_id finetuning_task gradient_checkpointing
    id2label label2id model_type n_ctx n_special output_attentions output_hidden_states output_past
    pad_token_id predict_special_tokens pretraining_tp problem_type resid_pdrop return_dict
    rope_parameters summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_class torch_dtype transformers_version
    unk_token_id use_cache sep_token_id do_sample early_stopping length_penalty max_length
    max_new_tokens min_length no_repeat_ngram_size num_beams num_return_sequences repetition_penalty
    temperature top_k top_p typical_p diversity_penalty num_beam_groups encoder_no_repeat_ngram_size
    is_encoder_decoder tie_encoder_decoder remove_invalid_values return_dict_in_generate
    output_scores activation_dropout dropout layerdrop prefix
""".split()


IN_FLOAT32 = Compute()


@dataclass(frozen=True)
class Model:
    """A language model: an architecture, its sizes, and how it is computed. Holds no weights."""

    architecture: Architecture
    config: Any
    compute: Compute

    @cached_property
    def module(self) -> CausalLM:
        return CausalLM(self.architecture.backbone, self.config, self.compute)

    @property
    def rules(self) -> Rules:
        return (
            *self.architecture.rules,
            *(() if self.config.tie_word_embeddings else LM_HEAD_RULES),
        )

    @property
    def rows(self) -> Sequence[Row]:
        rows = (*self.architecture.rows, *(() if self.config.tie_word_embeddings else LM_HEAD_ROWS))
        return [row for row in rows if row.when(self.config)]

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def init(self, key: jax.Array) -> Any:
        """Random weights, drawn as Hugging Face draws them."""
        ids = jnp.zeros((1, 1), jnp.int32)
        return self.module.init(key, ids, ids, ids, ids)["params"]

    @cached_property
    def shapes(self) -> Any:
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states [R, T, D] and the head [D, V] of a batch of rows (see data/batches.py)."""
        rows = (batch[name] for name in ("tokens", "positions", "segment_ids", "sides"))
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply({"params": params}, *rows, rngs=rngs)

    def with_dtype(self, dtype: Any) -> Model:
        """The same model, computed with another precision."""
        return replace(self, compute=replace(self.compute, dtype=dtype))

    def parameter_count(self) -> int:
        """Weights, without the padding of the vocabulary."""
        total = 0
        axis = {row.ours: row.op.vocab_axis for row in self.rows}
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.shapes):
            vocab_axis = axis[path_of(path)]
            padding = 1 if vocab_axis is None else leaf.shape[vocab_axis]
            real = 1 if vocab_axis is None else self.vocab_size
            total += leaf.size // padding * real
        return total


def model_of(raw: Mapping[str, Any], where: str, compute: Compute = IN_FLOAT32) -> Model:
    """The model that a Hugging Face config.json describes.

    Raises:
        ConfigError: an architecture or a feature that is not built, or sizes that cannot be.
    """
    kind = raw.get("model_type")
    if kind not in MODELS:
        raise ConfigError(
            f"{where}: model_type {kind!r} is not built; there are {', '.join(MODELS)}"
        )
    architecture = MODELS[kind]
    values = dict(raw) | _rope(raw, where)
    names = {field.name for field in fields(architecture.config)}
    for key, value in values.items():
        if key in architecture.neutral and value not in (None, architecture.neutral[key]):
            raise ConfigError(
                f"{where}: {key}: {value} is not built; only {architecture.neutral[key]}"
            )
        known = key in names or key in architecture.neutral or key in HARMLESS
        if not known and value not in (None, False, 0, [], {}, ""):
            raise ConfigError(
                f"{where}: {key} is not known, and {value!r} may change the numbers; remove it "
                "from config.json if you are sure that it does not"
            )
    config = architecture.config(**{k: v for k, v in values.items() if k in names})
    _check_sizes(config, where)
    return Model(architecture, config, compute)


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_parameters` of new config.json files as the `rope_theta` of old ones."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ConfigError(f"{where}: rope_type {kind!r} is not built; only default")
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None} if "rope_theta" in rope else {}


def _check_sizes(config: Any, where: str) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"{where}: {field.name} is {value}; it must be 1 or more")
    if config.activation not in ACTIVATIONS:
        raise ConfigError(
            f"{where}: activation {config.activation!r} is not built; there are "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config.width % config.heads and not getattr(config, "head_dim", None):
        raise ConfigError(f"{where}: {config.heads} heads do not divide the width {config.width}")
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"{where}: {config.kv_heads} key/value heads do not divide {config.heads}"
        )


def resize(
    model: Model, params: Any, vocab_size: int, how: str, key: jax.Array
) -> tuple[Model, Any]:
    """The model with a vocabulary of another size.

    Args:
        how: new rows are the `mean` of the old ones, or drawn `normal` with the model's standard
            deviation, from `key`.
    """
    resized = replace(model, config=replace(model.config, vocab_size=vocab_size))
    kept = min(model.vocab_size, vocab_size)
    vocab_axes = {row.ours: row.op.vocab_axis for row in model.rows}

    def leaf(path, old, new):
        axis = vocab_axes[path_of(path)]
        if axis is None:
            return old
        table, shape = jnp.moveaxis(old, axis, 0), (vocab_size - kept, old.shape[1 - axis])
        added = jnp.broadcast_to(table[: model.vocab_size].mean(0), shape)
        if how == "normal":
            added = jax.random.normal(key, shape) * model.config.initializer_range
        rows = jnp.zeros((new.shape[axis], shape[1]), old.dtype)
        rows = rows.at[:kept].set(table[:kept]).at[kept:vocab_size].set(added)
        return jnp.moveaxis(rows, 0, axis)

    return resized, jax.tree_util.tree_map_with_path(leaf, params, resized.shapes)
