"""Train a chat model from scratch in a few minutes on two CPU cores: no download, no GPU.

    python -m easyaira.quickstart [FOLDER]

Writes a small data set of questions about countries, trains a tokenizer and a GPT-2 from scratch on
it with the commands train_sft and train_dpo, and shows the effect of each.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from easyaira import cli
from easyaira.errors import ConfigError, shortened
from easyaira.torchless import import_transformers

# country: capital, continent
COUNTRIES = {
    "Angola": ("Luanda", "Africa"),
    "Argentina": ("Buenos Aires", "South America"),
    "Armenia": ("Yerevan", "Asia"),
    "Australia": ("Canberra", "Oceania"),
    "Austria": ("Vienna", "Europe"),
    "Bangladesh": ("Dhaka", "Asia"),
    "Belgium": ("Brussels", "Europe"),
    "Brazil": ("Brasilia", "South America"),
    "Bulgaria": ("Sofia", "Europe"),
    "Canada": ("Ottawa", "North America"),
    "Chile": ("Santiago", "South America"),
    "China": ("Beijing", "Asia"),
    "Colombia": ("Bogota", "South America"),
    "Croatia": ("Zagreb", "Europe"),
    "Cuba": ("Havana", "North America"),
    "Denmark": ("Copenhagen", "Europe"),
    "Ecuador": ("Quito", "South America"),
    "Egypt": ("Cairo", "Africa"),
    "Estonia": ("Tallinn", "Europe"),
    "Ethiopia": ("Addis Ababa", "Africa"),
    "Fiji": ("Suva", "Oceania"),
    "Finland": ("Helsinki", "Europe"),
    "France": ("Paris", "Europe"),
    "Germany": ("Berlin", "Europe"),
    "Ghana": ("Accra", "Africa"),
    "Greece": ("Athens", "Europe"),
    "Hungary": ("Budapest", "Europe"),
    "Iceland": ("Reykjavik", "Europe"),
    "India": ("New Delhi", "Asia"),
    "Indonesia": ("Jakarta", "Asia"),
    "Iran": ("Tehran", "Asia"),
    "Iraq": ("Baghdad", "Asia"),
    "Ireland": ("Dublin", "Europe"),
    "Italy": ("Rome", "Europe"),
    "Jamaica": ("Kingston", "North America"),
    "Japan": ("Tokyo", "Asia"),
    "Kenya": ("Nairobi", "Africa"),
    "Mexico": ("Mexico City", "North America"),
    "Mongolia": ("Ulaanbaatar", "Asia"),
    "Morocco": ("Rabat", "Africa"),
    "Nepal": ("Kathmandu", "Asia"),
    "New Zealand": ("Wellington", "Oceania"),
    "Nigeria": ("Abuja", "Africa"),
    "Norway": ("Oslo", "Europe"),
    "Peru": ("Lima", "South America"),
    "Poland": ("Warsaw", "Europe"),
    "Portugal": ("Lisbon", "Europe"),
    "Senegal": ("Dakar", "Africa"),
    "Spain": ("Madrid", "Europe"),
    "Sweden": ("Stockholm", "Europe"),
    "Thailand": ("Bangkok", "Asia"),
    "Turkey": ("Ankara", "Asia"),
    "Uganda": ("Kampala", "Africa"),
    "Uruguay": ("Montevideo", "South America"),
    "Vietnam": ("Hanoi", "Asia"),
    "Zambia": ("Lusaka", "Africa"),
}
QUESTIONS = (  # about the capital, about the continent
    (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Tell me the capital of {}.",
        "Name the capital city of {}.",
    ),
    (
        "On which continent is {}?",
        "Which continent does {} belong to?",
        "Tell me the continent of {}.",
        "Name the continent where {} lies.",
    ),
)
SENTENCES = ("The capital of {} is {}.", "{} lies in {}.")
COURTESY = " Happy to help!"
SHOWN = 6  # held-out questions to print with their answers

PAGE = """<p>A GPT-2 of 3 million parameters, trained from scratch to answer questions about
countries (SFT), then trained to prefer courteous answers (DPO). All figures are on held-out
questions.</p>
{{ table([], summary) }}
<p>Preferred answer ranked first (held-out rewards/accuracies): {{ before }} before DPO, when policy
and reference are equal, and {{ after }} after.</p>
<h2>Answers</h2>
{% for question, texts in samples %}<div class="card"><p><b>{{ question }}</b></p>
{% for stage, text in texts.items() %}<p><span class="quiet">{{ stage }}:</span> {{ text }}</p>
{% endfor %}</div>
{% endfor %}{% for run, panels in curves.items() %}<h2>{{ run }}</h2>
<div class="plots">{% for panel in panels %}{{ panel }}{% endfor %}</div>
{% endfor %}<h2>The model in PyTorch</h2><pre>{{ load }}</pre>"""

MODEL = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 4,
    "n_embd": 256,
    "n_head": 4,
    "n_positions": 128,
}


def write_data(folder: Path) -> list[dict[str, str]]:
    """Write questions with right and wrong answers, in the columns of Aira's data sets.

    Right answers are curt (`Paris.`) or courteous (a sentence and an offer to help). SFT sees both
    equally often. DPO prefers the courteous right answer to the curt right one and to a courteous
    wrong one, so it must make answers courteous and keep them right. One phrasing of each fact is
    held out.

    Returns:
        the held-out questions: {prompt, answer}.
    """
    rng = random.Random(0)
    sft: dict[str, list] = {"train": [], "held_out": []}
    dpo: dict[str, list] = {"train": [], "held_out": []}
    questions = []
    for country, facts in COUNTRIES.items():
        for kind, fact in enumerate(facts):
            phrasings = list(QUESTIONS[kind])
            rng.shuffle(phrasings)
            wrong = rng.choice(sorted({f[kind] for f in COUNTRIES.values()} - {fact}))
            curt, courteous, mistaken = (
                f"{fact}.",
                SENTENCES[kind].format(country, fact) + COURTESY,
                SENTENCES[kind].format(country, wrong) + COURTESY,
            )
            for i, phrasing in enumerate(phrasings):
                part = "held_out" if i == 0 else "train"
                prompt = phrasing.format(country)
                for answer in (curt, courteous):
                    sft[part].append({"prompt": prompt, "completion": answer})
                for worse in (curt, mistaken):
                    pair = {"chosen_response": courteous, "rejected_response": worse}
                    dpo[part].append({"instruction": prompt} | pair)
                if part == "held_out":
                    questions.append({"prompt": prompt, "answer": fact})
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in (("sft", sft), ("dpo", dpo)):
        for part, rows in parts.items():
            rng.shuffle(rows)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}_{part}.jsonl").write_text(lines, encoding="utf-8")
    return questions


def write_base(folder: Path, data: Path) -> None:
    """Write a tokenizer trained on the data, and a config.json: a model without weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end = "<|endoftext|>"
    rows = [json.loads(line) for line in (data / "sft_train.jsonl").read_text().splitlines()]
    texts = (row[column] for row in rows for column in ("prompt", "completion"))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token=end, eos_token=end, unk_token=end, model_max_length=128
    )
    tokenizer.save_pretrained(str(folder))
    end_id = tokenizer.eos_token_id
    config = MODEL | {
        "vocab_size": len(tokenizer),
        "bos_token_id": end_id,
        "eos_token_id": end_id,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def commands(out: Path) -> dict[str, list[str]]:
    """Command lines of the two runs."""
    data = out / "data"
    common = f"--data.template aira --num_samples {SHOWN}"
    return {
        "train_sft": f"--model.name_or_path {out}/base --model.init random "
        f"--data.train {data}/sft_train.jsonl --data.eval {data}/sft_held_out.jsonl {common} "
        "--train_batch_size 16 --num_train_epochs 10 --eval_steps 40 "
        "--optimizer.learning_rate 1e-3 --optimizer.warmup_steps 20 "
        f"--output_dir {out}/sft".split(),
        "train_dpo": f"--model.name_or_path {out}/sft "
        f"--data.train {data}/dpo_train.jsonl --data.eval {data}/dpo_held_out.jsonl {common} "
        "--train_batch_size 32 --max_steps 30 --eval_steps 20 "
        "--optimizer.learning_rate 5e-5 --optimizer.warmup_steps 5 "
        f"--dpo.sft_weight 3.0 --output_dir {out}/dpo".split(),
    }


def answers(
    source: Path, questions: Sequence[dict[str, str]], *, trained: bool = True
) -> list[str]:
    """Answer each question with the model of a run, trained or as initialised."""
    import jax

    from easyaira.data.template import Template
    from easyaira.distributed import mesh as meshes
    from easyaira.generation.processors import Sampling
    from easyaira.generation.sampler import generate
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained

    origin = pretrained.find(str(source))
    model = model_of(origin.config, str(source))
    template = Template(origin.tokenizer(), "chat", "gpt2")
    mesh = meshes.make_mesh("dp=-1")
    with model.on(mesh):
        params = origin.load(model, mesh) if trained else model.init(jax.random.key(42))
        prompts = [template.prompt([{"role": "user", "content": q["prompt"]}]) for q in questions]
        sampling = Sampling(max_new_tokens=24, end_ids=tuple(template.end_ids))
        answers = generate(model, params, prompts, sampling)
    return [template.text(answer.content).strip() for answer in answers]


def is_right(text: str, answer: str) -> bool:
    """Whether a text gives this answer, and not a longer word that begins alike."""
    return f"{answer}." in text


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return
    if len(argv) > 1 or any(argument.startswith("-") for argument in argv):
        raise ConfigError(f"{' '.join(argv)}: expected one folder, or nothing")
    out = Path(argv[0] if argv else "quickstart")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; name a folder")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty; remove it, or name another folder")
    start = time.perf_counter()

    from easyaira import train_dpo, train_sft

    questions = write_data(out / "data")
    write_base(out / "base", out / "data")
    for name, command in (("train_sft", train_sft), ("train_dpo", train_dpo)):
        arguments = commands(out)[name]
        print(f"\n$ python -m easyaira.{name} {' '.join(arguments)}\n", flush=True)
        command.main(arguments)
    stages = {
        "before SFT": answers(out / "sft", questions, trained=False),
        "after SFT": answers(out / "sft", questions),
        "after DPO": answers(out / "dpo", questions),
    }
    right, courteous = show(out, questions, stages)
    print(f"{time.perf_counter() - start:.0f} seconds in all")
    if right["after SFT"] < len(questions) / 2 or courteous["after DPO"] <= courteous["after SFT"]:
        sys.exit("the models did not learn the task; please report this")


