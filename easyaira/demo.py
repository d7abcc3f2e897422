"""Ask a model in the browser: candidates, their scores, and the choice by a reward model and guard.

python -m easyaira.demo runs/aira-2-124m --reward runs/aira-reward --guard runs/toxicity
"""

from __future__ import annotations

import os
import time
from typing import Any

from easyaira import cli
from easyaira.errors import ConfigError, Preempted

DEFAULTS = {"temperature": 0.1, "top_k": 50, "repetition_penalty": 1.1}  # Aira's demo


def parser():
    from typing import Literal

    from easyaira.config.ranges import Count
    from easyaira.short_help import Parser

    parser = Parser(description="Ask a model in the browser.")
    add = parser.add_argument
    add("model", help="Run folder, Hugging Face folder or hub id.")
    add("--reward", help="Reward model: the candidate that it scores highest is the answer.")
    add("--guard", help="Toxicity model; candidates that score below 5 are dropped.")
    add("--search", help="Data to search: .jsonl, .json, .csv, .parquet, folder or hub id.")
    add("--language", type=Literal["en", "pt"], default="en", help="Language of the page.")
    add("--host", default="127.0.0.1", help="Address to serve; 0.0.0.0: other machines, too.")
    add("--port", type=Count, default=7860, help="Port of the page.")
    add("--template", default="chat", help="As data.template; chat: the model's own.")
    cli.computing_options(parser)
    return parser


def build(args: Any) -> Any:
    """Load the models, and make the page."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from easyaira.chat import page
    from easyaira.chat.answers import Answers
    from easyaira.chat.search import Search
    from easyaira.chat.words import WORDS
    from easyaira.data.cache import keep_compiled
    from easyaira.loaded import LoadedModel
    from easyaira.models.registry import model_of
    from easyaira.rewards.model import RewardModel
    from easyaira.storage import pretrained

    keep_compiled()
    search = Search(args.search) if args.search else None
    origin = pretrained.find(args.model)
    if model_of(origin.config, origin.where).scorer:
        raise ConfigError(f"{args.model}: scores texts and writes none; name it as --reward")
    model = LoadedModel(origin, mesh=args.mesh, dtype=args.dtype, template=args.template)
    own = model.sampling()
    model.weights(model.sampler(own))  # read them now, so that errors are raised here
    reward, guard = (
        name and RewardModel(name, model.mesh, args.dtype).load()
        for name in (args.reward, args.guard)
    )
    answers = Answers(model, reward, guard, WORDS[args.language]["apology"])
    default = model.sampling(**DEFAULTS) if own.greedy else own
    return page.build(answers, search, args.model, args.language, default)


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)
    made = build(args)

    from easyaira.chat.page import serve

    print(f"{serve(made, args.host, args.port)}  (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except Preempted:  # Ctrl-C is how it ends
        made.close(verbose=False)


if __name__ == "__main__":
    cli.run_command(main)
