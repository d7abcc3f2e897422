"""The run folder: its lock, and the check that a command continues the same run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

import yaml

from easyaira.config.run import GROUPS_MAY_CHANGE, MAY_CHANGE, PROVENANCE, RunConfig, to_dict
from easyaira.data import report as data_report
from easyaira.distributed import hosts
from easyaira.errors import ConfigError, EasyAiraError, StorageError, shortened
from easyaira.files import lock, named_path, read_yaml, reason, remove, write_file
from easyaira.run.provenance import completed, flattened, identity, provenance
from easyaira.storage import pretrained
from easyaira.storage.checkpoints import Checkpoints, peek
from easyaira.storage.object_store import locate
from easyaira.storage.tokenizers import save_tokenizer
from easyaira.train import log, metrics
from easyaira.train.best import Best
from easyaira.train.setup import Setup, updates

LOCK = ".lock"  # held by the process that uses the folder
STARTS = {  # samples of weights that a run reads: the option that names them
    "initial_weights": "model.name_or_path",
    "initial_adapter": "lora.adapter",
    "reference_weights": "model.ref_name_or_path",
    "reward_weights": "rl.reward",
    "eval_reward_weights": "rl.eval_reward",
}
LENGTH = ("max_steps", "num_train_epochs")  # options that may make a run longer


@contextmanager
def claimed(setup: Setup) -> Iterator[Checkpoints]:
    """Check that the run folder is new or this run's, lock it, and yield its checkpoints.

    Only the first process uses the folder itself; other processes use the checkpoints alone.

    Raises:
        ConfigError: the folder belongs to another run, holds other files, holds no run although
            resume is must, or is locked by another process; or some host cannot see the
            checkpoints.
        StorageError: the folder cannot be written.
    """
    config, place = setup.config, _place(setup.config)
    with ExitStack() as held:
        if hosts.first():
            _check(setup, place)
            held.enter_context(_locked(Path(config.output_dir)))
            if peek(place)[0] is None:  # before `checkpoints` is made: config.yaml shows a run
                write(setup, finished=False, idle=False)
        if hosts.several() and "://" not in place:
            _check_seen(Path(place))
        checkpoints = Checkpoints(place, keep=config.save_total_limit, write=True)
        if config.resume == "must" and checkpoints.latest() is None:
            raise ConfigError(f"resume: no finished checkpoint in {place}; use auto to start anew")
        yield checkpoints


def refuse_taken(config: RunConfig) -> None:
    """Refuse a run folder that is locked or holds something else.

    Call before joining the cluster, or this process could join a run already in progress, and
    before data are read.

    Raises:
        ConfigError: another process uses the folder, it holds other files and no run, or its
            checkpoints cannot be stored under that name.
    """
    refuse_foreign(config)
    folder = Path(config.output_dir)
    try:
        file = _open_lock(folder, os.O_RDONLY)
    except OSError:
        return  # `_locked` reports unwritable folders
    with file:
        _hold(file, fcntl.LOCK_SH, folder)


def refuse_foreign(config: RunConfig) -> None:
    """Refuse a run folder that holds other files and no run, or is a file; raises ConfigError."""
    folder = Path(config.output_dir)
    locate(_place(config))
    with suppress(OSError, StorageError):  # `claimed` reports unreadable folders
        if _is_foreign(folder) and peek(_place(config))[0] is None:
            raise _no_run(folder)


def _open_lock(folder: Path, how: int) -> TextIO:
    """Open the lock, which is a file of this folder: neither a link out of it nor a pipe."""
    opened = os.open(folder / LOCK, how | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(opened, "r" if how == os.O_RDONLY else "r+", encoding="utf-8", errors="replace")


def _hold(file: TextIO, how: int, folder: Path) -> None:
    if not lock(file, how):
        file.seek(0)
        raise ConfigError(
            f"output_dir: {file.read().strip() or 'another process'} is at work in "
            f"{folder}; wait until it ends, or choose another folder"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a run folder. The system releases the lock of a killed process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_lock(folder, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        link = "; it is a link, remove it" if (folder / LOCK).is_symlink() else ""
        raise StorageError(f"{folder / LOCK}: cannot be opened: {reason(error)}{link}") from error
    with file:
        _hold(file, fcntl.LOCK_EX, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}\n")
        file.flush()
        yield


def is_measured(folder: Path, checkpoints: Checkpoints, step: int) -> bool:
    """False if the last evaluation of a finished run failed or was interrupted."""
    window = metrics.Window(checkpoints.meta(step)["window"])
    return not window.unmeasured or any(
        row["step"] == step and any(name.startswith("eval_") for name in row)
        for row in log.read(folder / "metrics.jsonl")
    )


def stopped_early(config: RunConfig, checkpoints: Checkpoints, step: int | None) -> bool:
    """Whether the held-out metric had stopped improving at the newest checkpoint."""
    if step is None or config.early_stopping_patience is None:
        return False
    return Best(config, metrics.Window(checkpoints.meta(step)["window"]), lambda _: None).exhausted


def _place(config: RunConfig) -> str:
    """Location of the checkpoints: an absolute path or a URL."""
    place = config.checkpoint_dir or str(Path(config.output_dir) / pretrained.CHECKPOINTS)
    return place if "://" in place else str(named_path(place).absolute())


def _check_seen(folder: Path) -> None:
    """Check that every host sees a file that the first process writes."""
    token = hosts.share(os.urandom(8).hex())
    mark = folder / f".seen-{token}"
    if hosts.first():
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(token)
    hosts.share()
    try:
        hosts.agree({f"checkpoints: visibility of host 0's file in {folder}": mark.exists()})
    finally:
        if hosts.first():
            mark.unlink()


def _check(setup: Setup, place: str) -> None:
    """Refuse a folder, or checkpoints at `place`, of another run."""
    config, folder = setup.config, Path(setup.config.output_dir)
    record = folder / "config.yaml"
    if record.exists():
        try:
            saved = _identity_of(record)
            if not _is_untrained(folder, place):
                _compare(saved, setup, folder)
                _say_if_longer(saved, setup)
        except (ConfigError, StorageError) as error:
            _blame(record, error, setup, place)
    elif _is_foreign(folder):
        _blame(record, _no_run(folder), setup, place)
    elif config.resume == "must" and not config.checkpoint_dir:
        raise ConfigError(f"resume: there is no run in {folder}; check output_dir, or use auto")
    _check_place(setup, place)


def _say_if_longer(saved: Mapping[str, Any], setup: Setup) -> None:
    if extra := _added(saved, setup):
        print(
            f"run     is made longer: {setup.total_steps - extra} -> {setup.total_steps} updates; "
            "the rest follows the learning rates of the longer run",
            flush=True,
        )


def _is_untrained(folder: Path, place: str) -> bool:
    """Whether the run that wrote this config.yaml ended before its first checkpoint, even one that
    is damaged, and before its first logged update; such as at a misspelt metric."""
    written, made = _recorded(folder / "config.yaml")
    rows, damaged = log.parse(folder / "metrics.jsonl")
    elsewhere = written.get("checkpoint_dir") not in (None, place)
    logged = bool(damaged) or any(row["step"] > 0 for row in rows)
    saved = any(Path(place).glob("[0-9]*")) or peek(place)[0] is not None
    trained = logged or saved or (folder / "hf").exists()
    return bool(made) and not trained and not elsewhere


def _recorded(record: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and provenance in a config.yaml."""
    written = read_yaml(record, error=StorageError)
    made = written.pop(PROVENANCE, None)
    return written, made if isinstance(made, dict) else {}


