"""Options that make a run fit in less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from easyaira.config.model import LoraConfig
from easyaira.config.run import RunConfig
from easyaira.distributed.cards import Absent
from easyaira.errors import EasyAiraError
from easyaira.plan import cost
from easyaira.train.algorithm import Algorithm
from easyaira.train.setup import Setup, prepare

SHORTEST = 256  # data.max_length that is still worth proposing


def smaller(setup: Setup, algorithm: Algorithm, room: float) -> Iterator[str]:
    """Lines with options, each added to those before it, and the memory that they leave needed,
    counted for GPUs of the same kind; the last one fits, if any does.

    Args:
        room: bytes of a device.
    """
    kind = setup.mesh.devices.flat[0]
    capability = getattr(kind, "compute_capability", None)
    devices = [Absent(i, kind.device_kind, capability) for i in range(setup.mesh.size)]
    for flags, config in steps(setup, cost.together_of(setup, algorithm)):
        try:
            needed = _needed(config, algorithm, devices)
        except EasyAiraError as error:  # such as rows that a shorter max_length drops
            yield f"        {flags}: {error}"
            continue
        fits = ", which fits" if needed <= room else ""
        yield f"        {flags}: about {needed / 2**30:,.2f} GiB{fits}"
        if fits:
            return
    yield "        still not enough: use a smaller model, or more or larger devices"


def _needed(config: RunConfig, algorithm: Algorithm, devices: list[Absent]) -> float:
    setup = prepare(config, algorithm, devices, planned=True)
    return cost.measure(setup, algorithm).program.memory


def steps(setup: Setup, together: int) -> Iterator[tuple[str, RunConfig]]:
    """Changes of the options, from those that keep the result to those that do not.

    Args:
        together: see `cost.together_of`.
    """
    config = setup.config
    if config.model.gradient_checkpointing != "full":
        model = replace(config.model, gradient_checkpointing="full")
        config = replace(config, model=model)
        yield "--model.gradient_checkpointing full", config
    parts = config.train_batch_size // setup.batches.shards // together
    if config.gradient_accumulation_steps < parts:
        config = replace(config, gradient_accumulation_steps=parts)
        yield f"+ --gradient_accumulation_steps {parts}", config
    if config.lora is None and config.optimizer.state_dtype != "8bit":
        adamw = "" if config.optimizer.name == "adamw" else "--optimizer.name adamw "
        optimizer = replace(config.optimizer, name="adamw", state_dtype="8bit")
        config = replace(config, optimizer=optimizer)
        yield f"+ {adamw}--optimizer.state_dtype 8bit", config
    if config.lora is None and config.model.init == "pretrained":
        config = replace(config, lora=LoraConfig(target_modules="all-linear", r=16, alpha=32))
        yield "+ --lora.target_modules all-linear --lora.r 16 --lora.alpha 32", config
    if config.lora and config.lora.quantize is None:
        config = replace(config, lora=replace(config.lora, quantize="nf4"))
        yield "+ --lora.quantize nf4", config
    length = (config.data.max_length or setup.model.config.max_positions) // 2
    while length >= SHORTEST:
        config = replace(config, data=replace(config.data, max_length=length))
        yield f"+ --data.max_length {length}", config
        length //= 2
