"""The GPU's attention kernel, interpreted on a CPU, against masked attention in full."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira.data.batches import Batches
from easyaira.models import flash as kernels
from easyaira.models.attention import visible
from easyaira.models.flash import Tiles, ends, flash
from easyaira.models.layout import UNATTENDED
from helpers import tiny
from helpers.examples import batches, load

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}  # of the largest entry


def layout(kind: str, rows: int, length: int, seed: int = 0):
    """Segment ids and sides [rows, length], the last row padding alone.

    `shared` pairs store their prompt once, and so do the up to six answers of `several`; `separate`
    pairs are two sequences, which may lie apart and in different rows, and `unpaired` sequences
    have one answer. Some end unattended.
    """
    rng = np.random.default_rng([seed, rows, length])
    segments, sides = np.zeros((2, rows, length), np.int32)
    pairs = int(rng.integers(1, 9))
    parts = []
    for number in range(1, (rows - 1) * pairs + 1):
        most = max(length // pairs // 3, 1)
        prompt, chosen, rejected, unseen = rng.integers(0, most + 1, 4)
        tail = [UNATTENDED] * int(unseen * rng.integers(0, 2))
        if kind == "shared":
            parts.append((number, [0] * prompt + [1] * chosen + [2] * rejected + tail))
        elif kind == "several":
            lengths = rng.integers(0, most + 1, rng.integers(2, 7))
            answers = [[side] * n for side, n in enumerate(lengths, 1)]
            parts.append((number, sum(answers, [0] * (prompt if number % 3 else 0))))
        elif kind == "separate":
            parts += [(number, [1] * (prompt + chosen) + tail), (number, [2] * (prompt + rejected))]
        else:
            parts.append((number, [0] * (prompt + chosen) + tail))
    filled = [0] * (rows - 1)
    for i in rng.permutation(len(parts)):
        number, of = parts[i]
        row = int(np.argmin(filled))
        of = of[: length - filled[row]]
        place = slice(filled[row], filled[row] + len(of))
        segments[row, place], sides[row, place] = number, of
        filled[row] += len(of)
    return jnp.asarray(segments), jnp.asarray(sides)


def arrays(rows, length, heads, key_heads, width, dtype, seed=0):
    """Queries, keys, values, and the gradient of the output: everywhere, on padding too."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, n, width) for n in (heads, key_heads, key_heads, heads)]
    q, k, v, grad = (jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes)
    return 3 * q, k, v, grad


def by_hand(q, k, v, mask):
    """softmax(q k / sqrt(N)) v with a mask, in full; 0 where a query sees nothing."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("rqhn,rthn->rhqt", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30)) * mask[:, None]
    return jnp.einsum("rhqt,rthn->rqhn", weights, v)


@partial(jax.jit, static_argnames="tiles")
def ours(q, k, v, grad, segments, sides, tiles=None):
    """The output and the gradients; `tiles` is what a test has set, for jit's cache."""
    end = ends(segments, sides)
    out, back = jax.vjp(lambda *x: flash(*x, end, interpret=True), q, k, v)
    return out, *back(grad)


@jax.jit
def wanted(q, k, v, grad, mask):
    q, k, v, grad = (x.astype(jnp.float32) for x in (q, k, v, grad))
    out, back = jax.vjp(lambda *x: by_hand(*x, mask), q, k, v)
    return out, *back(grad)


def check(q, k, v, grad, segments, sides, tiles=None, scale=1):
    """Outputs and gradients equal those by hand, and are 0 where nothing is seen."""
    mask = visible(jnp.asarray(segments), jnp.asarray(sides))
    actual, right = ours(q, k, v, grad, segments, sides, tiles), wanted(q, k, v, grad, mask)
    blind, unseen = (~np.asarray(mask).any(axis) for axis in (2, 1))
    for name, x, y, nothing in zip(
        ("out", "dq", "dk", "dv"), actual, right, (blind, blind, unseen, unseen), strict=True
    ):
        assert x.dtype == q.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float32), np.asarray(y)
        error = np.abs(x - y).max() / (np.abs(y).max() or 1)
        assert error < scale * TOLERANCE[q.dtype.name], (name, error)
        assert not x[nothing].any(), name


CASES = [  # length, heads, key heads, width, dtype, kind
    (1, 2, 1, 32, "float32", "unpaired"),
    (100, 4, 2, 32, "float32", "shared"),
    (129, 8, 1, 64, "float32", "separate"),
    (200, 2, 2, 80, "float32", "unpaired"),
    (192, 2, 1, 128, "float32", "shared"),
    (70, 1, 1, 256, "float32", "shared"),
    (300, 2, 1, 64, "bfloat16", "shared"),
    (200, 4, 2, 96, "bfloat16", "separate"),
    (129, 1, 1, 256, "bfloat16", "shared"),
    (192, 2, 2, 128, "float16", "unpaired"),
]


