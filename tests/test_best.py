"""The best checkpoint and early stopping, against decisions made by hand; runs made longer."""

import math
import shutil

import jax
import numpy as np
import pytest

from easyaira import convert
from easyaira.config.run import TrainRL, TrainSFT
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError, Preempted
from easyaira.hf import safetensors
from easyaira.storage.checkpoints import Checkpoints
from easyaira.storage.pretrained import find
from easyaira.train import evaluation
from easyaira.train.best import Best
from easyaira.train.evaluation import Evaluation
from easyaira.train.metrics import Window
from helpers import runs, tiny

LOSSES = {0: 9.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25, 10: 1.0}  # of update 4 is best for two more


def follow(values, kind=TrainSFT, **options):
    """(step of the best, how many have waited, step at which it stops) of evaluations in order."""
    kept, window = [], Window()
    config = kind.__new__(kind)
    for name in ("metric_for_best_model", "greater_is_better", "early_stopping_patience"):
        object.__setattr__(config, name, options.get(name))
    object.__setattr__(config, "load_best_model_at_end", True)
    best = Best(config, window, kept.append)
    for number, value in enumerate(values, 1):
        names = ("eval_loss", "eval_accuracy") if kind is TrainSFT else ("eval_reward",)
        best.look(number, dict.fromkeys(names, value))
        assert best.improved == (best.step == number)
        if best.exhausted:
            return best.step, best.record["waited"], number
    assert kept[-1:] == ([best.step] if best.step else [])
    return best.step, best.record["waited"], None


@pytest.mark.parametrize(
    "values, options, expected",
    [
        ([3.0, 2.0, 2.5, 1.0], {}, (4, 0, None)),
        ([3.0, 2.0, 2.5, 2.25, 1.0], {"early_stopping_patience": 2}, (2, 2, 4)),
        ([3.0, 2.0, 2.0, 2.0], {"early_stopping_patience": 3}, (2, 2, None)),  # equal is no better
        ([0.1, 0.3, 0.2], {"metric_for_best_model": "accuracy"}, (2, 1, None)),
        ([0.1, 0.3, 0.2], {"metric_for_best_model": "eval_loss"}, (1, 2, None)),
        ([0.1, 0.3, 0.2], {"greater_is_better": True}, (2, 1, None)),
        ([2.0, math.nan, 1.0], {}, (3, 0, None)),
        ([math.nan, 2.0, 2.5], {}, (2, 1, None)),
        ([0.1, 0.3, 0.2], {"kind": TrainRL}, (2, 1, None)),  # the highest reward
    ],
)
def test_what_is_best_is_decided_as_by_hand(values, options, expected):
    assert follow(values, **options) == expected


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return tiny.ground(
        tmp_path_factory.mktemp("best"), {"gpt2": tiny.CONFIGS["gpt2"]}, sft=tiny.sft_rows(40)
    )


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """Held-out losses of the table, whatever the model."""
    monkeypatch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])

    def measure(self, number, params, frozen):
        return Evaluation({"eval_loss": LOSSES.get(number, 1.0)})

    monkeypatch.setattr(evaluation.Evaluate, "measure", measure)


OPTIONS = {
    "max_steps": 10, "eval_steps": 2, "save_steps": 0, "save_total_limit": 1, "data.eval": 0.2,
    "load_best_model_at_end": True, "early_stopping_patience": 2,
}  # fmt: skip


def train(ground, out, **options):
    return runs.train("sft", ground / "gpt2", ground, out, **OPTIONS | options)


def steps_of(out):
    checkpoints = Checkpoints(out / "checkpoints")
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


