"""Runs training commands in child processes, with a signal or fault at a named point.

python -m helpers.train_child JOBS      JOBS: a JSON list of {task, point, argv, out, rows,
unproved, devices}

A single job runs in this process. Several jobs run in turn, each in a fork of this process, which
has imported everything; their exit statuses are printed. A job's output is written to the file
`out`, and the tokens that it puts on its devices to `rows`.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time

import numpy as np


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def killed():
    """SIGKILL as soon as checkpoint 3 is finished."""
    folder = next(a for a in sys.argv[1].split('"') if a.startswith("--output_dir=")).split("=")[1]
    while not os.path.exists(f"{folder}/checkpoints/3"):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module, name, number=1, after=True):
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

    setattr(module, name, outer)


def at_batch(what, number, act=terminate):
    """Send a signal before the `number`-th batch of a kind is computed."""
    from easyaira.train import loader

    seen, inner = [], loader.ahead

    def outer(batches, start, stop, mesh, kind="of the training"):
        for ready in inner(batches, start, stop, mesh, kind):
            seen.extend([ready] * (kind == what))
            if kind == what and len(seen) == number:
                act()
            yield ready

    loader.ahead = outer


def in_a_compilation():
    """Send SIGTERM, then block in native code for a minute, so that no Python handler runs."""
    from easyaira.train import step

    inner = step.make_train_step

    def outer(*args):
        terminate()
        ctypes.CDLL(None).sleep(60)
        return inner(*args)

    step.make_train_step = outer


def disk_full():
    """Limit the file size when the second checkpoint is saved."""
    from easyaira.storage import checkpoints

    calls, inner = [], checkpoints.Checkpoints.save

    def outer(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return inner(*args)

    checkpoints.Checkpoints.save = outer


def at_import():
    class Finder:
        def find_spec(self, name, *_):
            if name == "easyaira.train.loop":
                terminate()

    sys.meta_path.insert(0, Finder())


def plant(point):
    from easyaira.data import tokenise
    from easyaira.export import release
    from easyaira.storage import checkpoints

    {
        "data": lambda: at_call(tokenise, "build"),
        "reference": lambda: at_batch("of the reference", 2),
        "compile": in_a_compilation,
        "update": lambda: at_batch("of the training", 3),
        "second update": lambda: at_batch("of the training", 2),
        "killed": lambda: at_batch(
            "of the training", 6, lambda: os.kill(os.getpid(), signal.SIGKILL)
        ),
        "evaluation": lambda: at_batch("of the evaluation", 2),
        "last save": lambda: at_call(checkpoints.Checkpoints, "save", 2),
        "export": lambda: at_call(release, "_verify", after=False),
        "disk full": disk_full,
        "": lambda: None,
    }[point]()


def record(path):
    from easyaira.train import loader

    inner, rows = loader.to_device, []

    def outer(batch, mesh):
        rows.append(batch.arrays["tokens"])
        np.savez(path, *rows)
        return inner(batch, mesh)

    loader.to_device = outer


def run(job):
    from easyaira import cli
    from easyaira.distributed import signals

    signals.GRACE = 1.0
    if job.get("unproved"):  # skip the comparison with PyTorch; other tests cover it
        from easyaira.export import torch_check

        torch_check.compare_logits = lambda *_: {"compared": False, "why": "not asked for"}
    if job["point"] == "import":
        at_import()
    else:
        plant(job["point"])
    if job.get("rows"):
        record(job["rows"])
    cli.run_command(importlib.import_module(f"easyaira.train_{job['task']}").main, job["argv"])


def main(jobs):
    if len(jobs) == 1:
        run(jobs[0])
        return
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.event_file_writer  # noqa: F401

    import easyaira.algorithms.dpo
    import easyaira.run.run  # noqa: F401
    import easyaira.train_dpo  # noqa: F401

    importlib.import_module("transformers").AutoTokenizer  # noqa: B018
    importlib.import_module("transformers").GenerationConfig  # noqa: B018
    for job in jobs:
        start = time.monotonic()
        child = os.fork()
        if not child:
            sys.stdout.flush()
            with open(job["out"], "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            if "devices" in job:
                flag = f"--xla_force_host_platform_device_count={job['devices']}"
                os.environ["XLA_FLAGS"] = flag
            run(job)
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, "seconds": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
