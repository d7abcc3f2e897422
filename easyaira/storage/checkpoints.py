"""Checkpoints: everything that a run needs to continue, on any mesh. The only user of Orbax.

A checkpoint holds the items `params`, `opt_state`, `data` (the position in the data), `meta` (what
kind of model this is, and the metrics that were under way) and `sums` (of all bits of the others).
Orbax itself notices no changed byte, so the sums are taken on the devices before arrays are saved,
and again of what was restored. Saving goes on in the background; an error of it is raised by the
next save or by `close`.

The folder may lie in an object store: `gs://` and `s3://` are read and written by fsspec (through
etils) and, for arrays, by TensorStore."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils.epath.backend import fsspec_backend

from easyaira.distributed import hosts, watchdog
from easyaira.errors import StorageError
from easyaira.storage.integrity import hash_of, sums_of
from easyaira.storage.object_store import finished_steps, in_store, inside, is_finished, locate

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at INFO


class _Failures(logging.Handler):
    """Of several processes, one that cannot write its part of a checkpoint waits for the others,
    and they for it. Orbax's log is the first that knows."""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if "in background save thread" in said and record.exc_info and hosts.several():
            folder = said.rpartition("directory: ")[2]
            reason = _short(record.exc_info[1])
            watchdog.leave(StorageError(f"{folder}: cannot be saved: {reason}"))


logging.getLogger("absl").addHandler(_Failures())


