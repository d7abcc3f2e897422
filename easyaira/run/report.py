"""report.html of a run: curves, answers at every evaluation, configuration."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup

from easyaira import pages, plots
from easyaira.files import write_file
from easyaira.run import closing, hacking
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
    ("reward of answers", ("reward", "reward_std", "eval_reward")),
    ("losses of policy and values", ("policy_loss", "value_loss")),
    ("variance that the values explain", ("value_explained_variance",)),
    ("prompts whose answers all scored the same", ("frac_reward_zero_std",)),
    ("divergence from the reference", ("objective/kl",)),
    ("length of answers", ("completions/mean_length",)),
    ("share of answers that were cut", ("completions/clipped_ratio",)),
    ("balance of experts", ("router_aux_loss", "eval_router_aux_loss")),
    ("entropy", ("entropy",)),
    ("share of clipped ratios", ("clip_ratio/region_mean",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
)
SHOWN_UPDATES = 6  # rollouts whose answers are shown
# By the end of a metric's name; other held-out ones: c2
COLOURS = {"chosen": "c3", "rejected": "c4", "reward_std": "c2", "value_loss": "c2"}
COLOURS |= {"eval_auc": "c3", "eval_reward": "c3"}
BODY = """{% if running %}<p class="warning">{{ running }}</p>
{% endif %}{% if warnings %}<h2>What looks wrong</h2>
{% for warning in warnings %}<p class="warning">{{ warning }}.</p>
{% endfor %}{% endif %}<div class="figures">
{% for name, value in figures %}<div><b>{{ value }}</b><span>{{ name }}</span></div>
{% endfor %}</div>
<p>{% for name, place in links %}<a href="{{ place }}">{{ name }}</a>{{ " · " if not loop.last }}
{%- endfor %}</p>
<p class="quiet"><code>tensorboard --logdir {{ folder }}</code></p>
{{ table([], facts) }}
<h2>Curves</h2>
<div class="plots">{% for panel in curves %}{{ panel }}{% endfor %}</div>
{% if samples %}<h2>Answers to held-out prompts</h2>
{% for prompt, wanted, answers in samples %}<div class="card"><p><b>{{ prompt }}</b></p>
<p class="quiet">wanted: {{ wanted }}</p>
{% for when, text in answers -%}
<p><span class="quiet">{{ when }}:</span> {{ text or "(nothing)" }}</p>
{% endfor %}</div>
{% endfor %}{% endif %}{% if completions %}<h2>Answers in training and their rewards</h2>
<div class="wide">{{ table(["update", "prompt", "answer", "reward"], completions) }}</div>
{% endif %}<h2>Configuration</h2>
{{ table([], changed) }}
<details><summary>All options</summary><pre>{{ config }}</pre></details>"""
LINKS = {  # what a run folder may hold
    "released model": "hf",
    "model card": "hf/README.md",
    "data report": "data_report.html",
    "metrics": "metrics.jsonl",
    "configuration": "config.yaml",
}
RELOAD = 30  # seconds


class AtMostEvery:
    """Calls a function unless it was called less than `seconds` ago."""

    def __init__(self, seconds: float, function: Callable[[], None]):
        self.seconds, self.function, self.last = seconds, function, -math.inf

    def __call__(self) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.function()
            self.last = time.monotonic()


def curves(
    rows: Sequence[Mapping[str, Any]], last: int, schedule: plots.Points = ()
) -> list[Markup]:
    """Panels of a metrics.jsonl, from update 0 to `last`; only logged metrics get one.

    Args:
        schedule: (update, learning rate) of the whole run; default: those that were logged.
    """
    panels = []
    matches = (re.fullmatch("rewards/(.+)/mean", name) for row in rows for name in row)
    rewards = {f"reward by {match[1]}": match[0] for match in matches if match}
    for title, names in (*PANELS, *((of, (name, f"eval_{name}")) for of, name in rewards.items())):
        series: dict[str, plots.Points] = {}
        for name in names:
            points = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
            if points:
                series[name] = points
        if series and title == "learning rate" and schedule:
            series = {"schedule": schedule} | series
        if series:
            panels.append(plots.curves(title, series, max(last, 1), [*map(_colour, series)]))
    return panels


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _colour(name: str) -> str:
    other = "c2" if name.startswith("eval_") or name == "schedule" else "c1"
    return COLOURS.get(name.rpartition("/")[2], other)


def write(
    folder: Path,
    *,
    title: str,
    figures: Mapping[str, Any] = {},
    facts: Mapping[str, Any],
    samples: tuple[Sequence[str], Sequence[Sequence[str]]],
    completions: Sequence[Mapping[str, Any]] = (),
    changed: Mapping[str, Any] = {},
    last: int = 0,
    schedule: plots.Points = (),
    signs: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, str]] = hacking.warnings,
) -> Mapping[str, str]:
    """Write report.html into a run folder, from its metrics.jsonl and config.yaml. The page reloads
    itself until the run has ended.

    Args:
        figures: name -> value, shown large at the top; those of the metrics follow.
        facts: name -> value, for a table.
        samples: head and rows of the table of answers: prompt, wanted answer, one column for each
            evaluation.
        completions: rows of a completions.jsonl; those of a few updates are shown.
        changed: options that differ from their defaults.
        last: number of updates of the run; 0: those that were logged.
        schedule: see `curves`.
        signs: rows of the metrics -> sentences about what looks wrong, by the name of the sign.

    Returns:
        those sentences.
    """
    rows = log.read(folder / "metrics.jsonl")
    done = max((row["step"] for row in rows), default=0)
    going = done < last
    measured = {words: change.replace("->", "→") for words, change in closing.measured(rows)}
    head, answers = samples
    warnings = signs(rows)
    content = pages.page(
        title,
        BODY,
        reload=RELOAD if going else 0,
        running=f"Update {done:,} of {last:,}; written at the newest evaluation." if going else "",
        figures=[*measured.items(), *_spent(rows), *figures.items()],
        links=[(name, place) for name, place in LINKS.items() if (folder / place).exists()],
        folder=folder,
        warnings=list(warnings.values()),
        facts=facts.items(),
        curves=curves(rows, last or done, schedule),
        samples=[
            (prompt, wanted, list(zip(head[2:], texts, strict=True)))
            for prompt, wanted, *texts in answers
        ],
        completions=list(_spread(completions)),
        changed=changed.items(),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
    )
    write_file(folder / "report.html", content)
    return warnings


def _spent(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Time in updates, and their tokens, by the rows of a metrics.jsonl."""
    logged = [row for row in rows if _is_number(row.get("step_time"))]
    if logged:
        steps = [0, *(row["step"] for row in logged)]
        seconds = sum(
            row["step_time"] * (step - before)
            for row, before, step in zip(logged, steps, steps[1:], strict=False)
        )
        yield "time in updates", str(timedelta(seconds=round(seconds)))
        yield "tokens", f"{logged[-1]['num_tokens']:,}"


def _spread(completions: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Completions of at most SHOWN_UPDATES updates, evenly spread, as rows of a table."""
    updates = sorted({row["update"] for row in completions})
    last = len(updates) - 1
    shown = {
        updates[i * last // max(SHOWN_UPDATES - 1, 1)] for i in range(SHOWN_UPDATES) if updates
    }
    for row in completions:
        if row["update"] in shown:
            reward = row.get("reward", "")
            texts = [row.get(name, "") for name in ("update", "prompt", "completion")]
            yield [*texts, f"{reward:.4g}" if _is_number(reward) else reward]
