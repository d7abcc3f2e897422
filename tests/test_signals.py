"""Ctrl-C ends a command at any moment, with one line and status 75."""

import subprocess
import sys
import textwrap

import pytest

from easyaira import __main__

CHILD = """
import signal, time
from easyaira.distributed import signals
signals.GRACE = 0.5
class Loses:
    def __del__(self):  # Python prints what is raised here, and goes on
        signal.raise_signal(signal.SIGINT)
        for _ in range(99): pass
"""
MOMENTS = {  # what the process does around the signal: the status that it ends with
    "lost in a callback": ("with signals.StopSignal():\n Loses()\n time.sleep(60)", 75),
    "while the state is saved": (
        "with signals.StopSignal() as stop:\n stop.deferred = True\n"
        " signal.raise_signal(signal.SIGINT)\n stop.deferred = False\n time.sleep(1.5)",
        0,
    ),
    "handled": (
        "try:\n with signals.StopSignal():\n  signal.raise_signal(signal.SIGINT)\n"
        "except signals.Preempted:\n time.sleep(1.5)",
        0,
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.slow
def test_a_signal_that_was_lost_ends_the_process_and_no_other(moment):
    code, status = MOMENTS[moment]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD) + code],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == status, done.stderr
    stopped = "stopped: SIGINT; nothing is lost, run the same command again"
    assert (done.stderr.splitlines()[-1:] == [stopped]) == (status == 75)


def test_a_stopped_command_ends_before_the_interpreter_does():
    """XLA's threads may compile then, and would crash."""
    code = """
        import atexit
        from easyaira import cli
        from easyaira.errors import Preempted
        def command(argv):
            print("before")
            raise Preempted("SIGINT")
        atexit.register(print, "at the interpreter's end")
        cli.run_command(command, [])
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "before\n", "stopped: SIGINT\n")


def test_ctrl_c_during_the_first_imports_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__.importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as end:
        __main__.main(["sft"])
    out, err = capsys.readouterr()
    assert end.value.code == 75 and not out
    assert err == "stopped: SIGINT; nothing is lost, run the same command again\n"
