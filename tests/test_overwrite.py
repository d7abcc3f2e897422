"""`convert OUT --overwrite`: a model is replaced by a complete one, and nothing else is removed."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyaira import cli, convert
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError
from easyaira.export import replace, torch_check
from easyaira.hf import safetensors
from easyaira.storage import checkpoints
from helpers import easylm, runs, tiny, whole

CONFIG = tiny.CONFIGS["llama"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """What each command reads, its arguments, and a model of each form to be replaced."""
    root = tmp_path_factory.mktemp("ground")
    for name, std in (("llama", 0.2), ("older", 0.1)):
        tiny.save(root / name, CONFIG, std=std)
    whole.save(root / "whole", "mistral3")
    state = {name: p.numpy() for name, p in tiny.torch_model(CONFIG).state_dict().items()}
    params = easylm.params_of(state, CONFIG["hidden_size"] // CONFIG["num_attention_heads"])
    (root / "streaming_params").write_bytes(easylm.stream(params))
    assert call("from_hf", root / "llama", root / "ours") == 0
    assert call("from_hf", root / "older", root / "older ours") == 0
    return root


ARGUMENTS = {
    "to_hf": ["ours"],
    "from_hf": ["llama"],
    "from_easylm": ["streaming_params", "llama"],
    "text_model": ["whole"],
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        skipped = {"compared": False, "why": "this file compares"}
        patch.setattr(torch_check, "compare_logits", lambda *_, **__: skipped)
        yield


def call(*arguments):
    """Exit status of a conversion."""
    try:
        cli.run_command(convert.main, [str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code
    return 0


def command_of(name, ground, out):
    return [name, *(ground / argument for argument in ARGUMENTS[name]), out]


def held(folder):
    """Every file below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("older", ["older", "older ours"])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.slow
