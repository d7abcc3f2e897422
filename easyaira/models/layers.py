"""Layers that the architectures share.

Shapes: R rows, T tokens, D width, F features, H heads, K key/value heads, N = D // H head width,
L layers, V vocabulary (padded, see `padded_vocab`).

Parameters are float32 and cast to the computing dtype where they are used. Norms, softmax and
rotary angles are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import constrain
from easyaira.models.parameter import parameter
from easyaira.models.product import packed, row_dot, unpacked

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # by Hugging Face's names
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}

VOCAB_MULTIPLE = 128
UNLIMITED = 2**30  # the window of a layer without one


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary size rounded up to a multiple of VOCAB_MULTIPLE.

    Sizes such as 50257 and 32001 can then be sharded. The multiple does not depend on the mesh, so
    a checkpoint fits every mesh. Padding rows are zero, match no token id, have no probability, and
    are not exported.
    """
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class Compute:
    """How to compute a model, as opposed to its architecture and sizes."""

    dtype: Any = jnp.float32
    gradient_checkpointing: str = "none"  # none | dots | full
    dropout: float = 0.0
    attention: str = "xla"  # xla | tiles | cudnn | pallas | splash, see attention.py
    shared_prompt: int = 0  # most answers that may follow a prompt in a row; 0: none is shared
    tf32: bool = False  # float32 products may round to 10-bit mantissas
    cached: bool = False  # attention stores keys and values, see cache.py
    unroll_up_to: int = 0  # models of at most so many layers have no loop over layers
    max_length: int | None = None  # no text has more tokens; None: unknown

    @property
    def matmul_precision(self) -> str | None:
        """Value for `jax.default_matmul_precision`. By default, accelerators round the factors of
        float32 products to mantissas of 10 bits or fewer."""
        if jnp.dtype(self.dtype).itemsize < 4:
            return None
        return "tensorfloat32" if self.tf32 else "highest"


def is_matrix(name: str) -> bool:
    """True for kernels and embeddings, which each use casts to the computing dtype, so that frozen
    ones may be held in it. Other parameters, such as scales and biases, are used in float32."""
    return name.endswith(("/kernel", "/embedding"))


