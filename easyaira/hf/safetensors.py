"""Safetensors files: lazy reads and sharded writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easyaira.errors import UnsafeInputError, WeightsError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
SHARD_BYTES = 5 * 10**9


def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """Memory-map every tensor of a folder's safetensors files, by name; reads happen on access.

    Raises:
        WeightsError: there are no weights, a file is damaged, or the index and files disagree.
        UnsafeInputError: the index names a file outside the folder.
    """
    index_file = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index_file.exists() and single.exists():
        raise WeightsError(
            f"{folder}: has both {single.name} and {index_file.name}; remove the outdated one"
        )
    if single.exists():
        return open_file(single)
    if not index_file.exists():
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = (
            f"; {pickles[0]} is a pickle, which could run code, so it is not read; "
            "convert the model to safetensors with transformers' save_pretrained"
            if pickles
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
            raise UnsafeInputError(f"{index_file}: names {name!r}, which is outside the folder")
        shard = open_file(folder / name)
        if wrong := [t for t in shard if weight_map.get(t) != name]:
            raise WeightsError(
                f"{folder / name}: holds {wrong[0]}, which the index assigns to another file"
            )
        tensors |= shard
    if missing := sorted(set(weight_map) - set(tensors)):
        raise WeightsError(
            f"{index_file}: names {missing[0]}, which is in no file; download it again"
        )
    return tensors


def open_file(file: Path) -> dict[str, np.ndarray]:
    """Memory-map every tensor of a safetensors file, by name; reads happen on access.

    Raises:
        WeightsError: the file is damaged or missing.
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
            continue  # integers are masks and counters; `match` reports a missing weight by name
        start, stop = entry["data_offsets"]
        tensors[name] = raw[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def save_folder(
    tensors: Iterator[tuple[str, np.ndarray]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors to model.safetensors, or above `shard_bytes` to several files and an index."""
    parts: list[dict[str, int]] = []  # names and bytes of the tensors in each file
    part: dict[str, np.ndarray] = {}

    def write_part() -> None:
        file = folder / f"part-{len(parts)}"
        save_file(part, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes it readable only by its owner
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
