"""The `easyaira` command: `easyaira dpo` runs `python -m easyaira.train_dpo`.

easyaira COMMAND --help
"""

from __future__ import annotations

import importlib
import sys

from easyaira import __version__
from easyaira.errors import did_you_mean

COMMANDS = {  # name: (module, purpose)
    "sft": ("train_sft", "fine-tune a language model on prompts with completions"),
    "dpo": ("train_dpo", "optimise a language model on pairs of answers"),
    "reward": ("train_reward", "train a reward or toxicity model"),
    "rl": ("train_rl", "train a language model on rewards of its own answers"),
    "generate": ("generate", "answer a prompt, a file of prompts, or converse"),
    "evaluate": ("evaluate", "measure a model on benchmarks, or a scorer on pairs"),
    "best_of": ("best_of", "sample, score and keep the best answers, for SFT and DPO"),
    "backtranslate": ("backtranslate", "find instructions for texts, rate and learn them"),
    "demo": ("demo", "ask a model in the browser, with scored candidates"),
    "convert": ("convert", "write a run or checkpoint as a Hugging Face folder, or the reverse"),
    "translate": ("translate", "rewrite a configuration of TRL, axolotl, ... as ours"),
    "verify": ("verify", "check a released folder against its proof"),
    "push": ("push", "verify a released folder and upload it to the hub"),
    "inspect": ("inspect", "show what a configuration would train on"),
    "quickstart": ("quickstart", "run every stage, from data to export, on a small model"),
    "selftest": ("selftest", "check the numbers on this machine's devices"),
}

ELSEWHERE = {  # names of other trainers' commands: ours
    **dict.fromkeys(("train", "finetune", "fine_tune", "pretrain"), "sft"),
    **dict.fromkeys(("kto", "orpo", "simpo", "prefer"), "dpo"),
    **dict.fromkeys(("ppo", "grpo", "rloo"), "rl"),
    **dict.fromkeys(("chat", "infer", "inference", "predict", "vllm_serve"), "generate"),
    **dict.fromkeys(("eval", "score", "test"), "evaluate"),
    **dict.fromkeys(("merge", "merge_lora", "export"), "convert"),
    **dict.fromkeys(("preprocess", "plan"), "inspect"),
    **dict.fromkeys(("webchat", "webui", "serve"), "demo"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        ["usage: easyaira COMMAND [--help] ...", "       easyaira --version", "", *lines]
    )


def main(argv: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return
    if name == "--version":
        print(f"easyaira {__version__}")
        return
    if name not in COMMANDS:
        known = ELSEWHERE.get(name.replace("-", "_"))
        if name.startswith("-"):
            hint = "; begin with one, such as easyaira sft --help"
        else:
            hint = f"; did you mean {known}?" if known else did_you_mean(name, COMMANDS)
            hint = hint or f"; choose one of {', '.join(COMMANDS)}"
        print(f"error: {name}: no such command{hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv[0] = f"easyaira {name}"  # shown by the command's own --help
    try:
        module = importlib.import_module(f"easyaira.{COMMANDS[name][0]}")

        from easyaira.cli import run_command  # --help and --version need no parser
    except KeyboardInterrupt:  # afterwards, run_command handles signals
        print("stopped: SIGINT; nothing is lost, run the same command again", file=sys.stderr)
        sys.exit(75)
    run_command(module.main, rest, torch=getattr(module, "TORCH", False))


if __name__ == "__main__":
    main()
