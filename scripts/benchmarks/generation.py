"""Generation beside transformers' `generate`, on one core and in turns."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from easyaira.allocator import keep_memory

SIZES = {
    "small": {"vocab_size": 2048, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "gpt2-small": {},
}
WORK = {  # prompt lengths, and how an answer is made
    "8 equal": ([32] * 8, {"max_new_tokens": 128}),
    "64 uneven": (
        np.random.default_rng(0).integers(5, 60, 64).tolist(),
        {"max_new_tokens": 200, "min_new_tokens": 5},
    ),
}


def generation(args: argparse.Namespace) -> list[dict[str, object]]:
    """Tokens per CPU second of a random GPT-2: ours, and transformers' with its two caches.

    Equal prompts are answered greedily. Answers to uneven prompts are sampled, and every hundredth
    token ends one, so their lengths are geometric.
    """
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    keep_memory()  # for both sides
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    config = GPT2Config(**SIZES[args.model])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).save_pretrained(folder)
        for dtype in args.dtypes:
            model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            for work, (lengths, options) in WORK.items():
                rng = np.random.default_rng(1)
                prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
                ends = tuple(range(0, config.vocab_size, 100)) if "uneven" in work else ()
                sides = {
                    "transformers, dynamic cache": _theirs(model, prompts, options, ends),
                    "transformers, static cache": _theirs(
                        model,
                        prompts,
                        options | {"cache_implementation": "static", "disable_compile": True},
                        ends,
                    ),
                    "EasyAira": _ours(Path(folder), dtype, prompts, options, ends),
                }
                rates: dict[str, list[float]] = {name: [] for name in sides}
                for _ in range(args.rounds + 1):  # the first round is warm-up
                    for name, side in sides.items():
                        begin = time.process_time()
                        rates[name].append(side() / (time.process_time() - begin))
                medians = {name: float(np.median(rate[1:])) for name, rate in rates.items()}
                best = max(rate for name, rate in medians.items() if name != "EasyAira")
                rows += [
                    {"work": work, "dtype": dtype, "side": name, "tokens/CPU s": rate}
                    | {"ratio to the best of transformers": rate / best}
                    for name, rate in medians.items()
                ]
    return rows


def _ours(folder: Path, dtype: str, prompts: list, options: dict, ends: tuple) -> Callable:
    from easyaira.distributed.mesh import make_mesh
    from easyaira.generation.processors import Sampling
    from easyaira.generation.sampler import Sampler
    from easyaira.models.layers import Compute
    from easyaira.models.registry import model_of
    from easyaira.storage.pretrained import Pretrained

    origin = Pretrained(str(folder), folder)
    model = model_of(origin.config, str(folder), Compute(dtype=dtype))
    sampling = Sampling(**options, temperature=1.0 if ends else 0.0, end_ids=ends)
    sampler = Sampler(model, sampling)
    weights = sampler.weights(origin.load(model, make_mesh("fsdp=-1")))

    def side() -> int:
        return sum(len(answer.tokens) for _, answer in sampler.answers(weights, prompts))

    return side


def _theirs(model, prompts: list, options: dict, ends: tuple) -> Callable:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    how = {"do_sample": True, "top_k": 0} if ends else {"do_sample": False}
    how |= {"eos_token_id": list(ends) or None, "pad_token_id": 0}

    def side() -> int:
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=mask, **options, **how)[:, longest:].numpy()
        ended = np.isin(out, ends)
        lengths = np.where(ended.any(1), ended.argmax(1) + 1, out.shape[1])
        return int(lengths.sum())

    return side
