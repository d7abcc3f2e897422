"""Training updates: sides alternate, A B A B, each in its own process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peer import trl
from benchmarks.sides import ours
from easyaira.allocator import keep_memory
from easyaira.distributed.compiler import keep_order
from easyaira.train.metrics import peak_flops

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
ENGINES = {"ours": ours, "trl": trl}
MARK = "benchmark: "  # prefix of a worker's answers


class Entry(NamedTuple):
    """A side: display name, engine and options."""

    name: str
    engine: str = "ours"
    options: Mapping[str, Any] = {}


OURS = Entry("EasyAira")
# the settings that TRL's documentation recommends for speed
FAST = {"bf16": True, "gradient_checkpointing": False, "precompute_ref_log_probs": True}
PACKED = FAST | {"packing": True, "packing_strategy": "wrapped"}  # SFT; needs no flash-attn
LIGER = {"use_liger_kernel": True}  # CUDA
PEERS = {
    "trl-fast": (Entry("TRL, best", "trl", FAST),),
    "trl": (Entry("TRL, best", "trl", FAST), Entry("TRL, defaults", "trl")),
    "trl-packed": (Entry("TRL, best", "trl", FAST), Entry("TRL, packed", "trl", PACKED)),
    "trl-liger": (Entry("TRL, best", "trl", FAST), Entry("TRL, Liger", "trl", FAST | LIGER)),
    "trl-packed-liger": (Entry("TRL, packed, Liger", "trl", PACKED | LIGER),),
}
ONE_A_ROW = {"packing": False, "share_prompt": "never"}
LADDER = (  # cumulative
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
AGAINST = {  # one optimisation, off and on; naive: all of them
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
    "pairs": (
        Entry("best with each other, as pairs", options={"written_out": "best_rest"}),
        Entry("all pairs, as pairs", options={"written_out": "all_pairs"}),
        Entry("answers together, best with each other", options={"answers": "best_rest"}),
        Entry("answers together, all pairs", options={"answers": "all_pairs"}),
    ),
    "bfloat16": (Entry("float32", options={"dtype": "float32"}), Entry("bfloat16")),
}
PAIRED = ("share_prompt", "reference", "pairs")  # need answers to compare
CHECKPOINTING = ("none", "dots", "full")


def sides_of(args: argparse.Namespace) -> list[Entry]:
    """Sides of the comparison that the command line requests.

    Raises:
        SystemExit: the comparison does not apply to SFT.
    """
    pairs = args.task == "dpo"
    sides = [OURS]
    if args.ladder:
        sides = [entry for entry in LADDER if pairs or entry.name not in ONLY_PAIRS]
    elif args.against:
        if args.against in PAIRED and not pairs:
            raise SystemExit(f"--against {args.against}: needs pairs; use --task dpo")
        sides = list(AGAINST[args.against])
    elif args.gradient_checkpointing:
        sides = [
            Entry(f"checkpointing {how}", options={"gradient_checkpointing": how})
            for how in args.gradient_checkpointing
        ]
    sides += PEERS.get(args.peer, ())
    return [in_float32(side) for side in sides] if args.dtype == "float32" else sides


def in_float32(side: Entry) -> Entry:
    """The side with float32 products, which many CPUs multiply faster than bfloat16."""
    dtype = {"dtype": "float32"} if side.engine == "ours" else {"bf16": False}
    return side._replace(options={**side.options, **dtype})


class Worker:
    """A warm side in its own process."""

    def __init__(self, entry: Entry, work: Mapping[str, Any], debug: bool):
        request = {"work": work, "begin": time.time()} | entry._asdict()
        # sides share an accelerator, and by default JAX preallocates most of its memory
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.entry = entry
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self.facts = self._answer()

    def ask(self, command: str) -> Any:
        with suppress(BrokenPipeError):  # `_answer` says so
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(
            f"{self.entry.name}: failed, or was killed for its memory; --debug shows why"
        )


def worker(request: Mapping[str, Any]) -> None:
    """Run a round for every line on standard input; on `trace FOLDER`, trace a round."""

    def answer(content: Any) -> None:
        print(MARK + json.dumps(content), flush=True)

    keep_memory()  # in runs, the command line does it; TRL gets it, too
    keep_order()  # as runs do
    side = ENGINES[request["engine"]](request["work"], request["options"])
    answer(side.facts | {"to first s": side.first - request["begin"]})
    for line in sys.stdin:
        what, _, folder = line.strip().partition(" ")
        if what == "trace":
            answer(side.trace(Path(folder)))
        else:
            before, times = joules(), os.times()
            wall, cpu = side.run()
            energy, now = joules() - before, os.times()
            system = (now.system - times.system) / cpu
            figures = {"wall": wall, "cpu": cpu, "system": system, "joules": energy}
            answer(figures | {"peak MiB": side.peak()})


def joules() -> float:
    """Energy that the first NVIDIA GPU has used since its driver started; NaN without one."""
    try:
        import pynvml
    except ImportError:
        return float("nan")
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
    except pynvml.NVMLError:
        return float("nan")


def measure(
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Figures of each side, medians over the rounds; with --profile, costs of our last side, too.

    Ratios are medians of the rounds' ratios of CPU seconds, not wall seconds, so that other
    processes on the same cores disturb them less; those slow both sides of a round alike.
    """
    work = {
        name: getattr(args, name)
        for name in ("task", "model", "lengths", "examples", "answers", "updates")
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
        rows.append(row_of(one, rounds[i], args.updates, args.examples))
        for name, other in (("first", 0), ("before", max(i - 1, 0))):
            ratios = [b["cpu"] / a["cpu"] for a, b in zip(rounds[i], rounds[other], strict=True)]
            rows[-1][f"speed, {name} = 1"] = float(np.median(ratios))
    return rows, costs


def row_of(
    one: Worker, rounds: list[dict[str, float]], updates: int, examples: int
) -> dict[str, Any]:
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
        "system": middle["system"],
        "positions/token": facts["positions per token"],
        "peak MiB": middle["peak MiB"],
        "GPU J/example": middle["joules"] / updates / examples,
        "temporaries MiB": facts["temporaries MiB"],
        "MFU": peak and rate * facts["operations per token"] / (peak * facts["devices"]),
    }