def test_a_model_is_replaced_by_one_that_is_complete(name, older, ground, tmp_path, capsys):
    out = shutil.copytree(ground / older, tmp_path / "out")
    before = held(out)
    assert call(*command_of(name, ground, out)) == 2
    assert "out: is not empty; choose another folder, or add --overwrite" in capsys.readouterr().err
    assert held(out) == before
    assert call(*command_of(name, ground, out), "--overwrite") == 0
    assert call(*command_of(name, ground, tmp_path / "fresh")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"fresh", "out"}
    if name == "from_hf":  # Orbax names its files at random
        assert call("to_hf", out, tmp_path / "again") == 0
        out, fresh = tmp_path / "again", ground / "llama"
    else:
        fresh = tmp_path / "fresh"
        assert held(out) == held(fresh)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, fresh))
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_conversion_that_fails_leaves_the_old_model(name, ground, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(ground / "older", tmp_path / "out")
    before, write = held(out), safetensors.save_folder

    def full(*arguments):
        if name != "from_hf":
            write(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "save_folder", full)
    monkeypatch.setattr(checkpoints.Checkpoints, "save_params", full)
    assert call(*command_of(name, ground, out), "--overwrite") == 4
    assert "out: cannot be written: No space left" in capsys.readouterr().err
    assert held(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype, value", [(np.float32, np.nan), (np.float64, 1e300)])
def test_a_weight_that_is_not_finite_is_the_models_fault(dtype, value, tmp_path, capsys):
    """Not that of the folder which is written, where it is read while others are saved."""
    tiny.save(tmp_path / "llama", CONFIG)
    file = tmp_path / "llama/model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert call("from_hf", tmp_path / "llama", tmp_path / "out") == 2
    problem = f"error: {file}: {name}: contains NaN or infinity; the file is damaged or the model"
    assert capsys.readouterr().err == f"{problem} diverged\n"
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_new_model_that_cannot_take_its_place_leaves_the_old_one(
    ground, tmp_path, capsys, monkeypatch
):
    out = shutil.copytree(ground / "older", tmp_path / "out")
    before, rename = held(out), Path.rename

    def failing(path, goal):
        if path.name == ".out.easyaira.new":
            raise OSError(5, "Input/output error")
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", failing)
    assert call(*command_of("to_hf", ground, out), "--overwrite") == 4
    assert held(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_loses_no_model(ground, tmp_path):
    """The old one has moved aside and the new one is not there yet."""
    aside = shutil.copytree(ground / "older", tmp_path / ".out.easyaira.old")
    before = held(aside)
    with pytest.raises(ConfigError), replace.replacing(tmp_path / "out"):
        raise ConfigError("a fault")
    assert held(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    with replace.replacing(tmp_path / "out") as new:
        (new / "a").touch()
        with pytest.raises(ConfigError, match="out: another process is writing it; wait until"):
            with replace.replacing(tmp_path / "out"):
                pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_hidden_folders_of_other_people_are_kept(tmp_path):
    for name in (".out.new", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for _ in range(2):
        with replace.replacing(tmp_path / "out") as new:
            (new / "a").touch()
    assert (tmp_path / ".out.new/file").exists() and (tmp_path / ".out.old/file").exists()


def notes(folder, model):
    shutil.copytree(model, folder)
    (folder / "notes.txt").touch()


def run(folder, model):
    notes(folder, model)
    (folder / "notes.txt").rename(folder / "config.yaml")


def nested(folder, model):
    shutil.copytree(model, folder)
    (folder / "tokenizer/notes.txt").touch()


def trained(folder, model):
    shutil.copytree(model, folder)
    (folder / "checkpoints/7").mkdir()


def file(folder, _):
    folder.touch()


def readme(folder, _):
    folder.mkdir()
    (folder / "README.md").touch()


def link(folder, model):
    shutil.copytree(model, folder.with_name("model"))
    folder.symlink_to(folder.with_name("model"))


def link_to_nothing(folder, _):
    folder.with_name("empty").mkdir()
    folder.symlink_to(folder.with_name("empty"))


def home(folder, model):
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    (folder / ".bashrc").touch()


KEPT = {  # what stands at OUT, a model to make it of: what the error says
    (notes, "older"): "holds notes.txt, which is no part of a model",
    (notes, "older ours"): "holds notes.txt, which is no part of a model",
    (nested, "older ours"): "holds notes.txt, which is no part of a model",
    (home, "older"): "holds .bashrc, which is no part of a model",
    (run, "older ours"): "holds config.yaml, which is no part of a model",
    (trained, "older ours"): "is a run folder",
    (readme, "older"): "holds no config.json of a model",
    (file, "older"): "is a file; name a folder",
    (link, "older"): "is a link; name the folder that it leads to",
    (link_to_nothing, "older"): "is a link; name the folder that it leads to",
}


@pytest.mark.parametrize("kind, model", KEPT, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.parametrize("name", ["to_hf", "from_hf"])
def test_what_is_no_model_is_never_removed(name, kind, model, ground, tmp_path, capsys):
    kind(tmp_path / "out", ground / model)
    before = held(tmp_path)
    assert call(*command_of(name, ground, tmp_path / "out"), "--overwrite") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/out: ") and KEPT[kind, model] in error
    assert held(tmp_path) == before


@pytest.mark.parametrize("name", ["to_hf", "from_hf"])
def test_what_is_read_and_the_current_folder_are_never_removed(
    name, ground, tmp_path, capsys, monkeypatch
):
    parent = tmp_path / "parent"
    source = shutil.copytree(ground / ARGUMENTS[name][0], parent / "tokenizer")
    (parent / "checkpoints/0").mkdir(parents=True)  # so that it is like a converted model
    before = held(tmp_path)
    for out, reason in ((source, "holds"), (parent, f"holds {source}, which is read")):
        assert call(name, source, out, "--overwrite") == 2
        assert reason in capsys.readouterr().err
    other = shutil.copytree(ground / "older", tmp_path / "other")
    monkeypatch.chdir(other)
    for out in (".", other, "..", tmp_path):
        assert call(name, ground / ARGUMENTS[name][0], out, "--overwrite") == 2
        assert "is the current folder or one above it" in capsys.readouterr().err
    shutil.rmtree(other)
    assert held(tmp_path) == before


@pytest.mark.slow
def test_the_base_of_an_adapter_is_never_replaced(ground, tmp_path, capsys):
    base = shutil.copytree(ground / "older", tmp_path / "base")
    tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    flags = "--lora={r: 2, alpha: 4, target_modules: [q_proj]}"
    options = {"max_steps": 1, "optimizer.warmup_steps": 0}
    runs.train("sft", base, tmp_path, tmp_path / "run", flags, **options)
    before = held(base)
    assert call("to_hf", tmp_path / "run", base, "--merge", "--overwrite") == 2
    assert f"holds {base}, which is read" in capsys.readouterr().err
    assert held(base) == before
