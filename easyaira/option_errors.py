"""Errors of command lines in one line each: jsonargparse's messages in the words of options."""

import difflib
import re
import sys
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from easyaira.config.ranges import WORDS
from easyaira.config.run import PROVENANCE
from easyaira.errors import did_you_mean, shortened

SOURCES = ("data.train", "data.eval")  # options that name data
OTHER_NAMES = {  # names of transformers, TRL and PEFT that resemble no option, or the wrong one
    "model_name_or_path": "model.name_or_path",
    "tokenizer_name_or_path": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "dataset_name": "data.train",
    "dataset_text_field": "data.columns",
    "chat_template_path": "data.template",
    "per_device_train_batch_size": "train_batch_size",
    "optim": "optimizer.name",
    "eval_strategy": "eval_steps",
    "save_strategy": "save_steps",
    "rpo_alpha": "dpo.sft_weight",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "load_in_4bit": "lora.quantize",
    "load_in_8bit": "lora.quantize",
}
MEANT = {  # group of options -> the option that a value in its place is meant for
    "model": "name_or_path",
    "data": "train",
    "lora": "target_modules",
    "energy": "country",
    "optimizer": "name",
    "dpo": "loss_type",
    "rl": "algorithm",
}


def reworded(message: str, parser: ArgumentParser) -> str:
    """Rewrite jsonargparse's message as `key: expected ..., got ...`, with the nearest name."""
    message = re.sub(r"\s+", " ", message).strip()
    message = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", message).replace("typing.", "")
    if stray := re.search(r"nrecognized arguments?: (?!-)(\S+)", message):
        return _stray(stray[1], parser)
    if lacking := re.match(r"the following arguments are required: (.*)", message):
        return _lacking(lacking[1].split(", "), parser)
    if choice := re.search(
        r"argument ([\w.]+): invalid choice: '(.*)' \(choose from (.*)\)", message
    ):
        name, given, choices = choice.groups()
        choices = choices.replace("'", "").split(", ")
        return f"{name}: expected {' or '.join(choices)}, got {shortened(given)}" + did_you_mean(
            given, choices
        )
    if among := re.match(r'expected "(\w+)" to be one of \{(.*?)\}, but it was not', message):
        return f"needs a {among[1]}: {among[2].replace(',', ', ')}"
    unknown = re.search(
        r"(?:not accept (?:nested key|option)|nrecognized arguments?:|^Option) '?-*([\w.]+)",
        message,
    )
    if unknown:
        group = re.search(r"Group '([\w.]+)'", message)
        name = f"{group[1]}.{unknown[1]}" if group else unknown[1]
        return no_such_option(name, options_of(parser))
    if alone := re.match(r"argument --([\w.]+): expected one argument$", message):
        value = "true" if type_of(parser, alone[1]) is bool else "VALUE"
        return f"{alone[1]}: expected a value, got nothing; write --{alone[1]} {value}"
    key = re.match(r'Parser key "([\w.]+)": (.*)', message)
    if key is None:
        return shortened(message, 300)
    name, problem = key.groups()
    if group := re.search(r"given class_path '([\w.]+)': (.*) - Expected a NoneType", problem):
        return _group_error(name, group[1], group[2])
    return _value_error(name, problem)


def options_of(parser: ArgumentParser) -> list[str]:
    names = [
        a.dest for a in parser._actions if not a.dest.endswith("help") and a.dest != PROVENANCE
    ]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _stray(value: str, parser: ArgumentParser) -> str:
    """Refuse a word of the command line that belongs to no option."""
    if value.endswith((".yaml", ".yml")) and "config" in options_of(parser):
        return f"{value}: belongs to no option; write --config {value}"
    name = "prompt" if "prompt" in options_of(parser) else "NAME"
    return (
        f"{value}: belongs to no option; write --{name} {value}, with quotes around several "
        "words, and several values as one list, such as '[a, b]'"
    )


def _lacking(names: list[str], parser: ArgumentParser) -> str:
    """Name the options and arguments that a command line lacks."""
    flags = {action.dest for action in parser._actions if action.option_strings}
    wanted = [f"--{name}" if name in flags else name.rpartition(".")[2] for name in names]
    where = ", here or in a --config file" if "config" in flags else "; --help explains them"
    return f"needs {' and '.join(wanted)}{where}"


def no_group(name: str, given: str) -> str:
    """Refuse a value in the place of a group of options, and name the option that is meant."""
    return f"{name}: expected options as `name: value`, got {given}{_meant(name, given)}"


def _meant(group: str, given: str) -> str:
    known = group in MEANT and given != "nothing"
    return f"; did you mean {group}.{MEANT[group]}?" if known else ""


