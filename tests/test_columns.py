"""What rows mean: forms that people have, what is learned of them, and nothing filled left out."""

import json

import numpy as np
import pytest

from easyaira.data import columns, tokenise
from easyaira.errors import DataError
from helpers import tiny
from helpers.examples import load

END = "<|endoftext|>"
TAGGED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def turn(role, content, **keys):
    return {"role": role, "content": content} | keys


def part(text):
    return {"type": "text", "text": text}


SYSTEM = turn("system", "Be kind.")
ASKED, ANSWERED = turn("user", "Hi?"), turn("assistant", "Hello.")
AGAIN, LAST = turn("user", "Bye?"), turn("assistant", "See you.")


def read(tmp_path, row, **config):
    """The text of one row, with what is learned in [ ]; both sides of a pair, split by |."""
    data = load(
        tiny.write_rows(tmp_path / "a.jsonl", [row]),
        max_length=400,
        **{"template": TAGGED} | config,
    )
    decode = tiny.tokenizer().decode
    texts = []
    start, *bounds = data.train.bounds[0]
    prompt = slice(start, bounds[0])
    for a, b in zip(bounds, bounds[1:], strict=False):
        text, before = "", False
        index = [*range(prompt.start, prompt.stop), *range(a, b)]
        edges = [i for i in range(1, len(index))
                 if data.train.learned[index[i]] != data.train.learned[index[i - 1]]]  # fmt: skip
        for piece in np.split(index, edges):
            before = bool(data.train.learned[piece[0]])
            part = decode(data.train.tokens[piece])
            text += f"[{part}]" if before else part
        texts.append(text.replace(END, "."))
    return "|".join(texts)


def refused(tmp_path, row, **config):
    with pytest.raises(DataError) as error:
        read(tmp_path, row, **config)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:1: ") and "\n" not in message
    return message


# The prompt of a pair


PAIR = {"chosen": [ANSWERED, AGAIN, LAST], "rejected": [ANSWERED, AGAIN, turn("assistant", "Go.")]}
WHOLE = {name: [ASKED, *turns] for name, turns in PAIR.items()}
JOINED = "<user>Hi?.<assistant>Hello..<user>Bye?.<assistant>"
BOTH = f"{JOINED}[See you..]|{JOINED}[Go..]"
KIND = "<system>Be kind.."


