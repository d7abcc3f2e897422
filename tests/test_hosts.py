"""Several processes as one run: two on this machine, over gloo."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import jax
import numpy as np
import pytest

from easyaira import cli, train_dpo
from easyaira.config.data import DataConfig
from easyaira.config.model import ModelConfig
from easyaira.config.run import DistributedConfig, TrainSFT
from easyaira.distributed import watchdog
from easyaira.distributed.hosts import launcher
from easyaira.export import proof
from easyaira.run import provenance
from easyaira.storage import pretrained
from easyaira.train import loader, log
from helpers import tiny, train_child
from helpers.processes import Ended, call, environment, free_port, start
from helpers.runs import argv


def two(fault):
    port = free_port()
    return Ended(
        [start(["-m", "helpers.hosts_child", port, 2, i, fault]) for i in range(2)], timeout=60
    )


BAD_ROW = "rows.jsonl:7: not a row"
FAULTS = {  # what befalls which host: statuses, the last line of both, and its bound in seconds
    "asked": ([0, 0], ["", ""], 30),
    "late on 0": ([0, 0], ["", ""], 30),
    "late on 1": ([0, 0], ["", ""], 30),
    "differing": ([2, 2], ["error: seed: host 0 has '0' and host 1 '1'"] * 2, 30),
    "known on 1": ([2, 2], [f"error: host 1: {BAD_ROW}", f"error: {BAD_ROW}"], 30),
    "known on 0": ([2, 2], [f"error: {BAD_ROW}", f"error: host 0: {BAD_ROW}"], 30),
    "bug on 1": ([5, 1], ["error: host 1: ZeroDivisionError: of ours", "error: ZeroDiv"], 40),
    "killed on 1": ([5, -9], ["error: host 1: silent for", ""], 40),
    "killed on 0": ([-9, 5], ["", "error: host 0: lost"], 40),
    "hangs on 1": ([5, 5], ["host 1 is furthest behind, computing update 5"] * 2, 40),
    "stuck on 1": ([5, 1], ["error: host 1: silent for", ""], 40),
    "stopped on 1": ([75, 75], ["host 1: SIGTERM; nothing is lost", "stopped: SIGTERM"], 40),
}


@pytest.fixture(scope="module")
def waiting():
    """Processes that mostly wait, so they are started together: two whose others never come, one
    that hangs, and two that hang and whose reader has gone."""
    child = ["-m", "helpers.hosts_child"]
    alone = [start([*child, free_port(), 2, i, "alone"]) for i in (0, 1)]
    hangs = [*child, 0, 1, 0, "hangs on 0"]
    arguments = shlex.join([sys.executable, *map(str, hangs)])
    shells = (f"{arguments} 2>&-", f"{arguments} 2> >(true)")
    unread = [subprocess.Popen(["bash", "-c", shell], env=environment(1)) for shell in shells]
    started = {"alone": alone, "hangs": [start(hangs)], "unread": unread}
    yield started
    for process in chain(*started.values()):  # another worker may run the tests that wait for them
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


@pytest.mark.slow
@pytest.mark.usefixtures("waiting")  # they wait meanwhile
def test_what_befalls_one_host_ends_all_with_the_cause_as_their_last_line():
    with ThreadPoolExecutor(6) as pool:  # they mostly wait
        runs = dict(zip(FAULTS, pool.map(two, FAULTS), strict=True))
    for fault, ended in runs.items():
        statuses, last, seconds = FAULTS[fault]
        for i in range(2):
            assert last[i] in ended.last(i), (fault, ended)
        assert ended.statuses == statuses, (fault, ended)
        assert ended.seconds < seconds, fault
        assert "alike" not in ended.out[1], fault  # the first process prints


@pytest.mark.slow
def test_a_host_whose_others_never_come_says_so(waiting):
    """The first process, and another one, each with an address of its own."""
    ended = Ended(waiting["alone"], 60)
    assert ended.statuses == [5, 5], ended
    for i in range(2):
        assert "error: distributed: the other processes did not join 127.0.0.1" in ended.last(i)


@pytest.mark.slow
def test_a_process_that_is_alone_ends_too_when_it_hangs(waiting):
    ended = Ended(waiting["hangs"], 60)
    assert ended.statuses == [5], ended
    assert "no progress for 6 s, computing update 5" in ended.last(0)
    assert "in inject" in ended.err[0]  # where it was


@pytest.mark.slow
def test_a_process_whose_reader_has_gone_ends_as_it_should(waiting):
    """Standard error is closed from the start, or a pipe that nobody reads any more."""
    assert [process.wait(timeout=60) for process in waiting["unread"]] == [5, 5]


def slurm(i, job):
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
    }


def open_mpi(i, job):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    }


@pytest.mark.parametrize("variables", [slurm, open_mpi])
@pytest.mark.slow
def test_hosts_find_each_other_by_what_their_launcher_says(variables):
    job = free_port()  # any number; the port is made of it
    ended = Ended(
        [
            start(["-m", "helpers.hosts_child", 0, 2, i, "asked"], **variables(i, job))
            for i in range(2)
        ],
        60,
    )
    assert ended.statuses == [0, 0], ended
    assert "alike" in ended.out[0] and "alike" not in ended.out[1]


def test_a_process_that_a_launcher_started_alone_is_alone(monkeypatch):
    for name, value in slurm(0, 7).items():
        monkeypatch.setenv(name, value)
    assert launcher() == "slurm"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert launcher() is None
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # as in any pod
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launcher() is None


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    gpt2 = {"gpt2": tiny.CONFIGS["gpt2"]}
    return tiny.ground(tmp_path_factory.mktemp("ground"), gpt2, dpo=tiny.dpo_rows(40))


FEW = {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "data.eval": 0.1, "export": True}


def command(ground, out, *flags):
    """A command line: six updates, evaluated and saved in their middle, and exported."""
    own = {"data.cache_dir": f"{out}-cache"}
    return argv("dpo", ground / "gpt2", ground, out, *flags, **FEW, **own)


def hosts(count, devices, out, arguments, point="", last=()):
    """A run of several processes; `point` befalls the last of them, which has more arguments."""
    port, processes = free_port(), []
    for i in range(count):
        where = [f"--distributed.coordinator_address=127.0.0.1:{port}"]
        where += [f"--distributed.num_processes={count}", f"--distributed.process_id={i}"]
        where += ["--distributed.timeout=10"]
        job = {"task": "dpo", "point": point if i == count - 1 else "", "rows": f"{out}-rows-{i}"}
        job["argv"] = [*map(str, arguments), *where, *(last if i == count - 1 else ())]
        processes.append(start(["-m", "helpers.train_child", json.dumps(job)], devices))
    return Ended(processes)


def losses(folder, name="loss"):
    rows = log.read(folder / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def exported(folder):
    return json.loads((folder / "hf/export_report.json").read_text())["tensors"]


@pytest.mark.slow
def test_two_hosts_are_one_run_that_continues_on_any_others(ground, tmp_path, devices, monkeypatch):
    steps, mesh = "--max_steps=8", "--mesh=fsdp=4,tp=2"
    few = ["--data.eval=null", "--export=false"]
    devices(8)
    alone, two = tmp_path / "alone", tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr(loader, "to_device", loader.to_device)  # given back afterwards
        train_child.record(f"{alone}-rows")
        cli.run_command(train_dpo.main, command(ground, alone, steps, mesh, *few))

    # one of two is killed: the other ends, too, and what was computed is what one process computes
    ended = hosts(2, 4, two, command(ground, two, steps, mesh, *few), point="killed")
    assert ended.statuses == [5, -9] and ended.seconds < 200, ended
    assert "error: host 1: silent for" in ended.last(0)
    killed = losses(two)
    assert list(killed) in ([*range(5)], [*range(6)]), ended  # update 5 may have been fetched
    for step, loss in killed.items():
        assert loss == pytest.approx(losses(alone)[step], abs=1e-6)

    # each host feeds its own rows, which together are those of the run in one process
    whole, *parts = (
        list(np.load(f"{name}-rows{i}.npz").values())
        for name, i in ((alone, ""), (two, "-0"), (two, "-1"))
    )
    for rows, *of_hosts in zip(whole, *parts, strict=False):
        assert all(part.shape[1] == rows.shape[1] // 2 for part in of_hosts)
        np.testing.assert_array_equal(np.concatenate(of_hosts, 1), rows)

    # one host prints and writes
    assert not re.search(r"^(model|data|run|step|export|done) ", ended.out[1], re.M), ended
    assert "step 3: loss" in ended.out[0]

    # the same command goes on from update 3, bit for bit, until one of the two is told to stop
    ended = hosts(2, 4, two, command(ground, two, steps, mesh, *few), point="second update")
    assert ended.statuses == [75, 75], ended
    for i in range(2):
        assert "stopped: host 1: SIGTERM after update" in ended.last(i), ended
    stopped = losses(two)
    assert max(stopped) in (5, 6, 7), ended  # agreed on
    assert stopped[4] == killed[4]

    # and then on one device, and on two hosts of fewer
    copy = Path(shutil.copytree(two, tmp_path / "one"))
    devices(1)
    cli.run_command(train_dpo.main, command(ground, copy, steps, *few, "--mesh=fsdp=-1"))
    last = [*few[:1], "--mesh=fsdp=2,tp=2", "--num_samples=1"]
    ended = hosts(2, 2, two, command(ground, two, steps, *last))
    assert ended.statuses == [0, 0], ended
    assert json.loads((two / "samples.json").read_text())[0]["answers"]["8"]
    assert "bit for bit" in ended.out[0] and "PyTorch logits within" in ended.out[0]
    for folder in (two, copy):
        assert losses(folder).keys() == losses(alone).keys()
        for step, loss in losses(alone).items():
            assert losses(folder)[step] == pytest.approx(loss, abs=1e-6)


@pytest.mark.slow
def test_a_host_that_cannot_write_its_part_of_a_checkpoint_ends_all(ground, tmp_path):
    few = ["--data.eval=null", "--export=false"]
    ended = hosts(2, 1, tmp_path, command(ground, tmp_path / "run", *few), point="disk full")
    assert ended.statuses == [4, 4] and ended.seconds < 200, ended
    problem = f"{tmp_path / 'run/checkpoints/6'}: cannot be saved: "
    assert ended.last(0).startswith(f"error: host 1: {problem}"), ended
    assert ended.last(1).startswith(f"error: {problem}"), ended


@pytest.mark.slow
def test_hosts_that_differ_say_in_what_and_write_nothing(ground, tmp_path):
    other = ["--optimizer.learning_rate=1e-4"]
    ended = hosts(2, 1, tmp_path / "run", command(ground, tmp_path / "run"), last=other)
    assert ended.statuses == [2, 2], ended
    for i in range(2):
        assert "learning_rate: host 0 has 5e-05 and host 1 0.0001; all hosts" in ended.last(i)
    assert not (tmp_path / "run").exists()


def test_what_hosts_compare_changes_with_all_that_decides_a_run(monkeypatch, tmp_path):
    def made_with(**options):
        return provenance.made_with(TrainSFT(ModelConfig("m"), DataConfig("d"), **options))

    plain = made_with()
    assert made_with(distributed=DistributedConfig(timeout=7)) == plain
    assert made_with(seed=1)["seed"] == 1 != plain["seed"]
    assert plain["version of jax"] == jax.__version__
    shutil.copytree(Path(proof.easyaira.__file__).parent, tmp_path / "easyaira")
    with open(tmp_path / "easyaira/losses/token_logps.py", "a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(proof.easyaira, "__file__", str(tmp_path / "easyaira/__init__.py"))
    monkeypatch.setattr(provenance, "code_hash", proof.code_hash.__wrapped__)  # without its cache
    assert [key for key, value in made_with().items() if value != plain[key]] == [
        "code of easyaira (sha256)"
    ]


@pytest.mark.slow
def test_a_sample_tells_weights_from_others(ground, tmp_path):
    """Of a folder by any change of a tensor's first or last values, of a run by any of its own."""
    other = Path(shutil.copytree(ground / "gpt2", tmp_path / "gpt2"))
    sample = pretrained.find(str(ground / "gpt2")).sample()
    assert pretrained.find(str(other)).sample() == sample
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x3f")
    assert pretrained.find(str(other)).sample() != sample
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        few = ["--max_steps=1", "--data.eval=null", "--export=false", f"--seed={seed}"]
        cli.run_command(train_dpo.main, command(ground, run, *few))
    samples = [pretrained.find(str(run)).sample() for run in (*runs, runs[0])]
    assert samples[0] == samples[2] != samples[1]


