"""Adapters (LoRA) as a separate parameter tree beside a frozen base.

The adapter of a linear layer is `lora_a` [L, in, r] and `lora_b` [L, r, out]. Like the kernel
[L, in, out], both are stacked over layers. `out` has two axes where the kernel's output has two
(GPT-2's q, k, v). The tuned model is `model.apply` of the base with the adapter beside its kernels
(`Adapter.on`); the original model is `model.apply` of the base. Only the adapter has gradients,
optimizer state and checkpoints. The base is an argument of the step, in storage precision
(`Adapter.hold`).

The score head is trained in full, as in peft. Its parameters belong to the adapter, under their own
paths, and not to the base.

Hu et al. (2021), LoRA; Dettmers et al. (2023), QLoRA; Kalajdzievski (2023), rsLoRA.
"""

from __future__ import annotations

import json
import math
import re
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
from easyaira.distributed.sharding import like, partition_specs, sharding_of
from easyaira.distributed.tree import by_path, path_of
from easyaira.errors import ConfigError
from easyaira.hf.table import Row
from easyaira.lora.base import Frozen
from easyaira.models.model import Model
from easyaira.models.quantize import quantize

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head


@dataclass(frozen=True)
class Adapter:
    """The adapted layers of a model and their configuration, without weights.

    Attributes:
        targets: rows of the weight table whose kernels are adapted.
        head: rows of the score head, which is trained in full; empty for a language model.
    """

    config: LoraConfig
    model: Model
    targets: tuple[Row, ...]
    head: tuple[Row, ...]

    @property
    def scale(self) -> float:
        rank = math.sqrt(self.config.r) if self.config.rslora else self.config.r
        return self.config.alpha / rank

    @cached_property
    def shapes(self) -> Any:
        """Shapes of the adapter's float32 parameters."""
        kernels = by_path(self.model.shapes)
        tree = {row.ours: kernels[row.ours] for row in self.head}
        for row in self.targets:
            layers, inputs, *outputs = kernels[row.ours].shape
            for name, shape in (("a", (inputs, self.config.r)), ("b", (self.config.r, *outputs))):
                path = row.ours.replace("/kernel", f"/lora_{name}")
                tree[path] = jax.ShapeDtypeStruct((layers, *shape), jnp.float32)
        return nested(tree)

    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

    def specs(self) -> Any:
        """PartitionSpecs, derived from those of the kernels.

        `lora_a` is sharded like the kernel's inputs and `lora_b` like its outputs; the rank is
        never sharded. The head keeps its own specs."""
        kernels = by_path(partition_specs(self.model.shapes, self.model.rules))

        def spec(path, leaf):
            folder, _, name = path_of(path).rpartition("/")
            if self.replaces(path_of(path)):
                return kernels[path_of(path)]
            layer, inputs, *outputs = kernels[f"{folder}/kernel"]
            return P(layer, inputs, None) if name == "lora_a" else P(layer, None, *outputs)

        return jax.tree_util.tree_map_with_path(spec, self.shapes)

    def target(self, mesh: Mesh) -> Any:
        """Shapes and shardings of the adapter's parameters on a mesh."""
        shardings = jax.tree.map(partial(NamedSharding, mesh), self.specs(), is_leaf=_is_spec)
        return like(self.shapes, shardings)

    def init(self, key: jax.Array, head: Any = None) -> Any:
        """Initial parameters: A uniform in +-1/sqrt(in), B zero, and the given head (see `parted`).

        The bound equals that of peft's Kaiming initialisation with a = sqrt(5)."""
        paths, given = sorted(by_path(self.shapes)), by_path(head)

        def leaf(path, shape):
            if self.replaces(path_of(path)):
                return given[path_of(path)]
            if path[-1].key == "lora_b":
                return jnp.zeros(shape.shape)
            bound = 1 / math.sqrt(shape.shape[1])
            own = jax.random.fold_in(key, paths.index(path_of(path)))
            return jax.random.uniform(own, shape.shape, minval=-bound, maxval=bound)

        return jax.tree_util.tree_map_with_path(leaf, self.shapes)

    def applied(self, params: Any) -> Any:
        """The adapter as model parameters: `lora_b` times the scale, and the dropout rates."""

        def leaf(path, value):
            return value * self.scale if path[-1].key == "lora_b" else value

        tree = jax.tree_util.tree_map_with_path(leaf, params)
        if not self.config.dropout:
            return tree
        rates = {
            path.replace("lora_a", "lora_dropout"): jnp.full(leaf.shape[:1], self.config.dropout)
            for path, leaf in by_path(tree).items()
            if path.endswith("lora_a")
        }
        return joined(tree, nested(rates))

    def on(self, base: Any, params: Any) -> Any:
        """Parameters of the tuned model: the base, by reference, plus the adapter."""
        return joined(base, self.applied(params))

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
        flat = {path: leaf for path, leaf in by_path(of_algorithm).items() if "/lora_" in path}
        return Frozen(base, nested(flat) if flat else of_algorithm)

    # the base in storage precision

    def replaces(self, path: str) -> bool:
        """Whether the parameter at this path belongs to the head."""
        return any(row.ours == path for row in self.head)

    def parted(self, tree: Any) -> tuple[Any, Any]:
        """Split a tree of all the model's weights into the base and the head."""
        base, head = {}, {}
        for path, leaf in by_path(tree).items():
            (head if self.replaces(path) else base)[path] = leaf
        return nested(base), nested(head)

    def hold(self, path: tuple, leaf: jax.Array, dtype: Any) -> Any:
        """Convert a float32 weight of the base to its storage precision.

        Linear layers of the blocks are quantised if `quantize` is set. Otherwise they, like
        embeddings, are stored in the computing dtype. The model casts them to that dtype anyway, so
        no result changes, and a frozen weight needs no float32 copy. Norms and biases are small and
        stay float32.
        """
        name = path_of(path)
        if self.config.quantize and name in self._quantized:
            return quantize(leaf, self.config.quantize, axis=1)
        return leaf.astype(dtype) if name.endswith(("kernel", "embedding")) else leaf

    @cached_property
    def _quantized(self) -> set[str]:
        return {row.ours for row in _linear_layers(self.model)}

    def held_target(self, mesh: Mesh, dtype: Any) -> Any:
        """Shapes and shardings of the stored base. Scales are sharded like the outputs."""
        specs = partition_specs(self.model.shapes, self.model.rules)
        (shapes, _), (specs, _) = self.parted(self.model.shapes), self.parted(specs)

        def held(path, leaf, spec):
            kept = jax.eval_shape(lambda x: self.hold(path, x, dtype), leaf)
            if not isinstance(kept, dict):
                return _sharded(kept, mesh, spec, path)
            layer, _, *outputs = spec
            scale = P(layer, None, *outputs)
            return {
                name: _sharded(shape, mesh, scale if name == "scale" else spec, path)
                for name, shape in kept.items()
            }

        return jax.tree_util.tree_map_with_path(held, shapes, specs)

    def holder(self, mesh: Mesh, dtype: Any) -> Callable[[tuple, jax.Array], Any]:
        """`hold` for a loader: jitted, called weight by weight, so that at most one weight is in
        memory as float32. The head is left unchanged."""
        target = self.held_target(mesh, dtype)

        def hold(path: tuple, leaf: jax.Array) -> Any:
            if self.replaces(path_of(path)):
                return leaf
            node = target
            for key in path:
                node = node[key.key]
            out = jax.tree.map(lambda shape: shape.sharding, node)
            return jax.jit(lambda x: self.hold(path, x, dtype), out_shardings=out)(leaf)

        return hold

    def merge(self, base: Any, params: Any) -> Any:
        """Merge the adapter into plain weights: kernel + scale A B in float32, plus the head.

        Args:
            base: the original float32 weights, never quantised; for a scorer, with any head.
            params: the adapter's parameters.
        """
        flat = by_path(params)

        def leaf(path, kernel):
            if self.replaces(path_of(path)):
                return flat[path_of(path)]
            a, b = (flat.get(path_of(path).replace("/kernel", f"/lora_{m}")) for m in "ab")
            return kernel if a is None else _add_product(kernel, a, b * self.scale)

        return jax.tree_util.tree_map_with_path(leaf, base)

    @property
    def target_modules(self) -> list[str] | str:
        """`target_modules` of adapter_config.json, with all-linear written out."""
        if self.config.target_modules != ALL_LINEAR:
            return self.config.target_modules
        return sorted(module_of(row).partition("{}.")[2] for row in self.targets)

    @property
    def head_modules(self) -> list[str]:
        """Names of the head's modules in peft."""
        prefix = self.model.architecture.prefix
        modules = (row.theirs.removeprefix(prefix).partition(".")[0] for row in self.head)
        return sorted(set(modules))


