"""Conversion between Hugging Face weights and EasyAira parameters, without torch.

Each model's table (`hf/table.py`) serves both directions. A missing tensor, an unknown tensor or a
wrong shape is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easyaira.distributed import hosts, watchdog
from easyaira.distributed.tree import path_of
from easyaira.errors import WeightsError
from easyaira.hf.table import VOCAB, Row, pair_rows

Each = Callable[[tuple, jax.Array], Any]  # (path in the tree, parameter) -> leaf to keep


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
        table = matched.get(next(row.theirs for row in rows if row.op is VOCAB))
        head = matched.pop("lm_head.weight")
        if table is not None and not np.array_equal(head, table):
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
        stored = [(name, tensors[name]) for name in row.names(leaf)]
        layers = [(_place(where, name, tensor), row.op.to_ours(tensor)) for name, tensor in stored]

        def read(index):
            spans = [slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
            if not row.stacked:
                return _read(*layers[0], spans)
            return np.stack([_read(place, view, spans[1:]) for place, view in layers[spans[0]]])

        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        array = jax.make_array_from_callback(leaf.shape, sharding, read)
        return array if each is None else each(path, array)

    return jax.tree_util.tree_map_with_path(load, tree)


def _place(where: str, name: str, tensor: np.ndarray) -> str:
    """File and name of a stored tensor, for messages."""
    file = getattr(tensor, "filename", None)  # of a memory map
    return f"{where}/{Path(file).name}: {name}" if file else f"{where}: {name}"


def _read(place: str, view: np.ndarray, spans: list[slice]) -> np.ndarray:
    part = np.asarray(view[tuple(spans)], np.float32)
    if not np.isfinite(part).all():
        raise WeightsError(
            f"{place}: contains NaN or infinity; the file is damaged or the model diverged"
        )
    shape = [span.stop - span.start for span in spans]
    return np.pad(part, [(0, want - have) for want, have in zip(shape, part.shape, strict=True)])


def to_hf(
    params: Any, rows: Sequence[Row], *, vocab_size: int, dtypes: Callable[[str], np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield Hugging Face tensors one by one, rounded once to `dtypes(name)`. All processes of a run
    must iterate together.

    Raises:
        WeightsError: a value is not finite, or overflows the dtype.
    """
    for row, leaf in pair_rows(params, rows):
        for i, name in enumerate(row.names(leaf)):
            watchdog.beat(f"collecting {name}")
            layer = hosts.fetch(leaf[i] if row.stacked else leaf)
            with np.errstate(over="ignore"):
                tensor = np.ascontiguousarray(row.cut(layer, vocab_size)).astype(dtypes(name))
            if not np.isfinite(tensor.astype(np.float32)).all():
                raise WeightsError(
                    f"{name}: values overflow {dtypes(name).name}; choose --dtype float32"
                    if np.isfinite(layer).all()
                    else f"{name}: contains NaN or infinity; it is not exported"
                )
            yield name, tensor
