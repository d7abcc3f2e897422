"""The model's passes for generation: weights laid out for decoding, and the prefill of prompts.

Shapes: M prompts of a prefill, T tokens of the longest one (both rounded up), R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain, on_one_cpu
from easyaira.distributed.tree import path_of
from easyaira.models.heads import LM_HEAD
from easyaira.models.layers import capped, is_matrix
from easyaira.models.linear import BY_ROWS
from easyaira.models.model import Model
from easyaira.models.product import by_rows, packed, unpacked


class Weights(NamedTuple):
    """Weights for generation: matrices in the computing dtype, tables packed (see product.py),
    layers apart, the head with a row for each token."""

    params: Any  # without an untied head
    head: jax.Array | None  # [V, D]


class Prefilled(NamedTuple):
    cache: Any  # keys and values of each layer, [M, K, T, N]
    lengths: jax.Array  # [M]
    logits: jax.Array  # [M, V] of the first token of an answer
    seen: jax.Array | None  # [M, V]


def apart(tree: Any) -> Any:
    """Split stacked layers, so that none has to be copied out of the stack for each token."""
    return jax.tree.map(lambda leaf: tuple(leaf[i] for i in range(len(leaf))), tree)


def together(tree: Any) -> Any:
    """Stack layers again. XLA removes the stack, since each layer is taken out of it again."""
    return jax.tree.map(jnp.stack, tree, is_leaf=lambda node: type(node) is tuple)


class Form(NamedTuple):
    """How `Weights.params` holds a parameter."""

    matrix: bool  # in the computing dtype
    table: bool  # packed
    layers: bool  # stacked layers apart
    by_rows: bool


@dataclass(frozen=True)
class Forward:
    """Pure functions of arrays, for one model.

    Attributes:
        model: with a cache of keys and values.
        counted: keep the tokens that a row has seen, for a repetition penalty.
    """

    model: Model
    counted: bool

    def _layers(self) -> tuple[str, str]:
        """Path of the scanned layers in the parameters."""
        stacked = next(row.ours for row in self.model.rows if "{}" in row.theirs)
        backbone, layers, *_ = stacked.split("/")
        return backbone, layers

    def form(self, path: tuple) -> Form:
        """Form of the parameter at `path`."""
        name = path_of(path)
        layers = name.startswith("/".join(self._layers()) + "/")
        by_rows = layers and name.endswith("/kernel") and on_one_cpu()
        return Form(is_matrix(name), name.endswith("/embedding"), layers, by_rows)

    def held(self, form: Form, leaf: jax.Array) -> Any:
        """A parameter in its form."""
        if form.matrix:
            leaf = leaf.astype(self.model.compute.dtype)
        if form.table:
            return packed(leaf)
        if form.by_rows:  # kernels [L, K, ...]
            return apart({BY_ROWS: jnp.moveaxis(leaf, 1, -1)})
        return apart(leaf) if form.layers else leaf

    def with_head(self, params: Any) -> Weights:
        """Weights of parameters that are `held` already."""
        layout = self.layout(*(jnp.zeros((1, 1), jnp.int32),) * 2, jnp.ones((1, 1), jnp.int32))
        _, head, _ = self.model.apply_cached(self.parameters(Weights(params, None)), layout)
        head = constrain(head.astype(self.model.compute.dtype).T, "tp", None)
        return Weights({name: tree for name, tree in params.items() if name != LM_HEAD}, head)

    def weights(self, params: Any) -> Weights:
        def held(path, leaf):
            return self.held(self.form(path), leaf)

        return self.with_head(jax.tree_util.tree_map_with_path(held, params))

    def parameters(self, weights: Weights) -> Any:
        """Parameters as the model takes them."""
        backbone, layers = self._layers()
        params = jax.tree.map(lambda x: unpacked(x, self.model.compute.dtype), weights.params)
        inner = params[backbone]
        params |= {backbone: inner | {layers: together(inner[layers])}}
        if weights.head is not None and not self.model.config.tie_word_embeddings:
            params |= {LM_HEAD: {"kernel": weights.head.T}}
        return params

    def layout(self, tokens, positions, segment_ids, sides=None):
        sides = jnp.zeros_like(tokens) if sides is None else sides
        names = ("tokens", "positions", "segment_ids", "sides")
        return dict(zip(names, (tokens, positions, segment_ids, sides), strict=True))

    def logits(self, hidden: jax.Array, head: jax.Array) -> jax.Array:
        """Float32 logits [R, V] of hidden states [R, D]."""
        logits = by_rows(hidden, head, jnp.float32)
        logits = capped(logits, self.model.logit_cap)
        return constrain(logits, BATCH_AXES, None)[:, : self.model.vocab_size]

    def prefill(self, weights: Weights, tokens: jax.Array, lengths: jax.Array) -> Prefilled:
        """Keys and values of prompts [M, T], padded on the right, and the logits after them."""
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        real = place < lengths[:, None]
        layout = self.layout(tokens, place, real.astype(jnp.int32))
        hidden, _, cache = self.model.apply_cached(self.parameters(weights), layout)
        rows = jnp.arange(len(tokens))
        seen = None
        if self.counted:
            seen = jnp.zeros((len(tokens), self.model.vocab_size), bool)
            seen = seen.at[rows[:, None], tokens].max(real)
        logits = self.logits(hidden[rows, lengths - 1], weights.head)
        return Prefilled(apart(cache), lengths, logits, seen)
