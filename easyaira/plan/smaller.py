"""Options that make a run fit in less memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from easyaira.config.model import LoraConfig
from easyaira.config.run import RunConfig
from easyaira.distributed.cards import Absent
from easyaira.errors import EasyAiraError
from easyaira.plan import cost
from easyaira.train.algorithm import Algorithm
from easyaira.train.setup import Setup, prepare

Changes = dict[str, Any]  # section: another one, or a dictionary of its options

SHORTEST = 256  # data.max_length that is still worth proposing
ACCUMULATION = "gradient_accumulation_steps"


def smaller(setup: Setup, algorithm: Algorithm, room: float) -> Iterator[str]:
    """Lines with options, each added to those before it, and the memory that is then needed,
    counted for GPUs of the same kind; the last one fits, if any does.

    Args:
        room: bytes of a device.
    """
    kind = setup.mesh.devices.flat[0]
    capability = getattr(kind, "compute_capability", None)
    devices = [Absent(i, kind.device_kind, capability) for i in range(setup.mesh.size)]
    together = cost.together_of(setup, algorithm)
    parts = setup.config.train_batch_size // setup.batches.shards // together
    length = setup.config.data.max_length or setup.model.config.max_positions
    config, least = setup.config, math.inf
    for flags, changes in steps(setup.config, parts, length):
        changed = _with(config, changes)
        if changed == config:
            continue
        try:
            needed = _needed(changed, algorithm, devices)
        except EasyAiraError as error:  # such as rows that a shorter max_length drops
            yield f"        {flags}: {error}"
            continue
        if needed >= least:  # micro-batches add a copy of the gradients
            continue
        config, least = changed, needed
        fits = ", which fits" if needed <= room else ""
        yield f"        {flags}: about {needed / 2**30:,.2f} GiB{fits}"
        if fits:
            return
    yield "        still not enough: use a smaller model, or more or larger devices"


def _needed(config: RunConfig, algorithm: Algorithm, devices: list[Absent]) -> float:
    setup = prepare(config, algorithm, devices, planned=True)
    return cost.measure(setup, algorithm).program.memory


def _with(config: RunConfig, changes: Changes) -> RunConfig:
    """The configuration with other values, by section; a section that is null stays so."""
    for section, values in changes.items():
        if isinstance(values, dict):
            part = getattr(config, section)
            values = part and replace(part, **values)
        config = replace(config, **{section: values})
    return config


def steps(config: RunConfig, parts: int, length: int) -> Iterator[tuple[str, Changes]]:
    """Changes of the options, from those that keep the result to those that do not.

    Args:
        parts: largest possible number of micro-batches.
        length: longest example.
    """
    accumulated = (f"+ --gradient_accumulation_steps {parts}", {ACCUMULATION: parts})
    yield "--model.gradient_checkpointing full", {"model": {"gradient_checkpointing": "full"}}
    yield accumulated
    if config.lora is None:
        adamw = "" if config.optimizer.name == "adamw" else "--optimizer.name adamw "
        optimizer = {"name": "adamw", "state_dtype": "8bit"}
        yield f"+ {adamw}--optimizer.state_dtype 8bit", {"optimizer": optimizer}
        if config.model.init == "pretrained":
            lora = LoraConfig(target_modules="all-linear", r=16, alpha=32)
            yield "+ --lora.target_modules all-linear --lora.r 16 --lora.alpha 32", {"lora": lora}
            yield accumulated
    if config.lora is None or config.lora.quantize is None:
        yield "+ --lora.quantize nf4", {"lora": {"quantize": "nf4"}}
    while (length := length // 2) >= SHORTEST:
        yield f"+ --data.max_length {length}", {"data": {"max_length": length}}
