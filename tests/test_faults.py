"""Damaged files of caches and run folders: the same result, or an error that names the file."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from easyaira.config.data import DataConfig, Source
from easyaira.data import cache
from easyaira.data.examples import PER_EXAMPLE, PER_TOKEN
from easyaira.data.recipe import Recipe
from easyaira.data.template import Template
from helpers import tiny
from helpers.damage import DAMAGES

CACHED = [f"{n}.npy" for n in PER_EXAMPLE] + [f"{n}.bin" for n in PER_TOKEN]
CACHED += ["account.json", cache.HASHES]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Reads a source through a cache: call it with the cache's folder."""
    rows = tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.sft_rows(20))
    template = Template(tiny.tokenizer(), "plain", "gpt2", [])

    def read(root):
        config = DataConfig(train=str(rows), cache_dir=str(root))
        recipe = Recipe("conversation", 64)
        return cache.cached_source(Source(str(rows)), config, recipe, template, "train", None)

    return read


@pytest.fixture(scope="module")
def written(tokens, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    tokens(root)
    return root


def same_examples(one, other):
    for name in (*PER_EXAMPLE, *PER_TOKEN):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def entry_of(root, kind):
    (entry,) = (root / kind).iterdir()
    return entry


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CACHED)
def test_damaged_tokens_are_made_again(name, damage, tokens, written, tmp_path, capsys):
    before = tokens(written)
    shutil.copytree(written, tmp_path / "cache")
    DAMAGES[damage](entry_of(tmp_path / "cache", "tokens") / name)
    capsys.readouterr()
    after = tokens(tmp_path / "cache")
    same_examples(after[0], before[0])
    assert after[1] == before[1]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and " is damaged (" in said and "made again" in said


def test_the_tokens_of_another_key_are_not_read(tokens, written, tmp_path, capsys):
    shutil.copytree(written, tmp_path / "cache")
    entry = entry_of(tmp_path / "cache", "tokens")
    before = tokens(written)
    other = entry.with_name("0" * 32)
    cache.add(other.parent, other.name, lambda folder: np.save(folder / "tokens.npy", [1]))
    shutil.rmtree(entry)
    other.rename(entry)
    same_examples(tokens(tmp_path / "cache")[0], before[0])
    assert "is of another entry" in capsys.readouterr().out


def test_a_damaged_entry_that_cannot_be_removed_is_not_read(tokens, written, tmp_path, monkeypatch):
    shutil.copytree(written, tmp_path / "cache")
    entry = entry_of(tmp_path / "cache", "tokens")
    (entry / "tokens.bin").write_bytes(b"")
    real = shutil.rmtree
    keep = lambda path, **options: Path(path) != entry and real(path, **options)  # noqa: E731
    monkeypatch.setattr(shutil, "rmtree", keep)
    with pytest.raises(cache.StorageError, match="cannot be written: Directory not empty"):
        tokens(tmp_path / "cache")
