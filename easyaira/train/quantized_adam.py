"""AdamW's moments in 8 bits: Dettmers et al. (2022), 8-bit Optimizers via Block-wise Quantization.

Shapes: L is the size of a parameter's last axis. Blocks of 256 values along that axis share a
scale, their largest magnitude; the last block may be shorter. Codes are places in the paper's
dynamic map of 256 levels: signed for the first moment, unsigned for the second.

As in bitsandbytes, small parameters keep float32 moments, embeddings are quantised, and an update
uses the moments before they are quantised again. Unlike there, a second moment is never rounded to
0, which would make the next update of that value hundreds of times too large: Li et al. (2023),
Memory Efficient Optimizers with 4-bit States, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.distributed.sharding import parts_of

BLOCK = 256
SMALLEST = 4096  # parameters of a layer with fewer values keep float32 moments
SHORTEST = 16  # as do those with a shorter last axis, as blocks would be as short
DECADES = 7


class Quantized(NamedTuple):
    """A moment of a parameter.

    Attributes:
        codes: uint8 places in the map, with the parameter's shape.
        scale: float32 largest magnitude per block, [.., ceil(L / 256)].
    """

    codes: Any
    scale: Any


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 levels of the map in ascending order, float32, in [-1, 1]; equal to bitsandbytes'
    `create_dynamic_map`.

    Each decade 10^-7 .. 10^-6, .., 0.1 .. 1 is cut into twice as many parts of equal length as the
    one before; the levels are their middles, 0 and 1."""
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = 10.0 ** (decade + 1 - DECADES) * (edges[1:] + edges[:-1]) / 2
        levels += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(levels, np.float32))


class Map:
    """Levels of a dynamic map, and tables to find the nearest one.

    No two middles between neighbouring levels have the same upper 16 bits as float32. So those bits
    of a magnitude, counted from FIRST, decide its level up to one comparison.
    """

    FIRST = int(np.float32(2.0**-23).view(np.uint32) >> 16)  # below all middles
    LAST = int(np.float32(1).view(np.uint32) >> 16)

    def __init__(self, signed: bool):
        self.signed = signed
        self.levels = dynamic_map(signed)
        self.zero = int(np.flatnonzero(self.levels == 0)[0])
        up = self.levels[self.zero :]
        self.middles = np.append((up[1:] + up[:-1]) / 2, np.float32(np.inf))
        starts = (np.arange(self.FIRST, self.LAST + 1, dtype=np.uint32) << 16).view(np.float32)
        self.places = np.searchsorted(self.middles, starts).astype(np.uint8)

    def encode(self, values: jax.Array) -> jax.Array:
        """uint8 places of the levels nearest to float32 `values` in [-1, 1]. Unsigned: never 0,
        since Adam divides by the root of the second moment."""
        size = jnp.abs(values)
        bits = jax.lax.bitcast_convert_type(size, jnp.int32) >> 16
        place = _look_up(self.places, jnp.clip(bits, self.FIRST, self.LAST) - self.FIRST)
        place += size > _look_up(self.middles, place)
        if not self.signed:
            return jnp.maximum(place, 1)
        below = self.zero - jnp.minimum(place, self.zero)  # -1 is no level
        return jnp.where(values < 0, below, self.zero + place)

    def decode(self, codes: jax.Array) -> jax.Array:
        return _look_up(self.levels, codes)


