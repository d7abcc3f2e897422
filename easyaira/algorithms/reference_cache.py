"""Cache of the reference's log-probabilities."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
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
from easyaira.distributed.compiler import compiled_for
from easyaira.errors import ConfigError, StorageError
from easyaira.files import read_json, reason, write_file
from easyaira.storage.integrity import fingerprint
from easyaira.train import loader
from easyaira.train.setup import Setup

KEYS = "reference.json"  # in the run folder: keys of the run's cache entries
LOGPS, DECIDES = "logps.npy", "decides.json"  # in a cache entry
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
        policy, reference: sums of log-probabilities of answers, [A, B, K].
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
        side = ("chosen", "rejected")[worst[-1]] if policy.shape[-1] == 2 else "ranked"
        raise ConfigError(
            f"policy and reference have the same weights but differ before the first update: the "
            f"log-probability of a {side} answer is {ours!r} by the policy and {theirs!r} by the "
            f"reference, more than rounding explains ({float(bound[worst]):.1g}). This "
            "device computes wrongly: run python -m easyaira.selftest"
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
    """Reference log-probabilities of the answers of every example, [n, K], computed if not cached.

    The cache entry lies beside the cached tokens. Its key hashes everything that decides its bits:
    weights, model, examples, layout, devices, compiler flags and versions. Later runs with the same
    key read the same entry, whatever their loss, beta or learning rate. An interrupted run keeps
    its partial results in its folder and resumes from them.

    Raises:
        ConfigError: they are missing, and the reference has other weights than before.
        StorageError: the cache or the run folder cannot be written.
    """
    record, partial = folder / KEYS, folder / f"reference_{part}.partial.npy"
    keys = hosts.share(_recorded(record) if hosts.first() else {})
    root = cache.cache_folder(setup.config.data.cache_dir, "reference")
    recorded = "weights" in keys
    if not recorded:  # one pass over the weights, shared by all parts
        keys["weights"] = fingerprint(weights())
    decides = _decides(setup, batches, keys["weights"])
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    logps = np.full(batches.examples.ranks.shape, np.nan, np.float32)
    rows = None
    if hosts.first():
        then, kept = keys.get(part), None
        # before the first update, policy and reference are compared bit by bit, which needs the
        # same mesh; a resumed run may keep the results of an earlier mesh
        if then and then != key and not first:
            kept = _kept(root, then, decides, logps.shape)
            if kept is not None:
                print(f"reference {then}, as before; this command would compute {key}", flush=True)
        if kept is None:
            kept = _kept(root, key, decides, logps.shape)
            if then != key:
                keys[part] = key
                _write(partial.unlink, partial, missing_ok=True)
                _write(write_file, record, record, json.dumps(keys, indent=2) + "\n")
        if kept is not None:
            logps = kept
        else:
            rows = _write(_open_partial, partial, partial, *logps.shape)
            intact = rows["sum"] == _sums(np.arange(len(rows)), rows["logps"])
            logps[intact] = rows["logps"][intact]
    logps = hosts.from_first(logps, setup.mesh)
    if np.isnan(logps).any():
        params = weights()
        if recorded and fingerprint(params) != keys["weights"]:
            name = setup.config.model.ref_name_or_path  # type: ignore[attr-defined]
            raise ConfigError(
                f"model.{'ref_' * bool(name)}name_or_path: "
                f"{name or setup.config.model.name_or_path} has other weights than when the run in "
                f"{folder} began; restore the original ones to continue, or choose another "
                "output_dir"
            )
        score_all(score, params, batches, setup, logps, rows)
    if rows is not None:

        def build(entry: Path) -> None:
            np.save(entry / LOGPS, logps)
            write_file(entry / DECIDES, json.dumps(decides))

        cache.add(root, key, build)
        partial.unlink()
    return logps


def _write(write: Callable, path: Path, *args: Any, **options: Any) -> Any:
    try:
        return write(*args, **options)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {reason(error)}") from error


def _recorded(record: Path) -> dict[str, str]:
    """Keys of the run's cache entries; none if the file is damaged."""
    if not record.exists():
        return {}
    try:
        keys = read_json(record, error=StorageError)
        for name, key in keys.items():  # a key is the name of a folder
            digits = 64 if name == "weights" else 32
            if not re.fullmatch(f"[0-9a-f]{{{digits}}}", str(key)):
                raise StorageError(f"{record}: {name}: expected {digits} hexadecimal digits")
        return keys
    except StorageError as error:
        print(f"reference {error}; the keys are computed again", flush=True)
        return {}


