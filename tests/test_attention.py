"""Each way to compute attention against the contract, and the contract against its sentence."""

import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira.distributed.mesh import make_mesh
from easyaira.models import attention as attentions
from easyaira.models import splash, tiles
from easyaira.models.attention import DOT_PRODUCT, Near, attention, visible
from easyaira.models.layers import Compute, Scores
from easyaira.models.layout import UNATTENDED
from helpers.formulas import attention_of

LENGTHS = [1, 127, 128, 129, 257, 300]  # around tiles of 128
HEADS, KV_HEADS, WIDTH = 4, 2, 8
SLOPES = (0.5, 0.25, 0.125, 1.0)


def rows(length: int, *, shared: bool, answers: int = 2, seed: int = 0):
    """Two rows: sequences of uneven lengths, some of several answers, then padding."""
    rng = np.random.default_rng([length, seed])
    shape = (2, length)
    q, k, v = (
        jnp.asarray(rng.normal(0, 1, (*shape, heads, WIDTH)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    segments, sides = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in range(2):
        at, number = 0, 0
        while at < length - row * 3:
            end = min(at + int(rng.integers(1, max(length // 2, 2))), length - row * 3)
            number += 1
            segments[row, at:end] = number
            if shared:  # prompt, first answer, second answer, ...
                starts = sorted(rng.integers(at, end + 1, answers))
                for side, (start, stop) in enumerate(pairwise([*starts, end]), 1):
                    sides[row, start:stop] = side
            else:
                sides[row, at:end] = number % 3
            at = end
    return (q, k, v), jnp.asarray(segments), jnp.asarray(sides)


def sentence(segments, sides, causal=True, near=None):
    """The docstring of `visible`, word for word."""
    (segment, key_segment), (side, key_side) = (
        (x[:, :, None], x[:, None]) for x in map(np.asarray, (segments, sides))
    )
    seen = (segment == key_segment) & (key_segment != 0)
    seen &= (key_side == 0) | ((key_side == side) & (key_side != UNATTENDED))
    if causal:
        seen &= np.tri(segments.shape[1], dtype=bool)
    if near and near.window:
        positions = np.asarray(near.positions)
        seen &= positions[:, :, None] - positions[:, None] < near.window
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_the_contract_equals_its_sentence(causal):
    _, segments, sides = rows(40, shared=True)
    sides = np.array(sides)
    sides[0, 5] = UNATTENDED

    @jax.jit
    def masks(*x):
        part = visible(*x, slice(8, 24), slice(0, 24), causal=causal)
        return visible(*x, causal=causal), part

    seen, part = map(np.asarray, masks(segments, sides))
    assert np.array_equal(seen, sentence(segments, sides, causal))
    assert np.array_equal(part, seen[:, 8:24, :24])


def check(compute, arrays, segments, sides, causal=True, scores=DOT_PRODUCT, near=None):
    """Outputs and gradients of real tokens equal those of the formula."""
    real = np.asarray(segments > 0)
    weights = np.random.default_rng(0).normal(0, 1, real.shape + (HEADS * WIDTH,))
    weights = weights.astype(np.float32) * real[..., None]
    ours = partial(attention, compute=compute, causal=causal, scores=scores, near=near)

    def loss(arrays):
        out = ours(*arrays, segments, sides)
        return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    given = {"divisor": scores.divisor, "cap": scores.cap}
    if scores.slopes:  # of the keys' positions, as BLOOM has them: a softmax ignores the rest
        slopes = np.reshape(scores.slopes, (1, HEADS, 1, 1))
        given["biases"] = slopes * np.asarray(near.positions)[:, None, None]
    mask = sentence(segments, sides, causal, near)
    wanted, wanted_grads = attention_of(*arrays, mask, weights, **given)
    out = np.asarray(out)
    np.testing.assert_allclose(out[real], wanted[real], rtol=2e-5, atol=2e-5)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(grad, wanted_grad, rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all()


def test_blocks_are_few_and_cover_the_row():
    for length in range(1, 20_000, 7):
        block = attentions.block_of(length)
        assert length <= block * attentions.MAX_BLOCKS
        assert block <= 512 or length > 16 * 512
    sizes = {n: attentions.block_of(n) for n in (100, 320, 640, 1024, 4096)}
    assert sizes == {100: 128, 320: 128, 640: 160, 1024: 256, 4096: 512}
    assert attentions.block_of(640, causal=False) == 512


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 257])
def test_blocks_of_queries_change_nothing(length, monkeypatch):
    monkeypatch.setattr(attentions, "BLOCK", 64)
    arrays, segments, sides = rows(length, shared=length % 2 == 0)
    check(Compute(), arrays, segments, sides)


def positions_of(segments, sides):
    """Of each token in its text; both answers to a prompt follow it."""
    segments, sides = map(np.asarray, (segments, sides))
    positions = np.zeros(segments.shape, np.int32)
    for r, t in np.ndindex(segments.shape):
        same = segments[r, :t] == segments[r, t]
        seen = np.isin(sides[r, :t], (0, sides[r, t]))
        positions[r, t] = (same & seen).sum()
    return jnp.asarray(positions)


@pytest.mark.slow
def test_a_window_counts_tokens_of_the_text_and_not_places_in_the_row():
    _, segments, sides = rows(40, shared=True)
    positions = positions_of(segments, sides)

    @jax.jit
    def masks(segments, sides, positions):
        of = partial(visible, segments, sides)
        part = of(slice(8, 24), slice(0, 24), near=Near(positions, 3))
        return *(of(near=Near(positions, window)) for window in (None, 3)), part

    whole, near, part = map(np.asarray, masks(segments, sides, positions))
    for r, q in np.ndindex(segments.shape):
        expected = np.zeros(40, bool)
        expected[np.flatnonzero(whole[r, q])[-3:]] = True  # itself and the two before it
        assert np.array_equal(near[r, q], expected)
    of_answers = near & (np.asarray(sides)[:, :, None] == 2) & (np.asarray(sides)[:, None] == 0)
    assert of_answers.any()  # behind the first answer, a token still sees the prompt's last ones
    assert np.array_equal(part, near[:, 8:24, :24])


@pytest.mark.slow
@pytest.mark.parametrize(
    "scores, window",
    [(Scores(), 5), (Scores(cap=0.7), None), (Scores(divisor=1.5), None), (Scores(1.5, 0.7), 5)]
    + [(Scores(slopes=SLOPES), None), (Scores(1.5, 0.7, SLOPES), 5)],
)
def test_windows_soft_caps_and_biases_whatever_was_asked_for(scores, window, monkeypatch):
    """Tiles have all but biases. XLA computes the rest: in the same operations as if asked."""
    monkeypatch.setattr(tiles, "TILE", 16)
    monkeypatch.setattr(attentions, "BLOCK", 16)
    arrays, segments, sides = rows(40, shared=True)
    near = Near(positions_of(segments, sides), window)
    for how in ("xla", "tiles"):
        check(Compute(attention=how), arrays, segments, sides, scores=scores, near=near)

    def operations(how, dtype):
        given = [x.astype(dtype) for x in arrays], segments, sides
        of = partial(attention, compute=Compute(attention=how), scores=scores, near=near)
        program = jax.make_jaxpr(lambda arrays, *rows: of(*arrays, *rows))(*given)
        return re.sub(r"0x\w+", "", str(program))

    for dtype in (jnp.float32, jnp.bfloat16):
        wanted = operations("xla", dtype)
        assert all(operations(how, dtype) == wanted for how in ("splash", "pallas", "cudnn"))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [31, 32, 33, 200])
def test_tiles_equal_the_whole_softmax(length, causal, monkeypatch):
    monkeypatch.setattr(attentions, "BLOCK", 16)
    monkeypatch.setattr(tiles, "TILE", 16)
    arrays, segments, sides = rows(length, shared=causal and length % 2 == 0)
    check(Compute(attention="tiles"), arrays, segments, sides, causal)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_are_those_that_hold_a_visible_key(answers, causal, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 8)

    @jax.jit
    def chosen(segments, sides):
        keys = tiles.needed(tiles.Tokens(segments, sides, None, None), causal)
        places = jnp.arange(20)
        return keys.count, jax.vmap(lambda i: keys.tile(i, places))(places)

    for seed in range(20):
        _, segments, sides = rows(160, shared=answers > 1, answers=answers, seed=seed)
        counts, places = map(np.asarray, chosen(segments[0], sides[0]))
        mask = sentence(segments[:1], sides[:1], causal)[0].reshape(20, 8, 20, 8).any((1, 3))
        for i, count in enumerate(counts):
            assert places[i, :count].tolist() == np.flatnonzero(mask[i]).tolist()


def test_a_window_hides_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 8)
    place = np.arange(64, dtype=np.int32)
    tokens = tiles.Tokens(1 + 0 * place, 0 * place, place, np.int32(10))
    counts = jax.jit(lambda tokens: tiles.needed(tokens, True).count)(tokens)
    assert counts.tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("length", [63, 64, 65, 200])
def test_blocks_without_causality(length, monkeypatch):
    monkeypatch.setattr(attentions, "LONG_BLOCK", 64)
    arrays, segments, sides = rows(length, shared=False)
    check(Compute(), arrays, segments, sides, causal=False)


@pytest.mark.slow
@pytest.mark.parametrize("length, shared", [(n, n % 3 == 0) for n in LENGTHS])
def test_splash_kernel_equals_xla(length, shared, monkeypatch):
    """The TPU's kernel, interpreted."""
    interpreted = partial(splash._splash_rows, interpret=True)
    monkeypatch.setattr(splash, "_splash_rows", interpreted)
    arrays, segments, sides = rows(length, shared=shared)
    check(Compute(attention="splash", shared_prompt=2 * shared), arrays, segments, sides)


@pytest.mark.parametrize("answers", [3, 5])
@pytest.mark.slow
def test_splash_kernel_with_more_than_two_answers(answers, monkeypatch):
    interpreted = partial(splash._splash_rows, interpret=True)
    monkeypatch.setattr(splash, "_splash_rows", interpreted)
    arrays, segments, sides = rows(90, shared=True, answers=answers)
    assert sides.max() == answers
    check(Compute(attention="splash", shared_prompt=answers), arrays, segments, sides)


@pytest.mark.parametrize("axes", ["dp=2,fsdp=2,tp=2"])
@pytest.mark.slow
def test_splash_kernel_on_many_devices(axes, devices, monkeypatch):
    """Each device computes its rows and heads by itself, and nothing is gathered for it."""
    devices(8)
    interpreted = partial(splash._splash_rows, interpret=True)
    monkeypatch.setattr(splash, "_splash_rows", interpreted)
    arrays, segments, sides = rows(130, shared=True)
    arrays, segments, sides = jax.tree.map(
        lambda x: np.concatenate([x] * 2), (arrays, segments, sides)
    )
    compute = Compute(attention="splash", shared_prompt=2)
    alone = jax.jit(lambda *x: attention(*x, compute))(*arrays, segments, sides)
    with jax.set_mesh(make_mesh(axes)):
        divided = (
            jax.jit(lambda *x: attention(*x, compute)).lower(*arrays, segments, sides).compile()
        )
        out = divided(*arrays, segments, sides)
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_splash_kernel_compiles_for_a_tpu(shared):
    """By the TPU's own compiler, forward and backward, for lengths and heads that it must pad."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 2, 2), ("dp", "fsdp", "tp"))
    lie = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("dp", "fsdp")))
    shapes = [((4, 200, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    shapes += [((4, 200), jnp.int32)] * 2
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=lie) for shape, dtype in shapes]
    compute = Compute(jnp.bfloat16, attention="splash", shared_prompt=2 * shared)

    def total(*x):
        return attention(*x, compute).astype(jnp.float32).sum()

    precision = jax.default_matmul_precision("default")  # bfloat16 has no other on a TPU
    with precision, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*given).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, d q, d k and v
