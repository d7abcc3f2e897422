"""The frozen base of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from easyaira.errors import WeightsError


class Base(NamedTuple):
    """The frozen base of a run.

    Attributes:
        params: frozen weights in storage precision.
        start: initial values of parameters that are trained in full, of vectors of trained tokens
            and of magnitudes; None once nothing needs them.
        fingerprint: hash of the float32 weights that `params` was made from.
    """

    params: Any
    start: Any
    fingerprint: str


class Frozen(NamedTuple):
    """Frozen weights of a step with adapters: the base, plus the algorithm's frozen weights, which
    share arrays with the base."""

    base: Any
    of_algorithm: Any


def check_base(record: Mapping[str, Any], fingerprint: str, where: str) -> None:
    """Check that the base has not changed since the adapter was trained.

    Raises:
        WeightsError: the fingerprints differ.
    """
    if record["base"]["fingerprint"] != fingerprint:
        raise WeightsError(
            f"{where}: its adapter was trained on other weights than {record['base']['name']} "
            "holds now; restore the original weights"
        )
