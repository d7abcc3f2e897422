"""Several answers to a prompt: rows, layout, and the objectives against formulas and pairs."""

import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira.algorithms.dpo import AnswerScores, answer_scores, dpo, dpo_sums
from easyaira.algorithms.reward import reward, reward_summary
from easyaira.config.algorithms import RewardConfig
from easyaira.config.data import DataConfig
from easyaira.config.dpo import DPOConfig
from easyaira.data import dataset, report
from easyaira.data.batches import LAYOUT, Batches
from easyaira.data.examples import of_tokens
from easyaira.data.recipe import recipe_of
from easyaira.data.template import Template
from easyaira.distributed.mesh import make_mesh
from easyaira.errors import ConfigError, DataError
from easyaira.losses import preference
from easyaira.models.attention import visible
from easyaira.models.registry import model_of
from easyaira.storage import pretrained
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.examples import load
from helpers.runs import close, configure, train

ASKED = {"prompt": "what do you like?"}
FOUR = [" yes", " no", " red", " blue"]
FIRST = [4, 3, 2, 1]


def rows_to(folder, *rows, compared="all", **config):
    """Examples of rows, and their counts; half of the rows may be dropped."""
    path = tiny.write_rows(folder / "rows.jsonl", rows)
    settings = DataConfig(train=str(path), template="plain", max_dropped=0.9, **config)
    recipe = recipe_of("pair", settings, 64, compared=compared)
    template = Template(tiny.tokenizer(), "plain", "gpt2", ())
    return dataset.load(settings, recipe, template=template, vocab_size=tiny.VOCAB, seed=0)


def answers_of(examples, i):
    """Texts of the answers of an example, best first."""
    edges = examples.bounds[i, 1:].tolist()
    count = int(examples.exists[i].sum())
    spans = itertools.islice(itertools.pairwise(edges), count)
    return [tiny.tokenizer().decode(examples.tokens[a : b - 1]) for a, b in spans]  # without EOS


# Rows


def test_scores_ranks_messages_and_ultrafeedback_are_the_same_answers(tmp_path):
    spoken = [[{"role": "assistant", "content": text}] for text in FOUR]
    completions = [
        {"response": text, "overall_score": score, "model": "m", "critique": "short"}
        for text, score in zip(FOUR, (5.0, 1.5, 7.5, 5.0), strict=True)
    ]
    rows = (
        {**ASKED, "answers": FOUR, "scores": [5, 1.5, 7.5, 5]},
        {**ASKED, "answers": FOUR, "ranks": [2, 3, 1, 2]},
        {"prompt": [{"role": "user", "content": ASKED["prompt"]}], "answers": spoken,
         "scores": [0.0, -1.0, 9, 0.0]},
    )  # fmt: skip
    data = rows_to(tmp_path, *rows).train
    other = {"instruction": ASKED["prompt"], "completions": completions, "source": "x"}
    read = rows_to(tmp_path, other)
    assert answers_of(data, 0) == [" red", " yes", " blue", " no"]
    assert data.ranks.tolist() == [[0, 1, 1, 2]] * 3
    assert len(set(data.ids.tolist())) == 1 and data.ids[0] == read.train.ids[0]
    assert read.train.ranks.tolist() == [[0, 1, 1, 2]]
    assert set(read.report["train"]["not used"]) == {
        "column completions: key model",
        "column completions: key critique",
    }


def test_answers_that_compare_nothing_are_left_out_and_counted(tmp_path):
    rows = (
        {**ASKED, "answers": [*FOUR, "  ", "red"], "scores": [1, 2, 3, 4, 9, 0]},
        {**ASKED, "answers": FOUR[:2], "scores": [1, 2], "weight": 0.5},
        {**ASKED, "answers": FOUR, "scores": [2, 2, 2, 2]},
        {**ASKED, "answers": FOUR[:1], "scores": [2]},
        {**ASKED, "answers": [" no", "no"], "scores": [2, 1]},
        {**ASKED, "answers": [" no", ""], "ranks": [2, 1]},
    )
    data = rows_to(tmp_path, *rows)
    assert answers_of(data.train, 0) == [" blue", " red", " no", " yes"]
    assert answers_of(data.train, 1) == [" no", " yes"]
    assert data.train.ranks.tolist() == [[1, 2, 3, 4], [0, 1, -1, -1]]
    np.testing.assert_array_equal(data.train.weights, np.float32([np.nan, 0.5]))
    counts = data.report["train"]
    assert counts["dropped"] == {
        "all answers tied": 1,
        "fewer than two answers": 1,
        "identical answers": 1,
        "empty answer": 1,
    }
    assert counts["noted"] == {
        "an empty answer of several left out": 1,
        "an answer that repeats a better one left out": 1,
    }
    assert counts["examples by answers"] == {"2": 1, "4": 1}
    lengths = data.train.lengths()
    assert (lengths[1] > 0).tolist() == [True, True, False, False]
    assert counts["tokens"] == lengths.sum() and counts["length"]["shortest"] > 0
    page = report.page(data)
    assert "rank 2" in page and "chosen" in page


