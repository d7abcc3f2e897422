"""Flags of the command lines are frozen: scripts of users hold them.

After a change that is meant:    python tests/test_flags.py
"""

import contextlib
import io
import re
from pathlib import Path

from easyaira import (
    backtranslate,
    best_of,
    convert,
    demo,
    evaluate,
    generate,
    inspect,
    push,
    selftest,
    train_dpo,
    train_reward,
    train_rl,
    train_sft,
    translate,
    verify,
)

FILE = Path(__file__).with_name("flags.txt")
COMMANDS = {
    "train_sft": train_sft.main,
    "train_dpo": train_dpo.main,
    "train_reward": train_reward.main,
    "train_rl": train_rl.main,
    "inspect": inspect.main,
    "generate": generate.main,
    "evaluate": evaluate.main,
    "best_of": best_of.main,
    "demo": demo.main,
    "selftest": selftest.main,
    "verify": verify.main,
    "translate": translate.main,
    "push": push.main,
    "convert from_easylm": lambda argv: convert.main(["from_easylm", *argv]),
    "convert from_hf": lambda argv: convert.main(["from_hf", *argv]),
    **{
        f"backtranslate {step}": lambda argv, step=step: backtranslate.main([step, *argv])
        for step in backtranslate.STEPS
    },
    "convert text_model": lambda argv: convert.main(["text_model", *argv]),
    "convert to_hf": lambda argv: convert.main(["to_hf", *argv]),
}


def flags_of(main, asked="--help") -> set[str]:
    """Those that a command's help shows, with those of groups that have a help of their own."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([asked])
    if asked == "--help" and "--help_all shows" in printed.getvalue():
        return flags_of(main, "--help_all") | {"--help_all"}
    flags = set(re.findall(r"(?:^ +|)(--[\w.]+)", printed.getvalue(), re.M)) - {"--help"}
    groups = {flag for flag in flags if flag.endswith(".help")} - {asked}
    return (flags - groups).union(*(flags_of(main, group) for group in groups)) - {asked}


def lines() -> str:
    """A flag and its commands in each."""
    commands: dict[str, list[str]] = {}
    for name, main in COMMANDS.items():
        for flag in flags_of(main):
            commands.setdefault(flag, []).append(name)
    return "".join(f"{flag}: {', '.join(names)}\n" for flag, names in sorted(commands.items()))


def test_flags_are_those_that_scripts_of_users_hold():
    now, before = lines().splitlines(), FILE.read_text().splitlines()
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    assert now == before, (
        f"gone: {gone}\nnew: {new}\nIf that is meant, note it in CHANGELOG.md and run"
        " python tests/test_flags.py"
    )


if __name__ == "__main__":
    FILE.write_text(lines())
