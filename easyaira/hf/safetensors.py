"""Safetensors files: lazy reads and sharded writes."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from easyaira.errors import UnsafeInputError, WeightsError
from easyaira.files import read_json
from easyaira.hf.lazy import loaded

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
ORDER = ["F64", "F32", "BF16", "F16"]  # of the tensors in a file, as the library writes them
SHARD_BYTES = 5 * 10**9
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
REPORT = "export_report.json"


RETRY = "; download it again"


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
        hint = "to start from config.json alone, set model.init to random"
        if other := other_format(path.name for path in folder.iterdir()):
            hint = (
                f"{other} is of another format, which is not read; convert the model to "
                "safetensors with transformers' save_pretrained"
            )
            if SHARD.fullmatch(other):
                hint = f"{other} is one of several files; download {index_file.name}, too"
        raise WeightsError(f"{folder}: no model.safetensors; {hint}")
    weight_map = _weight_map(index_file)
    files = set(weight_map.values())
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(files):
        if Path(name).name != name:
            raise UnsafeInputError(f"{index_file}: names {name!r}, which is outside the folder")
        shard = _open(folder / name)
        if wrong := [t for t in _weights(shard) if weight_map.get(t) != name]:
            raise WeightsError(
                f"{folder / name}: holds {wrong[0]}, which the index assigns to another file{RETRY}"
            )
        tensors |= shard
    if missing := sorted(set(weight_map) - set(tensors)):
        raise WeightsError(f"{index_file}: names {missing[0]}, which is in no file{RETRY}")
    return _weights(tensors)


def _weight_map(index_file: Path) -> dict[str, str]:
    weight_map = read_json(index_file, error=WeightsError, hint=RETRY).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise WeightsError(f"{index_file}: weight_map must map tensors to files{RETRY}")
    return weight_map


def weight_files(folder: Path) -> set[str]:
    """Names of the files that `open_folder` reads."""
    index_file = folder / "model.safetensors.index.json"
    if not index_file.exists():
        return {"model.safetensors"}
    return set(_weight_map(index_file).values())


# pickles could run code; the others need libraries of their own
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors")


def other_format(names: Iterable[str]) -> str | None:
    """The first file that seems to hold weights, but is not read, if there is one."""
    return next((name for name in sorted(names) if name.endswith(OTHER_FORMATS)), None)


def open_file(file: Path) -> dict[str, np.ndarray]:
    """Memory-map every tensor of a safetensors file, by name; reads happen on access.

    Raises:
        WeightsError: the file is damaged or missing, or a weight is stored in another dtype than
            those of DTYPES.
    """
    return _weights(_open(file))


def _weights(tensors: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """Without integers, which are masks and counters."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _open(file: Path) -> dict[str, np.ndarray | None]:
    """`open_file`, with None for integers."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("not a regular file")
        with safe_open(file, "numpy"):  # the library checks header, offsets and size
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"{file}: cannot be read ({error}); download it again") from error
    header.pop("__metadata__", None)
    raw = np.memmap(str(file), np.uint8, "r", offset=8 + length) if header else None
    tensors: dict[str, np.ndarray | None] = {}
    for name, entry in header.items():
        known = entry["dtype"] in DTYPES
        if not known and (entry["dtype"].startswith("F") or name.endswith("weight")):
            raise WeightsError(
                f"{file}: {name} is stored as {entry['dtype']}, which is not read; save the "
                "model in float32, bfloat16 or float16"
            )
        if not known:
            tensors[name] = None
            continue
        start, stop = entry["data_offsets"]
        tensors[name] = raw[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def release(tensor: np.ndarray) -> None:
    """Free the pages of a memory-mapped file that count as this process's memory; a later access
    reads them again."""
    mapped = getattr(tensor, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def tensor_hash(tensor: np.ndarray) -> str:
    """SHA-256 of the bytes of a tensor."""
    digest = hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).hexdigest()
    release(tensor)
    return digest


def check_exported(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Compare tensors with the hashes that an export wrote beside them, if it did.

    Raises:
        WeightsError: a tensor has other values than were exported.
    """
    file = folder / REPORT
    if not file.exists():
        return
    entries = read_json(file, error=WeightsError, hint="; remove it, or get the original").get(
        "tensors"
    )
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise WeightsError(f"{file}: holds no hashes of tensors; remove it, or get the original")
    for name, entry in entries.items():
        if name in tensors and tensor_hash(tensors[name]) != entry.get("sha256"):
            raise WeightsError(
                f"{folder}: {name} has other values than were exported; get the original files, or "
                f"remove {REPORT} if the change is meant"
            )


def save_folder(
    tensors: Iterable[tuple[str, Any]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors to model.safetensors, or above `shard_bytes` to several files and an index.

    Args:
        tensors: names with arrays, or with `Lazy` ones, which are read one at a time.
    """
    parts: list[dict[str, Any]] = [{}]
    for name, tensor in tensors:
        if parts[-1] and _bytes(parts[-1]) + tensor.nbytes > shard_bytes:
            parts.append({})
        parts[-1][name] = tensor
    if len(parts) == 1:
        save_file(parts[0], folder / "model.safetensors")
        return
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(map(_bytes, parts))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _bytes(tensors: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def save_file(tensors: Mapping[str, Any], file: Path) -> None:
    """Write the same bytes as safetensors' function of this name, which holds all tensors at once.

    Args:
        tensors: arrays, or `Lazy` ones, which are read one at a time.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (ORDER.index(kinds[tensors[name].dtype]), name)):
        start, end = end, end + tensors[name].nbytes
        kind, shape = kinds[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(np.ascontiguousarray(loaded(tensor)).reshape(-1).view(np.uint8).data)
