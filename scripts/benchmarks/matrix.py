"""Beside TRL over models, lengths, sizes of an update and dtypes, as Markdown and a picture."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import show, training

HEADER = (
    "| work | tokens per CPU second: EasyAira | TRL, best | ratio | positions per token "
    "| peak MiB | system time |\n|---|---|---|---|---|---|---|\n"
)


def matrix(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every combination. The file is written anew after each, so that a run that is cut
    off keeps its lines.

    "TRL, best" is the fastest of its sides that were measured: packed or padded (SFT), with the
    reference computed before (DPO).
    """
    rows: list[dict[str, Any]] = []
    combinations = itertools.product(args.model, args.task, args.lengths, args.examples, args.dtype)
    for model, task, lengths, examples, dtype in combinations:
        cell = {"model": model, "task": task, "lengths": lengths, "examples": examples}
        peer = "trl-packed" if task == "sft" else "trl-fast"
        fixed = {"answers": 2, "ladder": False, "against": None, "gradient_checkpointing": None}
        given = vars(args) | cell | fixed | {"dtype": dtype, "peer": peer, "profile": None}
        sides, _ = training.measure(argparse.Namespace(**given))
        rows.append(row_of(cell | {"dtype": dtype}, sides))
        print(line_of(rows[-1]), end="", flush=True)
        args.output.write_text(HEADER + "".join(map(line_of, rows)))
    show.ratios(
        {row["work"]: row["ratio"] for row in rows},
        "tokens per CPU second, TRL's best = 1",
        args.output.with_suffix(".png"),
    )
    return rows


def row_of(cell: Mapping[str, Any], sides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ours, *others = sides
    best = max(others, key=lambda side: side["tokens/CPU s"])
    unit = "pairs" if cell["task"] == "dpo" else "examples"
    work = f"{cell['task'].upper()} {cell['model']}, {cell['lengths']}"
    work += f", {cell['examples']} {unit}, {cell['dtype']}"
    return {
        "work": work,
        "ours": ours["tokens/CPU s"],
        "best": best["tokens/CPU s"],
        "of": best["side"],
        "ratio": ours["tokens/CPU s"] / best["tokens/CPU s"],
        "positions": ours["positions/token"],
        "memory": (ours["peak MiB"], best["peak MiB"]),
        "system": (ours["system"], best["system"]),
    }


def line_of(row: Mapping[str, Any]) -> str:
    memory = " / ".join(f"{value:,.0f}" for value in row["memory"])
    system = " / ".join(f"{value:.1%}" for value in row["system"])
    return (
        f"| {row['work']} | {row['ours']:,.0f} | {row['best']:,.0f} ({row['of']}) "
        f"| **{row['ratio']:.2f}** | {row['positions']:.2f} | {memory} | {system} |\n"
    )
