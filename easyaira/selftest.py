"""Check this machine: reproducible bits, attention, whole runs, speed. Minutes, no download.

    python -m easyaira.selftest [--json]

Trains tiny models with every algorithm, twice each on the device that a run would use and once in
float32 on the CPU. Resumes a run from an earlier checkpoint, releases a run and reads it back. Exit
status 0: all checks passed; 2: one failed. Attach the printed table to bug reports.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from easyaira import cli
from easyaira.errors import CheckFailed, EasyAiraError, Preempted

STEPS = 6
DTYPE = "bfloat16"  # as on an accelerator; also on a CPU, where runs default to float32
SCORER = {
    "architectures": ["GPT2ForSequenceClassification"],
    "pad_token_id": 0,
    "id2label": {"0": "REWARD"},
    "label2id": {"REWARD": 0},
}
RUNS = {  # name: command, options in addition to the common ones
    "sft": ("train_sft", "--data.train {0}/data/sft_train.jsonl --export true --save_steps 3"),
    "dpo, prompt shared": ("train_dpo", "--data.share_prompt always"),
    "dpo, not shared": (
        "train_dpo",
        "--data.share_prompt never --dpo.precompute_ref_log_probs false",
    ),
    "reward": ("train_reward", "--model.name_or_path {0}/scorer"),
    "lora": (
        "train_sft",
        "--data.train {0}/data/sft_train.jsonl --model.name_or_path {0}/pretrained "
        "--model.init pretrained --lora.r 4 --lora.target_modules [c_attn,c_proj]",
    ),
}
# largest relative difference of losses from float32 runs; bfloat16 rounds to 8 bits per layer
LOSS_BOUND = {"bfloat16": 2e-2, "float32": 1e-4}


class Row(NamedTuple):
    check: str
    passed: bool
    seconds: float
    seen: str


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m easyaira.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # see `reference`
    args = parser.parse_args(argv)
    if args.reference:
        return all_runs(args.reference, "cpu", "float32")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="easyaira-selftest-") as folder:
        for row in checks(Path(folder)):
            rows.append(row)
            line = f"{row.check:28}{'ok' if row.passed else 'FAILED':8}{row.seconds:6.1f} s  "
            print(line + row.seen, file=sys.stderr if args.json else sys.stdout, flush=True)
    failed = [row.check for row in rows if not row.passed]
    if args.json:
        print(json.dumps({"passed": not failed, "checks": [row._asdict() for row in rows]}))
    else:
        print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    if failed:
        sys.exit(2)


def checks(root: Path) -> Iterator[Row]:
    """Run all checks in turn; a failed check does not stop the next."""
    os.environ["EASYAIRA_CACHE"] = str(root / "cache")

    from easyaira.run import device_checks as device  # deferred for a quick --help

    yield timed("machine", device.machine)
    yield timed("sums, twice", device.sums)
    for kernel in device.kernels():
        yield timed(f"attention, {kernel}", partial(device.attention_by, kernel, DTYPE))
    write_inputs(root)
    with reference(root) as finished:
        for name in RUNS:
            yield timed(name, partial(twice, root, name))
        yield timed("resume", partial(resume, root))
        yield timed("release", partial(release, root))
        yield timed("against a CPU in float32", partial(against_cpu, root, finished))
    yield timed("speed of GPT-2 124M", partial(device.speed, DTYPE))


def timed(name: str, check: Callable[[], str]) -> Row:
    start = time.perf_counter()
    try:
        passed, seen = True, check()
    except Preempted:
        raise
    except (Exception, SystemExit) as error:  # a check that cannot run has failed
        passed, seen = False, str(error) or repr(error)
        if not isinstance(error, EasyAiraError):
            seen = f"{type(error).__name__}: {seen}"
    seen = " ".join(seen.split())[:300]
    return Row(name, passed, round(time.perf_counter() - start, 1), seen)


def write_inputs(root: Path) -> None:
    """Write data and tiny models: config.json and tokenizer, and one with weights for LoRA."""
    from easyaira import quickstart, train_sft

    quickstart.write_data(root / "data")
    tiny = {"n_layer": 2, "n_embd": 64, "n_head": 2}
    for name, overrides in {"base": {}, "scorer": SCORER}.items():
        quickstart.write_base(root / name, root / "data")
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | tiny | overrides))
    with contextlib.redirect_stdout(io.StringIO()):
        train_sft.main(arguments(root, "sft", root / "pretrained", "float32"))


def arguments(root: Path, name: str, out: Path, dtype: str) -> list[str]:
    """Command line of one of RUNS."""
    common = (
        "--model.name_or_path {0}/base --model.init random --data.train {0}/data/dpo_train.jsonl "
        f"--data.template plain --data.max_examples 64 --train_batch_size 16 --max_steps {STEPS} "
        "--logging_steps 1 --num_samples 0 --export false --energy null --eval_steps 0 "
        f"--optimizer.learning_rate 1e-3 --model.dtype {dtype} --output_dir {out} "
    )
    return (common + RUNS[name][1]).format(root).split()


def folder_of(root: Path, name: str, which: str) -> Path:
    return root / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{which}"


def train(root: Path, name: str, which: str, dtype: str) -> str:
    """Run one of RUNS, and return its standard output."""
    from importlib import import_module

    command = import_module(f"easyaira.{RUNS[name][0]}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        command.main(arguments(root, name, folder_of(root, name, which), dtype))
    return printed.getvalue()


def all_runs(root: Path, which: str, dtype: str) -> None:
    for name in RUNS:
        train(root, name, which, dtype)


@contextlib.contextmanager
def reference(root: Path) -> Iterator[Callable[[], None]]:
    """Run all of RUNS in float32 on the CPU in a child process; yield a function that waits."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "EASYAIRA_CACHE": str(root / "cache-cpu")}
    command = [sys.executable, "-m", "easyaira.selftest", "--reference", str(root)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:

        def finish() -> None:
            _, errors = process.communicate()
            if process.returncode:
                last = errors.strip().splitlines()[-1:] or ["no message"]
                raise CheckFailed(
                    f"the runs on the CPU exited with {process.returncode}: {last[0]}"
                )

        try:
            yield finish
        finally:
            process.kill()


def trained_bits(folder: Path) -> dict[str, str]:
    """Checksums of the arrays of the newest checkpoint, as stored beside it."""
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    sums = json.loads((newest / "sums/metadata").read_text())
    return {name: bits for name, bits in sums.items() if name.startswith(("params", "opt_state"))}


def losses_of(folder: Path) -> list[float]:
    from easyaira.train import log

    return [row["loss"] for row in log.read(folder / "metrics.jsonl") if "loss" in row]


def twice(root: Path, name: str) -> str:
    printed = [train(root, name, which, DTYPE) for which in ("first", "second")]
    folders = [folder_of(root, name, which) for which in ("first", "second")]
    first, second = map(losses_of, folders)
    if first != second:
        raise CheckFailed(f"losses differ the second time: {first} and {second}")
    if trained_bits(folders[0]) != trained_bits(folders[1]):
        raise CheckFailed("weights differ the second time")
    kernel = [line for line in printed[0].splitlines() if line.startswith("attention:")]
    note = "; ".join(["", *kernel])
    return f"{STEPS} updates, the same bits twice; loss {first[0]:.4f} -> {first[-1]:.4f}{note}"


def resume(root: Path) -> str:
    """Delete the last checkpoint of a run, and resume it from update 3."""
    whole, cut = folder_of(root, "sft", "first"), folder_of(root, "sft", "second")
    shutil.rmtree(cut / "checkpoints" / str(STEPS))
    printed = train(root, "sft", "second", DTYPE)
    if "after update 3" not in printed:
        raise CheckFailed("the run did not continue after update 3")
    if trained_bits(whole) != trained_bits(cut):
        raise CheckFailed("weights differ from those of the uninterrupted run")
    return f"continued after update 3 of {STEPS}, to the same bits"


def release(root: Path) -> str:
    """Read the export's own report, and load the released weights as a new model."""
    import jax

    from easyaira.distributed import mesh as meshes
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained

    folder = folder_of(root, "sft", "first") / "hf"
    proof = json.loads((folder / "export_report.json").read_text())
    origin = pretrained.find(str(folder))
    model = model_of(origin.config, str(folder))
    with model.on(mesh := meshes.make_mesh("fsdp=-1")):
        leaves = jax.tree.leaves(origin.load(model, mesh))
    if not all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves):
        raise CheckFailed("the released weights are not finite")
    return f"{proof['read_back']}; logits against PyTorch: {json.dumps(proof['logits'])}"


def against_cpu(root: Path, finished: Callable[[], None]) -> str:
    finished()
    errors = []
    for name in RUNS:
        pairs = zip(
            losses_of(folder_of(root, name, "first")),
            losses_of(folder_of(root, name, "cpu")),
            strict=True,
        )
        for step, (ours, theirs) in enumerate(pairs, 1):
            error = abs(ours - theirs) / max(abs(theirs), 0.1)
            errors.append((error, f"{name}, update {step}: {ours:.5f} and {theirs:.5f}"))
    worst, where = max(errors, key=lambda item: (math.isnan(item[0]), item[0]))
    if not worst <= LOSS_BOUND[DTYPE]:
        raise CheckFailed(f"losses differ by {worst:.1g}: {where}")
    return f"losses of {DTYPE} within {worst:.1g} ({where})"


if __name__ == "__main__":
    cli.run_command(main)
