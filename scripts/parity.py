"""Parity with transformers and TRL, and the tests behind each promise, as docs/parity.md.

    python scripts/parity.py                          # against transformers; minutes on two cores
    python scripts/parity.py --trl PYTHON             # and TRL, of another environment's Python
    python scripts/parity.py --write docs/parity.md

For each architecture and objective: a tiny model with random weights of std 0.2, eight rows, each
update takes all of them. Prints the largest differences of logits (or scores), of the first loss,
of its gradients, and of the losses of 20 updates.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import jax
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from easyaira.train import loader
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.loops import torch_adamw, torch_rate, torch_step
from helpers.runs import configure, losses_of, train

ROOT = Path(__file__).parents[1]
UPDATES, ROWS = 20, 8
DECODERS = tiny.CONFIGS | tiny.FAMILIES
CASES = [(kind, objective) for kind in DECODERS for objective in ("sft", "dpo", "reward")]
CASES += [(kind, "reward") for kind in ("bert", "roberta")]
COLUMNS = ("logits", "loss", "gradients", "curve", "TRL's curve")
TOLERANCES = {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-5, "curve": 1e-4, "TRL's curve": 1e-4}
PAIR = ("chosen_ids", "rejected_ids")
HEAD, TAIL = "<!-- measured -->\n", "<!-- /measured -->\n"


def compare(
    kind: str, objective: str, root: Path, trl: str | None, updates: int = UPDATES
) -> dict[str, float]:
    """Largest differences of an architecture under an objective."""
    configs = DECODERS | {name: tiny.SCORERS[name] for name in ("bert", "roberta")}
    rows = {"sft": tiny.sft_rows}.get(objective, tiny.dpo_rows)(ROWS)
    tiny.ground(root, {kind: configs[kind]}, rows=rows)
    options = {"max_steps": updates, "train_batch_size": ROWS}
    if objective == "dpo":
        options["dpo.precompute_ref_log_probs"] = False
    job = (objective, root / kind, root / "rows.jsonl")
    config, algorithm = configure(*job, root / "setup", **options)
    setup = prepare(config, algorithm)
    params = setup.start_weights()
    theirs, reference = (torch_model_of(setup, configs[kind], params, root) for _ in range(2))
    examples = [texts_of(setup, i) for i in setup.batches.members(0)]

    differences = {"logits": logits_difference(setup, params, theirs, examples)}
    loss, grads = our_gradients(setup, algorithm, params)
    their_loss = torch_loss(objective, theirs, reference, examples)
    their_loss.backward()
    differences["loss"] = abs(loss - their_loss.item()) / max(abs(their_loss.item()), 1)
    differences["gradients"] = 0.0
    for name, wanted in tiny.gradients(theirs).items():
        difference = np.abs(grads[name] - wanted).max() / max(np.abs(wanted).max(), 1)
        differences["gradients"] = max(differences["gradients"], float(difference))
    theirs.zero_grad()
    log, _ = train(*job, root / "run", **options)
    ours = losses_of(log)
    if trl:
        save_for_trl(setup, theirs, root / "theirs")
        curve = trl_curve(trl, objective, root / "theirs", examples, updates)
        differences["TRL's curve"] = farthest(ours, curve)
    adamw, curve = torch_adamw(theirs), []
    for step in range(updates):
        value = torch_loss(objective, theirs, reference, examples)
        torch_step(theirs, adamw, value, torch_rate(step, updates))
        curve.append(value.item())
    return differences | {"curve": farthest(ours, curve)}


def farthest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1) for a, b in zip(ours, theirs, strict=True))


def torch_model_of(setup, config: dict, params, root: Path):
    """transformers' model with the weights that a run starts from."""
    if setup.model.scorer and not setup.model.architecture.encoder:
        config = tiny.scorer(config)
    model = tiny.torch_model(config | {"vocab_size": setup.model.vocab_size})
    model.config.save_pretrained(root / "start")
    tensors = {name: torch.tensor(t) for name, t in tiny.as_theirs(setup.model, params).items()}
    save_file(tensors, root / "start/model.safetensors", {"format": "pt"})
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return type(model).from_pretrained(root / "start", **eager).eval()


