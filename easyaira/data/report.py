"""Reports of the data: data_report.json, data_report.html, and coloured rows in a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from easyaira import pages
from easyaira.data.dataset import Data
from easyaira.data.examples import Account, Examples
from easyaira.errors import escaped
from easyaira.files import write_file

FILES = ("data_report.json", "data_report.html")

STATES = {  # state of a token: (colour on the page, colours in a terminal, meaning)
    "trained": ("#cdebd0", "30;42", "trained on"),
    "masked": ("#eeeeee", "37;100", "seen, not trained on"),
    "cut": ("#f6cccc", "30;41", "cut off or dropped"),
}
BODY = """<style>
.row { white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 1px solid #ddd; }
.row { padding: .6rem 0; font-size: .9rem; }
.row span { border-right: 1px solid #fff8; border-radius: 2px; } .place { color: #666; }
{% for state, (colour, _, _) in states.items() %}.{{ state }} { background: {{ colour }}; }
{% endfor %}</style>
{% for section in sections %}<h2>{{ section.name }}</h2>
{{ table(["", ""], section.facts) }}
{% if section.dropped %}<h3>Dropped rows</h3>
{{ table(["reason", "rows", "first row"], section.dropped) }}
{% endif %}<h3>Lengths in tokens</h3>
{{ section.lengths }}
{% endfor %}<h2>Rows</h2>
<p class="row">{% for state, (_, _, meaning) in states.items() -%}
<span class="{{ state }}">{{ meaning }}</span> {% endfor %}</p>
{% for place, outcome, spans in rows -%}
<div class="row"><span class="place">{{ place }}: {{ outcome }}</span>
{% for text, state in spans -%}
{% if state == "side" %}
<b>{{ text }}</b> {% elif text %}<span class="{{ state }}">{{ text }}</span>{% endif %}
{%- endfor %}</div>
{% endfor %}"""


def write(folder: Path, data: Data) -> None:
    """Write both files to an existing folder."""
    text = json.dumps(data.report, indent=2, ensure_ascii=False) + "\n"
    write_file(folder / FILES[0], text)
    write_file(folder / FILES[1], page(data))


def page(data: Data) -> str:
    """Content of data_report.html: counts, histograms of lengths, and rows of coloured tokens."""
    sections = []
    for name, examples in {"train": data.train, "held out": data.held_out}.items():
        if examples is None:
            continue
        account, dropped = data.accounts.get(name), []
        if account is not None:
            dropped = [(why, n, account.first_dropped[why]) for why, n in account.dropped.items()]
        sections.append(
            {
                "name": name,
                "facts": facts(data.report[name]).items(),
                "dropped": dropped,
                "lengths": pages.svg(histograms(examples)),
            }
        )
    rows = [
        (
            escaped(place),
            escaped(outcome),
            [(escaped(text, keep="\n\t"), state) for text, state in spans],
        )
        for account in data.accounts.values()
        for place, outcome, spans in account.shown
    ]
    return pages.page("Data report", BODY, states=STATES, sections=sections, rows=rows)


def facts(part: dict[str, Any]) -> dict[str, Any]:
    """Format a part of the report as rows of a table."""
    lines: dict[str, Any] = {}
    for name, value in part.items():
        if name in ("dropped", "first_dropped"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {n:,}" for key, n in value.items())
        lines[name.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else value or "-"
    if part.get("read"):
        lines["dropped"] = sum(part["dropped"].values())
    return lines


def histograms(examples: Examples) -> Any:
    """Histograms of the lengths of prompts, answers and examples, and of learned tokens."""
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


def terminal(account: Account, *, rows: int, colour: bool) -> str:
    """The first rows for a terminal; without colour, tokens with loss are in brackets."""
    lines = []
    for place, outcome, spans in account.shown[:rows]:
        line, last = "", ""
        for text, state in [*spans, ["", ""]]:
            text = escaped(text, keep="\n\t")
            if not colour and "trained" in (state, last) and state != last:
                line += "[" if state == "trained" else "]"
            last = state
            if state == "side":
                line += f"\n  {text}: "
            elif text:
                line += f"\x1b[{STATES[state][1]}m{text}\x1b[0m" if colour else text
        lines.append(f"{escaped(f'{place}: {outcome}')}\n  {line}")
    return "\n".join(lines)
