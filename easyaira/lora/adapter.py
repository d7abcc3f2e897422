"""Adapters (LoRA) as a separate parameter tree beside a frozen base.

The adapter of a linear layer is `lora_a` [L, in, r] and `lora_b` [L, r, out]. Like the kernel
[L, in, out], both are stacked over layers. `out` has two axes where the kernel's output has two
(GPT-2's q, k, v). The tuned model is `model.apply` of the base with the adapter beside its kernels
(`Adapter.on`); the original model is `model.apply` of the base. Only the adapter has gradients,
optimizer state and checkpoints. The base is an argument of the step, in storage precision
(lora/held.py).

With `dora`, there is also the norm of each output's weights, `lora_magnitude` [L, out]. In the
model's parameters, factors of the outputs take its place, `lora_gain` (lora/dora.py).

The vectors of a few tokens may be trained, too, in the token table and in an untied head:
`token_rows` [n, D] beside the frozen table, as peft's trainable_token_indices.

The score head and the tables of `modules_to_save` are trained in full, as in peft. Their parameters
belong to the adapter, under their own paths, and not to the base.

Hu et al. (2021), LoRA; Dettmers et al. (2023), QLoRA; Kalajdzievski (2023), rsLoRA; Liu et al.
(2024), DoRA.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.config.model import LoraConfig
from easyaira.distributed.sharding import like, partition_specs
from easyaira.distributed.tree import by_path, path_of
from easyaira.errors import ConfigError
from easyaira.hf.table import Row
from easyaira.lora import dora
from easyaira.lora.base import Frozen
from easyaira.lora.targets import (
    ALL_LINEAR,
    LM_HEAD,
    beside,
    by_pattern,
    module_of,
    rows_of,
    saved_of,
    table_name,
    tables_of,
    targets_of,
    tied,
)
from easyaira.models.model import Model
from easyaira.models.token_rows import with_rows


@dataclass(frozen=True)
class Adapter:
    """The adapted layers of a model and their configuration, without weights.

    Attributes:
        targets: rows of the weight table whose kernels are adapted.
        whole: rows of the parameters that are trained in full.
        tables: rows of the tables with a few trained vectors; empty if no token is trained.
    """

    config: LoraConfig
    model: Model
    targets: tuple[Row, ...]
    whole: tuple[Row, ...]
    tables: tuple[Row, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """Ids of the trained tokens."""
        return (self.config.trainable_token_indices or []) if self.tables else []

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted kernel, by its path."""
        return self._by_layer("rank_pattern", self.config.r)

    @cached_property
    def scales(self) -> dict[str, float]:
        """Scale of each adapted kernel's adapter, by its path."""
        alphas, root = self._by_layer("alpha_pattern", self.config.alpha), self.config.rslora
        return {
            path: alphas[path] / (math.sqrt(rank) if root else rank)
            for path, rank in self.ranks.items()
        }

    def _by_layer(self, option: str, default: Any) -> dict[str, Any]:
        pattern = getattr(self.config, option)
        values = ((row.ours, by_pattern(row, option, pattern, self.model)) for row in self.targets)
        return {path: default if value is None else value for path, value in values}

    @cached_property
    def shapes(self) -> Any:
        """Shapes of the adapter's float32 parameters."""
        kernels = by_path(self.model.shapes)
        tree = {row.ours: kernels[row.ours] for row in self.whole}
        for row in self.targets:
            layers, inputs, *outputs = kernels[row.ours].shape
            rank = self.ranks[row.ours]
            sizes = {"a": (inputs, rank), "b": (rank, *outputs)}
            if self.config.dora:
                sizes["magnitude"] = tuple(outputs)
            for name, shape in sizes.items():
                path = beside(row, f"lora_{name}")
                tree[path] = jax.ShapeDtypeStruct((layers, *shape), jnp.float32)
        for row in self.tables:
            width = kernels[row.ours].shape[1 - row.op.vocab_axis]
            tree[rows_of(row)] = jax.ShapeDtypeStruct((len(self.tokens), width), jnp.float32)
        return nested(tree)

    def parameter_count(self) -> int:
        return self.model.parameter_count(self.shapes)

    def specs(self) -> Any:
        """PartitionSpecs, derived from those of the kernels.

        `lora_a` is sharded like the kernel's inputs, `lora_b` and magnitudes like its outputs; the
        rank is never sharded. Parameters that are trained in full keep their specs."""
        kernels = by_path(partition_specs(self.model.shapes, self.model.rules))
        tables = {rows_of(row): kernels[row.ours][1 - row.op.vocab_axis] for row in self.tables}

        def spec(path, leaf):
            folder, _, name = path_of(path).rpartition("/")
            if self.replaces(path_of(path)):
                return kernels[path_of(path)]
            if path_of(path) in tables:
                return P(None, tables[path_of(path)])
            layer, inputs, *outputs = kernels[f"{folder}/kernel"]
            return {
                "lora_a": P(layer, inputs, None),
                "lora_b": P(layer, None, *outputs),
                "lora_magnitude": P(layer, *outputs),
            }[name]

        return jax.tree_util.tree_map_with_path(spec, self.shapes)

    def target(self, mesh: Mesh) -> Any:
        """Shapes and shardings of the adapter's parameters on a mesh."""
        shardings = jax.tree.map(partial(NamedSharding, mesh), self.specs(), is_leaf=_is_spec)
        return like(self.shapes, shardings)

    def init(self, key: jax.Array, given: Any = None) -> Any:
        """Initial parameters: A uniform in +-1/sqrt(in), B zero, and those given: what is trained
        in full (see `parted`), vectors of trained tokens and magnitudes (see `of_base`).

        The bound equals that of peft's Kaiming initialisation with a = sqrt(5)."""
        paths, given = sorted(by_path(self.shapes)), by_path(given)

        def leaf(path, shape):
            if path_of(path) in given:
                return given[path_of(path)]
            if path[-1].key == "lora_b":
                return jnp.zeros(shape.shape)
            if path[-1].key != "lora_a":
                raise ValueError(f"{path_of(path)} depends on the base; see of_base and parted")
            bound = 1 / math.sqrt(shape.shape[1])
            own = jax.random.fold_in(key, paths.index(path_of(path)))
            return jax.random.uniform(own, shape.shape, minval=-bound, maxval=bound)

        return jax.tree_util.tree_map_with_path(leaf, self.shapes)

    def applied(self, base: Any, params: Any) -> Any:
        """The adapter as model parameters: `lora_b` times the scale, gains in the place of
        magnitudes, the dropout rates, and the ids of the trained tokens."""
        tree = by_path(params)
        for row in self.targets:
            a, b, m, gain, dropout = (
                beside(row, f"lora_{name}") for name in ("a", "b", "magnitude", "gain", "dropout")
            )
            tree[b] = tree[b] * self.scales[row.ours]
            if self.config.dora:
                held = _at(base, row)
                tree[gain] = dora.gains(tree.pop(m), held, tree[a], tree[b], self._dtype)
            if self.config.dropout:
                tree[dropout] = jnp.full(tree[a].shape[:1], self.config.dropout)
        for row in self.tables:
            tree[beside(row, "token_ids")] = jnp.asarray(self.tokens, jnp.int32)
        return nested(tree)

    @property
    def _dtype(self) -> Any:
        return self.model.compute.dtype

    def on(self, base: Any, params: Any) -> Any:
        """Parameters of the tuned model: the base, by reference, plus the adapter."""
        return joined(base, self.applied(base, params))

    def over_base(self, loss_fn: Callable) -> Callable:
        """Turn a loss of all weights into a loss of the adapter, with the base as frozen weights.

        A training step with adapters differs in nothing else."""

        def of_adapter(params: Any, frozen: Frozen, batch: Any, key: Any) -> Any:
            others = frozen.of_algorithm
            if _is_adapter(others):
                others = joined(frozen.base, others)
            return loss_fn(self.on(frozen.base, params), others, batch, key)

        return of_adapter

    def frozen(self, base: Any, of_algorithm: Any) -> Frozen:
        """Frozen weights for `over_base`. A model made of the base and an adapter (a DPO reference)
        is reduced to that adapter."""
        if not _is_adapter(of_algorithm):
            return Frozen(base, of_algorithm)
        flat = by_path(of_algorithm).items()
        return Frozen(
            base,
            nested({path: leaf for path, leaf in flat if _is_own(path) or self.replaces(path)}),
        )

    def replaces(self, path: str) -> bool:
        """Whether the parameter at this path is trained in full, and so not part of the base."""
        return any(row.ours == path for row in self.whole)

    def of_base(self, base: Any) -> Any:
        """Initial parameters that are the base's: vectors of trained tokens, and magnitudes, which
        are the norms of the stored kernels; float32."""
        shapes, ids = by_path(self.shapes), jnp.asarray(self.tokens, jnp.int32)

        def taken(row: Row) -> jax.Array:
            vectors = jnp.take(_at(base, row), ids, axis=row.op.vocab_axis)
            return (vectors.T if row.op.vocab_axis else vectors).astype(jnp.float32)

        def measured(row: Row) -> jax.Array:
            a, b = (jnp.zeros_like(shapes[beside(row, f"lora_{m}")]) for m in "ab")
            return dora.norms(_at(base, row), a, b, self._dtype)

        flat = {rows_of(row): taken(row) for row in self.tables}
        if self.config.dora:
            flat |= {beside(row, "lora_magnitude"): measured(row) for row in self.targets}
        return nested(flat)

    def parted(self, tree: Any) -> tuple[Any, Any]:
        """Split a tree of the model's weights into the base and those that are trained in full."""
        base, whole = {}, {}
        for path, leaf in by_path(tree).items():
            (whole if self.replaces(path) else base)[path] = leaf
        return nested(base), nested(whole)

    def merge(self, base: Any, params: Any) -> Any:
        """`merging` for a whole tree of the base's weights."""
        return jax.tree_util.tree_map_with_path(self.merging(params), base)

    def merging(self, params: Any) -> Callable[[tuple, jax.Array], jax.Array]:
        """A function that merges the adapter into one plain weight: kernel + scale A B in float32
        (with magnitudes, see lora/dora.py), or what is trained in full, or the vectors of the
        trained tokens.

        Args:
            params: the adapter's parameters.

        Returns:
            (path, original float32 weight, never quantised; of a scorer, any head) -> weight.
        """
        flat = by_path(params)
        tables, scales = {row.ours: row for row in self.tables}, self.scales

        def merged(path: tuple, kernel: jax.Array) -> jax.Array:
            name = path_of(path)
            if self.replaces(name):
                return flat[name]
            if row := tables.get(name):
                ids = jnp.asarray(self.tokens)
                return _with_rows(kernel, flat[rows_of(row)], ids, row.op.vocab_axis)
            a, b, m = (
                flat.get(name.replace("/kernel", f"/lora_{part}"))
                for part in ("a", "b", "magnitude")
            )
            return kernel if a is None else dora.merged(kernel, a, b * scales[name], m)

        return merged

    @property
    def target_modules(self) -> list[str] | str:
        """`target_modules` of adapter_config.json, with all-linear written out."""
        if self.config.target_modules != ALL_LINEAR:
            return self.config.target_modules
        return sorted(module_of(row).partition("{}.")[2] for row in self.targets)

    @property
    def modules_to_save(self) -> list[str]:
        """peft's names of the modules that are trained in full, a tied head among them."""
        prefix = self.model.architecture.prefix
        names = set()
        for row in self.whole:
            if row.op.vocab_axis is None:
                names.add(row.theirs.removeprefix(prefix).partition(".")[0])
            else:
                names |= {table_name(row), *([LM_HEAD] if tied(self.model) else [])}
        return sorted(names)


