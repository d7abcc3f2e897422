"""Accelerators: published specs, and TPU topologies to compile for without hardware.

An entry is optional. With one, a run logs `mfu`, and `--dry_run` estimates the step time and
whether the step fits.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from easyaira.errors import ConfigError

GB, GIB = 1e9, 2**30


class Chip(NamedTuple):
    """Specs of one JAX device.

    Attributes:
        flops: dense bfloat16 operations per second.
        memory: bytes available to programs.
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second to other chips, one way, over all links of the chip.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# Keyed by a prefix of `device_kind`; the first match wins. TPUs: docs.cloud.google.com/tpu/docs,
# the page of each version. Links of v3: Jouppi et al. (2020), A Domain-Specific Supercomputer for
# Training Deep Neural Networks, table 3. GPUs: NVIDIA's data sheets of the SXM versions, without
# sparsity; their NVLink figures count both ways. TPU memory is the limit that libtpu 0.0.42 reports
# when a program asks for more; it is slightly less than the advertised size.
CHIPS = {
    "TPU v3": Chip(61.5e12, 15.48 * GIB, 450 * GB, 164 * GB),  # one core; a chip has two
    "TPU v4": Chip(275e12, 30.75 * GIB, 1228 * GB, 300 * GB),
    "TPU v5e": Chip(197e12, 15.75 * GIB, 819 * GB, 200 * GB),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2765 * GB, 600 * GB),  # v5p; some versions report it as v5
    "TPU v6e": Chip(918e12, 31.25 * GIB, 1640 * GB, 448 * GB),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GB, 2039 * GB, 300 * GB),
    "NVIDIA A100 80GB": Chip(312e12, 80 * GB, 1935 * GB, 300 * GB),
    "NVIDIA A100": Chip(312e12, 40 * GB, 1555 * GB, 300 * GB),
    "NVIDIA H100": Chip(989e12, 80 * GB, 3350 * GB, 450 * GB),
    "NVIDIA H200": Chip(989e12, 141 * GB, 4800 * GB, 450 * GB),
    "AMD Instinct MI300X": Chip(1307e12, 192 * GB, 5300 * GB, 448 * GB),
}
# Cards whose names are prefixes of others (RTX 3060 Ti): matched exactly. Speeds are of bfloat16
# with float32 sums, without sparsity, from the white papers of Turing, GA102 and AD102 and the data
# sheets of T4, V100, A10G and L4; T4 and V100 lack bfloat16, so theirs are of float32. Links are
# PCIe, and NVLink for V100. Memory is sold in GiB; programs get as many GB, 7 % less. Error
# correction takes 1 to 1.5 GiB of T4, L4 and A10G.
CARD_CHIPS = {
    "NVIDIA GeForce RTX 3060": Chip(25.5e12, 12 * GB, 360 * GB, 32 * GB),
    "NVIDIA GeForce RTX 4070": Chip(58.3e12, 12 * GB, 504 * GB, 32 * GB),
    "NVIDIA GeForce RTX 3090": Chip(71e12, 24 * GB, 936 * GB, 32 * GB),
    "NVIDIA GeForce RTX 4090": Chip(165.2e12, 24 * GB, 1008 * GB, 32 * GB),
    "Tesla T4": Chip(8.1e12, 15 * GB, 320 * GB, 16 * GB),
    "NVIDIA L4": Chip(121e12, 22.5 * GB, 300 * GB, 32 * GB),
    "NVIDIA A10G": Chip(70e12, 22.5 * GB, 600 * GB, 32 * GB),
    "Tesla V100-SXM2-16GB": Chip(15.7e12, 16 * GB, 900 * GB, 150 * GB),
}


def chip_of(device_kind: str) -> Chip | None:
    """Specs of a device kind, or None if the table lacks it."""
    name = device_kind.replace(" lite", "e")  # TPU v5 lite is sold as v5e
    if name in CARD_CHIPS:
        return CARD_CHIPS[name]
    return next((chip for kind, chip in CHIPS.items() if name.startswith(kind)), None)


def memory_of(device: Any) -> float | None:
    """Bytes available to a program: the device's own figure, or else the table's."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # the device is absent or reports no statistics
        limit = None
    chip = chip_of(device.device_kind)
    return limit or (chip and chip.memory)


TOPOLOGIES = {"v3": 2, "v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of a pod
KNOWN = "v3:8x16, v4:4x4x2, v5e:8x8, v5p:4x4x2 or v6e:8x8 (chips on each side)"

QUIET = {  # without these, libtpu queries the metadata server of a cloud TPU machine
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # concurrent compilations are safe
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "1",  # warnings, including the compiler's on poor sharding
    "TPU_MIN_LOG_LEVEL": "1",
}


BILLED = {"v3": 2, "v4": 2, "v5p": 2, "v5e": 1, "v5litepod": 1, "v6e": 1}  # in names: cores a chip


def sides_of(name: str) -> str:
    """The topology of an accelerator type: v5p-64 counts cores, two per chip, and is v5p:4x4x2.
    Other names are returned as they are."""
    match = re.fullmatch(r"(v\w+)-(\d+)", name)
    if not match or match[1] not in BILLED:
        return name
    kind = match[1].replace("litepod", "e")
    chips, rest = divmod(int(match[2]), BILLED[match[1]])
    if rest or chips < 1 or chips & (chips - 1):
        return name
    dimensions, power = TOPOLOGIES[kind], chips.bit_length() - 1
    powers = [(power + i) // dimensions for i in range(dimensions)]
    if dimensions == 3:
        powers.reverse()  # 4x4x2; in two dimensions 4x8
    return f"{kind}:{'x'.join(str(1 << p) for p in powers)}"


def pod(name: str) -> list[Any]:
    """Devices of a TPU pod, without hardware: for compiling programs, not for running them.

    Args:
        name: chip kind and number of chips on each side, such as v5p:4x4x2, or accelerator type,
            such as v5p-64.

    Raises:
        ConfigError: the pod is unknown, or libtpu (the TPU compiler) is not installed.
    """
    name = sides_of(name)
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+){1,2})", name)
    if not match or TOPOLOGIES.get(match[1], 0) != match[2].count("x") + 1:
        raise ConfigError(
            f"topology: {name!r} is not known; use for example {KNOWN}, a type such as v5p-64, or "
            "GPUs such as rtx3060 or h100:8 (docs/gpus.md)"
        )
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)

    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # leave local accelerators alone
    sides = tuple(map(int, match[2].split("x")))
    options: dict[str, Any] = {}
    if match[1] == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as JAX reports on a TPU VM
    if math.prod(sides) < 4:  # smaller than one host
        options["chips_per_host_bounds"] = (*sides, 1)[:3]
    try:
        pod = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:  # the base class of JAX's runtime errors
        if "not installed" in str(error):
            raise ConfigError(
                'topology: compiling for TPUs needs libtpu (on any machine); pip install "jax[tpu]"'
            ) from error
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology: no such pod: {name} ({reason}); try {KNOWN}") from error
    return list(pod.devices)
