"""The look at the data: what it prints, what it writes, and that a run may follow in its folder."""

import json
import re

import pytest

from easyaira import inspect, train_sft
from easyaira.errors import ConfigError, DataError
from helpers import tiny


@pytest.fixture
def ground(tmp_path):
    odd = [{"prompt": "a </s> <|endoftext|>", "completion": "b"}, {"prompt": "c", "completion": ""}]
    return tiny.ground(
        tmp_path,
        {"model": tiny.CONFIGS["gpt2"]},
        sft=[*tiny.sft_rows(20), *odd],
        dpo=tiny.dpo_rows(20),
        label=[{"text": "red", "label": i % 2} for i in range(9)],
    )


def look(ground, name, *extra):
    options = {"model.name_or_path": ground / "model", "data.train": ground / f"{name}.jsonl"}
    options |= {"data.template": "plain", "output_dir": ground / "look"}
    inspect.main([f"--{key}={value}" for key, value in options.items()] + list(extra))
    return json.loads((ground / "look/data_report.json").read_text())


@pytest.mark.parametrize(
    "name, task, kept", [("sft", "conversation", 21), ("dpo", "pair", 20), ("label", "label", 9)]
)
def test_what_rows_are_is_seen_from_their_columns(name, task, kept, ground, capsys):
    report = look(ground, name)
    assert report["recipe"]["task"] == task
    assert report["train"]["kept"] == kept
    out = capsys.readouterr().out
    assert f"train: {kept} of {report['train']['read']} rows" in out
    assert re.search(rf"{name}\.jsonl:\d+: trained on", out)
    size, length = report["train"], report["train"]["length"]
    assert f"  {size['tokens']} tokens, {size['learned_tokens']} of them learned; " in out
    assert f" {length['shortest']} to {length['longest']} tokens, half of them up to" in out
    assert out.count("tokens in [brackets] are trained on") == 1
    assert "data_report.html" in out


def test_it_needs_no_weights_and_says_that_held_out_rows_are_not_trained_on(ground, capsys):
    (ground / "model/model.safetensors").unlink()
    look(ground, "sft", f"--data.eval={ground / 'sft.jsonl'}")
    out, page = capsys.readouterr().out, (ground / "look/data_report.html").read_text()
    assert all(re.search(r"sft\.jsonl:\d+: evaluated", text) for text in (out, page))
    assert page.count("<h2>held out</h2>") == 1


def test_the_report_of_a_run_is_kept(ground, capsys):
    """The card of the run quotes it."""
    before = look(ground, "sft")
    (ground / "look/config.yaml").write_text("max_steps: 2")
    assert look(ground, "sft", "--data.max_examples=5") == before
    out = capsys.readouterr().out
    assert "train: 5 of 5 rows" in out and f"kept    the report of the run in {ground}" in out


def test_learned_tokens_stand_in_brackets_where_there_is_no_colour(ground, capsys):
    look(ground, "sft")
    out = capsys.readouterr().out
    rows = [f"{row['prompt']}[{row['completion']}<|endoftext|>]" for row in tiny.sft_rows(20)]
    assert sum(row in out for row in rows) >= 2
    assert "1 a text spells a control token, which stays text" in out
    assert "dropped 1 empty answer (first: " in out


def test_it_takes_the_options_of_any_command_and_refuses_what_does_not_fit(ground, capsys):
    report = look(ground, "sft", "--sft.completion_only_loss=false", "--dpo.beta=0.5")
    assert report["recipe"]["completion_only_loss"] is False
    with pytest.raises(DataError, match="wanted .prompt, chosen, rejected"):
        look(ground, "sft", "--task=dpo")
    with pytest.raises(ConfigError, match="data.reverse: is for SFT"):
        look(ground, "dpo", "--data.reverse=true")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"[" * 500_000, "nested too deeply"),
        (b'{"prompt": "q"}{"prompt": "r"}', "Extra data"),
        (b"\x1f\x8b\x08\x00", "is gzip; name it .jsonl.gz"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
        (b"null", "a row must be an object with columns, found null"),
    ],
)
def test_a_first_row_that_cannot_be_read_says_why(content, reason, ground):
    (ground / "sft.jsonl").write_bytes(content + b"\n")
    with pytest.raises(DataError, match=reason):
        look(ground, "sft")