def adapter_of(config: LoraConfig, model: Model) -> Adapter:
    """The adapter described by `config`.

    Raises:
        ConfigError: a target module is not in the model, or only in some of its layers.
    """
    names = config.target_modules
    rows = _linear_layers(model)
    if names == ALL_LINEAR:
        return Adapter(config, model, tuple(rows), tuple(model.score_rows))
    kernels = by_path(model.shapes)

    def fits(module: str, name: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(name, module) is not None
        return module == name or module.endswith(f".{name}")

    wanted = [names] if isinstance(names, str) else names
    matches: dict[str, list[Row]] = {name: [] for name in wanted}
    for row in rows:
        modules = [module_of(row).format(i) for i in range(kernels[row.ours].shape[0])]
        for name in wanted:
            try:
                fitting = sum(fits(module, name) for module in modules)
            except re.error as error:
                raise ConfigError(f"lora.target_modules: {name!r}: {error}") from error
            if 0 < fitting < len(modules):
                raise ConfigError(
                    f"lora.target_modules: {name!r} matches {fitting} of {len(modules)} layers of "
                    f"{module_of(row)}; adapters on only some layers are not supported"
                )
            if fitting:
                matches[name].append(row)
    if missing := [name for name in wanted if not matches[name]] or (["[]"] if not wanted else []):
        available = sorted({module_of(row).rpartition(".")[2] for row in rows})
        raise ConfigError(
            f"lora.target_modules: {missing[0]!r} is no linear layer of this model's blocks; "
            f"choose from {', '.join(available)}"
        )
    targets = tuple(row for row in rows if any(row in match for match in matches.values()))
    return Adapter(config, model, targets, tuple(model.score_rows))


def of_record(record: Mapping[str, Any], model: Model) -> Adapter:
    """The adapter described by a checkpoint's `lora` record."""
    return adapter_of(LoraConfig(**record["config"]), model)


def to_record(adapter: Adapter, base: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """A checkpoint's record of its adapter and of the base weights."""
    config = json.loads(json.dumps(asdict(adapter.config)))  # plain JSON types
    return {"config": config, "base": {**base, "fingerprint": fingerprint}}


@jax.jit
def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return kernel + jnp.einsum("lir,lr...->li...", a, b, precision="highest")


def _linear_layers(model: Model) -> list[Row]:
    """Rows of the linear layers in the blocks; these are stacked."""
    return [row for row in model.rows if row.stacked and row.ours.endswith("/kernel")]


def module_of(row: Row) -> str:
    """Hugging Face's name of a linear layer, with {} for the block number."""
    return row.theirs.removesuffix(".weight")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Tree of leaves by path; inverse of `by_path`."""
    return unflatten_dict(dict(flat), sep="/")


def joined(one: Any, other: Any) -> Any:
    """Merge two trees that have no leaf in common."""
    if not isinstance(other, Mapping):
        return other
    return {**one, **{k: joined(one[k], v) if k in one else v for k, v in other.items()}}


def _is_adapter(tree: Any) -> bool:
    return any("/lora_" in path for path in by_path(tree))


def _is_spec(value: Any) -> bool:
    return isinstance(value, P)


def _sharded(shape: Any, mesh: Mesh, spec: P, path: tuple) -> Any:
    sharding = sharding_of(path_of(path), shape.shape, spec, mesh)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
