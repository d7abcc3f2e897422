"""Kill a run, fill its disk and damage its files; count how the same command ends afterwards.

    python scripts/faults.py                                        # hours
    python scripts/faults.py --kills 3 --disks 6 --every 21         # every 21st damage

A small DPO run on a CPU, in child processes. Right is: status 0 and the weights of an undisturbed
run, or status 2 or 4 and one line. Anything else is printed with its case.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

from easyaira import quickstart

STEPS = 8


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
    config |= {"n_layer": 2, "n_embd": 64, "n_head": 2}
    (root / "base/config.json").write_text(json.dumps(config))


def command(root: Path, run: Path, export: bool = True) -> list[str]:
    options = {
        "model.name_or_path": root / "base",
        "model.init": "random",
        "data.train": root / "data/dpo_train.jsonl",
        "data.eval": 0.05,
        "data.max_examples": 200,
        "data.template": "plain",
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "num_samples": 2,
        "output_dir": run,
        "export": export,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "easyaira.train_dpo", *flags]


def environment(cache: Path) -> dict[str, str]:
    offline = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return os.environ | offline | {"EASYAIRA_CACHE": str(cache)}


def call(words: list[str], cache: Path) -> tuple[int, str, str]:
    done = subprocess.run(words, env=environment(cache), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


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
        return "said, and the same weights" if warned else "the same weights"
    if status in (2, 4) and len(lines) == 1 and lines[0].startswith("error: "):
        return f"status {status}, one line"
    return f"STATUS {status}, {len(lines)} LINES: {lines[-1][:200] if lines else ''}"


def kills(root: Path, count: int, wanted: dict[str, str], seconds: float) -> Counter:
    """kill -9 at a random moment, and the same command again."""
    ends: Counter = Counter()
    for number in range(count):
        run, cache = root / f"killed-{number}", root / f"killed-cache-{number}"
        words = command(root, run)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen(words, env=environment(cache), **quiet)
        time.sleep(random.uniform(0, seconds))
        child.send_signal(signal.SIGKILL)
        child.wait()
        result = outcome(*call(words, cache), run, wanted)
        ends[result] += 1
        report(f"kill {number}", result)
        shutil.rmtree(run), shutil.rmtree(cache)
    return ends


def disks(root: Path, count: int, wanted: dict[str, str]) -> Counter:
    """A disk of a random size, and the same command with more room."""
    ends: Counter = Counter()
    for _ in range(count):
        disk, cache = root / "disk", root / "disk-cache"
        disk.mkdir(exist_ok=True)
        words, copy = command(root, disk / "run"), root / "again"
        size = int(2 ** random.uniform(5, 13))  # KiB
        script = (  # what lies on the disk is kept, as the mount ends with its namespace
            f'mount -t tmpfs -o size={size}k none "$0" || exit 99; kept=$1; shift; "$@"; '
            'status=$?; rm -rf "$kept"; cp -a "$0" "$kept"; exit $status'
        )
        inside = ["unshare", "-Urm", "sh", "-c", script, str(disk), str(copy), *words]
        status, out, err = call(inside, cache)
        if status == 99:
            print("disks: no tmpfs can be mounted here; left out")
            return ends
        first = outcome(status, out, err, copy / "run", wanted)
        ends[f"full: {first}"] += 1
        words = command(root, copy / "run")
        second = outcome(*call(words, cache), copy / "run", wanted)
        ends[f"with more room: {second}"] += 1
        report(f"disk of {size} KiB", first), report("  with more room", second)
        shutil.rmtree(cache, ignore_errors=True)
    return ends


def damages(root: Path, every: int, wanted: dict[str, str]) -> dict[str, Counter]:
    """Each damage to each file of an unfinished run and of the caches."""
    run, cache = root / "unfinished", root / "unfinished-cache"
    words = command(root, run, export=False)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(words, env=environment(cache), **quiet)
    while not (run / "checkpoints/4").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    child.wait()
    files = [p.relative_to(root) for top in (run, cache) for p in sorted(top.rglob("*"))]
    files = [path for path in files if (root / path).is_file() and "programs" not in path.parts]
    cases = [(path, name) for path in files for name in DAMAGES][:: max(every, 1)]
    ends: dict[str, Counter] = {}
    for path, name in cases:
        copy = root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        for top in (run, cache):
            shutil.copytree(top, copy / top.name)
        DAMAGES[name](copy / path)
        resumed = copy / run.name
        words = command(root, resumed, export=False)
        result = outcome(*call(words, copy / cache.name), resumed, wanted)
        parts = path.parts
        kind = "checkpoints" if "checkpoints" in parts else " ".join(parts[:1])
        kind = f"caches: {parts[1]}" if parts[0] == cache.name else kind.replace(run.name, "run")
        ends.setdefault(f"{kind}, {name}", Counter())[result] += 1
        report(f"{path} {name}", result)
    return ends


def report(case: str, result: str) -> None:
    print(f"{case}: {result}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=30)
    parser.add_argument("--every", type=int, default=1, help="every N-th damage; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ground(root)
        started = time.monotonic()
        status, _, err = call(command(root, root / "straight"), root / "straight-cache")
        if status:
            sys.exit(err)
        seconds, wanted = time.monotonic() - started, weights(root / "straight")
        rows = {"kill -9, then the same command": kills(root, options.kills, wanted, seconds)}
        rows["full disk"] = disks(root, options.disks, wanted)
        if options.every:
            rows |= damages(root, options.every, wanted)
    print(f"{date.today()}: python scripts/faults.py {' '.join(sys.argv[1:])}\n")
    print("| what | cases | outcome |\n|---|---|---|")
    for what, ends in rows.items():
        summary = "; ".join(f"{n} {end}" for end, n in sorted(ends.items()))
        print(f"| {what} | {sum(ends.values())} | {summary} |")


if __name__ == "__main__":
    main()
