"""Make twelve DPO runs ill, keep eight healthy, and see which signs of `run/health.py` name them.

    python scripts/illness.py SHARED_DATA --output /tmp/illness          # all runs, 15 minutes
    python scripts/illness.py SHARED_DATA --output /tmp/illness --only beta --only "healthy 1"

SHARED_DATA holds preference/*.jsonl.gz with the columns prompt, chosen and rejected, and
models/stories260k, a Llama of 260,032 parameters. Each run starts from an SFT of that model, takes
40 updates of 8 pairs, and lasts about 30 seconds on two CPU cores. The table says which sign named
an illness, after how many updates, and what the run reported. Exit status 1: fewer than ten
illnesses were named, or a healthy run was accused.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from easyaira import cli
from easyaira.algorithms.dpo import dpo_algorithm
from easyaira.algorithms.sft import sft_algorithm
from easyaira.config.run import TrainDPO, TrainSFT
from easyaira.run import health
from easyaira.run.health_facts import Run
from easyaira.run.run import run
from easyaira.train import log

Row = dict[str, str]
SETS = {"truth": 320, "aira": 440}  # name -> most characters of a prompt with both answers
TRAIN, HELD_OUT = 320, 64  # pairs
RATE, BETA, UPDATES = 1e-4, 0.1, 40
TAIL = " I hope that this answer helps you, and I am happy to tell you more about it if you ask me."
DPO = {
    "train_batch_size": 8,
    "max_steps": UPDATES,
    "optimizer.learning_rate": RATE,
    "optimizer.warmup_steps": 5,
    "dpo.beta": BETA,
    "logging_steps": 2,
    "eval_steps": 20,
    "data.max_length": 200,
    "data.template": "chat",
}
SFT = {
    "train_batch_size": 16,
    "max_steps": 100,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 5,
    "model.resize": "mean",
    "data.max_length": 200,
    "data.template": "aira",
}
COMMON = {"num_samples": 0, "report_to": "[]", "export": False}


class Pairs(NamedTuple):
    train: list[Row]
    held_out: list[Row]


class Case(NamedTuple):
    """A run.

    Attributes:
        signs: of which one must be named; none: the run is healthy.
        options: that differ from DPO. START, OTHER and BASE are folders of models.
        change: of the pairs.
        pairs: a key of SETS.
    """

    signs: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    change: Callable[[Pairs, random.Random], Pairs] = lambda pairs, _: pairs
    pairs: str = "truth"


def flipped(pairs: Pairs, rng: random.Random) -> Pairs:
    def flip(row: Row) -> Row:
        if rng.random() >= 0.3:
            return row
        return row | {"chosen": row["rejected"], "rejected": row["chosen"]}

    return Pairs(*([flip(row) for row in part] for part in pairs))


def longer_chosen(pairs: Pairs, rng: random.Random) -> Pairs:
    def biased(part: list[Row]) -> list[Row]:
        return [r for r in part if len(r["chosen"]) > len(r["rejected"]) or rng.random() < 0.05]

    return Pairs(*map(biased, pairs))


def leaked(pairs: Pairs, _: random.Random) -> Pairs:
    return pairs._replace(train=[*pairs.held_out, *pairs.train][: len(pairs.train)])


def repeated(pairs: Pairs, _: random.Random) -> Pairs:
    return pairs._replace(train=pairs.train[: len(pairs.train) // 4] * 4)


def same_tails(pairs: Pairs, _: random.Random) -> Pairs:
    def tailed(row: Row) -> Row:
        return row | {side: row[side] + TAIL for side in ("chosen", "rejected")}

    return Pairs(*([tailed(row) for row in part] for part in pairs))


ILL = {
    "rate x 10": Case(("rate too high",), {"optimizer.learning_rate": RATE * 10}),
    "rate / 100": Case(("rate too low",), {"optimizer.learning_rate": RATE / 100}),
    "30 % flipped labels": Case(("labels flipped",), {}, flipped),
    "length bias": Case(("length decides",), {}, longer_chosen),
    "missing end token": Case(
        ("end token unknown",),
        {"model.name_or_path": "BASE", "model.resize": "mean", "data.template": "aira"},
    ),
    "leaked held-out rows": Case(("held-out leaked",), {}, leaked),
    "wrong template": Case(("other template",), {"data.template": "tulu"}),
    "duplicated rows": Case(("pairs repeated",), {}, repeated),
    "beta x 100": Case(("margins explode",), {"dpo.beta": BETA * 100}),
    "answers cut": Case(("answers cut",), {"data.max_length": 72, "data.max_dropped": 0.2}),
    "reference is not the start": Case(
        ("reference is not the start",), {"model.ref_name_or_path": "OTHER"}
    ),
    "identical tails": Case(("tails identical",), {}, same_tails),
}
HEALTHY = {
    "healthy 1": Case(),
    "healthy 2": Case(pairs="aira"),
    "healthy 3": Case(options={"optimizer.learning_rate": RATE / 2, "seed": 1}),
    "healthy 4": Case(options={"optimizer.learning_rate": RATE * 2, "seed": 2}),
    "healthy 5": Case(options={"dpo.loss_type": "ipo", "dpo.beta": 0.3}, pairs="aira"),
    # not run until the thresholds stood
    "healthy 6": Case(options={"dpo.beta": 0.3, "seed": 3}),
    "healthy 7": Case(options={"optimizer.learning_rate": RATE * 2, "seed": 4}, pairs="aira"),
    "healthy 8": Case(options={"dpo.loss_type": "ipo", "dpo.beta": 0.5, "seed": 5}),
}


def read(file: Path) -> list[Row]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def rows_of(shared: Path, name: str) -> Iterator[Row]:
    """Pairs of a set: best and wrong answers of TruthfulQA, or Aira's answers and paraphrases."""
    if name == "truth":
        rows = read(shared / "preference" / "truthfulqa_pairs_en.jsonl.gz")
    else:
        parts = (read(shared / "sft" / f"aira1{kind}_en.jsonl.gz") for kind in ("", "_paraphrased"))
        own, other = ({row["prompt"]: row["completion"] for row in part} for part in parts)
        both = sorted(own.keys() & other.keys())
        rows = [{"prompt": p, "chosen": own[p], "rejected": other[p]} for p in both]
    for row in rows:
        row = {key: row[key].strip() for key in ("prompt", "chosen", "rejected")}
        if sum(map(len, row.values())) <= SETS[name] and row["chosen"] != row["rejected"]:
            yield row


