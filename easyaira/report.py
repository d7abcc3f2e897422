"""The page of a run: curves, answers before and after, and what was run, in one file."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyaira import metrics
from easyaira.files import write_file

PANELS = (  # a title, and the metrics that share an axis
    ("loss", ("loss", "eval_loss")),
    ("token accuracy", ("mean_token_accuracy", "eval_mean_token_accuracy")),
    ("accuracy of scores", ("accuracy", "eval_accuracy", "eval_auc")),
    ("margin of scores", ("margin", "eval_margin")),
    ("reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("rewards", ("rewards/chosen", "rewards/rejected")),
    ("log-probabilities", ("logps/chosen", "logps/rejected")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
)

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .6rem; }}
th, td {{ border-bottom: 1px solid #ddd; }}
th {{ font-weight: 600; white-space: nowrap; }}
td.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
svg {{ max-width: 100%; height: auto; }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The curves of a metrics.jsonl as a matplotlib figure, a panel for each that was logged."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    series = {}
    for name in {name for _, names in PANELS for name in names}:
        points = [(r["step"], r[name]) for r in rows if isinstance(r.get(name), (int, float))]
        if points:
            series[name] = points
    panels = [(title, [n for n in names if n in series]) for title, names in PANELS]
    panels = [(title, names) for title, names in panels if names]
    columns = min(3, max(len(panels), 1))
    lines = -(-max(len(panels), 1) // columns)
    drawn = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    for i, (title, names) in enumerate(panels):
        axes = drawn.add_subplot(lines, columns, i + 1)
        for name in names:
            steps, values = zip(*series[name], strict=True)
            axes.plot(
                steps, values, marker="o" if len(steps) < 25 else "", markersize=3, label=name
            )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    return drawn


def svg(drawn: Any) -> str:
    """A matplotlib figure as an element of a page."""
    text = io.StringIO()
    drawn.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; every cell is text, whatever it holds."""
    cells = "".join(f"<th>{html.escape(str(name))}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="text">{html.escape(str(cell))}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def page(title: str, *parts: str) -> str:
    """A whole HTML document."""
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def write(
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
) -> None:
    """Write report.html into a run folder, from its metrics.jsonl and config.yaml.

    Args:
        facts: name -> value, for the table at the top.
        samples: one dictionary per prompt, with the same keys: the columns of the table of answers.
    """
    rows = metrics.read(folder / "metrics.jsonl")
    parts = [table(("", ""), list(facts.items())), "<h2>Curves</h2>", svg(figure(rows))]
    if samples:
        columns = list(samples[0])
        cells = [[sample[column] for column in columns] for sample in samples]
        parts += ["<h2>Answers to held-out prompts</h2>", table(columns, cells)]
    config = (folder / "config.yaml").read_text()
    parts += ["<h2>Configuration</h2>", f"<pre>{html.escape(config)}</pre>"]
    write_file(folder / "report.html", page(title, *parts))
