"""Adapters (LoRA) as a parameter tree of their own, beside a base that stays as it is.

The adapter of a linear layer is `lora_a` [L, in, r] and `lora_b` [L, r, out], stacked over layers
as the kernel [L, in, out] is; `out` has two axes where the kernel's has (GPT-2's q, k, v). The
tuned model is `model.apply` of the base with these beside its kernels (`Adapter.on`), the original
is `model.apply` of the base. In a run, only the adapter has gradients, optimizer state and
checkpoints; the base is an argument of the step and is held in few bits (`Adapter.hold`).

A scorer's head is trained whole, as peft trains it. Its parameters are the adapter's, under their
own paths, and no part of the base.

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


@dataclass(frozen=True)
class Adapter:
    """Which linear layers of a model have an adapter, and of what kind. Holds no weights.

    Attributes:
        targets: the rows of the weight table whose kernels are adapted.
        head: the rows of a scorer's head, which is trained whole; a language model has none.
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
        """PartitionSpecs, from the kernels' own: `lora_a` is divided as the kernel's inputs are,
        `lora_b` as its outputs are, and the rank never. The head is divided as it always is."""
        kernels = by_path(partition_specs(self.model.shapes, self.model.rules))

        def spec(path, leaf):
            folder, _, name = path_of(path).rpartition("/")
            if self.replaces(path_of(path)):
                return kernels[path_of(path)]
            layer, inputs, *outputs = kernels[f"{folder}/kernel"]
            return P(layer, inputs, None) if name == "lora_a" else P(layer, None, *outputs)

        return jax.tree_util.tree_map_with_path(spec, self.shapes)

    def target(self, mesh: Mesh) -> Any:
        """Shapes and shardings of the parameters on a mesh."""
        shardings = jax.tree.map(partial(NamedSharding, mesh), self.specs(), is_leaf=_is_spec)
        return like(self.shapes, shardings)

    def init(self, key: jax.Array, head: Any = None) -> Any:
        """A uniform in +-1/sqrt(in), as peft's Kaiming draw with a = sqrt(5) is; B zero; the head
        as it is given (`parted`)."""
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
        """The adapter as the model takes it: with its scale in `lora_b`, and its dropout."""

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
        """The tree of the tuned model: the base, by reference, with the adapter beside it."""
        return joined(base, self.applied(params))

    def over_base(self, loss_fn: Callable) -> Callable:
        """An algorithm's loss function of all weights as one of the adapter's, with the base among
        the frozen ones. This is all that training adapters changes of a step."""

        def of_adapter(params: Any, frozen: Frozen, batch: Any, key: Any) -> Any:
            others = frozen.of_algorithm
            if _is_adapter(others):
                others = joined(frozen.base, others)
            return loss_fn(self.on(frozen.base, params), others, batch, key)

        return of_adapter

    def frozen(self, base: Any, of_algorithm: Any) -> Frozen:
        """What `over_base` takes as frozen. Of weights that are the base with an adapter (a DPO
        reference), only the adapter is kept."""
        flat = {path: leaf for path, leaf in by_path(of_algorithm).items() if "/lora_" in path}
        return Frozen(base, nested(flat) if flat else of_algorithm)

    # the base, as it is held

    def replaces(self, path: str) -> bool:
        """Whether this weight of the model is of the head."""
        return any(row.ours == path for row in self.head)

    def parted(self, tree: Any) -> tuple[Any, Any]:
        """A tree of all of the model's weights as what adapters stand on, and the head."""
        base, head = {}, {}
        for path, leaf in by_path(tree).items():
            (head if self.replaces(path) else base)[path] = leaf
        return nested(base), nested(head)

    def hold(self, path: tuple, leaf: jax.Array, dtype: Any) -> Any:
        """A float32 weight of the base in as few bits as the run asked for.

        Linear layers of the blocks are quantised where that is asked for. They and embeddings are
        otherwise held in the computing dtype, to which they would be cast anyway where they are
        used: no number changes by that, and a frozen weight needs no float32 copy. Norms and
        biases are small, and stay float32.
        """
        name = path_of(path)
        if self.config.quantize and name in self._quantized:
            return quantize(leaf, self.config.quantize, axis=1)
        return leaf.astype(dtype) if name.endswith(("kernel", "embedding")) else leaf

    @cached_property
    def _quantized(self) -> set[str]:
        return {row.ours for row in _linear_layers(self.model)}

    def held_target(self, mesh: Mesh, dtype: Any) -> Any:
        """Shapes and shardings of the base as it is held. Scales are divided as the outputs are."""
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
        """`hold` as a loader calls it, weight by weight, so that no more than one of them is there
        in float32. The head is not held, and stays as it is."""
        target = self.held_target(mesh, dtype)

        def hold(path: tuple, leaf: jax.Array) -> Any:
            if self.replaces(path_of(path)):
                return leaf
            wanted = target
            for key in path:
                wanted = wanted[key.key]
            out = jax.tree.map(lambda shape: shape.sharding, wanted)
            return jax.jit(lambda x: self.hold(path, x, dtype), out_shardings=out)(leaf)

        return hold

    def merge(self, base: Any, params: Any) -> Any:
        """The tuned model as weights alone: kernel + scale A B, in float32, and the trained head.

        Args:
            base: float32 weights, as they are stored, not as they were held. Of a scorer, with any
                head.
        """
        flat = by_path(params)

        def leaf(path, kernel):
            if self.replaces(path_of(path)):
                return flat[path_of(path)]
            a, b = (flat.get(path_of(path).replace("/kernel", f"/lora_{m}")) for m in "ab")
            return kernel if a is None else _add_product(kernel, a, b * self.scale)

        return jax.tree_util.tree_map_with_path(leaf, base)

    @property
    def head_modules(self) -> list[str]:
        """peft's names of the modules that make up the head."""
        prefix = self.model.architecture.prefix
        modules = (row.theirs.removeprefix(prefix).partition(".")[0] for row in self.head)
        return sorted(set(modules))


