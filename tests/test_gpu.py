"""What a CPU can show of GPUs: programs lowered for CUDA, and the checks before the first update
with planted faults."""

import re
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira import cli
from easyaira.algorithms import reference, reference_cache
from easyaira.algorithms.dpo import answer_scores
from easyaira.algorithms.reference import make_score
from easyaira.config.model import ModelConfig
from easyaira.data import packing
from easyaira.distributed import compiler, sharding
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError
from easyaira.losses import preference
from easyaira.models import attention, cudnn
from easyaira.models.embedding import _scatter_add, _sum_by_id, sum_by_id
from easyaira.models.layers import Compute
from easyaira.models.layout import UNATTENDED
from easyaira.models.registry import model_of
from easyaira.plan import cost
from easyaira.run.run import run
from easyaira.train import kernel_check, log, resolve, step
from easyaira.train.metrics import Window
from easyaira.train.record import Record
from easyaira.train.resolve import ROW_MULTIPLE
from easyaira.train.setup import prepare
from easyaira.train.trainable import Adapters, FullWeights
from helpers import runs, tiny


def configured(task, model, data, out, **options):
    return runs.configure(task, model, data, out, **{"max_steps": 4} | options)


# 1. Sums that are the same every time


def unordered_scatters(text):
    """Scatters of a lowered program whose updates are added at places that may be the same."""
    scatters = []
    for scatter in re.finditer(
        r'"stablehlo\.scatter"\(.*?\) <\{(.*?)\}> \(\{(.*?)\}\)', text, re.S
    ):
        attributes, body = scatter.groups()
        if "stablehlo.add" in body and "unique_indices = true" not in attributes:
            scatters.append(scatter[0])
    return scatters


@pytest.fixture
def lowered(monkeypatch):
    """`lowered(platform, jitted, *args)` is its program as it is traced and lowered there."""

    def text_on(platform, jitted, *args):
        with monkeypatch.context() as patch:
            if platform == "cuda":
                patch.setattr(sharding, "device_kind", lambda: "NVIDIA H200")
            traced = jitted.trace(*args)
            return traced.lower(lowering_platforms=(platform,)).as_text()

    jax.clear_caches()
    yield text_on
    jax.clear_caches()


@pytest.fixture
def lowered_step(lowered):
    """`lowered_step(platform, setup, algorithm)` is the program of its largest update."""

    def text_on(platform, setup, algorithm):
        batch = cost.largest_update(setup, algorithm).batch
        step = SimpleNamespace(trace=partial(cost.trace_step, setup, algorithm))
        return lowered(platform, step, batch)

    return text_on


def test_a_scatter_that_adds_is_found():
    def of(unique):
        add = lambda x, at: x.at[at].add(1.0, unique_indices=unique)  # noqa: E731
        return jax.jit(add).lower(jnp.zeros(4), jnp.array([1, 1])).as_text()

    assert len(unordered_scatters(of(False))) == 1
    assert not unordered_scatters(of(True))


