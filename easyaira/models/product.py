"""Products of arrays: factors in the computing dtype, sums in float32, rounded once at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from easyaira.distributed.compiler import lacks_16_bit_products
from easyaira.distributed.sharding import on_cpu, on_one_cpu

FEW, MANY = 16, 64  # rows, see `by_rows`
WIDE = 64  # rows and columns, see `_widened`
NOT_NEGATIVE = {"allow_negative_indices": False}  # else JAX traces three more operations a slice
CACHED = 2**18  # float32 numbers that a core's cache holds, see `few_at_a_time`


def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """einsum of two arrays of one dtype, with a result in `dtype`."""

    if a.dtype != jnp.float32 and not on_cpu():
        # the sums are float32 anyway; a float32 result would be stored and sent between devices
        return jnp.einsum(spec, a, b, preferred_element_type=dtype)
    a, b = _widened(spec, a, b)
    if a.dtype != jnp.float32:
        spec, a, b = _over_two_axes(spec, a, b)
    # XLA's CPU multiplies 16-bit numbers at full speed only if it is asked for a float32 result
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


def _widened(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factors in float32 if the CPU multiplies those faster. A product of few rows takes less
    time as it is: reading the other factor takes most of it."""
    first, second, result = spec.replace("->", ",").split(",")
    rows = math.prod(a.shape[first.index(name)] for name in result if name not in second)
    columns = math.prod(b.shape[second.index(name)] for name in result if name not in first)
    if min(rows, columns) < WIDE or not lacks_16_bit_products():
        return a, b
    return a.astype(jnp.float32), b.astype(jnp.float32)


def _over_two_axes(spec: str, a: jax.Array, b: jax.Array) -> tuple[str, jax.Array, jax.Array]:
    """The same einsum, summed over one more axis of size 1, where the sum is over an inner axis of
    a. XLA's CPU then transposes a and multiplies 16-bit numbers four times as fast."""
    first, second, result = spec.replace("->", ",").split(",")
    (*others, summed) = (name for name in first if name in second and name not in result)
    if others or first.endswith(summed):
        return spec, a, b
    wider = spec.replace(summed, f"z{summed}")
    at, of_b = first.index(summed), second.index(summed)
    return wider, jnp.expand_dims(a, at), jnp.expand_dims(b, of_b)


def packed(x: jax.Array) -> jax.Array:
    """x in the form in which it is written into a larger array, such as the stack of arrays that
    layers keep for their backward pass: on a CPU, 16-bit floats as integers.

    XLA's CPU writes float32. To write 16-bit floats, it would convert the whole array to float32
    and back."""
    if on_cpu() and x.dtype in (jnp.bfloat16, jnp.float16):
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return x


def unpacked(x: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., K] @ kernel [K, ...], in the dtype of x.

    The gradient's products have factors in that dtype, too. The gradient of a float32 kernel is not
    rounded; by JAX's own derivative, it would be rounded to the dtype of x.
    """
    # JAX traces the backward pass later, when another default may hold
    return _linear(jax.config.jax_default_matmul_precision, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(precision: str | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    x_, kernel_, y_ = _letters(x, kernel)
    with jax.default_matmul_precision(precision):
        return einsum(f"{x_},{kernel_}->{y_}", x, kernel.astype(x.dtype), x.dtype)


def _forward(precision, x, kernel):
    return _linear(precision, x, kernel), (packed(x), kernel)


def _backward(precision, saved, d_y):
    x, kernel = unpacked(saved[0], d_y.dtype), saved[1]
    with jax.default_matmul_precision(precision):
        return _of_inputs(x, d_y, kernel.astype(x.dtype)), _of_kernel(x, d_y, kernel)


def _of_inputs(x: jax.Array, d_y: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of the inputs."""
    if on_one_cpu():  # over several axes, XLA's product transposes a copy of the kernel first
        kernel = kernel.reshape(len(kernel), -1)
        d_y = d_y.reshape(*x.shape[:-1], -1)
    x_, kernel_, y_ = _letters(x, kernel)
    return einsum(f"{y_},{kernel_}->{x_}", d_y, kernel, x.dtype)