@pytest.mark.parametrize(
    "row, meant",
    [
        ({"prompt": [SYSTEM, ASKED], **PAIR}, "system"),
        ({"prompt": [SYSTEM, ASKED], **WHOLE}, "system"),
        ({"prompt": "Hi?", "system": "Be kind.", **PAIR}, "system"),
        ({"prompt": "Hi?", "system_prompt": "Be kind.", **WHOLE}, "system"),
        ({"system": "Be kind.", **WHOLE}, "system"),
        ({"prompt": "Bye?", "history": [["Hi?", "Hello."]], "system": "Be kind."}
         | {"chosen": "See you.", "rejected": "Go."}, "system"),
        ({"prompt": "Hi?", **PAIR}, ""),
        ({"prompt": " Hi? ", **WHOLE}, ""),
        ({"prompt": "", **WHOLE}, ""),
        ({"prompt": None, **WHOLE}, ""),
        ({"prompt": "Bye?", **WHOLE}, ""),  # the last question
        ({"prompt": [ASKED, ANSWERED, AGAIN], "chosen": "See you.", "rejected": "Go."}, ""),
    ],
)  # fmt: skip
def test_a_prompt_stands_before_both_answers_once(row, meant, tmp_path):
    expected = "|".join((KIND if meant else "") + side for side in BOTH.split("|"))
    assert read(tmp_path, row, task="pair") == expected


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "Why?", **WHOLE}, "begins with another question than the prompt"),
        ({"prompt": [turn("user", "Why?")], **WHOLE}, "begins with another question"),
        ({"prompt": [SYSTEM, ASKED], "system": "Be rude.", **PAIR}, "another system prompt"),
        ({"prompt": [ASKED, turn("assistant", "Hel")], "chosen": "lo.", "rejected": "p!"},
         "the prompt ends in an answer that the next column continues"),
        ({"prompt": "Hi?", "chosen": ANSWERED, "rejected": LAST}, "messages, found an object"),
        ({"prompt": "Hi?", "chosen": [ANSWERED | {"weight": 0}], "rejected": [LAST]},
         "marked not to be learned"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_joined_is_an_error(row, reason, tmp_path):
    assert reason in refused(tmp_path, row, task="pair")


def test_margins_and_weights_of_pairs_are_numbers_from_0(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair, pair | {"margin": 0.5, "weight": None}, pair | {"margin": "2", "weight": 0}]
    train = load(tiny.write_rows(tmp_path / "b.jsonl", rows), task="pair").train
    np.testing.assert_array_equal(train.margins, [np.nan, 0.5, 2])
    np.testing.assert_array_equal(train.weights, [np.nan, np.nan, 0])
    for number in (-1, "much", [1], 1e39, "nan"):
        message = refused(tmp_path, pair | {"margin": number}, task="pair")
        assert f"column margin: wanted a number from 0, found {number!r}" in message
    without = load(tiny.write_rows(tmp_path / "c.jsonl", rows[:1]), task="pair").train
    assert without.fingerprint() != train.take(np.array([1])).fingerprint()


def test_pairs_of_transcripts_split_at_the_last_answer(tmp_path):
    start = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Bye?\n\nAssistant: "
    row = {"chosen": start + "See you.", "rejected": start + "Go."}
    assert read(tmp_path, row, task="pair") == BOTH
    other = {"chosen": row["chosen"], "rejected": "\n\nHuman: Why?\n\nAssistant: Go."}
    assert "answer different prompts" in refused(tmp_path, other, task="pair")
    windows = {name: text.replace("\n", "\r\n") for name, text in row.items()}
    assert read(tmp_path, windows, task="pair") == BOTH
    ended = {"chosen": start + "Go.\n\nHuman: Why?", "rejected": start + "Go.\n\nHuman: What?"}
    assert "must end in an assistant's turn" in refused(tmp_path, ended, task="pair")


# Which answers are learned


CHAT = "<user>Hi?.<assistant>Hello..<user>Bye?.<assistant>[See you..]"


@pytest.mark.parametrize("off", [0, False, 0.0, "false", "0"], ids=repr)
@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss", "loss_mask"])
def test_an_answer_marked_so_is_shown_and_not_learned(key, off, tmp_path):
    row = {"messages": [ASKED, ANSWERED | {key: off}, AGAIN, LAST | {key: not off}]}
    if isinstance(off, str):
        row["messages"][-1][key] = "1"
    assert read(tmp_path, row) == CHAT


def test_answers_before_and_after_one_that_is_not_learned_are(tmp_path):
    row = {"messages": [ASKED, ANSWERED, AGAIN, LAST | {"weight": 0}, ASKED, ANSWERED]}
    start = "<user>Hi?.<assistant>[Hello..]<user>Bye?.<assistant>"
    assert read(tmp_path, row) == start + "See you..<user>Hi?.<assistant>[Hello..]"
    row = {"messages": [ASKED, ANSWERED, AGAIN, LAST | {"weight": 0}]}
    assert read(tmp_path, row) == start + "See you.."
    adjacent = {"messages": [ASKED, ANSWERED | {"train": False}, LAST]}
    assert read(tmp_path, adjacent, template="plain") == "Hi?Hello..[See you..]"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, "key weight: wanted 0 or 1, found 0.5"),
        ({"messages": [ASKED, ANSWERED | {"train": "maybe"}]}, "key train: wanted 0 or 1"),
        ({"messages": [ASKED | {"train": True}, ANSWERED]}, "only answers can be learned"),
        ({"messages": [ASKED, ANSWERED | {"weight": 0, "train": True}]}, "marked both learned"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_an_error(row, reason, tmp_path):
    assert reason in refused(tmp_path, row)


def test_marks_need_a_loss_on_answers_alone(tmp_path):
    row = {"messages": [ASKED, ANSWERED | {"weight": 0}, AGAIN, LAST]}
    for sft in ({"completion_only_loss": False}, {"assistant_only_loss": False}):
        assert "needs sft.completion_only_loss" in refused(tmp_path, row, sft=sft)
    assert "neither data.reverse" in refused(tmp_path, row, reverse=True)


def test_of_two_answers_in_a_row_the_last_one_alone_is_learned_if_asked_for(tmp_path):
    """In the template plain, nothing stands between them."""
    before = [ASKED, ANSWERED]
    shown = {TAGGED: "<user>Hi?.<assistant>Hello..<assistant>", "plain": "Hi?Hello.."}
    for template, text in shown.items():
        config = {"template": template, "sft": {"last_turn_only": True}}
        assert read(tmp_path, {"messages": [*before, LAST]}, **config) == f"{text}[See you..]"
        sides = {"chosen": [*before, LAST], "rejected": [*before, turn("assistant", "Go.")]}
        both = f"{text}[See you..]|{text}[Go..]"
        assert read(tmp_path, sides, task="pair", template=template) == both


def test_answers_of_a_prompt_are_context(tmp_path):
    row = {"prompt": [ASKED, ANSWERED, AGAIN], "completion": [LAST]}
    assert read(tmp_path, row) == CHAT
    assert read(tmp_path, row | {"completion": "See you."}) == CHAT
    assert read(tmp_path, {"prompt": [ASKED, ANSWERED, AGAIN], "messages": [LAST]}) == CHAT
    longer = row | {"completion": [LAST, ASKED, ANSWERED]}
    assert read(tmp_path, longer) == CHAT + "<user>Hi?.<assistant>[Hello..]"
    everything = read(tmp_path, row, sft={"completion_only_loss": False})
    assert everything == "<[user>Hi?.<assistant>Hello..]<user>Bye?.<assistant>[See you..]"
    begun = {"prompt": [ASKED, turn("assistant", "One, ")], "completion": [LAST]}
    assert "ends in an answer that the next column continues" in refused(tmp_path, begun)


# Forms


@pytest.mark.parametrize(
    "row, text",
    [
        ({"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value":
          "Hi?"}, {"from": "gpt", "value": "Hello."}]}, KIND + "<user>Hi?.<assistant>[Hello..]"),
        ({"conversations": [{"from": "user", "value": "Hi?", "weight": None},
          {"from": "assistant", "value": "Hello.", "weight": 1}], "system": "Be kind."},
         KIND + "<user>Hi?.<assistant>[Hello..]"),
        ({"messages": [turn("user", [part("H"), part("i?")]), turn("assistant", [part("Hello.")])]},
         "<user>Hi?.<assistant>[Hello..]"),
        ({"instruction": "Translate.", "input": "gato", "output": "cat"},
         "<user>Translate.\ngato.<assistant>[cat.]"),
        ({"instruction": "Name one.", "input": "", "output": "cat"},
         "<user>Name one..<assistant>[cat.]"),
        ({"instruction": "Sum up.", "context": "It rose.", "response": "Up."},
         "<user>Sum up..\nIt rose..<assistant>[Up..]".replace("up..\n", "up.\n")),
        ({"system": "Be kind.", "prompt": "Hi?", "completion": "Hello."},
         KIND + "<user>Hi?.<assistant>[Hello..]"),
        ({"prompt": "Bye?", "completion": "See you.", "history": [["Hi?", "Hello."]]}, CHAT),
        ({"prompt": "Bye?", "completion": "See you.", "history": [ASKED, ANSWERED]}, CHAT),
        ({"prompt": "Hi?", "messages": [ASKED, ANSWERED]}, "<user>Hi?.<assistant>[Hello..]"),
        ({"transcript": "\n\nHuman: Hi?\n\nAssistant: Hello."}, "<user>Hi?.<assistant>[Hello..]"),
        ({"conversations": [{"from": "human", "content": "Hi?"}, {"from": "gpt", "content":
          "Hello."}]}, "<user>Hi?.<assistant>[Hello..]"),
        ({"conversations": [{"role": "user", "value": "Hi?"}, {"role": "assistant", "value":
          "Hello."}]}, "<user>Hi?.<assistant>[Hello..]"),
    ],
)  # fmt: skip
def test_forms_of_conversations(row, text, tmp_path):
    assert read(tmp_path, row) == text


