"""GPUs by their common names, to plan for without hardware.

Where JAX's CUDA plugin is installed, XLA compiles for them without a driver. Elsewhere `Absent`
stands for a device: enough for a mesh and for shapes."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from easyaira.distributed.chips import GB, GIB, chip_of, pod
from easyaira.errors import ConfigError


class Card(NamedTuple):
    """A GPU, by its maker's data sheet; `chips` has its memory and speed.

    Attributes:
        kind: name that JAX gives the device.
        capability: CUDA compute capability; None for AMD.
        processors: streaming multiprocessors.
        shared: KiB of shared memory of a multiprocessor; a block may use one less.
        threads: resident threads of a multiprocessor.
        cores: float32 units of a multiprocessor.
        clock: GHz.
        cache: MiB of L2 cache.
    """

    kind: str
    capability: tuple[int, int] | None = None
    processors: int = 0
    shared: int = 0
    threads: int = 0
    cores: int = 0
    clock: float = 0.0
    cache: int = 0


# Cards with all figures can be compiled for, also by Pallas, which makes the attention kernel.
CARDS = {
    "rtx3060": Card("NVIDIA GeForce RTX 3060", (8, 6)),
    "rtx4070": Card("NVIDIA GeForce RTX 4070", (8, 9)),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", (8, 6)),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 100, 1536, 128, 2.52, 72),
    "t4": Card("Tesla T4", (7, 5), 40, 64, 1024, 64, 1.59, 4),
    "l4": Card("NVIDIA L4", (8, 9), 58, 100, 1536, 128, 2.04, 48),
    "a10g": Card("NVIDIA A10G", (8, 6)),
    "v100": Card("Tesla V100-SXM2-16GB", (7, 0)),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", (8, 0), 108, 164, 2048, 64, 1.41, 40),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 164, 2048, 64, 1.41, 40),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 228, 2048, 128, 1.98, 50),
    "h200": Card("NVIDIA H200", (9, 0), 132, 228, 2048, 128, 1.98, 50),
    "mi300x": Card("AMD Instinct MI300X"),
}
UNNAMED = Card("GPU")  # only its memory is known
UNTIMED = (  # without a device no variant of a product can be timed
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_autotune_level=0",
)
DEVICELESS = "--xla_gpu_cudnn_deviceless_compilation_mode=CUDNN_DEVICELESS_COMPILATION_ALWAYS"


@dataclass(frozen=True)
class Absent:
    """Stands for a GPU that is not there and that nothing can be compiled for."""

    id: int
    device_kind: str
    compute_capability: str | None
    platform: str = "gpu"
    process_index: int = 0

    def memory_stats(self) -> None:
        """None: as devices that report nothing."""


def planned_devices(topology: str | None, memory: float | None) -> list[Any] | None:
    """Devices to plan for, which may not be there; None: those of this machine.

    Args:
        topology: GPUs (see `machine`) or a TPU pod (see `chips.pod`).
        memory: bytes of a device; without a topology, of one GPU of any kind.

    Raises:
        ConfigError: the topology is unknown.
    """
    if topology:
        return machine(topology) or pod(topology)
    return absent(UNNAMED) if memory else None


def machine(name: str) -> list[Any] | None:
    """GPUs to plan for: devices to compile for where possible, otherwise `Absent` ones.

    Args:
        name: a card, and how many of them: h100, or h100:8.

    Returns:
        None if the name is not of a known card.

    Raises:
        ConfigError: there is no such number of cards.
    """
    known, colon, number = name.partition(":")
    if known not in CARDS:
        return None
    if colon and not re.fullmatch(r"[1-9]\d{0,3}", number):
        raise ConfigError(f"topology: {name!r}: expected a number of cards, such as {known}:8")
    card, count = CARDS[known], int(number or 1)
    if _compiles() and card.processors:
        return _compiled_for(card, count)
    return absent(card, count)


def _compiles() -> bool:
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def prepare_compiler() -> None:
    """Leave local accelerators alone, and set XLA's flags to compile for GPUs that are not there.
    Call it before JAX looks for devices: XLA reads its flags then."""
    jax.config.update("jax_platforms", "cpu")
    if not _compiles():
        return
    flags = [os.environ.get("XLA_FLAGS", ""), *UNTIMED]
    if jax.version.__version_info__ >= (0, 11):  # unknown before
        flags.append(DEVICELESS)
    os.environ["XLA_FLAGS"] = " ".join(flags)


def absent(card: Card, count: int = 1) -> list[Any]:
    capability = card.capability and ".".join(map(str, card.capability))
    return [Absent(i, card.kind, capability) for i in range(count)]


def _compiled_for(card: Card, count: int) -> list[Any]:
    """Devices that XLA compiles for without a driver."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_target(card), topology=f"1x1x{count}"
    )
    return list(topology.devices)


def _target(card: Card) -> str:
    """XLA's GpuTargetConfigProto of a card, as text."""
    assert card.capability is not None
    chip = chip_of(card.kind)
    assert chip is not None
    major, minor = card.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": card.shared * 1024,
        "shared_memory_per_block_optin": (card.shared - 1) * 1024,
        "threads_per_core_limit": card.threads,
        "core_count": card.processors,
        "fpus_per_core": card.cores,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.memory_bandwidth),
        "l2_cache_size": card.cache * 2**20,
        "clock_rate_ghz": card.clock,
        "device_memory_size": int(chip.memory / GB * GIB),
        "device_address_bits": 64,
    }
    words = " ".join(f"{name}: {value}" for name, value in fields.items())
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
    return f"""gpu_device_info {{ {words}
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  device_vendor: "NVIDIA Corporation" name: "{card.kind}" driver_version: "13.0.0"
  runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{card.kind}\""""