def _kept(
    root: Path, key: str, decides: dict[str, Any], shape: tuple[int, int]
) -> np.ndarray | None:
    """Log-probabilities of a cache entry, if intact and of the same examples, model and weights."""
    folder = cache.kept(root, key)
    if folder is None:
        return None
    then = read_json(folder / DECIDES, error=StorageError)
    logps = np.load(folder / LOGPS, mmap_mode="r", allow_pickle=False)
    same = all(then.get(name) == decides[name] for name in ("examples", "model", "weights"))
    return logps if same and logps.shape == shape and np.isfinite(logps).all() else None


def row_of(answers: int) -> np.dtype:
    """Dtype of a row in the file of an interrupted computation."""
    return np.dtype([("logps", np.float32, answers), ("sum", np.uint32)])


def _sums(rows: np.ndarray, logps: np.ndarray) -> np.ndarray:
    """Checksum of each row of log-probabilities with its number."""
    pairs = zip(rows.tolist(), logps, strict=True)
    return np.array([zlib.crc32(values.tobytes(), row) for row, values in pairs], np.uint32)


def _open_partial(file: Path, count: int, answers: int) -> np.ndarray:
    """Memory-mapped results of an interrupted computation, or new ones, all missing."""
    if file.exists() and not file.is_symlink():
        try:
            rows = np.lib.format.open_memmap(file, "r+")
            if rows.dtype == row_of(answers) and rows.shape == (count,):
                return rows
            problem: Any = f"has {rows.shape} of {rows.dtype}"
        except ValueError as error:
            problem = error
        print(f"reference {file} is damaged ({reason(problem)}); computed again", flush=True)
    file.unlink(missing_ok=True)
    rows = np.zeros(count, row_of(answers))
    rows["logps"] = np.nan
    # written in full before it is mapped: a full disk raises here, but would crash a memory map
    np.save(file, rows)
    return np.lib.format.open_memmap(file, "r+")


def score_all(
    score: Callable,
    params: Any,
    batches: Batches,
    setup: Setup,
    logps: np.ndarray,
    partial: np.ndarray | None,
) -> None:
    """Fill in the rows that are still NaN, batch by batch, in the layout of training.

    Args:
        partial: memory-mapped rows of a file, for an interrupted computation to resume from.
    """
    batches = replace(batches, drop_last=False)
    missing = [u for u in range(len(batches)) if np.isnan(logps[batches.members(u)]).any()]
    start = missing[0] if missing else len(batches)
    updates = loader.ahead(batches, start, len(batches), setup.mesh, "of the reference")
    bar = {"initial": start, "total": len(batches), "unit": " batches", "disable": None}
    for ready in tqdm(updates, "reference", **bar):
        scored = np.asarray(score(params, ready.arrays).logps)
        rows = ready.batch.examples
        logps[rows] = scored[tuple(ready.batch.slots.T)]
        if partial is not None:
            partial["logps"][rows] = logps[rows]
            partial["sum"][rows] = _sums(rows, logps[rows])


def _decides(setup: Setup, batches: Batches, weights: str) -> dict[str, Any]:
    """Everything that decides the bits of the log-probabilities."""
    model, device = reference_model(setup), setup.mesh.devices.flat[0]
    tail = setup.config.dpo.tail  # type: ignore[attr-defined]
    return ({} if tail == 1 else {"tail": tail}) | {
        "examples": batches.examples.fingerprint(),
        "weights": weights,
        "model": repr(model.config),
        "compute": repr(model.compute),
        "layout": [getattr(batches, name) for name in LAID_OUT_BY],
        "mesh": [setup.mesh.shape[axis] for axis in setup.mesh.axis_names],
        "device": device.device_kind,
        "compiled_for": compiled_for(device.platform),
        "versions": [easyaira.__version__, jax.__version__],
    }
