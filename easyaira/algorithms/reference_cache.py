"""Cache of the reference's log-probabilities."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import easyaira
from easyaira.algorithms.reference import reference_model
from easyaira.data import cache
from easyaira.data.batches import Batches
from easyaira.distributed import hosts
from easyaira.errors import ConfigError
from easyaira.files import write_file
from easyaira.storage.integrity import fingerprint
from easyaira.train import loader
from easyaira.train.setup import Setup

KEYS = "reference.json"  # in the run folder: keys of the run's cache files
LAID_OUT_BY = "size accumulation shards packing share_prompt seed attention multiple".split()


def check_equal(
    policy: np.ndarray, reference: np.ndarray, lengths: np.ndarray, repeated: np.ndarray
) -> None:
    """Refuse to start from a policy that differs from its own reference.

    A deterministic program must give policy and reference equal bits. A program that differs
    between two calls (a GPU may add in any order) may also differ between policy and reference, by
    at most the error of summing n float32 numbers in another order: n u sum |x|, with the unit
    roundoff u. Log-probabilities have one sign, so sum |x| = |sum x| (Higham, 2002, section 4.2).

    Args:
        policy, reference: sums of log-probabilities of answers, [A, B, 2].
        lengths: number of summands.
        repeated: the policy's sums from a second call of the same program.

    Raises:
        ConfigError: they differ by more than the bound, or by NaN.
    """
    difference = np.abs(policy - reference)
    bound = np.zeros_like(difference)
    if not np.array_equal(policy, repeated):
        unit = np.finfo(np.float32).eps / 2
        bound = 2 * lengths * unit * np.maximum(np.abs(policy), np.abs(reference))
    wrong = ~(difference <= bound)
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, difference, -1)), wrong.shape)
        ours, theirs = float(policy[worst]), float(reference[worst])
        side = ("chosen", "rejected")[worst[-1]]
        raise ConfigError(
            f"policy and reference have the same weights but differ before the first update: the "
            f"log-probability of a {side} answer is {ours!r} by the policy and {theirs!r} by the "
            f"reference, more than rounding explains ({float(bound[worst]):.1g}). Either the "
            "cached reference is damaged or this device computes wrongly: remove the cache (data."
            "cache_dir), and run python -m easyaira.selftest"
        )


def logps_of(
    setup: Setup,
    batches: Batches,
    part: str,
    weights: Callable[[], Any],
    score: Callable,
    folder: Path,
    first: bool,
) -> np.ndarray:
    """Reference log-probabilities of both answers of every example, [n, 2], computed if not cached.

    The cache file lies beside the cached tokens. Its key hashes everything that decides its bits:
    weights, model, examples, layout, devices and versions. Later runs with the same key read the
    same file, whatever their loss, beta or learning rate. An interrupted run keeps its partial
    results in its folder and resumes from them.

    Raises:
        StorageError: the cache cannot be written.
    """
    record = folder / KEYS
    keys = hosts.share(json.loads(record.read_text()) if record.exists() else {})
    root = cache.cache_folder(setup.config.data, "reference")
    file, partial = root / f"{keys.get(part)}.npy", folder / f"reference_{part}.partial.npy"
    if "weights" not in keys:  # one pass over the weights, shared by all parts
        keys["weights"] = fingerprint(weights())
    key, kept = _key(setup, batches, keys["weights"]), hosts.share(file.exists())
    # before the first update, policy and reference are compared bit by bit, which needs the same
    # mesh; a resumed run may keep the results of an earlier mesh
    if keys.get(part) != key and (first or not kept):
        keys[part], file = key, root / f"{key}.npy"
        if hosts.first():
            partial.unlink(missing_ok=True)
            write_file(record, json.dumps(keys, indent=2) + "\n")
    logps = np.zeros((len(batches.examples), 2), np.float32)
    try:
        if hosts.first():
            logps = _kept(file, partial, logps.shape)
        logps = hosts.from_first(logps, setup.mesh)
        if np.isnan(logps).any():
            score_all(score, weights(), batches, setup, logps)
            if hosts.first():
                logps.flush()
                beside = root / f".{keys[part]}-{os.getpid()}"
                shutil.copyfile(partial, beside)
                beside.rename(file)
                partial.unlink()
        return logps
    except OSError as error:
        raise cache.cache_error(root, error) from error


def _kept(file: Path, partial: Path, shape: tuple[int, int]) -> np.ndarray:
    """Memory-mapped earlier results; missing values are NaN, for the caller to fill in."""
    if file.exists():
        logps = np.load(file, mmap_mode="r", allow_pickle=False)
        if logps.shape == shape and np.isfinite(logps).all():
            return logps
    if not partial.exists():
        np.save(partial, np.full(shape, np.nan, np.float32))
    return np.lib.format.open_memmap(partial, "r+")


def score_all(
    score: Callable, params: Any, batches: Batches, setup: Setup, logps: np.ndarray
) -> None:
    """Fill in the rows that are still NaN, batch by batch, in the layout of training."""
    batches = replace(batches, drop_last=False)
    missing = [u for u in range(len(batches)) if np.isnan(logps[batches.members(u)]).any()]
    start = missing[0] if missing else len(batches)
    updates = loader.ahead(batches, start, len(batches), setup.mesh, "of the reference")
    bar = {"initial": start, "total": len(batches), "unit": " batches", "disable": None}
    for ready in tqdm(updates, "reference", **bar):
        scored = np.asarray(score(params, ready.arrays).logps)
        logps[ready.batch.examples] = scored[tuple(ready.batch.slots.T)]


def _key(setup: Setup, batches: Batches, weights: str) -> str:
    layout = [getattr(batches, name) for name in LAID_OUT_BY]
    model = reference_model(setup)
    mesh = [setup.mesh.shape[axis] for axis in setup.mesh.axis_names]
    device = setup.mesh.devices.flat[0].device_kind
    versions = [easyaira.__version__, jax.__version__]
    decides = [batches.examples.fingerprint(), layout, repr(model.config), repr(model.compute)]
    decides += [mesh, device, versions, weights]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
