"""Checkpoints: everything that a run needs to continue, on any mesh. The only user of Orbax.

A checkpoint holds the items `params`, `opt_state`, `data` (the position in the data) and `meta`
(what kind of model this is, and the metrics that were under way). Saving goes on in the background;
an error of it is raised by the next save or by `close`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from easyaira.errors import StorageError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at INFO


class Checkpoints:
    """The checkpoints of a folder.

    Args:
        folder: where a folder per step lies.
        keep: how many are kept; None keeps all.
        write: this process saves here, so what an interrupted save left behind is removed.
    """

    def __init__(self, folder: Path, keep: int | None = None, *, write: bool = False):
        self.folder = folder.absolute()
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=write, cleanup_tmp_directories=write
            ),
        )

    def latest(self) -> int | None:
        """The newest finished step."""
        return self.manager.latest_step()

    def save(self, step: int, params: Any, opt_state: Any, data: dict, meta: dict) -> None:
        """Start saving; the arrays may be given away as soon as this returns.

        Raises:
            StorageError: this save cannot start, or the one before it failed.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta),
        )
        try:
            saved = self.manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax passes on whatever the file system raises
            raise self._failed("save", step, error) from error
        if not saved:
            raise StorageError(f"{self.folder}/{step}: not saved; a newer step is there already")

    def save_params(self, step: int, params: Any, meta: dict) -> None:
        """Save weights alone, as a converted model has no more."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)
        )
        try:
            self.manager.save(step, args=items)
        except Exception as error:
            raise self._failed("save", step, error) from error

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any, dict, dict]:
        """(params, opt_state, data, meta) as `params` and `opt_state` describe them: shapes, dtypes
        and the shardings of the mesh that is there now."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        found = self._restore(step, items)
        return found.params, found.opt_state, found.data, found.meta

    def restore_params(self, step: int, params: Any) -> Any:
        items = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        return self._restore(step, items).params

    def meta(self, step: int) -> dict:
        return self._restore(step, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def _restore(self, step: int, items: Any) -> Any:
        try:
            return self.manager.restore(step, args=items)
        except Exception as error:
            raise self._failed("restored", step, error) from error

    def _failed(self, verb: str, step: int, error: Exception) -> StorageError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        others = [s for s in self.manager.all_steps() if s != step]
        rest = f"; finished steps: {others}" if others else ""
        return StorageError(f"{self.folder}/{step}: cannot be {verb}: {reason}{rest}")

    def wait(self) -> None:
        """Until the save under way is finished.

        Raises:
            StorageError: it failed.
        """
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed("saved", self.latest() or 0, error) from error

    def close(self) -> None:
        self.wait()
        self.manager.close()


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays, to restore others like them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
