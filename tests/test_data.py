"""Rows to examples to batches: every row accounted for, packing changes nothing but padding."""

import csv
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny

from easyaira.config import DataConfig, Source
from easyaira.data import examples, sources
from easyaira.data.batches import LAYOUT, Batches, bucket
from easyaira.data.templates import Template
from easyaira.errors import DataError, TokenizerError


def template(name="plain"):
    return Template(tiny.tokenizer(), name, "gpt2")


def load(path, *, pairs=False, max_length=64, vocab_size=tiny.VOCAB, seed=0, **config):
    learn_prompts = config.pop("learn_prompts", False)
    settings = DataConfig(train=str(path), **config)
    return examples.load(
        settings,
        pairs=pairs,
        template=template(),
        vocab_size=vocab_size,
        max_length=max_length,
        seed=seed,
        learn_prompts=learn_prompts,
    )


ROWS = [{"prompt": "a?", "completion": "NA"}, {"prompt": "b, \u2028 c?", "completion": "007"}]


def write(path, rows):
    if path.name.endswith(".jsonl.gz"):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink:
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    file = write(tmp_path / f"rows.{kind}", ROWS)
    assert [dict(located.row) for located in sources.read(Source(str(file)))] == ROWS


def test_without_datasets_local_files_are_read_and_others_say_what_is_needed(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    file = write(tmp_path / "rows.parquet", ROWS)
    assert len(list(sources.read(Source(str(file))))) == 2
    with pytest.raises(DataError, match="pip install datasets"):
        list(sources.read(Source("owner/data")))


def test_a_folder_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(tmp_path / "many")
    for source in (Source(str(tmp_path / "one")), Source(str(tmp_path / "many"), "test")):
        assert [dict(located.row) for located in sources.read(source)] == ROWS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"prompt": "a"}\n{broken\n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"x": "a", "y": "b"}\n', "a.jsonl:1: found columns x, y; wanted prompt"),
        ("a.jsonl", b'["a"]\n', "must be an object with columns, found list"),
        ("a.jsonl", b'{"prompt": 3, "completion": "b"}\n', "column prompt: wanted text.*found int"),
        ("a.jsonl", b'{"prompt": null, "completion": "b"}\n', "column prompt.*found NoneType"),
        ("a.jsonl", '{"prompt": "\xe9"}'.encode("latin-1"), "a.jsonl: cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9],
            "a.jsonl.gz: cannot be read",
        ),
        ("a.json", b'{"prompt": "a"}', "wanted a list of rows"),
        ("a.csv", b'prompt,completion\n"a,b\n', "a.csv:.*not CSV"),
        ("a.parquet", b"PAR1xxxx", "a.parquet: cannot be read"),
        ("a.txt", b"x", "unknown kind of file; wanted .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_column():
    with pytest.raises(DataError, match="no such file or folder"):
        load("nothing.jsonl")


def test_columns_are_mapped(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", [{"q": "a?", "a": "b"}])
    data = load(file, columns={"prompt": "q", "completion": "a"})
    assert data.report["train"]["kept"] == 1
    with pytest.raises(DataError, match="no column 'x', as data.columns wants; found q, a"):
        load(file, columns={"prompt": "x"})


def test_all_forms_of_pairs_mean_the_same(tmp_path):
    user, good, bad = (
        {"role": role, "content": text}
        for role, text in (("user", "a?"), ("assistant", "b"), ("assistant", "c"))
    )
    forms = [
        {"prompt": "a?", "chosen": "b", "rejected": "c"},
        {"instruction": "a?", "chosen_response": "b", "rejected_response": "c"},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "a?", "chosen": [user, good], "rejected": [user, bad]},
    ]
    seen = set()
    for i, row in enumerate(forms):
        data = load(tiny.write_rows(tmp_path / f"{i}.jsonl", [row]), pairs=True)
        seen.add((data.train.tokens.tobytes(), data.train.bounds.tobytes()))
    assert len(seen) == 1
    other = {"chosen": [user, good], "rejected": [{**user, "content": "z?"}, bad]}
    with pytest.raises(DataError, match="answer different prompts"):
        load(tiny.write_rows(tmp_path / "x.jsonl", [other]), pairs=True)


def test_every_row_is_kept_or_counted_with_a_reason(tmp_path):
    rows = tiny.sft_rows(20) + [{"prompt": "a?", "completion": " "}]
    report = load(tiny.write_rows(tmp_path / "a.jsonl", rows)).report["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (21, 20, {"empty answer": 1})
    assert report["first dropped"]["empty answer"].endswith("a.jsonl:21")
    pairs = tiny.dpo_rows(40) + [{"prompt": "a?", "chosen": "x", "rejected": " x"}]
    pairs += [{"prompt": "a?", "chosen": "x", "rejected": ""}]
    report = load(tiny.write_rows(tmp_path / "b.jsonl", pairs), pairs=True).report["train"]
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
    everything = load(tmp_path / "a.jsonl", learn_prompts=True).train
    assert (~everything.learned).sum() == 5  # all but the first token of each


@pytest.mark.parametrize("pairs", [False, True])
def test_truncation(pairs, tmp_path):
    rows = tiny.dpo_rows(30) if pairs else tiny.sft_rows(30)
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    whole = load(file, pairs=pairs).train
    longest = int(whole.lengths().max())
    limit = longest - 3
    over = int((whole.lengths().max(1) > limit).sum())
    assert over > 0
    end = tiny.tokenizer().eos_token_id

    def answers(data, i):
        bounds = data.bounds[i]
        return [data.tokens[a:b].tolist() for a, b in zip(bounds[1:-1], bounds[2:], strict=True)]

    start = load(file, pairs=pairs, max_length=limit, max_dropped=0.9)
    assert start.report["train"]["cut"] == {"to max_length (keep_start)": over}
    assert start.train.lengths().max() == limit
    kept_end = load(file, pairs=pairs, max_length=limit, truncation="keep_end", max_dropped=0.9)
    assert kept_end.report["train"]["cut"] == {"to max_length (keep_end)": over}
    assert kept_end.train.lengths().max() == limit
    for i in range(30):
        for before, cut, kept in zip(
            answers(whole, i), answers(start.train, i), answers(kept_end.train, i), strict=True
        ):
            assert cut == before[: len(cut)]
            assert (end in cut) == (cut == before)  # a cut answer has no end to learn
            assert kept == before
    dropped = load(file, pairs=pairs, max_length=limit, truncation="drop", max_dropped=0.9)
    assert dropped.report["train"]["dropped"] == {"longer than max_length": over}
    prompt = load(file, pairs=pairs, max_prompt_length=4).train
    assert (prompt.bounds[:, 1] - prompt.bounds[:, 0]).max() == 4


def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn_and_is_counted(tmp_path):
    rows = [{"prompt": "the capital of France " * 30, "completion": "x"}] + tiny.sft_rows(3)
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows), max_dropped=0.5)
    assert data.report["train"]["dropped"] == {"nothing left to learn within max_length": 1}


