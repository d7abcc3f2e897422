"""What a run is about to do, in words and figures; and for `--dry_run`, what memory it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from easyaira import lora, optim, trainer
from easyaira import mesh as meshes
from easyaira.models.registry import Model
from easyaira.prepare import Algorithm, Setup


def describe(setup: Setup) -> str:
    """The run in three lines, or four."""
    config, model, told = setup.config, setup.model, setup.data.report["train"]
    sizes = ",".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    held_out = f", {len(setup.held_out.examples)} held out" if setup.held_out else ""
    dropped = f", dropped {told['dropped']}" if told["dropped"] else ""
    noted = f", noted {told['noted']}" if told["noted"] else ""
    shared = "; prompts stored once a pair" if setup.batches.share_prompt else ""
    learned = "" if model.scorer else f", {told['learned_tokens']:,} of them learned"
    warmup = optim.warmup_steps(config.optimizer, setup.total_steps)
    adapter = f"{describe_adapter(setup)}\n" if setup.adapter else ""
    return (
        f"model   {config.model.name_or_path}: {model.parameter_count():,} parameters, vocabulary "
        f"{model.vocab_size}, {model.compute.dtype.name}, attention by {model.compute.attention}, "
        f"on {setup.mesh.size} x "
        f"{setup.mesh.devices.flat[0].device_kind} ({sizes})\n"
        f"{_new_head(setup)}{adapter}"
        f"data    {len(setup.data.train)} examples{held_out} of {told['read']} rows{dropped}"
        f"{noted}; "
        f"{told['tokens']:,} tokens{learned}{shared}\n"
        f"run     {setup.total_steps} updates of {config.train_batch_size} examples, {warmup} of "
        f"them warm-up, in {config.output_dir}"
    )


def _new_head(setup: Setup) -> str:
    """What of a scorer's head the model that it begins with does not have."""
    adapters = setup.config.lora and setup.config.lora.adapter
    if not setup.model.scorer or setup.config.model.init == "random" or adapters:
        return ""  # adapters bring the head with them
    drawn = setup.origin.check(setup.stored)
    if not drawn:
        return ""
    return (
        f"head    {', '.join(drawn)} drawn with standard deviation "
        f"{setup.model.config.initializer_range} from seed {setup.config.seed}; biases 0\n"
    )


def describe_adapter(setup: Setup) -> str:
    """What is trained instead of the model's weights, and how those are held."""
    adapter = setup.adapter
    count, total = adapter.parameter_count(), setup.model.parameter_count() + _added(adapter)
    held = jax.tree.leaves(adapter.held_target(setup.mesh, setup.model.compute.dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in held)
    names = ", ".join(lora.module_of(row).partition("{}.")[2] for row in adapter.targets)
    if adapter.head:
        names += f", and all of {', '.join(adapter.head_modules)}"
    kind = adapter.config.quantize or setup.model.compute.dtype.name
    return (
        f"lora    {count:,} trainable parameters ({count / total:.4%}): rank "
        f"{adapter.config.r}, scale {adapter.scale:g}, on {names}; frozen linear layers held in "
        f"{kind}, all frozen weights take {size / 2**20:,.1f} MiB"
    )


def _added(adapter: lora.Adapter) -> int:
    """Parameters of adapters beside the model's own; its head is one of those."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.shapes["model"]))


def plan(setup: Setup, algorithm: Algorithm) -> str:
    """Where parameters lie and what memory a step takes, without allocating any of it."""
    lines = ["", f"{'parameter':44}{'shape':28}divided by"]
    parameters = setup.model.target(setup.mesh)
    if setup.adapter:
        held = setup.adapter.held_target(setup.mesh, setup.model.compute.dtype)
        parameters = lora.joined(held, setup.trained())
    for path, leaf in meshes.by_path(parameters).items():
        spec = ", ".join(str(axes or "-") for axes in leaf.sharding.spec)
        lines.append(f"{path:44}{str(leaf.shape):28}{spec}")
    memory = compile_step(setup, algorithm).memory_analysis()
    held, used = (
        f"{size / 2**20:,.0f} MiB"
        for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    )
    lines += ["", f"memory per device: {held} held (weights, optimizer, batch), {used} in a step"]
    return "\n".join(lines)


def compile_step(setup: Setup, algorithm: Algorithm) -> Any:
    """The training step, compiled for the first update's shapes without any array."""
    state = trainer.abstract_state(setup.trained(), setup.tx, setup.mesh)
    frozen = setup.frozen_target(algorithm)
    arrays = dict(replace(setup.batches, local=None)[0].arrays)
    of_examples = (setup.config.gradient_accumulation_steps, setup.micro_batch)
    for name, shape in algorithm.known(setup).items():
        arrays[name] = np.zeros((*of_examples, *shape), np.float32)
    batch = meshes.like(arrays, trainer.batch_shardings(arrays, setup.mesh))
    step = trainer.jit_train_step(setup.loss_fn(algorithm), setup.tx, state)
    return step.lower(state, frozen, batch, setup.dropout_key).compile()


def flops_per_token(
    model: Model, reference_in_step: bool, adapter: lora.Adapter | None = None
) -> float:
    """Operations of an update per real token: two per weight of a product forward and four
    backward (two if it is frozen), and two more for a reference that is computed in the step.
    Attention scores are left out, and a scorer's head, which is applied once a text."""
    if model.scorer:
        leaves = meshes.by_path(model.shapes["model"])
        products = sum(leaf.size for at, leaf in leaves.items() if not at.endswith("embedding"))
    else:
        tied = model.config.tie_word_embeddings
        products = model.parameter_count() - (0 if tied else model.vocab_size * model.config.width)
    forward = 4 if reference_in_step else 2
    if adapter is None:
        return (forward + 4) * products
    return (forward + 2) * products + (forward + 4) * _added(adapter)
