"""What things cost, measured side by side on this machine.

    python scripts/benchmark.py data                                   # a million synthetic rows
    python scripts/benchmark.py data --folder DATA --tokenizer FOLDER  # and real files
    python scripts/benchmark.py train --task dpo --lengths hh --peer trl
    python scripts/benchmark.py train --task dpo --lengths hh --ladder

Prints a table, and with --json FILE writes the same figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from easyaira.data.batches import Batch, Batches
from easyaira.data.examples import PER_EXAMPLE, Examples

# median and spread (of a log-normal distribution) of prompts and answers in tokens, longest example
KINDS = {
    "aira": ((25, 0.4), (200, 0.5), 400),
    "hh": ((150, 0.8), (60, 0.7), 1024),
    "ultrafeedback": ((120, 0.9), (280, 0.7), 2048),
}
UPDATES = (8, 32, 128)
SERVED = 4_000_000  # tokens that a measurement of serving makes
WIDTH, HEADS = 768, 12  # GPT-2's, which decide what a long row costs


def synthetic(kind: str, rows: int, pairs: bool, folder: Path) -> Examples:
    """Examples with log-normal lengths, their tokens on disk, from a fixed seed."""
    rng = np.random.default_rng(0)
    (prompt, prompt_spread), (answer, answer_spread), longest = KINDS[kind]
    medians = [prompt] + [answer] * (2 if pairs else 1)
    spreads = [prompt_spread] + [answer_spread] * (2 if pairs else 1)
    lengths = rng.lognormal(np.log(medians), spreads, (rows, len(medians))).astype(np.int64) + 1
    lengths[:, 0] = np.minimum(lengths[:, 0], longest // 2)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], longest - lengths[:, :1])
    starts = np.concatenate([[0], np.cumsum(lengths.ravel())])
    per_row = lengths.shape[1]
    bounds = starts[np.arange(rows)[:, None] * per_row + np.arange(per_row + 1)]
    arrays = {name: np.zeros(rows, dtype) for name, dtype in PER_EXAMPLE.items()}
    arrays["rows"] = np.arange(rows)
    for name, dtype in (("tokens", np.int32), ("learned", np.bool_)):
        held = np.memmap(folder / f"{kind}-{pairs}-{name}", dtype, "w+", shape=(int(starts[-1]),))
        for begin in range(0, len(held), 10**7):
            held[begin : begin + 10**7] = rng.integers(0, 2, len(held[begin : begin + 10**7]))
        arrays[name] = held.view(np.ndarray)
    return Examples(**arrays | {"bounds": bounds})


def serving(examples: Examples, max_length: int, size: int, share: bool) -> dict[str, float]:
    """Planning and serving updates of `size` examples, on one core.

    `fill` is that of rows as long as they pack best, for an attention kernel that skips what a
    segment does not see; `fill dense` that of the shorter rows that cost least where attention is
    computed for whole rows, in a model of GPT-2's width.
    """
    batches = Batches(examples, size, seed=0, share_prompt=share, attention=0.0)
    begin = time.perf_counter()
    shapes = batches.shapes
    planned = time.perf_counter() - begin
    begin = time.perf_counter()
    served = serve(batches)
    seconds = time.perf_counter() - begin
    tokens = sum(batch.num_tokens for batch in served)
    updates = len(served)
    lengths = [lengths_of(batches, update) for update in range(updates)]
    dense = serve(replace(batches, attention=(4 * WIDTH + 30 * HEADS) / (24 * WIDTH**2)))
    return {
        "examples": size,
        "plan s": planned,
        "Mtok/s": tokens / seconds / 1e6,
        "fill": fill(served),
        "fill dense": fill(dense),
        "to longest": tokens / sum(of.max() * of.size for of in lengths),
        "to max_length": tokens / (updates * size * examples.answers * max_length),
        "shapes": len(shapes),
        "not foreseen": len({batch.shape for batch in served} - set(shapes)),
    }


def serve(batches: Batches) -> list[Batch]:
    """Updates of SERVED tokens, without their arrays."""
    served: list[Batch] = []
    tokens = 0
    while tokens < SERVED and len(served) < len(batches):
        served.append(batches[len(served)]._replace(arrays={}))
        tokens += served[-1].num_tokens
    return served


def fill(served: list[Batch]) -> float:
    return sum(batch.filled for batch in served) / sum(batch.positions for batch in served)


def lengths_of(batches: Batches, update: int) -> np.ndarray:
    bounds = batches.examples.bounds[batches.members(update)]
    return (bounds[:, 1] - bounds[:, 0])[:, None] + np.diff(bounds[:, 1:])


def held_mib() -> float:
    """Memory of this process besides the pages of mapped files, which the system takes back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def tokenising(folder: Path, tokenizer: Path) -> list[dict[str, object]]:
    """Every data set of a folder of folders, read and tokenised without a cache."""
    from transformers import AutoTokenizer

    from easyaira.config import DataConfig
    from easyaira.data import dataset
    from easyaira.data.examples import Recipe
    from easyaira.data.templates import Template

    tasks = {"sft": "conversation", "preference": "pair", "toxicity": "label"}
    told = []
    for name, task in tasks.items():
        for file in sorted((folder / name).iterdir()):
            template = Template(AutoTokenizer.from_pretrained(tokenizer), "aira", "gpt2")
            with tempfile.TemporaryDirectory() as cache:
                config = DataConfig(train=str(file), cache_dir=cache, max_dropped=0.9)
                begin = time.perf_counter()
                data = dataset.load(
                    config, Recipe(task, 1024), template=template, vocab_size=10**6, seed=0
                )
                seconds = time.perf_counter() - begin
            counts = data.report["train"]
            told.append(
                {
                    "file": f"{name}/{file.name}",
                    "read": counts["read"],
                    "kept": counts["kept"],
                    "dropped": sum(counts["dropped"].values()),
                    "rows/s": counts["read"] / seconds,
                    "ktok/s": counts["tokens"] / seconds / 1e3,
                }
            )
    return told


