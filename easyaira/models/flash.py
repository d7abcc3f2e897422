"""Flash attention for GPUs within the rows of a batch, as Pallas kernels for Triton.

The algorithm is FlashAttention-2 (Dao, 2023; Dao et al., 2022): an online softmax over tiles of
keys, and a backward pass that recomputes the weights from the queries' log-sum-exp. No array here
grows with the square of the length.

The mask is one integer a key. Query q sees key k exactly where `k <= q < end[k]`; `ends` computes
these bounds from a batch's layout. Tiles that no query of a block sees are skipped.

- A query that sees nothing has output 0, and it contributes 0 to all gradients.
- Scores, softmax statistics and accumulators are float32. The weights and the scores' gradients
  are rounded to the inputs' type before they enter a product, as in FlashAttention.
- Products of float32 inputs are float32 (IEEE), never TF32: exact, and without tensor cores.
- No atomics: each output tile is written once, by a loop of fixed order, so bits are repeatable.
  The gradients of a shared key head are summed over its query heads in that loop, in float32.
- Triton's tiles are powers of two: a head width between them is loaded with a mask and computed at
  the next power (80 and 96 as 128), and so is the last tile of a row.

Axes: see layers.py; S keys, G query heads for each key head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

FLOOR = -1e30  # below any score, and finite, so that no difference is NaN
MASKED = 2 * FLOOR  # exp2(MASKED - FLOOR) is 0: a row of masked scores has no weight
LOG2_E = math.log2(math.e)  # the kernels use exp2, which is one instruction


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of the pipelined loop."""

    queries: int
    keys: int
    warps: int
    stages: int