def texts_of(setup, i: int) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompt and of each answer of an example."""
    examples = setup.batches.examples
    bounds = examples.bounds[i].tolist()
    parts = [examples.tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return parts[0], parts[1:]


def logits_difference(setup, params, theirs, examples) -> float:
    """Relative to the largest logit, or to 1. Ours come from one padded batch."""
    model = setup.model
    texts = [prompt + answer for prompt, answers in examples for answer in answers]
    width = max(map(len, texts))
    tokens = np.array([ids + [0] * (width - len(ids)) for ids in texts])
    real = np.arange(width) < np.array([[len(ids)] for ids in texts])
    rows = tiny.layout(tokens, segment_ids=real * np.arange(1, len(texts) + 1)[:, None])
    if model.scorer:
        score = jax.jit(partial(model.score, examples=len(texts), answers=1))
        ours = np.asarray(score(params, rows)[0])
    else:
        hidden, head = jax.jit(model.apply)(params, rows)
        ours = np.asarray(model.logits(hidden, head))
    differences = []
    for ids, logits in zip(texts, ours, strict=True):
        with torch.no_grad():
            wanted = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
        difference = np.abs(logits[: len(wanted)] - wanted).max()
        differences.append(float(difference / max(np.abs(wanted).max(), 1)))
    return max(differences)


def our_gradients(setup, algorithm, params):
    """Loss and gradients of the first update, by Hugging Face's names."""
    arrays = loader.to_device(setup.batches[0], setup.mesh)
    arrays = jax.tree.map(lambda array: array[0], arrays)
    loss_fn = algorithm.loss_fn(setup)
    frozen = params if algorithm.frozen(setup) else None

    def mean(params):
        total, count = loss_fn(params, frozen, arrays, None)["loss"]
        return total / count

    with setup.model.on(setup.mesh):
        loss, grads = jax.jit(jax.value_and_grad(mean))(params)
    return float(loss), tiny.as_theirs(setup.model, grads)


def torch_loss(objective: str, model, reference, examples) -> torch.Tensor:
    """The objective in transformers, one unpadded sequence at a time."""
    if objective == "reward":
        scores = [
            torch.cat([model(input_ids=torch.tensor([prompt + a])).logits[0] for a in answers])
            for prompt, answers in examples
        ]
        return -F.logsigmoid(torch.stack([chosen - rejected for chosen, rejected in scores])).mean()
    if objective == "sft":
        return torch.cat([-logps(model, prompt, answer) for prompt, (answer,) in examples]).mean()
    margins = []
    for prompt, answers in examples:
        policy = [logps(model, prompt, answer).sum() for answer in answers]
        with torch.no_grad():
            ref = [logps(reference, prompt, answer).sum() for answer in answers]
        margins.append((policy[0] - ref[0]) - (policy[1] - ref[1]))
    return -F.logsigmoid(0.1 * torch.stack(margins)).mean()


def logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens of an answer."""
    ids = torch.tensor([prompt + answer])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]][len(prompt) - 1 :]


def save_for_trl(setup, model, folder: Path) -> None:
    tokenizer = setup.tokenizer
    if tokenizer.pad_token is None:  # padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    for name in vars(model.config):
        if "drop" in name:  # TRL leaves SFT's dropout to the model's configuration; ours has none
            setattr(model.config, name, 0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trl_curve(python: str, objective: str, folder: Path, examples, updates: int) -> list[float]:
    rows = []
    for prompt, answers in examples:
        if objective == "sft":
            ids = prompt + answers[0]
            rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + answers[0]})
        elif objective == "dpo":
            rows.append({"prompt_ids": prompt} | dict(zip(PAIR, answers, strict=True)))
        else:
            whole = [prompt + answer for answer in answers]
            rows.append(dict(zip(PAIR, whole, strict=True)))
    job = {"objective": objective, "model": str(folder), "rows": rows, "updates": updates}
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    command = [python, str(ROOT / "scripts/parity_trl.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)["losses"]


def table(results: dict[tuple[str, str], dict[str, float]]) -> str:
    """Markdown of the differences."""
    columns = [c for c in COLUMNS if any(c in row for row in results.values())]
    lines = [["architecture", "objective", *columns], ["---"] * (2 + len(columns))]
    for (kind, objective), row in results.items():
        lines.append([kind, objective, *(f"{row[c]:.0e}" if c in row else "-" for c in columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", metavar="PYTHON", help="Python of an environment that has TRL")
    parser.add_argument("--write", type=Path, help="page whose measured part is replaced")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    results = {}
    for kind, objective in CASES:
        # the runs print to stderr, so that stdout is the table alone
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(sys.stderr):
            results[kind, objective] = compare(kind, objective, Path(root), args.trl)
        print(kind, objective, results[kind, objective], file=sys.stderr, flush=True)
    names = ["jax", "torch", "transformers"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    command = "python scripts/parity.py" + (" --trl PYTHON" if args.trl else "")
    text = f"Measured on {time.strftime('%Y-%m-%d')} by `{command}` with {versions}"
    text += f", TRL {trl_version(args.trl)}:\n\n" if args.trl else ":\n\n"
    text += table(results)
    print(text)
    if args.write:
        page = args.write.read_text()
        start, end = page.index(HEAD) + len(HEAD), page.index(TAIL)
        args.write.write_text(page[:start] + text + page[end:])
    wrong = [
        f"{kind} {objective}: {name} {row[name]:.1e}"
        for (kind, objective), row in results.items()
        for name in row
        if not row[name] <= TOLERANCES[name]
    ]
    if wrong:
        sys.exit("beyond the tolerance: " + "; ".join(wrong))


def trl_version(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('trl'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
