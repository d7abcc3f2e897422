"""A configuration of another trainer as one of ours, with a report."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import yaml

from easyaira.errors import ConfigError, did_you_mean, escaped, shortened
from easyaira.translation import ends, kinds, recipe, rows
from easyaira.translation.recipe import Recipe
from easyaira.translation.verdicts import Computed, NoEffect, Same, Source, Unsupported

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # which YAML 1.1 reads as text
GROUPS = "model data sft dpo reward lora optimizer".split()  # written first, in this order


class Translation(NamedTuple):
    """A translated configuration.

    Attributes:
        task: the command: sft, dpo or reward.
        options: our options, nested.
        differences: what differs on purpose.
        no_effect: key -> why it changes nothing.
        dropped: keys that were left out as asked.
    """

    task: str
    options: dict[str, Any]
    differences: list[str]
    no_effect: dict[str, str]
    dropped: list[str]

    def text(self, origin: str) -> str:
        """YAML, with the report below it as comments."""
        lines = [f"# {origin}, for: easyaira {self.task} --config THIS_FILE"]
        body = yaml.safe_dump(self.options, sort_keys=False, allow_unicode=True, width=100)
        lines += [body.rstrip(), "", "# Different on purpose:"]
        lines += [f"# - {text}" for text in self.differences]
        if self.no_effect:
            lines.append("# Without effect here:")
            whys = dict.fromkeys(self.no_effect.values())
            for why in whys:
                keys = [key for key, other in self.no_effect.items() if other == why]
                lines.append(f"# - {', '.join(keys)}: {why}")
        if self.dropped:
            lines.append(f"# Left out by --drop: {', '.join(self.dropped)}")
        return "\n".join(line if line == body.rstrip() else escaped(line) for line in lines) + "\n"


def task_of(source: Source, given: Mapping[str, Any], asked: str | None, place: str) -> str:
    """The task that is asked for, or that the keys tell.

    Raises:
        ConfigError: the keys tell none, or several, or the trainer has no such task.
    """
    by_keys = set()
    for key in source.telling.keys() & given.keys():
        task = source.telling[key]
        value = given[key] if isinstance(given[key], str | bool) else None
        by_keys.add(task.get(value) if isinstance(task, dict) else task)
    tasks = {asked} if asked else by_keys - {None} or {source.otherwise}
    if len(tasks) != 1 or not tasks <= source.tables.keys():
        choices = ", ".join(source.tables)
        raise ConfigError(f"{place}: its keys do not tell the task; add --task, one of {choices}")
    return tasks.pop()


def translate(
    source: Source,
    given: Mapping[str, Any],
    *,
    place: str,
    task: str | None = None,
    devices: int = 1,
    drop: Collection[str] = (),
) -> Translation:
    """Translate the keys `given` of the file `place`.

    Args:
        devices: number of devices that the file was run on.
        drop: keys to leave out.

    Raises:
        ConfigError: an unknown key, or keys without a translation, all of them named.
    """
    for key in drop:
        if key not in given:
            raise ConfigError(f"--drop {key}: {place} has no such key" + did_you_mean(key, given))
    given = {key: _number(value) for key, value in given.items() if key not in drop}
    task = task_of(source, given, task, place)
    table = source.tables[task]
    for key in given:
        if key not in table:
            others = [t for t, keys in source.tables.items() if key in keys]
            hint = f"; it belongs to {others[0]} (--task)" if others else did_you_mean(key, table)
            raise ConfigError(
                f"{place}: {key}: {source.name}'s {task} has no such key{hint}; --drop {key} to go "
                "on"
            )
    run = Recipe(task, devices)
    for key, value in (source.defaults[task] | given).items():
        match table[key]:
            case Same(option) if value is not None:
                run.options[option] = _fitting(option, value, f"{place}: {key}")
            case Computed(fact):
                value = _fitting(fact, value, f"{place}: {key}")
                run.facts[fact], run.keys[fact] = value, key
            case Unsupported(why, unless, harmless) if value not in unless:
                if harmless and isinstance(value, list) and all(x in harmless for x in value):
                    run.no_effect[key] = "says how PyTorch computes or logs, and not what"
                else:
                    run.refused[key] = why
            case NoEffect(why) if key in given:
                run.no_effect[key] = why
    if source.prepare:
        source.prepare(run)
    for step in (*recipe.STEPS, rows.data, ends.end_token):
        step(run)
    if run.refused:
        reasons = ", ".join(f"{key} ({why})" for key, why in run.refused.items())
        raise ConfigError(f"{place}: not supported: {reasons}; --drop KEY leaves a key out")
    return Translation(
        task, _nested(run.options), [*run.notes, *source.differences[task]], run.no_effect, [*drop]
    )


def _fitting(name: str, value: Any, where: str) -> Any:
    try:
        return kinds.fitting(name, value)
    except ValueError as error:
        raise ConfigError(f"{where}: {shortened(str(error))}") from error


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as groups, in a fixed order."""
    nested: dict[str, Any] = {group: {} for group in GROUPS}
    for name, value in options.items():
        group, _, leaf = name.rpartition(".")
        (nested[group] if group else nested)[leaf] = value
    return {name: value for name, value in nested.items() if value != {}}
