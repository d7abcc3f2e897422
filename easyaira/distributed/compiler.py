"""Options of XLA's compiler by platform, and everything else that decides its machine code."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

IN_ORDER = "xla_cpu_enable_concurrency_optimized_scheduler"
CPU_INFO = Path("/proc/cpuinfo")  # Linux
REPRODUCIBLE = {
    # cuDNN adds the gradients of queries by atomics unless it is asked for the same bits. A
    # training step has no other operation that this option changes, see tests/test_gpu.py.
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": True},
}
QUICK = {
    # For programs of many shapes: no compiled variants of each product to time against cuBLAS.
    # Variants make updates of GPT-2 124M 5 % faster, but compilation a third longer.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}
ADAPTERS = {  # steps of adapters, whose thin products have many variants to compile: the first
    # update of GPT-2 124M with rank 8 took 86 instead of 1,610 CPU seconds on an H200.
    "gpu": REPRODUCIBLE["gpu"] | QUICK["gpu"],
}
UNTIMED = {  # for programs that run once: no timing of cuBLAS's algorithms, either
    "gpu": QUICK["gpu"] | {"xla_gpu_autotune_level": 0},
}


def keep_order() -> None:
    """Start a CPU's collectives in the same order on all devices. Call it before JAX looks for
    devices: XLA reads its flags then.

    XLA's concurrency-optimised CPU scheduler can start them in a different order on each device and
    deadlock, on several hosts and on several devices of a process. It is not faster: GPT-2 small
    trains in the same time without it, in 8 % less memory.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if IN_ORDER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{IN_ORDER}=false".lstrip()


def compiled_for(backend: str) -> list[str]:
    """XLA's flags and, on CPUs, this CPU's instructions. A program compiled for others may round
    differently."""
    flags = [os.environ.get("XLA_FLAGS", "")]
    return [*flags, instructions()] if backend == "cpu" else flags


def instructions() -> str:
    """Names of this CPU's instructions."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    line = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return line[1] if line else platform.processor()


@cache
def lacks_16_bit_products() -> bool:
    """True on an x86 CPU without AMX: XLA multiplies bfloat16 at half the speed of float32 there,
    even with the bfloat16 instructions of AVX-512."""
    names = set(instructions().split())
    return "avx2" in names and "amx_bf16" not in names
