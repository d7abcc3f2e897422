"""One process of a multi-host run without a model, with an injected fault: see test_hosts.py.

python -m helpers.hosts_child PORT PROCESSES INDEX FAULT      PORT 0: the launcher sets the ranks
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


def inject(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "known":
        raise DataError("rows.jsonl:7: not a row")
    if fault == "bug":
        raise ZeroDivisionError("of ours")
    if fault == "hangs":
        time.sleep(600)
    if fault == "stuck":  # blocks while holding the GIL, as native code may
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
        stopping = bool(hosts.any_of(fault == "asked" and index == "1" and update == 5, mesh))
        assert stopping == (fault == "asked" and update == 5)
        if stopping:
            return
        if update == 5 and fault == "late":
            return
        if update == 5 and index == place:
            inject(fault)
        time.sleep(0.02)


def main(argv: list[str]) -> None:
    port, processes, index, fault = argv
    fault, _, place = fault.partition(" on ")
    watchdog.GRACE = signals.GRACE = 1.5
    limits = {"timeout": 3, "hang_timeout": 6 if fault == "hangs" else 100}
    options = {"initialization_timeout": 3} if fault == "alone" else {}
    if int(port):
        options["coordinator_address"] = f"127.0.0.1:{port}"
        options |= {"num_processes": int(processes), "process_id": int(index)}
    config = DistributedConfig(**options, **limits)
    with hosts.joined(config), StopSignal(watchdog.leave):
        compute(index, processes, fault, place)
    if fault == "late" and index == place:
        time.sleep(limits["timeout"] + 2)  # longer than JAX's shutdown barrier waits


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
