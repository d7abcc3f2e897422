"""The base of adapters, resized to the vocabulary that they were trained with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from easyaira.distributed.tree import by_path, path_of
from easyaira.hf import transfer
from easyaira.lora.adapter import Adapter
from easyaira.lora.base import check_base
from easyaira.models.model import Model, resized_leaf, with_vocabulary
from easyaira.models.registry import model_of
from easyaira.storage.integrity import Fingerprint

if TYPE_CHECKING:
    from easyaira.storage.pretrained import Pretrained


def load_base(
    run: Pretrained,
    adapter: Adapter,
    mesh: Any,
    each: transfer.Each = lambda path, leaf: leaf,
) -> Any:
    """Load the float32 base of a run's adapters. A missing score head and the vectors of new tokens
    are initialised; the adapter's own replace them.

    Args:
        each: applied to each parameter as soon as it is read.

    Raises:
        WeightsError: see `Pretrained.load`; or the base has changed since the adapters were
            trained.
    """
    params, fingerprint = load_fingerprinted(run.base, adapter.model, mesh, each=each)
    check_base(run.adapter, fingerprint, run.name)
    return params


def load_fingerprinted(
    origin: Pretrained, model: Model, mesh: Any, **options: Any
) -> tuple[Any, str]:
    """`load_resized`, and the fingerprint of the stored parameters, except for those of the score
    head, which may have been initialised."""
    fingerprint, heads = Fingerprint(), {row.ours for row in model.score_rows}

    def stored(path: tuple, leaf: jax.Array) -> None:
        if path_of(path) not in heads:
            fingerprint.add(path, leaf)

    params = load_resized(origin, model, mesh, stored=stored, **options)
    return params, fingerprint.digest()


def load_resized(
    origin: Pretrained,
    model: Model,
    mesh: Any,
    *,
    key: jax.Array | None = None,
    how: str = "mean",
    stored: Callable[[tuple, jax.Array], None] = lambda path, leaf: None,
    each: transfer.Each = lambda path, leaf: leaf,
) -> Any:
    """Load float32 parameters and resize them to the vocabulary of `model`, one at a time.

    Args:
        key, how: initialise what is not stored: the score head, and new rows, see `model.resize`.
        stored: called with each parameter as it is stored.
        each: applied to each parameter after that.

    Raises: see `Pretrained.load`.
    """
    key = jax.random.key(0) if key is None else key
    before, targets = as_stored(origin, model), by_path(model.target(mesh))
    grows = before.vocab_size != model.vocab_size
    tables = {row.ours for row in model.rows if grows and row.op.vocab_axis is not None}

    def convert(path: tuple, leaf: jax.Array) -> Any:
        stored(path, leaf)
        if path_of(path) in tables:
            new = targets[path_of(path)]
            resized = partial(resized_leaf, before, model, how, key, path, new=new)
            leaf = jax.jit(resized, out_shardings=new.sharding)(leaf)
        return each(path, leaf)

    return origin.load(before, mesh, head_key=key, each=convert)


def as_stored(origin: Pretrained, model: Model) -> Model:
    """`model` with the vocabulary of the stored weights, to which adapters may have added."""
    return with_vocabulary(model, model_of(origin.config, origin.where).vocab_size)
