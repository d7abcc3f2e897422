"""Plots and the page around them: what is drawn where, and in which colours."""

import re
from pathlib import Path

import pytest

from easyaira import pages, plots
from easyaira.config.run import TrainSFT, changed
from easyaira.run import report


def places(shape):
    return [tuple(map(float, place)) for place in re.findall(r"([\d.]+) ([\d.]+)", shape)]


def test_lines_begin_at_update_0_and_end_at_the_last():
    points = [(10, 3.0), (20, 1.0), (40, 2.0)]
    panel = plots.curves("loss", {"loss": points}, 40, ["c1"])
    (shape,) = re.findall(r'class="line c1" d="([^"]*)"', panel)
    across = plots.WIDTH - plots.LEFT - plots.RIGHT
    xs, ys = zip(*places(shape), strict=True)
    assert xs == pytest.approx([plots.LEFT + step / 40 * across for step, _ in points], abs=0.06)
    assert ys[0] == min(ys) and ys[1] == max(ys)  # the y axis points up
    assert ">loss 2</span>" in panel and ">0</text>" in panel and ">40</text>" in panel


def test_a_constant_line_and_a_single_point_are_drawn():
    for points in ([(0, 0.0)], [(0, 5.0), (3, 5.0)], [(0, -1e-9)]):
        assert "NaN" not in (panel := plots.curves("x", {"x": points}, 3, ["c1"]))
        assert 'class="dots c1"' in panel


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 5, 10]),
        (0, 12, [0, 5, 10]),
        (0, 4, [0, 1, 2, 3, 4]),
        (0.1, 0.35, [0.1, 0.2, 0.3]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert plots.ticks(low, high) == pytest.approx(expected)


def test_bars_of_a_histogram_hold_whole_numbers_and_stack():
    panel = plots.histogram("n", {"whole": {3: 2, 4: 1}, "lost": {4: 3}}, 5)
    (whole,) = re.findall(r'class="bar whole" d="([^"]*)"', panel)
    (lost,) = re.findall(r'class="bar lost" d="([^"]*)"', panel)
    assert whole.count("Z") == 2 and lost.count("Z") == 1
    base, top = plots.HEIGHT - plots.BOTTOM, plots.TOP
    heights = [float(v) for v in re.findall(r"V([\d.]+)H", whole)]
    unit = (base - top) / 4  # the highest bar holds four
    assert heights == pytest.approx([base - 2 * unit, base - unit], abs=0.06)
    assert float(re.findall(r"V([\d.]+)H", lost)[0]) == pytest.approx(top, abs=0.06)
    assert re.search(r'class="mark " d="M[\d.]+ ', panel)


def test_a_page_has_a_dark_side_and_asks_nobody():
    page = pages.page("t", "{{ table([], [('<b>', 1)]) }}")
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert not re.search(r"//|@import|url\(|http-equiv", page) and "&lt;b&gt;" in page
    assert '<meta http-equiv="refresh" content="30">' in pages.page("t", "", reload=30)


def test_a_report_of_a_run_that_goes_on_says_so_and_reloads(tmp_path):
    lines = [
        '{"step": 0, "eval_loss": 3.0}',
        '{"step": 4, "loss": 2.1, "step_time": 2.0, "num_tokens": 900}',
        '{"step": 10, "loss": 2.0, "step_time": 15.0, "num_tokens": 2500, "eval_loss": 2.5}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    given = {"title": "t", "facts": {}, "samples": ([], [])}
    report.write(tmp_path, **given, last=40, schedule=[(0, 0.0), (40, 1.0)])
    page = (tmp_path / "report.html").read_text()
    assert "Update 10 of 40" in page and 'content="30"' in page and "3 → 2.5" in page
    assert 'href="hf"' not in page  # not released yet
    assert "0:01:38" in page and "2,500" in page  # 4 updates of 2 s and 6 of 15 s
    report.write(tmp_path, **given, last=10)
    assert "http-equiv" not in (tmp_path / "report.html").read_text()


def test_reports_keep_their_distance_in_time(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    every = report.AtMostEvery(20, lambda: calls.append(now[0]))
    for now[0] in (1.0, 21.0, 30.0, 42.0):
        every()
    assert calls == [1.0, 21.0, 42.0]


def test_the_options_that_differ_from_their_defaults():
    from easyaira import cli

    argv = ["--model.name_or_path=m", "--data.train=d", "--seed=42", "--optimizer.weight_decay=0.1"]
    config, _ = cli.parse(TrainSFT, [*argv, "--lora.target_modules=all-linear"])
    differing = changed(config)
    assert differing.pop("lora")["target_modules"] == "all-linear"
    assert differing == {
        "model.name_or_path": "m",
        "data.train": "d",
        "optimizer.weight_decay": 0.1,
    }
    assert Path(config.output_dir).name == "run"


def test_curves_of_a_panel_differ_in_colour():
    for _, names in report.PANELS:
        assert len({report._colour(name) for name in names}) == len(names), names