MODELS = {  # what differs from the defaults of the architecture
    "gpt2-small": {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 4},
    "gpt2-124m": {"model_type": "gpt2"},
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
BETA, LEARNING_RATE = 0.1, 1e-5

# Options of each side. `best` is what its documentation recommends for speed on such a machine.
OURS = {
    "best": {},
    "one sequence a row, float32, reference in the step": {
        "packing": False,
        "share_prompt": "never",
        "dtype": "float32",
        "in_step": True,
    },
    "+ reference once": {"packing": False, "share_prompt": "never", "dtype": "float32"},
    "+ bfloat16": {"packing": False, "share_prompt": "never"},
    "+ packed": {"share_prompt": "never"},
    "+ prompt once": {"share_prompt": "always"},
}
TRL = {
    "best": {"bf16": True, "gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "defaults": {},
}


def worker(spec: dict[str, object]) -> None:
    """One side, in a process of its own: a round of updates for every line on standard input."""
    begin = time.perf_counter()
    side = {"ours": ours, "trl": trl}[spec["side"]](spec)
    side()  # everything is compiled and warm
    print(json.dumps({"first": time.perf_counter() - begin}), flush=True)
    for _ in sys.stdin:
        wall, cpu = side()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"wall": wall, "cpu": cpu, "peak MiB": peak}), flush=True)


def work(spec: dict[str, object]) -> Examples:
    """The examples of a round, the same for both sides."""
    count = spec["examples"] * spec["updates"]
    folder = Path(tempfile.mkdtemp())
    return synthetic(spec["lengths"], count, spec["task"] == "dpo", folder)


def ours(spec: dict[str, object]) -> Callable[[], tuple[float, float]]:
    """The training step and the loader of EasyAira, as a run uses them."""
    import jax
    import jax.numpy as jnp

    from easyaira import mesh as meshes
    from easyaira import objectives, optim, trainer
    from easyaira.config import DPOConfig, OptimizerConfig
    from easyaira.models.layers import Compute
    from easyaira.models.registry import model_of
    from easyaira.prepare import attention_cost, shares_prompt
    from easyaira.reference import make_score

    options = OURS[spec["options"]]
    examples, size = work(spec), spec["examples"]
    examples.learned[:] = True
    prompts = examples.bounds[:, :2]
    for start, end in prompts:
        examples.learned[start:end] = False
    compute = Compute(jnp.dtype(options.get("dtype", "bfloat16")))
    model = model_of(MODELS[spec["model"]], spec["model"], compute)
    batches = Batches(
        examples,
        size,
        packing=options.get("packing", True),
        share_prompt=shares_prompt(options.get("share_prompt", "auto"), examples),
        attention=attention_cost(model.config.width, model.config.heads),
    )
    tx = optim.make_optimizer(OptimizerConfig(), lambda step: LEARNING_RATE)
    mesh = meshes.make_mesh("fsdp=-1")
    in_step = options.get("in_step", False)
    frozen = None
    with jax.set_mesh(mesh):
        params = jax.jit(model.init)(jax.random.key(0))
        if spec["task"] == "dpo":
            score = make_score(model, size)
            logps = np.zeros((len(examples), 2), np.float32)
            for ready in trainer.ahead(batches, 0, len(batches), mesh):
                found = np.asarray(score(params, ready.arrays).logps)
                logps[ready.batch.examples] = found[tuple(ready.batch.slots.T)]
            if in_step:
                frozen = jax.tree.map(jnp.copy, params)
            else:
                batches = replace(batches, known={"ref_logps": logps})
            loss_fn = objectives.dpo(
                model, DPOConfig(beta=BETA), pairs=size, reference=model if in_step else None
            )
        else:
            loss_fn = objectives.sft(model)
        step = jax.jit(trainer.make_train_step(loss_fn, tx), donate_argnums=0)
        held = [trainer.init_state(params, tx, mesh)]

    def run() -> tuple[float, float]:
        with jax.set_mesh(mesh):
            wall, cpu = time.perf_counter(), time.process_time()
            for ready in trainer.ahead(batches, 0, len(batches), mesh):
                held[0], _ = step(held[0], frozen, ready.arrays, None)
            jax.block_until_ready(held[0].step)
            return time.perf_counter() - wall, time.process_time() - cpu

    return run


