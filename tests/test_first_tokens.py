"""The first token of an example has no token before it: no layout may learn it from a neighbour."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easyaira.algorithms.dpo import answer_scores
from easyaira.algorithms.sft import sft
from easyaira.data.batches import Batches
from helpers import tiny
from helpers.examples import load

WORDS = "the capital of France is Paris what do you like I like red and blue yes no".split()
LAYOUTS = {
    "packed": {"packing": True},
    "not packed": {"packing": False},
    "shared prompt": {"packing": True, "share_prompt": True},
}


ROWS, WIDTH = 16, 64  # of every batch here, with padding, so that one program serves all


def arrays_of(batch):
    """Of the first micro-batch, padded."""

    def padded(array):
        if array.ndim < 3:
            return array[0]
        room = [(0, most - size) for most, size in zip((ROWS, WIDTH), array.shape[1:], strict=True)]
        return np.pad(array[0], room)

    return {name: jnp.asarray(padded(array)) for name, array in batch.arrays.items()}


def text(rng, shortest=1):
    return " ".join(rng.choice(WORDS, rng.integers(shortest, 6)))


def some_prompt(rng, number):
    return "" if number % 2 else text(rng) + " "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights in PyTorch and in JAX."""
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = tiny.save(folder, tiny.CONFIGS["gpt2"])
    return theirs, *tiny.load(folder)


def logps_alone(theirs, tokens):
    """log p of each token but the first, of this sequence alone."""
    logps = theirs(torch.tensor([tokens])).logits.log_softmax(-1)[0]
    return logps[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def ids(text):
    return tiny.tokenizer()(text).input_ids if text else []


SFT = {
    "conversations": {},
    "the prompt, too": {"sft": {"completion_only_loss": False}},
    "cut at the start": {"max_length": 8, "truncation": "keep_end", "max_dropped": 0.9},
    "cut, with the prompt": {"sft": {"completion_only_loss": False}, "max_prompt_length": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "not packed"])
@pytest.mark.parametrize("case", SFT)
def test_sft_learns_each_sequence_as_if_alone(case, layout, models, tmp_path):
    theirs, model, params = models
    rng = np.random.default_rng(0)
    pairs = [(some_prompt(rng, i), text(rng)) for i in range(12)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    examples = load(tiny.write_rows(tmp_path / "a.jsonl", rows), **SFT[case]).train
    batch = Batches(examples, len(examples), **LAYOUTS[layout])[0]
    loss_of = lambda params, arrays: sft(model)(params, None, arrays, None)["loss"]  # noqa: E731
    loss_and_grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, count), grads = loss_and_grads(params, arrays_of(batch))

    wanted, number = 0.0, 0
    for row in examples.rows:
        prompt, answer = ids(pairs[row][0]), [*ids(pairs[row][1]), 0]
        if case == "cut at the start":
            prompt = prompt[max(len(prompt) + len(answer) - 8, 0) :]
        if case == "cut, with the prompt":
            prompt = prompt[-3:]
        whole = "sft" in SFT[case] or not prompt
        logps = logps_alone(theirs, [*prompt, *answer])[0 if whole else len(prompt) - 1 :]
        wanted, number = wanted - logps.sum(), number + len(logps)
    theirs.zero_grad()
    wanted.backward()
    assert int(count) == number == examples.learned_counts.sum()
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)
    gradients = tiny.as_theirs(model, grads)
    for name, parameter in theirs.named_parameters():
        size = max(float(parameter.grad.abs().max()), 1.0)
        assert np.abs(gradients[name] - parameter.grad.numpy()).max() < 1e-5 * size, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_a_pair_is_scored_as_its_answers_alone(layout, models, tmp_path):
    theirs, model, params = models
    rng = np.random.default_rng(1)
    rows = [
        {"prompt": some_prompt(rng, i), "chosen": text(rng, 2), "rejected": text(rng, 2) + "?"}
        for i in range(8)
    ]
    examples = load(tiny.write_rows(tmp_path / "a.jsonl", rows), task="pair").train
    batch = Batches(examples, 8, **LAYOUTS[layout])[0]
    scored = jax.jit(lambda params, arrays: answer_scores(model, params, arrays, examples=8))
    scores = jax.tree.map(np.asarray, scored(params, arrays_of(batch)))
    for example, (_, slot) in zip(batch.examples, batch.slots, strict=True):
        row = rows[examples.rows[example]]
        prompt = ids(row["prompt"])
        for side, name in enumerate(("chosen", "rejected")):
            logps = logps_alone(theirs, [*prompt, *ids(row[name]), 0])[max(len(prompt) - 1, 0) :]
            assert scores.lengths[slot, side] == len(logps)
            np.testing.assert_allclose(scores.logps[slot, side], logps.sum().item(), rtol=1e-5)
            np.testing.assert_allclose(scores.ends[slot, side], logps[-1].item(), rtol=1e-4)