def _identity_of(record: Path) -> dict[str, Any]:
    """The identity of the run that wrote this config.yaml."""
    written, made = _recorded(record)
    return written | {name: made.get(name) for name in ("data_fingerprint", *STARTS)}


def _blame(record: Path, error: EasyAiraError, setup: Setup, place: str) -> None:
    """Raise the error of a config.yaml, unless the newest checkpoint shows that the file is wrong.
    Older ones may be of a time when the run was shorter."""
    step, meta = peek(place)
    with suppress(ConfigError):
        if step is not None:
            _compare(meta.get("run") or {}, setup, place)
            print(f"run     {record} is damaged or missing; written again: {error}", flush=True)
            return
    if isinstance(error, StorageError):
        raise StorageError(
            f"{error}, and no checkpoint in {place} is of this command; restore the file, or "
            "choose another output_dir"
        ) from error
    raise error


def write(setup: Setup, finished: bool, idle: bool) -> None:
    """Write config.yaml, the data report and the tokenizer on the first process.

    Args:
        finished: the record of how the run was made stays.
        idle: everything stays, unless config.yaml is damaged or the checkpoints have moved.
    """
    if not hosts.first():
        return
    config, folder = setup.config, Path(setup.config.output_dir)
    place, record = _place(config), folder / "config.yaml"
    recorded = place if config.checkpoint_dir else None
    try:
        made = provenance(setup)
        if record.exists() and peek(place)[0] is not None:
            with suppress(StorageError):  # it is damaged, and the checkpoints are this run's
                written, began = _recorded(record)
                if idle and written.get("checkpoint_dir") == recorded:
                    return
                names = began if finished else STARTS
                made |= {name: began[name] for name in names if began.get(name)}
        content = to_dict(config) | {PROVENANCE: made, "checkpoint_dir": recorded}
        write_file(record, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        data_report.write(folder, setup.data)
        if not setup.template.encoder:
            setup.tokenizer.chat_template = setup.template.released()
        tokenizer, new = folder / pretrained.TOKENIZER, folder / f".{pretrained.TOKENIZER}.new"
        remove(new)
        save_tokenizer(setup.tokenizer, new)
        remove(tokenizer)  # its files could be links
        new.rename(tokenizer)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {reason(error)}") from error


def _check_place(setup: Setup, place: str) -> None:
    """Refuse checkpoints of another run, and a new place while the old one has checkpoints."""
    before = str(pretrained.checkpoint_dir(Path(setup.config.output_dir).absolute()))
    step, meta = peek(place)
    if step is None and before != place and peek(before)[0] is not None:
        raise ConfigError(
            f"checkpoint_dir: {place} holds no checkpoint, but {before} holds this run's; move "
            "them, or restore checkpoint_dir"
        )
    if step is not None and setup.config.checkpoint_dir:
        _compare(meta.get("run", {}), setup, place)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder without config.yaml holds more than a lock and the report of
    `easyaira.inspect`, or is a file."""
    if not folder.exists() or (folder / "config.yaml").exists():
        return False
    ours = (*data_report.FILES, LOCK)
    return not folder.is_dir() or any(path.name not in ours for path in folder.iterdir())


def _no_run(folder: Path) -> ConfigError:
    kind = "is not empty and holds no run" if folder.is_dir() else "is not a folder"
    return ConfigError(f"output_dir: {folder} {kind}; choose another")


def _compare(saved: Mapping[str, Any], setup: Setup, place: Any) -> None:
    """Refuse a place if its run's saved `identity` differs in results from this run's. An option
    that did not exist then counts as its default."""
    then, now = (
        flattened({k: v for k, v in content.items() if k not in GROUPS_MAY_CHANGE})
        for content in (completed(saved, setup.config), identity(setup))
    )
    other_rows = then.pop("data_fingerprint", None) != now.pop("data_fingerprint")
    starts = {name: (then.pop(name, None), now.pop(name, None)) for name in STARTS}
    may_change = {*MAY_CHANGE, *(LENGTH if _added(then, setup) else ())}
    if ("lora" in then) != ("lora" in now):  # null; else there are its options
        kinds = ("all weights", "adapters")
        before, after = kinds if "lora" in then else kinds[::-1]
        raise ConfigError(
            f"lora: the run in {place} trains {before}, and this command {after}; restore it to "
            "continue, or choose another output_dir"
        )
    for key in sorted((then.keys() | now.keys()) - may_change):
        if then.get(key) != now.get(key):
            values = (json.dumps(tree.get(key), default=str) for tree in (then, now))
            before, after = map(shortened, values)
            raise ConfigError(
                f"{key}: the run in {place} was started with {before}, this command says {after}; "
                "restore it to continue, or choose another output_dir"
            )
    if other_rows:
        raise ConfigError(
            f"data: the run in {place} was trained on other rows than data.train gives now; "
            "restore them to continue, or choose another output_dir"
        )
    for name, (before, sample) in starts.items():
        if before and before != sample and _is_read_again(name, setup.config):
            raise ConfigError(
                f"{STARTS[name]}: {attrgetter(STARTS[name])(setup.config)} has other weights than "
                f"when the run in {place} began; restore the original ones to continue, or choose "
                "another output_dir"
            )


def _is_read_again(name: str, config: RunConfig) -> bool:
    """Whether a resumed run reads these weights of STARTS again. Log-probabilities that are
    computed before the first update have their own check."""
    dpo, rl = getattr(config, "dpo", None), getattr(config, "rl", None)
    in_step = dpo and dpo.reference == "model" and not dpo.precompute_ref_log_probs
    return bool(in_step or rl and (rl.beta or STARTS[name].startswith("rl.")))


def _added(then: Mapping[str, Any], setup: Setup) -> int:
    """Updates that this command adds to a run of the options `then`. 0 if it has as many or fewer,
    or is on-policy, where the last rollout may have been cut short."""
    try:
        before = replace(setup.config, **{name: then[name] for name in LENGTH})
        count = updates(before, len(setup.batches))
    except (KeyError, TypeError, ValueError, ConfigError):  # a damaged record
        return 0
    return 0 if hasattr(setup.config, "rl") else max(0, setup.total_steps - count)