@pytest.mark.slow
@pytest.mark.parametrize("length, heads, key_heads, width, dtype, kind", CASES)
def test_outputs_and_gradients_equal_those_by_hand(length, heads, key_heads, width, dtype, kind):
    given = arrays(3, length, heads, key_heads, width, dtype)
    check(*given, *layout(kind, 3, length, seed=width))


@pytest.mark.parametrize("tiles", [Tiles(64, 32, 4, 1), Tiles(16, 64, 4, 1)])
@pytest.mark.slow
def test_tiles_change_nothing(tiles, monkeypatch):
    """Uneven tiles, and rows of several, of 1 to 8 pairs."""
    monkeypatch.setattr(kernels, "TILES", {(4, 64): (tiles,) * 3})
    for kind, seed in itertools.product(("shared", "separate", "unpaired"), range(6)):
        segments, sides = layout(kind, 3, 150, seed=seed)
        check(*arrays(3, 150, 2, 1, 16, "float32", seed), segments, sides, tiles)


# of each row, each pair's tokens of prompt, chosen and rejected answer; the rest is padding
NAN_LAYOUT = [
    [(9, 17, 16), (8, 17, 16), (9, 16, 16), (9, 16, 15), (9, 14, 5)],
    [(8, 16, 15), (8, 15, 15), (9, 18, 9), (8, 12, 13), (8, 17, 8)],
    [(9, 16, 7), (9, 16, 7), (7, 12, 13), (8, 12, 12), (7, 12, 13), (7, 12, 12)],
    [(8, 16, 7), (7, 12, 12), (7, 12, 12), (8, 15, 6), (8, 15, 6), (9, 15, 5)],
    [(8, 15, 6), (8, 15, 6), *[(8, 12, 4)] * 5],
    [(8, 12, 4), (8, 12, 4), (7, 12, 4)],
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layout_for_which_another_kernel_gave_nan(dtype):
    """cuDNN's backward pass on Hopper did (pytorch/pytorch#196678), since the log-sum-exp of a
    query that sees nothing lies below -88.7. Here all others' do, too, where float32 resolves the
    log-sum-exp to 8e-6, so that the weights are less exact."""
    segments, sides = np.zeros((2, 6, 192), np.int32)
    for row, pairs in enumerate(NAN_LAYOUT):
        lengths = np.ravel(pairs)
        numbers = np.repeat(np.arange(len(pairs)) + 1, 3)
        segments[row, : lengths.sum()] = np.repeat(numbers, lengths)
        sides[row, : lengths.sum()] = np.repeat(np.tile([0, 1, 2], len(pairs)), lengths)
    q, k, v, grad = arrays(6, 192, 1, 1, 64, dtype)
    check(q, k, v, grad, segments, sides)
    q, k = q.at[..., 0].set(-80), k.at[..., 0].set(10)  # scores of about -100
    check(q, k, v, grad, segments, sides, scale=3)


def seen_by_ends(segments, sides):
    end = np.asarray(ends(segments, sides))
    place = np.arange(end.shape[1])
    return (place <= place[:, None]) & (place[:, None] < end[:, None])


@pytest.mark.parametrize("kind", ["shared", "several", "separate", "unpaired"])
@pytest.mark.slow
def test_ends_equal_the_contract(kind):
    """Of all queries, also padding and unattended ones, which may see what the contract lets."""
    for seed, length in itertools.product(range(10), (1, 40, 97)):
        segments, sides = layout(kind, 4, length, seed=seed)
        wanted = visible(jnp.asarray(segments), jnp.asarray(sides))
        assert np.array_equal(seen_by_ends(segments, sides), wanted)
    assert ends(segments, sides).dtype == jnp.int32
    lowered = jax.jit(ends).lower(segments, sides).as_text()
    assert "scatter" not in lowered and "97x97" not in lowered


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("pairs, share", [(False, False), (True, False), (True, True)])
@pytest.mark.slow
def test_ends_equal_the_contract_in_batches(pairs, share, packing, tmp_path):
    of = batches(tmp_path, pairs=pairs, share_prompt=share, packing=packing)
    for update in range(len(of)):
        of_batch(of[update].arrays)


def test_ends_equal_the_contract_in_batches_with_padding_that_is_learned(tmp_path):
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(8))
    data = load(rows, compat="aira", template="aira", max_length=40, vocab_size=400).train
    arrays = Batches(data, 8)[0].arrays
    assert (arrays["sides"] == UNATTENDED).any()
    of_batch(arrays)


def of_batch(arrays):
    for segments, sides in zip(arrays["segment_ids"], arrays["sides"], strict=True):
        wanted = visible(jnp.asarray(segments), jnp.asarray(sides))
        assert np.array_equal(seen_by_ends(segments, sides), wanted)


