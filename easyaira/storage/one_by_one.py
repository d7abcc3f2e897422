"""`Lazy` arrays in Orbax's checkpoints: written piece by piece, read array by array."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from easyaira.hf.lazy import Lazy


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of NumPy's arrays, which writes `Lazy` ones; a piece is a chunk."""

    async def _open_and_write(self, value: Lazy, tspec: dict[str, Any], ts_context: Any) -> None:
        store, start, writing = None, 0, None
        for piece in value.pieces():  # blocks its thread, so that one array is written at a time
            if store is None:
                array = tspec.get("base", tspec)  # inside a cast to the dtype that is kept
                array["metadata"]["chunks"] = [len(piece), *value.shape[1:]]
                spec = tensorstore.Spec(tspec)
                store = tensorstore.open(spec, create=True, open=True, context=ts_context).result()
            if writing is not None:
                writing.result()
            rows = store[start : start + len(piece)]
            writing = rows.write(piece, can_reference_source_data_indefinitely=True)
            start += len(piece)
        writing.result()


def register() -> None:
    """Have Orbax save `Lazy` arrays."""
    handler = _Handler(deepcopy_host_arrays=False)
    ocp.type_handlers.register_type_handler(Lazy, handler, override=True)


def save_args(tree: Any) -> Any:
    """Orbax's arguments to save a tree, whose arrays may be `Lazy`."""
    if not any(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(tree)):
        return ocp.args.StandardSave(tree)
    kept = jax.tree.map(lambda leaf: ocp.SaveArgs(dtype=getattr(leaf, "kept", None)), tree)
    return ocp.args.PyTreeSave(tree, save_args=kept)


def restore_args(tree: Any) -> Any:
    """Orbax's arguments to restore only the arrays in `tree`."""
    args = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(tree, restore_args=args, partial_restore=True)
