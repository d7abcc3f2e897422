"""Comparison of a released folder's logits between PyTorch and JAX."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.distributed.chips import memory_of
from easyaira.errors import WeightsError
from easyaira.models.model import Model

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea, in two lines.",
    "1 2 3 4 5 6 7 8 9 10",
)
TOLERANCE = 1e-4  # in float32, relative to the largest logit (for scores: at least to 1)


def compare_logits(
    folder: Path,
    model: Model,
    tokenizer: Any,
    load: Callable[[], Any],
    mesh: Any,
    base: Path | None = None,
) -> dict[str, Any]:
    """Compare the folder's logits on fixed prompts in PyTorch and in JAX, both in float32.

    Args:
        load: loads the folder's weights onto `mesh`.
        base: folder of the base model if `folder` is an adapter.

    Returns:
        Entry `logits` of export_report.json: the differences, or why nothing was compared.

    Raises:
        WeightsError: transformers cannot load the folder, or the logits differ too much.
    """
    prompts = [tokenizer(t, add_special_tokens=model.scorer).input_ids[:64] for t in PROMPTS]
    prompts = [ids[: model.config.max_positions] for ids in prompts]
    needed = 5 * model.parameter_count()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = memory_of(mesh.devices.flat[0])
    if room is not None and 4 * model.parameter_count() / mesh.size > 0.8 * room:
        why = f"needs {4 * model.parameter_count()} bytes on {mesh.size} devices of {room:.0f}"
        return {"compared": False, "why": why}
    for package in ("torch", "peft") if base else ("torch",):
        if importlib.util.find_spec(package) is None:
            return {"compared": False, "why": f"{package} is not installed"}
    if available < needed:
        return {"compared": False, "why": f"needs {needed} bytes of memory, {available} are free"}
    command = [
        sys.executable,
        "-m",
        "easyaira.export.torch_logits",
        str(folder),
        json.dumps(prompts),
    ]
    command += [str(base)] if base else []
    result = subprocess.run(command, capture_output=True)
    if result.returncode:
        problem = result.stderr.decode(errors="replace").strip()[-500:]
        raise WeightsError(f"{folder}: transformers cannot load it: {problem}")
    theirs = np.load(io.BytesIO(result.stdout))
    largest = difference = 0.0
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        loaded = load()
        for i, ids in enumerate(prompts):
            tokens = jnp.array([ids])
            layout = {"tokens": tokens, "positions": jnp.arange(len(ids))[None]}
            layout |= {"segment_ids": jnp.ones_like(tokens), "sides": jnp.zeros_like(tokens)}
            ours = np.asarray(_logits(model.with_dtype(jnp.float32), loaded, layout))
            largest = max(largest, float(np.abs(ours).max()))
            difference = max(difference, float(np.abs(ours - theirs[f"arr_{i}"]).max()))
    if not difference <= TOLERANCE * (max(largest, 1) if model.scorer else largest):
        raise WeightsError(
            f"{folder}: PyTorch logits differ by {difference:.2e} (largest logit: {largest:.2e})"
        )
    return {"compared": True, "max_difference": difference, "largest_logit": largest}


def _logits(model: Model, params: Any, layout: Mapping[str, jax.Array]) -> jax.Array:
    """Logits of one text: [T, V], or [1] for a scorer."""
    if model.scorer:
        return model.score(params, layout, examples=1, answers=1)[0][0]
    hidden, head = model.apply(params, layout)
    return (hidden @ head)[0, :, : model.vocab_size]
