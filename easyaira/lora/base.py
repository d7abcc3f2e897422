"""The frozen base of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from easyaira.errors import WeightsError


class Base(NamedTuple):
    """Frozen weights as they are held, the head that a scorer starts from (else nothing), and the
    fingerprint of what the frozen weights were made from."""

    params: Any
    head: Any
    fingerprint: str


class Frozen(NamedTuple):
    """What a step with adapters takes as frozen: the base, and what the algorithm asked for, of
    which nothing that is the base's is there twice."""

    base: Any
    of_algorithm: Any


def check_base(record: Mapping[str, Any], fingerprint: str, where: str) -> None:
    """Refuse other weights than those that an adapter was trained on.

    Raises:
        WeightsError: they are others.
    """
    if record["base"]["fingerprint"] != fingerprint:
        raise WeightsError(
            f"{where}: its adapter was trained on other weights than {record['base']['name']} "
            "holds now; restore them"
        )
