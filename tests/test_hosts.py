"""Several processes as one run: two on this machine, over gloo."""

import pytest
from processes import Ended, free_port, start


def two(fault):
    port = free_port()
    return Ended([start(["-m", "hosts_child", port, 2, i, fault]) for i in range(2)], timeout=60)


BAD_ROW = "rows.jsonl:7: not a row"
FAULTS = {  # what befalls which host: statuses, the last line of both, and its bound in seconds
    "fine": ([0, 0], ["", ""], 30),
    "asked": ([0, 0], ["", ""], 30),
    "differing": ([2, 2], ["error: seed: host 0 has '0' and host 1 '1'"] * 2, 30),
    "known on 1": ([5, 2], [f"error: host 1: {BAD_ROW}", f"error: {BAD_ROW}"], 30),
    "known on 0": ([2, 5], [f"error: {BAD_ROW}", f"error: host 0: {BAD_ROW}"], 30),
    "bug on 1": ([5, 1], ["error: host 1: ZeroDivisionError: of ours", "error: ZeroDiv"], 40),
    "killed on 1": ([5, -9], ["error: host 1: silent for", ""], 40),
    "killed on 0": ([-9, 5], ["", "error: host 0: lost"], 40),
    "hangs on 1": ([5, 5], ["host 1 is furthest behind, computing update 5"] * 2, 40),
    "stuck on 1": ([5, 1], ["error: host 1: silent for", ""], 40),
    "stopped on 1": ([75, 75], ["host 1: SIGTERM; nothing is lost", "stopped: SIGTERM"], 40),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_befalls_one_host_ends_all_with_the_cause_as_their_last_line(fault):
    ended = two(fault)
    statuses, last, seconds = FAULTS[fault]
    for i in range(2):
        assert last[i] in ended.last(i), ended
    assert ended.statuses == statuses, ended
    assert ended.seconds < seconds
    assert "alike" not in ended.out[1]  # the first process prints
