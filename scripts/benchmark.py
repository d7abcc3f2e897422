"""What things cost, measured side by side on this machine.

    python scripts/benchmark.py data                                   # a million synthetic rows
    python scripts/benchmark.py data --folder DATA --tokenizer FOLDER  # and real files

Prints a table, and with --json FILE writes the same figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from easyaira.data.batches import Batch, Batches
from easyaira.data.examples import PER_EXAMPLE, Examples

# median and spread (of a log-normal distribution) of prompts and answers in tokens, longest example
KINDS = {
    "aira": ((25, 0.4), (200, 0.5), 400),
    "hh": ((150, 0.8), (60, 0.7), 1024),
    "ultrafeedback": ((120, 0.9), (280, 0.7), 2048),
}
UPDATES = (8, 32, 128)
SERVED = 4_000_000  # tokens that a measurement of serving makes
WIDTH, HEADS = 768, 12  # GPT-2's, which decide what a long row costs


def synthetic(kind: str, rows: int, pairs: bool, folder: Path) -> Examples:
    """Examples with log-normal lengths, their tokens on disk, from a fixed seed."""
    rng = np.random.default_rng(0)
    (prompt, prompt_spread), (answer, answer_spread), longest = KINDS[kind]
    medians = [prompt] + [answer] * (2 if pairs else 1)
    spreads = [prompt_spread] + [answer_spread] * (2 if pairs else 1)
    lengths = rng.lognormal(np.log(medians), spreads, (rows, len(medians))).astype(np.int64) + 1
    lengths[:, 0] = np.minimum(lengths[:, 0], longest // 2)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], longest - lengths[:, :1])
    starts = np.concatenate([[0], np.cumsum(lengths.ravel())])
    per_row = lengths.shape[1]
    bounds = starts[np.arange(rows)[:, None] * per_row + np.arange(per_row + 1)]
    arrays = {name: np.zeros(rows, dtype) for name, dtype in PER_EXAMPLE.items()}
    arrays["rows"] = np.arange(rows)
    for name, dtype in (("tokens", np.int32), ("learned", np.bool_)):
        held = np.memmap(folder / f"{kind}-{pairs}-{name}", dtype, "w+", shape=(int(starts[-1]),))
        for begin in range(0, len(held), 10**7):
            held[begin : begin + 10**7] = rng.integers(0, 2, len(held[begin : begin + 10**7]))
        arrays[name] = held.view(np.ndarray)
    return Examples(**arrays | {"bounds": bounds})


def serving(examples: Examples, max_length: int, size: int, share: bool) -> dict[str, float]:
    """Planning and serving updates of `size` examples, on one core.

    `fill` is that of rows as long as they pack best, for an attention kernel that skips what a
    segment does not see; `fill dense` that of the shorter rows that cost least where attention is
    computed for whole rows, in a model of GPT-2's width.
    """
    batches = Batches(examples, size, seed=0, share_prompt=share, attention=0.0)
    begin = time.perf_counter()
    shapes = batches.shapes
    planned = time.perf_counter() - begin
    begin = time.perf_counter()
    served = serve(batches)
    seconds = time.perf_counter() - begin
    tokens = sum(batch.num_tokens for batch in served)
    updates = len(served)
    lengths = [lengths_of(batches, update) for update in range(updates)]
    dense = serve(replace(batches, attention=(4 * WIDTH + 30 * HEADS) / (24 * WIDTH**2)))
    return {
        "examples": size,
        "plan s": planned,
        "Mtok/s": tokens / seconds / 1e6,
        "fill": fill(served),
        "fill dense": fill(dense),
        "to longest": tokens / sum(of.max() * of.size for of in lengths),
        "to max_length": tokens / (updates * size * examples.answers * max_length),
        "shapes": len(shapes),
        "not foreseen": len({batch.shape for batch in served} - set(shapes)),
    }


def serve(batches: Batches) -> list[Batch]:
    """Updates of SERVED tokens, without their arrays."""
    served: list[Batch] = []
    tokens = 0
    while tokens < SERVED and len(served) < len(batches):
        served.append(batches[len(served)]._replace(arrays={}))
        tokens += served[-1].num_tokens
    return served


def fill(served: list[Batch]) -> float:
    return sum(batch.filled for batch in served) / sum(batch.positions for batch in served)


def lengths_of(batches: Batches, update: int) -> np.ndarray:
    bounds = batches.examples.bounds[batches.members(update)]
    return (bounds[:, 1] - bounds[:, 0])[:, None] + np.diff(bounds[:, 1:])


def held_mib() -> float:
    """Memory of this process besides the pages of mapped files, which the system takes back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def tokenising(folder: Path, tokenizer: Path) -> list[dict[str, object]]:
    """Every data set of a folder of folders, read and tokenised without a cache."""
    from transformers import AutoTokenizer

    from easyaira.config import DataConfig
    from easyaira.data import dataset
    from easyaira.data.examples import Recipe
    from easyaira.data.templates import Template

    tasks = {"sft": "conversation", "preference": "pair", "toxicity": "label"}
    told = []
    for name, task in tasks.items():
        for file in sorted((folder / name).iterdir()):
            template = Template(AutoTokenizer.from_pretrained(tokenizer), "aira", "gpt2")
            with tempfile.TemporaryDirectory() as cache:
                config = DataConfig(train=str(file), cache_dir=cache, max_dropped=0.9)
                begin = time.perf_counter()
                data = dataset.load(
                    config, Recipe(task, 1024), template=template, vocab_size=10**6, seed=0
                )
                seconds = time.perf_counter() - begin
            counts = data.report["train"]
            told.append(
                {
                    "file": f"{name}/{file.name}",
                    "read": counts["read"],
                    "kept": counts["kept"],
                    "dropped": sum(counts["dropped"].values()),
                    "rows/s": counts["read"] / seconds,
                    "ktok/s": counts["tokens"] / seconds / 1e3,
                }
            )
    return told


def show(rows: list[dict[str, object]]) -> None:
    names = list(rows[0])
    cells = [[f"{v:,.3f}" if isinstance(v, float) else f"{v}" for v in r.values()] for r in rows]
    widths = [max(len(c) for c in column) for column in zip(names, *cells, strict=True)]
    for line in (names, *cells):
        print("  ".join(c.rjust(width) for c, width in zip(line, widths, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["data"])
    parser.add_argument("--rows", type=int, default=1_000_000, help="synthetic rows of each kind")
    parser.add_argument("--folder", type=Path, help="real data: sft/ preference/ toxicity/")
    parser.add_argument("--tokenizer", type=Path, help="for real data: a tokenizer's folder")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    if args.folder:
        figures["tokenising"] = tokenising(args.folder, args.tokenizer)
        show(figures["tokenising"])
        print()
    served = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for pairs, share in ((False, False), (True, False), (True, True)):
                examples = synthetic(kind, args.rows, pairs, Path(folder))
                how = "sft" if not pairs else "pairs, prompt " + ("once" if share else "twice")
                for size in UPDATES:
                    measured = serving(examples, KINDS[kind][2], size, share)
                    memory = {"MiB": held_mib()}
                    served.append({"lengths": kind, "layout": how} | measured | memory)
                del examples
    show(served)
    figures["serving"] = served
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