def test_a_system_prompt_goes_before_the_messages_to_answer_too():
    def asked(**row):
        return columns.question(columns.Record(row))

    wanted = [SYSTEM, ASKED]
    assert asked(prompt="Hi?", system="Be kind.") == wanted
    assert asked(messages=[ASKED], system_prompt="Be kind.") == wanted
    assert asked(messages=[SYSTEM, ASKED], system="Be kind.") == wanted
    with pytest.raises(columns.Unreadable, match="another system prompt"):
        asked(messages=[SYSTEM, ASKED], system="Be rude.")
    with pytest.raises(columns.Unreadable, match="history: stands beside messages"):
        asked(messages=[AGAIN], history=[["Hi?", "Hello."]])


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"conversations": [{"from": "bing", "value": "a"}]}, "wanted from human, gpt.*'bing'"),
        ({"messages": [turn("user", [{"type": "image", "image": "a.png"}]), ANSWERED]},
         "found a part of type 'image'"),
        ({"messages": [ASKED, turn("assistant", None, tool_calls=[{"id": "c1"}])]},
         "tool calls are not supported"),
        ({"prompt": "Why?", "messages": [ASKED, ANSWERED]}, "begins with another question"),
    ],
)  # fmt: skip
def test_a_form_that_is_not_read_says_what_to_do(row, reason, tmp_path):
    message = refused(tmp_path, row)
    assert all(part in message for part in reason.split(".*"))