@pytest.fixture(scope="module")
def straight(ground, tmp_path_factory):
    """A run that stops at update 8 with its best at update 4, and what it printed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        patch.setattr(
            evaluation.Evaluate,
            "measure",
            lambda self, number, *_: Evaluation({"eval_loss": LOSSES[number]}),
        )
        train(ground, out, export=True)
    return out


def weights(folder):
    return safetensors.open_folder(folder)


@pytest.mark.slow
def test_the_run_stops_and_the_best_is_kept_and_released(straight, ground, tmp_path):
    assert steps_of(straight) == [4, 8]  # one by save_total_limit, and the best
    assert find(str(straight)).step == 4
    short = {"max_steps": 10, "load_best_model_at_end": False, "early_stopping_patience": "null"}
    rows, last = train(ground, tmp_path / "whole", save_steps=4, save_total_limit=9, **short)
    assert rows[-1]["step"] == 10
    convert.main(["to_hf", str(tmp_path / "whole/checkpoints/4"), str(tmp_path / "four")])
    four, hf = weights(tmp_path / "four"), weights(straight / "hf")
    assert four.keys() == hf.keys()
    for name in four:
        np.testing.assert_array_equal(four[name], hf[name], err_msg=name)


def test_the_last_lines_are_of_the_released_weights(ground, tmp_path, capsys):
    train(ground, tmp_path / "run")
    out = capsys.readouterr().out
    assert "of update 4" in out and f"held-out loss {LOSSES[0]:.4g} -> {LOSSES[4]:.4g}, " in out


def test_the_same_command_finds_the_stopped_run_finished(straight, ground, capsys):
    train(ground, straight, export=True)
    assert "is finished after 8 updates" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("after", [4, 7])
def test_a_resumed_run_decides_the_same(after, straight, ground, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        runs.stop_after(patch, after)
        with pytest.raises(Preempted):
            train(ground, tmp_path / "run")
    _, params = train(ground, tmp_path / "run")
    assert steps_of(tmp_path / "run") == [4, 8] and find(str(tmp_path / "run")).step == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"load_best_model_at_end": False}, "early_stopping_patience: unused without"),
        ({"eval_steps": 0}, "load_best_model_at_end: nothing is evaluated"),
        (
            {"metric_for_best_model": "los"},
            "eval_los is none of .*; did you mean eval_loss",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(options, message, ground, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(ground, tmp_path / "run", **options)


def test_a_run_that_trained_nothing_may_change_its_options(ground, tmp_path):
    """A misspelt metric is noticed at the first evaluation; the command without the mistake was
    refused, as that of another run."""
    run, options = tmp_path / "run", {"max_steps": 4, "early_stopping_patience": "null"}
    with pytest.raises(ConfigError, match="is none of the metrics"):
        train(ground, run, **options, metric_for_best_model="los")
    rows, _ = train(ground, run, **options, seed=1)
    assert [row["step"] for row in rows] == list(range(5))
    shutil.rmtree(run / "checkpoints")  # the run has trained, so nothing of it is overwritten
    for unlogged in (False, True):  # a damaged checkpoint is one, too
        if unlogged:
            (run / "metrics.jsonl").unlink()
            (run / "checkpoints/4").mkdir(parents=True)
        with pytest.raises(ConfigError, match="seed: the run in .* was started with 1, this"):
            train(ground, run, **options, seed=2)


def test_a_config_that_no_run_wrote_is_not_overwritten(ground, tmp_path):
    """Such as one that was written by hand into the folder of its run."""
    record = tmp_path / "config.yaml"
    for text in ("seed: 5  # as in the paper\n", "begun: 2026-01-02\n"):
        record.write_text(text)
        with pytest.raises(ConfigError, match="the run in .* was started with"):
            train(ground, tmp_path)
        assert record.read_text() == text


# Runs made longer

CONSTANT = {
    "load_best_model_at_end": False, "early_stopping_patience": "null", "eval_steps": 0,
    "optimizer.lr_scheduler_type": "constant_with_warmup", "num_samples": 0,
}  # fmt: skip


@pytest.mark.slow
def test_a_longer_run_is_the_run_that_was_longer_from_the_start(ground, tmp_path, capsys):
    _, whole = train(ground, tmp_path / "whole", **CONSTANT)
    train(ground, tmp_path / "run", **CONSTANT | {"max_steps": 6})
    assert "is made longer" not in capsys.readouterr().out
    rows, params = train(ground, tmp_path / "run", **CONSTANT)
    assert "is made longer: 6 -> 10 updates" in capsys.readouterr().out
    assert [row["step"] for row in rows] == list(range(11))
    runs.same_bits(params, whole)
    # 32 rows in updates of 8: three epochs are 12 updates
    epochs = CONSTANT | {"max_steps": -1, "num_train_epochs": 3}
    train(ground, tmp_path / "run", **epochs)
    assert "is made longer: 10 -> 12 updates" in capsys.readouterr().out


@pytest.mark.slow
def test_the_rest_follows_the_schedule_of_the_longer_run(ground, tmp_path):
    linear = CONSTANT | {"optimizer.lr_scheduler_type": "linear", "optimizer.warmup_steps": 0}
    train(ground, tmp_path / "run", **linear | {"max_steps": 4})
    rows, _ = train(ground, tmp_path / "run", **linear | {"max_steps": 8})
    rates = [row["learning_rate"] for row in rows if row["step"]]
    by_hand = [1e-3 * (1 - n / 4) for n in range(4)] + [1e-3 * (1 - n / 8) for n in range(4, 8)]
    np.testing.assert_allclose(rates, by_hand, rtol=1e-6)


def test_a_shorter_run_is_refused(straight, ground):
    with pytest.raises(ConfigError, match="max_steps: the run in .* was started with 10"):
        train(ground, straight, max_steps=9, export=True)


def test_a_run_that_was_made_longer_cannot_become_shorter(ground, tmp_path):
    """Its older checkpoint is of a command with fewer updates than are asked for."""
    options = CONSTANT | {"save_total_limit": 2, "optimizer.warmup_steps": 0}
    train(ground, tmp_path / "run", **options | {"max_steps": 1})
    train(ground, tmp_path / "run", **options | {"max_steps": 3})
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(ConfigError, match="max_steps: the run in .* was started with 3"):
        train(ground, tmp_path / "run", **options | {"max_steps": 2})
    assert (tmp_path / "run/config.yaml").read_text() == before
