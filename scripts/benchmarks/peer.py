"""TRL's side of a training comparison."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.sides import (
    LEARNING_RATE,
    MODELS,
    Side,
    examples_of,
    max_length,
    peak_of_process,
)


def trl(work: Mapping[str, Any], options: Mapping[str, Any]) -> Side:
    """TRL's trainer on the same lengths, with a vocabulary of words that are one token each."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    config = AutoConfig.for_model(**MODELS[work["model"]])
    words = {f"w{i}": i for i in range(config.vocab_size - 1)} | {"</s>": config.vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="w0"
    )
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()  # TRL reads its reference from here
    atexit.register(shutil.rmtree, folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    rng = np.random.default_rng(0)
    names = ["prompt", "chosen", "rejected"] if work["task"] == "dpo" else ["prompt", "completion"]
    words_used = min(9999, config.vocab_size - 1)
    rows = []
    examples = examples_of(work)
    for lengths in np.diff(examples.bounds).tolist():
        lengths[1:] = [length - 1 for length in lengths[1:]]  # the trainer adds the end token
        texts = [" ".join(f"w{i}" for i in rng.integers(0, words_used, n)) for n in lengths]
        rows.append({name: f"{text} " for name, text in zip(names, texts, strict=True)})
    data = Dataset.from_list(
        [{k: v if k == "prompt" else v.strip() for k, v in r.items()} for r in rows]
    )
    options = dict(options)
    settings_class, base = DPOConfig, DPOTrainer
    if work["task"] == "sft":
        settings_class, base = SFTConfig, SFTTrainer
        options.pop("precompute_ref_log_probs", None)

    class InOrder(base):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        first = None

        def on_train_begin(self, *_, **__):
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            self.first = self.first or time.time()

        def on_train_end(self, *_, **__):
            self.wall = time.perf_counter() - self.wall
            self.cpu = time.process_time() - self.cpu

    clock, size = Clock(), work["examples"]
    if options.get("packing"):  # as many tokens an update as the other sides
        size = max(1, round(examples.lengths().sum() / work["updates"] / max_length(work)))
    settings = settings_class(
        output_dir=f"{folder}/run",
        per_device_train_batch_size=size,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_length=max_length(work),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    trainer = InOrder(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[clock],
    )

    def run() -> tuple[float, float]:
        trainer.train()
        return clock.wall, clock.cpu

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 or peak_of_process()

    run()  # also precomputes the reference, if configured
    reference_in_step = work["task"] == "dpo" and not options.get("precompute_ref_log_probs")
    tied = model.config.tie_word_embeddings
    lookups = 0 if tied else model.get_input_embeddings().weight.numel()
    facts = {
        "tokens": int(examples.lengths().sum()),
        "positions per token": None,
        "temporaries MiB": None,
        "operations per token": (8 if reference_in_step else 6)
        * (model.num_parameters() - lookups),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": max(torch.cuda.device_count(), 1),
    }
    return Side(clock.first, facts, run, peak)