def test_bytes_are_no_list_of_messages():
    row = columns.Record({"prompt": b"Hi?", "completion": "Hello."})
    with pytest.raises(columns.Unreadable, match="text or a list of messages, found bytes"):
        columns.conversation(row, columns.form_of(list(row), "conversation"))


# Nothing filled is left out without a word


@pytest.mark.parametrize(
    "task, row, name",
    [
        ("conversation", {"prompt": "a", "completion": "b", "input": "c"}, "column input"),
        ("conversation", {"prompt": "a", "completion": "b", "label": False}, "column label"),
        ("conversation", {"prompt": "a", "completion": "b", "weight": 0.5}, "column weight"),
        ("conversation", {"messages": [ASKED, ANSWERED], "tools": [{"a": 1}]}, "column tools"),
        ("conversation", {"messages": [ASKED, ANSWERED], "history": [["a", "b"]]}, "history"),
        ("conversation", {"messages": [ASKED, ANSWERED | {"reasoning_content": "x"}]},
         "column messages: key reasoning_content"),
        ("pair", {"prompt": "a", "chosen": "b", "rejected": "c", "tools": ["x"]}, "column tools"),
        ("label", {"harmless": "a", "harmful": "b", "margin": 0}, "column margin"),
        ("label", {"text": "b", "label": 1, "prompt": "a"}, "column prompt"),
        ("conversation", {"prompt": "a", "completion": "b", "image_url": "c"}, "column image_url"),
        ("conversation", {"messages": [ASKED, ANSWERED | {"tool_call_id": "c1"}]},
         "column messages: key tool_call_id"),
    ],
)  # fmt: skip
def test_what_would_change_what_is_learned_is_an_error(task, row, name, tmp_path):
    message = refused(tmp_path, row, task=task)
    assert f"{name} is filled and would not be used" in message


def test_a_column_of_prompts_is_renamed_for_reward_functions(tmp_path):
    message = refused(tmp_path, {"prompt": "a", "label": "b"}, task="prompt")
    assert "or rename it for reward functions: data.columns {gold: label}" in message


