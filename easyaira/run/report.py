"""report.html of a run: curves, answers before and after training, configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyaira import pages
from easyaira.files import write_file
from easyaira.train import log

PANELS = (  # title, and metrics that share an axis
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
BODY = """{{ table(["", ""], facts) }}
<h2>Curves</h2>
{{ curves }}
{% if samples %}<h2>Answers to held-out prompts</h2>
{{ table(columns, samples) }}
{% endif %}<h2>Configuration</h2>
<pre>{{ config }}</pre>"""


def figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Matplotlib figure of the curves of a metrics.jsonl; only logged metrics get a panel."""
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
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    for i, (title, names) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
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
    return figure


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
        samples: one dictionary per prompt; their keys are the columns of the table.
    """
    columns = list(dict.fromkeys(column for sample in samples for column in sample))
    content = pages.page(
        title,
        BODY,
        facts=facts.items(),
        curves=pages.svg(figure(log.read(folder / "metrics.jsonl"))),
        columns=columns,
        samples=[[sample.get(column, "") for column in columns] for sample in samples],
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
    )
    write_file(folder / "report.html", content)
