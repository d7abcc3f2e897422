"""Runs a training command with a signal or fault at a named point, in a process of its own.

python -m helpers.train_child JOB      JOB: JSON of {task, point, argv, rows}

The tokens that the run puts on its devices are written to the file `rows`, if there is one.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
from functools import partial

import numpy as np


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(replace, module, name, number=1, after=True):
    """Send SIGTERM before or after the `number`-th call of a function."""
    calls, inner = [], getattr(module, name)

    def outer(*args, **kwargs):
        calls.append(name)
        if len(calls) == number and not after:
            terminate()
        result = inner(*args, **kwargs)
        if len(calls) == number and after:
            terminate()
        return result

    replace(module, name, outer)


def at_batch(replace, what, number, act=terminate):
    """Send a signal before the `number`-th batch of a kind is computed."""
    from easyaira.train import loader

    seen, inner = [], loader.ahead

    def outer(batches, start, stop, mesh, kind="of the training"):
        for ready in inner(batches, start, stop, mesh, kind):
            seen.extend([ready] * (kind == what))
            if kind == what and len(seen) == number:
                act()
            yield ready

    replace(loader, "ahead", outer)


def killed(replace):
    """Kill the process before the sixth batch, once the first checkpoint is there: it is written
    beside the updates."""
    from easyaira.storage import checkpoints

    folders, inner = [], checkpoints.Checkpoints.save

    def outer(self, *args):
        folders.append(self.folder)
        return inner(self, *args)

    def act():
        while not any(name.isdigit() for name in os.listdir(folders[0])):
            time.sleep(0.02)
        kill()

    replace(checkpoints.Checkpoints, "save", outer)
    at_batch(replace, "of the training", 6, act)


def in_a_compilation(replace):
    """Send SIGTERM, then block in native code for a minute, so that no Python handler runs."""
    from easyaira.train import step

    inner = step.make_train_step

    def outer(*args):
        terminate()
        ctypes.CDLL(None).sleep(60)
        return inner(*args)

    replace(step, "make_train_step", outer)


def disk_full(replace):
    """Limit the file size when the second checkpoint is saved."""
    from easyaira.storage import checkpoints

    calls, inner = [], checkpoints.Checkpoints.save

    def outer(*args):
        calls.append(args)
        if len(calls) == 2:
            args[0].wait()  # the first one is written beside the updates
            sys.dont_write_bytecode = True  # it would be cut at the limit, for all tests
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return inner(*args)

    replace(checkpoints.Checkpoints, "save", outer)


def at_import():
    class Finder:
        def find_spec(self, name, *_):
            if name == "easyaira.train.loop":
                terminate()

    sys.meta_path.insert(0, Finder())


def plant(point, replace=setattr):
    """Plant what happens at a point; `replace` sets attributes, such as a monkeypatch's."""
    from easyaira.data import tokenise
    from easyaira.export import release
    from easyaira.storage.checkpoints import Checkpoints

    {
        "data": partial(at_call, module=tokenise, name="build"),
        "reference": partial(at_batch, what="of the reference", number=2),
        "compile": in_a_compilation,
        "update": partial(at_batch, what="of the training", number=3),
        "second update": partial(at_batch, what="of the training", number=2),
        "killed": killed,
        "evaluation": partial(at_batch, what="of the evaluation", number=2),
        "last save": partial(at_call, module=Checkpoints, name="save", number=2),
        "export": partial(at_call, module=release, name="_verify", after=False),
        "disk full": disk_full,
        "": lambda _: None,
    }[point](replace)


def record(path):
    from easyaira.train import loader

    inner, rows = loader.to_device, []

    def outer(batch, mesh):
        rows.append(batch.arrays["tokens"])
        np.savez(f"{path}.part.npz", *rows)
        os.replace(f"{path}.part.npz", f"{path}.npz")  # whole, also if the process is killed
        return inner(batch, mesh)

    loader.to_device = outer


def main(job):
    from easyaira import cli
    from easyaira.distributed import signals
    from helpers import quick

    quick.use()
    signals.GRACE = 1.0
    if job["point"] == "import":
        at_import()
    else:
        plant(job["point"])
    if job.get("rows"):
        record(job["rows"])
    cli.run_command(importlib.import_module(f"easyaira.train_{job['task']}").main, job["argv"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