def test_answers_that_a_cut_makes_equal_are_one(tmp_path):
    long = " red and blue and red"
    row = {**ASKED, "answers": [long + " yes", long + " no", " no"], "scores": [3, 2, 1]}
    other = {**ASKED, "answers": [" no", " yes", long], "scores": [1, 2, 3]}
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, other])
    limit = int(load(path, task="pair").train.lengths()[1, 0]) - 1  # without its end token
    cut = load(path, task="pair", max_length=limit)
    assert cut.train.ranks.tolist() == [[0, 2, -1], [0, 1, 2]]
    assert cut.report["train"]["noted"]["an answer that repeats a better one left out"] == 1


@pytest.mark.parametrize(
    "compared, answers, ranks",
    [
        ("all", [" red", " blue", " yes", " no"], [0, 0, 1, 2]),
        ("best_rest", [" red", " yes", " no"], [0, 1, 2]),
        ("best_worst", [" red", " no"], [0, 2]),
    ],
)
def test_only_the_answers_that_are_compared_are_kept(compared, answers, ranks, tmp_path):
    row = {**ASKED, "answers": FOUR, "scores": [5, 1, 7, 7]}
    data = rows_to(tmp_path, row, compared=compared).train
    assert answers_of(data, 0) == answers and data.ranks[0].tolist() == ranks


@pytest.mark.parametrize(
    "row, message",
    [
        ({"answers": FOUR, "scores": [1, 2, 3]}, "column scores: 3 numbers for 4 answers"),
        ({"answers": FOUR, "ranks": [1, 2, 3, None]}, "column ranks: wanted finite numbers"),
        ({"answers": FOUR, "scores": [1, 2, 3, float("nan")]}, "finite numbers, found nan"),
        ({"answers": FOUR, "scores": 3}, "column scores: wanted a list of numbers, found a number"),
        ({"answers": FOUR}, "column answers: needs scores or ranks beside it, found neither"),
        ({"answers": FOUR, "scores": [1] * 4, "ranks": [1] * 4}, "beside it, found both"),
        (
            {"answers": "yes", "scores": [1]},
            "column answers: wanted a list of answers, found a text",
        ),
        ({"answers": [" a", 3], "scores": [1, 2]}, "column answers: wanted text or a list"),
        ({"answers": [" a"] * 65, "scores": [1] * 65}, "column answers: 65 answers, more than 64"),
        ({"answers": FOUR, "scores": [1, 2, 3, 4], "margin": 1}, "column margin is filled"),
    ],
)
def test_rows_that_cannot_be_ranked_are_told_in_one_line(row, message, tmp_path):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{re.escape(message)}") as error:
        rows_to(tmp_path, {**ASKED, **row})
    assert "\n" not in str(error.value)


def test_sources_of_pairs_and_of_answers_go_together(tmp_path):
    """The held-out rows have as many places for answers as those to train on."""
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.dpo_rows(4))
    ranked = tiny.write_rows(tmp_path / "ranked.jsonl", tiny.ranked_rows(6))
    sources = [{"path": str(path)} for path in (pairs, ranked)]
    data = load([dataset.Source(**s) for s in sources], task="pair", eval=3)
    assert data.train.answers == data.held_out.answers == 4
    counts = np.concatenate([data.train.exists.sum(1), data.held_out.exists.sum(1)])
    assert sorted(counts.tolist()) == [2] * 6 + [3] * 2 + [4] * 2
    evaluated = load(pairs, task="pair", eval=[dataset.Source(str(ranked))])
    assert evaluated.train.answers == evaluated.held_out.answers == 4
    assert evaluated.train.fingerprint() != load(pairs, task="pair").train.fingerprint()


# Layout


def ranked_batches(tmp_path, count=11, **options):
    data = load(tiny.write_rows(tmp_path / "r.jsonl", tiny.ranked_rows(count)), task="pair").train
    return Batches(data, **({"size": 4, "seed": 3} | options))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("accumulation, shards", [(1, 1), (2, 2)])
