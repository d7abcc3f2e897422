"""The cache, and the tokenised data in it: one folder per source.

An entry is a folder whose name, its key, hashes everything that decides its content. For tokens:
contents, columns, tokenizer, template, lengths, this code, and with data.deduplicate the sources
before it. A rename creates the folder atomically, so several processes may build it at once;
afterwards, all of them memory-map the same files. Hashes of all files lie in the folder, and are
compared whenever it is opened."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from easyaira.config.data import DataConfig, Source
from easyaira.data import examples, sources, tokenise
from easyaira.data.examples import Account, Examples
from easyaira.data.recipe import Recipe
from easyaira.data.template import Template
from easyaira.distributed import hosts
from easyaira.errors import StorageError
from easyaira.files import named_path, parse_json, read_file, reason, write_file

HASHES = "sha256.json"  # key of an entry and hashes of its files


def cache_root(cache_dir: str | None = None) -> Path:
    """Root folder of the cache; `cache_dir` is data.cache_dir."""
    if cache_dir:
        return named_path(cache_dir)
    if root := os.environ.get("EASYAIRA_CACHE"):
        return named_path(root)
    return named_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "easyaira"


def cache_folder(cache_dir: str | None, *names: str) -> Path:
    """Create a folder of the cache, accessible only by the user: compiled programs in it are run.

    Raises:
        StorageError: the folder cannot be created.
    """
    folder = cache_root(cache_dir).joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise cache_error(folder, error) from error
    return folder


def keep_compiled(cache_dir: str | None = None) -> None:
    """Enable JAX's compilation cache for later commands on this machine, unless it is configured.
    Where it cannot be kept, say so.

    Compiled programs are code, so the folder is private to the user. With several processes, JAX
    lets only the first one write, so a cache needs a folder that all hosts see: the user must
    configure it."""
    if jax.config.jax_compilation_cache_dir is None and not hosts.several():
        try:
            folder = cache_folder(cache_dir, "programs", platform.node())
        except StorageError as error:
            line = f"note: programs are compiled anew by each command: {error}"
            print(line, file=sys.stderr, flush=True)  # standard output may be an answer
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cache_error(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder}: cannot be written: {reason(error)}; set EASYAIRA_CACHE or data.cache_dir"
    )


def kept(root: Path, key: str) -> Path | None:
    """Folder of the entry `key` if all its files are intact.

    A damaged entry is reported and removed."""
    folder = root / key
    if not folder.exists():
        return None
    try:
        if problem := _damage(folder):
            raise ValueError(problem)
        return folder
    except (OSError, ValueError) as error:
        print(f"cache   {folder} is damaged ({reason(error)}); made again", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def add(root: Path, key: str, build: Callable[[Path], Any]) -> Path:
    """Build the entry `key` and return its folder, which appears complete or not at all.

    Raises:
        StorageError: the cache cannot be written.
    """
    building, folder = None, root / key
    try:
        building = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
        build(building)
        write_file(building / HASHES, json.dumps({"key": key, "sha256": _hashes(building)}))
        try:
            building.rename(folder)
        except OSError:
            # otherwise, another process built the same entry first
            if not folder.exists() or _damage(folder):
                raise
    except OSError as error:
        raise cache_error(root, error) from error
    finally:
        if building:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != HASHES:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _damage(folder: Path) -> str | None:
    """What differs between an entry and its hashes, if anything."""
    written = parse_json(read_file(folder / HASHES))
    if not isinstance(written, dict) or written.get("key") != folder.name:
        return f"{HASHES} is of another entry"
    now, then = _hashes(folder), written.get("sha256")
    if now == then:
        return None
    names = sorted(now.keys() | then.keys()) if isinstance(then, dict) else [HASHES]
    return next(n for n in names if n == HASHES or now.get(n) != then.get(n)) + " has changed"


class Earlier(NamedTuple):
    """A source that was read before, whose rows are not repeated (data.deduplicate).

    Attributes:
        key: of its entry in the cache.
        ids: of its examples.
        reason: to drop a row that repeats one of them.
    """

    key: str
    ids: np.ndarray
    reason: str = examples.REPEATED


def cached_source(
    source: Source,
    config: DataConfig,
    recipe: Recipe,
    template: Template,
    label: str,
    limit: int | None,
    earlier: list[Earlier],
) -> tuple[Examples, Account]:
    """Examples of a source from the cache; on a miss, build them first.

    Args:
        earlier: sources that decide which rows are repeats. This one is appended.
    """
    root = cache_folder(config.cache_dir, "tokens")
    key = _key(source, recipe, template, limit, earlier)

    def build(folder: Path) -> None:
        rows = islice(sources.read(source), limit)
        known = {example: other.reason for other in earlier for example in other.ids.tolist()}
        tokenise.build(rows, folder, recipe=recipe, template=template, label=label, known=known)

    part, account = examples.open_folder(kept(root, key) or add(root, key, build))
    if recipe.deduplicate:
        earlier.append(Earlier(key, part.ids))
    return part, account


DECIDES_TOKENS = (  # files of data/ that determine tokens
    "sources",
    "formats",
    "folders",
    "columns",
    "record",
    "answers",
    "chat_templates",
    "rendering",
    "layout",
    "plain_text",
    "template",
    "texts",
    "examples",
    "recipe",
    "truncate",
    "shown",
    "tokenise",
)


def _key(
    source: Source,
    recipe: Recipe,
    template: Template,
    limit: int | None,
    earlier: Sequence[Earlier] = (),
) -> str:
    content = sources.content_key(source)
    if content is None:  # streamed data has no hash before it is read
        content = os.urandom(16).hex()
    digest = hashlib.sha256()
    for name in DECIDES_TOKENS:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    digest.update(json.dumps([content, source.path, limit, asdict(recipe)]).encode())
    digest.update(template.fingerprint().encode())
    for other in earlier:
        digest.update(f"{other.key} {other.reason}".encode())
    return digest.hexdigest()[:32]
