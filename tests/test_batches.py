"""Examples to batches: packing and sharing change where tokens lie, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira.algorithms.dpo import answer_scores
from easyaira.algorithms.sft import sft
from easyaira.data.batches import LAYOUT, Batches
from easyaira.data.mismatch import mismatched
from easyaira.data.packing import bucket, pack
from easyaira.models.layout import UNATTENDED
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.examples import batches, load
from helpers.runs import configure


def sequences(batch):
    """{(micro-batch, segment, side): tokens, positions, learned} of a batch."""
    result = {}
    arrays = batch.arrays
    for a, r in np.ndindex(arrays["tokens"].shape[:2]):
        of = {name: arrays[name][a, r] for name in LAYOUT}
        for key in set(zip(of["segment_ids"].tolist(), of["sides"].tolist(), strict=True)):
            if key[0] == 0:
                continue
            inside = (of["segment_ids"] == key[0]) & (of["sides"] == key[1])
            assert (a, *key) not in result
            result[(a, *key)] = tuple(
                tuple(of[name][inside].tolist()) for name in ("tokens", "positions", "loss_mask")
            )
    return result


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("accumulation, shards", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_packing_changes_where_sequences_lie_and_nothing_else(
    pairs, accumulation, shards, one_row, tmp_path
):
    kwargs = {"pairs": pairs, "accumulation": accumulation, "shards": shards}
    plain = batches(tmp_path, packing=False, **kwargs)
    packed = batches(tmp_path, attention=0.0 if one_row else 1 / 2048, **kwargs)
    for update in range(6):
        a, b = packed[update], plain[update]
        assert sequences(a) == sequences(b)
        assert a.num_tokens == b.num_tokens == sum(len(s[0]) for s in sequences(a).values())
        np.testing.assert_array_equal(a.examples, b.examples)
        for batch in (a, b):
            segments = batch.arrays["segment_ids"]
            assert segments.shape[1] % shards == 0
            assert segments.shape[1] == shards or not (one_row and batch is a)
            assert not batch.arrays["tokens"][segments == 0].any()
            assert not batch.arrays["loss_mask"][segments == 0].any()
            per_shard = np.split(segments, shards, axis=1)
            counts = {len(np.unique(part[part > 0])) for part in per_shard for part in part}
            if len(batch.examples) == 8:
                assert counts == {8 // accumulation // shards}  # each shard has as many examples


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own(tmp_path):
    b = batches(tmp_path)
    dropping = batches(tmp_path, drop_last=True)
    assert len(b) == 3 and len(dropping) == 2
    assert dropping.shapes == b.shapes  # the reference pass leaves nothing out
    first, second = ([i for u in range(3) for i in b.members(3 * e + u)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second
    assert first == [i for u in range(3) for i in batches(tmp_path).members(u)]
    assert first != [i for u in range(3) for i in batches(tmp_path, seed=4).members(u)]


@pytest.mark.parametrize("accumulation, shards", [(1, 1), (2, 2), (1, 4)])
def test_mismatched_answers_are_those_of_the_group(accumulation, shards, tmp_path, capsys):
    """27 rows in groups of 2, the last update smaller; answers of others are cut."""
    rows = load(tiny.write_rows(tmp_path / "a.jsonl", tiny.rated_rows(27)), task="rated").train
    longest = int(rows.lengths().max()) - 2
    pairs = mismatched(rows, 2, max_length=longest, seed=3)
    assert "1 of 27 rows left out" in capsys.readouterr().out and len(pairs) == 26
    text, learned = (
        {int(row): of[a:b] for row, (_, a, b) in zip(rows.rows, rows.bounds, strict=True)}
        for of in (rows.tokens, rows.learned)
    )
    for i, (start, own, other, end) in enumerate(pairs.bounds.tolist()):
        row, partner = int(pairs.rows[i]), int(pairs.rows[i ^ 1])
        room = longest - (own - start)
        assert pairs.tokens[own:other].tolist() == text[row].tolist()
        assert pairs.tokens[other:end].tolist() == text[partner][:room].tolist()
        np.testing.assert_array_equal(pairs.learned[other:end], learned[partner][:room])
        begin, answer, _ = rows.bounds[np.flatnonzero(rows.rows == row)[0]]
        assert pairs.tokens[start:own].tolist() == rows.tokens[begin:answer].tolist()
        assert pairs.labels[i] == (row % 5 < 3)
    assert len(set(pairs.ids.tolist())) == 26
    plan = Batches(pairs, 8, accumulation, shards, seed=3, together=2)
    seen = []
    for update in range(len(plan)):
        batch = plan[update]
        examples, slots = batch.examples.reshape(-1, 2), batch.slots.reshape(-1, 2, 2)
        np.testing.assert_array_equal(examples[:, 0] ^ 1, examples[:, 1])
        np.testing.assert_array_equal(slots[:, 0] + [0, 1], slots[:, 1])
        assert not (slots[:, 0, 1] % 2).any()
        seen += batch.examples.tolist()
    assert sorted(seen) == list(range(26))


def test_what_is_known_of_an_example_lies_in_its_slot(tmp_path):
    b = batches(tmp_path, pairs=True, accumulation=2, shards=2)
    known = np.arange(46, dtype=np.float32).reshape(23, 2)
    b = Batches(b.examples, 8, 2, 2, seed=3, known={"ref_logps": known})
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
    assert all(n <= bucket(n, 8, 16) <= max(17 / 16 * n, n + 8) for n in range(1, 3000))


def shared_as_two(batch):
    """The sequences of a batch with shared prompts, as if each answer had its own prompt."""
    result = {}
    for (a, segment, side), of in sequences(batch).items():
        if side:
            before = sequences(batch).get((a, segment, 0), ((), (), ()))
            result[(a, segment, side)] = tuple(x + y for x, y in zip(before, of, strict=True))
    return result


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulation, shards", [(1, 1), (2, 2)])
def test_a_prompt_stored_once_makes_the_same_sequences(packing, accumulation, shards, tmp_path):
    kwargs = {"pairs": True, "accumulation": accumulation, "shards": shards, "packing": packing}
    once, twice = (batches(tmp_path, share_prompt=s, **kwargs) for s in (True, False))
    for update in range(4):
        a, b = once[update], twice[update]
        assert shared_as_two(a) == sequences(b)
        assert a.num_tokens == b.num_tokens
        assert a.filled < b.filled == b.num_tokens
        assert (a.arrays["segment_ids"] > 0).sum() == a.filled


def test_pairs_without_a_prompt_can_be_shared_too(tmp_path):
    b = batches(tmp_path, pairs=True, share_prompt=True, packing=False)
    bounds = b.examples.bounds.copy()
    bounds[:, 0] = bounds[:, 1]
    b = Batches(b.examples.take(np.arange(23)), 8, seed=3, share_prompt=True)
    object.__setattr__(b.examples, "bounds", bounds)
    wanted = Batches(b.examples, 8, seed=3, share_prompt=False)
    assert shared_as_two(b[0]) == sequences(wanted[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", tiny.ATTENTION)
def test_packed_and_shared_log_probabilities_and_gradients_equal_separate_ones(case, tmp_path):
    tiny.save(tmp_path / "model", tiny.CASES[case])
    model, params = tiny.load(tmp_path / "model")
    weights = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    layouts = [{"packing": False}, {"share_prompt": True}, {}]
    layouts += [{"share_prompt": True, "packing": False}]
    laid_out = [batches(tmp_path, pairs=True, **layout)[0].arrays for layout in layouts]
    rows, width = np.max([arrays["tokens"].shape[1:] for arrays in laid_out], axis=0)

    @jax.jit
    def measure(params, arrays):
        def total(params):
            logps = answer_scores(model, params, arrays, examples=8).logps
            return (logps * weights).sum(), logps

        (_, logps), grads = jax.value_and_grad(total, has_aux=True)(params)
        return logps, grads

    def padded(array):  # to one shape, so that one program serves all layouts
        return np.pad(array, [(0, rows - len(array)), (0, width - array.shape[1])])

    (logps, grads), *others = (
        measure(params, {name: jnp.asarray(padded(arrays[name][0])) for name in LAYOUT})
        for arrays in laid_out
    )
    for other_logps, other_grads in others:
        np.testing.assert_allclose(other_logps, logps, rtol=1e-5)
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
        for one, other in zip(*map(jax.tree.leaves, (grads, other_grads)), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_visits_the_rows_in_their_own_order_if_told_so(shuffle, tmp_path):
    tiny.ground(tmp_path, {"gpt2": tiny.CONFIGS["gpt2"]}, sft=tiny.sft_rows(20))
    config, algorithm = configure(
        "sft", tmp_path / "gpt2", tmp_path, tmp_path / "run", **{"data.shuffle": shuffle}
    )
    visited = prepare(config, algorithm).batches
    starts = (0, len(visited))
    epochs = [np.concatenate([visited.members(start + i) for i in range(3)]) for start in starts]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert all(np.array_equal(epoch, np.arange(20)) != shuffle for epoch in epochs)
    assert np.array_equal(*epochs) != shuffle


@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_a_changed_token_leaves_the_other_answer_and_all_other_pairs_as_they_were(case, tmp_path):
    tiny.save(tmp_path / "model", tiny.CASES[case])
    model, params = tiny.load(tmp_path / "model")
    batch = batches(tmp_path, pairs=True, share_prompt=True)[0]
    rows = {name: batch.arrays[name][0] for name in LAYOUT}
    apply = jax.jit(model.apply)
    before = np.asarray(apply(params, rows)[0])
    row = 0
    for segment in sorted(set(rows["segment_ids"][row]) - {0})[:2]:
        for side, touched in ((0, (0, 1, 2)), (1, (1,)), (2, (2,))):
            inside = (rows["segment_ids"][row] == segment) & (rows["sides"][row] == side)
            place = np.flatnonzero(inside)[0]
            tokens = rows["tokens"].copy()
            tokens[row, place] = (tokens[row, place] + 1) % tiny.VOCAB
            after = np.asarray(apply(params, rows | {"tokens": tokens})[0])
            may = np.zeros(tokens.shape, bool)
            may[row] = (rows["segment_ids"][row] == segment) & np.isin(rows["sides"][row], touched)
            may[row, :place] = False
            others = ~may & (rows["segment_ids"] > 0)
            assert np.array_equal(before[others], after[others])  # bitwise
            assert (np.abs(before[may] - after[may]).max(-1) > 0).all()


def test_padding_that_is_learned_is_seen_by_no_token(tmp_path):
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(8))
    data = load(rows, compat="aira", template="aira", max_length=40, vocab_size=400).train
    batch = Batches(data, 8)[0]
    sides, learned = batch.arrays["sides"], batch.arrays["loss_mask"]
    assert (sides == UNATTENDED).sum() == data.unseen.sum() and learned[sides == UNATTENDED].all()
    assert batch.num_tokens == (40 - data.unseen).sum() == batch.filled
    tiny.save(tmp_path / "model", tiny.CONFIGS["gpt2"] | {"vocab_size": 400})
    model, params = tiny.load(tmp_path / "model")
    lines = {name: jnp.asarray(batch.arrays[name][0]) for name in LAYOUT}
    apply = jax.jit(model.apply)
    before = np.asarray(apply(params, lines)[0])
    other = np.where(sides[0] == UNATTENDED, 7, batch.arrays["tokens"][0])
    after = np.asarray(apply(params, lines | {"tokens": jnp.asarray(other)})[0])
    seen = sides[0] != UNATTENDED
    assert np.array_equal(before[seen], after[seen]) and not np.array_equal(before, after)


@pytest.mark.parametrize("pairs, share", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.slow
def test_hosts_make_their_own_rows_of_the_same_updates(hosts, pairs, share, tmp_path):
    whole = batches(tmp_path, pairs=pairs, share_prompt=share, shards=4, accumulation=2)
    for update in range(7):
        per_host = 4 // hosts
        parts = [
            batches(
                tmp_path,
                pairs=pairs,
                share_prompt=share,
                shards=4,
                accumulation=2,
                local=range(h * per_host, (h + 1) * per_host),
            )[update]
            for h in range(hosts)
        ]
        for name in LAYOUT:
            joined = np.concatenate([part.arrays[name] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, whole[update].arrays[name])
        for part in parts:
            assert part.examples.tolist() == whole[update].examples.tolist()
            assert part.shape == whole[update].shape


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_cut_at_every_step_the_order_goes_on_as_if_it_had_not_been_cut(hosts, packing, tmp_path):
    def examples_of(b, start, stop):
        """Which examples lie in the rows, read back from their tokens."""
        by_tokens = {
            b.examples.tokens[start:end].tobytes(): i
            for i, (start, _, end) in enumerate(b.examples.bounds)
        }
        for update in range(start, stop):
            batch = b[update]
            for tokens, *_ in sequences(batch).values():
                yield update, by_tokens[np.array(tokens, np.int32).tobytes()]

    def run(hosts, start, stop):
        per_host = 4 // hosts
        seen = []
        for h in range(hosts):  # each a fresh process, which knows only (seed, update)
            local = range(h * per_host, (h + 1) * per_host)
            b = batches(tmp_path, shards=4, packing=packing, local=local)
            seen += examples_of(b, start, stop)
        return sorted(seen)

    through = run(1, 0, 6)  # two epochs of 23 examples in updates of 8
    assert [i for u, i in through if u < 3] != [i for u, i in through if u >= 3]
    assert sorted(i for u, i in through if u < 3) == list(range(23))
    for cut in range(1, 6):
        assert run(1, 0, cut) + run(hosts, cut, 6) == through


def test_packing_is_best_fit_and_overfills_nothing():
    lengths = np.random.default_rng(0).integers(1, 30, 500).tolist()
    rows = pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 100
    assert len(rows) <= np.ceil(sum(lengths) / 100) + 1
    assert pack([60, 50, 40, 30, 20], 100) == [[0, 2], [1, 3, 4]]


@pytest.mark.slow
def test_few_shapes_hold_all_updates(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{i}", "completion": "yes no " * int(rng.integers(1, 9))} for i in range(900)
    ]
    data = load(tiny.write_rows(tmp_path / "a.jsonl", rows)).train
    b = Batches(data, 16, seed=1)
    used = {b[update].shape for update in range(4 * len(b))}
    assert used <= set(b.shapes) and len(b.shapes) <= 8
    plain = Batches(data, 16, seed=1, packing=False)
    packed, padded = (sum(of[u].positions for u in range(len(b))) for of in (b, plain))
    assert packed < 0.8 * padded
    for update in range(5):  # the cheapest of those that hold an update
        groups = b.groups(update)
        holding = [s for s in b.shapes if max(map(len, b.rows_of(groups, s.length))) <= s.rows]
        assert b[update].shape == min(holding, key=b.cost)


def test_compat_aira_is_the_loss_of_the_original_script(tmp_path):
    """`model(input_ids, attention_mask, labels=input_ids)` on rows padded to max_length."""
    import torch

    theirs = tiny.save(tmp_path / "model", tiny.CONFIGS["gpt2"] | {"vocab_size": 400})
    model, params = tiny.load(tmp_path / "model")
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(8))
    data = load(rows, compat="aira", template="aira", max_length=40, vocab_size=400).train
    ids = torch.tensor(data.tokens.reshape(8, 40)).long()
    real = torch.arange(40) < torch.tensor(40 - data.unseen)[:, None]
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=real.long(), labels=ids).loss.item()
    for packing in (False, True):
        batch = Batches(data, 8, packing=packing)[0]
        lines = {name: jnp.asarray(batch.arrays[name][0]) for name in LAYOUT}
        total, count = jax.jit(lambda *x: sft(model)(*x, None)["loss"])(params, None, lines)
        assert count == 8 * 39
        assert abs(total / count - wanted) < 1e-5
