"""Rows to examples: what is learned, what is cut, every row accounted for, one cache."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from easyaira.config.algorithms import SFTConfig
from easyaira.config.data import DataConfig, Source
from easyaira.data import cache, report, tokenise
from easyaira.data.examples import PER_EXAMPLE
from easyaira.data.recipe import recipe_of
from easyaira.data.template import Template
from easyaira.errors import ConfigError, DataError, TokenizerError
from helpers import tiny
from helpers.examples import TASK, load


def test_every_row_is_kept_or_counted_with_a_reason(tmp_path):
    rows = tiny.sft_rows(20) + [{"prompt": "a?", "completion": " "}]
    report = load(tiny.write_rows(tmp_path / "a.jsonl", rows)).report["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (21, 20, {"empty answer": 1})
    assert report["first_dropped"]["empty answer"].endswith("a.jsonl:21")
    pairs = tiny.dpo_rows(40) + [{"prompt": "a?", "chosen": "x", "rejected": " x"}]
    pairs += [{"prompt": "a?", "chosen": "x", "rejected": ""}]
    report = load(tiny.write_rows(tmp_path / "b.jsonl", pairs), task="pair").report["train"]
    assert report["dropped"] == {"identical answers": 1, "empty answer": 1}
    assert report["read"] == report["kept"] + 2


def test_too_many_lost_rows_are_an_error(tmp_path):
    rows = tiny.sft_rows(9) + [{"prompt": "a?", "completion": ""}]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"only 9 of 10 rows; dropped 1 empty answer \(first: .*:10\)"
    ):
        load(file)
    assert load(file, max_dropped=0.1).report["train"]["kept"] == 9
    with pytest.raises(DataError, match="only 0 of 1 rows"):
        load(tiny.write_rows(tmp_path / "b.jsonl", rows[-1:]), max_dropped=0.99)


def test_learned_tokens_are_those_of_the_completion_and_its_end(tmp_path):
    rows = tiny.sft_rows(5)
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows)).train
    tokenizer = tiny.tokenizer()
    for (start, _, end), row in zip(data.bounds, rows, strict=True):
        tokens, learned = data.tokens[start:end], data.learned[start:end]
        assert tokenizer.decode(tokens[learned]) == row["completion"] + "<|endoftext|>"
        assert tokenizer.decode(tokens[~learned]) == row["prompt"]
    everything = load(tmp_path / "a.jsonl", sft={"completion_only_loss": False}).train
    assert (~everything.learned).sum() == 5  # all but the first token of each


def test_many_cuts_are_a_warning_with_the_lengths_that_keep_the_rows(tmp_path, capsys):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(30))
    lengths = np.sort(load(file).train.lengths().max(1))
    load(file, max_length=int(lengths[14]), max_dropped=0.9)
    cut = int((lengths > lengths[14]).sum())
    most = next(n for n in np.unique(lengths) if (lengths <= n).mean() >= 0.95)
    assert (
        f"warning: train: {cut} of 30 rows ({cut / 30:.0%}) are cut at data.max_length "
        f"{lengths[14]} and teach no end token; {most} would keep 95 % whole, {lengths[-1]} all"
    ) in capsys.readouterr().out
    load(file, max_length=int(lengths[14]), max_dropped=0.9, positions=int(lengths[-1]) - 1)
    limit = f"{lengths[-1]} all; the model has {lengths[-1] - 1} positions"
    assert limit in capsys.readouterr().out
    load(file, max_length=int(lengths[-2]), max_dropped=0.9)
    assert "warning: train" not in capsys.readouterr().out
    with pytest.raises(DataError, match="rows, or raise data.max_length, or raise data.max_drop"):
        load(file, max_length=int(lengths[2]), max_dropped=0.1, truncation="drop")


def test_a_number_is_no_hub_id(tmp_path):
    """The hub would be asked for half a minute."""
    with pytest.raises(DataError, match="0: no such file, and not a hub id"):
        load("0")


@pytest.mark.parametrize("pairs", [False, True])
def test_truncation(pairs, tmp_path):
    rows = tiny.dpo_rows(30) if pairs else tiny.sft_rows(30)
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    whole = load(file, task=TASK[pairs]).train
    longest = int(whole.lengths().max())
    limit = longest - 3
    over = int((whole.lengths().max(1) > limit).sum())
    assert over > 0
    end = tiny.tokenizer().eos_token_id

    def answers(data, i):
        bounds = data.bounds[i]
        return [data.tokens[a:b].tolist() for a, b in zip(bounds[1:-1], bounds[2:], strict=True)]

    start = load(file, task=TASK[pairs], max_length=limit, max_dropped=0.9)
    assert start.report["train"]["noted"] == {"cut to max_length (keep_start)": over}
    assert start.train.lengths().max() == limit
    kept_end = load(
        file, task=TASK[pairs], max_length=limit, truncation="keep_end", max_dropped=0.9
    )
    assert kept_end.report["train"]["noted"] == {"cut to max_length (keep_end)": over}
    assert kept_end.train.lengths().max() == limit
    for i in range(30):
        for before, cut, kept in zip(
            answers(whole, i), answers(start.train, i), answers(kept_end.train, i), strict=True
        ):
            assert cut == before[: len(cut)]
            assert (end in cut) == (cut == before)  # a cut answer has no end to learn
            assert kept == before
    dropped = load(file, task=TASK[pairs], max_length=limit, truncation="drop", max_dropped=0.9)
    assert dropped.report["train"]["dropped"] == {"longer than max_length": over}
    prompt = load(file, task=TASK[pairs], max_prompt_length=4).train
    assert (prompt.bounds[:, 1] - prompt.bounds[:, 0]).max() == 4


def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn_and_is_counted(tmp_path):
    rows = [{"prompt": "the capital of France " * 30, "completion": "x"}] + tiny.sft_rows(3)
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows), max_dropped=0.5)
    assert data.report["train"]["dropped"] == {"nothing left to learn within max_length": 1}


@pytest.mark.parametrize("part", [0.2, 2])
def test_held_out_prompts_are_never_trained_on(part, tmp_path):
    rows = [dict(row, prompt=f"question {i % 10}") for i, row in enumerate(tiny.dpo_rows(50))]
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows), task="pair", eval=part)
    assert not set(data.train.prompt_ids) & set(data.held_out.prompt_ids)
    assert len(set(data.held_out.prompt_ids)) == 2
    assert len(data.train) + len(data.held_out) == data.report["train"]["kept"]
    reloaded = load(tmp_path / "a.jsonl", task="pair", eval=part)
    np.testing.assert_array_equal(reloaded.held_out.rows, data.held_out.rows)


def test_no_row_is_held_out_of_zero_and_none_is_left_of_all(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(5))
    assert load(file, eval=0).held_out is None
    with pytest.raises(DataError, match="data.eval: 900 of .* leaves one part empty"):
        load(file, eval=900)


def test_an_id_without_an_embedding_is_an_error(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(3))
    with pytest.raises(TokenizerError, match="gives id .* and the embedding has 50 rows"):
        load(file, vocab_size=50)


def test_pairs_that_all_have_the_weight_0_are_refused(tmp_path):
    def load_pairs(*weights):
        rows = [row | {"weight": w} for row, w in zip(tiny.dpo_rows(2), weights, strict=True)]
        return load(tiny.write_rows(tmp_path / "rows.jsonl", rows), task="pair")

    with pytest.raises(DataError, match="data.train: the weight of every row is 0"):
        load_pairs(0, 0.0)
    assert len(load_pairs(0, 0.5).train) == 2


def test_weights_say_how_often_an_epoch_shows_a_source(tmp_path):
    a = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(10))
    b = tiny.write_rows(tmp_path / "b.jsonl", tiny.sft_rows(20, seed=1))
    whole = load([Source(str(a)), Source(str(b))])
    assert np.bincount(whole.train.sources).tolist() == [10, 20]
    data = load([Source(str(a), weight=2.5), Source(str(b), weight=0.25)])
    mixed, report = data.train, data.report["train"]
    assert report["duplicates"] == whole.report["train"]["duplicates"]  # copies are none
    assert sum(report["examples by source"].values()) == report["examples"] == len(mixed)
    assert [*report["examples by source"]] == [f"1 {a}", f"2 {b}"]
    assert np.bincount(mixed.sources).tolist() == [25, 5]
    counts = np.bincount(mixed.rows[mixed.sources == 0])
    assert sorted(set(counts)) == [2, 3] and len(counts) == 10
    reloaded = load([Source(str(a), weight=2.5), Source(str(b), weight=0.25)]).train
    np.testing.assert_array_equal(mixed.ids, reloaded.ids)
    with pytest.raises(ConfigError, match="weight 0.01 leaves no row of source 2"):
        load([Source(str(a)), Source(str(b), weight=0.01)])


def test_a_source_may_have_a_template_of_its_own(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(2))
    sources = [Source(str(file)), Source(str(file), template="{{ messages[0].content }}: "
                                         "{{ messages[1].content }}")]  # fmt: skip
    data = load(sources).train
    texts = [tiny.tokenizer().decode(data.tokens[a:b]) for a, _, b in data.bounds]
    assert [": " in text for text in texts] == [False, False, True, True]


def test_max_examples_are_the_first_rows_and_no_more_are_read(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(5))
    file.write_text(file.read_text() + "{broken")
    data = load(file, max_examples=5)
    assert data.report["train"]["read"] == 5 and data.train.rows.tolist() == [0, 1, 2, 3, 4]


CHAT = [
    {"role": role, "content": text}
    for role, text in (("user", "a?"), ("assistant", "yes"), ("user", "b?"), ("assistant", "no"))
]
END = "<|endoftext|>"


@pytest.mark.parametrize(
    "sft, prompt, learned",
    [
        ({}, "a?", f"yes{END}no{END}"),
        ({"last_turn_only": True}, f"a?yes{END}b?", f"no{END}"),
        ({"assistant_only_loss": False}, "a?", f"yes{END}b?no{END}"),
        ({"completion_only_loss": False}, "a?", f"?yes{END}no{END}"),
        (
            {"completion_only_loss": False, "assistant_only_loss": False},
            "a?",
            f"?yes{END}b?no{END}",
        ),
    ],
)
def test_what_is_learned_of_a_conversation(sft, prompt, learned, tmp_path):
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]), sft=sft).train
    decode = tiny.tokenizer().decode
    start, answer, end = data.bounds[0]
    assert decode(data.tokens[start:answer]) == prompt
    assert decode(data.tokens[start:end][data.learned[start:end]]) == learned
    assert data.learned_counts.tolist() == [data.learned.sum()]


def test_reverse_learns_the_question_from_the_answer(tmp_path):
    rows = [{"messages": CHAT}, {"prompt": "why?", "completion": "so"}]
    files = [tiny.write_rows(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    data = load([Source(str(file)) for file in files], reverse=True).train
    texts = [tiny.tokenizer().decode(data.tokens[a:b]) for a, _, b in data.bounds]
    assert texts == [f"yesa?{END}", f"sowhy?{END}"]
    assert [tiny.tokenizer().decode(data.tokens[b:c]) for _, b, c in data.bounds] == [
        f"a?{END}",
        f"why?{END}",
    ]
    with pytest.raises(ConfigError, match="data.reverse: is for SFT"):
        load(files[0], task="pair", reverse=True)


def test_compat_aira_learns_prompts_and_padding_as_the_originals_did(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(3))
    with pytest.raises(TokenizerError, match="data.compat needs a pad_token"):
        load(file, compat="aira")
    data = load(file, compat="aira", template="aira", max_length=40, vocab_size=400).train
    assert (data.lengths() == 40).all()
    assert (data.learned.reshape(3, 40).sum(1) == 39).all()  # all but the first of each
    real = load(file, template="aira", max_length=40, vocab_size=400).train
    assert (data.unseen == 40 - real.lengths()[:, 0]).all()


def test_duplicates_and_overlap_are_counted_and_overlap_is_told(tmp_path, capsys):
    rows = tiny.sft_rows(9)
    a = tiny.write_rows(tmp_path / "a.jsonl", [*rows, rows[0]])
    b = tiny.write_rows(tmp_path / "b.jsonl", [*rows[:2], *tiny.sft_rows(12)[9:]])
    report = load(a, eval=str(b)).report
    assert report["train"]["duplicates"] == 1 and report["train"]["prompts"] == 9
    assert report["held out"]["prompts also trained on"] == 2
    assert "warning: 2 of 5 held-out examples have a prompt" in capsys.readouterr().out


def test_rows_below_min_length_are_dropped_whatever_the_cut(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(30))
    lengths = load(file).train.lengths().max(1)
    least = int(np.sort(lengths)[10])
    short = int((lengths < least).sum())
    assert 0 < short < (lengths <= least).sum()  # some are exactly as long
    data = load(file, min_length=least, max_length=least - 2, max_dropped=0.9)
    assert data.report["train"]["dropped"] == {"shorter than min_length": short}
    assert data.train.rows.tolist() == np.flatnonzero(lengths >= least).tolist()
    with pytest.raises(DataError, match="Fix the rows, or lower data.min_length, or raise data.ma"):
        load(file, min_length=least)


def test_the_shortest_answer_decides_whether_a_row_is_too_short(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.dpo_rows(30))
    lengths = load(file, task="pair").train.lengths()
    least = int(np.sort(lengths.min(1))[10])
    assert (lengths.max(1) >= least).sum() > (lengths.min(1) >= least).sum()
    data = load(file, task="pair", min_length=least, max_dropped=0.9)
    assert data.train.rows.tolist() == np.flatnonzero(lengths.min(1) >= least).tolist()
    assert "shorter than min_length" in report.page(data)


FORMS = {
    "conversation": [{"prompt": f"{i}?", "completion": "yes"} for i in range(3)],
    "pair": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(3)],
    "rated": [{"prompt": f"{i}?", "completion": "yes", "label": True} for i in range(3)],
    "label": [{"text": f"yes {i}", "label": 1} for i in range(3)],
    "prompt": [{"prompt": f"{i}?"} for i in range(3)],
    "answers": [
        {"prompt": f"{i}?", "answers": ["yes", "no", "so"], "scores": [2, 1, 1]} for i in range(3)
    ],
}


def content(examples):
    """All that examples are but their rows."""
    fields = vars(examples.take(np.arange(len(examples))))
    tokens = [
        (examples.tokens[a:b].tolist(), examples.learned[a:b].tolist())
        for a, b in examples.bounds[:, [0, -1]]
    ]
    lengths = np.diff(examples.bounds).tolist()
    rest = {name: repr(fields[name].tolist()) for name in PER_EXAMPLE if name not in PLACES}
    return tokens, lengths, rest


PLACES = ("bounds", "rows", "sources")


@pytest.mark.parametrize("form", FORMS)
def test_without_its_repeats_a_file_is_the_file_without_them(form, tmp_path):
    a, b, c = FORMS[form]
    task = "pair" if form == "answers" else form
    file = tiny.write_rows(tmp_path / "a.jsonl", [a, b, a, c])
    data = load(file, task=task, deduplicate=True)
    once = load(tiny.write_rows(tmp_path / "b.jsonl", [a, b, c]), task=task)
    assert content(data.train) == content(once.train)
    assert data.train.rows.tolist() == [0, 1, 3]
    report = data.report["train"]
    assert (report["read"], report["kept"]) == (4, 3)
    assert report["dropped"] == {"repeats an earlier row": 1} and report["duplicates"] == 0
    assert report["first_dropped"] == {"repeats an earlier row": f"{file}:3"}
    assert load(file, task=task).report["train"]["duplicates"] == 1
    shown = [(place, outcome) for place, outcome, _ in data.accounts["train"].shown]
    assert (f"{file}:3", "repeats an earlier row") in shown and len(shown) == 4


@pytest.mark.parametrize(
    "task, one, change",
    [
        ("pair", FORMS["pair"][0] | {"weight": 1}, {"weight": 2}),
        ("pair", FORMS["pair"][0], {"weight": 1}),
        ("pair", FORMS["pair"][0] | {"margin": 1}, {"margin": 0}),
        ("pair", FORMS["pair"][0], {"chosen": "no", "rejected": "yes"}),
        ("pair", FORMS["answers"][0], {"scores": [2, 1, 0]}),
        ("rated", FORMS["rated"][0], {"label": False}),
        ("label", FORMS["label"][0], {"label": 0}),
        (
            "conversation",
            {"messages": CHAT},
            {"messages": [CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]},
        ),
    ],
)
def test_a_row_that_teaches_something_else_is_no_repeat(task, one, change, tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", [one, one | change, one])
    data = load(file, task=task, deduplicate=True)
    assert data.train.rows.tolist() == [0, 1]
    assert load(file, task=task).report["train"]["duplicates"] == 1


def test_a_row_of_an_earlier_source_is_a_repeat_and_the_copies_of_a_weight_are_none(tmp_path):
    rows = tiny.dpo_rows(6)
    a = str(tiny.write_rows(tmp_path / "a.jsonl", rows[:4]))
    b = str(tiny.write_rows(tmp_path / "b.jsonl", [rows[5], rows[0], rows[4]]))

    def load_pairs(*sources):
        train = [Source(path, weight=weight) for path, weight in sources]
        data = load(train, task="pair", deduplicate=True)
        places = zip(data.train.sources.tolist(), data.train.rows.tolist(), strict=True)
        return sorted(places), data.report["train"]

    of_a = [(0, row) for row in range(4) for _ in range(2)]
    for _ in range(2):  # of rows, and of the cache
        places, report = load_pairs((a, 2), (b, 1))
        assert places == [*of_a, (1, 0), (1, 2)]
        assert report["dropped"] == {"repeats an earlier row": 1} and report["duplicates"] == 0
        places, _ = load_pairs((b, 1), (a, 1))
        assert places == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    assert load_pairs((b, 1))[0] == [(0, 0), (0, 1), (0, 2)]
    places, report = load_pairs((a, 1), (a, 1))  # nothing is left of the second
    assert places == [(0, row) for row in range(4)] and report["kept"] == 4
    assert len(load([Source(a), Source(a)], task="pair").train) == 8


def test_held_out_rows_that_are_trained_on_are_left_out(tmp_path):
    rows = tiny.sft_rows(9)
    a = tiny.write_rows(tmp_path / "a.jsonl", [*rows[:6], rows[0]])
    b = str(tiny.write_rows(tmp_path / "b.jsonl", [rows[7], rows[2], rows[7], rows[8], rows[0]]))
    data = load(a, eval=b, deduplicate=True)
    assert data.held_out.rows.tolist() == [0, 3]
    reasons = {"also in data.train": 2, "repeats an earlier row": 1}
    assert data.report["held out"]["dropped"] == reasons
    assert data.report["held out"]["prompts also trained on"] == 0
    assert data.train.rows.tolist() == list(range(6))  # training loses none
    assert len(load(b, deduplicate=True).train) == 4  # no entry of the cache says otherwise
    shared = load(a, eval=0.3, deduplicate=True)
    assert len(shared.train) + len(shared.held_out) == 6
    with pytest.raises(DataError, match=r"7 also in data.train .* or name other rows in data.eval"):
        load(a, eval=str(a), deduplicate=True)


def test_what_is_a_repeat_is_the_same_on_every_host(tmp_path, monkeypatch):
    """A streamed source has another key of the cache on each."""
    rows = tiny.sft_rows(8)
    files = [
        tiny.write_rows(tmp_path / f"{i}.jsonl", part)
        for i, part in enumerate([rows[:5], rows[3:] + rows[:2]])
    ]
    monkeypatch.setattr(cache.sources, "content_key", lambda source: None)
    hosts = [
        load(
            [Source(str(file)) for file in files], deduplicate=True, cache_dir=str(tmp_path / host)
        )
        for host in "xy"
    ]
    assert len(hosts[0].train) == 8 and hosts[0].report == hosts[1].report


def test_typed_control_tokens_are_counted_and_allowed_by_name(tmp_path):
    rows = [{"prompt": f"a {END}", "completion": "b"}, *tiny.sft_rows(3)]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    noted = "a text spells a control token, which stays text"
    data = load(file)
    assert data.report["train"]["noted"] == {noted: 1}
    assert 0 not in data.train.tokens[: data.train.bounds[0, 1]]
    data = load(file, allowed_tokens=[END])
    assert data.report["train"]["noted"] == {}
    assert 0 in data.train.tokens[: data.train.bounds[0, 1]]


def test_the_cache_is_used_again_and_never_for_anything_else(tmp_path, monkeypatch):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(20))
    root = cache.cache_root() / "tokens"
    first = load(file)
    assert len(list(root.iterdir())) == 1
    assert isinstance(first.train.tokens.base, np.memmap)
    with monkeypatch.context() as nothing_can_be_built:
        nothing_can_be_built.setattr(tokenise, "build", None)
        reloaded = load(file, seed=5)
    np.testing.assert_array_equal(first.train.tokens, reloaded.train.tokens)
    assert first.report == reloaded.report
    made = 1
    for change in (
        {"max_length": 32},
        {"template": "tulu"},
        {"max_prompt_length": 9},
        {"truncation": "drop"},
        {"sft": {"completion_only_loss": False}},
        {"max_examples": 7},
        {"allowed_tokens": [END]},
        {"min_length": 9},
        {"deduplicate": True},
    ):
        load(file, **change, max_dropped=0.9)
        made += 1
        assert len(list(root.iterdir())) == made
    file.write_text(file.read_text().replace("yes", "no"))
    load(file)
    assert len(list(root.iterdir())) == made + 1


def test_a_damaged_cache_is_built_anew(tmp_path, capsys):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(20))
    first = load(file).train.tokens.copy()
    (tokens,) = cache.cache_root().glob("tokens/*/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-4])
    np.testing.assert_array_equal(load(file).train.tokens, first)
    assert "made again" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_that_build_the_same_cache_at_once_all_get_it(tmp_path):
    import subprocess
    import sys

    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(2000))
    code = (
        f"import sys; sys.path.insert(0, {str(tiny.Path(__file__).parent)!r})\n"
        f"import test_data; print(test_data.load({str(file)!r}).report['fingerprint'])"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = {process.communicate()[0] for process in started}
    assert all(process.returncode == 0 for process in started)
    assert len(outputs) == 1 and outputs != {""}
    assert len(list((cache.cache_root() / "tokens").iterdir())) == 1


def test_the_page_shows_what_is_learned_masked_and_cut(tmp_path):
    rows = [{"prompt": "<b>a?</b>", "completion": "the capital of France is Paris. " * 9}]
    rows += [*tiny.sft_rows(3), {"prompt": "x", "completion": ""}]
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows), max_dropped=0.5, eval=0.3)
    report.write(tmp_path, data)
    page = (tmp_path / "data_report.html").read_text()
    assert json.loads((tmp_path / "data_report.json").read_text()) == data.report
    assert "<b>a" not in page and "&lt;" in page
    assert "empty answer" in page and "a.jsonl:5" in page
    place, became, spans = data.accounts["train"].shown[0]
    of = {state: "".join(t for t, s, _ in spans if s == state) for state in report.STATES}
    ids = [i for *_, i in spans]
    assert tiny.tokenizer().decode(ids) == "".join(text for text, *_ in spans)
    assert f'title="{ids[0]}, seen, not trained on"' in page
    assert of["masked"] == "<b>a?</b>"
    assert of["trained"] + of["cut"] == rows[0]["completion"] + END and of["cut"].endswith(END)
    assert "[" in report.terminal(data.accounts["train"], rows=2, colour=False)
    assert "\x1b[30;42m" in report.terminal(data.accounts["train"], rows=2, colour=True)


def test_the_rows_of_the_page_are_a_sample_that_does_not_depend_on_the_folder(tmp_path):
    places = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        file = tiny.write_rows(tmp_path / folder / "a.jsonl", tiny.sft_rows(300))
        shown = load(file).accounts["train"].shown
        places.append([int(place.rpartition(":")[2]) for place, *_ in shown])
    assert places[0] == places[1] == sorted(places[0]) and len(places[0]) == 12
    assert max(places[0]) > 150  # of 300 rows, not the first


def test_the_sample_holds_cut_rows_as_often_as_the_data(tmp_path):
    """Four of five rows are cut; the sample is drawn from all, after the first two that are."""
    rows = tiny.sft_rows(300)
    for i, row in enumerate(rows):
        row["completion"] = "the capital of France is Paris. " * (2 if i % 5 == 0 else 20)
    account = load(tiny.write_rows(tmp_path / "a.jsonl", rows), max_length=64).accounts["train"]
    cut = [int(place.rpartition(":")[2]) for place, outcome, _ in account.shown if "cut" in outcome]
    assert account.cut.total() == 240 and len(account.shown) == 14
    assert cut[:2] == [2, 3] and 7 <= len(cut) - 2 <= 12 and max(cut) > 150


def test_rows_that_are_cut_are_drawn_at_their_length_before(tmp_path):
    rows = [{"prompt": "a?", "completion": "the capital of France is Paris. " * 90}]
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [*rows, *tiny.sft_rows(3)]))
    account = data.accounts["train"]
    titles = [str(p) for p in report.histograms(data.train, account, data.train.lengths().max())]
    assert len(titles) == 4 and "before the cut" in titles[-1]  # all answers are learned whole
    assert titles[-1].count('class="bar lost"') == 1 == titles[-1].count('class="mark ')
    assert len(report.histograms(data.train, None, 99)) == 3
    everything = load(tmp_path / "a.jsonl", sft={"completion_only_loss": False})
    assert len(report.histograms(everything.train, None, 99)) == 4


def test_the_page_leaves_out_the_middle_of_a_long_text(tmp_path):
    row = {"prompt": "a?", "completion": "START" + "yes " * 50_000 + "FINISH"}
    file = tiny.write_rows(tmp_path / "a.jsonl", [row, *tiny.sft_rows(2)])
    (_, _, spans), *_ = load(file).accounts["train"].shown
    text = "".join(text for text, *_ in spans)
    assert len(text) < 20_000
    assert text.startswith("a?START") and text.endswith(f"FINISH{END}") and " tokens ... " in text


def test_the_page_and_the_terminal_show_control_bytes_escaped(tmp_path):
    row = {"prompt": "a\x1b[2J\x07\u202eb\n\tc", "completion": "\x9b31mred"}
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [row]))
    for text in (
        report.terminal(data.accounts["train"], rows=1, colour=False),
        report.page(data)[report.page(data).index("<h2>Rows") :],
    ):
        assert all(c.isprintable() or c in "\n\t" for c in text)
        assert "\\x1b" in text and "\\x9b" in text and "\\u202e" in text


def test_answers_that_a_cut_makes_identical_are_dropped(tmp_path):
    same = "the capital of France is Paris. " * 9
    pair = {"prompt": "a?", "chosen": same + "yes", "rejected": same + "no"}
    file = tiny.write_rows(tmp_path / "a.jsonl", [pair, *tiny.dpo_rows(3)])
    report = load(file, task="pair", max_dropped=0.5).report["train"]
    assert report["dropped"] == {"identical answers": 1} and report["kept"] == 3


def test_options_that_would_do_nothing_are_refused(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(3))
    with pytest.raises(ConfigError, match="data.share_prompt: only pairs have a prompt to share"):
        load(file, share_prompt="always")
    with pytest.raises(ConfigError, match="data.eval: held-out rows are evaluated once each"):
        load(file, eval=[Source(str(file), weight=2)])


DATA = Path(cache.__file__).parent


@pytest.fixture
def key_of(tmp_path, monkeypatch):
    """`key_of()`: the cache's key of one source, as the code in a copy of data/ is now."""
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(3))
    config = DataConfig(train=str(rows), template="plain")
    recipe = recipe_of("conversation", config, 64, SFTConfig())
    template = Template(tiny.tokenizer(), "plain", "gpt2", [])
    copy = shutil.copytree(DATA, tmp_path / "data")
    monkeypatch.setattr(cache, "__file__", str(copy / "cache.py"))
    return lambda: cache._key(Source(str(rows)), recipe, template, None)


@pytest.mark.parametrize("name", cache.DECIDES_TOKENS)
def test_another_code_is_another_key(name, key_of, tmp_path):
    before = key_of()
    assert key_of() == before
    with (tmp_path / "data" / f"{name}.py").open("a") as file:
        file.write("# changed\n")
    assert key_of() != before


def test_all_that_tokenising_imports_is_in_the_key():
    """Of data/, directly or through others; what comes after tokens may not be imported there."""
    wanted, seen = {"tokenise", "sources", "template"}, set()
    while wanted - seen:
        name = (wanted - seen).pop()
        seen.add(name)
        tree = ast.parse((DATA / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("easyaira.data"):
                inner = node.module.removeprefix("easyaira.data").lstrip(".")
                wanted |= {inner} if inner else {alias.name for alias in node.names}
    assert seen == set(cache.DECIDES_TOKENS)