def adapter_of(config: LoraConfig, model: Model) -> Adapter:
    """The adapter that `config` asks for.

    Raises:
        ConfigError: a target that the model does not have, or has in some of its layers only.
    """
    names = config.target_modules
    rows = _linear_layers(model)
    kernels = by_path(model.shapes)

    def fits(module: str, name: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(name, module) is not None
        return module == name or module.endswith(f".{name}")

    wanted = [names] if isinstance(names, str) else names
    found: dict[str, list[Row]] = {name: [] for name in wanted}
    for row in rows:
        modules = [module_of(row).format(i) for i in range(kernels[row.ours].shape[0])]
        for name in wanted:
            try:
                fitting = sum(fits(module, name) for module in modules)
            except re.error as error:
                raise ConfigError(f"lora.target_modules: {name!r}: {error}") from error
            if 0 < fitting < len(modules):
                raise ConfigError(
                    f"lora.target_modules: {name!r} fits {fitting} of {len(modules)} layers of "
                    f"{module_of(row)}; adapters on some of the layers are not built"
                )
            if fitting:
                found[name].append(row)
    if missing := [name for name in wanted if not found[name]] or (["[]"] if not wanted else []):
        there = sorted({module_of(row).rpartition(".")[2] for row in rows})
        raise ConfigError(
            f"lora.target_modules: {missing[0]!r} is no linear layer of this model's blocks; "
            f"there are {', '.join(there)}"
        )
    targets = tuple(row for row in rows if any(row in some for some in found.values()))
    return Adapter(config, model, targets, tuple(model.score_rows))


def of_record(record: Mapping[str, Any], model: Model) -> Adapter:
    """The adapter that a checkpoint's `lora` speaks of."""
    return adapter_of(LoraConfig(**record["config"]), model)


def to_record(adapter: Adapter, base: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says of its adapter, and of the weights that it stands on."""
    config = json.loads(json.dumps(asdict(adapter.config)))  # plain numbers
    return {"config": config, "base": {**base, "fingerprint": fingerprint}}


@jax.jit
def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return kernel + jnp.einsum("lir,lr...->li...", a, b, precision="highest")


def _linear_layers(model: Model) -> list[Row]:
    """The rows of linear layers in the blocks, which are stacked."""
    return [row for row in model.rows if row.stacked and row.ours.endswith("/kernel")]


def module_of(row: Row) -> str:
    """Hugging Face's name of a linear layer, with {} for the number of its block."""
    return row.theirs.removesuffix(".weight")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = leaf
    return tree


def joined(one: Any, other: Any) -> Any:
    """Both trees in one; no leaf is in both."""
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
