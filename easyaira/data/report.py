"""What became of the data: data_report.json to read, data_report.html and a terminal to see."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from easyaira import pages
from easyaira.data.dataset import Data
from easyaira.data.examples import Account, Examples
from easyaira.files import write_file

FILES = ("data_report.json", "data_report.html")

STATES = {  # of a token: its colours on the page and in a terminal, and what it means
    "trained": ("#cdebd0", "30;42", "trained on"),
    "masked": ("#eeeeee", "37;100", "seen, not trained on"),
    "cut": ("#f6cccc", "30;41", "cut off or dropped"),
}
STYLE = (
    "<style>.row {white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 1px solid #ddd;"
    " padding: .6rem 0; font-size: .9rem}"
    " .row span {border-right: 1px solid #fff8; border-radius: 2px} .place {color: #666}"
    + "".join(f" .{state} {{background: {colour}}}" for state, (colour, *_) in STATES.items())
    + "</style>"
)


def write(folder: Path, data: Data) -> None:
    """Both files, into an existing folder."""
    text = json.dumps(data.report, indent=2, ensure_ascii=False) + "\n"
    write_file(folder / FILES[0], text)
    write_file(folder / FILES[1], page(data))


def page(data: Data) -> str:
    """data_report.html: counts, lengths as a picture, and rows with their tokens coloured."""
    parts = [STYLE]
    sections = {"train": data.train, "held out": data.held_out}
    for name, examples in sections.items():
        if examples is None:
            continue
        parts += [
            f"<h2>{name}</h2>",
            pages.table(("", ""), list(facts(data.report[name]).items())),
        ]
        if name in data.accounts and data.accounts[name].dropped:
            told = data.accounts[name]
            rows = [(reason, n, told.first_dropped[reason]) for reason, n in told.dropped.items()]
            parts += ["<h3>Dropped rows</h3>", pages.table(("reason", "rows", "the first"), rows)]
        parts += ["<h3>Lengths in tokens</h3>", pages.svg(histograms(examples))]
    legend = " ".join(f'<span class="{s}">{told}</span>' for s, (*_, told) in STATES.items())
    parts += ["<h2>Rows</h2>", f'<p class="row">{legend}</p>']
    parts += [_row(*shown) for account in data.accounts.values() for shown in account.shown]
    return pages.page("Data report", *parts)


def facts(told: dict[str, Any]) -> dict[str, Any]:
    """A part of the report as lines of a table."""
    lines: dict[str, Any] = {}
    for name, value in told.items():
        if name in ("dropped", "first_dropped"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {n:,}" for key, n in value.items())
        lines[name.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else value or "-"
    if told.get("read"):
        lines["dropped"] = sum(told["dropped"].values())
    return lines


def histograms(examples: Examples) -> Any:
    """How long prompts, answers and whole examples are, and how many tokens are learned."""
    from matplotlib.figure import Figure

    answers = np.diff(examples.bounds[:, 1:]) - examples.unseen[:, None]
    panels = {
        "prompt": examples.bounds[:, 1] - examples.bounds[:, 0],
        "answer": answers.ravel(),
        "prompt with answer": (examples.lengths() - examples.unseen[:, None]).ravel(),
        "learned": examples.learned_counts,
    }
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    for i, (title, values) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), i)
        axes.hist(values, bins=min(40, max(int(values.max(initial=1)), 1)), color="#4878a8")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    return figure


def _row(place: str, became: str, spans: list[list[str]]) -> str:
    told = []
    for text, state in spans:
        if state == "side":
            told.append(f"\n<b>{html.escape(text)}</b> ")
        elif text:
            told.append(f'<span class="{state}">{html.escape(text)}</span>')
    head = f'<span class="place">{html.escape(place)}: {html.escape(became)}</span>\n'
    return f'<div class="row">{head}{"".join(told)}</div>'


def terminal(account: Account, *, rows: int, colour: bool) -> str:
    """A few rows for a terminal; without colour, tokens that are learned stand in brackets."""
    lines = []
    for place, became, spans in account.shown[:rows]:
        line, last = "", ""
        for text, state in [*spans, ["", ""]]:
            if not colour and "trained" in (state, last) and state != last:
                line += "[" if state == "trained" else "]"
            last = state
            if state == "side":
                line += f"\n  {text}: "
            elif text:
                line += f"\x1b[{STATES[state][1]}m{text}\x1b[0m" if colour else text
        lines.append(f"{place}: {became}\n  {line}")
    return "\n".join(lines)
