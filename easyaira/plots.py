"""Line plots and histograms as SVG elements that follow the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from easyaira.pages import render

WIDTH, HEIGHT = 360, 190  # of the drawing
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # margins
TICKS = 4
Points = Sequence[tuple[float, float]]

PLOT = """<figure><figcaption><strong>{{ title }}</strong>
{% for name, colour, last in legend %} <span class="{{ colour }}">{{ name }} {{ last }}</span>
{% endfor %}</figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}">
{% for x, y, anchor, text in labels %}<text x="{{ x }}" y="{{ y }}" text-anchor="{{ anchor }}">
{{- text }}</text>{% endfor %}
{% for y in lines %}<path class="grid" d="M{{ left }} {{ y }}H{{ width - right }}"/>{% endfor %}
{% for kind, colour, shape in shapes %}<path class="{{ kind }} {{ colour }}" d="{{ shape }}"/>
{% endfor %}</svg></figure>"""


def curves(title: str, series: Mapping[str, Points], last: float, colours: Sequence[str]) -> Markup:
    """A panel of lines over the updates of a run, with the last value of each in its legend.

    Args:
        series: name -> (update, value), both finite.
        last: update at the right end; the left end is 0.
        colours: CSS class of each line.
    """
    values = [value for points in series.values() for _, value in points]
    low, high = _wide(min(values), max(values))

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    shapes = []
    for points, colour in zip(series.values(), colours, strict=True):
        places = [f"{x(step):.1f} {y(value):.1f}" for step, value in points]
        shapes.append(("line", colour, "M" + "L".join(places)))
        if len(places) < 25:
            shapes.append(("dots", colour, "".join(f"M{place}h0" for place in places)))
    ends = [points[-1][1] for points in series.values()]
    legend = [
        (name, colour, f"{end:.4g}")
        for name, colour, end in zip(series, colours, ends, strict=True)
    ]
    return _plot(title, legend, (0, last), ticks(low, high), x, y, shapes)


def histogram(title: str, parts: Mapping[str, Mapping[int, int]], mark: int | None) -> Markup:
    """Counts of whole numbers, stacked, with a line after `mark`.

    Args:
        parts: CSS class -> number -> its count.
        mark: the last number before a dashed line; None: no line.
    """
    largest = max([mark or 1, *(number for part in parts.values() for number in part)])
    step = max(1, math.ceil((largest + 1) / 40))  # numbers in a bar
    bars: dict[str, dict[int, int]] = {}
    for name, part in parts.items():
        bars[name] = {}
        for value, count in part.items():
            bars[name][value // step] = bars[name].get(value // step, 0) + count
    heights: dict[int, int] = {}
    for part in bars.values():
        for bar, count in part.items():
            heights[bar] = heights.get(bar, 0) + count
    last, high = (largest // step + 1) * step, max(heights.values(), default=1)

    def x(value: float) -> float:
        return LEFT + value / last * (WIDTH - LEFT - RIGHT)

    def y(count: float) -> float:
        return TOP + (high - count) / high * (HEIGHT - TOP - BOTTOM)

    shapes, below = [], dict.fromkeys(heights, 0)
    for name, part in bars.items():
        shape = ""
        for bar, count in sorted(part.items()):
            left, right = x(bar * step), x((bar + 1) * step) - 0.5
            top, bottom = y(below[bar] + count), y(below[bar])
            shape += f"M{left:.1f} {bottom:.1f}V{top:.1f}H{right:.1f}V{bottom:.1f}Z"
            below[bar] += count
        shapes.append(("bar", name, shape))
    if mark is not None:
        shapes.append(("mark", "", f"M{x(mark + 1):.1f} {TOP}V{HEIGHT - BOTTOM}"))
    return _plot(title, [], (0, last), [tick for tick in ticks(0, high) if tick >= 1], x, y, shapes)


def _plot(title, legend, ends, heights, x, y, shapes) -> Markup:
    labels = [(LEFT - 4, f"{y(tick) + 3:.1f}", "end", number(tick)) for tick in heights]
    places = [tick for tick in ticks(*ends) if tick <= ends[1] and tick == int(tick)]
    labels += [(f"{x(tick):.1f}", HEIGHT - 6, "middle", number(tick)) for tick in places]
    return render(
        PLOT,
        title=title,
        legend=legend,
        labels=labels,
        lines=[f"{y(tick):.1f}" for tick in heights],
        shapes=shapes,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
    )


def _wide(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if low == high:
        room = abs(low) / 10 or 1.0
        return low - room, high + room
    return low - (high - low) / 20, high + (high - low) / 20


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers in a range."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """At most four digits: 12,345 and 0.0123 and 1e-05."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
