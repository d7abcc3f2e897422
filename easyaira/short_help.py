"""--help without Python types. Training commands show their common options, with --help_all all."""

from __future__ import annotations

import re
import shutil
import textwrap
from argparse import SUPPRESS, Action
from itertools import chain, repeat
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

COMMON = """
    config model.name_or_path data.train data.eval data.template data.max_length
    dpo.beta dpo.loss_type reward.margin rl.reward rl.algorithm task
    lora output_dir train_batch_size gradient_accumulation_steps num_train_epochs max_steps
    optimizer.learning_rate optimizer.lr_scheduler_type optimizer.warmup_ratio
    model.gradient_checkpointing eval_steps save_steps mesh dry_run topology memory search
""".split()  # in the order of the help; each command has about 25 of them
OF_INSPECT = [*COMMON[:6], "task", "output_dir"]  # it takes the others, but does not use them
NOT_HELP = r"\s*(python -m|Args:|Raises:|Returns:)"  # paragraphs of a docstring to leave out
USAGE = "%(prog)s [--config FILE] --model.name_or_path MODEL --data.train DATA [OPTIONS]"
INDENT, WIDEST = 30, 100  # columns


class Formatter(DefaultHelpFormatter):
    """Leaves out Python types, and empty defaults, whose meaning the help texts state."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        text = re.sub(r"(, )?type: %\(type\)s", "", text)
        if action.default is None or action.default is False or action.default in ([], {}):
            text = re.sub(r"(, )?default: %\(default\)s", "", text)
        elif "default: %(default)s" in text:  # set by a command, it replaces the text's own
            text = re.sub(r"; default: [^(]*\. \(", ". (", text)
        return re.sub(r" \((, )?", " (", text).replace(" ()", "")

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action).replace("(default: True)", "(default: true)")
        return re.sub(r"\(default: (\[.*\])\)", lambda m: m[0].replace("'", ""), text)


class Parser(ArgumentParser):
    """A parser whose --help is short if it has --help_all; the help of a group is complete.

    Args:
        description: purpose, or the docstring of the command.
    """

    def __init__(self, *args: Any, description: str | None = None, **kwargs: Any):
        paragraphs = (description or "").split("\n\n")
        kept = [text for text in paragraphs if not re.match(NOT_HELP, text)]
        kwargs = {"exit_on_error": False, "allow_abbrev": False} | kwargs
        super().__init__(
            *args, formatter_class=Formatter, description="\n\n".join(kept) or None, **kwargs
        )

    def print_help(self, file: Any = None) -> None:
        if any(isinstance(action, HelpAll) for action in self._actions):
            print(short(self), file=file)
        else:
            super().print_help(file)


class HelpAll(Action):
    """Print the options of all groups, and exit."""

    def __init__(self, option_strings: Any, dest: str, **_: Any):
        text = "Show all options and exit."
        super().__init__(option_strings, dest, nargs=0, default=SUPPRESS, help=text)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        print(parser.format_help())
        parser.exit()


def short(parser: ArgumentParser) -> str:
    """Usage, purpose and common options, with the first sentence of each."""
    width = min(shutil.get_terminal_size().columns - 2, WIDEST)
    actions = {action.dest: action for action in parser._actions if action.help != SUPPRESS}
    common = OF_INSPECT if "task" in actions else COMMON
    shown = [actions[name] for name in common if name in actions]
    lines = textwrap.wrap(
        f"usage: {USAGE % {'prog': parser.prog}}", width, subsequent_indent="    "
    )
    lines += ["", *textwrap.wrap(parser.description or "", width), "", "common options:"]
    for action in shown:
        group = (
            f" --{action.dest}.help lists its options." if f"{action.dest}.help" in actions else ""
        )
        lines += _described(action, group, width)
    hidden = len(actions) - len(shown)
    rest = f"--help_all shows {hidden} more; --print_config shows the values of a command."
    return "\n".join([*lines, "", *textwrap.wrap(rest, width)])


def _described(action: Action, group: str, width: int) -> list[str]:
    name, text = f"  --{action.dest}", " ".join((action.help or "").split())
    text = re.split(r"(?<=[a-z)0-9]\.) (?=[A-Z])", text)[0]
    if action.default not in (None, False, SUPPRESS):
        text += f" (default: {action.default})"
    lines = textwrap.wrap(text + group, width - INDENT)
    if len(name) >= INDENT - 1:
        lines.insert(0, "")
    heads = chain([name], repeat(""))
    return [f"{head:{INDENT}}{line}".rstrip() for head, line in zip(heads, lines, strict=False)]
