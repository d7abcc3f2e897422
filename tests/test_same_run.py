"""A run is the same on any mesh and wherever it is stopped: each algorithm, with and without
adapters."""

import functools

import numpy as np
import pytest

from easyaira.errors import Preempted
from easyaira.train import metrics
from helpers import tiny
from helpers.runs import close, same_bits, stop_after, train

LORA = {"lora.r": 4, "lora.alpha": 8}
GPT2 = LORA | {"lora.target_modules": "[c_attn, c_proj, c_fc]", "lora.modules_to_save": "[wte]"}
SCORER = LORA | {"lora.target_modules": "[q_proj, o_proj]"}
# Algorithm, model, data, options; meshes of dp, fsdp and tp, and from which to which one run moves.
# Each algorithm, kind of model and adapter, and optimizer is there once. Several share a run, which
# shows the fault of each.
RUNS = {
    "sft": ("sft", "heads", "sft", {}, ["8,1,1", "1,1,8"]),
    "dpo": ("dpo", "llama", "dpo", {}, ["1,8,1 to 1,4,2"]),
    "reward": ("reward", "bert", "label", {"eval_steps": 2}, ["2,2,2"]),
    "reward-lora-int8": (
        "reward", "mixtral", "dpo", SCORER | {"lora.quantize": "int8"}, ["2,2,2"],
    ),
    "sft-nf4-dora-8bit": (
        "sft", "wide", "sft",
        GPT2 | {"lora.quantize": "nf4", "lora.dora": True, "optimizer.state_dtype": "8bit"},
        ["2,2,2"],
    ),
    "sft-experts-muon": (
        "sft", "mixtral", "sft", {"sft.router_aux_loss": True, "optimizer.name": "muon"}, ["2,2,2"],
    ),
    "dpo-lora-in-step": (
        "dpo", "gpt2", "dpo", GPT2 | {"dpo.precompute_ref_log_probs": False}, [],
    ),
}  # fmt: skip
OPTIONS = {"max_steps": 8, "logging_steps": 4, "data.eval": 0.2}  # two epochs
NAMES = ("loss", "eval_loss", "eval_accuracy", "eval_margin", "eval_auc")


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    models = {kind: tiny.CONFIGS[kind] for kind in ("gpt2", "llama")}
    rows = {"sft": tiny.sft_rows(40), "dpo": tiny.dpo_rows(40), "label": tiny.label_rows(40)}
    models["mixtral"] = tiny.CASES["mixtral"]
    models |= {"bert": tiny.SCORERS["bert"], "wide": models["gpt2"] | {"n_embd": 64}}
    models["heads"] = models["gpt2"] | {"n_head": 8, "vocab_size": 321}
    return tiny.ground(tmp_path_factory.mktemp("ground"), models, **rows)


@pytest.fixture(scope="module")
def through(ground, tmp_path_factory):
    """`through(name)` are the rows and parameters of a run of one device without a stop."""
    root = tmp_path_factory.mktemp("through")
    return functools.cache(lambda name: run_of(name, ground, root / name))


def run_of(name, ground, folder, **others):
    task, model, data, own, _ = RUNS[name]
    return train(task, ground / model, ground / f"{data}.jsonl", folder, **OPTIONS | own | others)


def untimed(rows):
    """What rows of metrics say, but for the time it took."""
    timing = ("tokens_per_second", "step_time", "mfu", "data_wait", "cpu_time", "compilations")
    return [{name: value for name, value in row.items() if name not in timing} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_stop_and_continue_is_the_same_run_bit_for_bit(
    name, ground, through, tmp_path, monkeypatch
):
    """Stopped after an update, or while numbers are fetched."""
    rows, params = through(name)
    if name.startswith("dpo"):  # it starts as its reference
        assert rows[0]["rewards/margins"] == 0 < abs(rows[-1]["rewards/margins"])
    late = (5, metrics.Window, "add")  # while the numbers of update 5 are fetched, in update 6
    stops = {1: (1,), 6: late} if name == "sft" else {3: (3,)}
    for stop, where in stops.items():
        folder = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch:
            stop_after(patch, *where)
            with pytest.raises(Preempted, match=f"SIGTERM after update {stop} of"):
                run_of(name, ground, folder)
        resumed_rows, resumed = run_of(name, ground, folder)
        same_bits(resumed, params)
        assert untimed(resumed_rows) == untimed(rows)


@pytest.mark.slow
def test_a_signal_before_an_evaluation_leaves_one_row_a_step(ground, tmp_path, monkeypatch):
    """And what is dropped, of activations and of adapters, follows from the update."""
    args, options = ("sft", ground / "gpt2", ground), {"data.eval": 0.2, "eval_steps": 2}
    options |= GPT2 | {"max_steps": 4, "model.dropout": 0.3, "lora.dropout": 0.3}
    rows, params = train(*args, tmp_path / "through", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Preempted):
            train(*args, tmp_path / "stopped", **options)
    resumed_rows, resumed = train(*args, tmp_path / "stopped", **options)
    same_bits(resumed, params)
    assert untimed(resumed_rows) == untimed(rows) and [r["step"] for r in rows] == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name, meshes", [(name, row[-1]) for name, row in RUNS.items() if row[-1]])
def test_meshes_agree_with_one_device(
    name, meshes, ground, through, tmp_path, devices, monkeypatch
):
    rows, params = through(name)
    for mesh in meshes:
        devices(8)
        *before, mesh = mesh.split(" to ")
        for other in before:
            with monkeypatch.context() as patch:
                stop_after(patch, 3)
                with pytest.raises(Preempted):
                    run_of(name, ground, tmp_path / mesh, mesh=other)
        other_rows, other = run_of(name, ground, tmp_path / mesh, mesh=mesh)
        for metric in NAMES:
            ours, theirs = (
                [r[metric] for r in logged if metric in r] for logged in (rows, other_rows)
            )
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        close(other, params, 1e-4)
