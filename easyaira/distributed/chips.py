"""Accelerators: what their makers say of them, and pods of them that are not there.

A run needs no entry here; one lets `mfu` be logged, and `--dry_run` say how long a step may take
and whether it fits.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from easyaira.errors import ConfigError

GB, GIB = 1e9, 2**30


class Chip(NamedTuple):
    """One device, as JAX counts them.

    Attributes:
        flops: bfloat16 operations per second, dense.
        memory: bytes that programs may use.
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second to other chips, one way, over all of its links.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# By the beginning of `device_kind`; the first that fits. TPUs: docs.cloud.google.com/tpu/docs, the
# page of each version; the links of v3: Jouppi et al. (2020), A Domain-Specific Supercomputer for
# Training Deep Neural Networks, table 3. GPUs: NVIDIA's data sheets of the SXM forms, without
# sparsity, whose figures for NVLink count both ways. Memory of TPUs is what libtpu 0.0.42 says when
# a program asks for more: a little less than is sold.
CHIPS = {
    "TPU v3": Chip(61.5e12, 15.48 * GIB, 450 * GB, 164 * GB),  # a core, of which a chip has two
    "TPU v4": Chip(275e12, 30.75 * GIB, 1228 * GB, 300 * GB),
    "TPU v5e": Chip(197e12, 15.75 * GIB, 819 * GB, 200 * GB),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2765 * GB, 600 * GB),  # v5p, with or without its p
    "TPU v6e": Chip(918e12, 31.25 * GIB, 1640 * GB, 448 * GB),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GB, 2039 * GB, 300 * GB),
    "NVIDIA A100 80GB": Chip(312e12, 80 * GB, 1935 * GB, 300 * GB),
    "NVIDIA A100": Chip(312e12, 40 * GB, 1555 * GB, 300 * GB),
    "NVIDIA H100": Chip(989e12, 80 * GB, 3350 * GB, 450 * GB),
    "NVIDIA H200": Chip(989e12, 141 * GB, 4800 * GB, 450 * GB),
}


def chip_of(device_kind: str) -> Chip | None:
    """What is known of a device; None for a kind that is not in the table."""
    name = device_kind.replace(" lite", "e")  # TPU v5 lite is sold as v5e
    return next((chip for kind, chip in CHIPS.items() if name.startswith(kind)), None)


def memory_of(device: Any) -> float | None:
    """Bytes that a program may use: as the device itself says, or else the table."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # of a device that is not there, or that does not say
        limit = None
    chip = chip_of(device.device_kind)
    return limit or (chip and chip.memory)


TOPOLOGIES = {"v3": 2, "v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # sides of a pod
KNOWN = "v3:8x16, v4:4x4x2, v5e:8x8, v5p:4x4x2 or v6e:8x8 (chips on each side)"

QUIET = {  # libtpu asks a cloud machine's metadata for what no other machine can tell it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two compilations do not disturb each other
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "1",  # warnings: of what the compiler could not do well
    "TPU_MIN_LOG_LEVEL": "1",
}


def pod(name: str) -> list[Any]:
    """The devices of a TPU pod that is not there: programs can be compiled for them, and not run.

    Args:
        name: the kind of chip and how many there are on each side, such as v5p:4x4x2.

    Raises:
        ConfigError: an unknown pod, or the TPU's compiler is not installed.
    """
    found = re.fullmatch(r"(v\w+):(\d+(?:x\d+){1,2})", name)
    if not found or TOPOLOGIES.get(found[1], 0) != found[2].count("x") + 1:
        raise ConfigError(f"topology: {name!r} is not known; write such as {KNOWN}")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)

    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # whatever is here has nothing to do
    sides = tuple(map(int, found[2].split("x")))
    options: dict[str, Any] = {}
    if found[1] == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX sees them on a TPU VM
    if math.prod(sides) < 4:  # less than a host
        options["chips_per_host_bounds"] = (*sides, 1)[:3]
    try:
        pod = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:  # of which JAX's own errors are a kind
        if "not installed" in str(error):
            raise ConfigError(
                'topology: compiling for TPUs needs libtpu, on any machine; pip install "jax[tpu]"'
            ) from error
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology: there is no pod {name} ({reason}); try {KNOWN}") from error
    return list(pod.devices)
