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
from easyaira.distributed.tree import by_path
from easyaira.models.layers import capped
from easyaira.models.linear import BY_ROWS
from easyaira.models.model import Model
from easyaira.models.product import by_rows, packed, unpacked


class Weights(NamedTuple):
    """Weights for generation: matrices in the computing dtype, tables packed (see product.py),
    layers apart, the head with a row for each token."""

    params: Any
    head: jax.Array  # [V, D]


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


def _by_rows(layers: Any) -> Any:
    """On a single CPU, store the kernels [L, K, ...] by rows."""
    if not on_one_cpu():
        return layers

    def held(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        return {BY_ROWS: jnp.moveaxis(leaf, 1, -1)}

    return jax.tree_util.tree_map_with_path(held, layers)


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

    def weights(self, params: Any) -> Weights:
        dtype = self.model.compute.dtype
        layout = self.layout(*(jnp.zeros((1, 1), jnp.int32),) * 2, jnp.ones((1, 1), jnp.int32))
        _, head, _ = self.model.apply_cached(params, layout)
        matrices = {path for path in by_path(params) if path.endswith(("/kernel", "/embedding"))}

        def cast(path, leaf):
            name = "/".join(str(key.key) for key in path)
            if name not in matrices:
                return leaf
            leaf = leaf.astype(dtype)
            return packed(leaf) if name.endswith("/embedding") else leaf

        params = jax.tree_util.tree_map_with_path(cast, params)
        backbone, layers = self._layers()
        inner = params[backbone] | {layers: apart(_by_rows(params[backbone][layers]))}
        return Weights(params | {backbone: inner}, constrain(head.astype(dtype).T, "tp", None))

    def parameters(self, weights: Weights) -> Any:
        backbone, layers = self._layers()
        params = jax.tree.map(lambda x: unpacked(x, self.model.compute.dtype), weights.params)
        inner = params[backbone]
        return params | {backbone: inner | {layers: together(inner[layers])}}

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
