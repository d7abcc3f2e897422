"""Architectures, and models with their configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easyaira.distributed.sharding import Rules, like, shardings
from easyaira.distributed.tree import by_path, path_of
from easyaira.hf import transfer
from easyaira.hf.table import Row
from easyaira.models import cudnn
from easyaira.models.heads import LM_HEAD_ROWS, LM_HEAD_RULES, CausalLM, ScoreHead, Scorer
from easyaira.models.layers import Compute, capped


@dataclass(frozen=True, eq=False)  # compared by identity: each is made once
class Architecture:
    config: type
    backbone: type[nn.Module]  # its name is the start of Hugging Face's class names
    rules: Rules
    rows: Sequence[Row]
    prefix: str  # start of tensor names, missing in old files
    ignored: Sequence[str]  # patterns of stored tensors that are not weights
    neutral: Mapping[str, Any]  # unsupported config keys, with their only accepted value
    score_head: ScoreHead
    renamed: Mapping[str, str]  # endings of tensor names in old files -> today's
    saved: Mapping[str, str]  # names of tensors in transformers' modules -> those in its files
    aliases: Mapping[str, str]  # further names of config.json keys -> those of the config
    easylm_rows: Callable[[Any], Sequence[Row]] | None  # by config: table of EasyLM's checkpoints

    @property
    def encoder(self) -> bool:
        """True for bidirectional attention: the model can score texts but not generate them."""
        return self.score_head.first_token


SCORER_CLASS = "ForSequenceClassification"  # ending of transformers' class names for scorers
VALUE_CLASS = "ForTokenClassification"  # and for value models


@dataclass(frozen=True)
class Model:
    """A language model or a scorer: an architecture, its sizes, and how to compute it. Holds no
    weights."""

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
        """Rules of the architecture, without those of parameters that this configuration lacks."""
        head = self._of_head(LM_HEAD_RULES, self.architecture.score_head.rules)
        rows = self.architecture.rows
        absent = [row.ours for row in rows if not row.when(self.config)]
        present = [row.ours for row in rows if row.when(self.config)]

        def applies(pattern: str) -> bool:
            lacking = any(re.search(pattern, path) for path in absent)
            return not lacking or any(re.search(pattern, path) for path in present)

        return (*(rule for rule in self.architecture.rules if applies(rule[0])), *head)

    @property
    def rows(self) -> Sequence[Row]:
        head = self._of_head(LM_HEAD_ROWS, self.architecture.score_head.rows)
        table = (*self.architecture.rows, *head)
        return [row for entry in table for row in entry.of(self.config)]

    @property
    def ignored(self) -> Sequence[str]:
        """Patterns of stored tensors that are not weights of this model."""
        return (*self.architecture.ignored, *((r"lm_head\.weight$",) if self.scorer else ()))

    @property
    def score_rows(self) -> Sequence[Row]:
        """Weight-table rows of the score head; empty for a language model."""
        return self.architecture.score_head.rows if self.scorer else ()

    @property
    def optional(self) -> Sequence[str]:
        """Layers of the score head, initialised at random if the starting model lacks them."""
        return sorted({row.ours.rpartition("/")[0] for row in self.score_rows})

    def match(self, tensors: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
        """Select the stored tensors of this model, and check them before any data is read."""
        return transfer.match(
            tensors,
            self.shapes,
            self.rows,
            vocab_size=self.vocab_size,
            prefix=self.architecture.prefix,
            ignored=self.ignored,
            renamed=self.architecture.renamed
            | {file: module for module, file in self.architecture.saved.items()},
            optional=self.optional,
            tied=self.config.tie_word_embeddings,
            where=where,
        )

    @property
    def hf_class(self) -> str:
        """Name of the transformers class that loads an export."""
        of_tokens = self.architecture.score_head.every_token
        scorer = VALUE_CLASS if of_tokens else SCORER_CLASS
        task = scorer if self.scorer else "ForCausalLM"
        return self.architecture.backbone.__name__ + task

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def experts(self) -> int:
        """Number of experts per layer; 0: MLPs are dense."""
        return getattr(self.config, "num_local_experts", 0)

    @property
    def logit_cap(self) -> float | None:
        """Soft cap of the logits (`layers.capped`), or None."""
        return getattr(self.config, "final_logit_softcapping", None)

    @property
    def head_options(self) -> dict[str, Any]:
        """Options of `losses/token_logps.py` for this model's head."""
        return {"vocab_size": self.vocab_size, "cap": self.logit_cap}

    def logits(self, hidden: jax.Array, head: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D], for few tokens: nothing is chunked."""
        return capped((hidden @ head)[..., : self.vocab_size], self.logit_cap)

    def init(self, key: jax.Array) -> Any:
        """Random weights, initialised as Hugging Face does."""
        ids = jnp.zeros((1, 1), jnp.int32)
        counts = {"examples": 1, "answers": 1} if self.scorer else {}
        return self.module.init(key, ids, ids, ids, ids, **counts)["params"]

    def init_some(self, paths: Sequence[str], target: Any, key: jax.Array) -> dict[str, jax.Array]:
        """Initialise the parameters at `paths` only; XLA drops the computation of all others."""

        def draw(key: jax.Array) -> dict[str, jax.Array]:
            leaves = by_path(self.init(key))
            return {path: leaves[path] for path in paths}

        targets = by_path(target)
        return jax.jit(draw, out_shardings={path: targets[path].sharding for path in paths})(key)

    @property
    def shapes(self) -> Any:
        """Shapes of the parameters; they do not depend on `compute`."""
        return _shapes(replace(self, compute=Compute()))

    def target(self, mesh: Mesh) -> Any:
        """Shapes, dtypes and shardings of the parameters on a mesh."""
        return like(self.shapes, shardings(self.shapes, self.rules, mesh))

    def apply(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states [R, T, D] and the head [D, V] of a batch of rows (see data/batches.py)."""
        return self._applied(params, batch, dropout_key)

    def apply_routed(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The results of `apply`, and the logits of the routers [L, R, T, E]."""
        (hidden, head), kept = self._applied(params, batch, dropout_key, mutable=["router"])
        (logits,) = jax.tree.leaves(kept)
        return hidden, head, logits

    def _applied(self, params: Any, batch: Mapping[str, jax.Array], key: Any, **how: Any) -> Any:
        rows = (batch[name] for name in ("tokens", "positions", "segment_ids", "sides"))
        rngs = {} if key is None else {"dropout": key}
        return self.module.apply({"params": params}, *rows, rngs=rngs, **how)

    def apply_cached(
        self, params: Any, batch: Mapping[str, jax.Array], cache: Any = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Hidden states, head, and the new cache of keys and values (see models/cache.py).

        Args:
            batch: prompts; or with a cache, the next token [R, 1] of each row.
            cache: the cache of the tokens before; None: there are none.
        """
        rows = (batch[name] for name in ("tokens", "positions", "segment_ids", "sides"))
        variables = {"params": params} | ({} if cache is None else {"cache": cache})
        (hidden, head), kept = self.module.apply(variables, *rows, mutable=["cache"])
        return hidden, head, kept["cache"]

    def score(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        dropout_key: jax.Array | None = None,
        *,
        examples: int,
        answers: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Scores [B, A] of the answers in a batch of rows, and a mask of existing answers.

        Args:
            examples: B, the capacity of a batch in examples.
            answers: A, answers per example.
        """
        return self._applied(params, batch, dropout_key, examples=examples, answers=answers)

    def cached(self) -> Model:
        """The same model with a cache of keys and values, for generation."""
        training = {"dropout": 0.0, "gradient_checkpointing": "none", "max_length": None}
        return replace(self, compute=replace(self.compute, cached=True, **training))

    def with_dtype(self, dtype: Any) -> Model:
        """The same model with another computing dtype."""
        return replace(self, compute=replace(self.compute, dtype=dtype))

    @contextmanager
    def on(self, mesh: Mesh) -> Iterator[None]:
        """Run this model's programs on `mesh`, with its matmul precision."""
        precision = jax.default_matmul_precision(self.compute.matmul_precision)
        with jax.set_mesh(mesh), precision, cudnn.reproducible():
            yield

    def parameter_count(self, tree: Any = None) -> int:
        """Number of weights in a tree of parameters, without vocabulary padding. The tree may be an
        adapter's; default: all weights of this model."""
        total = 0
        axis = {row.ours: row.op.vocab_axis for row in self.rows}
        for path, leaf in by_path(self.shapes if tree is None else tree).items():
            vocab_axis = axis.get(path)
            padding = 1 if vocab_axis is None else leaf.shape[vocab_axis]
            real = 1 if vocab_axis is None else self.vocab_size
            total += leaf.size // padding * real
        return total


def resize(
    model: Model, params: Any, vocab_size: int, how: str, key: jax.Array
) -> tuple[Model, Any]:
    """Resize the vocabulary of a model and its parameters.

    Args:
        how: `mean`: new rows are the mean of the old ones; `normal`: new rows are drawn with the
            model's standard deviation, from `key`.
    """
    resized = with_vocabulary(model, vocab_size)
    leaf = partial(resized_leaf, model, resized, how, key)
    return resized, jax.tree_util.tree_map_with_path(leaf, params, resized.shapes)


def with_vocabulary(model: Model, vocab_size: int) -> Model:
    """The same model with a vocabulary of another size."""
    return replace(model, config=replace(model.config, vocab_size=vocab_size))


def resized_leaf(
    model: Model, resized: Model, how: str, key: jax.Array, path: tuple, old: Any, new: Any
) -> Any:
    """One parameter of `model` in the shape `new` that it has in `resized`; see `resize`."""
    vocab_size = resized.vocab_size
    kept = min(model.vocab_size, vocab_size)
    vocab_axes = {row.ours: row.op.vocab_axis for row in model.rows}
    axis = vocab_axes[path_of(path)]
    if axis is None:
        return old
    table, shape = jnp.moveaxis(old, axis, 0), (vocab_size - kept, old.shape[1 - axis])
    # select row by row: writing to slices of a sharded array has lost rows at shard edges
    place = jnp.arange(new.shape[axis])
    added = jnp.broadcast_to(table[: model.vocab_size].mean(0), (len(place), shape[1]))
    if how == "normal" and shape[0]:
        drawn = jax.random.normal(key, shape) * model.config.initializer_range
        added = drawn[jnp.clip(place - kept, 0, shape[0] - 1)]
    stays, is_new = (place < kept)[:, None], (place < vocab_size)[:, None]
    rows = jnp.where(stays, table[jnp.minimum(place, kept - 1)], jnp.where(is_new, added, 0))
    return jnp.moveaxis(rows, 0, axis)


@lru_cache(maxsize=64)
def _shapes(model: Model) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))