def trl(spec: dict[str, object]) -> Callable[[], tuple[float, float]]:
    """TRL's trainer on the same lengths: words of a vocabulary in which each is one token."""
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

    config = AutoConfig.for_model(**MODELS[spec["model"]])
    words = {f"w{i}": i for i in range(config.vocab_size - 1)} | {"</s>": config.vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="w0"
    )
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()  # from which TRL reads its reference
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    rng = np.random.default_rng(0)
    names = ["prompt", "chosen", "rejected"] if spec["task"] == "dpo" else ["prompt", "completion"]
    rows = []
    for lengths in np.diff(work(spec).bounds).tolist():
        lengths[1:] = [length - 1 for length in lengths[1:]]  # the trainer adds the end token
        texts = [" ".join(f"w{i}" for i in rng.integers(0, 9999, n)) for n in lengths]
        rows.append({name: f"{text} " for name, text in zip(names, texts, strict=True)})
    data = Dataset.from_list(
        [{k: v if k == "prompt" else v.strip() for k, v in r.items()} for r in rows]
    )
    longest = KINDS[spec["lengths"]][2]
    options = dict(TRL[spec["options"]])
    settings_class, base = DPOConfig, DPOTrainer
    if spec["task"] == "sft":
        settings_class, base = SFTConfig, SFTTrainer
        options.pop("precompute_ref_log_probs", None)

    class InOrder(base):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_train_end(self, *_, **__):
            self.wall = time.perf_counter() - self.wall
            self.cpu = time.process_time() - self.cpu

    clock = Clock()
    settings = settings_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=spec["examples"],
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_length=longest,
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

    return run


def training(args: argparse.Namespace) -> list[dict[str, object]]:
    """Sides in turns, A B A B; medians over the rounds."""
    sides = [("ours", "best")]
    if args.ladder:
        sides = [("ours", name) for name in OURS if name != "best"]
        if args.task == "sft":
            sides = [side for side in sides if "reference once" not in side[1]][:-1]
    if args.peer:
        sides += [("trl", name) for name in TRL]
    spec = {
        name: getattr(args, name) for name in ("task", "model", "lengths", "examples", "updates")
    }
    lengths = work(spec).lengths()
    processes, first, rounds = [], [], [[] for _ in sides]
    for side, options in sides:
        told = json.dumps(spec | {"side": side, "options": options})
        process = subprocess.Popen(
            [sys.executable, __file__, "worker", told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.debug else subprocess.DEVNULL,
            text=True,
        )
        processes.append(process)
        first.append(_answer(process)["first"])
    for _ in range(args.rounds):
        for process, measured in zip(processes, rounds, strict=True):
            process.stdin.write("go\n")
            process.stdin.flush()
            measured.append(_answer(process))
    for process in processes:
        process.stdin.close()
        process.wait()
    rows = []
    for (side, options), started, measured in zip(sides, first, rounds, strict=True):
        middle = {name: float(np.median([one[name] for one in measured])) for name in measured[0]}
        ratios = [b["cpu"] / a["cpu"] for a, b in zip(rounds[0], measured, strict=True)]
        rows.append(
            {
                "side": f"{side}, {options}",
                "tokens/s": lengths.sum() / middle["wall"],
                "tokens/CPU s": lengths.sum() / middle["cpu"],
                "update s": middle["wall"] / args.updates,
                "to first s": started,
                "peak MiB": middle["peak MiB"],
                "CPU time / first line's": float(np.median(ratios)),
            }
        )
    return rows


def _answer(process: subprocess.Popen) -> dict[str, float]:
    for line in process.stdout:
        if line.startswith("{") and ("first" in line or "wall" in line) and "loss" not in line:
            return json.loads(line)
    raise SystemExit("a side has failed; --debug shows why")


def core() -> list[dict[str, object]]:
    """The log-probabilities of 4 rows of 512 tokens with their gradient, next to full logits."""
    import jax
    import jax.numpy as jnp

    from easyaira import losses

    def full(hidden, head, tokens, wanted):
        logits = jnp.einsum(
            "rtd,dv->rtv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        logps = jax.nn.log_softmax(logits[:, :-1])
        logps = jnp.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0]
        return (logps * wanted[:, 1:]).sum()

    def logps(hidden, head, tokens, wanted):
        return losses.token_logps(hidden, head, tokens, wanted, vocab_size=50257).logps.sum()

    def nll(hidden, head, tokens, wanted):
        return losses.token_nll(hidden, head, tokens, wanted, vocab_size=50257)[0]

    told = []
    for width, dtype in ((256, "float32"), (768, "float32"), (768, "bfloat16")):
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (4, 512, width), dtype)
        head = jax.random.normal(keys[1], (width, 50304)) * 0.02
        tokens = jax.random.randint(keys[2], (4, 512), 0, 50257)
        for share in (1.0, 0.6):
            wanted = jnp.broadcast_to(jnp.arange(512) >= (1 - share) * 512, (4, 512))
            given = (hidden, head, tokens, wanted)
            row = {"width": width, "dtype": dtype, "tokens with loss": share}
            steps = {
                name: jax.jit(jax.value_and_grad(of, argnums=(0, 1))).lower(*given).compile()
                for name, of in (("full", full), ("logps", logps), ("nll", nll))
            }
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(4):  # in turns; the first round warms up
                for name, step in steps.items():
                    begin = time.process_time()
                    jax.block_until_ready(step(*given))
                    seconds[name].append(time.process_time() - begin)
            for name, step in steps.items():
                row[f"{name} CPU s"] = float(np.median(seconds[name][1:]))
                row[f"{name} MiB"] = step.memory_analysis().temp_size_in_bytes / 2**20
            told.append(row)
    return told