class Restored(NamedTuple):
    """All items of a checkpoint."""

    step: int
    params: Any
    opt_state: Any
    data: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of a folder.

    Args:
        folder: where a folder per step lies, or a URL: gs://bucket/path, s3://bucket/path. Every
            process sees it.
        keep: how many are kept; None keeps all.
        write: this run saves here, so what an interrupted save left behind is removed.

    Raises:
        ConfigError: a package that reads the URL is missing.
        StorageError: the folder cannot be made or listed.
    """

    def __init__(self, folder: str | Path, keep: int | None = None, *, write: bool = False):
        self.folder = locate(folder)
        self.write = write
        self.saving = 0  # the step of the last save
        try:
            if write and hosts.first():
                self._clean()
            self.manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    create=write,
                    temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath
                    if in_store(self.folder)
                    else None,
                ),
            )
        except Exception as error:  # Orbax passes on whatever the storage raises
            raise StorageError(f"{self.folder}: cannot be opened: {_short(error)}") from error

    def _clean(self) -> None:
        """Remove what a killed save left. (Orbax's own cleaning takes every folder in a bucket that
        is no checkpoint for such.)"""
        unfinished = re.compile(r"\d+" if in_store(self.folder) else r"\d+\.orbax-checkpoint-tmp.*")
        for path in inside(self.folder):
            if unfinished.fullmatch(path.name) and not is_finished(path):
                path.rmtree()

    def steps(self) -> list[int]:
        """The finished steps, once what is being saved is finished, too. The first process looks,
        for all, and all must ask.

        Raises:
            StorageError: they cannot be listed.
        """
        with contextlib.suppress(Exception):  # told by `wait`
            self.manager.wait_until_finished()
        try:
            steps = finished_steps(self.folder) if hosts.first() else []
        except Exception as error:
            raise StorageError(f"{self.folder}: cannot be listed: {_short(error)}") from error
        return hosts.share(steps)

    def latest(self) -> int | None:
        """The newest finished step; raises as `steps`."""
        return max(self.steps(), default=None)

    def save(self, step: int, params: Any, opt_state: Any, data: dict, meta: dict) -> None:
        """Start saving; the arrays may be given away as soon as this returns.

        Raises:
            StorageError: this save cannot start, or the one before it failed.
        """
        self._save(step, {"params": params, "opt_state": opt_state}, {"data": data, "meta": meta})

    def save_params(self, step: int, params: Any, meta: dict) -> None:
        """Save weights alone, as a converted model has no more."""
        self._save(step, {"params": params}, {"meta": meta})

    def _save(self, step: int, trees: dict[str, Any], records: dict[str, Any]) -> None:
        sums = sums_of(trees, records)
        records = records | {"sums": sums | {"sums": hash_of(sums)}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        self.wait()
        self.saving = step
        try:
            saved = self.manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # Orbax passes on whatever the storage raises
            raise self._failed("saved", step, error) from error
        if not saved:
            raise StorageError(f"{self.folder}/{step}: not saved; a newer step is there already")

    def restore_latest(self, params: Any, opt_state: Any) -> Restored:
        """The newest checkpoint that is what was saved, on the mesh that is there now. Newer ones
        that are not are moved aside, and named.

        Args:
            params, opt_state: shapes, dtypes and shardings, as `abstract` gives them.

        Raises:
            StorageError: none is; nothing was moved.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self.restore(step, params, opt_state)
            except StorageError as error:
                damaged[step] = str(error)
                continue
            self._move_aside(damaged, step)
            return found
        raise StorageError(
            f"{self.folder}: no checkpoint can be continued from: {'; '.join(damaged.values())}"
            if damaged
            else f"{self.folder}: there is no finished checkpoint"
        )

    def _move_aside(self, damaged: dict[int, str], good: int) -> None:
        if not damaged or not self.write:
            return
        for step, problem in damaged.items():
            if hosts.first():
                try:
                    there = {path.name for path in inside(self.folder)}
                    names = (f"{step}.damaged" + (f"-{n}" if n else "") for n in itertools.count())
                    name = next(name for name in names if name not in there)
                    self._rename(str(step), name)
                except Exception as error:
                    raise self._failed("moved aside", step, error) from error
                print(f"store   {problem}; kept as {name}; goes on from {good}", flush=True)
        hosts.share()  # the first process has moved them
        self.manager.reload()

    def _rename(self, name: str, to: str) -> None:
        if not in_store(self.folder):
            (self.folder / name).rename(self.folder / to)
            return
        store = fsspec_backend.fs(self.folder)  # s3fs does not move folders
        root = str(self.folder).partition("://")[2]
        for file in store.find(f"{root}/{name}"):
            store.copy(file, f"{root}/{to}" + file.removeprefix(f"{root}/{name}"))
        store.rm(f"{root}/{name}", recursive=True)

    def restore(self, step: int, params: Any, opt_state: Any) -> Restored:
        """All of a checkpoint, or nothing; see `restore_latest`.

        Raises:
            StorageError: it cannot be read, or is not what was saved.
        """
        found = self._restore(step, {"params": params, "opt_state": opt_state}, ("data", "meta"))
        return Restored(step, *(found[name] for name in Restored._fields[1:]))

    def restore_params(self, step: int, params: Any) -> Any:
        """The weights alone; raises as `restore`."""
        return self._restore(step, {"params": params}, ())["params"]

    def meta(self, step: int) -> dict:
        """What a checkpoint says of its model; raises as `restore`."""
        return self._restore(step, {}, ("meta",))["meta"]

    def _restore(self, step: int, trees: dict[str, Any], records: tuple[str, ...]) -> dict:
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonRestore() for name in (*records, "sums")}
        watchdog.beat(f"restoring checkpoint {step}")
        failure = None
        with _quiet():
            try:
                found = self._reader().restore(step, args=ocp.args.Composite(**items))
                sums = dict(found.sums)
                intact = sums.pop("sums") == hash_of(sums)
            except Exception as error:
                failure = self._failed("restored", step, self._unread(step) or error)
            if failure:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    gc.collect()  # coroutines that are left
        # Orbax reads without the others here, so that all come to this place, whatever they read
        problem = hosts.problem_of_any(str(failure) if failure else None)
        if problem:
            raise failure or StorageError(problem)
        now = sums_of({k: found[k] for k in trees}, {k: found[k] for k in records})
        wrong = [name for name in now if now[name] != sums.get(name)]
        missing = [n for n in sums if n.split("/")[0] in (*trees, *records) and n not in now]
        if not intact or wrong or missing:
            name = (wrong + missing)[0] if intact else "sums"
            raise self._failed("restored", step, f"{name} is not what was saved")
        return {name: found[name] for name in (*trees, *records)}

    def _reader(self) -> Any:
        """Of several processes, one that meets the others at no barrier: what cannot be read is
        often read by one of them alone."""
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
        reason = problem if isinstance(problem, str) else _short(problem)
        try:
            others = [other for other in finished_steps(self.folder) if other != step]
        except Exception:
            others = []
        rest = f" (other finished steps: {others})" if others else ""
        return StorageError(f"{self.folder}/{step}: cannot be {verb}: {reason}{rest}")

    def _unread(self, step: int) -> str | None:
        """Which of a checkpoint's descriptions is no JSON any more: Orbax does not say."""
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
        """Until the save under way is finished.

        Raises:
            StorageError: it failed.
        """
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed("saved", self.saving, error) from error

    def close(self) -> None:
        self.wait()
        self.manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hundreds of lines that Orbax's threads and left coroutines print of one damaged
    file. What is raised is to be caught inside."""
    hooks, log = (sys.unraisablehook, sys.excepthook), logging.getLogger("asyncio")
    level = log.level
    sys.unraisablehook = sys.excepthook = lambda *_: None
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        log.setLevel(level)


def _short(error: BaseException) -> str:
    """The array or the file that an error of Orbax speaks of, and its reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.split(" [tensorstore_spec")[0]
    if array := re.search(r'"([^"]+)/[^"/]*" in OCDBT database at [^"]*"([^"]*)/":? (.*)', text):
        item = array[2].rpartition("/")[2]
        return f"{item}/{array[1].replace('.', '/')}: {array[3]}"[:300]
    return text[:300]


def peek(folder: str | Path) -> tuple[int | None, dict[str, Any]]:
    """The newest finished step that says what it is, and that, unverified. For one process alone.

    Raises:
        ConfigError: as `Checkpoints`.
        StorageError: the folder cannot be listed.
    """
    path = locate(folder)
    try:
        steps = finished_steps(path)
    except Exception as error:
        raise StorageError(f"{path}: cannot be listed: {_short(error)}") from error
    for step in reversed(steps):
        with contextlib.suppress(Exception):  # a damaged one is passed over when a run continues
            return step, dict(json.loads((path / str(step) / "meta/metadata").read_text()))
    return None, {}