def pairs_of(shared: Path, name: str) -> tuple[Pairs, list[Row]]:
    """Pairs of a set, divided by prompt, and rows for its SFT: the chosen answers."""
    rows = list({tuple(row.values()): row for row in rows_of(shared, name)}.values())
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(0).shuffle(prompts)
    place = {prompt: i for i, prompt in enumerate(prompts)}
    rows.sort(key=lambda row: place[row["prompt"]])
    held_out, rest = rows[:HELD_OUT], rows[HELD_OUT:]
    rest = [row for row in rest if row["prompt"] != held_out[-1]["prompt"]]
    sft = {(row["prompt"], row["chosen"]) for row in rest}
    rng = random.Random(1)
    rng.shuffle(rest)
    return Pairs(rest[:TRAIN], held_out), [
        {"prompt": prompt, "completion": answer} for prompt, answer in sorted(sft)
    ]


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(config_class: Any, algorithm_of: Any, folder: Path, options: dict[str, Any]) -> None:
    """Run in this process, with the log in FOLDER.log."""
    shutil.rmtree(folder, ignore_errors=True)
    argv = [f"--{name}={value}" for name, value in (COMMON | options).items()]
    config, _ = cli.parse(config_class, [*argv, f"--output_dir={folder}"])
    with open(f"{folder}.log", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        run(config, algorithm_of(config), dry_run=None)


def start_of(root: Path, shared: Path, name: str) -> Path:
    """The SFT that runs on a set start from; made once."""
    folder = root / f"sft_{name}"
    if not (folder / "checkpoints").exists():
        _, rows = pairs_of(shared, name)
        data = write(root / "data" / f"sft_{name}.jsonl", rows)
        options = SFT | {
            "model.name_or_path": shared / "models" / "stories260k",
            "data.train": data,
        }
        trained(TrainSFT, sft_algorithm, folder, options)
    return folder


def measured(root: Path, shared: Path, name: str, case: Case) -> Run:
    """Make a run, unless `root` has it; return what its health is judged by."""
    (other,) = SETS.keys() - {case.pairs}
    models = {
        "START": start_of(root, shared, case.pairs),
        "OTHER": start_of(root, shared, other),
        "BASE": shared / "models" / "stories260k",
    }
    pairs = case.change(pairs_of(shared, case.pairs)[0], random.Random(2))
    stem = name.replace(" ", "_").replace("/", "over").replace("%", "percent")
    folder, made = root / stem, {"model.name_or_path": "START"} | DPO | case.options
    options = made | {
        "data.train": write(root / "data" / f"{stem}_train.jsonl", pairs.train),
        "data.eval": write(root / "data" / f"{stem}_eval.jsonl", pairs.held_out),
    }
    rows = log.read(folder / "metrics.jsonl")
    if not rows or rows[-1]["step"] < UPDATES:
        options = {key: models.get(str(value), value) for key, value in options.items()}
        trained(TrainDPO, dpo_algorithm, folder, options)
        rows = log.read(folder / "metrics.jsonl")
    data = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    batch, warmup = made["train_batch_size"], made["optimizer.warmup_steps"]
    beta = float(made["dpo.beta"])
    return Run(rows, data, beta=beta, batch=batch, warmup=warmup, planned=UPDATES)


def named(made: Run) -> dict[str, tuple[int, str]]:
    """Sign -> update after which a run first shows it, and its sentence at the end."""
    seen: dict[str, tuple[int, str]] = {}
    for count in range(1, len(made.rows) + 1):
        for name, sentence in health.warnings(replace(made, rows=made.rows[:count])).items():
            since = seen[name][0] if name in seen else made.rows[count - 1]["step"]
            seen[name] = since, sentence
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", action="append", help="runs whose name has this text")
    args = parser.parse_args()
    hits, accused = 0, 0
    print("| run | named after update | sentence | also named (after update) |")
    print("|---|---|---|---|")
    for name, case in (ILL | HEALTHY).items():
        if args.only and not any(word in name for word in args.only):
            continue
        seen = named(measured(args.output, args.shared, name, case))
        hits += any(sign in seen for sign in case.signs)
        accused += bool(seen) and not case.signs
        own = next((sign for sign in case.signs if sign in seen), "")
        after, sentence = seen.get(own, ("never" if case.signs else "", ""))
        rest = ", ".join(f"{sign} ({seen[sign][0]})" for sign in seen if sign != own)
        print(f"| {name} | {after} | {sentence} | {rest} |", flush=True)
    print(f"\n{hits} illnesses named, {accused} healthy runs accused", flush=True)
    return 0 if args.only or (hits >= 10 and not accused) else 1


if __name__ == "__main__":
    sys.exit(main())