# Activations and norms keep only their input for the backward pass and recompute the rest, which
# costs less than storing it.
def _recompute(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """f in float32, rounded once, whose backward pass computes it again from its inputs."""

    def rounded(*inputs: jax.Array) -> jax.Array:
        # in 16 bits, XLA would round after each operation, which takes three times as long on a CPU
        return f(*(x.astype(jnp.float32) for x in inputs)).astype(inputs[0].dtype)

    def backward(saved: list[jax.Array], d_y: jax.Array) -> tuple[jax.Array, ...]:
        # without the barrier, and without a loop over layers, XLA would keep the forward pass's
        # intermediate results instead
        saved = jax.lax.optimization_barrier(saved)
        return jax.vjp(rounded, *(unpacked(x, d_y.dtype) for x in saved))[1](d_y)

    g = jax.custom_vjp(rounded)
    g.defvjp(lambda *inputs: (rounded(*inputs), [packed(x) for x in inputs]), backward)
    return g


def _gated(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda gate, up: f(gate) * up


GATES = {name: _recompute(_gated(f)) for name, f in ACTIVATIONS.items()}  # activation(gate) * up
ACTIVATIONS = {name: _recompute(f) for name, f in ACTIVATIONS.items()}


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(x, scale, bias, eps: float, centred: bool):
    """scale (x - mean) / std + bias over the last axis; without `centred`, the mean is 0.

    The derivative is written out, because XLA's CPU takes five times as long for JAX's own."""
    normed, _ = _normed(x, eps, centred)
    return (normed * scale + (0 if bias is None else bias)).astype(x.dtype)


def _normed(x, eps, centred):
    x = x.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True) if centred else 0
    inverse = jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * inverse, inverse


def _norm_backward(eps, centred, saved, d_y):
    x, scale, bias = unpacked(saved[0], d_y.dtype), *saved[1:]
    normed, inverse = _normed(x, eps, centred)
    d_y = d_y.astype(jnp.float32)
    d_normed, rows = d_y * scale, tuple(range(x.ndim - 1))
    mean = d_normed.mean(-1, keepdims=True) if centred else 0
    slope = row_dot(d_normed, normed)[..., None] / x.shape[-1]
    d_x = (inverse * (d_normed - mean - normed * slope)).astype(x.dtype)
    return d_x, (d_y * normed).sum(rows), None if bias is None else d_y.sum(rows)


def _norm_forward(x, scale, bias, eps, centred):
    return _norm(x, scale, bias, eps, centred), (packed(x), scale, bias)


_norm.defvjp(_norm_forward, _norm_backward)


class LayerNorm(nn.Module):
    """Ba et al. (2016), Layer Normalization, eq. 4."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return _norm(x, scale, bias, self.eps, True)


class RMSNorm(nn.Module):
    """Zhang and Sennrich (2019), eq. 4. The stored scale is that of the equation less `offset`."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1 - self.offset)
        scale = self.offset + parameter(self, "scale", init, (x.shape[-1],))
        return _norm(x, scale, None, self.eps, False)


class Dropout(nn.Module):
    """Dropout, active when the caller passes a `dropout` key: in training, not in evaluation."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for longer texts, under the names of config.json.

    `linear` divides all frequencies by `factor`: Chen et al. (2023), Position Interpolation, eq. 4.
    `llama3` divides those that turn less than `low_freq_factor` times within
    `original_max_position_embeddings`, keeps those that turn more than `high_freq_factor` times,
    and interpolates between: Llama 3.1, Grattafiori et al. (2024).
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def scaled(self, frequencies: jax.Array) -> jax.Array:
        if self.rope_type == "linear":
            return frequencies / self.factor
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotary(
    positions_RT: jax.Array, width: int, theta: float | None, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary position embeddings, [R, T, 1, width / 2] each, in float32.

    Without `theta`, there is no rotation: 1 and 0."""
    exponents = -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    frequencies = jnp.zeros(width // 2) if theta is None else theta**exponents
    if scaling is not None:
        frequencies = scaling.scaled(frequencies)
    angles = positions_RT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_RTHN: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate pairs (i, i + N/2) by their angles: Su et al. (2021) in Hugging Face's half-split
    order, so that weights need no permutation."""
    cos, sin = angles
    first, second = jnp.split(x_RTHN.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_RTHN.dtype)


class Scores(NamedTuple):
    """How products of queries and keys become attention scores.

    Attributes:
        divisor: of the products; None: the square root of the head width, as in Vaswani et al.
            (2017), eq. 1.
        cap: soft cap of the scores (`capped`); None: none.
        slopes: of each query head, subtracted from its scores times the distance of the tokens:
            Press et al. (2022), ALiBi, section 3; None: none.
    """

    divisor: float | None = None
    cap: float | None = None
    slopes: tuple[float, ...] | None = None

    def of(self, products: jax.Array, width: int, distance: jax.Array | None) -> jax.Array:
        """Scores from products [R, K, G, ...], with G query heads for each key head.

        Args:
            distance: tokens between query and key, broadcast to the products; needed for `slopes`.
        """
        scores = capped(products / (self.divisor or math.sqrt(width)), self.cap)
        if self.slopes is None:
            return scores
        heads = (products.shape[1], products.shape[2], *(1,) * (products.ndim - 3))
        return scores - jnp.array(self.slopes).reshape(heads) * distance


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap): Gemma 2, Riviere et al. (2024), section 2. None: x itself."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def hiding(windows: tuple[int, ...] | None, compute: Compute) -> tuple[int, ...] | None:
    """The windows of the layers, or None if every text fits into each of them."""
    longest = compute.max_length
    if windows is None or (longest is not None and longest <= min(windows)):
        return None
    return windows


def layers(
    block: type[nn.Module], length: int, compute: Compute, in_axes: Any = nn.broadcast
) -> Any:
    """`length` copies of `block`, scanned: one compiled body, parameters stacked on axis 0.

    A loop copies what each layer keeps for the backward pass into a stack and out of it. Unrolled,
    a program needs no copies, but takes longer to compile. With a cache, layers are always
    unrolled, since a loop would copy a layer's cache for each token. With gradient checkpointing
    they never are: without a loop, the compiler merges what is computed again with what it repeats.

    Args:
        in_axes: for each input after the first, 0 if it is stacked over layers, else broadcast.
    """
    checkpointed = compute.gradient_checkpointing != "none"
    unrolled = compute.cached or (length <= compute.unroll_up_to and not checkpointed)
    if checkpointed:
        policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        block = nn.remat(block, prevent_cse=False, policy=policy[compute.gradient_checkpointing])
    return nn.scan(
        block,
        variable_axes={"params": 0, "cache": 0, "router": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=length if unrolled else 1,
        check_constancy_invariants=False,  # would trace the block once more
    )


# Sharding of activations; all of them are sharded by rows. Without these constraints, the compiler
# may communicate activations instead of weights.


def between(x_RTD: jax.Array) -> jax.Array:
    """Shard by tokens over tp between the products (sequence parallelism), so that norms, residuals
    and the stored activations of each layer take 1/tp of the memory.

    Korthikanti et al. (2022), Reducing Activation Recomputation, section 4.2.2: the all-reduce
    after a tp-sharded product becomes a reduce-scatter, with an all-gather before the next one.
    """
    return constrain(x_RTD, BATCH_AXES, "tp", None)


def whole(x_RTD: jax.Array) -> jax.Array:
    """Gather all tokens and features before the products of a branch, and before the head."""
    return constrain(x_RTD, BATCH_AXES, None, None)


def by_features(x_RTF: jax.Array) -> jax.Array:
    """Shard by features or heads within a branch, as tp shards the branch's first product."""
    return constrain(x_RTF, BATCH_AXES, None, "tp")
