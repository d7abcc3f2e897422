"""Small training runs, and helpers to inspect them."""

from __future__ import annotations

import signal
from pathlib import Path

import jax
import numpy as np

from easyaira import cli
from easyaira.algorithms.dpo import dpo_algorithm
from easyaira.algorithms.reward import reward_algorithm
from easyaira.algorithms.rollouts import rl_algorithm
from easyaira.algorithms.sft import sft_algorithm
from easyaira.config.run import TrainDPO, TrainReward, TrainRL, TrainSFT
from easyaira.distributed.tree import path_of
from easyaira.run.run import run
from easyaira.storage.checkpoints import Checkpoints
from easyaira.train import log
from easyaira.train.setup import prepare
from helpers import tiny

TASKS = {
    "sft": (TrainSFT, sft_algorithm),
    "dpo": (TrainDPO, dpo_algorithm),
    "reward": (TrainReward, reward_algorithm),
    "rl": (TrainRL, rl_algorithm),
}
STEPS = {"sft": 20, "dpo": 20, "reward": 6, "rl": 6}
LEARNING = {
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_steps": 3,
    "optimizer.max_grad_norm": 1.0,
}


def argv(task, model, data, out, *flags, **options) -> list[str]:
    """Command line of a run on a file, or on TASK.jsonl of a folder.

    `flags` override `options`, and these override the usual options of a test."""
    data = Path(data)
    usual = {
        "model.name_or_path": model,
        "data.train": data if data.suffix else data / f"{task}.jsonl",
        "train_batch_size": 8,
        "logging_steps": 1,
        "export": False,
        "output_dir": out,
    }
    if Path(model).name not in tiny.FRAMES:  # encoders have one template
        usual["data.template"] = "tulu" if task == "reward" else "plain"
    if task != "reward":
        usual["num_samples"] = 0
    return [f"--{name}={value}" for name, value in (usual | options).items()] + [*map(str, flags)]


def configure(task, model, data, out, *flags, **options):
    """Configuration and algorithm of a run."""
    config_class, algorithm_of = TASKS[task]
    options = {"max_steps": STEPS[task], **LEARNING, **options}
    config, _ = cli.parse(config_class, argv(task, model, data, out, *flags, **options))
    return config, algorithm_of(config)


def train(*args, **options):
    """Run; return the rows of metrics.jsonl and the trained parameters (or adapter)."""
    config, algorithm = configure(*args, **options)
    run(config, algorithm, dry_run=False)
    return result(config, algorithm)


def result(config, algorithm):
    """Rows of metrics.jsonl, and trainable parameters of the newest checkpoint."""
    folder = Path(config.output_dir)
    trainable = prepare(config, algorithm).trainable
    trained, _ = trainable.saved(trainable.target, None)
    checkpoints = Checkpoints(folder / "checkpoints")
    params = checkpoints.restore_params(checkpoints.latest(), trained)
    checkpoints.close()
    return log.read(folder / "metrics.jsonl"), jax.device_get(params)


def losses_of(rows):
    return [row["loss"] for row in rows if row["step"] > 0]


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, atol):
    """Assert equality to `atol`, except for the biases of keys.

    Key biases have no effect on attention, so their gradient is rounding noise, which Adam scales
    up to whole steps."""

    def compare(path, x, y):
        path = path_of(path)
        if path.endswith("c_attn/bias"):  # of queries, keys and values
            x, y = x[:, ::2], y[:, ::2]
        if not path.endswith("key/bias"):
            np.testing.assert_allclose(x, y, atol=atol, rtol=0, err_msg=path)

    jax.tree_util.tree_map_with_path(compare, a, b)


def stop_after(monkeypatch, steps, owner=log.Log, method="advance"):
    """Send this process SIGTERM in the `steps`-th call of a method that every update calls."""
    calls, real = [], getattr(owner, method)

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == steps:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, method, counting)
