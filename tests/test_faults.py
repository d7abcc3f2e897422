"""Damaged files of caches and run folders: the same result, or an error that names the file."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from easyaira import train_dpo
from easyaira.config.data import DataConfig, Source
from easyaira.config.model import ModelConfig
from easyaira.config.run import TrainSFT
from easyaira.data import cache
from easyaira.data.examples import PER_EXAMPLE, PER_TOKEN
from easyaira.data.recipe import Recipe
from easyaira.data.template import Template
from easyaira.distributed import mesh as meshes
from easyaira.errors import Preempted, StorageError
from easyaira.run import folder as run_folder
from easyaira.run.samples import Samples
from easyaira.train import log as logs
from helpers import tiny
from helpers.damage import DAMAGES
from helpers.processes import call
from helpers.runs import argv, stop_after

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
        return cache.cached_source(Source(str(rows)), config, recipe, template, "train", None, [])

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
@pytest.mark.slow
def test_damaged_tokens_are_made_again(name, damage, tokens, written, tmp_path, capsys):
    before = tokens(written)
    shutil.copytree(written, tmp_path / "cache")
    DAMAGES[damage](entry_of(tmp_path / "cache", "tokens") / name)
    capsys.readouterr()
    after = tokens(tmp_path / "cache")
    same_examples(after[0], before[0])
    assert after[1] == before[1]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and " is damaged (" in out and "made again" in out


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


def test_programs_are_compiled_without_a_cache_that_cannot_be_written(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EASYAIRA_CACHE", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        cache.keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    line = f"note: programs are compiled anew by each command: {tmp_path / 'file'}"
    captured = capsys.readouterr()
    assert captured.err.startswith(line) and not captured.out


# ---------------------------------------------------------------------------------------------
# metrics.jsonl


ROWS = [{"step": step, "loss": step / 10} for step in range(6)]
LINES = [json.dumps(row).encode() for row in ROWS]


def started(path, *, step=5, logged=5):
    """Rows that are left when a run continues after an update."""
    with closing(logs.Log(path.parent, step, 9, False, logged)):
        return logs.read(path)


@pytest.mark.parametrize(
    "bad",
    [
        b"[" + LINES[2][1:],
        LINES[2].replace(b"step", b"stap"),
        LINES[2].replace(b"2", b"\xff", 1),
        LINES[2].replace(b"2", b'"2"', 1),
        LINES[2].replace(b"2", b"true", 1),
        LINES[2].replace(b"0.2", b"[0.2]", 1),
        LINES[2][:9],
        b"[" * 100_000,
        bytes(30),
        b"",
        b"2",
    ],
    ids=lambda bad: repr(bad[:20]),
)
def test_a_damaged_line_of_metrics_is_named_and_takes_no_other_with_it(bad, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES[:2], bad, *LINES[3:], b""]))
    before = path.read_bytes()
    assert started(path) == [row for row in ROWS if row["step"] != 2]
    out = capsys.readouterr().out
    assert f"warning: {path}: lost or unreadable: line 3; the file is kept as" in out
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


@pytest.mark.parametrize("damage", ["zero", "empty", "delete", "cut", "pipe"])
def test_a_run_continues_without_its_metrics_and_says_so(damage, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES, b""]))
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        DAMAGES[damage](path)
    assert started(path) == (ROWS[:3] if damage == "cut" else [])
    assert f"warning: {path}: lost or unreadable: " in capsys.readouterr().out


def test_a_last_line_that_a_crash_has_cut_is_no_damage(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(LINES[5])):
        path.write_bytes(b"\n".join([*LINES[:5], LINES[5][:cut]]))
        assert started(path, step=4, logged=4) == ROWS[:5]
    assert not capsys.readouterr().out and not (tmp_path / "metrics.jsonl.damaged").exists()


# ---------------------------------------------------------------------------------------------
# the run folder


FEW = {"data.eval": 0.1, "max_steps": 6, "save_steps": 2, "num_samples": 2}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A model and data, a run that was stopped after update 3, and the weights it must reach."""
    root = tmp_path_factory.mktemp("ground")
    tiny.ground(root, {"gpt2": tiny.CONFIGS["gpt2"]}, dpo=tiny.dpo_rows(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYAIRA_CACHE", str(root / "cache"))
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        train_dpo.main(command(root, root / "straight"))
        stop_after(patch, 3)
        with pytest.raises(Preempted, match="SIGTERM after update 3"):
            train_dpo.main(command(root, root / "stopped"))
    return root


def command(ground, run):
    return argv("dpo", ground / "gpt2", ground, run, **FEW)


def weights(run):
    sums = json.loads((run / "checkpoints/6/sums/metadata").read_text())
    return {name: value for name, value in sums.items() if "/" in name}


RECORDS = {  # files that one fault may damage together: none is read to make up for another
    "configuration": ["config.yaml", ".lock"],
    "others": [
        *("metrics.jsonl", "data_report.html", "data_report.json"),
        *("reference.json", "samples.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", RECORDS)
def test_a_run_with_a_damaged_record_reaches_the_same_weights(
    name, damage, ground, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("EASYAIRA_CACHE", str(ground / "cache"))
    run = tmp_path / "run"
    shutil.copytree(ground / "stopped", run)
    for file in RECORDS[name]:
        DAMAGES[damage](run / file)
    capsys.readouterr()
    if name == "configuration" and damage == "flip":
        text = (ground / "stopped/config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("seed: 42", "seed: 43"))
    status, out, err = call(train_dpo.main, command(ground, run), capsys)
    assert status == 0, err
    assert weights(run) == weights(ground / "straight")
    for file in ("config.yaml", "samples.json", "reference.json"):
        if file in RECORDS[name] and damage in ("zero", "empty"):
            assert str(run / file) in out
    steps = [row["step"] for row in logs.read(run / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-3:] == [4, 5, 6]


@pytest.mark.slow
def test_checkpoints_of_another_command_do_not_replace_a_damaged_configuration(
    ground, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("EASYAIRA_CACHE", str(ground / "cache"))
    run = tmp_path / "run"
    shutil.copytree(ground / "stopped", run)
    (run / "config.yaml").write_bytes(b"")
    status, _, err = call(train_dpo.main, [*command(ground, run), "--seed=44"], capsys)
    assert status == 4 and err.count("\n") == 1
    assert f"error: {run}/config.yaml: " in err and "no checkpoint in" in err


def recalled(tmp_path, text, *prompts):
    """Rows of a run that continues after update 4."""
    samples = Samples.__new__(Samples)
    samples.file = tmp_path / "samples.json"
    samples.rows = [{"prompt": p, "wanted": "w", "answers": {}} for p in prompts]
    samples.file.write_text(text)
    samples._recall(4)
    return samples.rows


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "{}", "[1]", '[{"prompt": 1}]', '[{"rows": "x"}]', "[[]]", "\x00" * 20),
        '[{"prompt": "p", "wanted": "w", "answers": {"x": "y"}}]',
        '[{"prompt": "p", "wanted": "w", "answers": {"0": 1}}]',
        '[{"prompt": "p", "wanted": "w", "answers": {"' + "9" * 5000 + '": "y"}}]',
    ],
)
def test_damaged_answers_are_left_out(text, tmp_path, capsys):
    assert recalled(tmp_path, text, "p") == [{"prompt": "p", "wanted": "w", "answers": {}}]
    assert str(tmp_path / "samples.json") in capsys.readouterr().out


def test_answers_to_other_prompts_and_of_lost_updates_are_left_out(tmp_path):
    saved = [{"prompt": "b", "wanted": "w", "answers": {"0": "x", "4": "y", "6": "z"}}]
    rows = recalled(tmp_path, json.dumps(saved), "a", "b")
    assert [row["answers"] for row in rows] == [{}, {"0": "x", "4": "y"}]


# ---------------------------------------------------------------------------------------------
# links and pipes in a folder that somebody else has made


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_the_lock_is_a_file_of_the_folder(kind, tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    victim.write_text("mine")
    (folder / ".lock").symlink_to(victim) if kind == "link" else os.mkfifo(folder / ".lock")
    config = TrainSFT(ModelConfig("m"), DataConfig("d"), output_dir=str(folder))
    run_folder.refuse_taken(config)  # neither waits nor raises
    with pytest.raises(StorageError, match=r"run/\.lock: .*(it is a link, remove|not a regular)"):
        with run_folder._locked(folder):
            pass
    assert victim.read_text() == "mine"


@pytest.mark.slow
def test_nothing_outside_a_run_folder_is_written(ground, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EASYAIRA_CACHE", str(ground / "cache"))
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(ground / "stopped", run)
    names = [n for files in RECORDS.values() for n in files if n != ".lock"]
    names += [".config.yaml.new", "report.html"]
    outside.mkdir()
    for name in names:
        victim = outside / Path(name).name
        if (run / name).exists():
            (run / name).rename(victim)
        else:
            victim.write_text("mine")
        (run / name).symlink_to(victim)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    status, _, err = call(train_dpo.main, command(ground, run), capsys)
    assert status == 0, err
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert weights(run) == weights(ground / "straight")


@pytest.mark.slow
def test_refusals_are_measured():
    """The script of docs/reliability.md, for the two cheapest that are hostile."""
    script = Path(__file__).parents[1] / "scripts/refusals.py"
    done = subprocess.run(
        [sys.executable, str(script), "--only", "yaml: n"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| yaml")]
    assert [row.split("|")[2].strip() for row in rows] == ["2", "2"]
    assert "not UTF-8: byte 0xe7" in done.stderr and "nested too deeply" in done.stderr