LORA = {"lora.r": 2, "lora.target_modules": "[q_proj,down_proj]", "lora.dropout": 0.1}
IN_STEP = {"dpo.precompute_ref_log_probs": False, "data.share_prompt": "never"}
STEPS = [
    ("sft", "mixtral", {"sft.router_aux_loss": True}),
    ("sft", "opt", {"gradient_accumulation_steps": 2}),
    ("sft", "llama", LORA | {"lora.quantize": "nf4"}),
    ("dpo", "gpt2", {"data.share_prompt": "always"}),
    ("dpo", "llama", IN_STEP | {"model.gradient_checkpointing": "full"}),
    ("dpo", "llama", {"mesh": "dp=2,fsdp=2,tp=2"}),
    ("reward", "llama", {}),
    ("reward", "bert", {"data.template": "chat"}),
    ("reward", "roberta", {"data.template": "chat", "mesh": "dp=2"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("task, kind, options", STEPS)
def test_no_step_adds_in_an_order_that_is_left_to_the_gpu(
    task, kind, options, models, data, tmp_path, devices, lowered_step
):
    if "mesh" in options:
        devices(8 if "tp" in options["mesh"] else 2)
    if task == "reward":
        tiny.save(tmp_path / kind, tiny.SCORERS[kind])
    model = tmp_path / kind if task == "reward" else models / kind
    rows = data / ("sft.jsonl" if task == "sft" else "dpo.jsonl")
    config, algorithm = configured(task, model, rows, tmp_path / "run", **options)
    setup = prepare(config, algorithm)
    assert not unordered_scatters(lowered_step("cuda", setup, algorithm))
    if "lora.r" not in options:  # the test sees what a CPU still does
        assert unordered_scatters(lowered_step("cpu", setup, algorithm))


def test_scoring_adds_in_one_order_too(models, data, tmp_path, lowered):
    config, algorithm = configured("dpo", models / "gpt2", data / "dpo.jsonl", tmp_path / "run")
    setup = prepare(config, algorithm)
    score = make_score(partial(answer_scores, setup.model, examples=setup.micro_batch))
    text = lowered("cuda", jax.jit(score), setup.model.shapes, setup.batches[0].arrays)
    assert "scatter" in text
    assert not unordered_scatters(text)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 300])
def test_sums_by_id_are_a_scatter_add(count):
    rng = np.random.default_rng(count)
    values = rng.normal(size=(3, count, 4)).astype(np.float32)
    ids = rng.integers(0, 12, (3, count)).astype(np.int32)
    ids[1] = 5  # one run
    wanted = np.zeros((3, 13, 4))
    for shard in range(3):
        np.add.at(wanted[shard], ids[shard], values[shard].astype(np.float64))
    actual = jax.jit(partial(sum_by_id, size=13))(values, ids)
    np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-6)


def test_sums_by_id_are_more_exact_than_one_after_another():
    values = np.random.default_rng(0).uniform(size=(1, 1 << 15, 1)).astype(np.float32)
    ids = np.zeros((1, 1 << 15), np.int32)
    exact = values.astype(np.float64).sum()
    ours = abs(float(sum_by_id(jnp.asarray(values), jnp.asarray(ids), size=1)[0, 0, 0]) - exact)
    theirs = abs(float(_scatter_add(values[0], ids[0], shape=(1, 1))[0, 0]) - exact)
    assert ours <= 2e-7 * exact < theirs


@pytest.mark.parametrize("axes", ["dp=1", "fsdp=8", "dp=2,fsdp=2,tp=2"])
def test_a_gpus_gradient_of_a_look_up_on_any_mesh(axes, devices):
    devices(1 if axes == "dp=1" else 8)
    rng = np.random.default_rng(0)
    d_rows = jnp.asarray(rng.normal(size=(16, 24, 8)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 200, (16, 24)), jnp.int32)
    wanted = np.zeros((256, 8))
    np.add.at(wanted, np.asarray(ids), np.asarray(d_rows, np.float64))
    with jax.set_mesh(meshes.make_mesh(axes)):
        compiled = jax.jit(partial(_sum_by_id, shape=(256, 8), rows="tp")).lower(d_rows, ids)
        compiled = compiled.compile()
        actual = compiled(d_rows, ids)
    np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-6)
    assert "all-gather" not in compiled.as_text()  # nobody sorts the tokens of others


