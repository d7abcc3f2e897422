"""Flash attention for GPUs, as Pallas kernels for Triton.

The algorithm is FlashAttention-2 (Dao, 2023; Dao et al., 2022): an online softmax over tiles of
keys, and a backward pass that recomputes the attention weights from the log-sum-exp of each query.
Memory is linear in the sequence length.

The mask is one integer per key: query q attends to key k exactly where `k <= q < end[k]`. `ends`
computes these integers from a batch's layout. Fully masked tiles are skipped.

- A fully masked query has output 0 and contributes 0 to all gradients.
- Scores, softmax statistics and accumulators are float32. Attention weights and score gradients are
  rounded to the dtype of the inputs before they enter a product.
- Products of float32 inputs are IEEE float32, never TF32, so they do not use tensor cores.
- The kernels are deterministic: they use no atomics, and a loop of fixed order computes each output
  tile. That loop also sums the gradients of a key head over its query heads, in float32.
- Triton tiles are powers of two. Other head widths are loaded with a mask and padded to the next
  power of two (80 and 96 to 128).

Axes: see layers.py; S keys, G query heads per key head.
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

from easyaira.models.layout import UNATTENDED

FLOOR = -1e30  # below any score, but finite, so that differences are never NaN
MASKED = 2 * FLOOR  # exp2(MASKED - FLOOR) is 0, so a fully masked row has weight 0
LOG2_E = math.log2(math.e)  # the kernels use exp2, a single instruction


class Tiles(NamedTuple):
    """Queries and keys per tile, warps per program, stages of the pipelined loop."""

    queries: int
    keys: int
    warps: int
    stages: int


# Tiles of each kernel, by bytes per element and padded head width. All fit into 99 KB of shared
# memory, the limit per program on compute capability 8.6 and 8.9.
KERNELS = ("forward", "dq", "dkv")
TILES = {
    (2, 64): (Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (2, 128): (Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
    (2, 256): (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 64): (Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    (4, 128): (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 256): (Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}


def ends(segment_ids_RT: jax.Array, sides_RT: jax.Array) -> jax.Array:
    """One past the last query that attends to each key, int32 [R, T]; 0 for a masked key.

    A prompt's key (side 0) ends with its segment; an answer's key ends with its side. Padding and
    unattended keys are masked. The mask `k <= q < end[k]` equals `visible` of attention.py for the
    layouts of data/batches.py: a segment with side 0 is contiguous, and so is each side of any
    segment. Answers without side 0 may be anywhere in the row.
    """
    R, T = segment_ids_RT.shape

    def run_ends(*ids):
        changes = [x[:, 1:] != x[:, :-1] for x in ids]
        last = jnp.pad(jnp.any(jnp.stack(changes), 0), ((0, 0), (0, 1)), constant_values=True)
        bounds = jnp.where(last, jnp.arange(1, T + 1, dtype=jnp.int32), T)
        return lax.cummin(bounds, axis=1, reverse=True)

    whole, side = run_ends(segment_ids_RT), run_ends(segment_ids_RT, sides_RT)
    visible = (segment_ids_RT > 0) & (sides_RT != UNATTENDED)
    return jnp.where(visible, jnp.where(sides_RT == 0, whole, side), 0)


def flash(
    q_RTHN: jax.Array, k_RTKN: jax.Array, v_RTKN: jax.Array, end_RT: jax.Array, *, interpret=False
) -> jax.Array:
    """softmax(q k / sqrt(N)) v over the keys with `k <= q < end[k]`, [R, T, H, N].

    Args:
        q_RTHN, k_RTKN, v_RTKN: all bfloat16, all float16 or all float32; H is a multiple of K, and
            N at most 256.
        end_RT: see `ends`; at most T.
        interpret: run on any device, slowly and without Triton.

    Raises:
        ValueError: head counts, head width or dtypes are unsupported.
    """
    (H, N), K = q_RTHN.shape[2:], k_RTKN.shape[2]
    if H % K or N > 256:
        raise ValueError(f"{H} query heads must be a multiple of {K}, and width {N} at most 256")
    if len({x.dtype for x in (q_RTHN, k_RTKN, v_RTKN)}) > 1:
        raise ValueError("queries, keys and values must have the same dtype")
    return _flash(q_RTHN, k_RTKN, v_RTKN, end_RT, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, end, interpret):
    return _forward(q, k, v, end, interpret)[0]


def _forward(q, k, v, end, interpret):
    """The output, and the residuals with log2 of the softmax denominator [R, H, T]."""
    R, T, H, _ = q.shape
    specs = _Specs(q, k, "forward")
    inputs = [(q, specs.query), (k, specs.keys), (v, specs.keys), *specs.mask(end)]
    outputs = [(q, specs.query), (jax.ShapeDtypeStruct((R, H, T), jnp.float32), specs.statistic)]
    out, lse = specs.call(_forward_kernel, inputs, outputs, specs.query_grid, interpret)
    return out, (q, k, v, end, out, lse)


def _backward(interpret, saved, grad):
    q, k, v, end, out, lse = saved
    delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1).swapaxes(1, 2)  # [R, H, T]
    specs = _Specs(q, k, "dq")
    inputs = [(q, specs.query), (k, specs.keys), (v, specs.keys), *specs.mask(end)]
    inputs += [(grad, specs.query), (lse, specs.statistic), (delta, specs.statistic)]
    (dq,) = specs.call(_dq_kernel, inputs, [(q, specs.query)], specs.query_grid, interpret)
    specs = _Specs(q, k, "dkv")
    inputs = [(q, specs.group), (k, specs.key), (v, specs.key), (end, specs.key_end)]
    inputs += [(grad, specs.group), (lse, specs.group_statistic), (delta, specs.group_statistic)]
    dk, dv = specs.call(
        _dkv_kernel, inputs, [(k, specs.key), (v, specs.key)], specs.key_grid, interpret
    )
    return dq, dk, dv, None


_flash.defvjp(_forward, _backward)


class _Specs:
    """Block specs: the part of each kind of array that a program may address.

    A block may exceed its array. Triton gets a pointer, and loads and stores are masked at the
    array's end.
    """

    def __init__(self, q: jax.Array, k: jax.Array, kernel: str):
        R, T, H, N = q.shape
        K, spec = k.shape[2], pl.BlockSpec
        G, width = H // K, max(16, pl.next_power_of_2(N))  # Triton's products need 16
        tiles = TILES[q.dtype.itemsize, max(64, width)][KERNELS.index(kernel)]
        self.tiles, self.size = tiles, {"length": T, "width": N}
        self.query_grid = (pl.cdiv(T, tiles.queries), H, R)
        self.query = spec((None, tiles.queries, None, width), lambda i, h, r: (r, i, h, 0))
        self.keys = spec((None, T, None, width), lambda i, h, r: (r, 0, h // G, 0))
        self.statistic = spec((None, None, tiles.queries), lambda i, h, r: (r, h, i))
        self.key_grid = (pl.cdiv(T, tiles.keys), K, R)
        self.key = spec((None, tiles.keys, None, width), lambda j, k, r: (r, j, k, 0))
        self.key_end = spec((None, tiles.keys), lambda j, k, r: (r, j))
        self.group = spec((None, T, G, width), lambda j, k, r: (r, 0, k, 0))
        self.group_statistic = spec((None, G, T), lambda j, k, r: (r, k, 0))

    def mask(self, end: jax.Array) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """`end` of each key, and its maximum per tile; the maxima are padded to a power of two."""
        R, T = end.shape
        count = max(16, pl.next_power_of_2(pl.cdiv(T, self.tiles.keys)))
        padded = jnp.pad(end, ((0, 0), (0, count * self.tiles.keys - T)))
        last = padded.reshape(R, count, self.tiles.keys).max(-1)
        return [(x, pl.BlockSpec((None, x.shape[1]), lambda i, h, r: (r, 0))) for x in (end, last)]

    def call(self, kernel, inputs, outputs, grid, interpret: bool) -> Any:
        tiles = self.tiles
        return pl.pallas_call(
            partial(kernel, tiles=tiles, **self.size),
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=interpret,
            name="flash" + kernel.__name__.removesuffix("_kernel"),
        )(*(x for x, _ in inputs))


def _forward_kernel(q_ref, k_ref, v_ref, end_ref, last_ref, out_ref, lse_ref, *, tiles, **size):
    first = pl.program_id(0) * tiles.queries
    load = partial(_load, **size)
    q = load(q_ref, first, tiles.queries, row=0)
    scale = LOG2_E / math.sqrt(size["width"])

    def add(j, carry):
        out, top, total = carry
        k, v = (load(ref, j * tiles.keys, tiles.keys) for ref in (k_ref, v_ref))
        visible = _visible(first, j * tiles.keys, end_ref, tiles, size["length"])
        scores = jnp.where(visible, _dot(q, k.T) * scale, MASKED)
        higher = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - higher[:, None])
        shrink = jnp.exp2(top - higher)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, higher, total * shrink + weights.sum(1)

    rows = jnp.zeros(tiles.queries, jnp.float32)
    carry = (jnp.zeros(q.shape, jnp.float32), rows + FLOOR, rows)
    out, top, total = _over_keys(last_ref, first, tiles, size["length"], add, carry)
    total = jnp.where(total > 0, total, 1)  # a fully masked query: out is 0
    _store(out_ref, out / total[:, None], first, **size)
    inside = first + jnp.arange(tiles.queries) < size["length"]
    plgpu.store(lse_ref, top + jnp.log2(total), mask=inside)


def _dq_kernel(
    q_ref, k_ref, v_ref, end_ref, last_ref, grad_ref, lse_ref, delta_ref, dq_ref, *, tiles, **size
):
    first = pl.program_id(0) * tiles.queries
    load = partial(_load, **size)
    q, grad = (load(ref, first, tiles.queries, row=0) for ref in (q_ref, grad_ref))
    inside = first + jnp.arange(tiles.queries) < size["length"]
    lse, delta = (plgpu.load(ref, mask=inside, other=0)[:, None] for ref in (lse_ref, delta_ref))
    scale = 1 / math.sqrt(size["width"])

    def add(j, dq):
        k, v = (load(ref, j * tiles.keys, tiles.keys) for ref in (k_ref, v_ref))
        visible = _visible(first, j * tiles.keys, end_ref, tiles, size["length"])
        scores = jnp.where(visible, _dot(q, k.T) * (scale * LOG2_E) - lse, MASKED)
        change = jnp.exp2(scores) * (_dot(grad, v.T) - delta)
        return dq + _dot(change.astype(k.dtype), k)

    dq = jnp.zeros(q.shape, jnp.float32)
    dq = _over_keys(last_ref, first, tiles, size["length"], add, dq)
    _store(dq_ref, dq * scale, first, **size)


def _dkv_kernel(
    q_ref, k_ref, v_ref, end_ref, grad_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, tiles, **size
):
    """Loop over the query heads, and over tiles of queries from the diagonal to the last query that
    attends to a key of this tile. Scores are [S, T], so that no product transposes a tile in
    registers."""
    first = pl.program_id(0) * tiles.keys
    load = partial(_load, **size)
    k, v = (load(ref, first, tiles.keys, row=0) for ref in (k_ref, v_ref))
    keys = first + jnp.arange(tiles.keys)
    end = plgpu.load(end_ref, mask=keys < size["length"], other=0)
    start = lax.div(first, tiles.queries)
    count = jnp.maximum(lax.div(jnp.max(end) + tiles.queries - 1, tiles.queries) - start, 0)
    scale = 1 / math.sqrt(size["width"])

    def add(step, carry):
        dk, dv = carry
        head = lax.div(step, count)
        at = (start + step - head * count) * tiles.queries
        q, grad = (load(ref, at, tiles.queries, head=(head,)) for ref in (q_ref, grad_ref))
        queries = at + jnp.arange(tiles.queries)
        statistics = (ref.at[head, pl.ds(at, tiles.queries)] for ref in (lse_ref, delta_ref))
        inside = queries < size["length"]
        lse, delta = (plgpu.load(ref, mask=inside, other=0) for ref in statistics)
        visible = (keys[:, None] <= queries) & (queries < end[:, None])
        scores = jnp.where(visible, _dot(k, q.T) * (scale * LOG2_E) - lse, MASKED)
        weights = jnp.exp2(scores)
        change = weights * (_dot(v, grad.T) - delta)
        dv = dv + _dot(weights.astype(grad.dtype), grad)
        return dk + _dot(change.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[1] * count, add, (zeros, zeros))
    _store(dk_ref, dk * scale, first, **size)
    _store(dv_ref, dv, first, **size)


def _over_keys(last_ref, first, tiles: Tiles, length: int, add, carry):
    """Loop over tiles of keys up to the diagonal, without the fully masked tiles at the start and
    the next run of fully masked tiles: queries of a rejected answer skip the chosen answer.

    The loop computes tile indices and does not branch: Triton pipelines only such loops.
    """
    last = last_ref[...]
    place = jnp.arange(last.shape[0])
    stop = lax.div(jnp.minimum(first + tiles.queries, length) + tiles.keys - 1, tiles.keys)
    needed = (last > first) & (place < stop)
    start = jnp.min(jnp.where(needed, place, stop))
    gap = jnp.min(jnp.where(needed | (place < start), stop, jnp.minimum(place, stop)))
    skip = jnp.min(jnp.where(needed & (place > gap), place, stop)) - gap
    end = stop - skip
    return lax.fori_loop(start, end, lambda i, c: add(jnp.where(i < gap, i, i + skip), c), carry)


def _visible(first_query, first_key, end_ref, tiles: Tiles, length: int) -> jax.Array:
    """The mask of a tile, queries by keys."""
    queries = (first_query + jnp.arange(tiles.queries))[:, None]
    keys = first_key + jnp.arange(tiles.keys)
    end = plgpu.load(end_ref.at[pl.ds(first_key, tiles.keys)], mask=keys < length, other=0)
    return (keys <= queries) & (queries < end)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, accumulated in float32. HIGHEST rules out TF32 and has no effect on 16-bit inputs."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _inside(ref, first, size: int, length: int, width: int) -> jax.Array:
    return (first + jnp.arange(size) < length)[:, None] & (jnp.arange(ref.shape[-1]) < width)


def _load(
    ref, first, size: int, *, length: int, width: int, row=None, head: tuple = ()
) -> jax.Array:
    """A tile [size, padded width] at `row` of the ref (default: `first`), and at index `head`."""
    index = (pl.ds(first if row is None else row, size), *head)
    return plgpu.load(ref.at[index], mask=_inside(ref, first, size, length, width), other=0)


def _store(ref, tile, first, **size) -> None:
    plgpu.store(ref, tile.astype(ref.dtype), mask=_inside(ref, first, len(tile), **size))
