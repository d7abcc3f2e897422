"""Instruction backtranslation: every row is in one of the files, scores are parsed strictly, BLEU
and ROUGE are their formulas, and an interrupted command ends with the same bytes."""

import json
import math
from collections import Counter

import jax
import pytest

from easyaira import backtranslate, generate
from easyaira.backtranslation import ask, curate, measure
from easyaira.backtranslation.iterate import SEED_TAG, WEB_TAG
from easyaira.distributed import mesh as meshes
from helpers import tiny
from helpers.processes import call

LLAMA = tiny.CONFIGS["llama"] | {"max_position_embeddings": 1024}
TEXTS = [
    {"text": "the capital of France is Paris", "source": "c4"},
    {"text": "   "},
    {"text": "I like blue and red"},
    {"text": "no " * 1100},
    {"text": "the capital of France is Paris"},
    {"text": "yes"},
]
SEED = [
    {"prompt": "what do you like?", "completion": "blue"},
    {"prompt": "and you?", "completion": "blue"},
    {"messages": "unused", "prompt": "the capital", "completion": "Paris"},
    {"prompt": "say yes", "completion": " "},
    {"prompt": "yes or no", "completion": "no"},
]
SFT = """
model: {name_or_path: MODEL}
data: {train: unused, template: plain, max_length: 64}
max_steps: 1
train_batch_size: 4
num_samples: 0
export: false
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("ground")
    rows = {"texts": TEXTS, "seed": [row for row in SEED if "messages" not in row]}
    tiny.ground(root, {"llama": LLAMA}, **rows)
    (root / "sft.yaml").write_text(SFT.replace("MODEL", str(root / "llama")))
    return root


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(capsys, step, *words):
    return call(backtranslate.main, [step, *words], capsys)


def augment(ground, output, *flags):
    common = ["--template=plain", "--max_new_tokens=12", "--stop=e", "--temperature=5"]
    return ["augment", ground / "llama", f"--texts={ground / 'texts.jsonl'}",
            f"--output={output}", *common, *flags]  # fmt: skip


# reverse


def test_reversed_rows_and_seed_rows_are_the_same_exchanges(ground, tmp_path, capsys):
    out = tmp_path / "reversed"
    words = (f"--data={ground / 'seed.jsonl'}", "--held_out=1", f"--output={out}")
    assert run(capsys, "reverse", *words)[0] == 0
    train, held_out, seed = (lines(out / f"{n}.jsonl") for n in ("train", "held_out", "seed"))
    assert train == [{"prompt": r["completion"], "completion": r["prompt"]} for r in seed]
    counts = json.loads((out / "counts.json").read_text())
    assert counts["rows"] == 4 == len(train) + len(held_out) + counts["empty instruction or answer"]
    answers = {row["prompt"] for row in train}, {row["prompt"] for row in held_out}
    assert not answers[0] & answers[1], "rows with one answer are on one side"
    before = contents(out)
    assert run(capsys, "reverse", *words)[0] == 0 and contents(out) == before


def test_reversed_transcripts_are_those_that_training_reverses(tmp_path, capsys):
    text = "### Human: what?### Assistant: yes### Human: and?### Assistant: no"
    data = tiny.write_rows(tmp_path / "guanaco.jsonl", [{"text": text}])
    words = (f"--data={data}", "--columns={transcript: text}", f"--output={tmp_path / 'out'}")
    assert run(capsys, "reverse", *words)[0] == 0
    assert lines(tmp_path / "out/train.jsonl") == [{"prompt": "yes", "completion": "what?"}]


# augment


@pytest.fixture(scope="module")
def augmented(ground, tmp_path_factory):
    out = tmp_path_factory.mktemp("augmented") / "pairs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        backtranslate.main([str(word) for word in augment(ground, out)])
    return out


@pytest.mark.slow
def test_every_text_is_a_pair_or_has_a_reason(augmented):
    pairs, others = lines(augmented / "pairs.jsonl"), lines(augmented / "not_paired.jsonl")
    assert sorted(row["text_id"] for row in (*pairs, *others)) == [0, 1, 2, 3, 4, 5]
    for row in pairs:
        assert row["completion"] == TEXTS[row["text_id"]]["text"] and row["prompt"].strip()
    faults = {row["text_id"]: row["fault"] for row in others}
    assert faults[1] == "empty text"
    assert faults[3] == "no room for an answer"
    assert faults[4] == "repeated text"
    counts = json.loads((augmented / "counts.json").read_text())
    assert counts["texts"] == 6 and counts["pairs.jsonl"] == len(pairs)
    reasons = Counter(faults.values())
    assert {name: counts[name] for name in reasons} == reasons
    assert pairs, "the seed gives instructions that end"


@pytest.mark.parametrize("stage", ["asked", "answers", "sorted"])
@pytest.mark.slow
def test_an_interrupted_command_ends_with_the_same_bytes(
    stage, augmented, ground, tmp_path, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    whole = contents(augmented)
    for name in {"asked": [], "answers": [ask.ASKED, ask.NOT_ASKED]}.get(stage, whole):
        (out / name).write_bytes(whole[name])
    (out / "settings.json").write_bytes(whole["settings.json"])
    if stage == "answers":
        record = f"{ask.ANSWERS}.settings.json"
        (out / record).write_bytes(whole[record])
        (out / ask.ANSWERS).write_bytes(whole[ask.ANSWERS][: len(whole[ask.ANSWERS]) // 2])
    if stage == "sorted":
        (out / "pairs.jsonl").unlink()
        (out / "not_paired.jsonl.new").write_text("cut")
    assert call(backtranslate.main, augment(ground, out), capsys)[0] == 0
    assert contents(out) == whole


def test_a_model_that_never_ends_gives_no_pairs_and_loses_no_text(ground, tmp_path, capsys):
    out = tmp_path / "out"
    words = [word for word in augment(ground, out) if word != "--stop=e"]
    assert call(backtranslate.main, [*words, "--min_new_tokens=12"], capsys)[0] == 0
    counts = json.loads((out / "counts.json").read_text())
    assert counts["pairs.jsonl"] == 0 and counts[ask.CUT] == 3
    assert len(lines(out / "not_paired.jsonl")) == counts["texts"] == 6


@pytest.mark.parametrize(
    "step, flags, problem",
    [
        ("augment", ["--texts=GROUND/none.jsonl"], "none.jsonl: no such file"),
        ("augment", ["--texts=GROUND/bad.jsonl"], "bad.jsonl:2: wanted a column text, or prompt"),
        ("augment", ["--texts=GROUND/number.jsonl"], "number.jsonl:1: column text: wanted text"),
        ("augment", ["--texts=GROUND/empty.jsonl"], "none of 1 rows can be asked: empty text"),
        ("curate", ["--pairs=GROUND/texts.jsonl"], "none of 6 rows can be asked: does not begin"),
        ("reverse", ["--data=GROUND/seed.jsonl", "--held_out=9"], "none is left to train on"),
        ("iterate", ["--threshold=3"], "threshold"),
        (
            "iterate",
            ["--config=GROUND/wrong.yaml", "--seed_data=GROUND/seed.jsonl"]
            + ["--pairs=GROUND/seed.jsonl"],
            "wrong.yaml:1: steps: no such option; did you mean",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    step, flags, problem, ground, tmp_path, capsys
):
    tiny.write_rows(ground / "bad.jsonl", [{"text": "yes"}, {"body": "no"}])
    tiny.write_rows(ground / "number.jsonl", [{"text": 1}])
    tiny.write_rows(ground / "empty.jsonl", [{"text": ""}])
    (ground / "wrong.yaml").write_text("steps: 1")
    flags = [flag.replace("GROUND", str(ground)) for flag in flags]
    model = [ground / "llama", "--template=plain"] if step in ("augment", "curate") else []
    status, _, err = run(capsys, step, *model, *flags, f"--output={tmp_path / 'out'}")
    assert status == 2 and problem in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_command_is_kept(augmented, ground, tmp_path, capsys):
    before = contents(augmented)
    other = tiny.write_rows(tmp_path / "other.jsonl", [{"text": "yes"}])
    for flag, problem in {
        f"--texts={other}": "was made with other settings (texts)",
        "--seed=1": "with seed 0, but 1 is asked for",
    }.items():
        status, _, err = call(backtranslate.main, augment(ground, augmented, flag), capsys)
        assert status == 2 and problem in err and contents(augmented) == before


# BLEU and ROUGE


def bleu(generated, true):
    """Papineni et al. (2002), equation 3, of texts of four words or more."""
    log, lengths = 0.0, [sum(len(text.split()) for text in texts) for texts in (generated, true)]
    for n in range(1, 5):
        grams = [
            [Counter(zip(*(text.split()[i:] for i in range(n)), strict=False)) for text in texts]
            for texts in (generated, true)
        ]
        right = sum((one & other).total() for one, other in zip(*grams, strict=True))
        log += math.log(right / sum(one.total() for one in grams[0])) / 4
    return 100 * math.exp(log + min(0, 1 - lengths[1] / lengths[0]))


def test_bleu_and_rouge_are_their_formulas():
    true = ["name the capital of France and its river", "list blue things"]
    generated = ["name the capital of France and Spain", "list three blue things"]
    scores = measure.scores(generated, true)
    assert scores["bleu"] == pytest.approx(bleu(generated, true), abs=1e-6)
    one = [(6 / 7, 6 / 8), (3 / 4, 3 / 3)]  # precision and recall of words, and of their order
    f = sum(2 * p * r / (p + r) for p, r in one) / 2 * 100
    assert scores["rouge1"] == pytest.approx(f) and scores["rougeL"] == pytest.approx(f)


def test_true_instructions_are_compared_with_all_answers_and_with_first_words(
    ground, tmp_path, capsys
):
    rows = [{"prompt": "one two three four five", "completion": "one two"}]
    rows += [{"prompt": "red blue", "completion": "name two colours please"}]
    data = tiny.write_rows(tmp_path / "held_out.jsonl", rows)
    out = tmp_path / "out"
    status, printed, _ = call(backtranslate.main, augment(ground, out, f"--texts={data}"), capsys)
    assert status == 0
    counts = json.loads((out / "counts.json").read_text())
    wanted = measure.scores(["one two three", "red blue"], [row["completion"] for row in rows])
    assert counts[measure.FIRST_WORDS] == pytest.approx(wanted)
    answers = [row["generated"].strip() for row in lines(out / ask.ANSWERS)]
    wanted = measure.scores(answers, [row["completion"] for row in rows])
    assert counts["generated"] == pytest.approx(wanted)
    assert "first words of the text: bleu" in printed
    page = (out / "report.html").read_text()
    assert "name two colours please" in page and f"{counts['generated']['rougeL']:.2f}" in page


def test_missing_libraries_are_named_before_anything_is_written(
    ground, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measure, "find_spec", lambda name: None if name == "sacrebleu" else name)
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "yes", "completion": "say yes"}])
    out = tmp_path / "out"
    status, _, err = call(backtranslate.main, augment(ground, out, f"--texts={data}"), capsys)
    assert status == 2 and "need sacrebleu; pip install '.[backtranslation]'" in err
    assert not out.exists()


# curate


@pytest.mark.parametrize(
    "reply, score",
    [
        ("Clear and complete.\nScore: 5", 5),
        ("Score: 1", 1),
        ("Score: 2\nNo, it is better.\nScore: 4\n\n", 4),
        ("Fine.\r\n Score: 3 \r\n", 3),
        ("Score: 4.5", None),
        ("Score: 4/5", None),
        ("Score: 6", None),
        ("Score: 0", None),
        ("Score: 55", None),
        ("score: 4", None),
        ("Score:4", None),
        ("Score: <4>", None),
        ("It is good. Score: 4", None),
        ("Score: 4\nI am sure.", None),
        ("Score: \u0664", None),
        ("4", None),
        ("", None),
    ],
)
def test_a_score_is_read_from_the_last_line_or_not_at_all(reply, score):
    assert curate.score_of(reply) == score


def test_the_rubric_ends_as_it_is_parsed_and_holds_the_pair_as_it_is():
    text = curate.question("{0} %s \\1", "Score: 5")
    assert "Instruction:\n{0} %s \\1\n\nAnswer:\nScore: 5\n" in text
    for score in range(1, 6):
        assert f"\n{score}: " in text


REPLIES = ["Fine.\nScore: 5", "Score: 4", "Score: 2", "great!", "Score: 5"]


@pytest.fixture
def judged(monkeypatch):
    """A judge that gives REPLIES, the last of them cut, in the place of `generate`."""
    real = generate.main

    def fake(argv):
        asked, output = (word.partition("=")[2] for word in argv[1:3])
        with open(output, "w") as file:
            for i, row in enumerate(map(json.loads, open(asked))):
                why = "length" if i % 5 == 4 else "end"
                row |= {"generated": REPLIES[i % 5], "finish_reason": why}
                file.write(json.dumps(row) + "\n")

    monkeypatch.setattr(generate, "main", fake)
    return real


def test_pairs_are_kept_by_their_scores_and_no_reply_is_guessed(ground, tmp_path, capsys, judged):
    rows = [{"prompt": f"say {i}", "completion": "yes", "text_id": 10 + i} for i in range(5)]
    rows += [{"prompt": "no " * 1100, "completion": "no"}, {"prompt": "", "completion": "no"}]
    pairs, out = tiny.write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    words = (ground / "llama", f"--pairs={pairs}", f"--output={out}", "--template=plain")
    assert run(capsys, "curate", *words)[0] == 0
    counts = json.loads((out / "counts.json").read_text())
    assert counts == {
        "pairs": 7, "scored.jsonl": 3, "kept_4.jsonl": 2, "kept_5.jsonl": 1,
        "score 2": 1, "score 4": 1, "score 5": 1, ask.CUT: 1, curate.UNPARSABLE: 1,
        "no room for an answer": 1, "empty instruction or answer": 1,
    }  # fmt: skip
    assert [row["score"] for row in lines(out / "scored.jsonl")] == [5, 4, 2]
    assert lines(out / "kept_5.jsonl") == [rows[0] | {"score": 5}]
    assert [row["text_id"] for row in lines(out / "kept_4.jsonl")] == [10, 11]
    others = {row["text_id"]: row for row in lines(out / "not_scored.jsonl")}
    assert others.keys() == {13, 14, 5, 6}
    assert others[13]["judge"] == "great!" and others[14]["fault"] == ask.CUT


def test_a_judge_without_scores_is_counted(ground, augmented, tmp_path, capsys):
    """An untrained one, through the sampler itself."""
    out = tmp_path / "out"
    words = (ground / "llama", f"--pairs={augmented / 'pairs.jsonl'}", f"--output={out}")
    status, _, err = run(capsys, "curate", *words, "--template=plain", "--max_new_tokens=4")
    assert status == 0, err
    counts = json.loads((out / "counts.json").read_text())
    assert counts["scored.jsonl"] == 0 and counts["kept_4.jsonl"] == 0
    assert counts[ask.CUT] + counts.get(curate.UNPARSABLE, 0) == counts["pairs"] > 0


# iterate


def iterate(ground, pairs, output, *flags):
    return ["iterate", f"--config={ground / 'sft.yaml'}", f"--seed_data={ground / 'seed.jsonl'}",
            f"--pairs={pairs}", f"--output={output}", *flags]  # fmt: skip


@pytest.mark.slow
def test_each_round_learns_seed_rows_and_those_that_the_last_model_kept(
    ground, tmp_path, capsys, judged
):
    rows = [{"prompt": f"say {i}", "completion": "yes"} for i in range(5)]
    pairs, out = tiny.write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    words = iterate(ground, pairs, out, "--threshold=4")
    status, printed, err = call(backtranslate.main, words, capsys)
    assert status == 0, err
    seed = [row for row in SEED if "messages" not in row and row["completion"].strip()]
    seed = [row | {"prompt": f"{row['prompt']}\n{SEED_TAG}"} for row in seed]
    kept = [{"prompt": f"say {i}\n{WEB_TAG}", "completion": "yes"} for i in (0, 1)]
    assert lines(out / "0/train.jsonl") == seed
    for number in (1, 2):
        assert lines(out / f"{number}/train.jsonl") == seed + kept
        asked = json.loads((out / f"{number}/curated/settings.json").read_text())
        assert str(out / f"{number - 1}/run") in asked["model"]["name"]
        counted = f"{out}/{number}: pairs 5, "
        assert 0 <= printed.find(counted) < printed.index(f"in {out}/{number}/run")
    rounds = json.loads((out / "counts.json").read_text())["rounds"]
    assert [row["kept rows"] for row in rounds] == [0, 2, 2] and rounds[2]["pairs"] == 5
    status, printed, _ = call(backtranslate.main, words, capsys)
    assert status == 0 and printed.count("nothing to do") == 3
    assert json.loads((out / "counts.json").read_text())["rounds"] == rounds


def test_a_judge_that_keeps_nothing_ends_the_rounds(ground, tmp_path, capsys, judged, monkeypatch):
    monkeypatch.setattr(curate, "score_of", lambda reply: None)
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", [{"prompt": "say", "completion": "yes"}])
    status, _, err = call(backtranslate.main, iterate(ground, pairs, tmp_path / "out"), capsys)
    assert status == 2 and len(err.strip().splitlines()[-1:]) == 1
    assert "of 1 pairs, the model of round 0 scored 0, none of them 5 or better" in err
    assert len(lines(tmp_path / "out/1/curated/not_scored.jsonl")) == 1
