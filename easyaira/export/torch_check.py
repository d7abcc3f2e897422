"""Comparison of a released folder's logits between PyTorch and JAX."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from easyaira.allocator import give_back_memory
from easyaira.distributed.chips import memory_of
from easyaira.errors import WeightsError, shortened
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
        Entry `logits` of export_report.json: the differences, or why nothing was compared; with
        `prompts`, the token ids of each prompt and a summary of its logits, for proof.json.

    Raises:
        WeightsError: transformers cannot load the folder, or the logits differ too much.
    """
    parameters = model.parameter_count()
    room = memory_of(mesh.devices.flat[0])
    if room is not None and 4 * parameters / mesh.size > 0.8 * room:
        why = f"needs {4 * parameters} bytes on {mesh.size} devices of {room:.0f}"
        return {"compared": False, "why": why}
    if why := obstacle(parameters, adapter=base is not None):
        return {"compared": False, "why": why}
    prompts = [tokenizer(t, add_special_tokens=model.scorer).input_ids[:64] for t in PROMPTS]
    prompts = [ids[: model.config.max_positions] for ids in prompts]
    give_back_memory()
    theirs = torch_logits(folder, prompts, base)  # before this process loads its own copy
    ours = []
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        loaded = load()
        logits = jax.jit(partial(_logits, model.with_dtype(jnp.float32)))
        width = max(map(len, prompts))  # one program for all
        for ids in prompts:
            tokens = jnp.array([ids + [0] * (width - len(ids))])
            positions = jnp.arange(width)[None]
            layout = {"tokens": tokens, "positions": positions, "sides": jnp.zeros_like(tokens)}
            layout["segment_ids"] = jnp.where(positions < len(ids), 1, 0)
            ours.append(np.asarray(logits(loaded, layout))[: len(ids)])
        del loaded
    largest = max(float(np.abs(logits).max()) for logits in ours)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    tolerance = TOLERANCE * (max(largest, 1) if model.scorer else largest)
    if not difference <= tolerance:
        raise WeightsError(
            f"{folder}: PyTorch logits differ by {difference:.2e} (largest logit: {largest:.2e}), "
            "so nothing is released; the checkpoint is kept. This is a bug: please report it"
        )
    return {
        "compared": True,
        "max_difference": difference,
        "largest_logit": largest,
        "tolerance": tolerance,
        "prompts": [
            {"ids": ids, "logits": summary(logits)}
            for ids, logits in zip(prompts, ours, strict=True)
        ],
    }


def obstacle(parameters: int, *, adapter: bool) -> str | None:
    """Why a model of this size cannot be run in PyTorch here, or None."""
    for package in ("torch", "peft") if adapter else ("torch",):
        if PathFinder.find_spec(package) is None:
            return f"{package} is not installed"
    needed = 5 * parameters
    available = psutil.virtual_memory().available  # with the system's cache of files
    if available < needed:
        return f"needs {needed / 2**30:,.2f} GiB of memory, {available / 2**30:,.2f} are free"
    return None


def torch_logits(
    folder: Path, prompts: Sequence[Sequence[int]], base: Path | None = None
) -> list[np.ndarray]:
    """Float32 logits of each prompt in PyTorch: [T, V], or [1] for a scorer.

    Raises:
        WeightsError: transformers cannot load the folder.
    """
    command = [sys.executable, "-m", "easyaira.export.torch_logits", str(folder)]
    command += [json.dumps(prompts), *([str(base)] if base else [])]
    result = subprocess.run(command, capture_output=True)
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        problem = shortened(lines[-1] if lines else f"status {result.returncode}", 300)
        raise WeightsError(f"{folder}: transformers cannot load it: {problem}")
    with np.load(io.BytesIO(result.stdout)) as logits:
        return [logits[f"arr_{i}"] for i in range(len(prompts))]


def summary(logits: np.ndarray) -> list[list[float]] | list[float]:
    """Two figures a position: the largest logit, and the log of the sum of all exponentials. Other
    weights give other figures. A score is its own summary."""
    if logits.ndim == 1:
        return [float(score) for score in logits]
    wide = np.asarray(logits, np.float64)
    largest = wide.max(-1, keepdims=True)
    total = largest[:, 0] + np.log(np.exp(wide - largest).sum(-1))
    return [[round(float(x), 6) for x in pair] for pair in zip(largest[:, 0], total, strict=True)]


def _logits(model: Model, params: Any, layout: Mapping[str, jax.Array]) -> jax.Array:
    """Logits of one text: [T, V], [1] for a scorer, or [T] for a value model."""
    if model.scorer:
        return model.score(params, layout, examples=1, answers=1)[0][0]
    hidden, head = model.apply(params, layout)
    return model.logits(hidden, head)[0]
