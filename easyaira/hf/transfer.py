"""Conversion between Hugging Face weights and EasyAira parameters, without torch.

Each model's table (`hf/table.py`) serves both directions. A missing tensor, an unknown tensor or a
wrong shape is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easyaira.distributed import hosts, watchdog
from easyaira.distributed.tree import path_of
from easyaira.errors import WeightsError
from easyaira.hf.lazy import Lazy, aligned, loaded, slices
from easyaira.hf.safetensors import release
from easyaira.hf.table import VOCAB, Row, pair_rows

Each = Callable[[tuple, jax.Array], Any]  # (path in the tree, parameter) -> leaf to keep
BLOCK, STRIP = 256, 32  # rows and columns, see `_copy`


def match(
    tensors: dict[str, np.ndarray],
    tree: Any,
    rows: Sequence[Row],
    *,
    vocab_size: int,
    prefix: str,
    ignored: Sequence[str],
    renamed: Mapping[str, str],
    optional: Sequence[str],
    tied: bool,
    where: str,
) -> dict[str, np.ndarray]:
    """Select the tensors of `rows` and check them against `tree`, before any data is read.

    Args:
        tensors: name -> array, from `open_folder`.
        tree: shapes of our parameters.
        prefix: start of tensor names that old files may omit.
        ignored: patterns of names that are not weights of this model.
        renamed: endings of names in old files -> today's endings.
        optional: our paths of layers that may be missing, but only completely.
        tied: the head is the token table, so a stored head must equal it.
        where: the folder, for messages.

    Raises:
        WeightsError: lists all missing tensors, unknown tensors and wrong shapes in one message.
    """
    expected, whole = {}, {}
    for row, leaf in pair_rows(tree, rows):
        if row.stacked and leaf.shape[0] > len(tensors):  # before that many names are listed
            raise WeightsError(
                f"{where}: config.json has {leaf.shape[0]} layers, but only {len(tensors)} tensors "
                "are stored; they are of different models"
            )
        layer = np.broadcast_to(np.float32(0), leaf.shape[1:] if row.stacked else leaf.shape)
        expected |= dict.fromkeys(row.names(leaf), row.cut(layer, vocab_size).shape)
        whole.setdefault(row.ours.rpartition("/")[0], []).extend(row.names(leaf))
    matched = {}
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        full = name if name in expected or prefix + name not in expected else prefix + name
        if not any(re.search(pattern, prefix + name) for pattern in ignored):
            matched[full] = tensor
    if tied and "lm_head.weight" in matched and "lm_head.weight" not in expected:
        head = matched.pop("lm_head.weight")
        # safetensors' save_model keeps the first name of a shared tensor
        table = matched.setdefault(next(row.theirs for row in rows if row.op is VOCAB), head)
        if not np.array_equal(head, table):
            raise WeightsError(
                f"{where}: config.json ties the head to the embedding, but lm_head.weight differs "
                "from it; set tie_word_embeddings to false to keep both"
            )
    problems = []
    absent = [names for product, names in whole.items() if product in optional]
    may_miss = {name for names in absent if not matched.keys() & set(names) for name in names}
    if missing := sorted(set(expected) - set(matched) - may_miss):
        problems.append(f"missing {_first_three(missing)}")
    if extra := sorted(set(matched) - set(expected)):
        problems.append(f"unknown to this architecture {_first_three(extra)}")
    problems += [
        f"{name} has shape {list(matched[name].shape)}, config.json expects {list(shape)}"
        for name, shape in expected.items()
        if name in matched and matched[name].shape != shape
    ][:3]
    if problems:
        raise WeightsError(
            f"{where}: {'; '.join(problems)}. Does config.json belong to this model?"
        )
    return matched


def _first_three(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def from_hf(
    tensors: dict[str, np.ndarray],
    tree: Any,
    rows: Sequence[Row],
    drawn: Mapping[str, jax.Array] | None = None,
    each: Each | None = None,
    *,
    where: str,
) -> Any:
    """Load our parameters in float32; each device reads only its own shard.

    Args:
        tensors: name -> array, from `match`.
        tree: shapes, dtypes and optional shardings of our parameters.
        drawn: our path -> a parameter to use instead of reading one.
        each: function applied to each parameter as soon as it is loaded.
        where: the folder, for messages.

    Raises:
        WeightsError: a tensor contains NaN or infinity.
    """
    rows_by_path = {row.ours: row for row, _ in pair_rows(tree, rows)}
    drawn = drawn or {}

    def load(path: tuple, leaf: Any) -> Any:
        row = rows_by_path[path_of(path)]
        watchdog.beat(f"reading {row.ours}")
        if row.ours in drawn:
            return each(path, drawn[row.ours]) if each else drawn[row.ours]
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        read = partial(_read, row, leaf, tensors, where)
        array = jax.make_array_from_callback(leaf.shape, sharding, read)
        return array if each is None else each(path, array)

    return jax.tree_util.tree_map_with_path(load, tree)


def _place(where: str, name: str, tensor: np.ndarray) -> str:
    """File and name of a stored tensor, for messages."""
    file = getattr(tensor, "filename", None)  # of a memory map
    return f"{where}/{Path(file).name}: {name}" if file else f"{where}: {name}"


def lazy_from_hf(
    tensors: dict[str, np.ndarray], tree: Any, rows: Sequence[Row], *, where: str
) -> Any:
    """The parameters of `from_hf` as `Lazy` arrays, on the host."""
    rows_by_path = {row.ours: row for row, _ in pair_rows(tree, rows)}

    def lazy(path: tuple, leaf: Any) -> Lazy:
        row, rest = rows_by_path[path_of(path)], [slice(None)] * (leaf.ndim - 1)
        read = partial(_read, row, leaf, tensors, where)
        pieces = [(piece, *rest) for piece in slices(leaf.shape, 4)]
        dtype, *others = {tensors[name].dtype for name in row.names(leaf)}
        return Lazy(
            leaf.shape,
            np.dtype(np.float32),
            lambda: map(read, pieces),
            lambda i: read((slice(i, i + 1), *rest))[0],
            dtype if dtype.itemsize < 4 and not others else None,
        )

    return jax.tree_util.tree_map_with_path(lazy, tree)


def _read(
    row: Row,
    leaf: Any,
    tensors: dict[str, np.ndarray],
    where: str,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part of a parameter at `index`."""
    spans = [slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
    array = aligned(tuple(span.stop - span.start for span in spans))
    layers = array if row.stacked else array[None]
    names = row.names(leaf)[spans[0]] if row.stacked else [row.theirs]
    for i, name in enumerate(names):
        view = row.op.to_ours(tensors[name])[tuple(spans[1:] if row.stacked else spans)]
        _fill(layers[i, ...], view, _place(where, name, tensors[name]))
    return array


def _fill(array: np.ndarray, view: np.ndarray, place: str) -> None:
    """Copy a stored tensor into a part of a parameter, whose vocabulary may be padded."""
    if view.shape != array.shape:
        array[...] = 0
    with np.errstate(over="ignore"):  # infinity is named below
        _copy(array[tuple(map(slice, view.shape))], view)
    release(view)
    if not np.isfinite(array).all():
        raise WeightsError(
            f"{place}: contains NaN or infinity; the file is damaged or the model diverged"
        )


def _copy(array: np.ndarray, view: np.ndarray) -> None:
    """`array[...] = view`, also of another dtype. A transposed matrix is turned in blocks that fit
    into the core's cache, in strips of columns, before its dtype changes: in half of the time."""
    view = np.asarray(view)  # slices of a memory map take longer
    if view.ndim != 2 or view.strides[0] >= view.strides[1]:
        array[...] = view
        return
    bits = np.dtype(f"u{view.itemsize}")  # NumPy copies bfloat16 number by number
    for row in range(0, view.shape[0], BLOCK):
        for column in range(0, view.shape[1], BLOCK):
            block = slice(row, row + BLOCK), slice(column, column + BLOCK)
            stored = view[block].view(bits)
            turned = np.empty(stored.shape, bits)
            for first in range(0, BLOCK, STRIP):
                strip = slice(first, first + STRIP)
                turned[:, strip] = stored[:, strip]
            array[block] = turned.view(view.dtype)


def to_hf(
    params: Any, rows: Sequence[Row], *, vocab_size: int, dtypes: Callable[[str], np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield Hugging Face tensors one by one, rounded once to `dtypes(name)`. All processes of a run
    must iterate together.

    Raises:
        WeightsError: a value is not finite, or overflows the dtype.
    """
    for name, tensor in lazy_to_hf(params, rows, vocab_size=vocab_size, dtypes=dtypes):
        yield name, tensor.read()


def lazy_to_hf(
    params: Any, rows: Sequence[Row], *, vocab_size: int, dtypes: Callable[[str], np.dtype]
) -> Iterator[tuple[str, Lazy]]:
    """Yield the tensors of `to_hf` as `Lazy` arrays. Read in this order, each parameter of a `Lazy`
    tree is read once."""
    last: dict[str, Any] = {}  # the parameter that was read last, by path

    def read(row: Row, leaf: Any, layer: int, name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        watchdog.beat(f"collecting {name}")
        if row.stacked and isinstance(leaf, Lazy) and leaf.entry:
            array = leaf.entry(layer)
        else:
            if row.ours not in last:
                last.clear()  # before the next one is read
                last[row.ours] = loaded(leaf)
            array = last[row.ours]
            array = hosts.fetch(array[layer] if row.stacked else array)
        with np.errstate(over="ignore"):
            view = row.cut(array, vocab_size)
            tensor = np.empty(view.shape, dtype)
            _copy(tensor, view)
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise WeightsError(
                f"{name}: values overflow {dtype.name}; choose --dtype float32"
                if np.isfinite(array).all()
                else f"{name}: contains NaN or infinity; it is not exported"
            )
        yield tensor

    for row, leaf in pair_rows(params, rows):
        layer = np.broadcast_to(np.float32(0), leaf.shape[1:] if row.stacked else leaf.shape)
        shape = row.cut(layer, vocab_size).shape
        for i, name in enumerate(row.names(leaf)):
            dtype = np.dtype(dtypes(name))
            yield name, Lazy(shape, dtype, partial(read, row, leaf, i, name, dtype))
