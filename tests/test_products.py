"""Products: factors in the computing dtype, sums in float32, results rounded once."""

import ctypes
import math
import re
import resource
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira.distributed import compiler
from easyaira.models import cache, product
from easyaira.models.attention import attention
from easyaira.models.embedding import Embedding
from easyaira.models.layers import Compute, LayerNorm, RMSNorm, Scores
from easyaira.models.llama import MLP, LlamaConfig
from easyaira.models.product import by_rows, linear, packed, unpacked
from easyaira.plan import cost
from easyaira.train.setup import prepare
from helpers import runs, tiny
from helpers.formulas import attention_of

BF16, F32 = jnp.bfloat16, jnp.float32


def narrow_products(lowered):
    """Products whose result has 16 bits. XLA's CPU compiler replaces them by products of float32
    numbers, at half the speed."""
    return re.findall(r"dot_general [^\n]*-> tensor<[^>]*xbf16>", lowered.as_text())


def slow_sums(lowered):
    """Products of 16-bit numbers that sum over one inner axis of the first factor: a quarter of the
    speed."""
    products = re.finditer(
        r"dot_general [^\n]*contracting_dims = \[(\d+)\] x [^\n]* : \(tensor<([^>]*)xbf16>",
        lowered.as_text(),
    )
    return [m[0] for m in products if int(m[1]) < m[2].count("x")]


def narrow_writes(lowered):
    """Writes of 16-bit floats into a larger array, which is converted to float32 for each."""
    return re.findall(r"dynamic_update_slice [^\n]*-> tensor<[^>]*xbf16>", lowered.as_text())


def test_slow_operations_are_found():
    a = jnp.ones((64, 64), BF16)
    assert narrow_products(jax.jit(jnp.matmul).lower(a, a))
    assert not narrow_products(jax.jit(linear).lower(a, a))
    wide = partial(jnp.einsum, preferred_element_type=F32)
    assert slow_sums(jax.jit(lambda a: wide("nk,nu->ku", a, a)).lower(a))
    assert not slow_sums(jax.jit(lambda a: wide("nk,ku->nu", a, a)).lower(a))
    assert narrow_writes(
        jax.jit(lambda a, i: jax.lax.dynamic_update_slice(a, a[:1], (i, 0))).lower(a, 3)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, kind, options",
    [
        ("sft", "gpt2", {}),
        ("sft", "llama", {"model.gradient_checkpointing": "full"}),
        ("sft", "llama", {"lora.r": 2, "lora.target_modules": "[q_proj]", "lora.quantize": "nf4"}),
        ("sft", "mixtral", {"sft.router_aux_loss": True}),
        ("dpo", "opt", {"dpo.precompute_ref_log_probs": False}),
        ("reward", "bert", {"data.template": "chat"}),
    ],
)
def test_no_product_of_a_step_is_a_slow_one(task, kind, options, models, data, tmp_path):
    if task == "reward":
        tiny.save(tmp_path / kind, tiny.SCORERS[kind])
    model = tmp_path / kind if task == "reward" else models / kind
    rows = data / ("sft.jsonl" if task == "sft" else "dpo.jsonl")
    options = {"max_steps": 4, "model.dtype": "bfloat16"} | options
    config, algorithm = runs.configure(task, model, rows, tmp_path / "run", **options)
    setup = prepare(config, algorithm)
    with setup.model.on(setup.mesh):
        update = cost.largest_update(setup, algorithm)
        lowered = cost.trace_step(setup, algorithm, update.batch).lower()
    assert "dot_general" in lowered.as_text()
    assert not narrow_products(lowered) and not slow_sums(lowered)
    # inputs of layers that are computed again stay 16-bit floats
    assert "model.gradient_checkpointing" in options or not narrow_writes(lowered)