def show(rows: list[dict[str, object]]) -> None:
    names = list(rows[0])
    cells = [[f"{v:,.3f}" if isinstance(v, float) else f"{v}" for v in r.values()] for r in rows]
    widths = [max(len(c) for c in column) for column in zip(names, *cells, strict=True)]
    for line in (names, *cells):
        print("  ".join(c.rjust(width) for c, width in zip(line, widths, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    of_data = commands.add_parser("data", help="tokenising, packing, planning, serving")
    of_data.add_argument("--rows", type=int, default=1_000_000, help="synthetic rows of each kind")
    of_data.add_argument("--folder", type=Path, help="real data: sft/ preference/ toxicity/")
    of_data.add_argument("--tokenizer", type=Path, help="for real data: a tokenizer's folder")
    of_training = commands.add_parser("train", help="updates, against TRL or against ourselves")
    of_training.add_argument("--task", choices=["sft", "dpo"], default="dpo")
    of_training.add_argument("--model", choices=list(MODELS), default="gpt2-small")
    of_training.add_argument("--lengths", choices=list(KINDS), default="aira")
    of_training.add_argument("--examples", type=int, default=8, help="of an update")
    of_training.add_argument("--updates", type=int, default=8, help="of a round")
    of_training.add_argument("--rounds", type=int, default=5)
    of_training.add_argument("--peer", choices=["trl"], help="pip install trl")
    of_training.add_argument("--ladder", action="store_true", help="our ideas, one after another")
    of_training.add_argument("--debug", action="store_true", help="show what the sides print")
    of_core = commands.add_parser("core", help="log-probabilities, against full logits")
    for command in (of_data, of_training, of_core):
        command.add_argument("--json", type=Path, help="write the figures here, too")
    if sys.argv[1:2] == ["worker"]:
        worker(json.loads(sys.argv[2]))
        return
    args = parser.parse_args()
    if args.what == "data":
        figures = data(args)
    else:
        figures = training(args) if args.what == "train" else core()
        show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def data(args: argparse.Namespace) -> dict[str, object]:
    figures: dict[str, object] = {}
    if args.folder:
        figures["tokenising"] = tokenising(args.folder, args.tokenizer)
        show(figures["tokenising"])
        print()
    served = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for pairs, share in ((False, False), (True, False), (True, True)):
                examples = synthetic(kind, args.rows, pairs, Path(folder))
                how = "sft" if not pairs else "pairs, prompt " + ("once" if share else "twice")
                for size in UPDATES:
                    measured = serving(examples, KINDS[kind][2], size, share)
                    memory = {"MiB": held_mib()}
                    served.append({"lengths": kind, "layout": how} | measured | memory)
                del examples
    show(served)
    figures["serving"] = served
    return figures


if __name__ == "__main__":
    main()