def test_held_out_prompts_are_never_trained_on(tmp_path):
    rows = [dict(row, prompt=f"question {i % 10}") for i, row in enumerate(tiny.dpo_rows(50))]
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows), pairs=True, eval=0.2)
    assert not set(data.train.prompt_ids) & set(data.held_out.prompt_ids)
    assert len(set(data.held_out.prompt_ids)) == 2
    assert len(data.train) + len(data.held_out) == data.report["train"]["kept"]
    again = load(tmp_path / "a.jsonl", pairs=True, eval=0.2)
    np.testing.assert_array_equal(again.held_out.rows, data.held_out.rows)


def test_an_id_without_an_embedding_is_an_error(tmp_path):
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(3))
    with pytest.raises(TokenizerError, match="gives id .* and the embedding has 50 rows"):
        load(file, vocab_size=50)


def batches(tmp_path, *, pairs=False, **kwargs):
    rows = tiny.dpo_rows(23) if pairs else tiny.sft_rows(23)
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows), pairs=pairs)
    return Batches(data.train, **({"size": 8, "seed": 3} | kwargs))


def sequences(batch):
    """{(micro-batch, segment, side): tokens, positions, learned} of a batch."""
    found = {}
    arrays = batch.arrays
    for a, r in np.ndindex(arrays["tokens"].shape[:2]):
        of = {name: arrays[name][a, r] for name in LAYOUT}
        for key in set(zip(of["segment_ids"].tolist(), of["sides"].tolist(), strict=True)):
            if key[0] == 0:
                continue
            inside = (of["segment_ids"] == key[0]) & (of["sides"] == key[1])
            assert (a, *key) not in found
            found[(a, *key)] = tuple(
                tuple(of[name][inside].tolist()) for name in ("tokens", "positions", "loss_mask")
            )
    return found


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("accumulation, shards", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_packing_changes_where_sequences_lie_and_nothing_else(
    pairs, accumulation, shards, tmp_path
):
    kwargs = {"pairs": pairs, "accumulation": accumulation, "shards": shards}
    packed, plain = (batches(tmp_path, packing=p, **kwargs) for p in (True, False))
    for update in range(6):
        a, b = packed[update], plain[update]
        assert sequences(a) == sequences(b)
        assert a.num_tokens == b.num_tokens == sum(len(s[0]) for s in sequences(a).values())
        np.testing.assert_array_equal(a.examples, b.examples)
        for batch in (a, b):
            segments = batch.arrays["segment_ids"]
            assert segments.shape[1] % shards == 0
            assert not batch.arrays["tokens"][segments == 0].any()
            assert not batch.arrays["loss_mask"][segments == 0].any()
            per_shard = np.split(segments, shards, axis=1)
            counts = {len(np.unique(part[part > 0])) for part in per_shard for part in part}
            if len(batch.examples) == 8:
                assert counts == {8 // accumulation // shards}  # each shard has as many examples


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own(tmp_path):
    b = batches(tmp_path)
    assert len(b) == 3 and len(batches(tmp_path, drop_last=True)) == 2
    first, second = ([i for u in range(3) for i in b.members(3 * e + u)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second
    assert first == [i for u in range(3) for i in batches(tmp_path).members(u)]
    assert first != [i for u in range(3) for i in batches(tmp_path, seed=4).members(u)]


def test_what_is_known_of_an_example_lies_in_its_slot(tmp_path):
    b = batches(tmp_path, pairs=True, accumulation=2, shards=2)
    known = np.arange(46, dtype=np.float32).reshape(23, 2)
    b = Batches(b.examples, 8, 2, 2, True, 3, known={"ref_logps": known})
    for update in range(3):
        batch = b[update]
        assert batch.arrays["ref_logps"].shape == (2, 4, 2)
        held = sequences(batch)
        for example, (micro, slot) in zip(batch.examples, batch.slots, strict=True):
            np.testing.assert_array_equal(batch.arrays["ref_logps"][micro, slot], known[example])
            start, _, stop, _ = b.examples.bounds[example]
            wanted = tuple(b.examples.tokens[start:stop].tolist())
            assert held[(micro, slot + 1, 1)][0] == wanted


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7, 8, 9, 17)] == [1, 2, 3, 4, 5, 7, 8, 10, 20]
    sizes = {bucket(n, 8) for n in range(1, 1025)}
    assert len(sizes) <= 4 * 8 and all(size % 8 == 0 for size in sizes)
    assert all(n <= bucket(n, 8) <= max(1.25 * n, n + 8) for n in range(1, 3000))
