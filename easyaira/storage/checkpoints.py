"""Checkpoints: everything needed to resume a run on any mesh. No other folder uses Orbax.

A checkpoint has the items `params`, `opt_state`, `data` (position in the data), `meta` (kind of
model, and metrics not yet logged) and `sums` (checksums over all bits of the other items). Orbax
does not detect changed bytes. The checksums are therefore computed on the devices before saving, or
while the weights of a converted model are read, and again after restoring. Saving runs in the
background; its errors are raised by the next save or by `close`.

The folder may be in an object store: fsspec (through etils) reads and writes `gs://` and `s3://`,
and TensorStore reads and writes the arrays there."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils.epath.backend import fsspec_backend

from easyaira.distributed import hosts, watchdog
from easyaira.errors import EasyAiraError, StorageError
from easyaira.files import parse_json
from easyaira.storage import one_by_one
from easyaira.storage.integrity import SumsWhileRead, hash_of, signed, sums_of
from easyaira.storage.keeping import Kept
from easyaira.storage.object_store import finished_steps, in_store, inside, is_finished, locate
from easyaira.storage.orbax_errors import quiet, short

one_by_one.register()


class Restored(NamedTuple):
    """All items of a checkpoint, and its step."""

    step: int
    params: Any
    opt_state: Any
    data: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of a folder.

    Args:
        folder: holds one folder per step; a path or a URL (gs://bucket/path, s3://bucket/path).
            Every process must see it.
        keep: number of checkpoints kept; None keeps all.
        write: this run saves here, so leftovers of an interrupted save are removed.

    Raises:
        ConfigError: the package that reads the URL is missing.
        StorageError: the folder cannot be created or listed.
    """

    def __init__(self, folder: str | Path, keep: int | None = None, *, write: bool = False):
        self.folder = locate(folder)
        self.write = write
        self.saving = 0  # step of the latest save
        self.kept = Kept(keep)
        try:
            if write and hosts.first():
                self._clean()
            self.manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self.kept,
                    create=write,
                    temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath
                    if in_store(self.folder)
                    else None,
                ),
            )
        except Exception as error:  # Orbax passes on whatever the storage raises
            raise StorageError(f"{self.folder}: cannot be opened: {short(error)}") from error

    def _clean(self) -> None:
        """Remove leftovers of an interrupted save.

        Orbax's own cleanup would remove every folder of a bucket that is not a checkpoint."""
        unfinished = re.compile(r"\d+" if in_store(self.folder) else r"\d+\.orbax-checkpoint-tmp.*")
        for path in inside(self.folder):
            if unfinished.fullmatch(path.name) and not is_finished(path):
                path.rmtree()

    def steps(self) -> list[int]:
        """Wait for a save in progress, then list the finished steps. The first process lists them
        for all; every process must call this.

        Raises:
            StorageError: the folder cannot be listed.
        """
        with contextlib.suppress(Exception):  # `wait` raises it
            self.manager.wait_until_finished()
        try:
            steps = finished_steps(self.folder) if hosts.first() else []
        except Exception as error:
            raise StorageError(f"{self.folder}: cannot be listed: {short(error)}") from error
        return hosts.share(steps)

    def latest(self) -> int | None:
        """The newest finished step, or None; raises like `steps`."""
        return max(self.steps(), default=None)

    def save(self, step: int, params: Any, opt_state: Any, data: dict, meta: dict) -> None:
        """Start saving. The arrays may be donated as soon as this returns.

        Raises:
            StorageError: this save cannot start, or the previous one failed.
        """
        trees, records = {"params": params, "opt_state": opt_state}, {"data": data, "meta": meta}
        sums = sums_of(trees, records)
        self._start(step, trees, records | {"sums": signed(sums)})

    def save_params(self, step: int, params: Any, meta: dict) -> None:
        """Save only weights (also `Lazy`) and meta, for a converted model, in a folder that is not
        used before this returns.

        Raises:
            StorageError: this save failed.
            WeightsError: a `Lazy` array cannot be read.
        """
        read = SumsWhileRead({"params": params})
        self._start(step, read.trees, {"meta": meta})
        try:
            self.wait()
        except StorageError:
            if isinstance(read.error, EasyAiraError):
                raise read.error from None
            raise
        except BaseException:  # a signal
            read.stopped = True
            with contextlib.suppress(StorageError):
                self.wait()
            raise
        sums = read.sums() | {"meta": hash_of(meta)}
        record = ocp.args.JsonSave(signed(sums))
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
                checkpointer.save(self.folder / str(step) / "sums", args=record)
        except Exception as error:
            raise self._failed("saved", step, error) from error

    def _start(self, step: int, trees: dict[str, Any], records: dict[str, Any]) -> None:
        items = {name: one_by_one.save_args(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        self.wait()
        self.saving = step
        try:
            saved = self.manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # Orbax passes on whatever the storage raises
            raise self._failed("saved", step, error) from error
        if not saved:
            raise StorageError(f"{self.folder}/{step}: not saved: a newer step already exists")

    def restore_latest(self, params: Any, opt_state: Any) -> Restored:
        """Restore the newest intact checkpoint onto the current mesh. Newer, damaged ones are
        renamed and reported.

        Args:
            params, opt_state: shapes, dtypes and shardings, as returned by `abstract`.

        Raises:
            StorageError: no checkpoint is intact; none was renamed.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, params, opt_state)
            except StorageError as error:
                damaged[step] = str(error)
                continue
            self._move_aside(damaged, step)
            return restored
        raise StorageError(
            f"{self.folder}: no intact checkpoint to resume from: {'; '.join(damaged.values())}"
            if damaged
            else f"{self.folder}: no finished checkpoint"
        )

    def _move_aside(self, damaged: dict[int, str], good: int) -> None:
        if not damaged or not self.write:
            return
        for step, problem in damaged.items():
            if hosts.first():
                try:
                    taken = {path.name for path in inside(self.folder)}
                    names = (f"{step}.damaged" + (f"-{n}" if n else "") for n in itertools.count())
                    name = next(name for name in names if name not in taken)
                    self._rename(str(step), name)
                except Exception as error:
                    raise self._failed("moved aside", step, error) from error
                print(f"store   {problem}; kept as {name}; resuming from {good}", flush=True)
        hosts.share()  # wait until the first process has renamed them
        self.manager.reload()

    def _rename(self, name: str, to: str) -> None:
        if not in_store(self.folder):
            (self.folder / name).rename(self.folder / to)
            return
        store = fsspec_backend.fs(self.folder)  # s3fs cannot rename folders
        root = str(self.folder).partition("://")[2]
        for file in store.find(f"{root}/{name}"):
            store.copy(file, f"{root}/{to}" + file.removeprefix(f"{root}/{name}"))
        store.rm(f"{root}/{name}", recursive=True)

    def restore(self, step: int, params: Any, opt_state: Any) -> Restored:
        """Restore a whole checkpoint; see `restore_latest` for the arguments.

        Raises:
            StorageError: the checkpoint cannot be read or fails its checksums.
        """
        items = self._restore(step, {"params": params, "opt_state": opt_state}, ("data", "meta"))
        return Restored(step, *(items[name] for name in Restored._fields[1:]))

    def restore_params(self, step: int, params: Any, *, part: bool = False) -> Any:
        """Restore only the weights, or only a part of their tree; raises like `restore`."""
        return self._restore(step, {"params": params}, (), part=part)["params"]

    def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of all arrays, by path, as the record of checksums lists them.

        Raises:
            StorageError: that record cannot be read.
        """
        sums = self._restore(step, {}, ())["sums"]
        matches = {name: re.match(r"(\w+)\[([\d, ]*)\] ", line) for name, line in sums.items()}
        return {
            name: jax.ShapeDtypeStruct(
                tuple(map(int, match[2].split(",") if match[2] else ())), match[1]
            )
            for name, match in matches.items()
            if match
        }

    def meta(self, step: int) -> dict:
        """Restore only the meta record; raises like `restore`."""
        return self._restore(step, {}, ("meta",))["meta"]

    def _restore(self, step: int, trees: dict, records: tuple[str, ...], *, part=False) -> dict:
        restore = one_by_one.restore_args if part else ocp.args.StandardRestore
        items = {name: restore(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonRestore() for name in (*records, "sums")}
        watchdog.beat(f"restoring checkpoint {step}")
        failure = None
        with quiet():
            try:
                restored = self._reader().restore(step, args=ocp.args.Composite(**items))
                sums = dict(restored.sums)
                intact = sums.pop("sums") == hash_of(sums)
            except Exception as error:
                failure = self._failed("restored", step, self._damaged_json(step) or error)
            if failure:
                gc.collect()  # abandoned coroutines print through the hooks, too
        # this reader has no barriers, so every process gets here even if its read failed
        if problem := hosts.problem_of_any(str(failure) if failure else None):
            raise failure or StorageError(problem)
        now = sums_of({k: restored[k] for k in trees}, {k: restored[k] for k in records})
        wrong = [name for name in now if now[name] != sums.get(name)]
        saved = [] if part else [n for n in sums if n.split("/")[0] in (*trees, *records)]
        missing = [name for name in saved if name not in now]
        if not intact or wrong or missing:
            name = (wrong + missing)[0] if intact else "sums"
            raise self._failed("restored", step, f"{name} differs from what was saved")
        return {name: restored[name] for name in (*trees, *records)} | {"sums": sums}

    def _reader(self) -> Any:
        """A checkpoint manager for reading. With several processes it has no barriers, because a
        read may fail on one process only."""
        if not hosts.several():
            return self.manager
        me = jax.process_index()
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                read_only=True,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read{me}"
                ),
            ),
        )

    def _failed(self, verb: str, step: int, problem: Exception | str) -> StorageError:
        reason = problem if isinstance(problem, str) else short(problem)
        try:
            others = [other for other in finished_steps(self.folder) if other != step]
        except Exception:
            others = []
        rest = f" (other finished steps: {others})" if others else ""
        return StorageError(f"{self.folder}/{step}: cannot be {verb}: {reason}{rest}")

    def _damaged_json(self, step: int) -> str | None:
        """Name the damaged JSON file of a checkpoint, if any; Orbax's errors do not."""
        for pattern in ("*/metadata", "*/_METADATA", "*/array_metadatas/*"):
            for file in (self.folder / str(step)).glob(pattern):
                try:
                    json.loads(file.read_bytes())
                except ValueError as error:
                    return f"{file.parent.name}/{file.name}: {error}"
                except Exception:
                    continue
        return None

    def wait(self) -> None:
        """Wait until the save in progress is finished.

        Raises:
            StorageError: the save failed.
        """
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed("saved", self.saving, error) from error

    def close(self) -> None:
        self.wait()
        self.manager.close()


def records(folder: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Finished steps with a readable meta record, newest first, and that record, unverified. Runs
    on one process only.

    Raises:
        ConfigError: see `Checkpoints`.
        StorageError: the folder cannot be listed.
    """
    path = locate(folder)
    try:
        steps = finished_steps(path)
    except Exception as error:
        raise StorageError(f"{path}: cannot be listed: {short(error)}") from error
    for step in reversed(steps):
        try:
            meta = parse_json((path / str(step) / "meta/metadata").read_bytes())
        except Exception:  # skip a damaged step, as resuming does
            continue
        if isinstance(meta, dict):
            yield step, meta


def peek(folder: str | Path) -> tuple[int | None, dict[str, Any]]:
    """The newest of the `records`."""
    return next(records(folder), (None, {}))
