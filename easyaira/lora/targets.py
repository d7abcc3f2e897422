"""Trained parameters: adapters of linear layers, and token tables, whole or a few rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from easyaira.config.model import LoraConfig
from easyaira.distributed.tree import by_path
from easyaira.errors import ConfigError
from easyaira.hf.table import Row
from easyaira.models.heads import LM_HEAD
from easyaira.models.model import Model

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head


def targets_of(names: list[str] | str, model: Model) -> tuple[Row, ...]:
    """Rows of the weight table whose kernels `lora.target_modules` names.

    Raises:
        ConfigError: a target module is not in the model, or only in some of its layers.
    """
    rows = linear_layers(model)
    without = [row for row in kernels(model) if row not in rows]
    if names == ALL_LINEAR:
        if without:
            raise ConfigError(
                f"lora.target_modules: with {ALL_LINEAR}, peft would also adapt router and "
                f"experts, which have no adapters here; name {_available(rows)}"
            )
        return tuple(rows)
    shapes = by_path(model.shapes)

    def fits(module: str, name: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(name, module) is not None
        return module == name or module.endswith(f".{name}")

    wanted = [names] if isinstance(names, str) else names
    matches: dict[str, list[Row]] = {name: [] for name in wanted}
    for row in rows:
        modules = _modules(row, shapes)
        for name in wanted:
            try:
                fitting = sum(fits(module, name) for module in modules)
            except re.error as error:
                raise ConfigError(f"lora.target_modules: {name!r}: {error}") from error
            if 0 < fitting < len(modules):
                raise ConfigError(
                    f"lora.target_modules: {name!r} matches {fitting} of {len(modules)} layers of "
                    f"{module_of(row)}; adapters on only some layers are not supported"
                )
            if fitting:
                matches[name].append(row)
    for row, name in product(without, wanted):
        if any(fits(module, name) for module in _modules(row, shapes)):
            raise ConfigError(
                f"lora.target_modules: {name!r} is a router or in the experts, which have no "
                f"adapters; choose from {_available(rows)}"
            )
    if missing := [name for name in wanted if not matches[name]] or (["[]"] if not wanted else []):
        listed = f"; write a list as [{missing[0]}]" if isinstance(names, str) else ""
        raise ConfigError(
            f"lora.target_modules: {missing[0]!r} is not a linear layer of this model's blocks; "
            f"choose from {_available(rows)}{listed}"
        )
    return tuple(row for row in rows if any(row in match for match in matches.values()))


def _modules(row: Row, shapes: Mapping[str, Any]) -> list[str]:
    """Hugging Face's names of a row's modules, by layer."""
    return [module_of(row).format(i) for i in range(shapes[row.ours].shape[0])]


def by_pattern(row: Row, option: str, pattern: Mapping[str, Any] | None, model: Model) -> Any:
    """The value of the first pattern that a row's modules match, as peft matches them; or None.

    Raises:
        ConfigError: the layers of the row differ, or a pattern is not a regular expression.
    """

    def key_of(module: str) -> str | None:
        matches = (key for key in pattern or () if re.match(rf"(.*\.)?({key})$", module))
        return next(matches, None)

    try:
        keys = {key_of(module) for module in _modules(row, by_path(model.shapes))}
    except re.error as error:
        raise ConfigError(f"lora.{option}: {error}") from error
    if len(keys) > 1:
        raise ConfigError(
            f"lora.{option}: {min(filter(None, keys))!r} matches only some layers of "
            f"{module_of(row)}; all its layers must have the same rank and scale"
        )
    return (pattern or {}).get(keys.pop())


def _available(rows: list[Row]) -> str:
    return ", ".join(sorted({module_of(row).rpartition(".")[2] for row in rows}))


def saved_of(names: list[str] | None, model: Model) -> tuple[Row, ...]:
    """Rows of the tables that `lora.modules_to_save` names.

    Raises:
        ConfigError: a name does not denote a table, or denotes a tied head.
    """
    tables = {table_name(row): row for row in token_tables(model)}
    for name in names or ():
        if name == LM_HEAD and tied(model):
            raise ConfigError(
                f"lora.modules_to_save: {LM_HEAD} is tied to the embedding in this model; name "
                f"{next(iter(tables))} instead, which trains both"
            )
        if name not in tables:
            raise ConfigError(
                f"lora.modules_to_save: {name!r} is not a table with a vector for each token, and "
                f"nothing else can be trained in full; choose from {', '.join(tables)}"
            )
    return tuple(row for name, row in tables.items() if name in (names or ()))


def tables_of(config: LoraConfig, model: Model) -> tuple[Row, ...]:
    """Rows of the tables with a few trained vectors: those that are not trained in full. Empty if
    no token is trained.

    Raises:
        ConfigError: an id is beyond the vocabulary, or see `saved_of`.
    """
    ids = config.trainable_token_indices or []
    if ids and max(ids) >= model.vocab_size:
        raise ConfigError(
            f"lora.trainable_token_indices: {max(ids)} is beyond the {model.vocab_size} tokens of "
            "the model"
        )
    saved = saved_of(config.modules_to_save, model)
    return tuple(row for row in token_tables(model) if ids and row not in saved)


def token_tables(model: Model) -> list[Row]:
    """Rows of the tables with a vector for each token: the embedding, and an untied head."""
    return [row for row in model.rows if row.op.vocab_axis is not None]


def tied(model: Model) -> bool:
    """Whether the language model head is the embedding."""
    return not model.scorer and model.config.tie_word_embeddings


def kernels(model: Model) -> list[Row]:
    """Rows of the kernels in the blocks; these are stacked."""
    return [row for row in model.rows if row.stacked and row.ours.endswith("/kernel")]


def linear_layers(model: Model) -> list[Row]:
    """Rows of the linear layers in the blocks."""
    return [row for row in kernels(model) if row.adaptable]


def module_of(row: Row) -> str:
    """Hugging Face's name of a linear layer, with {} for the block number; or of a table."""
    return row.theirs.removesuffix(".weight")


def table_name(row: Row) -> str:
    """Last part of Hugging Face's name of a table."""
    return module_of(row).rpartition(".")[2]


def rows_of(row: Row) -> str:
    """Path of the trained rows of a table."""
    return beside(row, "token_rows")


def beside(row: Row, name: str) -> str:
    """Path of a parameter in the same layer as that of `row`."""
    return f"{row.ours.rpartition('/')[0]}/{name}"