def test_a_host_ends_with_the_cause_and_its_status(monkeypatch):
    """Not with what only followed from it, even if that is an error that users know."""

    def end(_, *ended):
        raise SystemExit(ended)

    monkeypatch.setattr(watchdog.Watch, "_end", end)
    followed, same = ("error: cannot be saved", 4), ("error: lost, as host 1 sees it", 5)
    for (message, status), wanted in ((followed, ("error: host 0: lost", 5)), (same, same)):
        watcher = watchdog.Watch(DistributedConfig(), None)
        watcher._cause = {"who": "host 0", "message": "lost", "status": 5}
        watcher.ended = watchdog.Ended(message, status, True, 0.0)
        with pytest.raises(SystemExit) as ended:
            watcher._finish()
        assert ended.value.code == wanted


POINTS = {  # where a signal comes, and what is said
    "import": "SIGTERM; nothing is lost",
    "data": "SIGTERM; nothing is lost",
    "reference": "SIGTERM; nothing is lost",
    "compile": "SIGTERM; nothing is lost",
    "update": "SIGTERM after update 3 of 6; the state is saved",
    "evaluation": "SIGTERM after update 3 of 6; the state is saved",
    "last save": "SIGTERM after update 6 of 6; the state is saved",
    "export": "SIGTERM; nothing is lost",
}
OWN_PROCESS = ("import", "compile")  # no Python handler runs there: the process is ended


