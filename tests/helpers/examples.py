"""Loads rows of a file as examples, as a run does."""

from easyaira.config.algorithms import SFTConfig
from easyaira.config.data import DataConfig
from easyaira.data import dataset
from easyaira.data.batches import Batches
from easyaira.data.recipe import recipe_of
from easyaira.data.template import Template
from helpers import tiny

TASK = {False: "conversation", True: "pair"}


def load(
    path, *, task="conversation", max_length=64, vocab_size=tiny.VOCAB, seed=0, tokenizer=None,
    positions=None, **config,
):  # fmt: skip
    sft = SFTConfig(**config.pop("sft", {})) if task == "conversation" else None
    train = path if isinstance(path, list) else str(path)
    settings = DataConfig(train=train, **{"template": "plain"} | config)
    return dataset.load(
        settings,
        recipe_of(task, settings, max_length, sft),
        template=Template(
            tokenizer or tiny.tokenizer(), settings.template, "gpt2", settings.allowed_tokens
        ),
        vocab_size=vocab_size,
        seed=seed,
        positions=positions,
    )


def batches(tmp_path, *, pairs=False, **kwargs):
    rows = tiny.dpo_rows(23) if pairs else tiny.sft_rows(23)
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows), task=TASK[pairs])
    return Batches(data.train, **({"size": 8, "seed": 3} | kwargs))
