"""Devices as a mesh of three axes, and where every array lies on it.

`dp` copies the weights and divides the data; `fsdp` divides both; `tp` divides every matrix
product, and between products the tokens of a row. Models carry no mesh: their partition rules are a
table of (path pattern, PartitionSpec), and inside a traced function `constrain` speaks of axis
names only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.errors import ConfigError, WeightsError

AXES = ("dp", "fsdp", "tp")
BATCH_AXES = ("dp", "fsdp")  # the axes that divide examples
ALIASES = {"mp": "tp"}  # EasyLM's name

Rules = Sequence[tuple[str, P]]


def parse_mesh(
    text: str, device_count: int, option: str = "mesh", what: str = "devices"
) -> dict[str, int]:
    """The size of each axis.

    Args:
        text: named axes in any order, `dp=1,fsdp=-1` (`:` for `=`, `mp` for `tp`, axes left out
            have size 1), or three sizes in EasyLM's order dp, fsdp, tp, such as `1,-1,1`. One size
            may be -1, which stands for the rest.
        device_count: how many devices there are.
        option, what: the option's name, and what it counts, for messages.

    Raises:
        ConfigError: the text is neither form, or the sizes do not use every device.
    """
    sizes = dict.fromkeys(AXES, 1)
    parts = text.replace(" ", "").split(",")
    if all(re.fullmatch(r"-?\d+", part) for part in parts) and len(parts) == len(AXES):
        sizes = dict(zip(AXES, map(int, parts), strict=True))
    else:
        named = [re.fullmatch(r"(\w+)[=:](-?\d+)", part) for part in parts]
        if not all(named):
            raise ConfigError(f"{option}: cannot read {text!r}; write dp=1,fsdp=-1,tp=1 or 1,-1,1")
        axes = [ALIASES.get(match[1], match[1]) for match in named]
        if len(set(axes)) < len(axes) or not set(axes) <= set(AXES):
            raise ConfigError(
                f"{option}: {text!r} must name each of {', '.join(AXES)} at most once"
            )
        sizes |= {axis: int(match[2]) for axis, match in zip(axes, named, strict=True)}
    fixed = 1
    for size in sizes.values():
        if size < 1 and size != -1:
            raise ConfigError(
                f"{option}: {text!r} has an axis of size {size}; use 1 or more, or -1"
            )
        fixed *= max(size, 1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"{option}: {text!r} has more than one -1; only one can be the rest")
    if rest and device_count % fixed == 0:
        sizes[rest[0]] = device_count // fixed
    elif rest or fixed != device_count:
        raise ConfigError(
            f"{option}: {text!r} asks for {'a multiple of ' if rest else ''}{fixed} {what}, and "
            f"there are {device_count}, which must all be used; fsdp=-1 always fits"
        )
    return sizes


def make_mesh(
    text: str, devices: Sequence[jax.Device] | None = None, dcn: str | None = None
) -> Mesh:
    """Devices, arranged so that those near each other share an axis; the axes are left to the
    compiler (Auto).

    Args:
        text: see `parse_mesh`.
        devices: default: all there are.
        dcn: how often each axis is cut over the network between TPU slices, or else between hosts,
            `dp=2`.

    Raises:
        ConfigError: see `parse_mesh`; sizes in `dcn` that do not fit those in `text`, or a tp that
            reaches over a slow network.
    """
    devices = all_devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    shape = [sizes[axis] for axis in AXES]
    if dcn is not None:
        arranged = _over_network(dcn, sizes, devices)
    elif (
        devices[0].platform == "tpu" and (slices := len({_near(device) for device in devices})) > 1
    ):
        raise ConfigError(
            f"dcn: is not set, and there are {slices} TPU slices; say which axis goes over the "
            f"network between them, such as dp={slices}"
        )
    else:
        # not jax.make_mesh, which refuses GPUs of several hosts
        arranged = mesh_utils.create_device_mesh(
            shape, _in_order(devices), allow_split_physical_axes=True
        )
    _check_tp(arranged)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _over_network(dcn: str, sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of each slice or host as a block of the mesh."""
    by_process = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    if by_process and devices[0].platform == "tpu":
        raise ConfigError("dcn: is for several TPU slices, and there is one; leave it out")
    attribute, what = ("process_index", "hosts") if by_process else ("slice_index", "slices")
    blocks = Counter(getattr(device, attribute) for device in devices)
    outer = parse_mesh(dcn, len(blocks), "dcn", what)
    if outer["tp"] > 1:
        raise ConfigError(f"dcn: {dcn!r} has tp over the slow network; use dp or fsdp")
    if len(set(blocks.values())) > 1:
        raise ConfigError(f"dcn: {what} have unlike numbers of devices: {sorted(blocks.values())}")
    for axis, size in outer.items():
        if sizes[axis] % size:
            raise ConfigError(
                f"dcn: {axis}={size} does not divide {axis}={sizes[axis]} of mesh, which counts "
                f"the devices of all {what}"
            )
    return mesh_utils.create_hybrid_device_mesh(
        [sizes[axis] // outer[axis] for axis in AXES],
        [outer[axis] for axis in AXES],
        _in_order(devices),
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def _near(device: jax.Device) -> int:
    """Which devices have a fast network between them: those of a slice (a TPU's, or what GPUs with
    NVLink between them are called), or else of a process."""
    one = 0 if device.platform == "tpu" else device.process_index
    return getattr(device, "slice_index", one)


def _in_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Neighbours side by side; how TPUs lie is known by their coordinates."""
    if devices[0].platform == "tpu":
        return list(devices)
    return sorted(devices, key=lambda device: (_near(device), device.process_index, device.id))


def _check_tp(arranged: np.ndarray) -> None:
    """Refuse products that are divided over a slow network."""
    for group in arranged.reshape(-1, arranged.shape[-1]):
        if len({_near(device) for device in group}) > 1:
            each = math.gcd(*Counter(_near(device) for device in arranged.flat).values())
            fit = [size for size in range(1, each + 1) if each % size == 0]
            raise ConfigError(
                f"mesh: tp={len(group)} would reach over hosts, of which each has {each} devices; "
                f"use one of {', '.join(f'tp={size}' for size in fit)}"
            )


def all_devices() -> list[jax.Device]:
    return jax.devices()


def data_shards(mesh: Mesh) -> int:
    """In how many parts a batch is divided."""
    return mesh.shape["dp"] * mesh.shape["fsdp"]


def local_shards(mesh: Mesh) -> list[int]:
    """Of those parts, the ones that devices of this process hold."""
    devices = mesh.devices.reshape(data_shards(mesh), -1)
    here = jax.process_index()
    return [i for i, shard in enumerate(devices) if any(d.process_index == here for d in shard)]


def path_of(key_path: tuple[Any, ...]) -> str:
    """A leaf's place in a tree as text, such as `layers/mlp/up_proj/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths; a PartitionSpec is a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, P))
    return {path_of(path): leaf for path, leaf in leaves}


def partition_specs(tree: Any, rules: Rules) -> Any:
    """The PartitionSpec of every leaf: the first rule whose pattern is found in its path.

    A spec shorter than its leaf's rank speaks of the last axes: parameters of scanned layers carry
    the layer in front, which is never divided.

    Raises:
        WeightsError: a leaf has no rule, or a rule has no leaf.
    """
    unused = {pattern for pattern, _ in rules}
    homeless = []

    def spec(key_path, leaf):
        for pattern, spec in rules:
            if re.search(pattern, path_of(key_path)):
                unused.discard(pattern)
                return P(*(None,) * (leaf.ndim - len(spec)), *spec)
        homeless.append(path_of(key_path))
        return P()

    specs = jax.tree_util.tree_map_with_path(spec, tree)
    if homeless or unused:
        raise WeightsError(
            f"partition rules: parameters without a rule: {homeless}; rules without a parameter: "
            f"{sorted(unused)}. Mend PARTITION_RULES at the end of the model's file"
        )
    return specs


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf.

    Raises:
        ConfigError: see `sharding_of`.
    """
    specs = partition_specs(tree, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, spec: sharding_of(path_of(path), leaf.shape, spec, mesh), tree, specs
    )


def sharding_of(name: str, shape: Sequence[int], spec: P, mesh: Mesh) -> NamedSharding:
    """The NamedSharding of a parameter.

    Raises:
        ConfigError: a mesh axis does not divide the axis of the parameter that it is to cut.
    """
    for size, axes in zip(shape, spec, strict=True):
        if size % (parts := _parts(mesh, axes)):
            raise ConfigError(
                f"mesh: {name} has shape {tuple(shape)}, and {axes}={parts} does not divide "
                f"{size}; choose a size that does"
            )
    return NamedSharding(mesh, spec)


def like(tree: Any, specs: Any) -> Any:
    """`tree`'s shapes and dtypes with `specs`' shardings: what a loader is to fill."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        specs,
    )


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Advise the compiler how `x` is divided, one entry per axis of it.

    Without a mesh there is nothing to say, and an axis that the mesh does not divide (three prompts
    on eight devices) is left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _possible(mesh, x, axes))


def by_device(f: Callable[..., jax.Array], axes: Sequence[Sequence[Any]]) -> Callable:
    """`f` computed by each device for its part of the arguments: for kernels, which the compiler
    does not divide. `axes` are of each argument, as in `constrain`; the result's are those of the
    first."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f

    def divided(*arrays: jax.Array) -> jax.Array:
        specs = tuple(_possible(mesh, *of) for of in zip(arrays, axes, strict=True))
        return jax.shard_map(f, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return divided


def _possible(mesh: Any, x: jax.Array, axes: Sequence[Any]) -> P:
    """The axes, but for those that the mesh does not divide."""
    sizes = zip(x.shape, axes, strict=True)
    return P(*(entry if size % _parts(mesh, entry) == 0 else None for size, entry in sizes))


def parts_of(size: int, axes: Any) -> int:
    """Into how many parts these mesh axes cut an axis of this size; 1 where they cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else _parts(mesh, axes)
    return parts if size % parts == 0 else 1


def _parts(mesh: Any, entry: Any) -> int:
    """Into how many parts an entry of a PartitionSpec cuts an axis."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)
