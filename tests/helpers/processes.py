"""Runs commands of a test, in this process or in child processes."""

import os
import re
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


def environment(devices: int, **variables: str) -> dict[str, str]:
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path, **variables}


def start(arguments: list, devices: int = 1, **variables: str) -> subprocess.Popen:
    """Start `python ARGUMENTS` with that many virtual devices."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(devices, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Ended:
    """Wait for processes; holds exit statuses and outputs in their order, and the seconds taken."""

    def __init__(self, processes: list[subprocess.Popen], timeout: float = 500):
        start = time.monotonic()
        try:
            outputs = [process.communicate(timeout=timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        self.statuses = [process.returncode for process in processes]
        self.out, self.err = zip(*outputs, strict=True)
        self.seconds = time.monotonic() - start

    def last(self, process: int) -> str:
        """Last line of a process's standard error."""
        return (self.err[process].strip().splitlines() or [""])[-1]

    def __repr__(self):
        parts = zip(self.statuses, self.out, self.err, strict=True)
        return "\n".join(f"--- {s}\n{out[-2000:]}\n{err[-4000:]}" for s, out, err in parts)
