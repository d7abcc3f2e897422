"""scripts/benchmark.py: what it compares is the same work, and what it says of it is right."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import tiny

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from benchmarks import matrix, show, sides, tracing, training
from benchmarks.lengths import Kind

from easyaira.algorithms import sft
from easyaira.algorithms.dpo import dpo
from easyaira.config.dpo import DPOConfig
from easyaira.data.batches import Batches
from easyaira.data.packing import compilation_cost
from easyaira.distributed import mesh as meshes
from easyaira.models.registry import model_of
from easyaira.train.step import State

PAIRS = 3


@pytest.fixture(params=["sft", "dpo"])
def work(request, monkeypatch):
    """A tiny model under the name `tiny`, and three short examples for it."""
    monkeypatch.setitem(sides.MODELS, "tiny", tiny.CONFIGS["gpt2"])
    monkeypatch.setitem(sides.KINDS, "short", Kind((6, 0.5), (8, 0.5), 30, 30))
    asked = {"task": request.param, "model": "tiny", "lengths": "short"}
    return asked | {"examples": PAIRS, "updates": 2}


def gradients(loss_fn, params, frozen, batches):
    """Loss and gradients of the first update."""
    part = jax.tree.map(lambda array: jnp.asarray(array[0]), dict(batches[0].arrays))

    def mean(params):
        total, count = loss_fn(params, frozen, part, None)["loss"]
        return total / count

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.slow
def test_the_naive_step_does_the_same(work, models):
    """Its loss and gradients are those of packed rows with prompts stored once."""
    model, params = tiny.load(models / "gpt2")
    rng = np.random.default_rng(0)
    frozen = jax.tree.map(lambda leaf: leaf + 0.05 * rng.normal(size=leaf.shape), params)
    examples, pairs = sides.examples_of(work), work["task"] == "dpo"
    examples.tokens[:] = rng.integers(0, tiny.VOCAB, len(examples.tokens))
    if pairs:
        config = DPOConfig(beta=sides.BETA)
        loss_fn = dpo(model, config, examples=PAIRS, reference=model)
    else:
        loss_fn = sft.sft(model)
    ours = gradients(loss_fn, params, frozen, Batches(examples, PAIRS, share_prompt=pairs))
    padded = sides.Padded(Batches(examples, PAIRS, packing=False), sides.max_length(work))
    naive = gradients(sides.full_logits(model, examples.answers), params, frozen, padded)
    assert padded[0].arrays["tokens"].shape == (1, PAIRS * examples.answers, 30)
    np.testing.assert_allclose(naive[0], ours[0], rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours[1]):
        other = dict(jax.tree_util.tree_leaves_with_path(naive[1]))[path]
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(other, leaf, rtol=1e-4, atol=1e-5 * scale, err_msg=str(path))


def test_examples_fit_into_the_model():
    work = {"task": "dpo", "model": "gpt2-small", "lengths": "ultrafeedback"}
    examples = sides.examples_of(work | {"examples": 64, "updates": 4})
    assert examples.lengths().max() == sides.max_length(work) == 1024


def test_examples_leave_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    work = {"task": "dpo", "model": "gpt2-small", "lengths": "aira", "examples": 4, "updates": 1}
    examples = sides.examples_of(work)
    assert not list(tmp_path.iterdir())
    assert examples.tokens.max() == 1 and examples.learned.any()  # still there to be read


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo"])
@pytest.mark.parametrize("lengths", list(sides.KINDS))
@pytest.mark.parametrize(
    "updates, size, most",
    [(2000, 4, 1.11), (2000, 32, 1.045), (400, 4, 1.09), (400, 32, 1.035)],
)
def test_one_row_an_update_leaves_little_padding(task, lengths, updates, size, most):
    """In a run of 2,000 updates, whose few row lengths are worth compiling; and in one of 400, if
    its updates take as long as those of GPT-2 124M on a CPU."""
    work = {"task": task, "model": "gpt2-124m", "lengths": lengths, "examples": size, "updates": 0}
    examples = sides.examples_of(work, updates)
    plan = Batches(examples, size, attention=0.0, share_prompt=task == "dpo", seed=0)
    if updates == 400:
        plan = replace(plan, compilation=compilation_cost(124_439_808, "cpu"))
    served = [plan[update] for update in range(0, updates, updates // 100)]
    assert len(plan.shapes) <= 8 and {batch.shape.rows for batch in served} == {1}
    assert sum(batch.positions for batch in served) < most * sum(batch.filled for batch in served)


def test_every_model_can_be_built():
    for name, config in sides.MODELS.items():
        model = model_of(config, name)
        assert model.config.max_positions >= sides.max_length({"model": name, "lengths": "aira"})
    assert model_of(sides.MODELS["gpt2-124m"], "").parameter_count() == 124_439_808


@pytest.mark.slow
@pytest.mark.parametrize(
    "work, naive", [("sft", False), ("dpo", False), ("sft", True)], indirect=["work"]
)
def test_a_trace_names_what_costs(work, naive, tmp_path):
    side = sides.ours(work, {"naive": naive})
    assert side.facts["tokens"] == sides.examples_of(work).lengths().sum()
    costs = side.trace(tmp_path)
    assert sum(cost["share"] for cost in costs) == pytest.approx(1)
    assert [c["share"] for c in costs] == sorted((c["share"] for c in costs), reverse=True)
    names = {cost["cost"] for cost in costs}
    parts = ["head and loss, forward", "MLP, backward"]
    if naive or work["task"] == "dpo":  # in SFT, token_nll makes the gradient in the forward pass
        parts.append("head and loss, backward")
    for part in parts:
        assert f"{part}: products" in names
    assert {"optimizer: all but products", "norms, forward: all but products"} <= names
    assert list(tmp_path.rglob("*.xplane.pb"))  # what TensorBoard reads


def test_operations_without_a_name_belong_to_their_neighbours():
    places = tracing.places(
        """\
