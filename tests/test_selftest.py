"""The self-test finds what it is for. That it passes on a CPU is seen by its own command, in CI."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira import selftest
from easyaira.errors import CheckFailed, Preempted
from easyaira.losses import preference
from easyaira.run import device_checks
from easyaira.train import kernel_check


@pytest.fixture
def rows(monkeypatch, capsys):
    """`rows(check, ...)`: the table of these checks alone, and the exit status."""

    def run(**checks):
        def planted(root):
            for name, check in checks.items():
                yield selftest.timed(name, check)

        monkeypatch.setattr(selftest, "checks", planted)
        try:
            selftest.main(["--json"])
            status = 0
        except SystemExit as end:
            status = end.code
        out = json.loads(capsys.readouterr().out)
        return out, status

    return run


def fail():
    raise CheckFailed("weights differ the second time")


def break_down():
    raise ValueError("no such\nshape")


def stop():
    raise Preempted("SIGTERM")


def test_a_failed_check_is_status_2_and_does_not_stop_the_next(rows):
    table, status = rows(one=fail, two=break_down, three=lambda: "all well")
    assert status == 2 and not table["passed"]
    assert [row["passed"] for row in table["checks"]] == [False, False, True]
    seen = [row["seen"] for row in table["checks"]]
    assert seen == ["weights differ the second time", "ValueError: no such shape", "all well"]


def test_checks_that_pass_are_status_0(rows):
    table, status = rows(one=lambda: "all well")
    assert status == 0 and table["passed"]


def test_a_signal_is_no_failed_check():
    with pytest.raises(Preempted):
        selftest.timed("one", stop)


@pytest.mark.slow
def test_sums_pass_here_and_noise_is_found(monkeypatch):
    assert "one result" in device_checks.sums()
    answer_sums, calls = preference.answer_sums, []

    def noisy(*args, examples):
        calls.append(1)
        return answer_sums(*args, examples=examples) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(preference, "answer_sums", noisy)
    monkeypatch.setattr(jax, "jit", lambda f: f)
    with pytest.raises(CheckFailed, match="different bits the second time"):
        device_checks.sums()


def test_layouts_hold_what_kernels_stumble_over():
    layouts = device_checks.layouts()
    lengths = {segments.shape[1] for segments, _ in layouts.values()}
    assert {64, 192} <= lengths  # a remainder of 64 by 128
    assert any(length % 128 == 0 for length in lengths) and 24 in lengths
    for name, (segments, sides) in layouts.items():
        if "full" not in name:
            assert not segments[-1].any()  # a row of padding
            assert ("shared" in name) == bool((sides == 2).any())


def test_faults_of_a_kernel_are_listed_and_those_of_xla_fail(monkeypatch):
    monkeypatch.setattr(
        device_checks, "layouts", lambda lengths: {"64": (np.ones((1, 64)), np.zeros((1, 64)))}
    )
    monkeypatch.setattr(kernel_check, "problem", lambda *args: "the output was not finite")
    assert "0 of 2 layouts" in device_checks.attention_by("cudnn", "bfloat16")
    with pytest.raises(CheckFailed, match="not finite"):
        device_checks.attention_by("xla", "bfloat16")


def test_losses_that_differ_from_the_cpus_are_found(tmp_path):
    def write(which, shift, names=selftest.RUNS):
        for name in names:
            folder = selftest.folder_of(tmp_path, name, which)
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{"step": i, "loss": 3.0 - 0.1 * i + shift} for i in range(1, 4)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    write("first", 0.0)
    write("cpu", 0.01)
    assert "within 0.00" in selftest.against_cpu(tmp_path, lambda: None)
    write("cpu", 0.2)
    with pytest.raises(CheckFailed, match="losses differ by 0.07"):
        selftest.against_cpu(tmp_path, lambda: None)
    write("cpu", 0.0)
    write("cpu", jnp.nan, ["sft"])
    with pytest.raises(CheckFailed, match="losses differ by nan"):
        selftest.against_cpu(tmp_path, lambda: None)
