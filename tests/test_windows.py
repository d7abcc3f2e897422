"""Texts that are split, or joined and cut: each token is in one example, in its order."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from easyaira.config.data import Source
from easyaira.errors import ConfigError, DataError
from helpers import tiny
from helpers.examples import load
from helpers.runs import losses_of, train

WORDS = "red blue fox dog sun moon tree leaf".split()
TOKENIZERS = {"no start token": tiny.tokenizer, "start token": tiny.starting_tokenizer}


def texts(count, longest=30, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def write(tmp_path, rows):
    return tiny.write_rows(tmp_path / "a.jsonl", [{"text": row} for row in rows])


def stream_of(tokenizer, row):
    """Tokens of a text with start and end token, and which have loss."""
    start, ids = tokenizer("").input_ids, tokenizer(row, add_special_tokens=False).input_ids
    return [*start, *ids, 0], [False] * len(start) + [True] * (len(ids) + 1)


def cut(tokens, learned, length):
    """Pieces of a stream; the first token of each has no loss."""
    pieces = [slice(i, i + length) for i in range(0, len(tokens), length)]
    return [(tokens[p], [False, *learned[p][1:]]) for p in pieces]


def examples_of(data):
    pieces = [slice(a, b) for a, *_, b in data.bounds.tolist()]
    return [(data.tokens[p].tolist(), data.learned[p].tolist()) for p in pieces]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [4, 17, 1000])
def test_texts_are_joined_and_cut(name, length, tmp_path):
    tokenizer, rows = TOKENIZERS[name](), texts(40)
    streams = [stream_of(tokenizer, row) for row in rows]
    tokens, learned = (sum(parts, []) for parts in zip(*streams, strict=True))
    data = load(write(tmp_path, rows), texts="join", max_length=length, tokenizer=tokenizer)
    wanted = cut(tokens, learned, length)
    wanted = wanted[:-1] if len(wanted[-1][0]) == 1 else wanted
    assert examples_of(data.train) == wanted
    ends = np.cumsum([len(ids) for ids, _ in streams])
    begins = np.searchsorted(ends, np.arange(len(wanted)) * length, side="right")
    assert data.train.rows.tolist() == begins.tolist()  # the row in which each begins
    report = data.report["train"]
    assert (report["read"], report["kept"], report["examples"]) == (40, 40, len(wanted))
    assert not report["dropped"] and not data.accounts["train"].cut
    assert len({place for place, *_ in data.accounts["train"].shown}) == min(12, len(wanted))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("shortest", [None, 5])
def test_long_texts_are_split(name, shortest, tmp_path):
    tokenizer, rows = TOKENIZERS[name](), [*texts(40), "red fox dog sun moon tree leaf"]
    data = load(write(tmp_path, rows), texts="split", max_length=7, min_length=shortest,
                max_dropped=1.0, tokenizer=tokenizer)  # fmt: skip
    wanted, origins, dropped = [], [], 0
    for number, row in enumerate(rows):
        pieces = cut(*stream_of(tokenizer, row), 7)
        long = [piece for piece in pieces if len(piece[0]) >= (shortest or 2)]
        dropped += not long
        wanted, origins = wanted + long, origins + [number] * len(long)
    assert examples_of(data.train) == wanted
    assert data.train.rows.tolist() == origins
    report = data.report["train"]
    assert sum(report["dropped"].values()) == dropped and report["kept"] == 41 - dropped
    assert report["noted"]["split into examples of 7 tokens"] > 10
    assert bool(dropped) == bool(shortest)


def test_parts_of_a_text_are_held_out_together(tmp_path):
    rows = [*texts(30, longest=40), "red"]
    for how in ("split", "join"):
        data = load(write(tmp_path, rows), texts=how, max_length=8, eval=5)
        assert not set(data.train.rows.tolist()) & set(data.held_out.rows.tolist())
        assert len(set(data.held_out.rows.tolist())) == 5 < len(data.held_out)
        whole = load(write(tmp_path, rows), texts=how, max_length=8).train
        assert sorted(examples_of(data.train) + examples_of(data.held_out)) == sorted(
            examples_of(whole)
        )


def test_each_source_is_joined_by_itself(tmp_path):
    sources = [tiny.write_rows(tmp_path / f"{n}.jsonl", [{"text": row} for row in texts(5, seed=n)])
               for n in (1, 2)]  # fmt: skip
    single = [examples_of(load(path, texts="join", max_length=8).train) for path in sources]
    both = load([Source(str(path)) for path in sources], texts="join", max_length=8)
    assert examples_of(both.train) == single[0] + single[1]
    assert set(both.train.sources.tolist()) == {0, 1}


def test_texts_too_short_to_learn_are_an_error(tmp_path):
    with pytest.raises(DataError, match="train: all texts together are shorter than an example"):
        load(write(tmp_path, ["red"]), texts="join", min_length=20)


def test_rows_without_a_text_are_an_error(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(3))
    with pytest.raises(DataError, match=r"a.jsonl:1: has columns .* and data.texts: join is for"):
        load(file, texts="join")


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"task": "pair"}, "data.texts: split is for SFT only"),
        ({"deduplicate": True}, "which data.deduplicate does not support"),
        ({"reverse": True}, "which data.reverse does not support"),
        ({"compat": "aira"}, "which data.compat does not support"),
    ],
)
def test_options_that_do_not_apply_are_refused(options, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        load(write(tmp_path, ["red"]), texts="split", **options)


@pytest.mark.slow
def test_a_run_on_joined_texts_has_the_loss_of_transformers(tmp_path):
    """Across the texts of a window, too: each token attends to all before it."""
    tiny.save(tmp_path / "model", tiny.CONFIGS["gpt2"])
    rows = texts(12)
    stream = sum((stream_of(tiny.tokenizer(), row)[0] for row in rows), [])
    windows = [torch.tensor([stream[i : i + 16]]) for i in range(0, len(stream), 16)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        sums = [model(w, labels=w).loss * (w.shape[1] - 1) for w in windows if w.shape[1] > 1]
    wanted = sum(sums) / sum(w.shape[1] - 1 for w in windows)
    run, _ = train(
        "sft", tmp_path / "model", write(tmp_path, rows), tmp_path / "run",
        "--data.texts=join", "--data.max_length=16", "--optimizer.warmup_steps=0", max_steps=1,
        train_batch_size=len(windows),
    )  # fmt: skip
    np.testing.assert_allclose(losses_of(run)[0], float(wanted), rtol=1e-5)