@pytest.mark.parametrize("axes", ["dp=1", "dp=4"])
def test_sums_of_pairs_are_selected_by_the_device_that_holds_them(axes, devices):
    devices(int(axes[-1]))
    rng = np.random.default_rng(0)
    R, T, pairs = 8, 20, 8
    segment_ids = np.repeat(np.arange(1, 9), 1)[:, None] * np.ones((R, T), int)
    sides = rng.integers(0, 4, (R, T))
    mask = rng.random((R, T)) < 0.6
    mask &= (sides == 1) | (sides == 2)
    values = rng.normal(size=(R, T)).astype(np.float32)
    wanted = [[values[b][mask[b] & (sides[b] == s)].sum() for s in (1, 2)] for b in range(pairs)]
    with jax.set_mesh(meshes.make_mesh(axes)):
        sums = jax.jit(partial(preference.answer_sums, examples=pairs))
        actual = sums(values, mask, segment_ids, sides)
        text = sums.lower(values, mask, segment_ids, sides).compile().as_text()
    np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-6)
    assert "all-gather" not in text.replace("all-gather-done", "") or axes == "dp=1"


# 2. The check before the first update

LENGTHS = np.full((1, 4, 2), 300.0, np.float32)
LOGPS = np.random.default_rng(0).uniform(-3000, -2000, (1, 4, 2)).astype(np.float32)
NOISE = np.float32(7e-4) * np.random.default_rng(1).uniform(-1, 1, LOGPS.shape).astype(np.float32)


def test_equal_bits_pass():
    reference_cache.check_equal(LOGPS, LOGPS, LENGTHS, LOGPS)


def test_noise_of_a_gpu_passes_where_the_program_is_noisy():
    reference_cache.check_equal(LOGPS, LOGPS + NOISE, LENGTHS, LOGPS - NOISE)


def test_one_bit_is_refused_where_the_program_is_not_noisy():
    other = LOGPS.copy()
    other[0, 2, 1] = np.nextafter(other[0, 2, 1], np.float32(0))
    with pytest.raises(ConfigError, match="rejected answer is .* by the policy and .* by the ref"):
        reference_cache.check_equal(LOGPS, other, LENGTHS, LOGPS)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("planted", [1e-3, 0.1, np.nan])
def test_a_difference_is_refused(noisy, planted):
    scale = np.float32(0.01)  # of short answers
    logps, noise = LOGPS * scale, NOISE * scale / 100
    other = logps + noise if noisy else logps.copy()
    other[0, 1, 0] += planted
    with pytest.raises(ConfigError, match="differ before the first update"):
        reference_cache.check_equal(logps, other, LENGTHS / 30, logps - noise if noisy else logps)


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.slow
def test_a_reference_that_differs_ends_in_one_line(
    in_step, models, data, tmp_path, monkeypatch, capsys
):
    def planted(setup):
        return jax.tree.map(lambda x: x * 1.001, setup.start_weights())

    options = {"dpo.precompute_ref_log_probs": not in_step}
    config, algorithm = configured(
        "dpo", models / "gpt2", data / "dpo.jsonl", tmp_path / "run", **options
    )
    if in_step:
        monkeypatch.setattr(reference, "reference_weights", planted)
    else:  # a damaged cache
        logps_of = reference_cache.logps_of
        monkeypatch.setattr(reference_cache, "logps_of", lambda *args: logps_of(*args) + 1e-3)
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda argv: run(config, algorithm, dry_run=None), [])
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert error[-1].startswith("error: policy and reference have the same weights but differ")
    assert "Traceback" not in "".join(error)


# 3. Attention


def test_rows_on_gpus_are_multiples_of_128(models, data, tmp_path):
    config, algorithm = configured("dpo", models / "gpt2", data / "dpo.jsonl", tmp_path / "run")
    setup = prepare(config, algorithm)
    wide = replace(setup.batches, multiple=ROW_MULTIPLE["gpu"])
    assert {shape.length % 128 for shape in wide.shapes} == {0}
    for update in range(len(wide)):
        assert wide[update].shape.length % 128 == 0
        assert wide[update].num_tokens == setup.batches[update].num_tokens


def checked(setup, monkeypatch, *kernels):
    """`choose` as on an accelerator with these kernels."""
    monkeypatch.setattr(kernel_check, "KERNELS", {"cpu": kernels})
    monkeypatch.setattr(kernel_check, "obstacle", lambda *args: None)  # tiny heads are narrow
    with setup.model.on(setup.mesh):
        return kernel_check.choose(setup.with_attention(kernels[0]))


