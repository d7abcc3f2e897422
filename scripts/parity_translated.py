"""Losses of a TRL configuration beside those of its translation, on a tiny Llama.

    python scripts/parity_translated.py FOLDER      needs trl==1.16 and torch

TRL's own script runs the file; `easyaira translate` rewrites it, and our command runs the result.
An epoch is one update, so the order of rows is the same on both sides.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT = 1e-4
UPDATES = 20
ROWS = 8
COMMON = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": UPDATES,
    "warmup_steps": 0.2,
    "weight_decay": 0.1,
    "max_length": 48,
    "bf16": False,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}
RECIPES = {
    "sft": {"lr_scheduler_type": "cosine", "completion_only_loss": None},
    "sft-whole": {"completion_only_loss": False, "max_grad_norm": 0.3},
    "sft-texts": {"dataset_text_field": "body", "lr_scheduler_type": "cosine"},
    "sft-joined": {  # eight examples of all texts
        "dataset_text_field": "body", "max_length": 15, "packing": True,
        "packing_strategy": "wrapped",
    },
    "sft-floor": {
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    },
    "dpo": {"beta": 0.2, "label_smoothing": 0.1, "precompute_ref_log_probs": True},
    "dpo-robust": {"loss_type": ["robust"], "label_smoothing": 0.1, "max_grad_norm": 0.0},
    "dpo-apo": {"beta": 0.05, "loss_type": ["apo_zero"], "lr_scheduler_type": "constant"},
}  # fmt: skip
TRL_SIDE = """
import json, sys, runpy
from transformers import Trainer
train = Trainer.train
losses = []
step = Trainer.training_step
def kept(self, *args, **kwargs):
    loss = step(self, *args, **kwargs)
    losses.append(float(loss))
    return loss
Trainer.training_step = kept
out, kind = sys.argv.pop(1), sys.argv.pop(1)
runpy.run_module(f"trl.scripts.{kind}", run_name="__main__")
json.dump(losses, open(out, "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    from helpers import tiny

    tiny.save(folder / "model", tiny.CONFIGS["llama"])
    sets = {"sft": tiny.sft_rows(ROWS), "dpo": tiny.dpo_rows(ROWS)}
    texts = [{"body": row["prompt"] + row["completion"]} for row in sets["sft"]]
    sets |= {"sft-texts": texts, "sft-joined": texts}
    for kind, rows in sets.items():
        (folder / kind).mkdir(exist_ok=True)
        tiny.write_rows(folder / kind / "train.jsonl", rows)
    worst = 0.0
    for name, keys in RECIPES.items():
        theirs, ours = both(folder, name, keys)
        far = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        worst = max(worst, far)
        print(
            f"{name}: {len(ours)} losses, {ours[0]:.4f} to {ours[-1]:.4f}, at most {far:.1e} apart"
        )
    sys.exit(worst > LIMIT)


def both(folder: Path, name: str, keys: dict) -> tuple[list[float], list[float]]:
    kind = name.partition("-")[0]
    rows = folder / name if (folder / name).is_dir() else folder / kind
    file = folder / f"{name}.yaml"
    content = COMMON | keys | {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(rows),
        "output_dir": str(folder / f"trl-{name}"),
    }  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    losses = folder / f"{name}.losses.json"
    program = folder / "trl_side.py"
    program.write_text(TRL_SIDE)
    run(sys.executable, program, losses, kind, "--config", file)
    micro = json.loads(losses.read_text())
    steps = content["gradient_accumulation_steps"]
    theirs = [sum(micro[i : i + steps]) for i in range(0, len(micro), steps)]
    translated = folder / f"{name}.ours.yaml"
    command = (sys.executable, "-m", "easyaira", "translate", "trl", file, "--task", kind)
    translated.write_text(run(*command))
    output = folder / f"ours-{name}"
    run(sys.executable, "-m", "easyaira", kind, "--config", translated, "--output_dir", output,
        "--export", "false", "--num_samples", "0", "--mesh", "fsdp=1")  # fmt: skip
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return theirs, [line["loss"] for line in lines if line["step"] and "loss" in line]


def run(*command) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
