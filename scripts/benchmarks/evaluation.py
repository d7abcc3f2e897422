"""Evaluation beside lm-evaluation-harness' own `hf` backend, on one core and in turns."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from easyaira.allocator import keep_memory


def timed(function: Callable, seconds: list[float]) -> Callable:
    """The function, which notes the CPU seconds of each call."""

    def noted(*given: Any, **named: Any) -> Any:
        begin = time.process_time()
        result = function(*given, **named)
        seconds.append(time.process_time() - begin)
        return result

    return noted


def evaluation(args: argparse.Namespace) -> list[dict[str, object]]:
    """Requests per CPU second of a task on local files, and the largest difference of two
    log-likelihoods. Tokenising counts, and what the harness does before does not. The first round
    is warm-up."""
    keep_memory()  # in commands, the command line does it; the other side gets it, too
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import torch
    from lm_eval.models.huggingface import HFLM

    from easyaira import loaded
    from easyaira.evaluation import harness
    from easyaira.evaluation.likelihood import Likelihoods

    torch.set_num_threads(1)
    model = loaded.load(str(args.folder), template="plain")
    ends = [model.tokenizer.eos_token_id]
    sides: dict[str, Any] = {
        f"hf, {size} at a time": HFLM(
            str(args.folder), device="cpu", dtype="float32", batch_size=size
        )
        for size in (1, 8)
    }
    likelihoods = Likelihoods(model.model, model.params, model.mesh)
    sides["EasyAira"] = harness.EasyAiraLM(likelihoods, model.tokenizer, ends)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name, lm in sides.items():
        lm.loglikelihood = timed(lm.loglikelihood, seconds[name])
    samples: dict[str, list[Any]] = {}
    options = {"num_fewshot": args.num_fewshot, "limit": args.limit}
    for _ in range(args.rounds + 1):
        for name, lm in sides.items():
            result = harness.run(lm, harness.load([args.task], args.data), **options)
            samples[name] = result["samples"][args.task]
    logps = {
        name: np.array([one[0] for sample in of for one in sample["filtered_resps"]])
        for name, of in samples.items()
    }
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    best = min(median for name, median in medians.items() if name != "EasyAira")
    first = next(iter(sides))
    return [
        {
            "side": name,
            "requests": len(logps[name]),
            "CPU s": median,
            "requests/CPU s": len(logps[name]) / median,
            "ratio to the best of hf": best / median,
            "largest difference": f"{abs(logps[name] - logps[first]).max():.1g}",
            "other choices": sum(
                any(sample[metric] != other[metric] for metric in sample["metrics"])
                for sample, other in zip(samples[name], samples[first], strict=True)
            ),
        }
        for name, median in medians.items()
    ]
