"""Check this machine: the same bits twice, attention, whole runs, and speed. Minutes, no download.

    python -m easyaira.selftest [--json]

Trains tiny models with every algorithm on the device that a run would use, twice each, and once
more in float32 on the CPU; continues a run that lost its end; releases one and reads it back. The
table says what was seen. Exit status 0: all checks passed; 2: one failed. Attach it to a report of
a fault.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from easyaira import cli
from easyaira.errors import EasyAiraError, Preempted

STEPS = 6
PACKAGES = "easyaira jax jaxlib flax optax orbax-checkpoint numpy transformers".split()
SCORER = {
    "architectures": ["GPT2ForSequenceClassification"],
    "pad_token_id": 0,
    "id2label": {"0": "REWARD"},
    "label2id": {"REWARD": 0},
}
RUNS = {  # name: command, options beside the common ones
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
# losses of bfloat16 runs against float32 ones: rounding of 8 bits in each of a few layers
LOSS_BOUND = {"bfloat16": 2e-2, "float32": 1e-4}


class Failure(Exception):
    """A check that failed, in one line."""


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
    """All checks, one after another; what one raises does not stop the next."""
    os.environ["EASYAIRA_CACHE"] = str(root / "cache")
    yield timed("machine", machine)
    yield timed("sums, twice", sums)
    yield from (timed(f"attention, {name}", check) for name, check in attention_checks())
    write_inputs(root)
    with reference(root) as finished:
        for name in RUNS:
            yield timed(name, partial(twice, root, name))
        yield timed("resume", partial(resume, root))
        yield timed("release", partial(release, root))
        yield timed("against a CPU in float32", partial(against_cpu, root, finished))
    yield timed("speed of GPT-2 124M", speed)


def timed(name: str, check: Callable[[], str]) -> Row:
    began = time.perf_counter()
    try:
        passed, seen = True, check()
    except Preempted:
        raise
    except (Exception, SystemExit) as error:  # a check that cannot run has failed
        passed, seen = False, str(error) or repr(error)
        if not isinstance(error, (Failure, EasyAiraError)):
            seen = f"{type(error).__name__}: {seen}"
    seen = " ".join(seen.split())[:300]
    return Row(name, passed, round(time.perf_counter() - began, 1), seen)


def machine() -> str:
    import jax

    devices = jax.devices()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    backend = " ".join(devices[0].client.platform_version.split())
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{len(devices)} x {devices[0].device_kind}; {backend}; Python {python}; {versions}"


def dtype() -> str:
    """Of the runs: as on an accelerator, also on a CPU, where float32 is the default."""
    return "bfloat16"


def sums() -> str:
    """Answers of pairs and rows of an embedding, added up 20 times, and in float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from easyaira.losses import preference
    from easyaira.models.embedding import sum_by_id

    rng = np.random.default_rng(0)
    rows, length, pairs = 32, 640, 64
    segment_ids = np.repeat(np.arange(1, pairs + 1), rows * length // pairs).reshape(rows, length)
    sides = np.tile(np.repeat([1, 2], length // 4), (rows, 2))
    logps = -rng.exponential(5, (rows, length)).astype(np.float32)
    mask = np.ones((rows, length), bool)
    values = rng.normal(size=(1, rows * length, 64)).astype(np.float32)
    ids = rng.zipf(1.3, (1, rows * length)).clip(0, 4095).astype(np.int32)
    of_pairs = jax.jit(partial(preference.pair_sums, pairs=pairs))
    of_rows = jax.jit(partial(sum_by_id, size=4096))

    def both() -> list[np.ndarray]:
        return [
            np.asarray(x) for x in (of_pairs(logps, mask, segment_ids, sides), of_rows(values, ids))
        ]

    first = both()
    for _ in range(19):
        if any((x != y).any() for x, y in zip(first, both(), strict=True)):
            raise Failure("the same sum has other bits the second time")
    answers = np.zeros((pairs, 2))
    np.add.at(answers, (segment_ids - 1, sides - 1), logps.astype(np.float64))
    table = np.zeros((4096, 64))
    np.add.at(table, ids[0], values[0].astype(np.float64))
    errors = [
        np.abs(x - y).max() / np.abs(y).max()
        for x, y in zip(first, (answers, table[None]), strict=True)
    ]
    if max(errors) > 1e-5:
        raise Failure(f"a sum is off by {max(errors):.1g}, relative to the largest")
    scatter = jax.jit(lambda v, i: jnp.zeros((4096, 64)).at[i].add(v))
    others = sum(
        (np.asarray(scatter(values[0], ids[0])) != np.asarray(scatter(values[0], ids[0]))).any()
        for _ in range(5)
    )
    return (
        f"20 calls, one result; relative error {max(errors):.1g}; "
        f"a plain scatter-add differed in {others} of 5 pairs of calls"
    )


def layouts() -> dict[str, tuple[Any, Any]]:
    """Rows as runs have them, and as kernels have stumbled over: (segment ids, sides)."""
    import numpy as np

    rng = np.random.default_rng(0)
    found = {}
    for length in (24, 64, 128, 192, 256, 320, 640, 1000, 1024):
        for shared in (True, False):
            segments, sides = np.zeros((2, 4, length), np.int32)
            for row in range(3):  # the last row is padding
                at, number = 0, 1 + 8 * row
                while at < length and number <= 8 * (row + 1):
                    most = max(3, length // (3 * (row + 1)))
                    sizes = rng.integers(1, most, 3) if shared else (rng.integers(2, most), 0, 0)
                    block = np.repeat([0, 1, 2], sizes)[: length - at]
                    segments[row, at : at + len(block)] = number
                    sides[row, at : at + len(block)] = block
                    at, number = at + len(block), number + 1
            found[f"{length}{', prompts shared' if shared else ''}"] = segments, sides
    full = np.ones((2, 512), np.int32)
    found["512, full"] = full, 0 * full
    return found


def attention_checks() -> Iterator[tuple[str, Callable[[], str]]]:
    import jax

    from easyaira.train.resolve import KERNELS

    for name in ("xla", *KERNELS.get(jax.default_backend(), ())):
        yield name, partial(attention_by, name)


def attention_by(name: str) -> str:
    """A kernel's faults are said, and no failure: a run does not use a kernel that is wrong on its
    rows. XLA's attention is what it falls back to."""
    import jax.numpy as jnp

    from easyaira.models.layers import Compute
    from easyaira.train import kernel_check

    heads = [kernel_check.Heads(4, 4, 64), kernel_check.Heads(4, 2, 128)]
    faults, count = [], 0
    for of in heads:
        for shape, (segment_ids, sides) in layouts().items():
            compute = Compute(jnp.dtype(dtype()), attention=name, shared_prompt="shared" in shape)
            problem = kernel_check.problem(segment_ids, sides, of, compute)
            count += 1
            faults += [f"{problem} ({shape}; heads of {of.width})"] if problem else []
    seen = f"{count - len(faults)} of {count} layouts within rounding" + "".join(
        f"; {f}" for f in faults
    )
    if faults and name == "xla":
        raise Failure(seen)
    return seen


def write_inputs(root: Path) -> None:
    """Data, and tiny models: config.json and tokenizer, and one with weights for adapters."""
    from easyaira import quickstart, train_sft

    quickstart.write_data(root / "data")
    tiny = {"n_layer": 2, "n_embd": 64, "n_head": 2}
    for name, more in {"base": {}, "scorer": SCORER}.items():
        quickstart.write_base(root / name, root / "data")
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | tiny | more))
    with contextlib.redirect_stdout(io.StringIO()):
        train_sft.main(arguments(root, "sft", root / "pretrained", "float32"))


def arguments(root: Path, name: str, out: Path, dtype: str) -> list[str]:
    """The command line of one of RUNS."""
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
    """Make one of RUNS; returns what it printed."""
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
    """All runs in float32 on the CPU, in a process beside this one; yields what waits for it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "EASYAIRA_CACHE": str(root / "cache-cpu")}
    command = [sys.executable, "-m", "easyaira.selftest", "--reference", str(root)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:

        def finish() -> None:
            _, errors = process.communicate()
            if process.returncode:
                last = errors.strip().splitlines()[-1:] or ["no message"]
                raise Failure(f"the runs on the CPU ended with {process.returncode}: {last[0]}")

        try:
            yield finish
        finally:
            process.kill()


def trained_bits(folder: Path) -> dict[str, str]:
    """Sums of all bits of each array of the last checkpoint, which the run wrote beside it."""
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    sums = json.loads((newest / "sums/metadata").read_text())
    return {name: bits for name, bits in sums.items() if name.startswith(("params", "opt_state"))}


def losses_of(folder: Path) -> list[float]:
    from easyaira.train import log

    return [row["loss"] for row in log.read(folder / "metrics.jsonl") if "loss" in row]


def twice(root: Path, name: str) -> str:
    printed = [train(root, name, which, dtype()) for which in ("first", "second")]
    folders = [folder_of(root, name, which) for which in ("first", "second")]
    first, second = map(losses_of, folders)
    if first != second:
        raise Failure(f"losses differ the second time: {first} and {second}")
    if trained_bits(folders[0]) != trained_bits(folders[1]):
        raise Failure("weights differ the second time")
    chosen = [line for line in printed[0].splitlines() if line.startswith("attention:")]
    note = "; ".join(["", *chosen])
    return f"{STEPS} updates, the same bits twice; loss {first[0]:.4f} -> {first[-1]:.4f}{note}"


def resume(root: Path) -> str:
    """A run that lost what came after update 3."""
    whole, cut = folder_of(root, "sft", "first"), folder_of(root, "sft", "second")
    shutil.rmtree(cut / "checkpoints" / str(STEPS))
    printed = train(root, "sft", "second", dtype())
    if "after update 3" not in printed:
        raise Failure("the run did not continue after update 3")
    if trained_bits(whole) != trained_bits(cut):
        raise Failure("weights differ from those of the run that was not interrupted")
    return f"continued after update 3 of {STEPS}, to the same bits"


def release(root: Path) -> str:
    """The export's own proof, and the released weights read as a model of their own."""
    import jax

    from easyaira.distributed import mesh as meshes
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained

    folder = folder_of(root, "sft", "first") / "hf"
    proof = json.loads((folder / "export_report.json").read_text())
    found = pretrained.find(str(folder))
    model = model_of(found.config, str(folder))
    with model.on(mesh := meshes.make_mesh("fsdp=-1")):
        leaves = jax.tree.leaves(found.load(model, mesh))
    if not all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves):
        raise Failure("the released weights are not finite")
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
    worst, where = max(errors, key=lambda found: (math.isnan(found[0]), found[0]))
    if not worst <= LOSS_BOUND[dtype()]:
        raise Failure(f"losses differ by {worst:.1g}: {where}")
    return f"losses of {dtype()} within {worst:.1g} ({where})"


def speed() -> str:
    """Tokens of an SFT update, rows full of tokens, after two updates of warm-up."""
    import jax
    import numpy as np
    import optax

    from easyaira.algorithms import sft
    from easyaira.data.packing import Shape
    from easyaira.distributed import mesh as meshes
    from easyaira.models.layers import Compute
    from easyaira.models.registry import model_of
    from easyaira.plan import cost
    from easyaira.train import metrics
    from easyaira.train import step as steps
    from easyaira.train.resolve import KERNELS
    from easyaira.train.step import init_state

    on_cpu = jax.default_backend() == "cpu"
    rows, length, updates = (1, 128, 2) if on_cpu else (32, 640, 10)
    shape = Shape(rows, length)
    kernel = (*KERNELS.get(jax.default_backend(), ()), "xla")[0]
    model = model_of(
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        "GPT-2",
        Compute(jax.numpy.dtype(dtype()), attention=kernel),
    )
    mesh = meshes.make_mesh("fsdp=-1", jax.devices()[:1])
    ids = np.random.default_rng(0).integers(0, 50257, (1, *shape), np.int32)
    batch = {
        "tokens": ids,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
        "segment_ids": np.ones_like(ids),
        "sides": np.zeros_like(ids),
        "loss_mask": np.ones(ids.shape, bool),
    }
    with model.on(mesh):
        tx = optax.adamw(1e-5)
        params = jax.jit(model.init)(jax.random.key(0))
        state = init_state(params, tx, mesh)
        del params
        step = steps.jit_train_step(sft.sft(model), tx, state)
        times = []
        for _ in range(2 + updates):
            began = time.perf_counter()
            state, sums = step(state, None, batch, None)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - began)
    loss = float(sums["loss"][0]) / float(sums["loss"][1])
    if not np.isfinite(loss):
        raise Failure("the loss is not finite")
    rate = rows * length / sorted(times[2:])[updates // 2]
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    mfu = f", MFU {rate * cost.flops_per_token(model, False, None) / peak:.0%}" if peak else ""
    seen = f"{rate:,.0f} tokens/s in {dtype()}, {rows} rows of {length}{mfu}"
    return f"{seen}; first update after {times[0]:.0f} s"


if __name__ == "__main__":
    cli.run_command(main)