def relative(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@partial(jax.jit, static_argnums=0)
def with_gradients(of, grad, *given):
    """The value of a function, and the gradients of its product with `grad`."""
    value, pull = jax.vjp(of, *given)
    return value, *pull(grad)


def numbers(shape, dtype=F32, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("lacks, narrow", [(True, 0), (False, 3)])
@pytest.mark.parametrize("features", [(80,), (5, 16)])
def test_a_linear_layer_and_its_gradients_are_those_of_float32_rounded_once(
    features, lacks, narrow, monkeypatch
):
    """On a CPU that lacks products of 16 bits, their factors are converted to float32."""
    monkeypatch.setattr(product, "lacks_16_bit_products", lambda: lacks)
    x, grad = numbers((4, 32, 64), BF16), numbers((4, 32, *features), BF16, seed=1)
    kernel = numbers((64, *features), seed=2, scale=0.2)
    given = partial(linear), grad, x, kernel
    products = re.findall(r"dot_general .*xbf16>", with_gradients.lower(*given).as_text())
    assert len(products) == narrow
    y, d_x, d_kernel = with_gradients(*given)
    rounded = np.asarray(kernel.astype(BF16), np.float64)
    exact_x, exact_grad = (np.asarray(a, np.float64) for a in (x, grad))
    assert (y.dtype, d_x.dtype, d_kernel.dtype) == (BF16, BF16, F32)
    assert relative(y, np.tensordot(exact_x, rounded, 1)) < 2**-9
    outer = list(range(2, exact_grad.ndim)), list(range(1, rounded.ndim))
    assert relative(d_x, np.tensordot(exact_grad, rounded, outer)) < 2**-9
    exact_kernel = np.tensordot(exact_x, exact_grad, [(0, 1), (0, 1)])
    assert relative(d_kernel, exact_kernel) < 1e-6  # by JAX's own derivative: 1.6e-3


@pytest.mark.parametrize(
    "instructions, lacks",
    [
        ("sse2 avx2 fma", True),
        ("avx2 avx512f avx512_bf16", True),
        ("avx2 avx512_bf16 amx_bf16", False),
        ("asimd bf16", False),
        ("arm", False),
    ],
)
def test_which_cpus_lack_products_of_16_bits(instructions, lacks, monkeypatch):
    monkeypatch.setattr(compiler, "instructions", lambda: instructions)
    assert compiler.lacks_16_bit_products.__wrapped__() == lacks  # without its cache


def test_the_gradient_of_inputs_is_summed_over_one_axis():
    """Over several, XLA's CPU transposes a copy of the kernel first."""
    x, kernel, d_y = jnp.ones((4, 32, 64)), jnp.ones((64, 3, 16)), jnp.ones((4, 32, 3, 16))
    d_x = jax.jit(lambda kernel, d_y: jax.vjp(lambda x: linear(x, kernel), x)[1](d_y))
    text = d_x.lower(kernel, d_y).as_text()
    assert re.findall(r"dot_general .* contracting_dims = \[(.*?)\]", text) == ["2"]


@pytest.mark.parametrize("features", [(48,), (3, 16)])
def test_the_gradient_of_a_bias_is_a_float32_sum(features):
    y, grad = (numbers((4, 320, *features), BF16, seed) for seed in (0, 1))
    bias = jnp.asarray(np.full(features, 0.3, np.float32))
    sums, d_y, d_bias = with_gradients(product.add_bias, grad, y, bias)
    assert (sums.dtype, d_y.dtype, d_bias.dtype) == (BF16, BF16, F32)
    np.testing.assert_array_equal(sums, y + bias.astype(BF16))
    np.testing.assert_array_equal(d_y, grad)
    exact = np.asarray(grad, np.float64).sum((0, 1))
    assert relative(d_bias, exact) < 1e-6  # by JAX's own derivative: 2e-3


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (16,), (17,), (32,), (33,), (48,), (65,)])
@pytest.mark.parametrize("dtype, bound", [(F32, 2e-6), (BF16, 2**-9)])
def test_few_rows_and_many_times_a_kernel_by_rows(rows, dtype, bound):
    """One row of 16 bits is multiplied twice. Up to 16 rows stand second in their product, and up
    to 64 if it is small; between them, float32 only a power of two."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*rows, 40)), dtype)
    kernel = jnp.asarray(rng.normal(size=(3, 24, 40)), dtype)
    y = jax.jit(by_rows, static_argnums=2)(x, kernel, dtype)
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(kernel, np.float64), (-1, -1))
    assert (y.shape, y.dtype) == ((*rows, 3, 24), dtype) and relative(y, exact) < bound


def test_rows_of_a_16_bit_table_are_read_without_converting_it():
    table, ids = jnp.ones((50, 8), BF16), jnp.array([3, 49])
    module = Embedding(50, 8, 1.0)

    def read(packed_table):
        return module.apply({"params": {"embedding": unpacked(packed_table, BF16)}}, ids, BF16)

    compiled = jax.jit(read).lower(packed(table)).compile()
    assert (compiled(packed(table)) == table[ids]).all()
    assert "50,8]" in (program := compiled.as_text()) and not re.search(r"f32\[50,8\]", program)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(F32, 2e-6), (BF16, 4e-3)])
@pytest.mark.parametrize("heads, length", [((4, 4), 48), ((4, 2), 48), ((4, 2), 700)])
def test_attention_and_its_gradients_are_those_of_the_formula(heads, length, dtype, bound):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, count, 16)), dtype)
        for count in (heads[0], heads[1], heads[1])
    )
    grad = jnp.asarray(rng.normal(size=(2, length, heads[0] * 16)), dtype)
    place = np.arange(length, dtype=np.int32)
    rows = [np.stack([x] * 2) for x in (1 + place // 20, place % 20 // 7)]
    given = [jnp.asarray(x) for x in rows]
    out = with_gradients(lambda *x: attention(*x, *given, Compute(dtype)), grad, q, k, v)
    (segment, other_segment), (side, other_side) = ((x[:, :, None], x[:, None]) for x in rows)
    mask = (segment == other_segment) & ((other_side == 0) | (other_side == side))
    wanted, gradients = attention_of(q, k, v, mask & np.tri(length, dtype=bool), grad)
    for actual, exact in zip(out, (wanted, *gradients), strict=True):
        assert actual.dtype == dtype and relative(actual, exact) < bound


@pytest.mark.parametrize("few, G", [(1, 1), (4, 1), (8, 1), (4, 3)])
@pytest.mark.parametrize("window", [32, None])
@pytest.mark.parametrize("dtype, bound", [(F32, 2e-6), (BF16, 4e-3)])
@pytest.mark.slow
def test_attention_over_a_cache_is_that_of_the_formula_and_widens_few_rows(
    few, G, window, dtype, bound, monkeypatch
):
    """A 16-bit cache is converted to float32 a few rows and slots at a time, however many there
    are."""
    rng = np.random.default_rng(0)
    R, K, W, N = 8, 2, 48, 16
    monkeypatch.setattr(product, "CACHED", few * K * W * N)
    monkeypatch.setattr(cache, "TILE", 16)
    q = jnp.asarray(rng.normal(size=(R, 1, K * G, N)), dtype)
    kept = [jnp.asarray(rng.normal(size=(R, K, W, N)), dtype) for _ in range(2)]
    lengths = jnp.array([1, 48, 17, 30, 5, 40, 2, 33])

    def attend(clock, q, *kept):
        kept = tuple(map(packed, kept))
        return cache.attend(q, kept, lengths, clock, Scores(), window=window)

    compiled = jax.jit(attend).lower(np.int32(0), q, *kept).compile()
    k, v = (np.repeat(np.asarray(x, np.float64), G, axis=1) for x in kept)
    scores = np.einsum("rhn,rhwn->rhw", np.asarray(q, np.float64)[:, 0], k) / math.sqrt(N)
    for clock in (100, 95, 48):  # within a tile of slots, at its end, its start
        age = (clock - np.arange(W)) % W
        visible = (age < np.array(lengths)[:, None]) & (age < (window or W))
        weights = np.where(visible[:, None], np.exp(scores), 0)
        exact = np.einsum("rhw,rhwn->rhn", weights / weights.sum(-1, keepdims=True), v)[:, None]
        assert relative(compiled(np.int32(clock), q, *kept), exact) < bound
    if G == 1:  # 16-bit products of several rows are not converted
        program = compiled.as_text()
        slots = W if dtype == F32 else 16
        shapes = re.findall(rf"f32\[([\d,]+),{slots},16\]", program)
        at_a_time = max(math.prod(map(int, shape.split(","))) for shape in shapes) // K
        assert at_a_time == (R if dtype == F32 else few)


def test_attention_over_a_cache_visits_the_tiles_that_hold_tokens(monkeypatch):
    """Any other is NaN here; a row without tokens visits none and is 0."""
    R, K, W, N = 4, 2, 64, 16
    monkeypatch.setattr(product, "CACHED", K * W * N)
    monkeypatch.setattr(cache, "TILE", 16)
    rng = np.random.default_rng(0)
    clock, lengths = 71, np.array([9, 8, 0, 25])  # the newest token is in slot 7
    age = (clock - np.arange(W)) % W
    newest_of_tile = age.reshape(4, 16).min(1).repeat(16)
    unvisited = newest_of_tile >= lengths[:, None]
    kept = [rng.normal(size=(R, K, W, N)) for _ in range(2)]
    kept = [np.where(unvisited[:, None, :, None], np.nan, x) for x in kept]
    kept = [packed(jnp.asarray(x, BF16)) for x in kept]
    q = jnp.asarray(rng.normal(size=(R, 1, K, N)), BF16)
    out = cache.attend(q, tuple(kept), jnp.asarray(lengths), jnp.int32(clock), Scores())
    assert jnp.isfinite(out).all() and (out[2] == 0).all() and (out[0] != 0).all()


def test_a_parameter_of_another_shape_is_refused():
    norm = LayerNorm(1e-5)
    variables = norm.init(jax.random.key(0), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"scale has the shape \(4,\) instead of \(1,\)"):
        norm.apply(variables, jnp.ones((2, 1)))  # it would be broadcast


def test_a_norm_keeps_its_input_and_nothing_as_large():
    norm, x = LayerNorm(1e-5), jnp.ones((4, 32, 64), BF16)
    params = norm.init(jax.random.key(0), x)
    _, pull = jax.vjp(norm.apply, params, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.uint16]  # its bits, see product.packed


def test_a_gated_layer_keeps_both_factors_and_their_product():
    layer, x = MLP(LlamaConfig(intermediate_size=192)), jnp.ones((4, 32, 64), BF16)
    params = layer.init(jax.random.key(0), x)
    _, pull = jax.vjp(layer.apply, params, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", ())[-1:] == (192,)]
    assert [leaf.dtype for leaf in kept if leaf.ndim == 3] == [jnp.uint16] * 3


HELD = """
import sys
from pathlib import Path
from easyaira.allocator import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
text = b"x" * 2**28
del text
print(Path("/proc/self/statm").read_text().split()[1])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_stays_in_the_process():
    def held(how):
        command = [sys.executable, "-c", HELD, how]
        pages = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        return int(pages) * resource.getpagesize()

    assert held("as it is") < 2**28 <= held("kept")


