"""Which checkpoints a run keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Kept:
    """Preservation policy for Orbax: keep the newest `keep` checkpoints, and the `best`."""

    def __init__(self, keep: int | None):
        self.keep = keep
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        first = len(checkpoints) - self.keep if self.keep else 0
        return [i >= first or c.step == self.best for i, c in enumerate(checkpoints)]
