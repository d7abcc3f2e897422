"""Rates and totals of metrics.jsonl."""

import errno
import json
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from easyaira.errors import StorageError
from easyaira.run import closing
from easyaira.train import log
from easyaira.train.energy import Used
from easyaira.train.metrics import Window
from easyaira.train.record import Record
from easyaira.train.trackers import Trackers


def burn(seconds):
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass


def test_positions_are_totals_and_cpu_time_is_of_the_window():
    window = Window()
    for wanted in (1, 2):
        start = time.process_time()
        burn(0.02)
        batch = SimpleNamespace(positions=128, filled=100, num_tokens=90)
        window.add({}, batch, 0.0, timed=True)
        row = window.take(time.perf_counter(), time.process_time())
        assert (row["positions"], row["num_tokens"]) == (128 * wanted, 90 * wanted)
        assert row["cpu_time"] == pytest.approx(time.process_time() - start, abs=0.01)
    assert Window(json.loads(json.dumps(window.to_save()))).positions == 256  # a resumed run


def test_an_update_that_is_compiled_is_not_timed_and_has_its_own_cpu_time():
    """Rows are written one update late; each had the CPU time of the update after it.

    On a busy machine, the thread that notes the end of an update may do so a little later."""
    rows = {}
    shown = SimpleNamespace(stage=print, advance=print, write=rows.__setitem__)
    options = {"facts": {}, "schedule": np.float32, "flops": 1.0, "peak": None}
    options |= {"start": 0, "every": 1, "until": 4, "latest": lambda: None}
    record = Record(shown, Window(), range(10), **options)
    for number, shape in enumerate("aabb"):
        batch = SimpleNamespace(shape=shape, positions=1, filled=1, num_tokens=1)
        ready = SimpleNamespace(batch=batch, waited=0.0)
        record.before_step(number, ready)
        burn(0.01 if shape in record.shapes else 0.3)
        sums = {"loss": (jnp.float32(1), jnp.float32(1)), "failed": (jnp.int32(-1), 1)}
        record.update(number + 1, ready, sums)
        record.resume()
    record.pause()
    record.resume()
    assert [rows[n]["compilations"] for n in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert [rows[n]["step_time"] for n in (1, 3)] == [None, None]
    for n in (2, 4):
        assert 0.01 <= rows[n]["step_time"] < 0.2 and 0.01 <= rows[n]["cpu_time"] < 0.2
        assert rows[n - 1]["cpu_time"] > 0.2  # of 0.3


ROW = {"loss": 0.69314, "learning_rate": 1.8e-5, "grad_norm": 4.43, "tokens_per_second": 1023.4}
ROW |= {"step_time": 2.0, "mfu": None, "kernel": "xla", "rewards/margins": 0.1}


def test_a_line_of_the_log_fits_80_columns_and_says_what_is_left():
    held_out = {f"eval_{name}": 0.123456 for name in ("loss", *log.MORE)}
    first, *rest = log.lines(9000, 9930, ROW | held_out)
    assert first == (
        "step 9000: loss 0.6931, lr 1.8e-05, grad norm 4.43, 1,023 tokens/s, 0:31:00 left"
    )
    assert rest[0] == "      margin 0.1"
    assert rest[1].startswith("      held out: loss 0.1235, reward accuracy 0.1235")
    assert len(rest) > 2 and max(map(len, (first, *rest))) <= 80
    assert list(log.lines(0, 9, {"eval_loss": 2.0})) == ["step 0: held out: loss 2"]
    assert list(log.lines(9, 9, {"loss": 1.0, "step_time": 1.0})) == ["step 9: loss 1"]


def test_a_full_disk_in_tensorboards_thread_is_one_error(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = SimpleNamespace(report_to=["tensorboard"])
    board = log.Log(tmp_path, 0, 9, False, trackers=Trackers(config, tmp_path))
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(StorageError, match=f"^{tmp_path}/tensorboard: cannot be written: No space"):
        for step in range(1000):
            board.write(step, {"loss": 1.0})
            time.sleep(0.01)
    board.close()
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_ends_with_what_it_changed():
    rows = [{"eval_loss": 4.14}, {"loss": 3.9}, {"loss": 3.5, "eval_loss": 3.431}]
    used = Used(kwh=0.00071, co2_kg=0, seconds=1, place="", sources=(), lost=0)
    assert list(closing.lines(rows, 104.2, used, "runs/x", scorer=False)) == [
        "after   held-out loss 4.14 -> 3.431, loss 3.9 -> 3.5, 0:01:44, 0.00071 kWh",
        "next    easyaira generate runs/x --chat",
    ]
    *_, last = closing.lines([], 1, None, "runs/x #2", scorer=False)
    assert last == "next    easyaira generate 'runs/x #2' --chat"
    *_, last = closing.lines([], 1, None, "runs/x", scorer=True)
    assert last == "next    easyaira evaluate runs/x --rows FILE"
