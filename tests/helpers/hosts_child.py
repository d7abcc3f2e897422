"""A process of a run that computes nothing, and what can befall it: see test_hosts.py.

python -m helpers.hosts_child PORT PROCESSES INDEX FAULT      PORT 0: a launcher says who is who
"""

import ctypes
import os
import signal
import sys
import time

from easyaira import cli
from easyaira.config.run import DistributedConfig
from easyaira.distributed import hosts, signals, watchdog
from easyaira.distributed.mesh import make_mesh
from easyaira.distributed.signals import StopSignal
from easyaira.errors import DataError


def befall(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "known":
        raise DataError("rows.jsonl:7: not a row")
    if fault == "bug":
        raise ZeroDivisionError("of ours")
    if fault == "hangs":
        time.sleep(600)
    if fault == "stuck":  # where Python does not notice anything, as in a compilation
        ctypes.PyDLL(None).sleep(600)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
        ctypes.CDLL(None).sleep(60)


def compute(index: str, processes: str, fault: str, place: str) -> None:
    differing = {"seed": index} if fault == "differing" else {}
    hosts.agree({"optimizer.learning_rate": 1e-5} | differing)
    assert hosts.share(f"of host {index}") == "of host 0"
    odd = index if index != "0" else None
    assert hosts.problem_of_any(odd) == ("host 1: 1" if int(processes) > 1 else None)
    assert hosts.problem_of_any(None) is None
    mesh = make_mesh("fsdp=-1")
    print("alike", flush=True)
    for update in range(10_000):
        watchdog.beat(f"computing update {update}")
        asked = bool(hosts.any_of(fault == "asked" and index == "1" and update == 5, mesh))
        assert asked == (fault == "asked" and update == 5)
        if asked:
            return
        if update == 5 and fault == "late":
            return
        if update == 5 and index == place:
            befall(fault)
        time.sleep(0.02)


def main(argv: list[str]) -> None:
    port, processes, index, fault = argv
    fault, _, place = fault.partition(" on ")
    watchdog.GRACE = signals.GRACE = 1.5
    limits = {"timeout": 3, "hang_timeout": 6 if fault == "hangs" else 100}
    found = {"initialization_timeout": 3} if fault == "alone" else {}
    if int(port):
        found["coordinator_address"] = f"127.0.0.1:{port}"
        found |= {"num_processes": int(processes), "process_id": int(index)}
    config = DistributedConfig(**found, **limits)
    with hosts.joined(config), StopSignal(watchdog.leave):
        compute(index, processes, fault, place)
    if fault == "late" and index == place:
        time.sleep(limits["timeout"] + 2)  # longer than JAX waits for the others at its end


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
