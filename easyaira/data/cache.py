"""Cache of tokenised data: one folder per source.

A folder's key hashes everything that determines its tokens: contents, columns, tokenizer, template,
lengths, and this code. A rename creates the folder atomically, so several processes may build it at
once; afterwards, all of them memory-map the same files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from easyaira.config.data import DataConfig, Source
from easyaira.data import examples, sources, tokenise
from easyaira.data.examples import Account, Examples
from easyaira.data.recipe import Recipe
from easyaira.data.template import Template
from easyaira.errors import StorageError


def cache_root(config: DataConfig) -> Path:
    """Root folder of the cache."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    if root := os.environ.get("EASYAIRA_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "easyaira"


def cache_folder(config: DataConfig, *names: str) -> Path:
    """Create a folder of the cache, accessible only by the user: compiled programs in it are run.

    Raises:
        StorageError: the folder cannot be created.
    """
    folder = cache_root(config).joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise cache_error(folder, error) from error
    return folder


def cache_error(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"{folder}: cannot be written: {error}; set data.cache_dir")


def cached_source(
    source: Source,
    config: DataConfig,
    recipe: Recipe,
    template: Template,
    label: str,
    limit: int | None,
) -> tuple[Examples, Account]:
    """Examples of a source from the cache; on a miss, build them first."""
    root = cache_folder(config, "tokens")
    key = _key(source, recipe, template, limit)
    folder = root / key
    if folder.exists():
        try:
            return examples.open_folder(folder)
        except (OSError, ValueError, KeyError) as error:
            print(f"data    the cache {folder} is damaged; rebuilding it: {error}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        building = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    except OSError as error:
        raise cache_error(root, error) from error
    try:
        rows = islice(sources.read(source), limit)
        tokenise.build(rows, building, recipe=recipe, template=template, label=label)
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise, another process built the same folder first
                raise
    except OSError as error:
        raise cache_error(root, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return examples.open_folder(folder)


DECIDES_TOKENS = (  # files of data/ that determine tokens
    "sources",
    "folders",
    "columns",
    "chat_templates",
    "rendering",
    "layout",
    "plain_text",
    "template",
    "examples",
    "recipe",
    "truncate",
    "tokenise",
)


def _key(source: Source, recipe: Recipe, template: Template, limit: int | None) -> str:
    content = sources.content_key(source)
    if content is None:  # streamed data has no hash before it is read
        content = os.urandom(16).hex()
    digest = hashlib.sha256()
    for name in DECIDES_TOKENS:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    digest.update(json.dumps([content, source.path, limit, asdict(recipe)]).encode())
    digest.update(template.fingerprint().encode())
    return digest.hexdigest()[:32]