def test_a_column_that_is_moved_away_is_wanted_so(tmp_path):
    row = {"prompt": "Hi?", "completion": "Hello.", "input": "c"}
    kept = read(tmp_path, row, columns={"unused": "input"})
    assert kept == "<user>Hi?.<assistant>[Hello..]"


def test_other_filled_columns_and_keys_are_counted_by_name(tmp_path, capsys):
    filled = {"messages": [ASKED | {"name": "Ana"}, ANSWERED], "topic": "x", "turns": 2}
    empty = {"messages": [ASKED | {"name": None}, ANSWERED], "topic": "", "tools": [], "turns": 1}
    known = {"messages": [ASKED, ANSWERED], "id": 7, "source": "x", "prompt_id": "a", "url": "b"}
    file = tiny.write_rows(tmp_path / "a.jsonl", [filled, empty, known])
    expected = {"column topic": 1, "column turns": 2, "column messages: key name": 1}
    for _ in ("built", "cached"):
        assert load(file).report["train"]["not used"] == expected
        lines = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
        assert lines == [
            "data    train: filled and not used: column topic (1 rows), column turns (2 rows), "
            "column messages: key name (1 rows)"
        ]
    assert json.loads(json.dumps(expected)) == expected


def test_many_unused_columns_are_one_short_line(tmp_path, capsys):
    row = {"messages": [ASKED, ANSWERED]} | {f"c{i}": 1 for i in range(300)} | {"x" * 9999: 1}
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]))
    assert len(data.report["train"]["not used"]) == 301
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not used" in line)
    assert line.endswith("column c19 (1 rows), and 281 more, in data_report.json")


@pytest.mark.parametrize("task", ["conversation", "pair"])
def test_answers_that_repeat_their_prompt_are_counted(task, tmp_path):
    question = "What is the capital of Brazil?"
    answers = {"completion": f"{question} Brasilia."}
    if task == "pair":
        answers = {"chosen": f" {question} Brasilia.", "rejected": f"{question}\nRio."}
    rows = [{"prompt": question} | answers]
    rows.append({"prompt": "Good day."} | {name: f"Good day. {name}" for name in answers})
    noted = load(tiny.write_rows(tmp_path / "a.jsonl", rows), task=task).report["train"]["noted"]
    assert noted == {"an answer begins with its prompt, which is then learned with it": 1}


def test_a_text_that_would_take_all_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "LONGEST_TEXT", 100)
    row = {"prompt": "Hi?", "completion": "x" * 101}
    assert "a text of 101 characters, more than 100; split it" in refused(tmp_path, row)
    read(tmp_path, row | {"completion": "x" * 100})


def test_columns_may_be_nested_as_deeply_as_json_is_read(tmp_path):
    nested = json.loads("[" * 900 + "1" + "]" * 900)
    row = {"prompt": "Hi?", "completion": "Hello.", "deep": nested, "empty": nested[:0]}
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]))
    assert data.report["train"]["not used"] == {"column deep": 1}


def test_a_column_that_another_replaces_is_counted(tmp_path):
    row = {"prompt": "Be kind.", "question": "Hi?", "completion": "Hello."}
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]), columns={"prompt": "question"})
    assert data.report["train"]["not used"] == {"column prompt (replaced by question)": 1}


def test_a_split_that_stands_in_a_column_is_told(tmp_path):
    row = {"prompt": "Hi?", "completion": "Hello.", "split": "test"}
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]))
    assert data.report["train"]["not used"] == {"column split": 1}


QUOTE = (
    '\n\nHuman: What is it?\n\nAssistant: A text: "\n\nHuman: Hi\n\nAssistant: Hello" and so on.'
)
FENCED = "### Human: Why?### Assistant: ```### Human: Hi### Assistant: Hello``` is the form."


