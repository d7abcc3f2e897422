"""The sampler: the tokens of transformers, the log-probabilities of training, and answers that
depend on nothing but their prompt, number and seed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from transformers.generation import logits_process as theirs

from easyaira.distributed.mesh import make_mesh
from easyaira.errors import WeightsError
from easyaira.generation import processors, sampler
from easyaira.generation.processors import Sampling, largest, process
from easyaira.generation.sampler import Sampler, generate
from easyaira.losses.token_logps import token_logps
from easyaira.models.registry import MODELS
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.runs import configure

DRAWN = Sampling(max_new_tokens=20, temperature=1.0, end_ids=tuple(range(12)))


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, tiny.VOCAB, length).tolist() for length in lengths]


def test_each_decoder_has_a_tiny_model():
    decoders = {kind for kind, architecture in MODELS.items() if not architecture.encoder}
    assert decoders <= {config["model_type"] for config in tiny.CASES.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*tiny.CONFIGS, *tiny.FAMILIES, "opt-350m", "llama-3.1"])
def test_greedy_answers_are_those_of_transformers(name, tmp_path):
    """With prompts of uneven lengths, which no padding separates from their answers."""
    reference = tiny.save(tmp_path, tiny.CASES[name])
    model, params = tiny.load(tmp_path)
    prompts = prompts_of(3, 17, 1, 30, 62, 9)
    limit, end = 30, 5
    answers = generate(model, params, prompts, Sampling(max_new_tokens=limit, end_ids=(0, end)))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        wanted = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(limit, 64 - len(prompt)),
            eos_token_id=[0, end],
            pad_token_id=1,
        )
        assert answer.tokens == wanted[0, len(prompt) :].tolist()
        assert answer.reason == ("end" if answer.tokens[-1] in (0, end) else "length")
    longest = max(range(len(prompts)), key=lambda i: len(answers[i].tokens))
    prompt, answer = prompts[longest], answers[longest]
    with torch.no_grad():
        logps = reference(torch.tensor([prompt + answer.tokens])).logits[0].log_softmax(-1)
    wanted = logps[len(prompt) - 1 : -1].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    np.testing.assert_allclose(answer.logps, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.save(folder, tiny.CONFIGS["llama"])
    return folder


@pytest.fixture(scope="module")
def llama(folder):
    return tiny.load(folder)


def teacher_forced(llama, prompt, answer):
    """Logits [n, V] and log-probabilities [n] of an answer by the forward pass of training."""
    model, params = llama
    start, end = len(prompt), len(prompt) + len(answer.tokens)
    tokens = jnp.array([(prompt + answer.tokens + [0] * 64)[:64]])

    @jax.jit
    def forward(params, tokens):
        hidden, head = model.apply(params, tiny.layout(tokens))
        sizes = model.head_options
        logps = token_logps(hidden, head, tokens, **sizes).logps
        return model.logits(hidden, head.astype(hidden.dtype))[0], logps[0]

    logits, logps = map(np.asarray, forward(params, tokens))
    return logits[start - 1 : end - 1], logps[start:end]


@pytest.mark.slow
def test_the_cache_changes_nothing_at_any_of_its_sizes(llama, monkeypatch):
    monkeypatch.setattr(sampler, "FEWEST_SLOTS", 8)
    monkeypatch.setattr(sampler, "SLOTS_AT_ONCE", 0)
    prompts = prompts_of(12, 19)
    greedy = Sampler(llama[0], Sampling(max_new_tokens=100), steps=4)
    sizes = []
    decode = greedy.programs.decode

    def noted(weights, state, *given):
        sizes.append(jax.tree.leaves(state.cache)[0].shape[2])
        return decode(weights, state, *given)

    greedy.programs.decode = noted
    answers = dict(greedy.answers(greedy.weights(llama[1]), prompts))
    assert sizes == sorted(sizes) and len(set(sizes)) >= 4
    for number, prompt in enumerate(prompts):
        answer = answers[number]
        assert len(prompt + answer.tokens) == 64 and answer.reason == "length"
        logits, logps = teacher_forced(llama, prompt, answer)
        assert answer.tokens == logits.argmax(-1).tolist()
        np.testing.assert_allclose(answer.logps, logps, atol=1e-5)


def test_few_rows_have_the_slots_of_their_longest_answer_at_once(llama):
    """So that one program decodes them."""
    few = Sampler(llama[0], Sampling(max_new_tokens=60), steps=4)
    sizes = set()
    decode = few.programs.decode

    def noted(weights, state, *given):
        sizes.add(jax.tree.leaves(state.cache)[0].shape[2])
        return decode(weights, state, *given)

    few.programs.decode = noted
    list(few.answers(few.weights(llama[1]), prompts_of(3, 20)))
    assert sizes == {few.largest_cache([3, 20])[1]} == {64}


@pytest.fixture(scope="module")
def drawn(llama):
    """Prompts and their answers, all in one batch."""
    prompts = prompts_of(9, 15, 3, 14, 12, 5)
    sampler = Sampler(llama[0], DRAWN)
    return prompts, dict(sampler.answers(sampler.weights(llama[1]), prompts, num_samples=2, seed=3))


def tokens_of(answers):
    return {number: answer.tokens for number, answer in answers.items()}


@pytest.mark.slow
def test_answers_have_uneven_lengths_and_the_log_probabilities_of_training(llama, drawn):
    prompts, answers = drawn
    assert len({len(answer.tokens) for answer in answers.values()}) > 4
    assert {answer.reason for answer in answers.values()} == {"end", "length"}
    for number, answer in answers.items():
        _, logps = teacher_forced(llama, prompts[number // 2], answer)
        np.testing.assert_allclose(answer.logps, logps, atol=1e-5)
        assert (answer.content == answer.tokens) == (answer.reason == "length")


@pytest.mark.slow
def test_no_batch_changes_an_answer(llama, drawn):
    """Neither its size, nor refills of it, nor other prompts in it, nor where it begins."""
    prompts, answers = drawn
    narrow = Sampler(llama[0], DRAWN, rows=4, steps=3)
    weights = narrow.weights(llama[1])
    narrower = dict(narrow.answers(weights, prompts, num_samples=2, seed=3))
    assert tokens_of(narrower) == tokens_of(answers)
    later = dict(narrow.answers(weights, prompts, num_samples=2, seed=3, first=7))
    assert tokens_of(later) == tokens_of({n: a for n, a in answers.items() if n >= 7})
    mates = [*prompts_of(30, 2, seed=1), *prompts[2:]]
    others = dict(narrow.answers(weights, mates, num_samples=2, seed=3))
    assert {n: a.tokens for n, a in others.items() if n >= 4} == tokens_of(
        {n: a for n, a in answers.items() if n >= 4}
    )
    other_seed = dict(narrow.answers(weights, prompts[:1], num_samples=2, seed=4))
    assert all(other_seed[n].tokens != answers[n].tokens for n in other_seed)


@pytest.mark.slow
def test_fewer_rows_change_no_answer(llama, drawn, monkeypatch):
    monkeypatch.setattr(sampler, "FEWEST_ROWS", 2)
    fewer = Sampler(llama[0], DRAWN, steps=3)
    sizes, decode = [], fewer.programs.decode

    def noted(weights, state, *given):
        sizes.append(len(state.tokens))
        return decode(weights, state, *given)

    fewer.programs.decode = noted
    prompts, answers = drawn
    fewest = dict(fewer.answers(fewer.weights(llama[1]), prompts, num_samples=2, seed=3))
    assert tokens_of(fewest) == tokens_of(answers)
    assert sizes == sorted(sizes, reverse=True)
    assert {6, 8, 12} <= {*sizes} <= {*sampler._sizes(16)}


def test_rows_have_two_sizes_per_doubling_on_one_cpu_and_powers_of_two_elsewhere(devices):
    assert sampler._sizes(4) == [4]
    assert sampler._sizes(64) == [64, 48, 32, 24, 16, 12, 8]
    devices(2)
    with jax.set_mesh(make_mesh("fsdp=2")):
        assert sampler._sizes(64) == [64, 32, 16, 8]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(), ("dp",), (None, "dp")])
def test_the_largest_logits_of_several_devices_are_kept(axes, devices):
    """XLA aborted the process."""
    devices(2)
    logits = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    sharding = jax.NamedSharding(make_mesh("dp=2"), jax.P(*axes))
    kept = jax.jit(lambda x: processors.keep_top_k(x, 5))(jax.device_put(logits, sharding))
    wanted = np.where(logits < np.sort(logits)[:, -5:-4], -np.inf, logits)
    np.testing.assert_array_equal(kept, wanted)


def test_no_mesh_changes_an_answer(folder, drawn, devices):
    devices(8)
    mesh = "dp=2,fsdp=2,tp=2"
    model, params = tiny.load(folder, mesh)
    prompts, answers = drawn
    with model.on(make_mesh(mesh)):
        divided = generate(model, params, prompts, DRAWN, num_samples=2, seed=3)
    assert tokens_of(dict(enumerate(divided))) == tokens_of(answers)


def test_samples_of_a_prompt_share_its_prefill(llama, monkeypatch):
    narrow = Sampler(llama[0], DRAWN, rows=4, steps=3)
    computed = []
    prefill = narrow.programs.prefill
    narrow.programs.prefill = lambda *given: computed.append(given[1].shape[0]) or prefill(*given)
    answers = dict(narrow.answers(narrow.weights(llama[1]), prompts_of(5, 9), num_samples=5))
    assert sorted(answers) == list(range(10)) and sum(computed) == 2
    assert len({tuple(answer.tokens) for answer in answers.values()}) == 10


@pytest.mark.slow
def test_a_penalty_knows_prompt_and_answer_and_an_answer_may_have_to_be_long(folder, llama):
    """As in transformers: no row knows the tokens of the row that had its place before."""
    reference = AutoModelForCausalLM.from_pretrained(folder)
    prompts = prompts_of(9, 4, 20)
    options = {"repetition_penalty": 1.4, "max_new_tokens": 16, "min_new_tokens": 6}
    ends = tuple(range(40))
    narrow = Sampler(llama[0], Sampling(**options, end_ids=ends), rows=2)
    answers = dict(narrow.answers(narrow.weights(llama[1]), prompts))
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 1, "do_sample": False}
        wanted = reference.generate(ids, **options, **given, eos_token_id=list(ends))
        assert answers[number].tokens == wanted[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_a_stop_string_ends_an_answer_where_transformers_ends_it(folder, llama):
    reference, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    prompt = prompts_of(9)
    free = generate(*llama, prompt, Sampling(max_new_tokens=20))[0].tokens
    stop = tokenizer.decode(free[6:9])[1:-1]
    assert stop
    ids = torch.tensor(prompt)
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 1, "do_sample": False}
    wanted = reference.generate(
        ids, max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer, **given
    )
    sampling = Sampling(max_new_tokens=20, stop_strings=("no such text", stop))
    stopping = Sampler(llama[0], sampling, text=tokenizer.decode)
    ((_, answer),) = stopping.answers(stopping.weights(llama[1]), prompt)
    assert answer.tokens == wanted[0, 9:].tolist() and answer.reason == "stop"
    assert len(answer.logps) == len(answer.tokens) < 20


@pytest.mark.slow
def test_weights_that_are_not_finite_are_named(llama):
    model, params = llama

    def broken_of(leaf):
        leaf = np.array(leaf)
        leaf[0] = np.nan
        return jnp.asarray(leaf)

    broken = jax.tree.map(broken_of, params)
    with pytest.raises(WeightsError, match="logits are not finite"):
        generate(model, broken, prompts_of(4), Sampling(max_new_tokens=2))


@pytest.mark.slow
def test_bfloat16_answers_have_the_log_probabilities_of_its_own_training_forward(llama):
    model, params = llama[0].with_dtype("bfloat16"), llama[1]
    (prompt,) = prompts_of(7)
    (answer,) = generate(model, params, [prompt], Sampling(max_new_tokens=12))
    _, logps = teacher_forced((model, params), prompt, answer)
    np.testing.assert_allclose(answer.logps, logps, atol=0.1)  # 8 bits of mantissa


@pytest.mark.slow
def test_adapters_on_a_quantised_base_generate_what_their_training_forward_says(folder, tmp_path):
    rows = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    flags = ["--lora.r=4", "--lora.target_modules=all-linear", "--lora.quantize=nf4"]
    flags += ["--lora.dora=true"]
    setup = prepare(*configure("sft", folder, rows, tmp_path / "run", *flags))
    (prompt,) = prompts_of(5)
    with setup.model.on(setup.mesh):
        adapters = jax.jit(partial(jax.tree.map, lambda leaf: leaf + 0.1))(setup.trainable.start())
        params = setup.trainable.weights(adapters)
        (answer,) = generate(setup.model, params, [prompt], Sampling(max_new_tokens=12))
        logits, logps = teacher_forced((setup.model, params), prompt, answer)
    assert answer.tokens == logits.argmax(-1).tolist()
    np.testing.assert_allclose(answer.logps, logps, atol=1e-5)


# Processors


def test_of_equal_logits_the_first_is_the_largest():
    logits = jnp.array([[0.0, 2.0, 2.0], [-jnp.inf, -1.0, -jnp.inf], [3.0, 3.0, 3.0]])
    assert largest(logits).tolist() == logits.argmax(-1).tolist() == [1, 1, 0]


PROCESSORS = {
    "temperature": ({"temperature": 0.7}, lambda: [theirs.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 7}, lambda: [theirs.TopKLogitsWarper(7)]),
    "top_k 1": ({"top_k": 1}, lambda: [theirs.TopKLogitsWarper(1)]),
    "top_k above": ({"top_k": 99}, lambda: [theirs.TopKLogitsWarper(99)]),
    "top_p": ({"top_p": 0.6}, lambda: [theirs.TopPLogitsWarper(0.6)]),
    "top_p 1e-9": ({"top_p": 1e-9}, lambda: [theirs.TopPLogitsWarper(1e-9)]),
    "top_p 0.999": ({"top_p": 0.999}, lambda: [theirs.TopPLogitsWarper(0.999)]),
    "min_p": ({"min_p": 0.1}, lambda: [theirs.MinPLogitsWarper(0.1)]),
    "penalty": (
        {"repetition_penalty": 1.7},
        lambda: [theirs.RepetitionPenaltyLogitsProcessor(1.7)],
    ),
    "min_new_tokens": (
        {"min_new_tokens": 3, "end_ids": (4, 11)},
        lambda: [theirs.MinNewTokensLengthLogitsProcessor(6, 3, [4, 11])],
    ),
    "all": (
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
        lambda: [
            theirs.RepetitionPenaltyLogitsProcessor(1.2),
            theirs.TemperatureLogitsWarper(1.3),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.8),
            theirs.MinPLogitsWarper(0.05),
        ],
    ),
}


def both(name, logits):
    """Logits processed by us and by transformers, for rows with 6 + 2 tokens."""
    options, of_theirs = PROCESSORS[name]
    sampling = Sampling(**{"temperature": 1.0} | options)
    rng = np.random.default_rng(1)
    rows, size = logits.shape
    ids = rng.integers(0, size, (rows, 8))
    seen = np.zeros(logits.shape, bool)
    seen[np.arange(rows)[:, None], ids] = True
    counts = np.full(rows, 2, np.int32)
    ours = jax.jit(process, static_argnums=1)(logits, sampling, seen, counts)
    wanted = LogitsProcessorList(of_theirs())(torch.tensor(ids), torch.tensor(logits))
    return np.asarray(ours), wanted.numpy()


@pytest.mark.parametrize("name", PROCESSORS)
def test_processed_logits_are_those_of_transformers(name):
    logits = np.random.default_rng(0).normal(0, 2, (8, 50)).astype(np.float32)
    logits[0, :10] = -0.0
    logits[1] = np.round(logits[1])  # ties
    ours, wanted = both(name, logits)
    if "top_p" in name or name == "all":  # which of several equal logits stay is not defined there
        ours, wanted = (np.sort(each[1:], -1) for each in (ours, wanted))
    assert np.array_equal(np.isfinite(ours), np.isfinite(wanted))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_draws_have_the_exact_distribution(name):
    """Chi-square of 20,000 draws against transformers' processors, normalised or not."""
    logits = np.random.default_rng(2).normal(0, 1.5, (8, 50)).astype(np.float32)
    ours, wanted = (each[:1] for each in both(name, logits))
    normed = theirs.LogitNormalization()(None, torch.tensor(wanted))
    exact = normed.double().softmax(-1)[0].numpy()
    rows, places = np.divmod(np.arange(20_000), 100)

    @jax.jit
    def draw(ours, rows, places):
        numbers = processors.uniform(0, rows, places)
        return processors.draw(jnp.broadcast_to(ours, (20_000, 50)), numbers)

    tokens = draw(ours, rows, places)
    counts = np.bincount(np.asarray(tokens), minlength=50)
    assert counts[exact == 0].sum() == 0
    often = exact * 20_000 >= 5
    pooled = [np.append(each[often], each[~often].sum()) for each in (counts, exact * 20_000)]
    kept = pooled[1] > 0
    if kept.sum() > 1:
        observed, expected = (each[kept] for each in pooled)
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_a_draw_never_takes_a_token_without_probability():
    logits = np.full((4, 300), -np.inf, np.float32)
    logits[:, [3, 200, 299]] = 0
    uniform = np.array([0.0, 0.34, 0.999, 1 - 2**-24], np.float32)
    assert jax.jit(processors.draw)(logits, uniform).tolist() == [3, 200, 299, 299]