def _of_kernel(x: jax.Array, d_y: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of the kernel."""
    if not on_one_cpu():
        x_, kernel_, y_ = _letters(x, kernel)
        return einsum(f"{x_},{y_}->{kernel_}", x, d_y, kernel.dtype)
    # over several axes, XLA's product transposes a copy of x in memory first
    rows, columns = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, math.prod(kernel.shape[1:]))
    rows, columns = _widened("nk,nu->ku", rows, columns)
    # the first factor is transposed in memory: the narrower one, which takes less time
    wide = rows.shape[1] > columns.shape[1]
    first, second = (columns, rows) if wide else (rows, columns)
    if first.dtype == jnp.float32:
        # Over the first axes of both, XLA's float32 product takes up to twice as long. Without the
        # barriers, XLA would undo the transposition.
        grad = einsum("kn,nu->ku", jax.lax.optimization_barrier(first.T), second, kernel.dtype)
    else:
        grad = einsum("nk,nu->ku", first, second, kernel.dtype)
    if wide:
        grad = jax.lax.optimization_barrier(grad).T
    return grad.reshape(kernel.shape)


_linear.defvjp(_forward, _backward)


def _letters(x: jax.Array, kernel: jax.Array) -> tuple[str, str, str]:
    rows, features = "abcd"[: x.ndim - 1], "uvw"[: kernel.ndim - 1]
    return f"{rows}k", f"k{features}", f"{rows}{features}"


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., F] + bias [F], in the dtype of y. The gradient of a float32 bias is a sum in float32
    that is not rounded; XLA's CPU takes eight times as long for a sum of 16-bit numbers."""
    return y + bias.astype(y.dtype)


def _add_bias_backward(bias, d_y):
    rows = tuple(range(d_y.ndim - bias.ndim))
    return d_y, d_y.astype(jnp.float32).sum(rows).astype(bias.dtype)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _add_bias_backward)


def by_rows(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """x [..., K] times the transpose of kernel [..., K], in `dtype`: the order in which XLA's CPU
    multiplies a few rows twice as fast."""
    rows, columns = x.reshape(-1, x.shape[-1]), kernel.reshape(-1, kernel.shape[-1])
    if len(rows) == 1 and x.dtype != jnp.float32 and on_cpu():
        # two rows of 16-bit numbers are three times as fast as one
        rows = jnp.concatenate([rows, rows])
    is_small = len(rows) * len(columns) <= CACHED  # the result is transposed in the core's cache
    # 48 float32 rows as the second factor take longer than 64, and longer than as the first one
    fits = x.dtype != jnp.float32 or len(rows) & (len(rows) - 1) == 0
    few = MANY if is_small and fits else FEW
    if 1 < len(rows) <= few and on_one_cpu():
        # faster still if the rows are the second factor; the barrier keeps XLA from swapping them
        y = jax.lax.optimization_barrier(einsum("uk,nk->un", columns, rows, dtype)).T
    else:
        y = einsum("nk,uk->nu", rows, columns, dtype)
    return y[: math.prod(x.shape[:-1])].reshape(*x.shape[:-1], *kernel.shape[:-1])


def few_at_a_time(f: Callable[..., Any], arrays: Sequence[jax.Array], numbers: int) -> Any:
    """f(*arrays), computed on one CPU for a few rows at a time: what f computes for them stays in
    the core's cache. 16-bit results are packed then.

    Args:
        f: function whose every result has a row for each row of the arrays.
        numbers: float32 numbers that f computes for a row.
    """
    rows = len(arrays[0])
    if not on_one_cpu() or rows * numbers <= CACHED:
        return f(*arrays)
    few = math.gcd(rows, 1 << max(0, (CACHED // numbers).bit_length() - 1))
    take = partial(jax.lax.dynamic_slice_in_dim, slice_size=few, **NOT_NEGATIVE)

    def from_row(first: jax.Array) -> Any:
        return jax.tree.map(packed, f(*(take(x, first) for x in arrays)))

    results = jax.lax.map(from_row, jnp.arange(0, rows, few))
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), results)


def row_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over the last axis of a * b, in float32; b may be one row for all. XLA's CPU takes ten
    times as long for a sum that is not written as a product of arrays."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if not on_cpu():
        return (a * b).sum(-1)
    return jnp.einsum("...d,d->..." if b.ndim == 1 else "...d,...d->...", a, b)
