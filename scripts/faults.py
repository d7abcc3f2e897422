"""Kill a run, fill its disk and damage its files; count how the same command ends afterwards.

    python scripts/faults.py                                        # hours
    python scripts/faults.py --kills 3 --disks 6 --every 21         # every 21st damage

A small DPO run on a CPU. Its processes are forked from one that has imported everything, and take
compiled programs from a cache; every fourth kill strikes a new process with an empty cache. Right
is status 0 and the weights of an undisturbed run, or status 2 or 4 and one line. Anything else is
printed with its case.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from easyaira import cli, quickstart

STEPS = 8
TRAIN, VERIFY = "easyaira.train_dpo", "easyaira.verify"
FORKED = multiprocessing.get_context("forkserver")
IMPORTED = ["easyaira.run.run", "easyaira.algorithms.dpo", "easyaira.export.checks"]
IMPORTED += ["easyaira.run.samples", "transformers.models.auto.tokenization_auto"]
IMPORTED += ["transformers.models.gpt2.tokenization_gpt2", "matplotlib.figure"]
PROGRAMS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
INSIDE = "EASYAIRA_FAULTS_INSIDE"  # set in the namespace in which disks can be mounted


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = {"flipped": flip, "cut": cut, "emptied": empty, "deleted": Path.unlink}


def ground(root: Path) -> None:
    """Write data and a model of two layers without weights."""
    quickstart.write_data(root / "data")
    quickstart.write_base(root / "base", root / "data")
    config = json.loads((root / "base/config.json").read_text())
    config |= {"n_layer": 2, "n_embd": 32, "n_head": 2}
    (root / "base/config.json").write_text(json.dumps(config))


def options(root: Path, run: Path, **others: object) -> list[str]:
    values = {
        "model.name_or_path": root / "base",
        "model.init": "random",
        "data.train": root / "data/dpo_train.jsonl",
        "data.eval": 0.05,
        "data.max_examples": 100,
        "data.template": "plain",
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "num_samples": 1,
        "output_dir": run,
    }
    return [f"--{name}={value}" for name, value in (values | others).items()]


class Command:
    """A command under way: `python -m MODULE WORDS`, with its folder of caches."""

    def __init__(self, words: Sequence[str], cache: Path, module: str = TRAIN, new: bool = False):
        self.log = cache.with_name(f"{cache.name}-log")
        for end in (".out", ".err"):  # a kill can strike before the process opens them
            self.log.with_suffix(end).touch()
        self.process = FORKED.Process(target=_run, args=(module, list(words), cache, self.log, new))
        self.process.start()

    def ended(self) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        self.process.join()
        texts = [self.log.with_suffix(end).read_text(errors="replace") for end in (".out", ".err")]
        return self.process.exitcode, *texts


def _run(module: str, words: list[str], cache: Path, log: Path, new: bool) -> None:
    """The forked process. A new one begins again without imports."""
    os.environ["EASYAIRA_CACHE"] = str(cache)
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if new:
        for name in PROGRAMS:
            del os.environ[name]
        os.execv(sys.executable, [sys.executable, "-m", module, *words])
    cli.run_command(importlib.import_module(module).main, words)


def call(words: Sequence[str], cache: Path, module: str = TRAIN) -> tuple[int, str, str]:
    return Command(words, cache, module).ended()


def weights(run: Path) -> dict[str, str]:
    """Sums of all bits of the final weights and of the optimizer's state."""
    sums = json.loads((run / f"checkpoints/{STEPS}/sums/metadata").read_text())
    return {name: value for name, value in sums.items() if "/" in name}


def outcome(status: int, out: str, err: str, run: Path, wanted: dict[str, str]) -> str:
    lines = err.strip().splitlines()
    if status == 0:
        if weights(run) != wanted:
            return "OTHER WEIGHTS"
        warned = any(word in out for word in ("damaged", "lost or unreadable", "left out"))
        return "reported, and the same weights" if warned else "the same weights"
    if status in (2, 4) and len(lines) == 1 and lines[0].startswith("error: "):
        return f"status {status}, one line"
    print(err, file=sys.stderr)
    return f"STATUS {status}, {len(lines)} LINES: {lines[-1][:200] if lines else ''}"


class Ground:
    """An undisturbed run: its weights and its duration."""

    def __init__(self, root: Path):
        self.root = root
        ground(root)
        run = root / "straight"
        status, _, err = call(options(root, run), root / "straight-cache")
        if status:
            sys.exit(err)
        self.wanted = weights(run)
        started = time.monotonic()
        call(options(root, root / "again"), root / "again-cache")
        self.seconds = time.monotonic() - started

    def outcome(self, words: Sequence[str], cache: Path, run: Path, new: bool = False) -> str:
        return outcome(*Command(words, cache, new=new).ended(), run, self.wanted)


