"""One job of parity.py in TRL: losses of the updates of a trainer, on given token ids.

    PYTHON_WITH_TRL scripts/parity_trl.py JOB.json     prints {"trl": version, "losses": [...]}

The trainers' own preparation of text is left out: both sides get the same ids. Jobs of
parity_losses.py hold log-probabilities instead, and ask for each loss with its gradient.
"""

import json
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
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
    options = {} if scorer else {"router_aux_loss_coef": 0.0}  # which TRL adds to Mixtral's loss
    options |= {"beta": 0.1} if job["objective"] == "dpo" else {}
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
        model=auto.from_pretrained(job["model"], dtype="float32", attn_implementation="eager"),
        args=args,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    trainer.train()
    return {"trl": trl.__version__, "losses": losses}


def preference_losses(job):
    """Loss and gradient of DPOTrainer, CPOTrainer, ORPOTrainer, KTOTrainer or RewardTrainer, for
    each of job["options"]."""
    names = ("logps", "ref", "mask", "squares", "scores", "margins")
    arrays = {name: torch.tensor(job[name]) for name in names}
    return [preference_loss(options, **arrays) for options in job["options"]]


def preference_loss(options, logps, ref, mask, squares, scores, margins):
    if options["trainer"] == "reward":
        return _of_reward_trainer(options["center"], scores, margins)
    logps = logps.clone().requires_grad_()
    if options["trainer"] == "kto":
        return _of_kto_trainer(options, logps, ref, mask)
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    trainer = SimpleNamespace(accelerator=accelerator, **options)
    if options["trainer"] == "dpo":
        loss = _of_dpo_trainer(trainer, logps, ref, mask, squares)
    else:
        sums, lengths = (logps * mask).sum(1), mask.sum(1)
        per_answer = sums if options["loss_type"] != "simpo" else sums / lengths
        if options["trainer"] == "orpo":
            from trl.experimental.orpo import ORPOTrainer

            loss = -ORPOTrainer.odds_ratio_loss(trainer, *(sums / lengths).chunk(2))[0]
        else:
            from trl.experimental.cpo import CPOTrainer

            loss = CPOTrainer.cpo_loss(trainer, *per_answer.chunk(2))[0]
        loss = loss.mean()
    loss.backward()
    return {"loss": loss.item(), "gradient": logps.grad.tolist()}


def same(x):
    return x


def _of_reward_trainer(center, scores, margins):
    scores = scores.clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        args=SimpleNamespace(center_rewards_coefficient=center or None),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"margin": margins, "attention_mask": torch.ones(1)}
    model = lambda **_: SimpleNamespace(logits=scores[:, None])  # noqa: E731
    loss = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": scores.grad.tolist()}


def _of_kto_trainer(options, logps, ref, mask):
    """Chosen answers are those of the examples, with labels 0, 1, 0, ...; rejected ones those of
    other prompts."""
    (own, other), (ref_own, ref_other) = ((x * mask).chunk(2) for x in (logps, ref))
    rows, length = own.shape
    zeros = torch.zeros(rows, length)

    class Fake(torch.nn.Module):
        def forward(self, input_ids, **_):
            log_probs = other if input_ids.any() else own
            return SimpleNamespace(
                log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
            )

    ids = torch.zeros(rows, length + 1, dtype=int)
    inputs = {"input_ids": ids, "KL_input_ids": ids + 1, "label": torch.arange(rows) % 2}
    inputs |= {name: torch.ones_like(ids) for name in ("attention_mask", "completion_mask")}
    inputs |= {f"KL_{name}": inputs[name] for name in ("attention_mask", "completion_mask")}
    inputs |= {"ref_logps": ref_own.sum(1), "ref_KL_logps": ref_other.sum(1)}
    trainer = SimpleNamespace(
        model=Fake(),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        calculate_KL=True,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        loss_type="kto",
        beta=options["beta"],
        desirable_weight=1.0,
        undesirable_weight=options["weight"],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = partial(trl.KTOTrainer._compute_kl_logps, trainer)
    loss = trl.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    loss.backward()
    return {"loss": loss.item(), "gradient": logps.grad.tolist()}


def _of_dpo_trainer(trainer, logps, ref, mask, squares):
    rows, length = mask.shape
    whole = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)  # the prompt is one token
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    inputs["completion_mask"] = whole
    zeros = torch.zeros(rows, length)

    class Fake(torch.nn.Module):
        is_gradient_checkpointing = False

        def __init__(self, logps):
            super().__init__()
            self.logps = logps

        def forward(self, **_):
            return SimpleNamespace(
                log_probs=self.logps * mask,
                entropy=zeros,
                mean_logits=zeros,
                is_top1=zeros.bool(),
                log_sum_sq_probs=squares * mask,
            )

    trainer.model, trainer.ref_model = Fake(logps), Fake(ref)
    trainer.args = SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    return trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)


if __name__ == "__main__":
    sys.stdout, out = sys.stderr, sys.stdout
    job = json.loads(Path(sys.argv[1]).read_text())
    answer = preference_losses(job) if "logps" in job else main(job)
    print(json.dumps(answer), file=out)
