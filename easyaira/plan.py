"""What a run is about to do, in words and figures; and for `--dry_run`, what memory it takes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from easyaira import mesh as meshes
from easyaira import optim, trainer
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
    return (
        f"model   {config.model.name_or_path}: {model.parameter_count():,} parameters, vocabulary "
        f"{model.vocab_size}, {model.compute.dtype.name} on {setup.mesh.size} x "
        f"{setup.mesh.devices.flat[0].device_kind} ({sizes})\n{_new_head(setup)}"
        f"data    {len(setup.data.train)} examples{held_out} of {told['read']} rows{dropped}"
        f"{noted}; "
        f"{told['tokens']:,} tokens{learned}{shared}\n"
        f"run     {setup.total_steps} updates of {config.train_batch_size} examples, {warmup} of "
        f"them warm-up, in {config.output_dir}"
    )


def _new_head(setup: Setup) -> str:
    """What of a scorer's head the model that it begins with does not have."""
    drawn = [] if setup.config.model.init == "random" else setup.origin.check(setup.stored)
    if not drawn:
        return ""
    return (
        f"head    {', '.join(drawn)} drawn with standard deviation "
        f"{setup.model.config.initializer_range} from seed {setup.config.seed}; biases 0\n"
    )


def plan(setup: Setup, algorithm: Algorithm) -> str:
    """Where parameters lie and what memory a step takes, without allocating any of it."""
    lines = ["", f"{'parameter':44}{'shape':28}divided by"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(setup.target(setup.model)):
        spec = ", ".join(str(axes or "-") for axes in leaf.sharding.spec)
        lines.append(f"{meshes.path_of(path):44}{str(leaf.shape):28}{spec}")
    memory = compile_step(setup, algorithm).memory_analysis()
    held, used = (
        f"{size / 2**20:,.0f} MiB"
        for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    )
    lines += ["", f"memory per device: {held} held (weights, optimizer, batch), {used} in a step"]
    return "\n".join(lines)


def compile_step(setup: Setup, algorithm: Algorithm) -> Any:
    """The training step, compiled for the first update's shapes without any array."""
    state = trainer.abstract_state(setup.target(setup.model), setup.tx, setup.mesh)
    reference = algorithm.frozen(setup)
    frozen = reference and setup.target(reference)
    arrays = dict(setup.batches[0].arrays)
    of_examples = (setup.config.gradient_accumulation_steps, setup.micro_batch)
    for name, shape in algorithm.known(setup).items():
        arrays[name] = np.zeros((*of_examples, *shape), np.float32)
    batch = meshes.like(arrays, trainer.batch_shardings(arrays, setup.mesh))
    step = trainer.make_train_step(algorithm.loss_fn(setup), setup.tx)
    return jax.jit(step, donate_argnums=0).lower(state, frozen, batch, setup.dropout_key).compile()


def flops_per_token(model: Model, reference_in_step: bool) -> float:
    """Operations of an update per real token: two per weight of a product forward and four
    backward, and two more for a reference that is computed in the step. Attention scores are left
    out, and a scorer's head, which is applied once a text."""
    if model.scorer:
        leaves = jax.tree_util.tree_leaves_with_path(model.shapes["model"])
        products = [x.size for at, x in leaves if not meshes.path_of(at).endswith("embedding")]
        return 6 * sum(products)
    lookups = 0 if model.config.tie_word_embeddings else model.vocab_size * model.config.width
    return (8 if reference_in_step else 6) * (model.parameter_count() - lookups)
