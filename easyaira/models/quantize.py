"""Quantised kernels: 8-bit integers, or the 4-bit NormalFloat of QLoRA.

Shapes: K is the size of a kernel's input axis, and `axis` its index. All other axes are outputs (or
layers), each with its own scales. A quantised kernel replaces the kernel in the parameter tree by a
dict of arrays, `{"int8" | "nf4": codes, "scale": scales}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # inputs that share a scale in nf4
Quantized = dict[str, jax.Array]


def nf4_levels() -> np.ndarray:
    """The 16 values of NormalFloat4, in [-1, 1]: Dettmers et al. (2023), QLoRA, section 3 and
    appendix E.

    Normal quantiles at 8 evenly spaced probabilities up to 1/2 and at 9 from 1/2 on (both include
    1/2 itself, whose quantile is exactly 0), scaled to end at -1 and 1. The outermost probability
    is 1 minus the mean of 1/32 and 1/30.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    below, above = (
        [NormalDist().inv_cdf(p) for p in np.linspace(0.5, outermost, count)] for count in (8, 9)
    )
    levels = [-x for x in reversed(below[1:])] + above
    return np.array(levels, np.float32) / np.float32(above[-1])


NF4 = nf4_levels()


def quantize(kernel: jax.Array, how: Literal["int8", "nf4"], axis: int) -> Quantized:
    """Quantise a float32 kernel to codes and float32 scales.

    int8: `scale` [.., 1, ..] is the largest magnitude per output, divided by 127. Codes are
    rounded; the error is at most scale / 2.
    nf4: `scale` [.., ceil(K / 64), ..] is the largest magnitude per block of 64 inputs. Codes are
    the nearest levels, two per byte: [.., ceil(K / 2), ..].
    """
    if how == "int8":
        scale = jnp.abs(kernel).max(axis, keepdims=True) / 127
        codes = jnp.round(kernel / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
        return {"int8": codes, "scale": scale}
    inputs = kernel.shape[axis]
    blocks = jnp.moveaxis(kernel, axis, 0)
    blocks = jnp.pad(blocks, [(0, -inputs % BLOCK)] + [(0, 0)] * (kernel.ndim - 1))
    blocks = blocks.reshape(-1, BLOCK, *blocks.shape[1:])
    scale = jnp.abs(blocks).max(1)
    shares = blocks / jnp.where(scale > 0, scale, 1)[:, None]
    between = (NF4[1:] + NF4[:-1]) / 2
    codes = sum((shares > edge).astype(jnp.uint8) for edge in between)
    codes = codes.reshape(-1, *blocks.shape[2:])[: inputs + inputs % 2]
    codes = codes[::2] | (codes[1::2] << 4)
    return {"nf4": jnp.moveaxis(codes, 0, axis), "scale": jnp.moveaxis(scale, 0, axis)}


def dequantize(held: Mapping[str, jax.Array], inputs: int, dtype: jnp.dtype) -> jax.Array:
    """Restore the kernel [K, ..] of one layer, rounded once to `dtype`. `inputs` is K."""
    if "int8" in held:
        return (held["int8"].astype(jnp.float32) * held["scale"]).astype(dtype)
    pairs = held["nf4"]
    codes = jnp.stack([pairs & 15, pairs >> 4], 1).reshape(-1, *pairs.shape[1:])[:inputs]
    scale = jnp.repeat(held["scale"], BLOCK, axis=0)[:inputs]
    return (jnp.asarray(NF4)[codes] * scale).astype(dtype)