def no_such_option(name: str, options: list[str]) -> str:
    leaf = name.rpartition(".")[2]
    same_leaf = [option for option in options if option.rpartition(".")[2] == leaf]
    ours = OTHER_NAMES.get(leaf, "")
    if ours and not same_leaf and {ours, ours.partition(".")[0]} & {*options}:  # lora is a group
        return f"{name}: no such option; did you mean {ours}?"
    groups = {option.partition(".")[0] for option in options if "." in option}
    near = difflib.get_close_matches(name, groups, n=1, cutoff=0.75)
    if near and "." not in name:
        return f"{name}: no such option; did you mean {near[0]}?"
    return f"{name}: no such option" + (
        did_you_mean(name, same_leaf or options) or "; --help lists them"
    )


def _choices(literal: re.Match[str]) -> str:
    return literal[1].replace("'", "").replace(", ", " or ")


def _value_error(name: str, problem: str) -> str:
    """Describe an invalid value of an option in one line."""
    problem = re.sub(r"((?:Given|Got) value:)\s*$", r"\1 an empty text", problem)
    problem = re.sub(r"Literal\[([^]]*)\]", _choices, problem)
    if name in SOURCES:
        if inner := re.search(r"given class_path '([\w.]+Source)': (.*?) Given value", problem):
            return _group_error(name, inner[1], inner[2])
        value = re.search(r"(?:Given|Got) value: (.*?)(?: Subclass types|$)", problem)
        got = f", got {shortened(value[1])}" if value else ""
        return f"{name}: expected a path or a list such as [{{path: FILE}}]{got}"
    if union := re.search(r"Subtypes: \[(.*?)\] Errors:.*Given value: (.*)$", problem):
        kinds = re.split(r", (?![^[]*\])", union[1])
        wanted = " or ".join(_words(kind) for kind in kinds)
        hint = _as_list(wanted, union[2]) or _meant(name, union[2])
        return f"{name}: expected {wanted}, got {shortened(union[2])}{hint}"
    if plain := re.match(r"Expected an? (.*?)\. Got value: (.*)$", problem):
        choices = plain[1].split(" or ")
        wanted = _words(plain[1])
        hint = _as_list(wanted, plain[2]) or did_you_mean(plain[2], choices)
        return f"{name}: expected {wanted}, got {shortened(plain[2])}{hint}"
    if number := re.match(r"Not of type (\w+): (.*)$", problem):
        value = re.search(r"(.*) does not conform|'(.*)'$|(\S+) not an integer", number[2])
        got = next(filter(None, value.groups()), "an empty text") if value else number[2]
        return f"{name}: expected {WORDS.get(number[1], number[1])}, got {shortened(got)}"
    if group := re.match(r"Unable to load config ['\"](.*?)['\"]( - |$)", problem):
        return no_group(name, shortened(group[1]))
    return shortened(f"{name}: {problem}", 300)


def _words(kind: str) -> str:
    """A type in words."""
    if kind == "NoneType":
        return "null"
    if listed := re.fullmatch(r"list\[(?:\w+\.)?(\w+)\]", kind):
        return WORDS["list"] if listed[1] == "str" else "a list such as [1, 2]"
    if kind.startswith("dict"):
        values = re.match(r"dict\[str, (?:[\w.]+\.)?(Count|Positive)\]", kind)
        if values:
            return f"pairs of a name and {WORDS[values[1]]}"
        return "pairs such as {a: b} (a blank follows the colon)"
    return WORDS.get(kind, kind)


def _as_list(wanted: str, given: str) -> str:
    """How to write values that were not written as a list."""
    if "a list such as" not in wanted or not re.fullmatch(r"[\w.,-]+", given):
        return ""
    return f"; write [{', '.join(given.split(','))}]"


def _group_error(name: str, class_path: str, problem: str) -> str:
    """Describe an error inside a nullable group of options in one line."""
    module, _, name_of_class = class_path.rpartition(".")
    if not hasattr(sys.modules.get(module), name_of_class):  # a value that is no group
        return no_group(name, class_path)
    options = [field.name for field in fields(getattr(sys.modules[module], name_of_class))]
    if unknown := re.match(r"Option '([\w.]+)' is not accepted", problem):
        options = [f"{name}.{option}" for option in options]
        return no_such_option(f"{name}.{unknown[1]}", options)
    if missing := re.match(r"the following arguments are required: ([\w.]+)", problem):
        needs = "each entry needs it" if name in SOURCES else f"required where {name} is not null"
        if missing[1] == "target_modules":
            needs += ", such as all-linear"
        return f"{name}.{missing[1]}: {needs}"
    if inner := re.match(r'Parser key "([\w.]+)": (.*)', problem):
        return _value_error(f"{name}.{inner[1]}", inner[2])
    return f"{name}: {problem}"


def type_of(parser: ArgumentParser, name: str) -> Any:
    """Type of an option; of one without a type, that of null."""
    action = next(action for action in parser._actions if action.dest == name)
    return getattr(action, "_typehint", None) or action.type or type(None)