def kills(ground: Ground, count: int, ends: Counter) -> None:
    """kill -9 at a random moment, and the same command again."""
    for number in range(count):
        run, cache = ground.root / f"killed-{number}", ground.root / f"cache-{number}"
        new, seconds = number % 4 == 3, random.uniform(0, ground.seconds)
        words = options(ground.root, run)
        command = Command(words, cache, new=new)
        time.sleep(3 * seconds if new else seconds)
        command.process.kill()
        command.ended()
        end = ground.outcome(words, cache, run)
        ends[end] += 1
        report(f"kill {number}", end)
        shutil.rmtree(run), shutil.rmtree(cache)


def disks(ground: Ground, count: int, ends: Counter) -> None:
    """A disk of a random size, and the same command with more room."""
    disk = ground.root / "disk"
    disk.mkdir()
    for number in range(count):
        size = int(2 ** random.uniform(5, 13))  # KiB
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(disk)]
        if subprocess.run(mount).returncode:
            print("disks: no tmpfs can be mounted here; left out")
            break
        run, cache = disk / "run", ground.root / f"disk-{number}"
        words = options(ground.root, run)
        first = ground.outcome(words, cache, run)
        ends[f"full: {first}"] += 1
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        second = ground.outcome(words, cache, run)
        ends[f"with more room: {second}"] += 1
        report(f"disk of {size} KiB", first), report("  with more room", second)
        subprocess.run(["umount", str(disk)], check=True)


def damages(ground: Ground, every: int, only: str, rows: dict[str, Counter]) -> None:
    """Each damage to each file of an unfinished run and of the caches, and of a released folder."""
    run, cache = ground.root / "unfinished", ground.root / "unfinished-cache"
    command = Command(options(ground.root, run), cache)
    while not (run / "checkpoints/4").exists():
        time.sleep(0.01)
    os.kill(command.process.pid, signal.SIGTERM)
    command.ended()
    released = ground.root / "straight/hf"
    files = [path for top in (cache, released, run) for path in top.rglob("*") if path.is_file()]
    last = (released, run / "checkpoints")  # these take longest
    files.sort(key=lambda path: (any(top in path.parents for top in last), path))
    files = [path for path in files if only in str(path)]
    cases = [(path, name) for path in files for name in DAMAGES][:: max(every, 1)]
    for path, name in cases:
        copy = ground.root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        for top in (run, cache, released):
            shutil.copytree(top, copy / top.name)
        top = released.parent if released in path.parents else ground.root
        DAMAGES[name](copy / path.relative_to(top))
        if top == released.parent:
            kind, end = "released folder", verified(call([str(copy / "hf")], cache, VERIFY))
        else:
            other = copy / run.name
            words = options(ground.root, other, num_samples=0, export=False)
            end = ground.outcome(words, copy / cache.name, other)
            kind = "checkpoints" if "checkpoints" in path.parts else "run folder"
            if cache in path.parents:
                kind = f"caches: {path.relative_to(cache).parts[0]}"
        rows.setdefault(f"{kind}, {name}", Counter())[end] += 1
        report(f"{path.relative_to(top)} {name}", end)


def verified(ended: tuple[int, str, str]) -> str:
    """Outcome of `easyaira verify` on a damaged folder."""
    status, _, err = ended
    if status == 0:
        return "accepted"
    lines = err.strip().splitlines()
    if status in (2, 4) and lines and all(line.startswith("error: ") for line in lines):
        return f"status {status}, named"
    return f"STATUS {status}, {len(lines)} LINES: {lines[-1][:200] if lines else ''}"


def report(case: str, end: str) -> None:
    print(f"{case}: {end}", file=sys.stderr, flush=True)


def inside() -> None:
    """Go into a namespace in which this user can mount disks, if the system has them."""
    enter = ["unshare", "-Urm", sys.executable, *sys.argv]
    if INSIDE not in os.environ and not subprocess.call(["unshare", "-Urm", "true"]):
        os.execvpe(enter[0], enter, os.environ | {INSIDE: "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=30)
    parser.add_argument("--every", type=int, default=1, help="every N-th damage; 0: none")
    parser.add_argument("--only", default="", help="damages to files whose path has this word")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    inside()
    random.seed(asked.seed)
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    FORKED.set_forkserver_preload(IMPORTED)
    rows = {"kill -9, then the same command": Counter(), "full disk": Counter()}
    with tempfile.TemporaryDirectory() as folder:
        programs = Path(folder) / "programs"
        os.environ |= dict(zip(PROGRAMS, (str(programs), "0"), strict=True))
        try:
            ground_run = Ground(Path(folder))
            kills(ground_run, asked.kills, rows["kill -9, then the same command"])
            disks(ground_run, asked.disks, rows["full disk"])
            if asked.every:
                damages(ground_run, asked.every, asked.only, rows)
        finally:
            table(rows)


def table(rows: dict[str, Counter]) -> None:
    print(f"{date.today()}: python scripts/faults.py {' '.join(sys.argv[1:])}\n")
    print("| what | cases | outcome |\n|---|---|---|")
    for what, ends in rows.items():
        listed = "; ".join(f"{n} {end}" for end, n in sorted(ends.items()))
        print(f"| {what} | {sum(ends.values())} | {listed} |")


if __name__ == "__main__":
    main()