@pytest.fixture
def attention_of(monkeypatch):
    """`attention_of(plant)`: kernels compute what XLA does, but for what `plant(kernel, q, mask)`
    makes of the queries."""
    attention = kernel_check.attention

    def use(plant):
        def planted(q, k, v, segment_ids, sides, compute, *, causal):
            if compute.attention != "xla":
                q = plant(compute.attention, q, segment_ids)
            compute = replace(compute, attention="xla")
            return attention(q, k, v, segment_ids, sides, compute, causal=causal)

        monkeypatch.setattr(kernel_check, "attention", planted)

    kernel_check._program.cache_clear()  # of programs with another test's kernels
    return use


@jax.custom_vjp
def nan_gradient(q, segment_ids):
    return q


def _nan_backward(segment_ids, d_q):
    return jnp.where((segment_ids == 0)[..., None, None], jnp.nan, d_q), None


nan_gradient.defvjp(lambda q, segment_ids: (q, segment_ids), _nan_backward)


@pytest.fixture
def setup_of(models, data, tmp_path):
    def make(**options):
        return prepare(
            *configured("dpo", models / "llama", data / "dpo.jsonl", tmp_path / "run", **options)
        )

    return make


@pytest.mark.slow
def test_a_kernel_that_agrees_is_used(setup_of, attention_of, monkeypatch, capsys):
    attention_of(lambda kernel, q, segment_ids: q)
    setup, fact = checked(setup_of(**{"model.dtype": "bfloat16"}), monkeypatch, "cudnn", "pallas")
    assert setup.model.compute.attention == "cudnn"
    assert fact == {"attention": "cudnn"}
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_means_another_kernel(
    setup_of, attention_of, monkeypatch, capsys
):
    attention_of(lambda kernel, q, ids: nan_gradient(q, ids) if kernel == "cudnn" else q)
    setup, fact = checked(setup_of(), monkeypatch, "cudnn", "pallas")
    assert setup.model.compute.attention == "pallas"
    assert re.fullmatch(
        r"pallas \(cudnn: the kernel's gradient of q was not finite on rows of \d+\)",
        fact["attention"],
    )
    assert capsys.readouterr().out == f"attention: {fact['attention']}\n"


@pytest.mark.slow
def test_other_bits_the_second_time_mean_another_kernel(
    setup_of, attention_of, monkeypatch, capsys
):
    """As atomics give them: a callback that counts its calls stands for those."""
    calls = []

    def noisy(kernel, q, ids):
        def next_noise():
            calls.append(1)
            return np.float32(1 + 1e-3 * (len(calls) % 7))

        if kernel == "pallas":
            return q
        noise = jax.pure_callback(next_noise, jax.ShapeDtypeStruct((), jnp.float32))
        return (q * jax.lax.stop_gradient(noise)).astype(q.dtype)

    attention_of(noisy)
    setup, fact = checked(setup_of(**{"model.dtype": "bfloat16"}), monkeypatch, "cudnn", "pallas")
    assert setup.model.compute.attention == "pallas"
    assert "cudnn: the kernel gave different bits in a second call on rows of" in fact["attention"]


def test_a_kernel_whose_program_fails_means_another_kernel(setup_of, monkeypatch):
    def fails(*args, of_kernel, **options):
        if of_kernel.attention == "cudnn":
            raise IndexError("absl::container_internal::raw_hash_map<>::at")
        return {}, np.bool_(True)

    monkeypatch.setattr(kernel_check, "compare", fails)
    setup, fact = checked(setup_of(), monkeypatch, "cudnn", "pallas")
    assert setup.model.compute.attention == "pallas"
    assert fact["attention"].startswith("pallas (cudnn: IndexError: absl::container")


