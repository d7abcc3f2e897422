"""Figures as a table and as a bar chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with the keys as header; None is printed as -."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3f}"
        return "-" if value is None else f"{value}"

    names = list(rows[0])
    cells = [[cell(value) for value in row.values()] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(names, *cells, strict=True)]
    texts = [isinstance(value, str) for value in rows[0].values()]
    for line in (names, *cells):
        aligned = zip(line, widths, texts, strict=True)
        print("  ".join(c.ljust(w) if text else c.rjust(w) for c, w, text in aligned), flush=True)


def bars(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Draw tokens per CPU second of each side, labelled with its ratio to the first."""
    heights = [row["tokens/CPU s"] for row in rows]
    labels = [f"{height:,.0f}" for height in heights]
    if len(rows) > 1:
        labels = [
            f"{label}  ({row['speed, first = 1']:.2f} x)"
            for label, row in zip(labels, rows, strict=True)
        ]
    axes = _chart([row["side"] for row in rows], heights, labels, title)
    axes.set_xlabel("real tokens per CPU second (a prompt counts once with each answer)")
    axes.figure.savefig(file, dpi=150)


def ratios(values: Mapping[str, float], title: str, file: Path) -> None:
    """Draw the ratio of each name, beside a line at 1."""
    axes = _chart(list(values), list(values.values()), [f"{x:.2f}" for x in values.values()], title)
    axes.axvline(1, color="0.4", linewidth=1)
    axes.figure.savefig(file, dpi=150)


def _chart(names: list[str], heights: list[float], labels: list[str], title: str) -> Any:
    """Axes of a bar chart, first name on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.3 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(names, heights, height=0.65), labels, padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(heights))
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return axes