@pytest.fixture
def train_until(ground, tmp_path, monkeypatch, capsys):
    """Train into a folder until a signal at a point, if any; return status and last line."""
    from easyaira.export import torch_check

    def until(folder, point=""):
        arguments = command(ground, tmp_path / folder)
        if point in OWN_PROCESS:
            job = {"task": "dpo", "point": point, "argv": arguments}
            ended = Ended([start(["-m", "helpers.train_child", json.dumps(job)])])
            assert ended.seconds < 50
            return ended.statuses[0], ended.last(0)
        with monkeypatch.context() as patch:
            # other tests cover the comparison with PyTorch
            patch.setattr(torch_check, "compare_logits", lambda *_: {"compared": False, "why": "-"})
            train_child.plant(point, patch.setattr)
            status, _, err = call(train_dpo.main, arguments, capsys)
        return status, (err.strip().splitlines() or [""])[-1]

    return until


@pytest.mark.slow
def test_a_signal_at_any_time_ends_with_75_and_the_same_command_goes_on(
    train_until, tmp_path, devices
):
    assert train_until("straight") == (0, "")
    straight = tmp_path / "straight"
    for point, message in POINTS.items():
        status, last = train_until(point, point)
        assert status == 75 and message in last, (point, status, last)
        folder = tmp_path / point
        assert point != "import" or not folder.exists()
        devices(2 if point == "compile" else 1)  # before the first update, any mesh will do
        assert train_until(point) == (0, ""), point
        devices(1)
        if point == "compile":
            assert losses(folder) == pytest.approx(losses(straight), abs=1e-6)
            continue
        assert exported(folder) == exported(straight), point
        for name in ("loss", "eval_loss"):
            assert losses(folder, name) == losses(straight, name), point