def test_columns_that_are_filled_and_not_used_are_told(ground, capsys):
    rows = [row | {"topic": "x", "id": 3} for row in tiny.sft_rows(9)]
    tiny.write_rows(ground / "sft.jsonl", rows)
    assert look(ground, "sft")["train"]["not used"] == {"column topic": 9}
    assert "9 column topic filled and not used" in capsys.readouterr().out
    assert "column topic: 9" in (ground / "look/data_report.html").read_text()


def test_columns_that_fit_two_tasks_ask_for_the_task(ground):
    both = [row | {"completion": "x"} for row in tiny.dpo_rows(9)]
    tiny.write_rows(ground / "both.jsonl", both)
    with pytest.raises(DataError, match="those of `easyaira sft` and of `easyaira dpo`; set"):
        look(ground, "both")
    assert look(ground, "both", "--task=sft")["recipe"]["task"] == "conversation"


def test_columns_that_fit_no_task_are_named_with_those_wanted(ground):
    tiny.write_rows(ground / "none.jsonl", [{"question": "a", "answer": "b"}])
    wanted = (
        r"found columns question, answer; wanted columns such as "
        r"\(prompt, completion\) or .* Name them"
    )
    with pytest.raises(DataError, match=wanted):
        look(ground, "none")


def test_prompts_of_an_rl_configuration_are_those_with_room_for_an_answer(ground, capsys):
    rows = [{"prompt": f"why {'so ' * i}?", "gold": i} for i in range(20)]
    tiny.write_rows(ground / "rl.jsonl", rows)
    flags = ["--rl.reward=none.py:f", "--rl.max_completion_length=40", "--data.max_dropped=0.9"]
    report = look(ground, "rl", *flags)
    lengths = [len(tiny.tokenizer()(row["prompt"]).input_ids) for row in rows]
    assert report["recipe"]["task"] == "prompt" and report["recipe"]["max_length"] == 64 - 40
    assert report["train"]["kept"] == sum(length <= 24 for length in lengths) < 20
    assert "column gold filled and read by reward functions only" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--task: rows of an rl configuration are prompts"):
        look(ground, "rl", *flags, "--task=sft")


@pytest.mark.slow
def test_a_run_may_follow_in_the_same_folder(ground, capsys):
    look(ground, "sft")
    before = json.loads((ground / "look/data_report.json").read_text())
    options = {"model.name_or_path": ground / "model", "data.train": ground / "sft.jsonl"}
    options |= {"data.template": "plain", "output_dir": ground / "look", "max_steps": 1}
    options |= {"export": "false", "num_samples": 0}
    train_sft.main([f"--{key}={value}" for key, value in options.items()])
    assert json.loads((ground / "look/data_report.json").read_text()) == before


def test_rows_that_are_left_out_as_asked_are_told_with_the_others(ground, capsys):
    file = ground / "sft.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows, rows[0], rows[1], '{"prompt": "", "completion": "b"}\n']))
    asked = ["--data.deduplicate=true", "--data.min_length=3", "--data.max_dropped=0.1"]
    report = look(ground, "sft", *asked)["train"]
    dropped = {"empty answer": 1, "repeats an earlier row": 2, "shorter than min_length": 1}
    assert report["dropped"] == dropped and report["kept"] == report["read"] - 4 == 21
    out = capsys.readouterr().out
    assert f"2 repeats an earlier row (first: {file}:23), 1 shorter than min_length" in out
    page = (ground / "look/data_report.html").read_text()
    assert "repeats an earlier row" in page.partition("Dropped rows")[2].partition("Lengths")[0]
    assert f"{file}:25: shorter than min_le" in page
    options = {"model.name_or_path": ground / "model", "data.train": file}
    options |= {"data.template": "plain", "output_dir": ground / "run"}
    train_sft.main([f"--{k}={v}" for k, v in options.items()] + [*asked, "--dry_run"])
    log = "21 examples of 25 rows; dropped 1 empty answer, 2 repeats an earlier row, 1 shorter"
    assert log in capsys.readouterr().out
