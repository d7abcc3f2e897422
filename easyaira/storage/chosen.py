"""The checkpoint that a run is read from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyaira.distributed import hosts
from easyaira.storage.checkpoints import Checkpoints, peek

BEST = "best"  # in the window of a checkpoint's meta record


def chosen(folder: str | Path) -> int | None:
    """The finished step that a run is read from: the best if the run looks for one, else the
    newest; None if there is none. Every process must call this.

    Raises:
        ConfigError: see `Checkpoints`.
        StorageError: the folder cannot be listed.
    """
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    checkpoints.close()
    best = best_step(peek(folder)[1]) if hosts.first() and steps else None
    best = hosts.share(best)
    return best if best in steps else max(steps, default=None)


def best_step(meta: Mapping[str, Any]) -> int | None:
    """Step of the best checkpoint so far, from a meta record; None if the run looks for none."""
    window = meta.get("window")
    record = window.get(BEST) if isinstance(window, dict) else None
    return record.get("step") if isinstance(record, dict) else None