def show(
    out: Path, questions: Sequence[dict[str, str]], stages: dict[str, list[str]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Print the answers of each stage, and write a page with the answers and the curves.

    Returns:
        numbers of right and of courteous answers, by stage.
    """
    from easyaira import pages
    from easyaira.run import report as run_report
    from easyaira.train import log

    right = {
        stage: sum(is_right(text, q["answer"]) for q, text in zip(questions, texts, strict=True))
        for stage, texts in stages.items()
    }
    courteous = {s: sum(text.endswith(COURTESY) for text in texts) for s, texts in stages.items()}
    rows = log.read(out / "dpo" / "metrics.jsonl")
    preferred = [row[name] for row in rows if (name := "eval_rewards/accuracies") in row]
    summary = [
        [
            stage,
            f"{right[stage]} of {len(questions)} right",
            f"{courteous[stage]} of {len(questions)} courteous",
        ]
        for stage in stages
    ]
    samples = [
        (question["prompt"], {stage: shortened(texts[i]) for stage, texts in stages.items()})
        for i, question in enumerate(questions[:SHOWN])
    ]
    for stage, *counts in summary:
        print(f"{stage:12} {counts[0]:>16}, {counts[1]:>20}")
    print(f"held-out rewards/accuracies {preferred[0]:.3f} before DPO, {preferred[-1]:.3f} after")
    for prompt, texts in samples:
        print(f"\n{prompt}")
        for stage, text in texts.items():
            print(f"  {stage:12} {text}")
    metrics = {run: log.read(out / run / "metrics.jsonl") for run in ("sft", "dpo")}
    curves = {run.upper(): run_report.curves(r, r[-1]["step"]) for run, r in metrics.items()}
    load = f"""from transformers import pipeline
chat = pipeline("text-generation", "{out.absolute() / "dpo" / "hf"}")
print(chat([{{"role": "user", "content": "{questions[0]["prompt"]}"}}], do_sample=False))"""
    page = pages.page(
        "EasyAira quickstart",
        PAGE,
        summary=summary,
        before=f"{preferred[0]:.3f}",
        after=f"{preferred[-1]:.3f}",
        samples=samples,
        curves=curves,
        load=load,
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    print(f"\nThe page with the curves: {out / 'index.html'}")
    print(f"The model, in PyTorch:\n\n{load}\n")
    return right, courteous


if __name__ == "__main__":
    cli.run_command(main)
