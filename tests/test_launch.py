"""The scripts that start runs: the command arrives as it was given, and goes on after a stop."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"
ARGUMENTS = ["train_dpo", "--config", "a b.yaml", "--mesh", "dp=1,fsdp=-1"]


def call(script, tmp_path, statuses, **variables):
    """The script with programs in the place of the cluster's that note how they are called."""
    for name in ("gcloud", "srun", "scontrol"):
        program = tmp_path / name
        program.write_text(
            f'#!/usr/bin/env bash\nprintf "%s\\n" {name} "$@" END >> calls\n'
            f'[[ {name} == scontrol ]] || exit "$(sed -n "$(grep -cx END calls)p" statuses)"\n'
        )
        program.chmod(0o755)
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [LAUNCH / script, *ARGUMENTS], cwd=tmp_path, env=os.environ | {"PATH": path} | variables
    )
    calls = (tmp_path / "calls").read_text().removesuffix("END\n").split("END\n")
    return done.returncode, [call.splitlines() for call in calls]


@pytest.mark.parametrize(
    "statuses, calls, last", [([75, 5, 0], 3, 0), ([2, 0], 1, 2), ([75, 75, 75], 2, 75)]
)
def test_a_tpu_pod_goes_on_as_long_as_that_helps(statuses, calls, last, tmp_path):
    status, made = call(
        "tpu_vm.sh", tmp_path, statuses, TPU="pod", ZONE="z", ATTEMPTS="3" if last != 75 else "2"
    )
    assert (status, len(made)) == (last, calls)
    command = subprocess.run(
        ["bash", "-c", f"cd() {{ :; }}; exec() {{ printf '%s\\n' \"$@\"; }}; {made[0][-1]}"],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert command == [".venv/bin/python", "-m", f"easyaira.{ARGUMENTS[0]}", *ARGUMENTS[1:]]
    assert made[0][made[0].index("--worker") + 1] == "all"


@pytest.mark.parametrize(
    "status, queued", [(0, False), (75, True), (5, True), (137, True), (2, False)]
)
def test_a_slurm_job_is_queued_again_where_that_helps(status, queued, tmp_path):
    got, made = call("slurm.sh", tmp_path, [status], SLURM_JOB_ID="7")
    assert got == status
    module = made[0].index("-m") + 1
    assert made[0][module:] == [f"easyaira.{ARGUMENTS[0]}", *ARGUMENTS[1:]]
    assert made[1:] == ([["scontrol", "requeue", "7"]] if queued else [])


def test_the_job_set_has_as_many_hosts_as_its_slice():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    slices = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = slices["template"]["spec"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    per_host = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert slices["parallelism"] == slices["completions"] == x * y * z // per_host
    assert (Path(LAUNCH).parents[1] / "configs/tulu-2.5-dpo-13b-uf-overall.yaml").exists()
    assert "--config=configs/tulu-2.5-dpo-13b-uf-overall.yaml" in pod["containers"][0]["command"]