def adapter_of(config: LoraConfig, model: Model) -> Adapter:
    """The adapter described by `config`.

    Raises:
        ConfigError: see `targets_of`, `saved_of`, `tables_of` and `by_pattern`; or a pattern
            matches no adapted layer.
    """
    whole = (*model.score_rows, *saved_of(config.modules_to_save, model))
    targets = targets_of(config.target_modules, model)
    adapter = Adapter(config, model, targets, whole, tables_of(config, model))
    for option in ("rank_pattern", "alpha_pattern"):
        unused = dict(getattr(config, option) or {})
        for row in targets:
            for key in [key for key in unused if by_pattern(row, option, {key: 1}, model)]:
                del unused[key]
        if unused:
            raise ConfigError(f"lora.{option}: {min(unused)!r} matches no layer with an adapter")
    return adapter


def of_record(record: Mapping[str, Any], model: Model) -> Adapter:
    """The adapter described by a checkpoint's `lora` record."""
    return adapter_of(LoraConfig(**record["config"]), model)


def to_record(adapter: Adapter, base: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """A checkpoint's record of its adapter and of the base weights."""
    config = json.loads(json.dumps(asdict(adapter.config)))  # plain JSON types
    return {"config": config, "base": {**base, "fingerprint": fingerprint}}


_with_rows = jax.jit(with_rows, static_argnums=3)


def _at(base: Any, row: Row) -> Any:
    """The weight of a row in a base; if quantised, its codes and scales."""
    for key in row.ours.split("/"):
        base = base[key]
    return base


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Tree of leaves by path; inverse of `by_path`."""
    return unflatten_dict(dict(flat), sep="/")


def joined(one: Any, other: Any) -> Any:
    """Merge two trees that have no leaf in common."""
    if not isinstance(other, Mapping):
        return other
    return {**one, **{k: joined(one[k], v) if k in one else v for k, v in other.items()}}


def _is_adapter(tree: Any) -> bool:
    return any(map(_is_own, by_path(tree)))


def _is_own(path: str) -> bool:
    """Whether a parameter of the tuned model is the adapter's alone."""
    return path.rpartition("/")[2].startswith(("lora_", "token_"))


def _is_spec(value: Any) -> bool:
    return isinstance(value, P)
