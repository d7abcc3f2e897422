"""Reports of the data: data_report.json, data_report.html, and coloured rows in a terminal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from easyaira import pages, plots
from easyaira.data.dataset import Data
from easyaira.data.examples import Account, Examples
from easyaira.data.shown import KEPT
from easyaira.errors import escaped
from easyaira.files import write_file

FILES = ("data_report.json", "data_report.html")

STATES = {  # state of a token: (colours in a terminal, meaning)
    "trained": ("30;42", "trained on"),
    "masked": ("37;100", "seen, not trained on"),
    "cut": ("30;41", "cut off or dropped"),
}
BODY = """<style>
.row { white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 1px solid var(--rule); }
.row { padding: .6rem 0; font-size: .9rem; } .place { color: var(--quiet); }
.row span { border-radius: 2px; } .row span:hover { outline: 1px solid var(--ink); }
{% for state in states %}.{{ state }} { background: var(--{{ state }}); }
{% endfor %}input { font: inherit; width: 100%; box-sizing: border-box; padding: .4rem; }
</style>
<p><a href="report.html">the run's report</a> (while it trains and after it) ·
<a href="data_report.json">these counts as JSON</a></p>
{% for section in sections %}<h2>{{ section.name }}</h2>
{{ table([], section.facts) }}
{% if section.dropped %}<h3>Dropped rows</h3>
{{ table(["reason", "rows", "first row"], section.dropped) }}
{% endif %}<h3>Lengths in tokens</h3>
<div class="plots">{% for panel in section.lengths %}{{ panel }}{% endfor %}</div>
<p class="quiet">The dashed line is max_length, {{ section.mark }} tokens.{% if section.cut %} Rows
that were cut are red, at their length before the cut.{% endif %}</p>
{% endfor %}<h2>Rows</h2>
<p>A random sample of each source, and rows that were changed or dropped. Hover over a token for its
id.</p>
<p class="row">{% for state, (_, meaning) in states.items() -%}
<span class="{{ state }}">{{ meaning }}</span> {% endfor %}</p>
<p><input id="search" type="search" placeholder="Search these rows" aria-label="Search"></p>
{% for place, outcome, spans in rows -%}
<div class="row"><span class="place">{{ place }}: {{ outcome }}</span>
{% for text, state, id in spans -%}
{% if state == "side" %}
<b>{{ text }}</b> {% elif text -%}
<span class="{{ state }}" title="{{ id }}, {{ states[state][1] }}">{{ text }}</span>{% endif %}
{%- endfor %}</div>
{% endfor %}<script>
document.getElementById("search").oninput = (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const row of document.querySelectorAll("div.row"))
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
};
</script>"""


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
                "lengths": histograms(examples, account, data.report["recipe"]["max_length"]),
                "cut": bool(account and account.cut),
                "mark": f"{data.report['recipe']['max_length']:,}",
            }
        )
    rows = [
        (
            escaped(place),
            escaped(_outcome(outcome, name)),
            [(escaped(text, keep="\n\t"), state, token) for text, state, token in spans],
        )
        for name, account in data.accounts.items()
        for place, outcome, spans in account.shown
    ]
    return pages.page("Data report", BODY, states=STATES, sections=sections, rows=rows)


def facts(part: dict[str, Any]) -> dict[str, Any]:
    """Format a part of the report as rows of a table."""
    lines: dict[str, Any] = {}
    for name, value in part.items():
        if name == "first_dropped":
            continue
        if name == "dropped":  # a table of its own has the reasons
            value = sum(value.values())
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {n:,}" for key, n in value.items())
        lines[name.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else value or "-"
    return lines


def _outcome(outcome: str, part: str) -> str:
    """Outcome of a row of this part; rows of data.eval are evaluated, not trained on."""
    return outcome.replace(KEPT, "evaluated", 1) if part == "held out" else outcome


def histograms(examples: Examples, account: Account | None, max_length: int) -> list[Markup]:
    """Panels of the lengths of prompts, answers and examples, and of learned tokens.

    Args:
        account: counts of the rows, and lengths of those that were cut; None if unknown.
        max_length: of an example.
    """
    exists, unseen = examples.exists, examples.unseen[:, None]
    answers = (np.diff(examples.bounds[:, 1:]) - unseen)[exists]
    lengths = Counter((examples.lengths() - unseen)[exists].tolist())
    panels = {
        "prompt": Counter((examples.bounds[:, 1] - examples.bounds[:, 0]).tolist()),
        "answer": Counter(answers.tolist()),
        "prompt with answer": lengths,
        "learned": Counter(examples.learned_counts.tolist()),
    }
    if panels["learned"] == panels["answer"]:
        del panels["learned"]
    drawn = [
        plots.histogram(title, {"whole": counts}, max_length if counts is lengths else None)
        for title, counts in panels.items()
    ]
    if account and account.cut:
        whole = lengths - Counter({max_length: account.cut.total()})
        parts = {"whole": whole, "lost": account.cut}
        drawn.append(plots.histogram("prompt with answer, before the cut", parts, max_length))
    return drawn


def terminal(account: Account, *, rows: int, colour: bool, part: str = "train") -> str:
    """Some of the rows of a part, evenly spread, for a terminal; without colour, tokens with loss
    are in brackets."""
    lines = []
    for place, outcome, spans in account.shown[:: -(-len(account.shown) // rows) or 1]:
        line, last = "", ""
        for text, state, _ in [*spans, ["", "", None]]:
            text = escaped(text, keep="\n\t")
            if not colour and "trained" in (state, last) and state != last:
                line += "[" if state == "trained" else "]"
            last = state
            if state == "side":
                line += f"\n  {text}: "
            elif text:
                line += f"\x1b[{STATES[state][0]}m{text}\x1b[0m" if colour else text
        lines.append(f"{escaped(f'{place}: {_outcome(outcome, part)}')}\n  {line}")
    return "\n".join(lines)
