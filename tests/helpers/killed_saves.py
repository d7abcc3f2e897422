"""Small runs that are killed during a save, then resumed.

python tests/helpers/killed_saves.py FOLDER POINT...

A run is killed before each POINT, such as "mkdir 4.orbax-checkpoint-tmp". Each run is a fork of
this process, which has imported everything and computed nothing."""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.distributed.tree import abstract
from easyaira.storage.checkpoints import Checkpoints


def run(folder: Path) -> list[float]:
    """Six updates of an array, saved after each; resumes from the newest checkpoint."""

    @jax.jit
    def update(params):
        return jax.tree.map(lambda x: jnp.sin(x * 1.7) + x, params)

    params = {"w": jnp.arange(64.0).reshape(8, 8)}
    checkpoints = Checkpoints(folder, keep=2, write=True)
    step = 0
    if checkpoints.latest() is not None:
        step, params, *_ = checkpoints.restore_latest(abstract(params), abstract(params))
    while step < 6:
        params, step = update(params), step + 1
        checkpoints.save(step, params, params, {"update": step}, {})
        checkpoints.wait()
    assert checkpoints.steps() == [5, 6]
    checkpoints.close()
    return np.asarray(params["w"]).ravel().tolist()


def kill_before(point: str) -> None:
    """Kill this process before its first system call of this kind on such a path."""
    change, _, end = point.partition(" ")
    original = getattr(os, change)

    def wrapped(path, *args, **kwargs):
        if f"/{os.fspath(path)}".endswith(f"/{end}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *args, **kwargs)

    setattr(os, change, wrapped)


def forked(folder: Path, point: str | None = None) -> list[float] | None:
    """Run in a fork; return its final parameters, or None if it was killed."""
    read, write = os.pipe()
    if os.fork() == 0:
        if point:
            kill_before(point)
        os.write(write, json.dumps(run(folder)).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        result = pipe.read()
    os.wait()
    return json.loads(result) if result else None


if __name__ == "__main__":
    root = Path(sys.argv[1])
    whole = forked(root / "whole")
    for i, point in enumerate(sys.argv[2:]):
        folder = root / str(i)
        killed = forked(folder, point) is None
        left = sorted(path.name for path in folder.iterdir())
        print(json.dumps([point, killed, left, forked(folder) == whole]))
