"""Rows of plain text: all of it is learned, as TRL learns it, and nothing is written around it."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from easyaira import inspect
from easyaira.data import columns
from easyaira.data.batches import Batches
from easyaira.data.template import Template
from easyaira.errors import DataError
from helpers import tiny
from helpers.examples import load
from helpers.runs import losses_of, train

END = "<|endoftext|>"
TEXTS = ["red fox", " a\n\nb ", "no", "why? yes.", "x " * 9, "Olá 猫"]
shared = pytest.mark.skipif(not tiny.SHARED.exists(), reason="shared data are not here")


def write(tmp_path, *texts, **others):
    return tiny.write_rows(tmp_path / "a.jsonl", [{"text": text} | others for text in texts])


@pytest.mark.parametrize("template", ["plain", "tulu"])
def test_every_token_but_the_first_is_learned(template, tmp_path):
    file = write(tmp_path, *TEXTS)
    for tokenizer, start in ((tiny.tokenizer(), []), (tiny.starting_tokenizer(), [0])):
        data = load(file, template=template, tokenizer=tokenizer).train
        for (first, answer, end), text in zip(data.bounds, TEXTS, strict=True):
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            assert data.tokens[first:end].tolist() == [*start, *tokens, 0]
            assert data.learned[first:end].tolist() == [False] + [True] * (len(tokens) + len(start))
            assert answer - first == len(start)


@shared
@pytest.mark.parametrize(
    "name, text, wanted",  # the ids of TRL 1.16.0's SFTTrainer with transformers 5.24
    [
        ("tokenizers/gpt2", "Once upon a time", [7454, 2402, 257, 640, 50256]),
        ("tokenizers/gpt2", "Olá, 猫", [30098, 6557, 11, 13328, 234, 104, 50256]),
        ("tokenizers/opt", "Once upon a time", [2, 11475, 2115, 10, 86, 2]),
        ("tokenizers/opt", " leading space\n\ntwo lines ",
         [2, 981, 980, 50118, 50118, 7109, 2301, 1437, 2]),
        ("tokenizers/opt", "### Human: Hi</s>", [2, 48134, 3861, 35, 12289, 2]),
        ("tokenizers/llama2", "Once upon a time", [1, 9038, 2501, 263, 931, 2]),
        ("tokenizers/llama2", " leading space\n\ntwo lines ",
         [1, 8236, 2913, 13, 13, 10184, 3454, 29871, 2]),
        ("tokenizers/llama2", "### Human: Hi</s>", [1, 835, 12968, 29901, 6324, 2]),
        ("models/stories260k", "Olá, 猫", [1, 319, 421, 198, 164, 432, 410, 234, 143, 174, 2]),
    ],
)  # fmt: skip
def test_token_ids_are_those_of_trl(name, text, wanted):
    template = Template(AutoTokenizer.from_pretrained(tiny.SHARED / name), "plain", "llama")
    spans = template.whole([template.bare(text)])[0]
    assert np.concatenate([tokens for tokens, _ in spans]).tolist() == wanted


def test_start_and_end_tokens_that_a_text_has_are_written_once_and_counted(tmp_path):
    data = load(
        write(tmp_path, f"{END}red fox{END}", "red fox"), tokenizer=tiny.starting_tokenizer()
    )
    first, second = (data.train.tokens[a:b].tolist() for a, _, b in data.train.bounds)
    assert first == second and first.count(0) == 2
    assert data.report["train"]["noted"] == {
        "a text has its own start or end token, which is not added a second time": 1
    }


def test_a_control_token_inside_a_text_stays_text_unless_it_is_allowed(tmp_path):
    file = write(tmp_path, f"red{END} fox", "red")
    data = load(file)
    assert data.train.tokens.tolist().count(0) == 2
    assert data.report["train"]["noted"] == {"a text spells a control token, which stays text": 1}
    data = load(file, allowed_tokens=[END])
    assert data.train.tokens.tolist().count(0) == 3 and data.train.learned.sum() == len(
        data.train.tokens
    ) - len(data.train)


def test_long_texts_are_cut_or_dropped_and_counted(tmp_path):
    file = write(tmp_path, "x " * 30, "red", "")
    with pytest.raises(DataError, match="1 empty text"):
        load(file)
    data = load(file, max_length=8, max_dropped=0.5)
    assert data.report["train"]["noted"] == {"cut to max_length (keep_start)": 1}
    start, _, end = data.train.bounds[0]
    assert end - start == 8 and 0 not in data.train.tokens[start:end]
    for truncation, reason in (("drop", "longer than"), ("keep_end", "answer as long as")):
        data = load(file, max_length=8, max_dropped=0.9, truncation=truncation)
        assert data.report["train"]["dropped"] == {"empty text": 1, f"{reason} max_length": 1}


def test_texts_are_held_out_one_by_one(tmp_path):
    file = write(tmp_path, *TEXTS, TEXTS[0])
    data = load(file, eval=2, tokenizer=tiny.starting_tokenizer())
    texts = {
        tiny.starting_tokenizer().decode(data.held_out.tokens[a:b])
        for a, _, b in data.held_out.bounds
    }
    assert len(texts) == 2 and len(data.train) + len(data.held_out) == 7
    assert data.report["held out"]["prompts also trained on"] == 0
    assert load(file).report["train"]["duplicates"] == 1


def test_short_and_repeated_texts_are_left_out_and_counted(tmp_path):
    file = write(tmp_path, "red fox", "red", "red fox", "a red fox")
    data = load(file, min_length=3, deduplicate=True, max_dropped=0.5)
    lengths = load(file).train.lengths()[:, 0]
    assert lengths.tolist()[1] < 3 <= lengths.tolist()[0]
    assert data.train.rows.tolist() == [0, 3]
    reasons = {"shorter than min_length": 1, "repeats an earlier row": 1}
    assert data.report["train"]["dropped"] == reasons


def test_packed_texts_are_the_texts(tmp_path):
    data = load(write(tmp_path, *TEXTS), tokenizer=tiny.starting_tokenizer()).train

    def rows(**kwargs):
        arrays = Batches(data, len(TEXTS), seed=0, **kwargs)[0].arrays
        texts = set()
        for tokens, segments, mask in zip(
            *(arrays[name][0] for name in ("tokens", "segment_ids", "loss_mask")), strict=True
        ):
            for segment in set(segments.tolist()) - {0}:
                inside = segments == segment
                texts.add((tuple(tokens[inside].tolist()), tuple(mask[inside].tolist())))
        return texts, len(arrays["tokens"][0])

    (packed, fewer), (plain, count) = rows(attention=0.0), rows(packing=False)
    assert packed == plain and len(packed) == len(TEXTS)
    assert fewer < count == len(TEXTS)


def test_a_transcript_that_is_learned_whole_is_counted(tmp_path):
    file = write(tmp_path, "### Human: Hi?### Assistant: Hello.", "Human: Hi?", "a Human: Hi?")
    noted = load(file).report["train"]["noted"]
    assert noted == {
        "a text is a transcript, learned whole; columns {transcript: text} learns its answers": 2
    }
    answers = load(write(tmp_path, "### Human: Hi?### Assistant: Hello."),
                   columns={"transcript": "text"}).train  # fmt: skip
    assert answers.learned_counts.tolist() == [len(tiny.tokenizer()("Hello.").input_ids) + 1]


@pytest.mark.parametrize("name", ["label", "prompt", "system", "input", "history", "weight"])
def test_a_text_beside_what_would_change_what_is_learned_is_an_error(name, tmp_path):
    file = write(tmp_path, "red", **{name: "1"})
    with pytest.raises(DataError, match=f"column {name} is filled and would not be used"):
        load(file)
    assert load(file, columns={"unused": name}).report["train"]["kept"] == 1


def test_other_columns_are_counted_or_decide_the_form(tmp_path):
    data = load(write(tmp_path, "red", title="b", url="c"))
    assert data.report["train"]["not used"] == {"column title": 1}
    row = {"instruction": "why?", "input": "", "output": "no"}
    data = load(write(tmp_path, "a rendered template", **row))
    assert data.report["train"]["not used"] == {"column text": 1}
    assert columns.fitting(["text", "label"], list(columns.FORMS))[0][0] == "label"
    with pytest.raises(DataError, match="column text: wanted text, found a number"):
        load(write(tmp_path, 3))


def test_a_text_has_no_question_to_learn(tmp_path):
    with pytest.raises(DataError, match="1 does not begin with a question and its answer"):
        load(write(tmp_path, "red"), reverse=True)


def test_inspect_shows_a_text_as_learned(tmp_path, capsys):
    ground = tiny.ground(tmp_path, {"model": tiny.CONFIGS["gpt2"]}, text=[{"text": "red fox"}])
    options = {"model.name_or_path": ground / "model", "data.train": ground / "text.jsonl"}
    options |= {"data.template": "plain", "output_dir": ground / "look"}
    inspect.main([f"--{key}={value}" for key, value in options.items()])
    out = capsys.readouterr().out
    first = tiny.tokenizer().decode(tiny.tokenizer()("red fox").input_ids[0])
    assert f"{first}[{'red fox'.removeprefix(first)}{END}]" in out


@pytest.mark.slow
def test_a_run_learns_texts_packed_as_it_does_apart(tmp_path):
    """It asks no question: a start token alone is none."""
    tiny.save(tmp_path / "model", tiny.CONFIGS["gpt2"])
    tiny.starting_tokenizer().save_pretrained(tmp_path / "model")
    file = write(tmp_path, *TEXTS)
    options = {"max_steps": 5, "train_batch_size": 6, "num_samples": 2}
    runs = {
        packing: losses_of(
            train("sft", tmp_path / "model", file, tmp_path / f"{packing}",
                  f"--data.packing={packing}", **options)[0]
        )
        for packing in (True, False)
    }  # fmt: skip
    np.testing.assert_allclose(runs[True], runs[False], rtol=1e-5)
    assert len(runs[True]) == 5 and runs[True][-1] < runs[True][0]
    assert not (tmp_path / "True/samples.json").exists()
