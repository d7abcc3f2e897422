"""The architectures, by Hugging Face's `model_type`, and what the rest of the project sees of one.

To add one: a file beside this one with a config, a backbone, PARTITION_RULES and HF_ROWS at its
end, and a line in MODELS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easyaira.errors import ConfigError
from easyaira.mesh import Rules, by_path, like, path_of, shardings
from easyaira.models import bert, gpt2, llama, opt, roberta
from easyaira.models.heads import (
    LAST_TOKEN,
    LM_HEAD_ROWS,
    LM_HEAD_RULES,
    CausalLM,
    ScoreHead,
    Scorer,
)
from easyaira.models.layers import ACTIVATIONS, Compute
from easyaira.weights import Row


@dataclass(frozen=True)
class Architecture:
    config: type
    backbone: type[nn.Module]  # of the name that Hugging Face's classes begin with
    rules: Rules
    rows: Sequence[Row]
    prefix: str  # in front of tensor names, left out by old files
    ignored: Sequence[str]  # patterns of stored tensors that are no weights
    neutral: Mapping[
        str, Any
    ]  # config keys that are not built, with the value that changes nothing
    score_head: ScoreHead
    renamed: Mapping[str, str]  # ends of tensor names in old files

    @property
    def encoder(self) -> bool:
        """Every token sees its whole text: it judges texts and cannot write them."""
        return self.score_head.first_token


def _architecture(module: Any, config: type, backbone: type[nn.Module]) -> Architecture:
    return Architecture(
        config,
        backbone,
        module.PARTITION_RULES,
        module.HF_ROWS,
        module.HF_PREFIX,
        module.HF_IGNORED,
        module.HF_NEUTRAL,
        getattr(module, "SCORE_HEAD", LAST_TOKEN),
        getattr(module, "HF_RENAMED", {}),
    )


MODELS = {
    "bert": _architecture(bert, bert.BertConfig, bert.Bert),
    "gpt2": _architecture(gpt2, gpt2.GPT2Config, gpt2.GPT2),
    "llama": _architecture(llama, llama.LlamaConfig, llama.Llama),
    "opt": _architecture(opt, opt.OPTConfig, opt.OPT),
    "roberta": _architecture(roberta, roberta.RobertaConfig, roberta.Roberta),
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
    output_scores activation_dropout dropout layerdrop prefix num_labels hidden_dropout_prob
    attention_probs_dropout_prob classifier_dropout directionality pooler_fc_size pooler_type
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
""".split()


IN_FLOAT32 = Compute()
SCORER_CLASS = "ForSequenceClassification"  # the end of the name of transformers' scorers