@pytest.mark.slow
def test_a_wrong_kernel_means_xla(setup_of, attention_of, monkeypatch):
    attention_of(lambda kernel, q, segment_ids: q * 1.3)
    setup, fact = checked(setup_of(**{"model.dtype": "bfloat16"}), monkeypatch, "cudnn")
    assert setup.model.compute.attention == "xla"
    assert "off by" in fact["attention"]


def test_a_kernel_that_does_not_compile_means_xla(setup_of, attention_of, monkeypatch):
    def refuse(kernel, q, segment_ids):
        raise NotImplementedError("head_dim 7")

    attention_of(refuse)
    setup, fact = checked(setup_of(), monkeypatch, "cudnn")
    assert setup.model.compute.attention == "xla"
    assert "NotImplementedError: head_dim 7" in fact["attention"]


def test_a_named_kernel_is_not_checked(setup_of, monkeypatch):
    setup = setup_of(**{"model.attention": "xla"}).with_attention("cudnn")
    monkeypatch.setattr(kernel_check, "check", lambda *args: pytest.fail("checked"))
    assert kernel_check.choose(setup) == (setup, {})


@pytest.mark.parametrize(
    "kernel, options, reason",
    [
        ("cudnn", {"dtype": jnp.float32}, "needs 16 bits"),
        ("cudnn", {"width": 192}, "this model's have 192"),
        ("cudnn", {"width": 36}, "this model's have 36"),
        ("pallas", {"dropout": 0.1}, "has no dropout"),
        ("cudnn", {}, None),
        ("pallas", {"dtype": jnp.float32, "width": 192}, None),
    ],
)
def test_what_a_kernel_cannot_compute(kernel, options, reason):
    width = options.pop("width", 64)
    config = {"model_type": "llama", "hidden_size": 4 * width, "num_attention_heads": 4}
    compute = Compute(**{"dtype": jnp.bfloat16} | options)
    obstacle = resolve.obstacle(kernel, model_of(config, "a test"), compute)
    assert (obstacle is None) if reason is None else reason in obstacle


@pytest.mark.parametrize("kernel", ["cudnn", "pallas", "splash"])
def test_windows_and_soft_caps_need_xla(kernel):
    def obstacle(max_length, kind, **config):
        sizes = {"model_type": kind, "hidden_size": 256, "head_dim": 64, "sliding_window": 32}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2} | config
        compute = Compute(jnp.bfloat16, max_length=max_length)
        return resolve.obstacle(kernel, model_of(sizes, "a test"), compute)

    plain = {"query_pre_attn_scalar": 64}
    assert "scaled, capped or biased" in obstacle(32, "gemma2", **plain)
    assert "scaled, capped or biased" in obstacle(32, "gemma3_text", query_pre_attn_scalar=32)
    for kind, config in {"gemma3_text": plain, "mistral": {}}.items():
        assert "longer than this model's of 32" in obstacle(33, kind, **config)
        assert obstacle(32, kind, **config) is None


def test_encoders_need_attention_that_is_not_causal():
    model = model_of({"model_type": "bert"}, "a test")
    assert "encoders" in resolve.obstacle("pallas", model, Compute(jnp.bfloat16))
    assert resolve.obstacle("cudnn", model, Compute(jnp.bfloat16)) is None


def of_a_gpu(options, width=64):
    """How a run on a GPU would compute a model with heads of this width."""
    gpu = SimpleNamespace(platform="gpu", device_kind="a card")
    config = SimpleNamespace(
        model=ModelConfig("a test", **{"dtype": "auto", "attention": "auto"} | options)
    )
    sizes = {"model_type": "llama", "hidden_size": 4 * width, "num_attention_heads": 4}
    mesh = SimpleNamespace(devices=np.array([gpu]))
    return resolve._compute(config, mesh, model_of(sizes, "a test"), 64)


