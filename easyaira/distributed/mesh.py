"""Devices as a mesh of three axes.

`dp` copies the weights and divides the data; `fsdp` divides both; `tp` divides every matrix
product, and between products the tokens of a row."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from easyaira.errors import ConfigError

AXES = ("dp", "fsdp", "tp")
BATCH_AXES = ("dp", "fsdp")  # the axes that divide examples
ALIASES = {"mp": "tp"}  # EasyLM's name


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
