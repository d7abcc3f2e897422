"""Arrays that are read when they are used, so that no program holds a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

PIECE_BYTES = 2**26


@dataclass(frozen=True)
class Lazy:
    """An array that is not in memory.

    Attributes:
        pieces: reads the array anew, in consecutive parts along axis 0; all but the last have the
            same number of rows.
        entry: reads one entry along axis 0; None: only whole pieces can be read.
        kept: smaller dtype for storage, which holds every value exactly; None: `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[Any]]
    entry: Callable[[int], Any] | None = None
    kept: np.dtype | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> Any:
        """The whole array."""
        pieces = list(self.pieces())
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def then(self, convert: Callable[[Any], Any]) -> Lazy:
        """The same array with `convert` applied to each piece, which keeps its shape and dtype."""
        return replace(self, pieces=lambda: map(convert, self.pieces()), entry=None, kept=None)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def loaded(array: Any) -> Any:
    """The array itself, or what a `Lazy` one reads."""
    return array.read() if isinstance(array, Lazy) else array


def slices(shape: tuple[int, ...], itemsize: int) -> list[slice]:
    """Cut axis 0 of an array into pieces of at most PIECE_BYTES, or of one row."""
    rows = max(1, PIECE_BYTES * shape[0] // max(1, math.prod(shape) * itemsize))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 array that JAX uses on a CPU without a copy."""
    size, alignment = 4 * math.prod(shape), 64
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(np.float32).reshape(shape)
