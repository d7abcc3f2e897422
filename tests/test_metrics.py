"""Rates and totals of metrics.jsonl."""

import json
import time
from types import SimpleNamespace

import pytest

from easyaira.train.metrics import Window


def test_positions_are_totals_and_cpu_time_is_of_the_window():
    window = Window()
    for wanted in (1, 2):
        start = time.process_time()
        while time.process_time() < start + 0.02:
            pass
        batch = SimpleNamespace(positions=128, filled=100, num_tokens=90)
        window.add({}, batch, 0.0, timed=True)
        row = window.take(time.perf_counter())
        assert (row["positions"], row["num_tokens"]) == (128 * wanted, 90 * wanted)
        assert row["cpu_time"] == pytest.approx(time.process_time() - start, abs=0.01)
    assert Window(json.loads(json.dumps(window.to_save()))).positions == 256  # a resumed run