@pytest.mark.parametrize(
    "row, task",
    [
        ({"chosen": QUOTE, "rejected": QUOTE + " No."}, "pair"),
        ({"transcript": QUOTE}, "conversation"),
        ({"transcript": FENCED}, "conversation"),
    ],
    ids=["pair", "quotation", "code"],
)
def test_a_transcript_that_may_be_split_in_a_quotation_is_counted(row, task, tmp_path):
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]), task=task)
    noted = data.report["train"]["noted"]
    assert noted == {"a quotation may hold a speaker's marker, and be split there": 1}


HUMAN = "\n\nHuman: Hi there, you?\n\nAssistant:"


@pytest.mark.parametrize(
    "row, task",
    [
        ({"prompt": HUMAN, "chosen": " Hello.", "rejected": " Go."}, "pair"),
        ({"prompt": "Hi?", "chosen": HUMAN + " Hello.", "rejected": HUMAN + " Go."}, "pair"),
        ({"prompt": HUMAN.replace("Human", "### Human"), "completion": "Hello."}, "conversation"),
        ({"prompt": HUMAN.replace("\n", " "), "completion": "Hello."}, "conversation"),
    ],
    ids=["prompt", "answers", "guanaco", "one line"],
)
def test_transcripts_in_a_prompts_or_an_answers_column_are_counted(row, task, tmp_path):
    """The prompts of Dahoas/full-hh-rlhf are such texts. The template plain may be meant for
    them."""
    path = tiny.write_rows(tmp_path / "a.jsonl", [row])
    data = load(path, task=task, template=TAGGED, max_length=400)
    counted = {"a text names its speakers (Human:), and is not split into their turns": 1}
    assert data.report["train"]["noted"] == counted
    assert load(path, task=task, max_length=400).report["train"]["noted"] == {}


@pytest.mark.parametrize("written", [json.dumps, repr, lambda turns: "[" + repr(turns[0]) + "\n]"])
def test_a_list_of_messages_that_became_text_is_told(written, tmp_path):
    """As pandas writes lists into CSV files."""
    reason = "a list of messages written as text"
    sides = {"chosen": written([{"content": "Hi.", "role": "assistant"}]), "rejected": "No."}
    assert reason in refused(tmp_path, {"prompt": "Hi?"} | sides, task="pair")
    asked = written([{"from": "human", "value": "Hi?"}])
    assert reason in refused(tmp_path, {"prompt": asked, "completion": "Hello."})
    for text in ('[{"role": "admin", "name": "Bo"}]', '[{"role": "user"}] is a list.', "[{}]"):
        assert read(tmp_path, {"prompt": "Hi?", "completion": text}).endswith(f"[{text}.]")


def test_a_transcript_with_quotations_of_its_own_is_not_accused(tmp_path):
    row = {"transcript": '### Human: "Hi" means?### Assistant: "Hello", 5\' 10" away.'}
    assert load(tiny.write_rows(tmp_path / "a.jsonl", [row])).report["train"]["noted"] == {}


def test_roles_of_other_names_are_told_by_name(tmp_path):
    rows = [{"messages": [turn("human", "Hi?"), turn("gpt", "Hello.")]}]
    with pytest.raises(DataError, match="no turn has the role assistant; rename gpt, human"):
        load(tiny.write_rows(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    "header, task, fix",
    [
        ("prompt chosen rejected", "conversation", "`easyaira dpo` trains on (prompt, chosen, rej"),
        ("prompt completion label", "pair", "kto` trains on (prompt, completion, label)"),
        ("text label", "pair", "`easyaira reward` trains on (text, label)"),
        ("prompt completion", "pair", "`easyaira sft` trains on (prompt, completion)"),
        ("prompt;completion", "conversation", "separated by ';'; write the file with commas"),
        ("question answer", "conversation", "Name them in data.columns"),
        ("question text", "pair", "Name them in data.columns"),
    ],
)
def test_columns_of_another_task_name_its_command(header, task, fix):
    with pytest.raises(DataError) as error:
        columns.form_of(header.split(" "), task)
    assert fix in str(error.value) and "\n" not in str(error.value)
