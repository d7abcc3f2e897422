"""Devices as a mesh of three axes.

`dp` replicates the weights and shards the data. `fsdp` shards both. `tp` shards every matrix
product and, between products, the tokens of a row."""

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
BATCH_AXES = ("dp", "fsdp")  # the axes that shard examples
ALIASES = {"mp": "tp"}  # EasyLM's name


def parse_mesh(
    text: str, device_count: int, option: str = "mesh", what: str = "devices"
) -> dict[str, int]:
    """The size of each axis.

    Args:
        text: named axes in any order, such as `dp=1,fsdp=-1`, or three sizes in EasyLM's order dp,
            fsdp, tp, such as `1,-1,1`. Named axes may use `:` for `=` and `mp` for `tp`; omitted
            axes have size 1. One size may be -1: all remaining devices.
        device_count: number of devices.
        option, what: name of the option and of the things it counts, for messages.

    Raises:
        ConfigError: the text has neither form, or the sizes do not use every device.
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
        for i, axis in enumerate(axes):
            if axis not in AXES:
                raise ConfigError(f"{option}: no axis {axis!r}; choose from {', '.join(AXES)}")
            if axis in axes[:i]:
                raise ConfigError(f"{option}: {text!r} names {axis} twice; name it once")
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
        raise ConfigError(f"{option}: {text!r} has more than one -1; at most one is allowed")
    if rest and device_count % fixed == 0:
        sizes[rest[0]] = device_count // fixed
    elif rest or fixed != device_count:
        raise ConfigError(
            f"{option}: {text!r} asks for {'a multiple of ' if rest else ''}{fixed} {what}, but "
            f"there are {device_count} and all must be used; fsdp=-1 always fits"
        )
    return sizes


def make_mesh(
    text: str, devices: Sequence[jax.Device] | None = None, dcn: str | None = None
) -> Mesh:
    """Arrange devices as a mesh whose axes join near neighbours. All axes have type Auto.

    Args:
        text: see `parse_mesh`.
        devices: default: all devices.
        dcn: number of parts of each axis over the network between TPU slices, or else between
            hosts, such as `dp=2`.

    Raises:
        ConfigError: see `parse_mesh`; or the sizes in `dcn` do not fit those in `text`; or tp spans
            a slow network.
    """
    devices = all_devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    shape = [sizes[axis] for axis in AXES]
    if dcn is not None:
        arranged = _over_network(dcn, sizes, devices)
    elif (
        devices[0].platform == "tpu"
        and (slices := len({_fast_group(device) for device in devices})) > 1
    ):
        raise ConfigError(
            f"dcn: not set, but there are {slices} TPU slices; name the axis that spans "
            f"the network between them, such as dp={slices}"
        )
    else:
        # jax.make_mesh refuses GPUs of several hosts
        arranged = mesh_utils.create_device_mesh(
            shape, _in_order(devices), allow_split_physical_axes=True
        )
    _check_tp(arranged)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _over_network(dcn: str, sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange the devices so that each slice or host is a block of the mesh."""
    by_process = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    if by_process and devices[0].platform == "tpu":
        raise ConfigError("dcn: needs several TPU slices, but there is one; leave it out")
    attribute, what = ("process_index", "hosts") if by_process else ("slice_index", "slices")
    blocks = Counter(getattr(device, attribute) for device in devices)
    outer = parse_mesh(dcn, len(blocks), "dcn", what)
    if outer["tp"] > 1:
        raise ConfigError(f"dcn: {dcn!r} puts tp on the slow network; use dp or fsdp")
    if len(set(blocks.values())) > 1:
        raise ConfigError(f"dcn: {what} differ in number of devices: {sorted(blocks.values())}")
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


def _fast_group(device: jax.Device) -> int:
    """Group of a device: devices with equal values share a fast network.

    The group is the slice (of a TPU pod, or of GPUs joined by NVLink), or else the process."""
    one = 0 if device.platform == "tpu" else device.process_index
    return getattr(device, "slice_index", one)


def _in_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Sort neighbours side by side. TPUs keep their order: their coordinates place them."""
    if devices[0].platform == "tpu":
        return list(devices)
    return sorted(
        devices, key=lambda device: (_fast_group(device), device.process_index, device.id)
    )


def _check_tp(arranged: np.ndarray) -> None:
    """Refuse a tp axis that spans a slow network.

    Raises:
        ConfigError: it does.
    """
    for group in arranged.reshape(-1, arranged.shape[-1]):
        if len({_fast_group(device) for device in group}) > 1:
            each = math.gcd(*Counter(_fast_group(device) for device in arranged.flat).values())
            fit = [size for size in range(1, each + 1) if each % size == 0]
            raise ConfigError(
                f"mesh: tp={len(group)} would span hosts, and each host has {each} devices; "
                f"use one of {', '.join(f'tp={size}' for size in fit)}"
            )


def all_devices() -> list[jax.Device]:
    return jax.devices()


def data_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return mesh.shape["dp"] * mesh.shape["fsdp"]


def local_shards(mesh: Mesh) -> list[int]:
    """Indices of the batch shards on this process's devices."""
    devices = mesh.devices.reshape(data_shards(mesh), -1)
    here = jax.process_index()
    return [i for i, shard in enumerate(devices) if any(d.process_index == here for d in shard)]
