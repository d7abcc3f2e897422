"""Reads and writes of small files. Files may be damaged or malicious: reads are bounded."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from easyaira.errors import ConfigError, EasyAiraError, UnsafeInputError, kind_of, shortened

MAX_BYTES = 64 * 2**20
MAX_YAML_BYTES = 2**20
MAX_YAML_NODES = 100_000  # with every alias written out


def named_path(text: str) -> Path:
    """The path of a file or folder that a user names; ~ is the home folder, also where no shell
    has replaced it, as in a YAML file or after `--output=`.

    Raises:
        ConfigError: the name is empty, which would be the current folder, or too long.
    """
    if not text.strip():
        raise ConfigError("found an empty text where a file or folder is named; name it")
    path = Path(os.path.expanduser(text))  # Path.expanduser fails for ~nobody
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ConfigError(f"{shortened(text)}: is too long for the name of a file or folder")
    return path


def write_file(path: Path, text: str) -> None:
    """Replace `path` atomically: a crash leaves either the old text or the new one.

    Neither `path` nor the temporary file is written through a symbolic link."""
    new = path.with_name(f".{path.name}.new")
    with open_new(new) as file:
        file.write(text)
    os.replace(new, path)


def open_new(path: Path) -> TextIO:
    """Open an empty file for text; a file or link that is there is removed, not followed."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return open(os.open(path, flags, 0o666), "w", encoding="utf-8")


def lock(opened: Any, how: int) -> bool:
    """Lock an open file or folder without waiting; False if another process holds it. The system
    releases the lock of a killed process.

    On a file system without locks (Lustre without flock, NFS without lockd) every process passes.
    """
    try:
        fcntl.flock(opened, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that it holds, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe, a device or a folder, or larger than `limit`.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit >> 20} MiB")
    return content


def check_links(folder: Path, suffixes: Iterable[str]) -> None:
    """Check that files of a folder are no links out of it, other than into a cache of the hub.

    Their text may be printed or released, and a link may lead to any file of this machine.

    Raises:
        UnsafeInputError: names the link.
    """
    root = folder.resolve()
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    for path in (p for p in paths if p.suffix in suffixes and p.is_symlink()):
        target = path.resolve()
        cached = re.search(r"/models--[^/]+/blobs/[^/]+$", target.as_posix())
        if not target.is_relative_to(root) and not cached:
            raise UnsafeInputError(
                f"{path}: is a link to {target}, outside the folder; put a copy in its place"
            )


def read_json(
    path: Path, kind: type = dict, *, error: type[EasyAiraError] = ConfigError, hint: str = ""
) -> Any:
    """Read a JSON file that holds a `kind`.

    Raises:
        error: it cannot be read, is not JSON, or holds something else; `hint` ends the message.
    """
    try:
        content = parse_json(read_file(path))
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {reason(problem)}{hint}") from problem
    if not isinstance(content, kind):
        raise error(f"{path}: holds {kind_of(content)}, expected {kind_of(kind())}{hint}")
    return content


def decoded(text: bytes) -> str:
    """Decode UTF-8.

    Raises:
        ValueError: it is not UTF-8; the message says where.
    """
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"not UTF-8: byte {byte:#x} at {error.start}; re-encode it") from error


def lone_surrogate(text: str) -> int | None:
    """Where the text has half of a surrogate pair, which is no character and no UTF-8; or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def json_line(row: Mapping[str, Any]) -> str:
    """Line of a JSONL file that `parse_json` can read. Values that JSON lacks become text; bytes
    become base64."""
    try:
        line = json.dumps(row, ensure_ascii=False, default=_text, allow_nan=False)
    except ValueError:  # NaN or an infinity
        row = json.loads(json.dumps(row, default=_text), parse_constant=str)
        line = json.dumps(row, ensure_ascii=False)
    if lone_surrogate(line) is not None:
        line = json.dumps(row, default=_text)
    return line + "\n"


def _text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def parse_json(text: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: not UTF-8, not JSON, a key twice in one object, or nested too deeply.
    """
    content = decoded(text)
    try:
        return json.loads(content, object_pairs_hook=no_key_twice)
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    except ValueError as error:  # also a key twice, or a number of too many digits
        raise ValueError(f"not JSON: {error}") from error


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook of a JSON decoder that refuses a key that occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return content


def read_yaml(
    path: Path, *, error: type[EasyAiraError] = ConfigError, repeated: list[str] | None = None
) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        repeated: collects keys that occur twice instead of raising; the last value counts.

    Raises:
        error: it cannot be read, is not YAML or no mapping, or has a key twice; with the line.
    """
    try:
        text = decoded(read_file(path, MAX_YAML_BYTES)).removeprefix("\ufeff")
        content = parse_yaml(text, repeated)
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {reason(problem)}") from problem
    if content is None:
        raise error(f"{path}: is empty; expected options as `name: value`")
    if not isinstance(content, dict):
        raise error(f"{path}: expected options as `name: value`, found {kind_of(content)}")
    return content


def parse_yaml(text: str, repeated: list[str] | None = None) -> Any:
    """Parse YAML of plain values.

    Args:
        repeated: as of `read_yaml`.

    Raises:
        ValueError: not YAML, a key twice in one mapping, aliases that expand without bound, or a
            number that YAML reads in another base; with the line.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _nodes(node, {}, repeated)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(reason(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def yaml_line(path: Path, keys: Sequence[str]) -> int | None:
    """The line of the innermost of nested `keys` that a readable YAML file has, or None.

    A number is the index of an entry of a list."""
    node, line = (
        yaml.compose(decoded(read_file(path)).removeprefix("\ufeff"), yaml.SafeLoader),
        None,
    )
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        matches = [pair for pair in pairs if pair[0].value == key]
        if not matches:
            break
        name, node = matches[0]
        line = name.start_mark.line + 1
    return line


# A leading 0 means base 8, and a colon base 60; on the command line they do not.
OTHER_BASE = re.compile(r"[-+]?0[0-7_]+|.*:.*")
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _nodes(node: yaml.Node, known: dict[int, int], repeated: list[str] | None) -> int:
    """Count the nodes below `node`, every alias written out, and check its keys."""
    line = f"line {node.start_mark.line + 1}: "
    if id(node) in known:
        if known[id(node)] < 0:
            raise ValueError(f"{line}an alias contains itself")
        return known[id(node)]
    known[id(node)] = -1
    count = 1
    if isinstance(node, yaml.MappingNode):
        seen = {}
        for key, value in node.value:
            first = seen.setdefault((key.tag, str(key.value)), key)
            if first is not key and key.value != "<<":
                if repeated is None:
                    raise ValueError(
                        f"line {key.start_mark.line + 1}: the key {key.value!r} is set in line "
                        f"{first.start_mark.line + 1}, too; remove one"
                    )
                repeated.append(str(key.value))
            count += _nodes(key, known, repeated) + _nodes(value, known, repeated)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_nodes(item, known, repeated) for item in node.value)
    elif OTHER_BASE.fullmatch(node.value) and node.tag in NUMBER_TAGS:
        number = yaml.safe_load(node.value)
        raise ValueError(f"{line}YAML reads {node.value} as {number}; write that, or quote it")
    if count > MAX_YAML_NODES:
        raise ValueError(f"{line}more than {MAX_YAML_NODES} values with its aliases written out")
    known[id(node)] = count
    return count


def reason(error: BaseException) -> str:
    """The first line of an error, or its name if it has no text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