@pytest.mark.parametrize(
    "options, width, chosen",
    [
        ({}, 64, "pallas"),
        ({}, 256, "pallas"),
        ({"attention": "cudnn"}, 64, "cudnn"),
        ({"dtype": "float32"}, 64, "xla"),
        ({"dropout": 0.1}, 64, "xla"),
        ({"attention": "xla"}, 64, "xla"),
    ],
)
def test_auto_is_a_kernel_that_can_compute_the_model(options, width, chosen):
    assert of_a_gpu(options, width).attention == chosen


@pytest.mark.slow
def test_on_a_gpu_layers_are_computed_without_a_loop(models, data, tmp_path):
    """And give the numbers of the loop: on an H200 the same bits, here within rounding."""
    assert of_a_gpu({}).unroll_up_to == 24
    config, algorithm = configured("sft", models / "llama", data / "sft.jsonl", tmp_path / "run")
    setup = prepare(config, algorithm)
    params = setup.model.init(jax.random.key(0))
    rows = jax.tree.map(lambda array: jnp.asarray(array[0]), setup.batches[0].arrays)

    def gradients(limit):
        model = replace(setup.model, compute=replace(setup.model.compute, unroll_up_to=limit))
        loss_fn = algorithm.loss_fn(replace(setup, model=model))
        step = jax.jit(jax.grad(lambda params: loss_fn(params, None, rows, None)["loss"][0]))
        return step.lower(params).as_text().count("stablehlo.while"), step(params)

    layers = 2
    loops, expected = gradients(layers - 1)
    fewer, actual = gradients(layers)
    assert fewer == loops - 2  # forward and backward
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("task, most", [("sft", 0), ("dpo", 12)])
def test_on_a_cpu_many_pairs_pay_for_layers_without_a_loop(
    task, most, models, data, tmp_path, monkeypatch
):
    """A pass over the data decides, not the number of updates: an extended run keeps its bits."""

    def unrolled(steps):
        rows, out = data / f"{task}.jsonl", tmp_path / "run"
        config, algorithm = configured(task, models / "llama", rows, out, max_steps=steps)
        return prepare(config, algorithm).model.compute.unroll_up_to

    assert [unrolled(steps) for steps in (4, 4000)] == [0, 0]
    monkeypatch.setattr(packing, "CPU_COMPILATION", 1e3)
    assert [unrolled(steps) for steps in (4, 4000)] == [most, most]


def compiled_gradients(sizes, **compute):
    """The compiled gradients of a GPT-2 whose layers have no loop."""
    config = tiny.CONFIGS["gpt2"] | {"n_embd": 64, "n_layer": 8} | sizes
    model = model_of(config, "here", Compute(unroll_up_to=24, **compute))
    rows = tiny.layout(np.ones((8, 64), np.int32))

    def loss_fn(params):
        return (model.apply(params, rows)[0] ** 2).sum()

    return jax.jit(jax.grad(loss_fn)).lower(model.shapes).compile()


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_gradient_checkpointing_saves_memory_where_layers_could_be_unrolled(policy, optimized):
    """Without a loop, XLA merged what is computed again with what it repeats: GPT-2 124M took 16.4
    GiB of an H100 with checkpointing as without, and takes 2.6."""
    plain, saving = (
        compiled_gradients({}, gradient_checkpointing=kept).memory_analysis().temp_size_in_bytes
        for kept in ("none", policy)
    )
    assert saving < 0.6 * plain


def test_unrolled_layers_compute_activations_anew_in_their_backward_pass(optimized):
    """XLA kept the forward ones in float32: GPT-2 124M took 16.4 GiB of an H100, and takes 11.3."""
    text = compiled_gradients({}).as_text()
    assert len(re.findall(r" tanh\(", text)) >= 2 * 8


def test_a_named_kernel_that_cannot_compute_the_model_is_refused():
    with pytest.raises(ConfigError, match="attention: cudnn needs 16 bits.*; use auto"):
        of_a_gpu({"attention": "cudnn", "dtype": "float32"})


