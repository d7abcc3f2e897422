"""Damages to a file, as a disk, a crash or a person makes them."""

from pathlib import Path


def flip(path: Path, share: float = 0.5, bit: int = 2) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = {"flip": flip, "cut": cut, "zero": zero, "empty": empty, "delete": Path.unlink}
