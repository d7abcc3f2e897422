"""Commands of a test, in this process and in others: called, waited for, shown where they fail."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from easyaira import cli

ROOT = Path(__file__).parents[2]


def call(main, arguments, capsys):
    """Run a command in this process: exit status, standard output, standard error."""
    try:
        cli.run_command(main, [str(argument) for argument in arguments])
        status = 0
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # each process would compile again
    return os.environ | cached | {"XLA_FLAGS": flags, "PYTHONPATH": path, **more}


def start(arguments: list, devices: int = 1, **more: str) -> subprocess.Popen:
    """`python ARGUMENTS` with so many devices."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(devices, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Ended:
    """Exit statuses and what was printed, in the order of the processes, and seconds it took."""

    def __init__(self, processes: list[subprocess.Popen], timeout: float = 500):
        began = time.monotonic()
        try:
            told = [process.communicate(timeout=timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        self.statuses = [process.returncode for process in processes]
        self.out, self.err = zip(*told, strict=True)
        self.seconds = time.monotonic() - began

    def last(self, process: int) -> str:
        """The last line of its errors."""
        return (self.err[process].strip().splitlines() or [""])[-1]

    def __repr__(self):
        parts = zip(self.statuses, self.out, self.err, strict=True)
        return "\n".join(f"--- {s}\n{out[-2000:]}\n{err[-4000:]}" for s, out, err in parts)