def test_one_update_of_each_shape_is_checked(setup_of):
    batches = setup_of(train_batch_size=2).batches
    seen = {batches[update].shape for update in batches.of_each_shape()}
    assert seen == {batches[update].shape for update in range(len(batches))}
    assert batches.of_each_shape()[0] == 0


@pytest.mark.slow
def test_the_choice_is_in_the_metrics_and_the_card(
    models, data, tmp_path, attention_of, monkeypatch
):
    attention_of(lambda kernel, q, segment_ids: q)
    choose = kernel_check.choose

    def on_accelerator(setup):
        monkeypatch.setattr(kernel_check, "KERNELS", {"cpu": ("cudnn",)})
        monkeypatch.setattr(kernel_check, "obstacle", lambda *args: None)
        chosen, fact = choose(setup.with_attention("cudnn"))
        return chosen.with_attention("xla"), fact

    monkeypatch.setattr(kernel_check, "choose", on_accelerator)
    config, algorithm = configured(
        "sft", models / "gpt2", data / "sft.jsonl", tmp_path / "run", export=True
    )
    run(config, algorithm, dry_run=None)
    rows = log.read(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["attention"] == "cudnn"
    assert "| Attention | cudnn |" in (tmp_path / "run" / "hf" / "README.md").read_text()


@pytest.mark.skipif(not tiny.SHARED.exists(), reason="shared data are not here")
def test_in_cudnns_mask_every_query_sees_a_key(monkeypatch):
    with np.load(tiny.SHARED.parent / "cases/gpu-nan/layout.npz") as layout:
        segment_ids, sides = (jnp.asarray(layout[name][0]) for name in ("segment_ids", "sides"))
    R, T = segment_ids.shape
    masks = []

    def kernel(q, k, v, *, mask, implementation):
        masks.append(np.asarray(mask))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q = jnp.zeros((R, T, 2, 64), jnp.bfloat16)
    attention.attention(q, q, q, segment_ids, sides, Compute(jnp.bfloat16, attention="cudnn"))
    real = ((segment_ids > 0) & (sides != UNATTENDED))[:, None, :, None]
    assert not real.all() and masks[0].any(-1).all()
    wanted = attention.visible(segment_ids, sides)[:, None]
    np.testing.assert_array_equal(masks[0] & real, wanted & real)


def lowered_attention(reproducible, monkeypatch, lowered):
    """cuDNN's calls in two layers and their gradients, lowered for CUDA."""
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)  # of no device
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: True)
    compute = Compute(jnp.bfloat16, attention="cudnn")
    ids, q = jnp.ones((2, 128), jnp.int32), jnp.zeros((2, 128, 2, 64), jnp.bfloat16)

    def two_layers(q):
        for _ in range(2):
            out = attention.attention(q, q, q, ids, 0 * ids, compute)
            q = out.reshape(q.shape)
        return q.astype(jnp.float32).sum()

    with cudnn.reproducible() if reproducible else nullcontext():
        text = lowered("cuda", jax.jit(jax.grad(two_layers)), q)
    return [line for line in text.splitlines() if "@__cudnn$fmha" in line]


@pytest.mark.parametrize("reproducible", [True, False])
def test_cudnns_backward_pass_has_a_fixed_order_in_every_layer(reproducible, monkeypatch, lowered):
    calls = lowered_attention(reproducible, monkeypatch, lowered)
    fixed = ["force_deterministic" in call for call in calls]
    backward = ["Backward" in call for call in calls]
    assert sum(backward) == 2 and len(calls) == 4
    assert fixed == (backward if reproducible else [False] * 4)