@pytest.mark.parametrize("size", [64, 2**15])
def test_equal_logits_are_cut_to_the_share_by_their_ids(size):
    """A large vocabulary is cut a few rows at a time, and in blocks."""
    sampling, rng = dataclasses.replace(DRAWN, top_p=0.25), np.random.default_rng(0)
    logits = np.full((8, size), -np.inf, np.float32)
    wanted = logits.copy()
    for row in range(4):
        ids = np.sort(rng.permutation(size)[: size >> row])
        logits[row, ids], wanted[row, ids[: len(ids) // 4]] = row, row
    logits[4:], wanted[4:] = logits[:4], wanted[:4]
    kept = jax.jit(process, static_argnums=1)(logits, sampling)
    np.testing.assert_array_equal(kept, wanted)


def test_no_cut_off_sorts_the_vocabulary():
    sampling = Sampling(temperature=1.0, top_k=7, top_p=0.9, min_p=0.1)
    logits = jnp.zeros((2, 500))
    program = jax.jit(process, static_argnums=1).lower(logits, sampling).compile().as_text()
    assert "TopK" in program and " sort(" not in program


@pytest.mark.slow
def test_the_random_numbers_are_those_of_seed_row_and_place(llama):
    """The formula in the test: two folds of the seed's key, inverted cumulative distribution."""
    model, params = llama
    (prompt,) = prompts_of(6)
    answers = generate(model, params, [prompt], DRAWN, num_samples=3, seed=9)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def uniform(number, place):
        fold = jax.random.fold_in
        return jax.random.uniform(fold(fold(jax.random.key(9), number), place))

    for number, answer in enumerate(answers):
        logits, _ = teacher_forced(llama, prompt, answer)
        probs = np.exp(logits.astype(np.float64))
        sums = (probs / probs.sum(-1, keepdims=True)).cumsum(-1)
        numbers = uniform(number, np.arange(20))[: len(answer.tokens)]
        assert answer.tokens == (sums <= np.array(numbers)[:, None]).sum(-1).tolist()
