"""Write the table of docs/gpus.md: the largest model that can be trained on a card.

    python scripts/cards.py --figures figures.json    # counted from shapes; minutes, needs no GPU

Memory is counted as in `--topology`, with the error of a count added. Models have their real sizes
but no weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from pods import LLAMA, LLAMA_7B, LLAMA_13B, TINY_LLAMA, filled, write_model

from easyaira import cli
from easyaira.algorithms.dpo import dpo_algorithm
from easyaira.algorithms.sft import sft_algorithm
from easyaira.config.run import TrainDPO, TrainSFT
from easyaira.distributed.cards import CARDS, absent
from easyaira.distributed.chips import chip_of
from easyaira.plan import cost
from easyaira.plan.counted import ERROR
from easyaira.train.setup import prepare

ROOT = Path(__file__).parents[1]
LENGTH = 1024  # tokens of a prompt with its answer
SMOL = LLAMA | {"vocab_size": 49152, "tie_word_embeddings": True}
LLAMA_3 = LLAMA | {"vocab_size": 128256, "num_key_value_heads": 8}
MODELS = {  # from their config.json, smallest first
    "GPT-2 124M": {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024},
    "SmolLM2 360M": SMOL
    | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
    | {"num_attention_heads": 15, "num_key_value_heads": 5},
    "TinyLlama 1.1B": TINY_LLAMA,
    "SmolLM2 1.7B": SMOL
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    | {"num_attention_heads": 32},
    "Llama 3.2 3B": LLAMA_3
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    | {"num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True},
    "Llama 2 7B": LLAMA_7B,
    "Llama 3.1 8B": LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32},
    "Llama 2 13B": LLAMA_13B,
    "Yi 34B": LLAMA
    | {"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60}
    | {"num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 64000},
    "Llama 2 70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
}
TASKS = {"SFT": (TrainSFT, sft_algorithm), "DPO": (TrainDPO, dpo_algorithm)}
LORA = ["--lora.target_modules=all-linear", "--lora.r=16", "--lora.alpha=32"]
METHODS = {
    "full": [],
    "full, 8-bit": ["--optimizer.state_dtype=8bit"],
    "LoRA": LORA,
    "QLoRA": [*LORA, "--lora.quantize=nf4"],
}
OLD = ("t4", "v100")  # without bfloat16


def write_rows(folder: Path) -> None:
    """Rows of LENGTH tokens, answers of three quarters of it."""
    turns = [
        [
            {"role": "user", "content": "a" * (LENGTH // 4)},
            {"role": "assistant", "content": letter * LENGTH},
        ]
        for letter in "bc"
    ]
    rows = {"SFT": {"messages": turns[0]}, "DPO": {"chosen": turns[0], "rejected": turns[1]}}
    for task, row in rows.items():
        (folder / f"{task}.jsonl").write_text((json.dumps(row) + "\n") * 16)


def needed(work: Path, model: str, task: str, method: str, card: str) -> int:
    """Bytes, one example at a time, activations recomputed."""
    config_class, algorithm_of = TASKS[task]
    config, _ = cli.parse(
        config_class,
        [
            f"--model.name_or_path={work / model}",
            "--model.gradient_checkpointing=full",
            f"--data.train={work / task}.jsonl",
            "--data.template=plain",
            f"--data.max_length={LENGTH}",
            f"--data.cache_dir={work}",
            "--train_batch_size=16",
            "--gradient_accumulation_steps=16",
            *METHODS[method],
        ],
    )
    algorithm = algorithm_of(config)
    setup = prepare(config, algorithm, absent(CARDS[card]), planned=True)
    return cost.measure(setup, algorithm).program.memory


COLUMNS = ["card", "GB for programs", *(f"{task}, {how}" for task in TASKS for how in METHODS)]


def line(card: str, known: dict[str, dict[str, int]]) -> str:
    """Format a row of the table."""
    room, dtype = chip_of(CARDS[card].kind).memory, "float32" if card in OLD else "bfloat16"
    largest = []
    for task in TASKS:
        for how in METHODS:
            sizes = {model: known[f"{model} {task} {how} {dtype}"] for model in MODELS}
            fitting = [model for model, size in sizes.items() if size * (1 + ERROR) <= room]
            largest.append(fitting[-1] if fitting else "none of them")
    return f"| {card} | {room / 1e9:g} | {' | '.join(largest)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, required=True, help="file of counts; added to")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "gpus.md")
    given = parser.parse_args()
    known = {}
    if given.figures.exists():
        known = json.loads(given.figures.read_text())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_rows(work)
        for model, config in MODELS.items():
            write_model(work / model, config)
            for task in TASKS:
                for how in METHODS:
                    for dtype, card in (("bfloat16", "h100"), ("float32", "t4")):
                        key = f"{model} {task} {how} {dtype}"
                        if key not in known:
                            known[key] = needed(work, model, task, how, card)
                            print(f"{key}: {known[key] / 1e9:.1f} GB", flush=True)
                            given.figures.write_text(json.dumps(known, indent=1))
    page = given.page.read_text()
    rows = [(card,) for card in CARDS]
    counted = dict.fromkeys(CARDS)
    page = filled(page, "cards", COLUMNS, rows, lambda row, _: line(*row, known), counted)
    given.page.write_text(page)


if __name__ == "__main__":
    main()
