"""EasyLM's checkpoints: a stream of msgpack pairs, each of a key and an array that Flax serialised.

Only headers are read; every length is checked against the bytes that are left before it is used,
and arrays are memory-mapped."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from easyaira.errors import WeightsError, shortened
from easyaira.files import reason
from easyaira.hf.safetensors import DTYPES

# For each kind of value: first byte -> the length that it contains (of a number: the number), and
# first byte -> size of the length after it. https://github.com/msgpack/msgpack/blob/master/spec.md
KINDS: dict[str, tuple[dict[int, int], dict[int, int]]] = {
    "a number": ({i: i for i in range(0x80)}, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}),
    "a text": ({0xA0 + i: i for i in range(32)}, {0xD9: 1, 0xDA: 2, 0xDB: 4}),
    "bytes": ({}, {0xC4: 1, 0xC5: 2, 0xC6: 4}),
    "a list": ({0x90 + i: i for i in range(16)}, {0xDC: 2, 0xDD: 4}),
    "a map": ({0x80 + i: i for i in range(16)}, {0xDE: 2, 0xDF: 4}),
    "an array": ({0xD4 + i: 2**i for i in range(5)}, {0xC7: 1, 0xC8: 2, 0xC9: 4}),
    "true": ({0xC3: 1}, {}),
}
NDARRAY = 1  # Flax's number for arrays among msgpack's extensions
CHUNKED = "__msgpack_chunked_array__"  # Flax's mark of an array above 1 GiB
LONGEST_TEXT, MOST_PARTS, MOST_AXES, MOST_RECORDS = 256, 16, 8, 100_000
FLOATS = {dtype.name: dtype for dtype in DTYPES.values() if dtype.itemsize < 8}
WRAPPER = "params"  # stands once or twice before the keys of a train state
NOT_WEIGHTS = ("step", "opt_state")


class Broken(ValueError):
    """The reason why a stream cannot be read."""


class _Reader:
    """Bytes `at` to `end` of a file, read from the front."""

    def __init__(self, raw: np.ndarray, at: int, end: int):
        self.raw, self.at, self.end = raw, at, end

    def take(self, count: int) -> _Reader:
        """The next `count` bytes."""
        if count > self.end - self.at:
            raise Broken(f"byte {self.at}: {count} bytes must follow, {self.end - self.at} do")
        self.at += count
        return _Reader(self.raw, self.at - count, self.at)

    def bytes(self) -> bytes:
        return self.raw[self.at : self.end].tobytes()

    def is_next(self, kind: str) -> bool:
        first, (fixed, sized) = int(self.raw[self.at]), KINDS[kind]
        return first in fixed or first in sized

    def length(self, kind: str, most: int | None = None) -> int:
        """The length in the next header, which must be of a `kind`."""
        at, (fixed, sized) = self.at, KINDS[kind]
        first = self.take(1).bytes()[0]
        if first not in fixed and first not in sized:
            raise Broken(f"byte {at}: expected {kind}, found {first:#04x}")
        count = fixed.get(first)
        if count is None:
            count = int.from_bytes(self.take(sized[first]).bytes(), "big")
        if most is not None and count > most:
            raise Broken(f"byte {at}: {kind} of length {count}; at most {most} is sound")
        return count

    def text(self) -> str:
        at = self.at
        try:
            return self.take(self.length("a text", LONGEST_TEXT)).bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise Broken(f"byte {at}: a text that is not UTF-8") from error

    def expect(self, *words: str) -> None:
        for word in words:
            at, text = self.at, self.text()
            if text != word:
                raise Broken(f"byte {at}: expected {word}, found {text!r:.80}")

    def array(self) -> np.ndarray:
        """An array as Flax serialises it: shape, name of the dtype, bytes."""
        at, count = self.at, self.length("an array")
        kind = self.take(1).bytes()[0]
        inner = self.take(count)
        if kind != NDARRAY or inner.length("a list") != 3:
            raise Broken(f"byte {at}: is not an array of Flax")
        axes = inner.length("a list", MOST_AXES)
        shape = tuple(inner.length("a number") for _ in range(axes))
        name = inner.text()
        if name not in FLOATS:
            raise Broken(f"byte {at}: an array of {name!r:.80}; only {', '.join(FLOATS)} are read")
        data = inner.take(inner.length("bytes"))
        _same_size(at, shape, FLOATS[name].itemsize, data.end - data.at)
        return self.raw[data.at : data.end].view(FLOATS[name]).reshape(shape)

    def chunked(self) -> np.ndarray:
        """An array above 1 GiB, which Flax cuts into chunks; in memory."""
        at = self.at
        self.length("a map", 3)
        self.expect(CHUNKED)
        self.length("true")
        self.expect("shape")
        shape = []
        for axis in range(self.length("a map", MOST_AXES)):
            self.expect(str(axis))
            shape.append(self.length("a number"))
        self.expect("chunks")
        chunks = []
        for chunk in range(self.length("a map", MOST_RECORDS)):
            self.expect(str(chunk))
            chunks.append(self.array().reshape(-1))
        if len({chunk.dtype for chunk in chunks}) != 1:
            raise Broken(f"byte {at}: its chunks are not of one dtype")
        itemsize = chunks[0].dtype.itemsize
        _same_size(at, tuple(shape), itemsize, sum(chunk.nbytes for chunk in chunks))
        return np.concatenate(chunks).reshape(shape)


def _same_size(at: int, shape: tuple[int, ...], itemsize: int, stored: int) -> None:
    wanted = math.prod(shape) * itemsize
    if wanted != stored:
        sizes = shortened(str(list(shape)))
        raise Broken(f"byte {at}: shape {sizes} needs {wanted} bytes, {stored} are stored")


def open_stream(place: str) -> dict[str, np.ndarray]:
    """Memory-map every weight of a checkpoint of EasyLM's StreamingCheckpointer, by its key.

    Args:
        place: file streaming_params, or streaming_train_state, whose other arrays are ignored;
            plain, or in EasyLM's notation (params::FILE).

    Returns:
        Arrays by key, whose parts are joined by `/`, without the `params` before them.

    Raises:
        WeightsError: the file is missing, cut or damaged, or holds something else.
    """
    kind, _, path = place.rpartition("::")
    file, arrays = Path(path), {}
    if kind not in ("", "params", "trainstate_params", "trainstate") or "://" in path:
        raise WeightsError(
            f"{place}: expected a local file of EasyLM's StreamingCheckpointer; copy it here, or "
            "save it as streaming_params"
        )
    try:
        if file.exists() and not file.is_file():
            raise Broken("not a regular file")
        if file.exists() and not file.stat().st_size:
            raise Broken("is empty")
        raw = np.memmap(str(file), np.uint8, "r")
        stream = _Reader(raw, 0, len(raw))
        while stream.at < stream.end:
            at = stream.at
            if stream.length("a list") != 2:
                raise Broken(f"byte {at}: expected a pair of key and array")
            parts = [stream.text() for _ in range(stream.length("a list", MOST_PARTS))]
            value = stream.take(stream.length("bytes"))
            if parts and parts[0] in NOT_WEIGHTS:
                continue
            while parts and parts[0] == WRAPPER:
                del parts[0]
            key = "/".join(parts)
            if len(key) > LONGEST_TEXT or len(arrays) == MOST_RECORDS:
                raise Broken(f"byte {at}: a longer key, or more of them, than a model has")
            if key in arrays:
                raise Broken(f"byte {at}: {key} occurs twice")
            if value.at == value.end:
                raise Broken(f"byte {at}: {key} has no array")
            arrays[key] = value.chunked() if value.is_next("a map") else value.array()
            if value.at != value.end:
                raise Broken(f"byte {value.at}: bytes follow the array of {key}")
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{file}: cannot be read as EasyLM's stream: {reason(error)}; name the file of "
            "StreamingCheckpointer (streaming_params), and copy it again if it is damaged"
        ) from error
    return arrays
