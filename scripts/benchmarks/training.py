"""Updates of training: sides in turns, A B A B, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sides import ENGINES
from easyaira.train.metrics import peak_flops

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
MARK = "benchmark: "  # of the lines in which a worker answers


class Entry(NamedTuple):
    """A side, and what it is called."""

    name: str
    engine: str = "ours"
    options: Mapping[str, Any] = {}


OURS = Entry("EasyAira")
TRL = (  # what its documentation recommends for speed on such a machine, and what it starts with
    Entry(
        "TRL, best",
        "trl",
        {"bf16": True, "gradient_checkpointing": False, "precompute_ref_log_probs": True},
    ),
    Entry("TRL, defaults", "trl"),
)
ONE_A_ROW = {"packing": False, "share_prompt": "never"}
LADDER = (  # each has what those above it have
    Entry("naive: padded to the maximum, all logits", options={"dtype": "float32", "naive": True}),
    Entry(
        "+ buckets, sides together, logits where there is loss",
        options=ONE_A_ROW | {"dtype": "float32", "in_step": True},
    ),
    Entry("+ reference once", options=ONE_A_ROW | {"dtype": "float32"}),
    Entry("+ bfloat16", options=ONE_A_ROW),
    Entry("+ packed", options={"share_prompt": "never"}),
    Entry("+ prompt once", options={"share_prompt": "always"}),
)
ONLY_PAIRS = ("+ reference once", "+ prompt once")
AGAINST = {  # one idea, without and with; and all of them together
    "naive": (LADDER[0], OURS),
    "share_prompt": (
        Entry("prompt stored twice", options={"share_prompt": "never"}),
        Entry("prompt stored once", options={"share_prompt": "always"}),
    ),
    "packing": (
        Entry("one sequence a row", options=ONE_A_ROW),
        Entry("packed", options={"share_prompt": "never"}),
    ),
    "reference": (
        Entry("reference in the step", options={"in_step": True}),
        Entry("reference once, before"),
    ),
    "bfloat16": (Entry("float32", options={"dtype": "float32"}), Entry("bfloat16")),
}
PAIRED = ("share_prompt", "reference")  # what needs pairs
CHECKPOINTING = ("none", "dots", "full")


def sides_of(args: argparse.Namespace) -> list[Entry]:
    """What the command line asks to be compared.

    Raises:
        SystemExit: a comparison that SFT does not have.
    """
    pairs = args.task == "dpo"
    sides = [OURS]
    if args.ladder:
        sides = [entry for entry in LADDER if pairs or entry.name not in ONLY_PAIRS]
    elif args.against:
        if args.against in PAIRED and not pairs:
            raise SystemExit(f"--against {args.against}: only pairs have that; use --task dpo")
        sides = list(AGAINST[args.against])
    elif args.gradient_checkpointing:
        sides = [
            Entry(f"checkpointing {how}", options={"gradient_checkpointing": how})
            for how in args.gradient_checkpointing
        ]
    return sides + list(TRL if args.peer else ())


class Worker:
    """A side in a process of its own, warm and waiting."""

    def __init__(self, entry: Entry, work: Mapping[str, Any], debug: bool):
        asked = {"work": work, "begin": time.time()} | entry._asdict()
        # by default JAX takes most of an accelerator's memory, and here sides share one
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.entry = entry
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "worker", json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self.facts = self._answer()

    def ask(self, what: str) -> Any:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"{self.entry.name}: has failed; --debug shows why")


def worker(asked: Mapping[str, Any]) -> None:
    """What runs in that process: a round for every line on standard input, or `trace FOLDER`."""

    def tell(what: Any) -> None:
        print(MARK + json.dumps(what), flush=True)

    side = ENGINES[asked["engine"]](asked["work"], asked["options"])
    tell(side.facts | {"to first s": side.first - asked["begin"]})
    for line in sys.stdin:
        what, _, folder = line.strip().partition(" ")
        if what == "trace":
            tell(side.trace(Path(folder)))
        else:
            wall, cpu = side.run()
            tell({"wall": wall, "cpu": cpu, "peak MiB": side.peak()})


def measure(
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """A row of figures for each side, medians over the rounds, and the costs of our first side if
    they were asked for.

    A ratio is the median of the rounds' ratios, of CPU seconds: a neighbour on the same cores takes
    a share of the clock, and the same share of both sides.
    """
    work = {
        name: getattr(args, name) for name in ("task", "model", "lengths", "examples", "updates")
    }
    workers = [Worker(entry, work, args.debug) for entry in sides_of(args)]
    rounds: list[list[dict[str, float]]] = [[] for _ in workers]
    for _ in range(args.rounds):
        for one, measured in zip(workers, rounds, strict=True):
            measured.append(one.ask("go"))
    costs = None
    if args.profile:
        ours = [one for one in workers if one.entry.engine == "ours"][-1]
        costs = ours.ask(f"trace {args.profile.resolve()}")
    for one in workers:
        one.close()
    rows = []
    for i, one in enumerate(workers):
        rows.append(row_of(one, rounds[i], args.updates))
        for name, other in (("first", 0), ("before", max(i - 1, 0))):
            ratios = [b["cpu"] / a["cpu"] for a, b in zip(rounds[i], rounds[other], strict=True)]
            rows[-1][f"speed, {name} = 1"] = float(np.median(ratios))
    return rows, costs


def row_of(one: Worker, rounds: list[dict[str, float]], updates: int) -> dict[str, Any]:
    middle = {name: float(np.median([round[name] for round in rounds])) for name in rounds[0]}
    facts = one.facts
    rate = facts["tokens"] / middle["wall"]
    peak = peak_flops(facts["device"])
    return {
        "side": one.entry.name,
        "tokens/s": rate,
        "tokens/CPU s": facts["tokens"] / middle["cpu"],
        "update s": middle["wall"] / updates,
        "to first s": facts["to first s"],
        "positions/token": facts["positions per token"],
        "peak MiB": middle["peak MiB"],
        "temporaries MiB": facts["temporaries MiB"],
        "MFU": peak and rate * facts["operations per token"] / (peak * facts["devices"]),
    }