@pytest.mark.parametrize("shape", [(1, 70, 24), (3, 5, 4, 8)])
@pytest.mark.parametrize("norm", [LayerNorm(1e-2), RMSNorm(1e-2), RMSNorm(1e-2, offset=1.0)])
def test_the_derivative_of_a_norm_is_that_of_its_formula(norm, shape):
    """At an epsilon that counts, with JAX's own derivative of the equation."""
    rng = np.random.default_rng(0)
    x, d_y = (jnp.asarray(rng.normal(0, 0.3, shape), F32) for _ in range(2))
    params = jax.eval_shape(norm.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 1, p.shape), F32), params)

    def formula(params, x):
        given = params["params"]
        if isinstance(norm, LayerNorm):
            x = x - x.mean(-1, keepdims=True)
        normed = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-2)
        return normed * (getattr(norm, "offset", 0.0) + given["scale"]) + given.get("bias", 0)

    (out, *grads), (wanted, *wanted_grads) = (
        with_gradients(of, d_y, params, x) for of in (norm.apply, formula)
    )
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
    for grad, other in zip(*map(jax.tree.leaves, (grads, wanted_grads)), strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kernel", [(24, 7), (7, 24), (8, 3, 5), (16, 3, 2)])
@pytest.mark.slow
def test_gradients_of_wide_and_narrow_kernels(kernel, dtype):
    """Against float64. A narrow kernel's is computed transposed. A float32 product sums over the
    last axis of its first factor: over the first one, XLA's CPU takes up to twice as long."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 50, kernel[0]))
    d_y = rng.normal(size=(1, 50, *kernel[1:]))
    x, d_y = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, d_y))
    given = [jnp.asarray(a, dtype) for a in (x, d_y)]
    weights = jnp.asarray(rng.normal(size=kernel), F32)
    gradient = jax.jit(lambda x, d_y: jax.vjp(lambda kernel: linear(x, kernel), weights)[1](d_y)[0])
    compiled = gradient.lower(*given).compile()
    wanted = np.tensordot(x, d_y, [(0, 1), (0, 1)])
    np.testing.assert_allclose(compiled(*given), wanted, rtol=1e-5, atol=1e-5)
    axes = r" dot\(.*contracting_dims={(\d)}.*contracting_dims={(\d)}"
    summed = re.findall(axes, compiled.as_text())
    assert dtype == BF16 or summed == [("1", "0")]