@pytest.mark.slow
def test_each_answer_sees_its_prompt_and_itself(accumulation, shards, share, packing, tmp_path):
    options = {"packing": packing, "share_prompt": share}
    plan = ranked_batches(tmp_path, accumulation=accumulation, shards=shards, **options)
    e = plan.examples
    assert e.answers == 4 and not e.exists.all()
    for update in range(len(plan)):
        batch, count = plan[update], 0
        for i, (micro, slot) in zip(batch.examples, batch.slots, strict=True):
            of = {name: batch.arrays[name][micro] for name in LAYOUT}
            segments, sides = (jnp.asarray(of[name]) for name in ("segment_ids", "sides"))
            prompt = e.tokens[e.bounds[i, 0] : e.bounds[i, 1]]
            for k in np.flatnonzero(e.exists[i]):
                answer = e.tokens[e.bounds[i, k + 1] : e.bounds[i, k + 2]]
                own = (of["segment_ids"] == slot + 1) & (of["sides"] == k + 1)
                row, last = np.argwhere(own)[-1]
                seen = np.asarray(visible(segments, sides))[row, last]
                assert of["tokens"][row, seen].tolist() == [*prompt, *answer]
                assert of["positions"][row, seen].tolist() == list(range(len(prompt) + len(answer)))
                learned = of["loss_mask"][row, seen]
                assert not learned[: len(prompt)].any() and learned[len(prompt) :].all()
                count += 1
        assert count == e.exists[batch.examples].sum()
        stored = (batch.arrays["segment_ids"] > 0).sum()
        assert stored == batch.filled <= batch.num_tokens == e.lengths()[batch.examples].sum()
        assert (batch.filled < batch.num_tokens) == share


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    tiny.save(folder, tiny.CONFIGS["gpt2"])
    return tiny.load(folder)


def first(batch, *names):
    return {name: jnp.asarray(batch.arrays[name][0]) for name in (*LAYOUT, *names)}


def equal_grads(one, other):
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one))
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
def test_answers_with_a_shared_prompt_equal_separate_rows(model, tmp_path):
    """Log-probabilities and gradients, of examples with one answer in a row each."""
    net, params = model
    plan = ranked_batches(tmp_path, share_prompt=True)
    e, members = plan.examples, plan.members(0)
    weights = np.random.default_rng(0).normal(size=(4, 4)) * e.exists[members]

    def measure(batch, examples, answers, weights):
        arrays = first(batch)

        def total(params):
            logps = answer_scores(net, params, arrays, examples=examples, answers=answers).logps
            return (logps * weights).sum(), logps

        (_, logps), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return np.asarray(logps), grads

    logps, grads = measure(plan[0], 4, 4, weights)
    existing = np.argwhere(e.exists[members])
    prompts = [e.tokens[e.bounds[members[b], 0] : e.bounds[members[b], 1]] for b, _ in existing]
    texts = [e.tokens[slice(*e.bounds[members[b], k + 1 : k + 3])] for b, k in existing]
    # a second answer, without a weight, makes each of them a pair
    alone = of_tokens(prompts, [[text, text[:1]] for text in texts])
    own = np.stack([weights[tuple(existing.T)], 0 * existing[:, 0]], axis=1)
    batch = Batches(alone, len(existing), packing=False)[0]
    separate, separate_grads = measure(batch, len(existing), 2, own)
    np.testing.assert_allclose(logps[tuple(existing.T)], separate[:, 0], rtol=1e-5)
    assert not logps[~e.exists[members]].any()
    equal_grads(grads, separate_grads)


# Objectives, against their formulas


RANKS = np.array([[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 1, -1], [0, 3, -1, -1]])


def scores_of(seed=0):
    """Log-ratios and numbers of tokens of four prompts, 0 where there is no answer."""
    rng = np.random.default_rng(seed)
    ratios, lengths = rng.normal(0, 9, RANKS.shape), rng.integers(1, 9, RANKS.shape)
    return ratios * (RANKS >= 0), lengths.astype(float) * (RANKS >= 0)


def pairs_by_hand(row, ranks, best_rest=False):
    pairs = [(i, j) for i, j in itertools.permutations(range(4), 2) if -1 < ranks[i] < ranks[j]]
    return [(i, j) for i, j in pairs if i == 0] if best_rest else pairs


