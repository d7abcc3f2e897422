"""The run folder: its lock, and which run may continue in it."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from easyaira.config.run import PROVENANCE, RunConfig, to_dict
from easyaira.data import report as data_report
from easyaira.distributed import hosts
from easyaira.errors import ConfigError, StorageError
from easyaira.files import write_file
from easyaira.run.provenance import flattened, identity, provenance
from easyaira.storage import pretrained
from easyaira.storage.checkpoints import Checkpoints, peek
from easyaira.train.setup import Setup

# what may differ when a run is continued, since it does not change what is computed, but for
# rounding
MAY_CHANGE = """
    mesh dcn output_dir checkpoint_dir resume export num_samples logging_steps eval_steps save_steps
    save_total_limit gradient_accumulation_steps model.gradient_checkpointing data.cache_dir
""".split()
LOCK = ".lock"  # held by the process that is at work in the folder
GROUPS_MAY_CHANGE = {"distributed", "energy", "generation", "card"}


@contextmanager
def claimed(setup: Setup) -> Iterator[Checkpoints]:
    """Make the run folder ours, or make sure that it is, and keep others out; gives its
    checkpoints.

    The folder is the first process's; the others see its checkpoints alone.

    Raises:
        ConfigError: it is another run's, holds something else, or nothing where a run must be;
            another process is in it; or not all hosts see its checkpoints.
        StorageError: it cannot be written.
    """
    config, place = setup.config, _place(setup.config)
    with ExitStack() as held:
        if hosts.first():
            _check(setup, place)
            held.enter_context(_locked(Path(config.output_dir)))
            _write(setup, place)
        if hosts.several() and "://" not in place:
            _check_seen(Path(place))
        checkpoints = Checkpoints(place, keep=config.save_total_limit, write=True)
        if config.resume == "must" and checkpoints.latest() is None:
            raise ConfigError(f"resume: no finished checkpoint in {place}; use auto to start anew")
        yield checkpoints


def refuse_taken(folder: Path) -> None:
    """To be asked before this process meets others, lest it meets those of a run under way.

    Raises:
        ConfigError: another process is at work in the folder.
    """
    try:
        file = open(folder / LOCK, encoding="utf-8")
    except OSError:
        return  # told when it is to be written
    with file:
        _hold(file, fcntl.LOCK_SH, folder)


def _hold(file: TextIO, how: int, folder: Path) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ConfigError(
            f"output_dir: {file.read().strip() or 'another process'} is at work in "
            f"{folder}; wait until it has ended, or choose another folder"
        ) from None
    except OSError:
        pass  # a disk that knows no locks (Lustre without flock, NFS without lockd)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out. The system lets go of the lock of one that was killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error
    with file:
        _hold(file, fcntl.LOCK_EX, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}\n")
        file.flush()
        yield


def _place(config: RunConfig) -> str:
    """Where the checkpoints are to lie: a folder, from any working directory, or a URL."""
    place = config.checkpoint_dir or str(Path(config.output_dir) / pretrained.CHECKPOINTS)
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _check_seen(folder: Path) -> None:
    """Make sure that a file which the first process writes is seen by all."""
    token = hosts.share(os.urandom(8).hex())
    mark = folder / f".seen-{token}"
    if hosts.first():
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(token)
    hosts.share()
    try:
        hosts.agree({f"checkpoints: seeing what host 0 writes in {folder}": mark.exists()})
    finally:
        if hosts.first():
            mark.unlink()


def _check(setup: Setup, place: str) -> None:
    """Refuse a folder, or checkpoints at `place`, that are not this run's."""
    config, folder = setup.config, Path(setup.config.output_dir)
    record = folder / "config.yaml"
    if record.exists():
        written = yaml.safe_load(record.read_text(encoding="utf-8"))
        fingerprint = written.pop(PROVENANCE, {}).get("data_fingerprint")
        _compare(written | {"data_fingerprint": fingerprint}, setup, folder)
    elif folder.exists() and (not folder.is_dir() or _strangers(folder)):
        raise ConfigError(f"output_dir: {folder} is not empty and holds no run; choose another")
    elif config.resume == "must" and not config.checkpoint_dir:
        raise ConfigError(f"resume: there is no run in {folder}; check output_dir, or use auto")
    _check_place(setup, place)


def _write(setup: Setup, place: str) -> None:
    """What a run folder holds from the start."""
    config, folder = setup.config, Path(setup.config.output_dir)
    record = folder / "config.yaml"
    try:
        content = to_dict(config) | {PROVENANCE: provenance(setup)}
        content["checkpoint_dir"] = place if config.checkpoint_dir else None
        write_file(record, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        data_report.write(folder, setup.data)
        if not setup.template.encoder:
            setup.tokenizer.chat_template = setup.template.jinja
        setup.tokenizer.save_pretrained(str(folder / pretrained.TOKENIZER))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error


def _check_place(setup: Setup, place: str) -> None:
    """Refuse checkpoints of another run, and a place where this run's are no more."""
    before = str(pretrained.checkpoint_dir(Path(setup.config.output_dir).absolute()))
    step, meta = peek(place)
    if step is None and before != place and peek(before)[0] is not None:
        raise ConfigError(
            f"checkpoint_dir: {place} holds no checkpoint, and the run's are in {before}; move "
            "them, or leave it as it was"
        )
    if step is not None and setup.config.checkpoint_dir:
        _compare(meta.get("run", {}), setup, place)


def _strangers(folder: Path) -> list[Path]:
    """What lies in a folder besides the report of `easyaira.inspect`."""
    ours = (*data_report.FILES, LOCK)
    return [path for path in folder.iterdir() if path.name not in ours]


def _compare(saved: Mapping[str, Any], setup: Setup, place: Any) -> None:
    """Refuse a place whose run (its `identity`) computes something else."""
    then, now = (
        flattened({k: v for k, v in content.items() if k not in GROUPS_MAY_CHANGE})
        for content in (saved, identity(setup))
    )
    other_rows = then.pop("data_fingerprint", None) != now.pop("data_fingerprint")
    for key in sorted((then.keys() | now.keys()) - set(MAY_CHANGE)):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: the run in {place} has {then.get(key)!r} and this command "
                f"{now.get(key)!r}; restore it to continue, or choose another output_dir"
            )
    if other_rows:
        raise ConfigError(
            f"data: the run in {place} was trained on other rows than data.train gives now; "
            "restore them to continue, or choose another output_dir"
        )
