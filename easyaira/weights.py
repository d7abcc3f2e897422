"""Hugging Face weights to ours and back, by one table per architecture, without torch.

A `Row` pairs a path of our parameter tree with a tensor's name there; `{}` in that name counts
layers, which are stacked on axis 0 here. The table stands at the end of the model's file and
serves both directions; whatever is missing, left over or of another shape is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easyaira import hosts, watch
from easyaira.errors import UnsafeInputError, WeightsError
from easyaira.mesh import by_path, path_of

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
SHARD_BYTES = 5 * 10**9

Each = Callable[[tuple, jax.Array], Any]  # (path in the tree, parameter) -> what is kept of it


@dataclass(frozen=True)
class Op:
    """How one tensor (of one layer) differs; both directions are views, so nothing is copied."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    vocab_axis: int | None = None  # the axis of ours that is padded beyond the vocabulary


SAME = Op(lambda x: x, lambda x: x)
TRANSPOSE = Op(lambda x: x.T, lambda x: x.T)
VOCAB = Op(lambda x: x, lambda x: x, vocab_axis=0)
VOCAB_TRANSPOSE = Op(lambda x: x.T, lambda x: x.T, vocab_axis=1)
SPLIT_QKV = Op(  # the last axis holds q, k and v one after another
    lambda x: x.reshape(*x.shape[:-1], 3, x.shape[-1] // 3),
    lambda x: x.reshape(*x.shape[:-2], -1),
)


@dataclass(frozen=True)
class Row:
    """Our path, their name, what lies between, and which configs have it."""

    ours: str
    theirs: str
    op: Op = SAME
    when: Callable[[Any], bool] = lambda config: True

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs

    def names(self, leaf: Any) -> list[str]:
        """Their tensors that make up our `leaf`."""
        return (
            [self.theirs.format(i) for i in range(leaf.shape[0])] if self.stacked else [self.theirs]
        )

    def cut(self, array: np.ndarray, vocab_size: int) -> np.ndarray:
        """One layer of ours as theirs, without the padding of the vocabulary."""
        if self.op.vocab_axis is not None:
            array = array[:vocab_size] if self.op.vocab_axis == 0 else array[:, :vocab_size]
        return self.op.to_theirs(array)


def pair_rows(tree: Any, rows: Sequence[Row]) -> list[tuple[Row, Any]]:
    """Every row with its leaf.

    Raises:
        WeightsError: a leaf without a row, or a row without a leaf: the table is wrong.
    """
    leaves = by_path(tree)
    ours = [row.ours for row in rows]
    if sorted(ours) != sorted(leaves):
        raise WeightsError(
            f"weight table: rows without a parameter: {sorted(set(ours) - set(leaves))}, "
            f"parameters without a row: {sorted(set(leaves) - set(ours))}. Mend HF_ROWS in the "
            "model's file"
        )
    return [(row, leaves[row.ours]) for row in rows]


def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors files by name, mapped into memory and not yet read.

    Raises:
        WeightsError: no weights, a damaged file, or an index that disagrees with the files.
        UnsafeInputError: an index that leads out of the folder.
    """
    index_file = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index_file.exists() and single.exists():
        raise WeightsError(
            f"{folder}: has both {single.name} and {index_file.name}; remove the old one"
        )
    if single.exists():
        return open_file(single)
    if not index_file.exists():
        found = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = (
            f"; {found[0]} is a pickle, which can run code and is not read: save the model once "
            "with transformers' save_pretrained, which writes safetensors"
            if found
            else "; to start from config.json alone, set model.init to random"
        )
        raise WeightsError(f"{folder}: no model.safetensors{hint}")
    try:
        weight_map = json.loads(index_file.read_text())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index_file}: cannot be read ({error}); download it again") from error
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(files):
        if Path(name).name != name:
            raise UnsafeInputError(f"{index_file}: names {name!r}, which is outside of the folder")
        shard = open_file(folder / name)
        if wrong := [t for t in shard if weight_map.get(t) != name]:
            raise WeightsError(
                f"{folder / name}: holds {wrong[0]}, which the index places elsewhere"
            )
        tensors |= shard
    if missing := sorted(set(weight_map) - set(tensors)):
        raise WeightsError(
            f"{index_file}: names {missing[0]}, which no file holds; download it again"
        )
    return tensors


def open_file(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file by name, mapped into memory and not yet read.

    Raises:
        WeightsError: it is damaged, or not there.
    """
    try:
        with safe_open(file, "numpy"):  # the library checks header, offsets and size
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"{file}: cannot be read ({error}); download it again") from error
    header.pop("__metadata__", None)
    raw = np.memmap(file, np.uint8, "r", offset=8 + length) if header else None
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            continue  # integers are masks and counters; one that is wanted will be missed by name
        start, stop = entry["data_offsets"]
        tensors[name] = raw[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


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
    """The tensors that `rows` names, checked against `tree` before any of them is read.

    Args:
        tensors: name -> array, as `open_folder` gives them.
        tree: our parameters' shapes.
        prefix: what names of old files may lack in front.
        ignored: patterns of names that are no weights of this model.
        renamed: ends of names in old files -> what they are now.
        optional: our paths of products that may be missing, whole.
        tied: the head is the token table, so a stored head must be the same.
        where: the folder, for messages.

    Raises:
        WeightsError: all that is missing, left over or of another shape, in one message.
    """
    expected, whole = {}, {}
    for row, leaf in pair_rows(tree, rows):
        layer = np.broadcast_to(np.float32(0), leaf.shape[1:] if row.stacked else leaf.shape)
        expected |= dict.fromkeys(row.names(leaf), row.cut(layer, vocab_size).shape)
        whole.setdefault(row.ours.rpartition("/")[0], []).extend(row.names(leaf))
    found = {}
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        full = name if name in expected or prefix + name not in expected else prefix + name
        if not any(re.search(pattern, prefix + name) for pattern in ignored):
            found[full] = tensor
    if tied and "lm_head.weight" in found and "lm_head.weight" not in expected:
        table = found.get(next(row.theirs for row in rows if row.op is VOCAB))
        head = found.pop("lm_head.weight")
        if table is not None and not np.array_equal(head, table):
            raise WeightsError(
                f"{where}: config.json ties the head to the embedding, but lm_head.weight differs "
                "from it; set tie_word_embeddings to false to keep both"
            )
    problems = []
    absent = [names for product, names in whole.items() if product in optional]
    may_miss = {name for names in absent if not found.keys() & set(names) for name in names}
    if missing := sorted(set(expected) - set(found) - may_miss):
        problems.append(f"missing {_some(missing)}")
    if extra := sorted(set(found) - set(expected)):
        problems.append(f"not known to this architecture {_some(extra)}")
    problems += [
        f"{name} has shape {list(found[name].shape)}, config.json wants {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ][:3]
    if problems:
        raise WeightsError(f"{where}: {'; '.join(problems)}. Is config.json of this model?")
    return found


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def from_hf(
    tensors: dict[str, np.ndarray],
    tree: Any,
    rows: Sequence[Row],
    drawn: Mapping[str, jax.Array] | None = None,
    each: Each | None = None,
) -> Any:
    """Our parameters in float32. Each device is given its slice, and only that is read.

    Args:
        tensors: as `match` gives them.
        tree: our parameters' shapes, dtypes and, where they have one, shardings.
        drawn: our path -> a parameter that is not read.
        each: what becomes of a parameter as soon as it is there.

    Raises:
        WeightsError: a tensor holds NaN or infinity.
    """
    rows_by_path = {row.ours: row for row, _ in pair_rows(tree, rows)}
    drawn = drawn or {}

    def load(path: tuple, leaf: Any) -> Any:
        row = rows_by_path[path_of(path)]
        watch.beat(f"reading {row.ours}")
        if row.ours in drawn:
            return each(path, drawn[row.ours]) if each else drawn[row.ours]
        layers = [(name, row.op.to_ours(tensors[name])) for name in row.names(leaf)]

        def read(index):
            spans = [slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
            if not row.stacked:
                return _read(*layers[0], spans)
            return np.stack([_read(name, view, spans[1:]) for name, view in layers[spans[0]]])

        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        array = jax.make_array_from_callback(leaf.shape, sharding, read)
        return array if each is None else each(path, array)

    return jax.tree_util.tree_map_with_path(load, tree)


def _read(name: str, view: np.ndarray, spans: list[slice]) -> np.ndarray:
    part = np.asarray(view[tuple(spans)], np.float32)
    if not np.isfinite(part).all():
        raise WeightsError(
            f"{name}: holds NaN or infinity; the file is damaged or the model diverged"
        )
    shape = [span.stop - span.start for span in spans]
    return np.pad(part, [(0, want - have) for want, have in zip(shape, part.shape, strict=True)])


def to_hf(
    params: Any, rows: Sequence[Row], *, vocab_size: int, dtypes: Callable[[str], np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, one at a time, rounded once to the dtype that `dtypes` gives for a name. All
    processes of a run must go through them.

    Raises:
        WeightsError: a value is not finite, or too large for the dtype.
    """
    for row, leaf in pair_rows(params, rows):
        for i, name in enumerate(row.names(leaf)):
            watch.beat(f"collecting {name}")
            layer = hosts.fetch(leaf[i] if row.stacked else leaf)
            with np.errstate(over="ignore"):
                tensor = np.ascontiguousarray(row.cut(layer, vocab_size)).astype(dtypes(name))
            if not np.isfinite(tensor.astype(np.float32)).all():
                raise WeightsError(
                    f"{name}: holds values beyond {dtypes(name).name}; choose --dtype float32"
                    if np.isfinite(layer).all()
                    else f"{name}: holds NaN or infinity; it is not exported"
                )
            yield name, tensor


def save_folder(
    tensors: Iterator[tuple[str, np.ndarray]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors to model.safetensors, or, if they are large, to several and an index."""
    parts: list[dict[str, int]] = []  # the names in each file, with their bytes
    part: dict[str, np.ndarray] = {}

    def write_part() -> None:
        file = folder / f"part-{len(parts)}"
        save_file(part, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes it readable for its owner alone
        parts.append({name: tensor.nbytes for name, tensor in part.items()})
        part.clear()

    for name, tensor in tensors:
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > shard_bytes:
            write_part()
        part[name] = tensor
    write_part()
    if len(parts) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(size for names in parts for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


class Fingerprint:
    """Of all bits of weights, whatever their sharding, gathered parameter by parameter."""

    def __init__(self):
        self.sums: dict[str, tuple[jax.Array, tuple[int, ...]]] = {}

    def add(self, path: tuple, leaf: jax.Array) -> None:
        self.sums[path_of(path)] = (_sums(leaf), leaf.shape)

    def digest(self) -> str:
        named = {
            path: (jax.device_get(s).tolist(), shape) for path, (s, shape) in self.sums.items()
        }
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """Two sums of words, times odd numbers that depend on their place."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    else:
        bits = leaf.astype(jnp.uint32)
    place = jnp.zeros_like(bits)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    odd = (place * jnp.uint32(0x9E3779B1)) | jnp.uint32(1)
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
    zero = jnp.uint32(0)
    sums = jax.lax.reduce(  # both in one pass: on CPU, a hundred times as fast as one by one
        (bits * odd, mixed * odd),
        (zero, zero),
        lambda x, y: (x[0] + y[0], x[1] + y[1]),
        tuple(range(bits.ndim)),
    )
    return jnp.stack(sums)


@jax.jit
def bit_sums(tree: Any) -> Any:
    """For each array of floats, integers or truth values (up to 32 bits), two uint32 [2] that any
    changed word changes. They are the same for every sharding."""
    return jax.tree.map(_sums, tree)


def fingerprint(params: Any) -> str:
    """Of all bits of weights that are there."""
    found = Fingerprint()
    jax.tree_util.tree_map_with_path(found.add, params)
    return found.digest()
