"""Folders of releases and conversions: written beside the target, and renamed to it at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from easyaira.errors import ConfigError, StorageError, shown_as
from easyaira.files import lock, named_path, reason, remove
from easyaira.lora.peft import ADAPTER_CONFIG
from easyaira.storage.pretrained import CHECKPOINTS, TOKENIZER, Pretrained, checkpoint_dir

CONFIGS = ("config.json", ADAPTER_CONFIG)
FILES = (  # of a released model; other files are somebody's work
    *CONFIGS,
    *("generation_config.json", "README.md", "proof.json", "export_report.json"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    "additional_chat_templates",
)
CONVERTED = {CHECKPOINTS, TOKENIZER}  # what convert from_hf writes


def target(out: str, origin: Pretrained, overwrite: bool) -> Path:
    """Check the folder that a user names for a model. Nothing is written or removed.

    Args:
        out: its name.
        origin: the model to read, which must not be replaced.
        overwrite: a model folder may be replaced.

    Raises:
        ConfigError: it is a file, a link, the current folder or one above; or it is not empty, and
            either `overwrite` is false, or it holds `origin`, or is not a model folder.
    """
    folder = named_path(out)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out}: is the current folder or one above it; name another folder")
    if folder.is_symlink():  # the link would be replaced
        raise ConfigError(f"{out}: is a link; name the folder that it leads to")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{out}: is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise ConfigError(
            f"{out}: is not empty; choose another folder, or add --overwrite to replace a model"
        )
    kept = f"{out}: is not replaced, as it"
    if held := [
        path for path in _read_for(origin) if path.resolve().is_relative_to(folder.resolve())
    ]:
        raise ConfigError(f"{kept} holds {held[0]}, which is read; choose another folder")
    if (other := _of_no_model(folder)) is not None:
        raise ConfigError(f"{kept} {other}; choose another folder")
    return folder


def _read_for(origin: Pretrained) -> list[Path]:
    """Folders that a model is read from: its own, its checkpoints, and those of its base."""
    base = _read_for(origin.base) if origin.adapter is not None else []
    return [origin.folder, Path(checkpoint_dir(origin.folder)), *base]


def _of_no_model(folder: Path) -> str | None:
    """Why a folder is not just a model folder, or None."""
    names, reason = {path.name for path in folder.iterdir()}, None
    if CHECKPOINTS in names:
        if [path.name for path in (folder / CHECKPOINTS).iterdir()] != ["0"]:
            reason = "is a run folder"
        names -= CONVERTED
        names |= {path.name for path in (folder / TOKENIZER).glob("*")}
    elif not names & {*CONFIGS}:
        reason = "holds no config.json of a model"
    others = {name for name in names if not any(fnmatch(name, known) for known in FILES)}
    return f"holds {min(others)}, which is no part of a model" if others else reason


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Temporary folder that takes the place of `folder` on success and is removed on failure.

    Raises:
        ConfigError: another process is writing `folder`.
        StorageError: it cannot be written.
    """
    new = folder.with_name(f".{folder.name}.easyaira.new")
    old = folder.with_name(f".{folder.name}.easyaira.old")
    try:
        with _locked(new, folder):
            if old.exists() and not folder.exists():  # killed between the two renames below
                old.rename(folder)
            try:
                with shown_as(new, folder):
                    yield new
                if folder.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
                try:
                    new.rename(folder)
                except OSError:
                    if old.exists():
                        old.rename(folder)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: cannot be written: {reason(error)}") from error


@contextmanager
def _locked(new: Path, folder: Path) -> Iterator[None]:
    """Create a folder, lock it against other processes, and empty it of what a killed process has
    left there."""
    new.mkdir(parents=True, exist_ok=True)
    opened = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not lock(opened, fcntl.LOCK_EX):
            raise ConfigError(
                f"{folder}: another process is writing it; wait until it ends, or name another "
                "folder"
            )
        for path in new.iterdir():
            remove(path)
        yield
    finally:
        os.close(opened)