def _look_up(table: np.ndarray, places: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[places].get(mode="promise_in_bounds")


SIGNED, UNSIGNED = Map(True), Map(False)


def is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def quantize(values: jax.Array, levels: Map) -> Quantized:
    """Quantise float32 values [.., L]."""
    parts, count = _parts(values), -(-values.shape[-1] // BLOCK)
    largest, each = jnp.abs(parts).max(-1), _parts_per_block(parts)
    if each > 1:
        largest = _whole(largest)
    missing = count * each - parts.shape[-2]
    largest = jnp.pad(largest, [(0, 0)] * (largest.ndim - 1) + [(0, missing)])
    scale = largest.reshape(*largest.shape[:-1], count, each).max(-1)
    shares = parts / _of_parts(jnp.where(scale > 0, scale, 1), parts)
    return Quantized(levels.encode(shares).reshape(values.shape), scale)


def dequantize(held: Quantized, levels: Map) -> jax.Array:
    """Restore float32 values [.., L]."""
    parts = _parts(held.codes)
    return (levels.decode(parts) * _of_parts(held.scale, parts)).reshape(held.codes.shape)


def _parts(x: jax.Array) -> jax.Array:
    """Divide the last axis into parts that lie in one block and on one device: [.., parts, size].

    The parts do not change the numbers: a block's scale is an exact maximum."""
    length = x.shape[-1]
    size = length
    if length > BLOCK:
        shards = (parts_of(length, axes) for axes in ("fsdp", "tp", ("fsdp", "tp")))
        size = math.gcd(BLOCK, *(length // n for n in shards))
    return x.reshape(*x.shape[:-1], length // size, size)


def _parts_per_block(parts: jax.Array) -> int:
    return 1 if parts.shape[-2] == 1 else BLOCK // parts.shape[-1]


def _of_parts(scale: jax.Array, parts: jax.Array) -> jax.Array:
    """The scale of each part, [.., parts, 1]."""
    each = _parts_per_block(parts)
    if each > 1:
        scale = _whole(jnp.repeat(scale, each, -1)[..., : parts.shape[-2]])
    return scale[..., None]


def _whole(x: jax.Array) -> jax.Array:
    """Gather the last axis of a small array at once. Otherwise XLA pads and cuts it in pieces, with
    a transfer for each."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = P(*(P.UNCONSTRAINED,) * (x.ndim - 1), None)
    return jax.lax.with_sharding_constraint(x, spec)


def shardings_of(moment: Any, sharding: NamedSharding) -> Any:
    """Shardings of a moment, given its parameter's. Scales are sharded alike, except that the last
    axis is whole where blocks cross devices."""
    if not is_quantized(moment):
        return sharding
    spec = (*sharding.spec, *(None,) * (moment.codes.ndim - len(sharding.spec)))
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        on_device = moment.codes.shape[-1] // parts_of(moment.codes.shape[-1], spec[-1])
    last = spec[-1] if on_device % BLOCK == 0 else None
    return Quantized(sharding, NamedSharding(sharding.mesh, P(*spec[:-1], last)))


class AdamState(NamedTuple):
    """Attributes:
    count: number of updates.
    mu, nu: the moments of each parameter, `Quantized` or float32 arrays.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam(
    b1: float, b2: float, eps: float, matrices: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """optax.scale_by_adam with 8-bit moments: Kingma and Ba (2015), algorithm 1.

    Args:
        matrices: params -> tree of booleans; parameters with False keep float32 moments.
    """

    def zeros(leaf, matrix):
        each = leaf.size // (leaf.shape[0] if leaf.ndim > 2 else 1)  # of a layer
        if not matrix or each < SMALLEST or leaf.shape[-1] < SHORTEST:
            return jnp.zeros_like(leaf), jnp.zeros_like(leaf)
        scale = jnp.zeros((*leaf.shape[:-1], -(-leaf.shape[-1] // BLOCK)), jnp.float32)
        return tuple(
            Quantized(jnp.full(leaf.shape, levels.zero, jnp.uint8), scale)
            for levels in (SIGNED, UNSIGNED)
        )

    def init(params: Any) -> AdamState:
        both = jax.tree.map(zeros, params, matrices(params))
        mu, nu = (jax.tree.map(lambda _, pair, i=i: pair[i], params, both) for i in (0, 1))
        return AdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        del params
        count = optax.safe_increment(state.count)

        def of_leaf(grad, mu, nu):
            quantized = is_quantized(mu)
            if quantized:
                mu, nu = dequantize(mu, SIGNED), dequantize(nu, UNSIGNED)
            mu, nu = b1 * mu + (1 - b1) * grad, b2 * nu + (1 - b2) * grad * grad
            update = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            if quantized:
                mu, nu = quantize(mu, SIGNED), quantize(nu, UNSIGNED)
            return update, mu, nu

        triples = jax.tree.map(of_leaf, grads, state.mu, state.nu)
        updates, mu, nu = (
            jax.tree.map(lambda _, triple, i=i: triple[i], grads, triples) for i in range(3)
        )
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