@dataclass(frozen=True)
class Model:
    """A language model or a scorer of texts: an architecture, its sizes, and how it is computed.
    Holds no weights."""

    architecture: Architecture
    config: Any
    compute: Compute
    scorer: bool = False

    @cached_property
    def module(self) -> CausalLM | Scorer:
        backbone = self.architecture.backbone
        if self.scorer:
            return Scorer(backbone, self.architecture.score_head, self.config, self.compute)
        return CausalLM(backbone, self.config, self.compute)

    def _of_head(self, lm_head: Sequence[Any], score_head: Sequence[Any]) -> Sequence[Any]:
        if self.scorer:
            return score_head
        return () if self.config.tie_word_embeddings else lm_head

    @property
    def rules(self) -> Rules:
        head = self._of_head(LM_HEAD_RULES, self.architecture.score_head.rules)
        return (*self.architecture.rules, *head)

    @property
    def rows(self) -> Sequence[Row]:
        head = self._of_head(LM_HEAD_ROWS, self.architecture.score_head.rows)
        return [row for row in (*self.architecture.rows, *head) if row.when(self.config)]

    @property
    def ignored(self) -> Sequence[str]:
        """Patterns of stored tensors that are no weights of this model."""
        return (*self.architecture.ignored, *((r"lm_head\.weight$",) if self.scorer else ()))

    @property
    def score_rows(self) -> Sequence[Row]:
        """Those of a scorer's head; a language model has none."""
        return self.architecture.score_head.rows if self.scorer else ()

    @property
    def optional(self) -> Sequence[str]:
        """Products that a new scorer draws, where the model it begins with has none."""
        return sorted({row.ours.rpartition("/")[0] for row in self.score_rows})

    @property
    def hf_class(self) -> str:
        """The transformers class that reads an export."""
        task = SCORER_CLASS if self.scorer else "ForCausalLM"
        return self.architecture.backbone.__name__ + task

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def init(self, key: jax.Array) -> Any:
        """Random weights, drawn as Hugging Face draws them."""
        ids = jnp.zeros((1, 1), jnp.int32)
        counts = {"examples": 1, "answers": 1} if self.scorer else {}
        return self.module.init(key, ids, ids, ids, ids, **counts)["params"]

    @cached_property
    def shapes(self) -> Any:
        return jax.eval_shape(self.init, jax.random.key(0))

    def target(self, mesh: Mesh) -> Any:
        """Shapes, dtypes and shardings of the parameters on a mesh."""
        return like(self.shapes, shardings(self.shapes, self.rules, mesh))

    def apply(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states [R, T, D] and the head [D, V] of a batch of rows (see data/batches.py)."""
        rows = (batch[name] for name in ("tokens", "positions", "segment_ids", "sides"))
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply({"params": params}, *rows, rngs=rngs)

    def score(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        dropout_key: jax.Array | None = None,
        *,
        examples: int,
        answers: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Scores [B, A] of the answers in a batch of rows, and which of them are there.

        Args:
            examples: B, for which a batch has room.
            answers: A, 1 or 2 for each example.
        """
        rows = (batch[name] for name in ("tokens", "positions", "segment_ids", "sides"))
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        counts = {"examples": examples, "answers": answers}
        return self.module.apply({"params": params}, *rows, rngs=rngs, **counts)

    def with_dtype(self, dtype: Any) -> Model:
        """The same model, computed with another precision."""
        return replace(self, compute=replace(self.compute, dtype=dtype))

    @contextmanager
    def on(self, mesh: Mesh) -> Iterator[None]:
        """Where and how precisely programs of this model are to run."""
        with jax.set_mesh(mesh), jax.default_matmul_precision(self.compute.matmul_precision):
            yield

    def parameter_count(self) -> int:
        """Weights, without the padding of the vocabulary."""
        total = 0
        axis = {row.ours: row.op.vocab_axis for row in self.rows}
        for path, leaf in by_path(self.shapes).items():
            vocab_axis = axis[path]
            padding = 1 if vocab_axis is None else leaf.shape[vocab_axis]
            real = 1 if vocab_axis is None else self.vocab_size
            total += leaf.size // padding * real
        return total


def model_of(
    raw: Mapping[str, Any],
    where: str,
    compute: Compute = IN_FLOAT32,
    *,
    scorer: bool | None = None,
) -> Model:
    """The model that a Hugging Face config.json describes.

    Args:
        raw: config.json.
        where: it is, for messages.
        compute: how it is to be computed.
        scorer: it is to score texts, or to write them; None: as its `architectures` say.

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
    stored_scorer = str((raw.get("architectures") or [""])[0]).endswith(SCORER_CLASS)
    if stored_scorer and (labels := _labels(raw)) != 1:
        raise ConfigError(f"{where}: classifies into {labels} labels; only scores (1) are built")
    if architecture.encoder and scorer is False:
        raise ConfigError(
            f"{where}: {kind} sees a text whole and writes none; train_reward makes it a scorer"
        )
    if scorer is None:
        scorer = stored_scorer or architecture.encoder
    return Model(architecture, config, compute, scorer)


def _labels(raw: Mapping[str, Any]) -> int:
    """How many labels transformers would give a classifier with this config.json."""
    return len(raw["id2label"]) if raw.get("id2label") else raw.get("num_labels", 2)


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
        # chosen row by row: writing into slices of a divided array has lost rows at their edges
        place = jnp.arange(new.shape[axis])
        added = jnp.broadcast_to(table[: model.vocab_size].mean(0), (len(place), shape[1]))
        if how == "normal" and shape[0]:
            drawn = jax.random.normal(key, shape) * model.config.initializer_range
            added = drawn[jnp.clip(place - kept, 0, shape[0] - 1)]
        stays, is_new = (place < kept)[:, None], (place < vocab_size)[:, None]
        rows = jnp.where(stays, table[jnp.minimum(place, kept - 1)], jnp.where(is_new, added, 0))
        return jnp.moveaxis(rows, 0, axis)

    return resized, jax.tree_util.tree_map_with_path(leaf, params, resized.shapes)