def sums_by_us(ratios, lengths, **options):
    ones = np.ones_like(ratios)
    arrays = (ratios, lengths, ones, ones, ones)
    scores = AnswerScores(*(jnp.asarray(x, jnp.float32) for x in arrays))
    ranks = jnp.asarray(RANKS[: len(ratios)])
    return dpo_sums(scores, jnp.zeros_like(scores.logps), DPOConfig(**options), ranks=ranks)


@pytest.mark.parametrize("answers", ["all_pairs", "best_rest"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "bco_pair"])
def test_the_loss_is_the_mean_over_the_pairs_of_a_prompt(loss_type, answers):
    ratios, lengths = scores_of()
    log_s = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    losses = {
        "sigmoid": lambda w, l: -log_s(0.1 * (w[0] - l[0])),
        "ipo": lambda w, l: (w[0] / w[1] - l[0] / l[1] - 5) ** 2,
        "bco_pair": lambda w, l: -log_s(0.1 * w[0]) - log_s(-0.1 * l[0]),
    }
    wanted, margins, right = [], [], []
    for h, n, ranks in zip(ratios, lengths, RANKS, strict=True):
        pairs = pairs_by_hand(h, ranks, answers == "best_rest")
        of = [((h[i], n[i]), (h[j], n[j])) for i, j in pairs]
        wanted.append(np.mean([losses[loss_type](w, l) for w, l in of]))
        margins.append(0.1 * np.mean([w[0] - l[0] for w, l in of]))
        right.append(np.mean([w[0] > l[0] for w, l in of]))
    sums = sums_by_us(ratios, lengths, loss_type=loss_type, answers=answers)
    means = {name: float(total / count) for name, (total, count) in sums.items()}
    assert sums["loss"][1] == 4
    assert means["loss"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert means["rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert means["rewards/accuracies"] == pytest.approx(np.mean(right), rel=1e-5)


def plackett_luce_by_hand(rewards, ranks):
    """-log prod_k exp r_k / (exp r_k + sum over answers below k): the product of the chances that
    each answer comes before all answers below it."""
    chance = 1.0
    for k in np.flatnonzero(ranks >= 0):
        below = [rewards[j] for j in range(len(ranks)) if ranks[j] > ranks[k]]
        chance *= np.exp(rewards[k]) / (np.exp(rewards[k]) + np.sum(np.exp(below)))
    return -np.log(chance)


@pytest.mark.slow
def test_plackett_luce_is_the_formula_of_the_paper():
    ratios, lengths = scores_of(1)
    wanted = [plackett_luce_by_hand(0.1 * h, r) for h, r in zip(ratios, RANKS, strict=True)]
    sums = sums_by_us(ratios, lengths, answers="plackett_luce", loss_type=["sigmoid", "sft"])
    nll = -np.mean(ratios[:, 0] / lengths[:, 0])
    assert float(sums["loss"][0]) / 4 == pytest.approx(np.mean(wanted) + nll, rel=1e-5)
    # without ties, over all orders, the probabilities add up to 1; equal rewards make them equal
    orders = np.array(list(itertools.permutations(range(4))))
    rewards = jnp.tile(jnp.float32([0.3, -1.2, 2.0, 0.1]), (24, 1))
    chances = np.exp(-preference.plackett_luce(rewards, jnp.asarray(orders)))
    assert chances.sum() == pytest.approx(1, abs=1e-5)
    equal = preference.plackett_luce(0 * rewards, jnp.asarray(orders))
    np.testing.assert_allclose(equal, np.log(24), rtol=1e-6)
    two = preference.plackett_luce(rewards[:1, :2], jnp.array([[0, 1]]))
    np.testing.assert_allclose(two, preference.sigmoid(*rewards[:1, :2].T, beta=1.0), rtol=1e-6)
    grads = jax.grad(lambda r: preference.plackett_luce(r, jnp.asarray(RANKS)).sum())(
        jnp.asarray(1e3 * ratios, jnp.float32)
    )
    assert np.isfinite(grads).all() and not grads[RANKS < 0].any()


def as_pairs(e, members):
    """Each pair of different ranks as an example of its own."""
    prompts, texts = [], []
    for i in members:
        own = [e.tokens[a:b] for a, b in itertools.pairwise(e.bounds[i, 1:].tolist())]
        for j, k in itertools.combinations(range(e.answers), 2):
            if -1 < e.ranks[i, j] < e.ranks[i, k]:
                prompts.append(e.tokens[e.bounds[i, 0] : e.bounds[i, 1]])
                texts.append([own[j], own[k]])
    return of_tokens(prompts, texts)


@pytest.mark.slow
def test_all_pairs_are_the_pairs_written_out(model, tmp_path):
    """The loss, the metrics and the gradients; every prompt has three answers without ties."""
    net, params = model
    texts = [" no", " yes, I like red", " I like Paris and blue and red"]
    rows = [
        {"prompt": f"what do you like {i}?", "answers": texts[i:] + texts[:i], "scores": [3, 2, 1]}
        for i in range(3)
    ]
    data = load(tiny.write_rows(tmp_path / "r.jsonl", rows), task="pair").train
    reference = -np.random.default_rng(0).uniform(20, 40, (3, 3)).astype(np.float32)
    known = {"ref_logps": reference, "ranks": data.ranks}
    together = Batches(data, 3, share_prompt=True, known=known)[0]
    apart = as_pairs(data, range(3))
    of_pairs = [reference[i, list(p)] for i in range(3) for p in ((0, 1), (0, 2), (1, 2))]
    separate = Batches(apart, 9, packing=False, known={"ref_logps": np.stack(of_pairs)})[0]
    config = DPOConfig(loss_type="sigmoid")

    def measure(batch, *names, **counts):
        loss_fn = dpo(net, config, **counts)
        arrays = first(batch, "ref_logps", *names)

        def mean(params):
            sums = loss_fn(params, None, arrays, None)
            means = {name: total / count for name, (total, count) in sums.items()}
            return means["loss"], means

        (_, means), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
        return means, grads

    means, grads = measure(together, "ranks", examples=3, answers=3)
    wanted, wanted_grads = measure(separate, examples=9)
    for name in wanted:
        np.testing.assert_allclose(means[name], wanted[name], rtol=1e-5, err_msg=name)
    equal_grads(wanted_grads, grads)


def test_a_pair_is_a_ranking_of_two():
    ratios, lengths = scores_of(2)
    ratios, lengths = ratios[:3, :2], lengths[:3, :2]
    ones = jnp.ones((3, 2))
    arrays = [jnp.asarray(x, jnp.float32) for x in (ratios, lengths)]
    scores, ref = AnswerScores(*arrays, ones, ones, ones), jnp.zeros((3, 2))
    usual = dpo_sums(scores, ref, DPOConfig())
    for answers in ("all_pairs", "best_rest", "best_worst", "plackett_luce"):
        sums = dpo_sums(scores, ref, DPOConfig(answers=answers))
        jax.tree.map(np.testing.assert_array_equal, sums, usual)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "ipo"}, "plackett_luce takes the place of sigmoid, not of ipo"),
        ({"label_smoothing": 0.1}, "dpo.label_smoothing: applies to pairs, and plackett_luce"),
        ({"use_weighting": True}, "dpo.use_weighting: applies to pairs"),
        ({"loss_type": "kto"}, "dpo.answers: applies to pairs only; leave it out"),
    ],
)
def test_plackett_luce_is_refused_beside_what_is_of_pairs(options, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(answers="plackett_luce", **options)


# Reward models


@pytest.mark.slow
def test_rewards_of_answers_are_those_of_the_pairs_written_out(tmp_path):
    """Ouyang et al. (2022), eq. 1, with ties and missing answers; and its gradients."""
    tiny.save(tmp_path / "judge", tiny.CONFIGS["gpt2"])
    origin = pretrained.find(str(tmp_path / "judge"))
    net = model_of(origin.config, "judge", scorer=True)
    params = origin.load(net, make_mesh("fsdp=-1"), head_key=jax.random.key(0))
    plan = ranked_batches(tmp_path, share_prompt=True)
    e, members = plan.examples, plan.members(0)
    batch = replace(plan, known={"ranks": e.ranks})[0]
    config = RewardConfig(margin=0.2, center_rewards_coefficient=0.1)
    apart = as_pairs(e, members)
    shares = np.concatenate([np.full(n, 1 / n) for n in _pair_counts(e, members)])
    known = {"weights": shares.astype(np.float32)}
    separate = Batches(apart, len(apart), packing=False, known=known)[0]

    def measure(batch, *names, **counts):
        loss_fn, arrays = reward(net, config, **counts), first(batch, *names)

        def total(params):
            sums = loss_fn(params, None, arrays, None)
            return sums["loss"][0], sums

        (loss, sums), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return float(loss), sums, grads

    loss, sums, grads = measure(batch, "ranks", examples=4, answers=4)
    wanted, _, wanted_grads = measure(separate, "weights", examples=len(apart), answers=2)
    assert loss == pytest.approx(wanted, rel=1e-5) and sums["loss"][1] == 4
    equal_grads(wanted_grads, grads)
    scores = np.asarray(sums["examples"]["scores"])
    by_hand, right = [], []
    for own, ranks in zip(scores, e.ranks[members], strict=True):
        pairs = pairs_by_hand(own, ranks)
        by_hand.append(
            np.mean([
                np.log1p(np.exp(-(own[i] - own[j] - 0.2))) + 0.1 * (own[i] + own[j]) ** 2
                for i, j in pairs
            ])
        )  # fmt: skip
        right.append(np.mean([own[i] > own[j] for i, j in pairs]))
    assert loss / 4 == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert float(sums["accuracy"][0]) == pytest.approx(np.sum(right), rel=1e-5)
    auc = reward_summary(jax.tree.map(np.asarray, sums["examples"]))["auc"]
    better, worse = scores[e.ranks[members] == 0], scores[e.ranks[members] > 0]
    wins = [(b > w) + (b == w) / 2 for b in better for w in worse]
    assert auc == pytest.approx(np.mean(wins))


def _pair_counts(e, members):
    return [len(pairs_by_hand(None, [*e.ranks[i], *[-1] * 4][:4])) for i in members]


# Runs


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    models = {kind: tiny.CONFIGS[kind] for kind in ("gpt2", "llama")}
    return tiny.ground(tmp_path_factory.mktemp("ground"), models, ranked=tiny.ranked_rows(24))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_a_run_learns_the_order_however_it_is_laid_out(task, ground, tmp_path, devices):
    """On one device with each answer in a row of its own; on two, accumulated, packed and with
    prompts shared."""
    args = (task, ground / "llama", ground / "ranked.jsonl")
    options = {"max_steps": 5, "optimizer.learning_rate": 3e-3}
    options |= {"dpo.answers": "plackett_luce", "data.eval": 4} if task == "dpo" else {}
    apart = {"data.share_prompt": "never", "data.packing": False}
    rows, params = train(*args, tmp_path / "apart", **options, **apart)
    if task == "dpo":
        start, end = rows[0], rows[-1]
        assert start["rewards/margins"] == 0 and start["loss"] > np.log(2)
        assert end["eval_loss"] < start["eval_loss"] and end["eval_rewards/margins"] > 0
    devices(2)
    divided = {"mesh": "fsdp=2", "gradient_accumulation_steps": 2}
    divided["data.share_prompt"] = "always"
    other_rows, other_params = train(*args, tmp_path / "divided", **options, **divided)
    for name in ("loss", "eval_loss", "accuracy", "rewards/margins"):
        ours, theirs = ([r[name] for r in logged if name in r] for logged in (other_rows, rows))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    close(params, other_params, atol=1e-4)


def test_a_prompt_is_shared_where_it_costs_less(ground, tmp_path):
    """XLA's attention costs much in a tiny model, so rows with long answers are cheaper apart;
    tiles cost the same in any row."""
    scored = {"answers": [f" red and blue and red and blue {i}" for i in range(4)], "scores": FIRST}
    short = [{"prompt": f"what? {i}", **scored} for i in range(8)]
    scored = {"answers": FOUR, "scores": FIRST}
    long = [{"prompt": f"{i}: " + 6 * "red and blue ", **scored} for i in range(8)]

    def plan(name, share, attention="xla"):
        options = {"data.share_prompt": share, "model.attention": attention}
        args = (ground / "gpt2", tmp_path / f"{name}.jsonl", tmp_path / "x")
        return prepare(*configure("dpo", *args, **options)).batches

    for name, rows in {"short": short, "long": long}.items():
        tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
        auto, always, never = (plan(name, share) for share in ("auto", "always", "never"))
        assert always.share_prompt and not never.share_prompt
        assert auto.sampled_cost() == min(always.sampled_cost(), never.sampled_cost())
        assert auto.share_prompt == (name == "long")
        assert plan(name, "auto", "tiles").share_prompt


def test_lengths_of_more_than_two_answers_are_not_compared(ground, tmp_path):
    with pytest.raises(ConfigError, match="dpo.ld_alpha: compares the lengths of two answers"):
        train("dpo", ground / "gpt2", ground / "ranked.jsonl", tmp_path, **{"dpo.ld_alpha": 0.5})
