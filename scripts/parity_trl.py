"""One job of parity.py in TRL: losses of the updates of a trainer, on given token ids.

    PYTHON_WITH_TRL scripts/parity_trl.py JOB.json     prints {"trl": version, "losses": [...]}

The trainers' own preparation of text is left out: both sides get the same ids.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

KINDS = {
    "sft": (trl.SFTConfig, trl.SFTTrainer),
    "dpo": (trl.DPOConfig, trl.DPOTrainer),
    "reward": (trl.RewardConfig, trl.RewardTrainer),
}


def main(job):
    set_seed(0)
    config_class, trainer_class = KINDS[job["objective"]]
    losses = []

    class Trainer(trainer_class):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            losses.append(float(result[0] if isinstance(result, tuple) else result))
            return result

    scorer = job["objective"] == "reward"
    auto = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    options = {"beta": 0.1} if job["objective"] == "dpo" else {}
    args = config_class(
        output_dir=str(Path(job["model"]) / "trl"),
        per_device_train_batch_size=len(job["rows"]),
        max_steps=job["updates"],
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model=auto.from_pretrained(job["model"], dtype="float32"),
        args=args,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    trainer.train()
    return {"trl": trl.__version__, "losses": losses}


if __name__ == "__main__":
    sys.stdout, out = sys.stderr, sys.stdout
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))), file=out)
