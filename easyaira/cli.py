"""Command lines: parse files and flags to a configuration; print an error as one line and exit."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jsonargparse
from jsonargparse import ActionConfigFile, ArgumentParser

from easyaira import torchless
from easyaira.allocator import keep_memory
from easyaira.config.data import Source
from easyaira.config.model import LoraConfig
from easyaira.config.ranges import bytes_of
from easyaira.config.run import PROVENANCE, DryRun
from easyaira.distributed import signals
from easyaira.distributed.compiler import keep_order
from easyaira.errors import ConfigError, EasyAiraError, Preempted, StorageError, one_line, shortened
from easyaira.files import parse_yaml, read_yaml, reason, yaml_line
from easyaira.option_errors import SOURCES, no_group, no_such_option, options_of, reworded, type_of
from easyaira.short_help import USAGE, HelpAll, Parser

# options that configurations in Python cannot have
FOR_COMMANDS = ("dry_run", "topology", "search", "memory", "debug")
LISTED = r"\s*\[\s*\{"  # how a list of sources begins; other brackets are patterns of files

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@cache
def parser_of(config_class: type) -> ArgumentParser:
    """Parser of a training command: a flag for every option, and --config files of options."""
    parser = Parser(
        usage=USAGE,
        description=f"{config_class.__doc__} Options come from --config files (later ones win), "
        "then from flags, such as --data.max_length 512.",
    )
    parser.add_argument(
        "--config", action=ConfigFile, help="YAML file of options; may be repeated."
    )
    parser.add_argument("--help_all", action=HelpAll)
    debug_option(parser)
    dry_run_options(parser, "Print the plan and the cost of a step; train nothing.")
    parser.add_argument(
        "--memory",
        metavar="12GiB",
        help="Dry run for a GPU with this much memory: whether it suffices, and what would.",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="Dry run that searches for the fastest mesh, gradient_accumulation_steps and "
        "model.gradient_checkpointing that fit.",
    )
    parser.add_argument(f"--{PROVENANCE}", type=dict, help=SUPPRESS)
    parser.add_class_arguments(config_class, None)
    return parser


def debug_option(parser: ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="Show an error's traceback.")


def dry_run_options(parser: ArgumentParser, what: str) -> None:
    """Add --dry_run, which does `what`, and --topology."""
    parser.add_argument("--dry_run", action="store_true", help=what)
    parser.add_argument(
        "--topology",
        metavar="v5p:4x4x2",
        help="Dry run for devices that you do not have (yet). GPUs: rtx3060, h100:8. A TPU pod: "
        "v3, v4, v5e, v5p or v6e and the chips on each side; needs libtpu.",
    )


def computing_options(parser: ArgumentParser) -> None:
    """Add the options of commands that use a model without training it."""
    add = parser.add_argument
    add(
        "--dtype",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="Precision to compute in.",
    )
    add("--mesh", default="fsdp=-1", help="Devices, as for training.")
    debug_option(parser)


class ConfigFile(ActionConfigFile):
    """Checks a --config file before jsonargparse reads it, and names the file in each error."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        values = os.path.expanduser(values)
        content = read_yaml(Path(values))
        try:
            _check_names(content, parser)
            super().__call__(parser, cfg, values, option_string)
        except (ArgumentError, TypeError, ValueError, ConfigError) as error:
            problem = str(error)
            if not isinstance(error, ConfigError):
                problem = reworded(problem, parser)
            line = yaml_line(Path(values), re.findall(r"\w+", problem.partition(":")[0]))
            raise ConfigError(f"{values}{f':{line}' if line else ''}: {problem}") from error