def test_a_query_that_sees_nothing_gives_zero_and_moves_nothing():
    q, k, v, grad = arrays(2, 70, 2, 1, 32, "float32")
    end = jnp.zeros((2, 70), jnp.int32).at[0, 10].set(12)  # seen by queries 10 and 11 alone
    out, back = jax.vjp(lambda *x: flash(*x, end, interpret=True), q, k, v)
    dq, dk, dv = back(grad)
    sees = np.zeros((2, 70), bool)
    sees[0, 10:12] = True
    assert np.array_equal(out[sees], jnp.broadcast_to(v[0, 10], (2, 2, 32)))
    np.testing.assert_allclose(dv[0, 10, 0], grad[0, 10:12].sum((0, 1)), rtol=1e-5)
    for x in (out[~sees], dv[0, :10], dv[0, 11:], dv[1], dk[1]):
        assert np.array_equal(x, np.zeros_like(x))
    for x in (dq, dk):  # a softmax over one key has no gradient
        assert np.abs(x).max() < 1e-5


def test_tiles_that_no_query_of_a_block_sees_are_not_read(monkeypatch):
    """NaN in them would show: neither forward, nor for queries, nor for keys and values."""
    monkeypatch.setattr(kernels, "TILES", {(4, 64): (Tiles(16, 16, 4, 1),) * 3})
    sizes = {(1, 0): 30, (2, 0): 20, (2, 1): 70, (2, 2): 40}  # an earlier sequence, then a pair
    segments, sides = (np.repeat(x, [*sizes.values()])[None] for x in np.array([*sizes]).T)
    q, k, v, grad = arrays(1, 160, 2, 1, 16, "float32")
    end = ends(jnp.asarray(segments), jnp.asarray(sides))

    @jax.jit
    def out_and_gradients(q, k, v, grad):
        out, back = jax.vjp(lambda *x: flash(*x, end, interpret=True), q, k, v)
        return out, *back(grad)

    right = out_and_gradients(q, k, v, grad)
    for unread in (slice(0, 16), slice(64, 112)):  # an earlier sequence; the chosen answer
        dark_k, dark_v = (x.at[:, unread].set(jnp.nan) for x in (k, v))
        out, dq, *_ = out_and_gradients(q, dark_k, dark_v, grad)
        assert np.array_equal(out[:, 128:], right[0][:, 128:])
        assert np.array_equal(dq[:, 128:], right[1][:, 128:])
        assert np.isnan(out[:, unread]).all()
    for unread, keys in ((slice(32, 160), slice(0, 16)), (slice(128, 160), slice(64, 112))):
        dark_q, dark_grad = (x.at[:, unread].set(jnp.nan) for x in (q, grad))
        *_, dk, dv = out_and_gradients(dark_q, k, v, dark_grad)
        assert np.array_equal(dk[:, keys], right[2][:, keys])
        assert np.array_equal(dv[:, keys], right[3][:, keys])


def test_the_loop_over_keys_visits_each_tile_that_is_seen_once():
    """Up to the diagonal, and of the others only those behind a second gap."""
    tiles, length = Tiles(32, 16, 4, 1), 150

    @jax.jit
    def visited(last, first):
        def count(j, seen):
            return seen.at[j].add(1)

        return kernels._over_keys(last, first, tiles, length, count, jnp.zeros(16, jnp.int32))

    rng = np.random.default_rng(0)
    for _ in range(100):
        last = np.zeros(16, np.int32)
        last[:10] = rng.integers(0, length + 1, 10)
        for first in range(0, length, 32):
            visits = np.asarray(visited(jnp.asarray(last), first))
            stop = -(-min(first + 32, length) // 16)
            needed = [j for j in range(stop) if last[j] > first]
            assert (visits[needed] == 1).all() and visits.max(initial=0) <= 1
            assert not visits[stop:].any() and not visits[: min(needed, default=16)].any()
            idle = [j for j in range(min(needed, default=16), stop) if j not in needed]
            if idle:
                run = next(j for j in range(idle[0], 17) if j not in idle)
                assert not visits[idle[0] : run].any()


def test_what_the_kernel_does_not_take_is_refused():
    q, k, v, _ = arrays(1, 8, 3, 2, 16, "float32")
    end = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="3 query heads"):
        flash(q, k, v, end)
    with pytest.raises(ValueError, match="same dtype"):
        flash(q[:, :, :2], k.astype(jnp.bfloat16), v, end)
    wide = jnp.zeros((1, 8, 1, 257))
    with pytest.raises(ValueError, match="257"):
        flash(wide, wide, wide, end)


@pytest.mark.parametrize("width", [64, 80, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.slow
def test_it_lowers_to_triton_without_a_gpu(width, dtype):
    """For a GPU that is only named: three kernels, no [T, T] array, and no scatter."""
    R, T, H, K = 2, 1000, 4, 2
    shapes = [(R, T, n, width) for n in (H, K, K)]
    q, k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    ids = jax.ShapeDtypeStruct((R, T), jnp.int32)

    def forward(q, k, v, segments, sides):
        return flash(q, k, v, ends(segments, sides))

    def total(*x):
        return forward(*x).astype(jnp.float32).sum()

    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    for f, calls in ((forward, 1), (jax.grad(total, argnums=(0, 1, 2)), 3)):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(f).trace(q, k, v, ids, ids)
            lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("custom_call @__gpu$xla.gpu.triton(") == calls
        assert "scatter" not in lowered and f"{T}x{T}x" not in lowered