%fused (p.0: f32[2]) -> f32[2] {
  %p.0 = f32[2]{0} parameter(0)
  ROOT %dot.1 = f32[2]{0} dot(%p.0, %p.0)
}

ENTRY %main (p.1: f32[2]) -> (f32[2]) {
  %p.1 = f32[2]{0} parameter(0)
  %copy.1 = f32[2]{0} copy(%p.1)
  %bitcast.1 = f32[2]{0} bitcast(%copy.1)
  %add.1 = f32[2]{0} add(%bitcast.1, %bitcast.1), metadata={op_name="jit(s)/jvp(the_loss)/CausalLM/model/h/mlp/add"}
  %fusion.1 = f32[2]{0} fusion(%add.1), kind=kLoop, calls=%fused
  %while.1 = (f32[2], s32[]) while(%tuple.1), body=%fused, metadata={op_name="jit(s)/transpose(jvp(the_loss))/while"}
  %multiply.2 = f32[2]{0} multiply(%p.1, %p.1), metadata={op_name="jit(s)/the_optimizer/mul"}
  %multiply.3 = f32[2]{0} multiply(%p.1, %p.1), metadata={op_name="jit(s)/the_optimizer/mul"}
  ROOT %multiply.1 = f32[2]{0} multiply(%p.1, %p.1), metadata={op_name="jit(s)/the_optimizer/mul"}
}
"""  # noqa: E501
    )
    assert places["copy.1"] == places["add.1"] == "MLP, forward: all but products"
    assert places["fusion.1"] == "MLP, forward: products"
    assert places["while.1"] is None
    assert places["multiply.1"] == "optimizer: all but products"


ARGUMENTS = {
    "task": "dpo",
    "model": "gpt2-small",
    "lengths": "hh",
    "examples": 2,
    "answers": 2,
    "updates": 2,
    "dtype": "float32",
    "rounds": 3,
    "ladder": False,
    "against": "share_prompt",
    "gradient_checkpointing": None,
    "peer": None,
    "profile": None,
    "debug": False,
}


def test_float32_is_of_both_sides():
    given = {**ARGUMENTS, "against": None, "peer": "trl", "dtype": "float32"}
    ours, best, _ = training.sides_of(SimpleNamespace(**given))
    assert ours.options == {"dtype": "float32"}
    assert best.options == {**training.FAST, "bf16": False}


def test_the_matrix_names_the_better_of_trls_sides(monkeypatch, tmp_path):
    def measure(args):
        assert args.peer == ("trl-packed" if args.task == "sft" else "trl-fast")
        figures = {"positions/token": 1.05, "peak MiB": 2e3, "system": 0.01}
        rates = {"EasyAira": 300.0, "TRL, best": 100.0, "TRL, packed": 200.0}
        return [figures | {"side": n, "tokens/CPU s": rate} for n, rate in rates.items()], None

    monkeypatch.setattr(training, "measure", measure)
    given = {"model": ["gpt2-124m"], "task": ["sft", "dpo"], "lengths": ["chat"], "examples": [4]}
    given |= {"dtype": ["float32"], "output": tmp_path / "m.md", "updates": 1, "rounds": 1}
    matrix.matrix(SimpleNamespace(**given))
    lines = (tmp_path / "m.md").read_text().splitlines()
    assert lines[2] == (
        "| SFT gpt2-124m, chat, 4 examples, float32 | 300 | 200 (TRL, packed) | **1.50** | 1.05 "
        "| 2,000 / 2,000 | 1.0% / 1.0% |"
    )
    assert len(lines) == 4 and (tmp_path / "m.png").stat().st_size > 1000


def test_ratios_are_medians_of_rounds(monkeypatch, tmp_path, capsys):
    """Rounds are in turns, and each is compared with the same round of the other side."""
    asked = []

    class Fake:
        def __init__(self, entry, work, debug):
            self.entry, self.place = entry, len(asked) and 1
            asked.append("built")
            self.facts = {"tokens": 1000, "operations per token": 1e9, "device": "NVIDIA A100-x"}
            self.facts |= {"devices": 2, "to first s": 1.0, "positions per token": 1.5}
            self.facts |= {"temporaries MiB": 10.0}
            self.cpu = iter([[8.0, 40.0, 8.0], [4.0, 10.0, 2.0]][self.place])

        def ask(self, what):
            asked.append(self.place)
            return {
                "wall": 2.0,
                "cpu": next(self.cpu),
                "system": 0.1,
                "peak MiB": 5.0,
                "joules": 32.0,
            }

        def close(self):
            pass

    monkeypatch.setattr(training, "Worker", Fake)
    rows, costs = training.measure(SimpleNamespace(**ARGUMENTS))
    assert asked[2:] == [0, 1] * 3 and costs is None
    assert [row["speed, first = 1"] for row in rows] == [1, 4]  # of 2, 4 and 4
    assert rows[0]["tokens/s"] == 500 and rows[0]["update s"] == 1
    assert rows[1]["tokens/CPU s"] == 250
    assert rows[0]["GPU J/example"] == 32 / ARGUMENTS["updates"] / ARGUMENTS["examples"]
    assert rows[0]["MFU"] == pytest.approx(500 * 1e9 / (2 * 312e12))
    show.table(rows)
    assert "prompt stored once" in capsys.readouterr().out.splitlines()[2]
    show.bars(rows, "title", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_what_only_pairs_have_is_not_measured_in_sft():
    arguments = ARGUMENTS | {"task": "sft"}
    with pytest.raises(SystemExit, match="use --task dpo"):
        training.sides_of(SimpleNamespace(**arguments))
    ladder = training.sides_of(SimpleNamespace(**(arguments | {"against": None, "ladder": True})))
    assert [entry.name for entry in ladder][-1] == "+ packed"
    assert not {"+ reference once", "+ prompt once"} & {entry.name for entry in ladder}


@pytest.mark.slow
@pytest.mark.parametrize("work", ["dpo"], indirect=True)
def test_one_update_on_two_devices(work, devices):
    """Weights and rows divided: the same program, with a half on each."""
    devices(2)
    side = sides.ours(work | {"examples": 4}, {})
    assert side.facts["devices"] == 2 and side.run()[1] > 0
    assert meshes.data_shards(meshes.make_mesh("fsdp=-1")) == 2
    assert State._fields[0] == "step"
