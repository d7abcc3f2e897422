"""Verdicts on keys of other trainers: a table of keys holds one of four for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from easyaira.translation.recipe import Recipe


class Same(NamedTuple):
    """An option of ours with the same meaning and values."""

    option: str


class Computed(NamedTuple):
    """A fact by transformers' name, from which `recipe.py` computes options of ours."""

    fact: str


class NoEffect(NamedTuple):
    """A key that changes nothing here; the report says why."""

    why: str


class Unsupported(NamedTuple):
    """A key that would change what is learned, and cannot be translated.

    Attributes:
        why: ends the error.
        unless: values that mean the behaviour here, too.
        harmless: a list of any of these changes nothing.
    """

    why: str
    unless: tuple[Any, ...] = (None,)
    harmless: tuple[Any, ...] = ()


Verdict = Same | Computed | NoEffect | Unsupported
Table = Mapping[str, Verdict]


class Source(NamedTuple):
    """A trainer whose configurations are translated.

    Attributes:
        name: with the version whose keys the tables hold.
        tables: task -> key -> verdict.
        defaults: task -> values of keys that a file leaves out, where our default differs.
        differences: what differs on purpose in every translated run, task -> sentences.
        telling: key -> the task of a file that sets it, or value -> task.
        otherwise: the task of a file whose keys tell none.
        prepare: makes facts by transformers' names from the trainer's own.
    """

    name: str
    tables: Mapping[str, Table]
    defaults: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, tuple[str, ...]]
    telling: Mapping[str, Any]
    otherwise: str | None = None
    prepare: Callable[[Recipe], None] | None = None


def same(text: str) -> dict[str, Verdict]:
    """Lines `key option` as a table."""
    return {key: Same(option) for key, option in map(str.split, text.strip().splitlines())}


def computed(text: str) -> dict[str, Verdict]:
    """Words `key`, or `key=fact` where transformers calls it otherwise, as a table."""
    pairs = (word.partition("=") for word in text.split())
    return {key: Computed(fact or key) for key, _, fact in pairs}


def no_effect(why: str, keys: str) -> dict[str, Verdict]:
    return {key: NoEffect(why) for key in keys.split()}


def unsupported(
    why: str, keys: str, unless: Iterable[Any] = (None, False, 0, "")
) -> dict[str, Verdict]:
    return {key: Unsupported(why, tuple(unless)) for key in keys.split()}