# By bytes of an element and padded head width: forward, gradient of queries, of keys and values.
# All fit the 99 KB of shared memory that a program has on compute capability 8.6 and 8.9.
TILES = {
    (2, 64): (Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (2, 128): (Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
    (2, 256): (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 64): (Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    (4, 128): (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 256): (Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}


def ends(segment_ids_RT: jax.Array, sides_RT: jax.Array) -> jax.Array:
    """One past the last query that sees each key, int32 [R, T]; 0 where none does.

    That is the end of the segment for a prompt's key (side 0) and the end of its side for an
    answer's. Padding and side 3 are seen by nobody. With `k <= q < end[k]` this equals `visible` of
    attention.py for every layout in which a segment with a shared prompt, and each side of a
    segment, is contiguous, as data/batches.py lays them out. The two answers of a pair that are
    sequences of their own may lie anywhere.
    """
    whole = _run_ends(segment_ids_RT)
    side = _run_ends(segment_ids_RT * 4 + sides_RT)
    seen = (segment_ids_RT > 0) & (sides_RT != 3)
    return jnp.where(seen, jnp.where(sides_RT == 0, whole, side), 0)


def _run_ends(ids_RT: jax.Array) -> jax.Array:
    """One past the end of the run of equal ids that each place belongs to."""
    T = ids_RT.shape[1]
    last = jnp.pad(ids_RT[:, 1:] != ids_RT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    bounds = jnp.where(last, jnp.arange(1, T + 1, dtype=jnp.int32), T)
    return lax.cummin(bounds, axis=1, reverse=True)


def flash(
    q_RTHN: jax.Array,
    k_RTKN: jax.Array,
    v_RTKN: jax.Array,
    end_RT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(N)) v over the keys with `k <= q < end[k]`, [R, T, H, N].

    Args:
        q_RTHN: queries; bfloat16, float16 or float32; N is at most 256.
        k_RTKN: keys, of the same type; H is a multiple of K.
        v_RTKN: values, of the same type.
        end_RT: int32, at most T; see `ends`.
        interpret: run on any device, slowly, without Triton.
    """
    H, N, K = *q_RTHN.shape[2:], k_RTKN.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads are no multiple of {K} key heads")
    if N > 256:
        raise ValueError(f"head width {N} is above 256")
    if len({x.dtype for x in (q_RTHN, k_RTKN, v_RTKN)}) > 1:
        raise ValueError("queries, keys and values must have one type")
    return _flash(q_RTHN, k_RTKN, v_RTKN, end_RT, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, end, interpret):
    return _forward(q, k, v, end, interpret)[0]


def _flash_fwd(q, k, v, end, interpret):
    out, lse = _forward(q, k, v, end, interpret)
    return out, (q, k, v, end, out, lse)


def _flash_bwd(interpret, saved, grad):
    return *_backward(*saved, grad, interpret), None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _forward(q, k, v, end, interpret):
    """The output, and log2 of the softmax's denominator [R, H, T]; 0 where nothing is seen."""
    R, T, H, N = q.shape
    specs = _Specs(q, k, _tiles(q)[0])
    return specs.call(
        _forward_kernel,
        inputs=[(q, specs.query), (k, specs.keys), (v, specs.keys), *specs.mask(end)],
        outputs=[(q, specs.query), (jax.ShapeDtypeStruct((R, H, T), jnp.float32), specs.statistic)],
        grid=(pl.cdiv(T, specs.tiles.queries), H, R),
        interpret=interpret,
    )


def _backward(q, k, v, end, out, lse, grad, interpret):
    R, T, H, N = q.shape
    K = k.shape[2]
    _, tiles, of_keys = _tiles(q)
    delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1).swapaxes(1, 2)  # [R, H, T]
    specs = _Specs(q, k, tiles)
    (dq,) = specs.call(
        _dq_kernel,
        inputs=[(q, specs.query), (k, specs.keys), (v, specs.keys), *specs.mask(end)]
        + [(grad, specs.query), (lse, specs.statistic), (delta, specs.statistic)],
        outputs=[(q, specs.query)],
        grid=(pl.cdiv(T, tiles.queries), H, R),
        interpret=interpret,
    )
    specs = _Specs(q, k, of_keys)
    dk, dv = specs.call(
        _dkv_kernel,
        inputs=[(q, specs.group), (k, specs.key), (v, specs.key), (end, specs.key_end)]
        + [(grad, specs.group), (lse, specs.group_statistic), (delta, specs.group_statistic)],
        outputs=[(k, specs.key), (v, specs.key)],
        grid=(pl.cdiv(T, of_keys.keys), K, R),
        interpret=interpret,
    )
    return dq, dk, dv


def _tiles(q: jax.Array) -> tuple[Tiles, Tiles, Tiles]:
    return TILES[q.dtype.itemsize, max(64, pl.next_power_of_2(q.shape[-1]))]


class _Specs:
    """The parts of each array that a program may address, by what the array is.

    A part may be larger than its array: Triton gets a pointer to its start, and all loads and
    stores beyond the array are masked.
    """

    def __init__(self, q: jax.Array, k: jax.Array, tiles: Tiles):
        R, self.length, H, self.width = q.shape
        G = H // k.shape[2]
        self.tiles = tiles
        width = max(16, pl.next_power_of_2(self.width))  # 16: the least that a product takes
        queries, keys, whole = tiles.queries, tiles.keys, self.length
        # grid: tile of queries, query head, row
        self.query = pl.BlockSpec((None, queries, None, width), lambda i, h, r: (r, i, h, 0))
        self.keys = pl.BlockSpec((None, whole, None, width), lambda i, h, r: (r, 0, h // G, 0))
        self.statistic = pl.BlockSpec((None, None, queries), lambda i, h, r: (r, h, i))
        self.of_row = lambda size: pl.BlockSpec((None, size), lambda i, h, r: (r, 0))
        # grid: tile of keys, key head, row
        self.key = pl.BlockSpec((None, keys, None, width), lambda j, k, r: (r, j, k, 0))
        self.key_end = pl.BlockSpec((None, keys), lambda j, k, r: (r, j))
        self.group = pl.BlockSpec((None, whole, G, width), lambda j, k, r: (r, 0, k, 0))
        self.group_statistic = pl.BlockSpec((None, G, whole), lambda j, k, r: (r, k, 0))

    def mask(self, end: jax.Array) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """The ends of keys, and the largest of each tile, padded to a power of two."""
        R, T = end.shape
        count = max(16, pl.next_power_of_2(pl.cdiv(T, self.tiles.keys)))
        padded = jnp.pad(end, ((0, 0), (0, count * self.tiles.keys - T)))
        last = padded.reshape(R, count, self.tiles.keys).max(-1)
        return [(end, self.of_row(T)), (last, self.of_row(count))]

    def call(self, kernel, *, inputs, outputs, grid, interpret: bool) -> Any:
        return pl.pallas_call(
            partial(kernel, tiles=self.tiles, length=self.length, width=self.width),
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tiles.warps, num_stages=self.tiles.stages
            ),
            interpret=interpret,
            name="flash" + kernel.__name__.removesuffix("_kernel"),
        )(*(x for x, _ in inputs))


def _forward_kernel(q_ref, k_ref, v_ref, end_ref, last_ref, out_ref, lse_ref, *, tiles, **size):
    first = pl.program_id(0) * tiles.queries
    load = partial(_load, **size)
    q = load(q_ref, first, tiles.queries, at=0)
    scale = LOG2_E / math.sqrt(size["width"])

    def add(j, carry):
        out, top, total = carry
        k, v = (load(ref, j * tiles.keys, tiles.keys) for ref in (k_ref, v_ref))
        seen = _seen(first, j * tiles.keys, end_ref, tiles, size["length"])
        scores = jnp.where(seen, _dot(q, k.T) * scale, MASKED)
        higher = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - higher[:, None])
        shrink = jnp.exp2(top - higher)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, higher, total * shrink + weights.sum(1)

    rows = jnp.zeros(tiles.queries, jnp.float32)
    carry = (jnp.zeros(q.shape, jnp.float32), rows + FLOOR, rows)
    out, top, total = _over_keys(last_ref, first, tiles, size["length"], add, carry)
    total = jnp.where(total > 0, total, 1)  # of a query that sees nothing: out is 0
    _store(out_ref, out / total[:, None], first, **size)
    lse = jnp.where(top > FLOOR, top + jnp.log2(total), 0)
    plgpu.store(lse_ref, lse, mask=first + jnp.arange(tiles.queries) < size["length"])


def _dq_kernel(
    q_ref, k_ref, v_ref, end_ref, last_ref, grad_ref, lse_ref, delta_ref, dq_ref, *, tiles, **size
):
    first = pl.program_id(0) * tiles.queries
    load = partial(_load, **size)
    q, grad = (load(ref, first, tiles.queries, at=0) for ref in (q_ref, grad_ref))
    inside = first + jnp.arange(tiles.queries) < size["length"]
    lse, delta = (plgpu.load(ref, mask=inside, other=0)[:, None] for ref in (lse_ref, delta_ref))
    scale = 1 / math.sqrt(size["width"])

    def add(j, dq):
        k, v = (load(ref, j * tiles.keys, tiles.keys) for ref in (k_ref, v_ref))
        seen = _seen(first, j * tiles.keys, end_ref, tiles, size["length"])
        scores = jnp.where(seen, _dot(q, k.T) * (scale * LOG2_E) - lse, MASKED)
        change = jnp.exp2(scores) * (_dot(grad, v.T) - delta)
        return dq + _dot(change.astype(k.dtype), k)

    dq = jnp.zeros(q.shape, jnp.float32)
    dq = _over_keys(last_ref, first, tiles, size["length"], add, dq)
    _store(dq_ref, dq * scale, first, **size)


def _dkv_kernel(
    q_ref, k_ref, v_ref, end_ref, grad_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, tiles, **size
):
    """Loops over the tiles of queries from the diagonal to the last query that sees a key, of all
    query heads. Its scores are [S, T], so that no product needs a tile transposed in registers."""
    first = pl.program_id(0) * tiles.keys
    load = partial(_load, **size)
    k, v = (load(ref, first, tiles.keys, at=0) for ref in (k_ref, v_ref))
    keys = first + jnp.arange(tiles.keys)
    end = plgpu.load(end_ref, mask=keys < size["length"], other=0)
    start = lax.div(first, tiles.queries)
    count = jnp.maximum(lax.div(jnp.max(end) + tiles.queries - 1, tiles.queries) - start, 0)
    scale = 1 / math.sqrt(size["width"])

    def add(step, carry):
        dk, dv = carry
        head = lax.div(step, count)
        at = (start + step - head * count) * tiles.queries
        q, grad = (load(ref, at, tiles.queries, of=(head,)) for ref in (q_ref, grad_ref))
        queries = at + jnp.arange(tiles.queries)
        lse, delta = (
            plgpu.load(
                ref.at[head, pl.ds(at, tiles.queries)], mask=queries < size["length"], other=0
            )
            for ref in (lse_ref, delta_ref)
        )
        seen = (keys[:, None] <= queries) & (queries < end[:, None])
        scores = jnp.where(seen, _dot(k, q.T) * (scale * LOG2_E) - lse, MASKED)
        weights = jnp.exp2(scores)
        change = weights * (_dot(v, grad.T) - delta)
        dv = dv + _dot(weights.astype(grad.dtype), grad)
        return dk + _dot(change.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    heads = q_ref.shape[1]
    dk, dv = lax.fori_loop(0, heads * count, add, (zeros, zeros))
    _store(dk_ref, dk * scale, first, **size)
    _store(dv_ref, dv, first, **size)


def _over_keys(last_ref, first, tiles: Tiles, length: int, add, carry):
    """`add` over the tiles of keys up to the diagonal, without those before the first key that is
    seen, and without the next run that is not: a rejected answer's queries skip the chosen one.

    One loop with computed places, and no branch, is what Triton can pipeline.
    """
    last = last_ref[...]
    place = jnp.arange(last.shape[0])
    stop = lax.div(jnp.minimum(first + tiles.queries, length) + tiles.keys - 1, tiles.keys)
    needed = (last > first) & (place < stop)
    start = jnp.min(jnp.where(needed, place, stop))
    gap = jnp.min(jnp.where(needed | (place < start), stop, jnp.minimum(place, stop)))
    resume = jnp.min(jnp.where(needed & (place > gap), place, stop))

    def step(i, carry):
        j = start + i
        return add(jnp.where(j < gap, j, j - gap + resume), carry)

    return lax.fori_loop(0, gap - start + stop - resume, step, carry)


def _seen(first_query, first_key, end_ref, tiles: Tiles, length: int) -> jax.Array:
    """Which queries of a tile see which of its keys."""
    queries = (first_query + jnp.arange(tiles.queries))[:, None]
    keys = first_key + jnp.arange(tiles.keys)
    end = plgpu.load(end_ref.at[pl.ds(first_key, tiles.keys)], mask=keys < length, other=0)
    return (keys <= queries) & (queries < end)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Accumulated in float32; HIGHEST means no TF32, and nothing for 16 bits."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _inside(rows, length: int, width: int, padded: int) -> jax.Array:
    return (rows < length)[:, None] & (jnp.arange(padded) < width)


def _load(ref, first, size: int, *, length: int, width: int, at=None, of: tuple = ()) -> jax.Array:
    """A tile [size, padded width], which starts at row `at` (`first` by default) of the ref, of the
    head `of`; 0 beyond the row's length and the head's width."""
    mask = _inside(first + jnp.arange(size), length, width, ref.shape[-1])
    return plgpu.load(ref.at[pl.ds(first if at is None else at, size), *of], mask=mask, other=0)


def _store(ref, tile, first, *, length: int, width: int) -> None:
    mask = _inside(first + jnp.arange(len(tile)), length, width, ref.shape[-1])
    plgpu.store(ref, tile.astype(ref.dtype), mask=mask)
