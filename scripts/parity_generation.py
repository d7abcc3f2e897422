"""Greedy answers beside those of transformers' `generate`, token by token, for each architecture.

    python scripts/parity_generation.py DATA

DATA holds tokenizers/gpt2, opt and llama2, and sft/aira1_en.jsonl.gz with rows that have a prompt.
Tiny models with random weights of std 0.2, float32. Prints a table. Where answers differ, `gap` is
transformers' lead of its own token over ours in logits: rounding decides below about 1e-5.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import jax
import torch
from transformers import AutoTokenizer

from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import generate
from helpers import tiny

POSITIONS, NEW, PROMPTS = 256, 40, 200
POSITION_KEYS = ("n_positions", "seq_length", "max_position_embeddings")
COLUMNS = ("model", "tokenizer", "prompts", "equal", "tokens", "gap")


def compare(name: str, data: Path, texts: list[str]) -> list[str]:
    """A line of the table."""
    kind = {"gpt2": "gpt2", "opt": "opt"}.get(name.partition("-")[0], "llama2")
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / kind)
    config = tiny.CASES[name]
    positions = next(key for key in POSITION_KEYS if key in config)
    config = config | {"vocab_size": len(tokenizer), positions: POSITIONS}
    end = tokenizer.eos_token_id
    config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end}
    prompts = [tokenizer(text).input_ids for text in texts]
    prompts = [prompt for prompt in prompts if len(prompt) < POSITIONS - NEW][:PROMPTS]
    theirs = tiny.torch_model(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params = tiny.load(Path(folder))
    answers = generate(model, params, prompts, Sampling(max_new_tokens=NEW, end_ids=(end,)))
    wanted = answers_of(theirs, prompts, end)
    equal, gaps = 0, [0.0]
    for prompt, answer, other in zip(prompts, answers, wanted, strict=True):
        equal += answer.tokens == other
        if answer.tokens != other:
            pairs = enumerate(zip(answer.tokens, other, strict=False))
            at = next(i for i, (own, their) in pairs if own != their)
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + other[:at]])).logits[0, -1]
            gaps.append(float(logits[other[at]] - logits[answer.tokens[at]]))
    count = f"{sum(len(answer.tokens) for answer in answers):,}"
    gap = f"{max(gaps):.1g}" if len(gaps) > 1 else ""
    return [name, kind, str(len(prompts)), str(equal), count, gap]


def answers_of(model: torch.nn.Module, prompts: list[list[int]], end: int) -> list[list[int]]:
    """Answers by transformers, to prompts of equal lengths at a time: nothing is padded."""
    answers = {}
    for length in {len(prompt) for prompt in prompts}:
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in chosen])
        options = {"max_new_tokens": NEW, "eos_token_id": end, "pad_token_id": end}
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, do_sample=False, **options)
        for i, row in zip(chosen, made[:, length:].tolist(), strict=True):
            answers[i] = row[: row.index(end) + 1] if end in row else row
    return [answers[i] for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", default=list(tiny.CASES), help="these models")
    given = parser.parse_args()
    # one core: more of them wait for work busily
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    torch.set_num_threads(1)
    with gzip.open(given.data / "sft" / "aira1_en.jsonl.gz", "rt") as file:
        texts = list(dict.fromkeys(json.loads(line)["prompt"] for line in file))
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for name in tiny.CASES:
        if name in given.only:
            print(f"| {' | '.join(compare(name, given.data, texts))} |", flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    main()
