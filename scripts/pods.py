"""Write the tables of docs/pods.md: memory and estimated time of each recipe, and of generation,
on TPU pods.

    python scripts/pods.py --figures figures.json               # needs libtpu; minutes a row
    python scripts/pods.py --figures figures.json --only v5e    # some rows; keeps the others

Models have their real sizes but no real weights. Rows are as long as the recipe allows, so figures
are those of the largest possible update.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from easyaira import cli
from easyaira.algorithms.dpo import dpo_algorithm
from easyaira.algorithms.rollouts import rl_algorithm
from easyaira.algorithms.sft import sft_algorithm
from easyaira.config.run import TrainDPO, TrainRL, TrainSFT
from easyaira.distributed import mesh as meshes
from easyaira.distributed.chips import memory_of, pod
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import Sampler
from easyaira.hf.table import pair_rows
from easyaira.models.layers import Compute
from easyaira.models.registry import model_of
from easyaira.plan import cost, decoding, on_policy
from easyaira.plan import report as plan_report
from easyaira.train.setup import prepare

ROOT = Path(__file__).parents[1]
LLAMA = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}
LLAMA |= {"max_position_embeddings": 4096, "tie_word_embeddings": False}
LLAMA_7B = LLAMA | {"hidden_size": 4096, "intermediate_size": 11008}
LLAMA_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = LLAMA | {"hidden_size": 5120, "intermediate_size": 13824}
LLAMA_13B |= {"num_hidden_layers": 40, "num_attention_heads": 40}
TINY_LLAMA = LLAMA | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
TINY_LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 4}
TINY_LLAMA |= {"max_position_embeddings": 2048}
GPT2_XL = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
GPT2_XL |= {"n_embd": 1600, "n_layer": 48, "n_head": 25}

MODELS = {  # base model of each recipe, from its config.json
    "tulu-2.5-dpo-13b-uf-overall": LLAMA_13B,
    "tulu-2-sft-13b": LLAMA_13B,
    "tulu-2-sft-7b": LLAMA_7B,
    "tulu-2.5-ppo-13b": LLAMA_13B,
    "backward-llama-2-7b": LLAMA_7B,
    "aira-2-1b1": TINY_LLAMA,
    "aira-2-1b5": GPT2_XL,
}


class Row(NamedTuple):
    """A row of the table: a recipe, a pod and the settings that override the recipe."""

    recipe: str
    topology: str
    mesh: str
    accumulation: int | None = None


DPO_13B = "tulu-2.5-dpo-13b-uf-overall"
ROWS = [
    Row(DPO_13B, "v5p:4x4x2", "dp=1,fsdp=32,tp=1"),
    Row(DPO_13B, "v5p:4x4x2", "dp=1,fsdp=8,tp=4"),
    Row(DPO_13B, "v5p:4x4x2", "dp=1,fsdp=4,tp=8"),
    Row(DPO_13B, "v4:4x4x2", "dp=1,fsdp=32,tp=1"),
    Row(DPO_13B, "v5e:8x8", "dp=1,fsdp=32,tp=2"),
    Row(DPO_13B, "v3:8x16", "dp=2,fsdp=16,tp=8"),
    Row("tulu-2-sft-13b", "v5p:4x4x2", "dp=1,fsdp=4,tp=8"),
    Row("tulu-2-sft-13b", "v5p:4x4x2", "dp=1,fsdp=32,tp=1"),
    Row("tulu-2-sft-7b", "v5p:2x2x4", "dp=1,fsdp=2,tp=8"),
    Row("backward-llama-2-7b", "v5e:2x2", "dp=1,fsdp=4,tp=1", 4),
    Row("aira-2-1b1", "v5e:2x2", "dp=1,fsdp=4,tp=1"),
    Row("aira-2-1b5", "v5e:2x2", "dp=1,fsdp=4,tp=1"),
]
PPO_13B = "tulu-2.5-ppo-13b"
RL_ROWS = [
    Row(PPO_13B, "v5p:4x4x2", "dp=1,fsdp=32,tp=1"),
    Row(PPO_13B, "v5p:4x4x2", "dp=1,fsdp=8,tp=4"),
    Row(PPO_13B, "v3:8x16", "dp=4,fsdp=16,tp=4"),
]
SCORES = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}


class Generation(NamedTuple):
    """A row of the table of generation, in bfloat16."""

    model: str
    topology: str
    mesh: str
    rows: int
    slots: int


GENERATIONS = [
    Generation("TinyLlama 1.1B", "v5e:1x1", "dp=1,fsdp=1,tp=1", 64, 2048),
    Generation("TinyLlama 1.1B", "v5e:2x2", "dp=4,fsdp=1,tp=1", 256, 2048),
    Generation("TinyLlama 1.1B", "v5e:2x2", "dp=1,fsdp=4,tp=1", 256, 2048),
    Generation("TinyLlama 1.1B", "v5e:2x2", "dp=1,fsdp=1,tp=4", 256, 2048),
    Generation("Llama 2 7B", "v5e:2x4", "dp=1,fsdp=1,tp=8", 64, 1024),
    Generation("Llama 2 7B", "v5p:2x2x1", "dp=1,fsdp=1,tp=4", 64, 2048),
    Generation("Llama 2 7B", "v5p:2x2x1", "dp=4,fsdp=1,tp=1", 64, 2048),
]
GENERATING = {"TinyLlama 1.1B": TINY_LLAMA, "Llama 2 7B": LLAMA_7B}


def write_model(folder: Path, config: dict[str, Any], scorer: bool = False) -> None:
    """Write a Hugging Face folder: config.json, a byte-level tokenizer without merges, and a sparse
    file of zero weights, which takes no disk space."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused {i}>" for i in range(config["vocab_size"] - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for turn in messages %}{{ turn['content'] }}{% endfor %}</s>",
    ).save_pretrained(folder)
    model, header, end = model_of(config, "config.json", scorer=scorer), {}, 0
    for row, leaf in pair_rows(model.shapes, model.rows):
        layer = np.broadcast_to(np.float32(0), leaf.shape[1:] if row.stacked else leaf.shape)
        shape = row.cut(layer, model.vocab_size).shape
        for name in row.names(leaf):
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_rows(file: Path, recipe: str, length: int, count: int) -> None:
    """Write rows of maximal length in the format of the recipe."""
    prompt = "a" * (length // 4)
    answers = ["b" * (length - len(prompt) - 64), "c" * (length - len(prompt) - 64)]
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    if "ppo" in recipe:
        row = {"prompt": "a" * (length // 2 - 64)}
    elif "dpo" in recipe:
        row = {"chosen": turns[0], "rejected": turns[1]}
    elif "tulu" in recipe:
        row = {"messages": turns[0]}
    elif "backward" in recipe:
        row = {"text": f"### Human: {prompt}### Assistant: {answers[0]}"}
    else:
        row = {"prompt": prompt, "completion": answers[0]}
    file.write_text((json.dumps(row) + "\n") * count)


def configured(recipe: str, work: Path, *flags: str) -> Any:
    """Configuration of a recipe, with our model and data."""
    kinds = {"dpo": TrainDPO, "ppo": TrainRL}
    config_class = next((kinds[kind] for kind in kinds if kind in recipe), TrainSFT)
    file = f"--config={ROOT / 'configs' / recipe}.yaml"
    recipe_config, _ = cli.parse(config_class, [file])
    model, rows = work / recipe, work / f"{recipe}.jsonl"
    if not model.exists():
        write_model(model, MODELS[recipe])
        length, batch_size = recipe_config.data.max_length, recipe_config.train_batch_size
        write_rows(rows, recipe, length, 8 * batch_size)
        if "ppo" in recipe:
            write_model(work / "reward", MODELS[recipe] | SCORES, scorer=True)
    given = [f"--model.name_or_path={model}", f"--data.train={rows}", "--data.split=train"]
    given += ["--max_steps=1000", f"--data.cache_dir={work}"]
    if "ppo" in recipe:
        given += [f"--rl.reward={work / 'reward'}", f"--rl.value_model={work / 'reward'}"]
    return cli.parse(config_class, [file, *given, *flags])[0]


def figures(row: Row, work: Path) -> dict[str, Any]:
    """Figures of a row, from a plan for its pod."""
    flags = [f"--mesh={row.mesh}"]
    if row.accumulation:
        flags += [f"--gradient_accumulation_steps={row.accumulation}"]
    config = configured(row.recipe, work, *flags)
    make = {TrainDPO: dpo_algorithm, TrainRL: rl_algorithm}.get(type(config), sft_algorithm)
    algorithm = make(config)
    setup = prepare(config, algorithm, pod(row.topology))
    measured = cost.measure(setup, algorithm)
    room = memory_of(setup.mesh.devices.flat[0])
    print(
        plan_report.describe(setup), plan_report.show(setup, measured, room), sep="\n", flush=True
    )
    moved = sum(size for _, size in measured.moved().values())
    work_done = sum(measured.work.values())
    roll_out = on_policy.measure(setup) if algorithm.on_policy else None
    return {
        "roll_out": roll_out and roll_out._asdict(),
        "parts": config.gradient_accumulation_steps,
        "shape": f"{measured.update.rows} x {measured.update.length:,}",
        "remat": config.model.gradient_checkpointing,
        "held": measured.program.arguments,
        "used": measured.program.temporaries,
        "needed": measured.program.memory,
        "there": room,
        "fits": plan_report.fits(measured.program, room)[0],
        "moved": moved,
        "communication": measured.moved(),
        "sizes": measured.sizes,
        "seconds": cost.seconds_of(setup, measured.update, work_done, moved),
        "compiled": measured.program.seconds,
        "failures": measured.failures,
    }


def generation_figures(row: Generation) -> dict[str, Any]:
    """Figures of a row of the table of generation."""
    mesh = meshes.make_mesh(row.mesh, pod(row.topology))
    compute = Compute(dtype=jnp.dtype("bfloat16"))
    model = model_of(GENERATING[row.model], "config.json", compute, scorer=False)
    cost = decoding.measure(Sampler(model, Sampling(end_ids=(2,))), mesh, row.rows, row.slots)
    print(row, decoding.show(cost, mesh), sep="\n", flush=True)
    device = mesh.devices.flat[0]
    return {
        "weights": cost.weights,
        "cache": cost.cache,
        "used": cost.program.temporaries,
        "needed": cost.program.memory,
        "there": memory_of(device),
        "fits": plan_report.fits(cost.program, memory_of(device))[0],
        "moved": cost.moved,
        "seconds": cost.seconds(mesh),
        "compiled": cost.program.seconds,
    }


GENERATION_COLUMNS = (
    "model, pod, mesh, rows x slots, weights (GiB), KV cache (GiB), in a step (GiB), of "
    "(GiB), sent by a device per token (MiB), estimated ms per token of all rows, compiled in (s)"
).split(", ")


def generation_line(row: Generation, result: dict[str, Any]) -> str:
    """Format a row of the table of generation."""
    sizes = [f"{result[name] / 2**30:.1f}" for name in ("weights", "cache", "used")]
    if not result["fits"]:
        sizes[2] = f"{result['needed'] / 2**30:.1f} in all, does not fit"
    return (
        f"| {row.model} | {row.topology} | {row.mesh} | {row.rows} x {row.slots:,} "
        f"| {' | '.join(sizes)} | {result['there'] / 2**30:.1f} | {result['moved'] / 2**20:,.0f} "
        f"| {result['seconds'] * 1e3:.2g} | {result['compiled']:.0f} |"
    )


COLUMNS = (
    "recipe, pod, mesh, micro-batches, rows of a device, activations, held (GiB), in a step (GiB), "
    "of (GiB), sent by a device (GiB), estimated step (s), compiled in (s)"
).split(", ")


def line(row: Row, result: dict[str, Any]) -> str:
    """Format a row of the table."""
    held, used, needed, available, moved = (
        result[name] / 2**30 for name in ("held", "used", "needed", "there", "moved")
    )
    memory = f"{held:.1f} | {used:.1f} | {available:.1f}"
    if not result["fits"]:
        memory = f" | {needed:.1f} in all, does not fit | {available:.1f}"
    remat = {"none": "kept", "dots": "products kept", "full": "recomputed"}[result["remat"]]
    return (
        f"| {row.recipe} | {row.topology} | {row.mesh} | {result['parts']} | {result['shape']} "
        f"| {remat} | {memory} | {moved:.1f} | {result['seconds']:.2g} | {result['compiled']:.0f} |"
    )


RL_COLUMNS = (
    "recipe, pod, mesh, policy and value model with their optimizer (GiB), in an update (GiB), "
    "reference (GiB), reward model (GiB), weights for sampling (GiB), KV cache (GiB), "
    "in a step of sampling (GiB), most in all (GiB), of (GiB), estimated step (s), compiled in (s)"
).split(", ")


def rl_line(row: Row, result: dict[str, Any]) -> str:
    """Format a row of the table of on-policy runs."""
    cost = on_policy.RollOut(**result["roll_out"])
    most = max(result["needed"] + cost.beside, result["held"] + cost.sampling)
    columns = [result["held"], result["used"], *cost[:5], most, result["there"]]
    sizes = " | ".join(f"{size / 2**30:.1f}" for size in columns)
    return (
        f"| {row.recipe} | {row.topology} | {row.mesh} | {sizes} | {result['seconds']:.2g} "
        f"| {result['compiled']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--figures", type=Path, required=True, help="file of figures; new ones are added"
    )
    parser.add_argument(
        "--only", default="", help="measure only rows whose recipe, pod or mesh contains this"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "pods.md")
    given = parser.parse_args()
    known = json.loads(given.figures.read_text()) if given.figures.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        for row in [*ROWS, *RL_ROWS]:
            key = " ".join(map(str, row))
            if key not in known and given.only in key:
                known[key] = figures(row, Path(work))
                given.figures.write_text(json.dumps(known, indent=1))
    for row in GENERATIONS:
        key = " ".join(map(str, row))
        if key not in known and given.only in key:
            known[key] = generation_figures(row)
            given.figures.write_text(json.dumps(known, indent=1))
    page = given.page.read_text()
    page = filled(page, "table", COLUMNS, ROWS, line, known)
    page = filled(page, "rl", RL_COLUMNS, RL_ROWS, rl_line, known)
    page = filled(page, "generation", GENERATION_COLUMNS, GENERATIONS, generation_line, known)
    given.page.write_text(page)


def filled(
    page: str,
    name: str,
    columns: list[str],
    rows: Sequence[Any],
    line: Callable[[Any, dict[str, Any]], str],
    known: dict[str, dict[str, Any]],
) -> str:
    """A page with its table of this name filled, unless none of its rows is known."""
    lines = [line(row, known[key]) for row in rows if (key := " ".join(map(str, row))) in known]
    if not lines:
        return page
    before, _, after = page.partition(f"<!-- {name} -->\n")
    after = after.partition(f"<!-- end of {name} -->")[2]
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    table = "\n".join([*head, *lines])
    return f"{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->{after}"


if __name__ == "__main__":
    main()
