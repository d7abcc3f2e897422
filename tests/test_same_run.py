"""A run is the same on any mesh and wherever it is stopped: each algorithm, with and without
adapters."""

import numpy as np
import pytest

from easyaira.errors import Preempted
from easyaira.train import metrics
from helpers import tiny
from helpers.runs import close, losses_of, same_bits, stop_after, train

LORA = {"lora.r": 4, "lora.alpha": 8, "lora.dropout": 0.3, "optimizer.learning_rate": 2e-2}
GPT2 = LORA | {"lora.target_modules": "[c_attn, c_proj, c_fc]"}
WHOLE = GPT2 | {"lora.dropout": 0, "lora.modules_to_save": "[wte]"}
BERT = LORA | {"lora.target_modules": "[query, dense]"}
EXPERTS = {"sft.router_aux_loss": True}
RUNS = {  # algorithm, model, data, options
    "sft": ("sft", "gpt2", "sft", {"model.dropout": 0.3}),
    "dpo": ("dpo", "gpt2", "dpo", {}),
    "reward": ("reward", "bert", "label", {"model.dropout": 0.2, "eval_steps": 2}),
    "sft-nf4-dora": ("sft", "gpt2", "sft", GPT2 | {"lora.quantize": "nf4", "lora.dora": True}),
    "sft-8bit": ("sft", "wide", "sft", {"optimizer.state_dtype": "8bit"}),
    "sft-experts-muon": ("sft", "mixtral", "sft", EXPERTS | {"optimizer.name": "muon"}),
    "dpo-lora-whole": ("dpo", "gpt2", "dpo", WHOLE | {"dpo.precompute_ref_log_probs": False}),
    "reward-lora": ("reward", "bert", "dpo", BERT),
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    models = {kind: tiny.CONFIGS[kind] for kind in ("gpt2", "llama")}
    rows = {"sft": tiny.sft_rows(40), "dpo": tiny.dpo_rows(40), "label": tiny.label_rows(40)}
    models["mixtral"] = tiny.CASES["mixtral"]
    models |= {"bert": tiny.SCORERS["bert"], "wide": tiny.CONFIGS["gpt2"] | {"n_embd": 64}}
    return tiny.ground(tmp_path_factory.mktemp("ground"), models, **rows)


def untimed(rows):
    """What rows of metrics say, but for the time it took."""
    timing = ("tokens_per_second", "step_time", "mfu", "data_wait", "cpu_time", "compilations")
    return [{name: value for name, value in row.items() if name not in timing} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_stop_and_continue_is_the_same_run_bit_for_bit(name, ground, tmp_path, monkeypatch):
    """Eight updates, two epochs; stopped after one of them, or while numbers are fetched."""
    task, model, data, own = RUNS[name]
    args = (task, ground / model, ground / f"{data}.jsonl")
    options = {"max_steps": 8, "logging_steps": 4, "data.eval": 0.2, **own}
    rows, params = train(*args, tmp_path / "through", **options)
    late = (5, metrics.Window, "add")  # while the numbers of update 5 are fetched, in update 6
    stops = {1: (1,), 6: late} if name == "sft" else {3: (3,)}
    for stop, where in stops.items():
        folder = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch:
            stop_after(patch, *where)
            with pytest.raises(Preempted, match=f"SIGTERM after update {stop} of"):
                train(*args, folder, **options)
        resumed_rows, resumed = train(*args, folder, **options)
        same_bits(resumed, params)
        assert untimed(resumed_rows) == untimed(rows)


@pytest.mark.slow
def test_a_signal_before_an_evaluation_leaves_one_row_a_step(ground, tmp_path, monkeypatch):
    args, options = ("sft", ground / "gpt2", ground), {"data.eval": 0.2, "eval_steps": 2}
    options |= {"max_steps": 4}
    rows, params = train(*args, tmp_path / "through", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Preempted):
            train(*args, tmp_path / "stopped", **options)
    resumed_rows, resumed = train(*args, tmp_path / "stopped", **options)
    same_bits(resumed, params)
    assert untimed(resumed_rows) == untimed(rows) and [r["step"] for r in rows] == [0, 1, 2, 3, 4]


NAMES = ("loss", "eval_loss", "eval_accuracy", "eval_margin", "eval_auc")
EVAL = {"data.eval": 0.2, "eval_steps": 3}
INT8 = WHOLE | {"lora.quantize": "int8"}
NF4 = GPT2 | {"lora.dropout": 0, "lora.quantize": "nf4"}
# Algorithm, model, data, options; devices per dp, fsdp and tp. Each algorithm, kind of model and
# adapter, and optimizer is divided once. Several share a run, which shows the fault of each.
DIVIDED = [
    ("sft", "gpt2", "sft", EVAL, ["8,1,1", "1,1,4"]),
    ("dpo", "mixtral", "dpo", EVAL, ["1,4,2"]),
    ("reward", "bert", "label", EVAL, ["2,2,2"]),
    ("reward", "llama", "dpo", EVAL, ["2,2,2"]),  # it has two key/value heads
    ("sft", "mixtral", "sft", EXPERTS, ["2,2,2"]),
    ("sft", "wide", "sft", {"optimizer.state_dtype": "8bit"}, ["2,2,2"]),
    ("sft", "gpt2", "sft", {"optimizer.name": "muon"}, ["2,2,2"]),
    ("sft", "gpt2", "sft", INT8, ["1,4,2"]),
    ("sft", "gpt2", "sft", NF4 | {"lora.dora": True}, ["2,2,2"]),
    ("sft", "mixtral", "sft", NF4 | {"lora.target_modules": "[q_proj, o_proj]"}, ["2,2,2"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("task, model, data, own, meshes", DIVIDED)
def test_meshes_agree_with_one_device(task, model, data, own, meshes, ground, tmp_path, devices):
    args = (task, ground / model, ground / f"{data}.jsonl")
    options = {"max_steps": 5, **own}
    rows, params = train(*args, tmp_path / "one", **options)
    for mesh in meshes:
        devices(np.prod([int(size) for size in mesh.split(",")]))
        other_rows, other = train(*args, tmp_path / mesh, mesh=mesh, **options)
        for name in NAMES:
            ours, theirs = ([r[name] for r in logged if name in r] for logged in (rows, other_rows))
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        if own == EVAL:  # of adapters, at their rate, rounding becomes steps
            close(other, params, 1e-4)


@pytest.mark.slow
def test_tensor_parallelism_over_eight_devices(ground, tmp_path, devices):
    config = tiny.CONFIGS["gpt2"] | {"n_head": 8, "vocab_size": 321}
    tiny.save(tmp_path / "model", config)
    args = ("sft", tmp_path / "model", ground)
    rows, params = train(*args, tmp_path / "one", max_steps=5)
    devices(8)
    other_rows, other = train(*args, tmp_path / "tp", max_steps=5, mesh="1,1,8")
    np.testing.assert_allclose(losses_of(other_rows), losses_of(rows), atol=1e-4)
    close(other, params, 1e-4)


@pytest.mark.slow
def test_a_run_saved_on_one_mesh_continues_on_another(ground, tmp_path, devices, monkeypatch):
    args, options = ("sft", ground / "llama", ground), {"max_steps": 12}
    rows, params = train(*args, tmp_path / "one", **options)
    devices(8)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Preempted):
            train(*args, tmp_path / "moved", mesh="fsdp=8", **options)
    moved_rows, moved = train(*args, tmp_path / "moved", mesh="fsdp=4,tp=2", **options)
    np.testing.assert_allclose(losses_of(moved_rows), losses_of(rows), atol=1e-4)
    close(moved, params, 1e-4)
