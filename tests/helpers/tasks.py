"""Files of data for evaluations, as the local tasks read them."""

import gzip
import json

import numpy as np

WORDS = "the capital of France is Paris and I like red or blue".split()


def text(rng, count):
    return " ".join(rng.choice(WORDS, count))


def write_data(folder):
    """Rows in the form of every local file."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    count = 6
    choices = [[text(rng, n) for n in (1, 4, 2, 3)] for _ in range(count)]
    rows = {
        "arc_challenge.jsonl.gz": [
            {"query": f"Question: {text(rng, 6)} {i}?", "choices": c, "gold": i % 4}
            for i, c in enumerate(choices)
        ],
        "lambada_en.jsonl.gz": [
            {"context": text(rng, 60 if i == 0 else 9), "continuation": "blue"}
            for i in range(count)
        ],
        "toxigen_en.jsonl.gz": [{"text": text(rng, 5), "label": i % 2} for i in range(count)],
        "enem2024_pt.jsonl.gz": [
            {"question": text(rng, 9), "alternatives": list("uvxyz"), "label": "ABCDE"[i % 5]}
            for i in range(count)
        ],
        "pira_mcqa_en.jsonl.gz": [
            dict(zip("ABCDE", WORDS, strict=False))
            | {"text": text(rng, 9), "question": "what?", "alternative": "ABCDE"[i % 5]}
            for i in range(count)
        ],
    }
    rows["arc_easy.jsonl.gz"] = rows["arc_challenge.jsonl.gz"][::-1]
    for name, lines in rows.items():
        with gzip.open(folder / name, "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    columns = "Question,Best Answer,Correct Answers,Incorrect Answers"
    (folder / "TruthfulQA.csv").write_text(
        f"{columns}\n" + "".join(f"what {i}?,red,red; blue,Paris; no; yes {i}\n" for i in range(4))
    )
    return folder