def _check_names(content: Any, parser: Any, group: str = "") -> None:
    """Refuse unknown options in a mapping, and groups of options that are no mapping."""
    options = options_of(parser)
    groups = {option.rpartition(".")[0] for option in options}
    for key, value in content.items():
        name = f"{group}{key}"
        if name in ("config", "print_config"):
            raise ConfigError(f"{name}: is for the command line; give it there as --{name}")
        if beside := [other for other in content if f"{key}".startswith(f"{other}.")]:
            raise ConfigError(f"{name}: write it inside {group}{beside[0]}, which is there, too")
        if name in options:
            _check_null(name, value, type_of(parser, name))
        if name in SOURCES:
            _check_sources(name, value)
        elif name == "lora" and isinstance(value, dict):
            hints = {f"lora.{key}": hint for key, hint in get_type_hints(LoraConfig).items()}
            for key, inner in value.items():
                if f"lora.{key}" not in hints:
                    raise ConfigError(no_such_option(f"lora.{key}", list(hints)))
                _check_null(f"lora.{key}", inner, hints[f"lora.{key}"])
        elif name in groups:
            if not isinstance(value, dict):
                given = "nothing" if value is None else shortened(repr(value))
                raise ConfigError(no_group(name, given))
            _check_names(value, parser, f"{name}.")
        elif name not in options and name != PROVENANCE:
            raise ConfigError(no_such_option(name, options))
        elif isinstance(value, dict) and name != PROVENANCE:
            for part, inner in value.items():
                if isinstance(inner, dict):
                    raise ConfigError(f"{name}.{part}: expected one value, got {inner!r:.80}")


def _check_null(name: str, value: Any, hint: Any) -> None:
    """Refuse null where the type excludes it; jsonargparse accepts null for every type."""
    if value is None and hint is not type(None) and type(None) not in get_args(hint):
        raise ConfigError(
            f"{name}: expected a value, got null; give it one, or leave it out for its default"
        )


def _check_sources(name: str, value: Any) -> None:
    """Refuse wrong entries of a list of sources. jsonargparse takes a wrong list on the command
    line for the name of a file, and drops an unknown option without a value."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Source, None)
    for number, entry in enumerate(value if isinstance(value, list) else ()):
        place = f"{name}[{number}]"
        if not isinstance(entry, dict):
            fix = f"; write {{path: {entry}}}" if isinstance(entry, str) else ""
            raise ConfigError(
                f"{place}: expected options such as {{path: FILE}}, got "
                f"{shortened(repr(entry))}{shortened(fix)}"
            )
        if "path" not in entry and entry.keys() <= {f.name for f in fields(Source)}:
            raise ConfigError(f"{place}.path: each entry needs it")
        try:
            _check_names(entry, parser)
            parser.parse_object(entry)
        except ConfigError as error:
            raise ConfigError(f"{place}.{error}") from error
        except (ArgumentError, TypeError, ValueError) as error:
            raise ConfigError(f"{place}.{reworded(str(error), parser)}") from error


def _expanded(argv: list[str], parser: ArgumentParser) -> list[str]:
    """Check maps and lists on the command line; rewrite a map of options as one flag for each."""
    options = options_of(parser)
    groups = {option.rpartition(".")[0] for option in options} - {""}
    left, expanded = list(argv), []
    while left:
        flag, given, value = left.pop(0).partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in groups and name not in options:
            expanded.append(f"{flag}{given}{value}")
            continue
        if not given and left and (left[0].lstrip()[:1] in ("[", "{") or left[0] == "null"):
            given, value = "=", left.pop(0)
        if value == "null":
            _check_names({name: None}, parser)
        plain = name in options and type_of(parser, name) is str  # a template may begin with {
        if plain or not re.match(LISTED if name in SOURCES else r"\s*\{", value):
            expanded.append(f"{flag}{given}{value}")
            continue
        try:
            content = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        if name in groups:
            _check_names(content, parser, f"{name}.")
            texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in content.items()}
            inner = [f"{flag}.{key}={text}" for key, text in texts.items()]
            expanded += _expanded(inner, parser)
            continue
        _check_names({name: content}, parser)
        expanded.append(f"{flag}={value}")
    return expanded


def parse(config_class: type, argv: list[str]) -> tuple[Any, DryRun | None]:
    """The configuration given on the command line, and the dry run it asks for, if any.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a value of the wrong type or out
            of range, or options that contradict each other.
    """
    parser = parser_of(config_class)
    expanded = _expanded(_join_negative_mesh(argv), parser)
    parsed = parse_args(parser, [*_run_folder(expanded), *expanded])
    asked = DryRun(parsed.topology, parsed.search, bytes_of(parsed.memory))
    dry_run = asked if parsed.dry_run or any(asked) else None
    return _instantiated(config_class, parser, parsed), dry_run


def _run_folder(argv: list[str]) -> list[str]:
    """The flag that names the run folder after the last --config file, unless one is named."""
    files = [
        Path(os.path.expanduser(following if flag == "--config" else flag.partition("=")[2]))
        for flag, following in pairwise([*argv, "--"])
        if flag.startswith("--config=") or flag == "--config" and not following.startswith("--")
    ]
    named = any(argument.partition("=")[0] == "--output_dir" for argument in argv)
    if named or not files or any("output_dir" in read_yaml(file) for file in files):
        return []
    return [f"--output_dir=runs/{files[-1].stem}"]


def configuration(config_class: type, values: Mapping[str, Any]) -> Any:
    """The configuration of a nested dictionary of options.

    Raises:
        ConfigError: as `parse`.
    """
    parser = parser_of(config_class)
    _check_names(values, parser)
    for name in FOR_COMMANDS:
        if values.get(name):
            raise ConfigError(
                f"{name}: is for the command line; give it there as --{name}, with these options "
                "in a YAML file"
            )
    try:
        parsed = parser.parse_object(values)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(reworded(str(error), parser)) from error
    return _instantiated(config_class, parser, parsed)


def _instantiated(config_class: type, parser: ArgumentParser, parsed: Any) -> Any:
    for key in ("config", *FOR_COMMANDS, PROVENANCE):
        parsed.pop(key, None)
    return config_class(**vars(parser.instantiate(parsed)))


def parse_args(parser: ArgumentParser, argv: list[str]) -> Any:
    """Call `parser.parse_args`, with errors as one line.

    Raises:
        ConfigError: the command line is invalid.
    """
    try:
        return parser.parse_args(argv)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(reworded(str(error), parser)) from error


def _join_negative_mesh(argv: list[str]) -> list[str]:
    """Rewrite `--mesh -1,1,1` as `--mesh=-1,1,1`, since argparse takes `-1,1,1` for a flag."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--mesh" and re.match(r"-\d", argument):
            joined[-1] = f"--mesh={argument}"
        else:
            joined.append(argument)
    return joined


