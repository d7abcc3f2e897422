"""Data files of a folder or a pattern, and their splits; folders that the package datasets saved.

Names are read as `datasets` reads them: a README's `configs:`, else words like train and test;
`held_out`, which our commands write, is one of them here.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyaira.errors import DataError, UnsafeInputError
from easyaira.files import decoded, parse_yaml, read_file, read_json, reason

SPLITS = {  # word in a name -> split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("held_out", "held-out", "heldout", "holdout"), "validation"),  # of ours
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORD = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(SPLITS)})(?=[-._ 0-9/]|$)")
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def is_pattern(path: str) -> bool:
    return glob.has_magic(path)


def files_matching(pattern: Path, split: str, endings: Sequence[str]) -> list[Path]:
    """Data files that match a pattern, in order; of several splits, those of `split`.

    Raises:
        DataError: no file matches, or none is of the split.
    """
    paths = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    files = _data_files(paths, endings)
    if not files:
        raise DataError(f"{pattern}: no data file matches; wanted {', '.join(endings)}")
    splits = {_split_of(file.name) for file in files}
    return files if len(splits) == 1 and split == "train" else _of_split(pattern, files, split)


def files_of(folder: Path, split: str, endings: Sequence[str]) -> list[Path]:
    """Data files of a split of a folder, in order.

    Raises:
        DataError: there is no such file.
        UnsafeInputError: the README names files outside the folder.
    """
    if patterns := _configured(folder):
        wanted = SPLITS.get(split, split)
        if split not in patterns and wanted not in patterns:
            raise _no_split(folder, split, patterns)
        names = patterns.get(split) or patterns[wanted]
        files = sorted({file for name in names for file in folder.glob(name) if file.is_file()})
        if not files:
            raise DataError(f"{folder}: no file {', '.join(names)}, which README.md names")
        return files
    for level in ("*", "data/*", "*/*"):
        if files := _data_files(sorted(folder.glob(level)), endings):
            return _of_split(folder, files, split)
    raise DataError(f"{folder}: no data file in this folder; wanted {', '.join(endings)}")


def _data_files(paths: Iterable[Path], endings: Sequence[str]) -> list[Path]:
    """The files that hold rows; hidden ones and descriptions of a data set hold none."""
    return [
        path
        for path in paths
        if path.name.endswith(tuple(endings))
        and not path.name.startswith((".", "_"))
        and path.name not in NO_DATA
        and path.is_file()
    ]


def _split_of(name: str) -> str | None:
    """The split named by a file's path below the given folder; None if it names none."""
    if shard := SHARD.match(name):
        return SPLITS.get(shard[1], shard[1])
    words = WORD.findall(name.lower())
    return SPLITS[words[-1]] if words else None


def _of_split(place: Path, files: Sequence[Path], split: str) -> list[Path]:
    """The files of a split; those whose names tell none belong to train."""
    named = {
        file: _split_of(file.relative_to(place).as_posix() if place.is_dir() else file.name)
        for file in files
    }
    if not any(named.values()) and split != "train":
        raise DataError(f"{place}: has no splits; leave out split {split!r}")
    wanted = SPLITS.get(split, split)
    kept = [file for file in files if (named[file] or "train") == wanted]
    if not kept:
        raise _no_split(place, split, sorted({name or "train" for name in named.values()}))
    return kept


def _no_split(place: Path, split: str, splits: Iterable[str]) -> DataError:
    return DataError(f"{place}: no split {split!r}; set data.split to one of {', '.join(splits)}")


def _configured(folder: Path) -> dict[str, list[str]]:
    """Split -> patterns of files, from `configs:` at the top of a README.md; empty without it."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    try:
        head = re.match(r"\ufeff?---\n(.*?)\n---", decoded(read_file(readme)), re.DOTALL)
        header = parse_yaml(head[1]) if head else None
    except (OSError, ValueError) as error:
        raise DataError(f"{readme}: cannot be read: {reason(error)}") from error
    configs = header.get("configs") if isinstance(header, Mapping) else None
    if not configs:
        return {}
    try:
        return _patterns(readme, configs)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{readme}: configs: expected config_name and data_files") from error


def _patterns(readme: Path, configs: Any) -> dict[str, list[str]]:
    named = {config.get("config_name", "default"): config for config in configs}
    chosen = named.get("default") or next((c for c in configs if c.get("default")), None)
    if chosen is None and len(named) > 1:
        raise DataError(
            f"{readme}: has the configurations {', '.join(named)}; give the files of one, such as "
            f"{readme.parent}/NAME/*"
        )
    chosen = chosen or configs[0]
    data_files = chosen.get("data_files")
    if data_files is None:
        return {}
    parts = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for part in parts:
        split, names = (part["split"], part["path"]) if isinstance(part, dict) else ("train", part)
        for name in names if isinstance(names, list) else [names]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UnsafeInputError(
                    f"{readme}: data_files: {name} leads out of the folder; name files inside"
                )
            patterns.setdefault(split, []).append(name)
    return patterns


def is_saved(folder: Path) -> bool:
    """Whether the package datasets saved this folder."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def saved(folder: Path, split: str) -> Path:
    """The folder of a split of a saved data set, all of whose files lie in it.

    Raises:
        DataError: there is no such split, or a description is damaged.
        UnsafeInputError: a file lies outside the folder.
    """
    if (folder / "dataset_dict.json").exists():
        splits = read_json(folder / "dataset_dict.json", error=DataError).get("splits")
        if not isinstance(splits, list) or split not in splits:
            raise DataError(f"{folder}: no split {split!r}; set data.split to one of {splits}")
        inner = folder / split
    elif split != "train":
        raise DataError(f"{folder}: has no splits; leave out split {split!r}")
    else:
        inner = folder
    state = read_json(inner / "state.json", error=DataError)
    listed = [state.get(key) or [] for key in ("_data_files", "_indices_data_files")]
    if not all(isinstance(files, list) for files in listed):
        raise DataError(f"{inner / 'state.json'}: expected lists of files; save the data set again")
    names = [file.get("filename") for files in listed for file in files if isinstance(file, dict)]
    for path in (inner, *(inner / str(name) for name in names)):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UnsafeInputError(
                f"{inner / 'state.json'}: {path} lies outside the folder; save the data set again"
            )
    return inner
