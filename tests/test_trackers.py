"""Trackers get every logged row, under the run's own name, and cannot stop a run."""

import sys
import types

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError
from easyaira.train import trackers
from helpers import runs, tiny

OPTIONS = {"max_steps": 3, "data.eval": 0.2, "eval_steps": 0, "optimizer.warmup_steps": 1}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return tiny.ground(
        tmp_path_factory.mktemp("trackers"), {"gpt2": tiny.CONFIGS["gpt2"]}, sft=tiny.sft_rows(16)
    )


@pytest.fixture
def packages(monkeypatch):
    """Packages that keep what they get: name -> list of (function, arguments)."""
    calls = {name: [] for name in ("wandb", "trackio", "mlflow")}

    def keep(name, function, result=None):
        def call(*args, **kwargs):
            calls[name].append((function, *args, kwargs))
            return result

        return call

    run = types.SimpleNamespace(log=keep("wandb", "log"), finish=keep("wandb", "finish"))
    made = {
        "wandb": {"init": keep("wandb", "init", run)},
        "trackio": {f: keep("trackio", f) for f in ("init", "log", "finish")},
        "mlflow": {
            f: keep("mlflow", f) for f in ("start_run", "log_dict", "log_metrics", "end_run")
        },
    }
    for name, functions in made.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
    return calls


@pytest.mark.slow
def test_each_tracker_gets_every_row(ground, packages, tmp_path):
    names = "[wandb, trackio, mlflow]"
    rows, _ = runs.train(
        "sft", ground / "gpt2", ground, tmp_path / "run", report_to=names, **OPTIONS
    )
    assert not (tmp_path / "run/tensorboard").exists()
    for name, log in {"wandb": "log", "trackio": "log", "mlflow": "log_metrics"}.items():
        logged = [(call[1], call[-1]["step"]) for call in packages[name] if call[0] == log]
        assert [step for _, step in logged] == [0, 1, 2, 3], name
        for (values, _), row in zip(logged, rows, strict=True):
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            assert values == {trackers.tag(k): v for k, v in numbers.items()}, name
    opened = packages["wandb"][0][-1]
    assert opened["name"] == "run" and opened["config"]["max_steps"] == 3
    assert [packages[name][-1][0] for name in packages] == ["finish", "finish", "end_run"]


@pytest.mark.parametrize(
    "metric, tag",
    [
        ("loss", "train/loss"),
        ("rewards/chosen", "train/rewards/chosen"),
        ("eval_loss", "eval/loss"),
        ("eval_rewards/chosen", "eval/rewards/chosen"),
        ("compilations", "perf/compilations"),
        ("tokens_per_second", "perf/tokens_per_second"),
    ],
)
def test_tags_are_grouped(metric, tag):
    assert trackers.tag(metric) == tag


def test_a_value_that_is_unknown_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "to_dict", lambda config: {})
    several = trackers.Trackers(types.SimpleNamespace(report_to=["tensorboard"]), tmp_path)
    several.write(1, {"loss": 2.0, "mfu": None})
    several.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["train/loss"]


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(packages, tmp_path):
    config = types.SimpleNamespace(report_to=["wandb"])
    ids = set()
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trackers, "to_dict", lambda config: {})
            trackers.Trackers(config, tmp_path / "run").close()
        ids.add(packages["wandb"][-2][-1]["id"])
    assert len(ids) == 1 and packages["wandb"][-2][-1]["resume"] == "allow"


def test_a_missing_package_is_said_before_anything_is_written(ground, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'report_to: needs wandb; pip install "\.\[wandb\]"'):
        runs.train("sft", ground / "gpt2", ground, tmp_path / "run", report_to="[wandb]")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_left_out_with_a_warning(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "to_dict", lambda config: {})
    config = types.SimpleNamespace(report_to=["tensorboard", "mlflow"])
    several = trackers.Trackers(config, tmp_path / "run")
    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", lambda *_, **__: 1 / 0)
    several.write(1, {"loss": 2.0, "mfu": None})
    several.write(2, {"loss": 1.0})
    assert list(several.open) == ["tensorboard"]
    assert capsys.readouterr().out.count("mlflow fails and is left out: division by zero") == 1
    several.close()


def test_a_tracker_that_cannot_be_opened_is_an_error(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mlflow"], "start_run", lambda **_: 1 / 0)
    config = types.SimpleNamespace(report_to=["mlflow"])
    with pytest.raises(ConfigError, match="report_to: mlflow cannot be opened: division by zero"):
        trackers.Trackers(config, tmp_path / "run")
