"""Reading, tokenising, packing, planning and serving."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.lengths import KINDS, synthetic
from benchmarks.show import table
from easyaira.data.batches import Batch, Batches
from easyaira.data.examples import Examples

UPDATES = (8, 32, 128)
SERVED = 4_000_000  # tokens of a serving measurement
WIDTH, HEADS = 768, 12  # GPT-2's; they decide the cost of a long row


def data(args: argparse.Namespace) -> dict[str, object]:
    figures: dict[str, object] = {}
    if args.folder:
        figures["tokenising"] = tokenising(args.folder, args.tokenizer)
        table(figures["tokenising"])
        print()
    served = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for pairs, share in ((False, False), (True, False), (True, True)):
                examples = synthetic(kind, args.rows, 1 + pairs, Path(folder), KINDS[kind].longest)
                how = "sft" if not pairs else "pairs, prompt " + ("once" if share else "twice")
                for size in UPDATES:
                    measured = serving(examples, KINDS[kind].longest, size, share)
                    memory = {"MiB": held_mib()}
                    served.append({"lengths": kind, "layout": how} | measured | memory)
                del examples
    table(served)
    figures["serving"] = served
    return figures


def serving(examples: Examples, max_length: int, size: int, share: bool) -> dict[str, float]:
    """Plan and serve updates of `size` examples on one core.

    `fill` is measured with the row length that packs best, for an attention kernel that skips
    masked blocks. `fill dense` is measured with the cheapest row length for attention over whole
    rows, in a model of GPT-2's width.
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
    """Serve updates until SERVED tokens, and drop their arrays."""
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
    """Anonymous memory of this process; pages of mapped files do not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def tokenising(folder: Path, tokenizer: Path) -> list[dict[str, object]]:
    """Read and tokenise every data set in folder/{sft,preference,toxicity}/, without a cache."""
    from transformers import AutoTokenizer

    from easyaira.config.data import DataConfig
    from easyaira.data import dataset
    from easyaira.data.recipe import Recipe
    from easyaira.data.template import Template

    tasks = {"sft": "conversation", "preference": "pair", "toxicity": "label"}
    rows = []
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
            rows.append(
                {
                    "file": f"{name}/{file.name}",
                    "read": counts["read"],
                    "kept": counts["kept"],
                    "dropped": sum(counts["dropped"].values()),
                    "rows/s": counts["read"] / seconds,
                    "ktok/s": counts["tokens"] / seconds / 1e3,
                }
            )
    return rows