def test_a_training_step_on_a_gpu_is_compiled_for_reproducible_bits(monkeypatch):
    reproducible = {"xla_gpu_exclude_nondeterministic_ops": True}
    of_adapters = reproducible | {"xla_gpu_enable_triton_gemm": False}
    for platform, full, adapters in [("gpu", reproducible, of_adapters), ("cpu", None, None)]:
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        whole = FullWeights(None, mesh, None, None, None)
        assert whole.compiler_options == full
        assert Adapters(None, mesh, None, None, None).compiler_options == adapters
    seen = []
    monkeypatch.setattr(jax, "jit", lambda f, **options: seen.append(options))
    leaf = SimpleNamespace(sharding=None)
    step.jit_train_step(None, None, step.State(leaf, {}, {}, leaf), reproducible)
    step.jit_eval_step(None, of_adapters)
    inner, *programs = seen
    assert inner == {"inline": True}
    assert [options["compiler_options"] for options in programs] == [reproducible, of_adapters]
    monkeypatch.undo()
    for options in (compiler.ADAPTERS["gpu"], compiler.UNTIMED["gpu"]):
        jax.jit(lambda x: x, compiler_options=options)(1)  # an unknown option is an error
    with pytest.raises(Exception, match="no_such"):
        jax.jit(lambda x: x, compiler_options={"xla_gpu_no_such": True})(1)


class Sum:
    """A sum on a device that has it `after` seconds from now."""

    def __init__(self, after):
        self.at = time.perf_counter() + after

    def block_until_ready(self):
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.asarray(-1.0, dtype)


def test_the_last_update_takes_its_own_time(monkeypatch):
    """A GPU's start of an update returns when that update has nearly ended, so that the sums of the
    one before are fetched late."""
    rows = []
    log = SimpleNamespace(advance=lambda n: None, write=lambda n, row: rows.append(row))
    batches = [None] * 5
    record = Record(
        log,
        Window(),
        batches,
        start=0,
        every=1,
        until=5,
        facts={},
        schedule=lambda step: 0.0,
        flops=1.0,
        peak=None,
        latest=lambda: None,
    )
    batch = SimpleNamespace(shape=(1, 8), positions=8, filled=8, num_tokens=8)
    ready = SimpleNamespace(batch=batch, waited=0.0)
    for number in range(1, 6):
        sums = {"loss": (Sum(0.4), 1), "failed": (Sum(0.4), 1)}
        time.sleep(0.32)  # the update's start
        record.update(number, ready, sums)
        record.resume()
    record.to_save()
    times = [row["step_time"] for row in rows]
    assert times[0] is None  # it includes compilation
    assert times[1:] == pytest.approx([0.36] * 4, abs=0.12)


# 4. float32 is float32


@pytest.mark.parametrize(
    "dtype, wanted", [("float32", "HIGHEST"), ("tf32", "HIGH"), ("bfloat16", "DEFAULT")]
)
@pytest.mark.slow
def test_precision_of_products(dtype, wanted, models, data, tmp_path, lowered_step):
    options = {"model.dtype": dtype}
    config, algorithm = configured("sft", models / "gpt2", data / "sft.jsonl", tmp_path, **options)
    setup = prepare(config, algorithm)
    with setup.model.on(setup.mesh):
        text = lowered_step("cuda", setup, algorithm)
    precisions = set(re.findall(r"dot_general.*?precision = \[(\w+), \w+\]", text))
    assert (precisions or {"DEFAULT"}) == {wanted}


@pytest.mark.slow
def test_scores_are_float32_in_bfloat16_models(data, tmp_path, lowered_step):
    tiny.save(tmp_path / "llama", tiny.SCORERS["llama"])
    config, algorithm = configured(
        "reward",
        tmp_path / "llama",
        data / "dpo.jsonl",
        tmp_path / "run",
        **{"model.dtype": "bfloat16"},
    )
    setup = prepare(config, algorithm)
    with setup.model.on(setup.mesh):
        text = lowered_step("cuda", setup, algorithm)
    for line in text.splitlines():
        if "dot_general" in line and "bf16" not in line:
            assert "precision = [HIGHEST, HIGHEST]" in line
