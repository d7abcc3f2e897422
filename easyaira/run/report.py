"""report.html of a run: curves, answers at every evaluation, configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyaira import pages
from easyaira.files import write_file
from easyaira.run import hacking
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
    ("reward of answers", ("reward", "reward_std")),
    ("losses of policy and values", ("policy_loss", "value_loss")),
    ("variance that the values explain", ("value_explained_variance",)),
    ("prompts whose answers all scored the same", ("frac_reward_zero_std",)),
    ("divergence from the reference", ("objective/kl",)),
    ("length of answers", ("completions/mean_length",)),
    ("share of answers that were cut", ("completions/clipped_ratio",)),
    ("entropy", ("entropy",)),
    ("share of clipped ratios", ("clip_ratio/region_mean",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
)
SHOWN_UPDATES = 6  # whose answers are shown
BODY = """{{ table(["", ""], facts) }}
{% for warning in warnings %}<p class="warning">{{ warning }}.</p>
{% endfor %}<h2>Curves</h2>
{{ curves }}
{% if samples[1] %}<h2>Answers to held-out prompts</h2>
<div class="wide">{{ table(*samples) }}</div>
{% endif %}{% if completions %}<h2>Answers in training and their rewards</h2>
{{ table(["update", "prompt", "answer", "reward"], completions) }}
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
    samples: tuple[Sequence[str], Sequence[Sequence[str]]],
    completions: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write report.html into a run folder, from its metrics.jsonl and config.yaml.

    Args:
        facts: name -> value, for the table at the top.
        samples: head and rows of the table of answers.
        completions: rows of a completions.jsonl; those of a few updates are shown.
    """
    rows = log.read(folder / "metrics.jsonl")
    content = pages.page(
        title,
        BODY,
        facts=facts.items(),
        curves=pages.svg(figure(rows)),
        warnings=hacking.warnings(rows),
        samples=samples,
        completions=list(_spread(completions)),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
    )
    write_file(folder / "report.html", content)


def _spread(completions: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Those of at most SHOWN_UPDATES updates, evenly spread, as rows of a table."""
    updates = sorted({row["update"] for row in completions})
    last = len(updates) - 1
    shown = {
        updates[i * last // max(SHOWN_UPDATES - 1, 1)] for i in range(SHOWN_UPDATES) if updates
    }
    for row in completions:
        if row["update"] in shown:
            yield [row.get(name, "") for name in ("update", "prompt", "completion", "reward")]