def command(config_class: type, algorithm: str) -> Callable[[list[str]], None]:
    """The `main` of a training command.

    Args:
        config_class: the command's configuration.
        algorithm: `module:name` of the function that turns a configuration into an Algorithm. The
            module is imported after the command line is parsed, so that `--help` is fast.
    """

    def main(argv: list[str]) -> None:
        config, dry_run = parse(config_class, argv)
        start(config, algorithm, dry_run)

    return main


def start(config: Any, algorithm: str, dry_run: DryRun | None = None) -> None:
    """Run `config` with the algorithm `module:name`."""
    from easyaira.run.run import run

    module, _, name = algorithm.partition(":")
    run(config, getattr(importlib.import_module(module), name)(config), dry_run=dry_run)


def run_command(
    command: Callable[[list[str]], None], argv: list[str] | None = None, *, torch: bool = False
) -> None:
    """Run `command` on the command line; exit with the status of its error, if there is one.

    Args:
        torch: whether the command, or a function that the user gives it, may use PyTorch.
    """
    argv = sys.argv[1:] if argv is None else argv
    if gc.get_threshold()[0] < 50_000:  # fewer collections: 3 % less time to the first update
        gc.set_threshold(50_000, 20, 50)
    keep_memory()
    keep_order()
    if not torch:
        torchless.hide_torch()
    try:
        with signals.StopSignal():
            command(argv)
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
    except (Preempted, EasyAiraError) as error:
        if "--debug" in argv and isinstance(error, EasyAiraError):
            raise
        if isinstance(error, Preempted | StorageError):
            with suppress(OSError, ValueError):  # the reader of stdout closed it
                sys.stdout.flush()
            signals.leave(error)
        _end(error)
    except OSError as error:
        full = error.errno == errno.ENOSPC and error.filename is None
        if not (full or isinstance(error, BrokenPipeError)):
            raise
        # the interpreter writes what is left of stdout once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not full:  # the reader of stdout closed it
            sys.exit(1)
        _end(StorageError(f"standard output: {reason(error)}"))


def _end(error: Preempted | EasyAiraError) -> None:
    message, status = one_line(error)
    print(message, file=sys.stderr)
    sys.exit(status)
