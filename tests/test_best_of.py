"""Rejection sampling: scores are PyTorch's, the best and the worst are chosen and kept in files
that an interrupted command continues."""

import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from easyaira import best_of
from easyaira.distributed import mesh as meshes
from easyaira.distributed.mesh import make_mesh
from easyaira.errors import ConfigError, WeightsError
from easyaira.generation.sets import COUNTS, SETTINGS, begin, check_folder
from easyaira.rewards import best_of as sets
from easyaira.rewards.best_of import Candidate, select
from easyaira.rewards.model import RewardModel
from helpers import tiny
from helpers.examples import load
from helpers.processes import call

CHAT = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ eos_token }}"
ROWS = [
    {"prompt": "what do you like?", "id": 7},
    {"messages": [{"role": "user", "content": "the capital"}]},
    {"prompt": "I like blue and red. yes"},
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A language model, a reward model of each kind and a toxicity model."""
    root = tmp_path_factory.mktemp("ground")
    models = {kind: tiny.SCORERS[kind] for kind in ("bert", "llama")}
    tiny.ground(root, models | {"gpt2": tiny.CONFIGS["gpt2"]}, prompts=ROWS)
    guard = tiny.save(root / "toxicity", tiny.SCORERS["roberta"], std=0.8)
    guard.classifier.out_proj.bias.data -= 4.2  # scores of both signs
    guard.save_pretrained(root / "toxicity")
    chat = tiny.tokenizer(pad="<pad>")
    chat.chat_template = CHAT
    chat.save_pretrained(root / "llama")
    for kind in ("llama", "gpt2"):  # as many reward models are: padded with the end token
        tiny.save(root / f"{kind}-end", tiny.SCORERS[kind] | {"pad_token_id": 0})
        chat.pad_token = chat.eos_token
        chat.save_pretrained(root / f"{kind}-end")
    return root


def arguments(ground, output, *flags, reward="bert"):
    return [
        ground / "gpt2",
        f"--prompts={ground / 'prompts.jsonl'}",
        f"--reward={ground / reward}",
        f"--toxicity={ground / 'toxicity'}",
        f"--output={output}",
        "--template=plain",
        "--num_samples=4",
        "--temperature=5.0",
        "--top_p=1.0",
        "--top_k=0",
        "--max_new_tokens=20",
        "--stop=e",
        *flags,
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Scores


ANSWERS = ["yes", "", "I like Paris and blue and red. no", "the capital of France is Paris " * 20]


@pytest.mark.parametrize("kind", ["bert", "llama", "llama-end", "gpt2-end"])
@pytest.mark.slow
def test_scores_of_answers_are_those_of_torch(kind, ground):
    """Of uneven answers, the last of which is cut at the model's positions."""
    folder = ground / kind
    prompts = ["what do you like?", "the capital", "yes"]
    asked = [(prompt, answer) for prompt in prompts for answer in ANSWERS]
    messages = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in asked
    ]
    model = RewardModel(str(folder), make_mesh("fsdp=-1")).load()
    scores = model.of_answers(messages)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    positions = model.model.config.max_positions
    for conversation, score in zip(messages, scores, strict=True):
        if kind == "bert":
            text = tokenizer.sep_token.join(turn["content"] for turn in conversation)
            ids = tokenizer(text).input_ids
            ids = ids if len(ids) <= positions else [*ids[: positions - 1], ids[-1]]
        else:
            ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)[
                :positions
            ]
        with torch.no_grad():
            wanted = theirs(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert score == pytest.approx(wanted, abs=1e-5), conversation


def test_scores_of_texts_are_those_of_torch(ground):
    folder = ground / "toxicity"
    model = RewardModel(str(folder), make_mesh("fsdp=-1")).load()
    texts = [text for text in ANSWERS if text]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, score in zip(texts, model.of_texts(texts), strict=True):
        ids = tokenizer(text).input_ids
        if len(ids) > model.model.config.max_positions:
            ids = [*ids[: model.model.config.max_positions - 1], ids[-1]]
        with torch.no_grad():
            wanted = theirs(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert score == pytest.approx(wanted, abs=1e-5)


# The best and the worst


def of(*candidates):
    return [
        Candidate(text, reason, score, toxicity) for text, reason, score, toxicity in candidates
    ]


A, B, C = ("a", "end", 1.0, None), ("b", "end", 2.0, 0.5), ("c", "stop", 0.5, None)
CUT, EMPTY, TOXIC = ("d", "length", 9.0, 1.0), (" ", "end", 8.0, 1.0), ("t", "end", -9.0, -0.1)


@pytest.mark.parametrize(
    "candidates, best, worst, counted",
    [
        ([A, B, C], "b", "c", {}),
        ([CUT, A, EMPTY, B], "b", "a", {"cut": 1, "empty": 1}),
        ([TOXIC, A, B], "b", "t", {"toxic": 1}),
        ([("t", "end", 9.0, -0.1), A, C], "a", "c", {"toxic": 1}),
        ([A, ("z", "end", 1.0, None)], "a", None, {"prompts without a worse answer": 1}),
        ([B, ("b ", "end", 1.0, 0.5)], "b", None, {"prompts without a worse answer": 1}),
        ([CUT, TOXIC], None, None, {"cut": 1, "toxic": 1, "prompts without a usable answer": 1}),
    ],
)
def test_the_best_is_usable_and_the_worst_has_an_end(candidates, best, worst, counted):
    counts = Counter()
    selected = select(of(*candidates), counts)
    assert [c and c.text for c in selected] == [best, worst]
    assert dict(counts) == counted


# The command


@pytest.fixture(scope="module")
def made(ground, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "best"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        best_of.main([str(word) for word in arguments(ground, folder)])
    return folder


@pytest.mark.slow
def test_every_answer_is_scored_and_counted(made, ground):
    scored, sft, dpo = (lines(made / name) for name in (sets.SCORED, sets.SFT, sets.DPO))
    counts = json.loads((made / COUNTS).read_text())
    assert [row["sample"] for row in scored] == [0, 1, 2, 3] * 3
    assert [row.get("id") for row in scored] == [7] * 4 + [None] * 8
    assert counts["prompts"] == 3 and counts["scored.jsonl"] == 12
    assert counts["sft.jsonl"] == len(sft) and counts["dpo.jsonl"] == len(dpo)
    assert len(sft) + counts.get("prompts without a usable answer", 0) == 3
    assert len(dpo) + counts.get("prompts without a worse answer", 0) == len(sft)
    judge = RewardModel(str(ground / "bert"), make_mesh("fsdp=-1")).load()
    guard = RewardModel(str(ground / "toxicity"), make_mesh("fsdp=-1")).load()
    for row in scored:
        asked = row["prompt"] if "prompt" in row else row["messages"][0]["content"]
        conversation = [{"role": "user", "content": asked}]
        conversation += [{"role": "assistant", "content": row["generated"]}]
        assert row["score"] == pytest.approx(judge.of_answers([conversation])[0], abs=1e-5)
        alone = guard.of_texts([row["generated"]])[0]
        assert row["toxicity_score"] == pytest.approx(alone, abs=1e-5)
    faults = Counter(
        "cut" if row["finish_reason"] == "length" else "empty"
        for row in scored
        if row["finish_reason"] == "length" or not row["generated"].strip()
    )
    assert {name: counts.get(name, 0) for name in faults} == faults
    mean = np.mean([row["score"] for row in scored])
    assert counts["mean score of all"] == pytest.approx(mean)
    assert counts["mean score of the best"] == pytest.approx(np.mean([r["score"] for r in sft]))
    assert sft and dpo, "the seed gives answers to choose from"
    for row in sft:
        assert row["toxicity_score"] >= 0
    for row in dpo:
        assert row["chosen_score"] > row["rejected_score"]


def test_the_sets_are_read_by_sft_and_dpo(made):
    for name, task in ((sets.SFT, "conversation"), (sets.DPO, "pair")):
        data = load(made / name, task=task, max_dropped=0)
        assert len(data.train) == len(lines(made / name))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stage", ["answers", "scores"])
@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same_files(
    stage, made, ground, tmp_path, capsys, monkeypatch
):
    folder, calls = tmp_path / "best", []
    if stage == "answers":
        folder.mkdir()
        for name in (SETTINGS, f"{sets.ANSWERS}.settings.json", sets.ANSWERS):
            content = (made / name).read_bytes()
            content = content[: len(content) // 2] if name == sets.ANSWERS else content
            (folder / name).write_bytes(content)
    else:
        real = RewardModel.of_answers

        def killed(*given):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*given)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sets, "PROMPTS", 1)
            patch.setattr(RewardModel, "of_answers", killed)
            best_of.main([str(word) for word in arguments(ground, folder)])
        assert not (folder / sets.SCORED).exists()
    status, _, err = call(best_of.main, arguments(ground, folder), capsys)
    assert status == 0, err
    assert contents(folder) == contents(made)
    status, out, _ = call(best_of.main, arguments(ground, folder), capsys)
    assert status == 0 and "all answers are scored" in out


@pytest.mark.slow
def test_prompts_that_are_added_to_the_file_are_scored(made, ground, tmp_path, capsys):
    """The command said that all were, and left the sets of the shorter file."""
    folder = tmp_path / "best"
    shutil.copytree(made, folder)
    longer = tiny.write_rows(tmp_path / "longer.jsonl", [*ROWS, {"prompt": "no"}])
    status, out, err = call(best_of.main, arguments(ground, folder, f"--prompts={longer}"), capsys)
    assert status == 0 and "all answers are scored" not in out, err
    assert lines(folder / sets.SCORED)[:12] == lines(made / sets.SCORED)
    assert len(lines(folder / sets.SCORED)) == len(lines(folder / sets.ANSWERS)) == 16
    assert json.loads((folder / COUNTS).read_text())["prompts"] == 4


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--num_samples=1"], "--num_samples: found 1; the best needs at least 2"),
        (["--temperature=0"], "--temperature: found 0, which gives equal answers"),
        (["--reward=GROUND/gpt2"], "gpt2: is not a reward model, as it has no score/linear/kernel"),
        (["--reward=GROUND/none"], "none: no such folder"),
        (["--prompts=GROUND/long.jsonl"], "long.jsonl:2: a prompt has"),
        (["--prompts=GROUND/bad.jsonl"], "bad.jsonl:1: wanted a column prompt or messages"),
        (
            ["--prompts=GROUND/own.jsonl"],
            "own.jsonl:1: column score: rename it; the output adds one of this name",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(flags, problem, ground, tmp_path, capsys):
    tiny.write_rows(ground / "long.jsonl", [{"prompt": "yes"}, {"prompt": "no " * 100}])
    tiny.write_rows(ground / "bad.jsonl", [{"question": "yes"}])
    tiny.write_rows(ground / "own.jsonl", [{"prompt": "yes", "score": 3}])
    flags = [flag.replace("GROUND", str(ground)) for flag in flags]
    status, _, err = call(best_of.main, arguments(ground, tmp_path / "best", *flags), capsys)
    assert status == 2 and problem in err and len(err.splitlines()) == 1
    assert not (tmp_path / "best").exists()


def test_a_folder_whose_settings_did_not_fit_on_the_disk_is_gone_on_with(tmp_path):
    (tmp_path / f".{SETTINGS}.new").touch()
    check_folder(tmp_path, {})
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        check_folder(tmp_path, {})


def test_a_folder_with_settings_alone_takes_others(tmp_path):
    """A command that is refused after them, such as for its template, blocked the mended one."""
    begin(tmp_path, {"reward": 1})
    check_folder(tmp_path, {"reward": 2})
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(ConfigError, match=r"made with other settings \(reward\)"):
        check_folder(tmp_path, {"reward": 2})


def test_without_a_best_answer_there_is_no_mean_of_the_best(ground, tmp_path, capsys):
    """Its mean was 0, which looked like an answer's score."""
    words = arguments(ground, tmp_path / "best", "--max_new_tokens=1")
    words.remove("--stop=e")
    status, out, _ = call(best_of.main, words, capsys)
    counts = json.loads((tmp_path / "best" / COUNTS).read_text())
    assert status == 0 and counts["sft.jsonl"] == 0 and counts["cut"] == counts["scored.jsonl"]
    assert counts["mean score of the best"] is None and out.endswith(
        f"no best answer: {counts['cut']} were cut; raise --max_new_tokens, and name another "
        "--output\n"
    )


def test_scores_of_a_reward_model_that_was_replaced_are_not_kept(ground, tmp_path, capsys):
    reward = shutil.copytree(ground / "bert", tmp_path / "reward")
    words = [*arguments(ground, tmp_path / "best"), f"--reward={reward}"]
    assert call(best_of.main, words, capsys)[0] == 0
    tiny.save(reward, tiny.SCORERS["bert"], std=0.19)
    status, _, err = call(best_of.main, words, capsys)
    assert (
        status == 2
        and "best was made with other settings (reward model); name another folder" in err
    )


def test_a_folder_of_another_command_is_kept(made, ground, tmp_path, capsys):
    before = contents(made)
    for flags, problem in {
        (f"--reward={ground / 'llama'}",): "was made with other settings (reward model)",
        ("--seed=1",): "with seed 0, but 1 is asked for",
    }.items():
        status, _, err = call(best_of.main, arguments(ground, made, *flags), capsys)
        assert status == 2 and problem in err and contents(made) == before
    (tmp_path / "mine").write_text("mine")
    status, _, err = call(best_of.main, arguments(ground, tmp_path), capsys)
    assert status == 2 and "is not empty; name another folder" in err


@pytest.mark.slow
def test_scores_that_are_not_finite_keep_the_answers(ground, tmp_path, capsys, monkeypatch):
    load_weights = RewardModel.load

    def broken(self):
        load_weights(self)
        self.params = jax.tree.map(lambda leaf: leaf * np.nan, self.params)
        return self

    monkeypatch.setattr(RewardModel, "load", broken)
    status, _, err = call(best_of.main, arguments(ground, tmp_path / "best"), capsys)
    assert status == WeightsError.exit_status and "gave a score that is not finite" in err
    kept = {path.name for path in (tmp_path / "best").iterdir()}
    assert sets.ANSWERS in kept and sets.SCORED not in kept
