"""Log-probabilities against torch, preference losses against formulas written out here."""

import inspect
import math
from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.trainer_pt_utils import LabelSmoother

from easyaira.algorithms.dpo import AnswerScores, dpo_sums
from easyaira.algorithms.sft import sft
from easyaira.config.algorithms import SFTConfig
from easyaira.config.dpo import LOSSES, SMOOTHED_LOSSES, DPOConfig
from easyaira.errors import ConfigError
from easyaira.losses import chunks, preference, token_logps

ROWS, LENGTH, WIDTH, VOCAB, COLUMNS = 3, 17, 8, 100, 128


def head_and_hidden():
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (ROWS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(0, 1, (WIDTH, COLUMNS)).astype(np.float32)  # the padding is not zero here
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH))
    return hidden, head, tokens


def test_cached_logit_gradients_have_the_same_size_in_16_bits_as_in_32(monkeypatch):
    """In whole groups, on a CPU of three chunks."""
    few = [chunks.sizes_of(10**5, 50_304, itemsize) for itemsize in (4, 2)]
    assert few == [(256, 3, 9), (256, 3, 18)]
    assert few[0].kept * 256 * 50_304 * 4 <= 16 * chunks.CHUNK_LOGITS
    assert chunks.sizes_of(300, 50_304, 2) == (256, 2, 2)  # no more than there are
    monkeypatch.setattr(chunks, "on_cpu", lambda: False)
    assert chunks.sizes_of(10**5, 50_304, 2) == (667, 1, 8)


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("at_once", [10**6, 15, 7, 1])  # all, some or few chunks are kept
def test_token_logps_equal_torch_whatever_the_chunks(at_once, share):
    hidden, head, tokens = head_and_hidden()
    rng = np.random.default_rng(1)
    weights = rng.normal(0, 1, (ROWS, LENGTH)).astype(np.float32)
    wanted = rng.random((ROWS, LENGTH)) < share
    weights *= wanted

    def ours(hidden, head, tokens, wanted, weights):
        out = token_logps.token_logps(
            *(hidden, head, tokens, wanted),
            vocab_size=VOCAB,
            cap=None,
            chunk_logits=at_once * COLUMNS,
        )
        return (out.logps * weights).sum(), out

    of_ours = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    (value, out), grads = of_ours(hidden, head, tokens, wanted, weights)
    out = jax.tree.map(np.asarray, out)
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    logits = (h @ w)[:, :-1, :VOCAB]
    logps = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, 1:, None])[..., 0]
    theirs = (logps * torch.tensor(weights[:, 1:])).sum()
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    hits = logits.argmax(-1) == torch.tensor(tokens)[:, 1:]
    shown = wanted[:, 1:]
    for actual, expected in (
        (out.logps, logps),
        (out.mean_logits, logits.mean(-1)),
        (out.entropy, entropy),
        (out.is_top1, hits.float()),
        (out.log_sum_sq_probs, (logits.softmax(-1) ** 2).sum(-1).log()),
    ):
        assert not np.asarray(actual[:, 0]).any() and not np.asarray(actual[:, 1:])[~shown].any()
        expected = expected.detach().numpy()
        np.testing.assert_allclose(actual[:, 1:][shown], expected[shown], rtol=1e-5, atol=1e-5)
    for ours_grad, parameter in zip(grads, (h, w), strict=True):
        np.testing.assert_allclose(ours_grad, parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("at_once", [10**6, 7, 1])
@pytest.mark.slow
def test_the_sums_gradient_in_the_forward_pass_equals_that_of_the_parts(at_once, share):
    """With a factor in front, and beside another use of the hidden states."""
    hidden, head, tokens = head_and_hidden()
    wanted = np.random.default_rng(1).random((ROWS, LENGTH)) < share
    kwargs = {"vocab_size": VOCAB, "cap": None, "chunk_logits": at_once * COLUMNS}

    def by_sum(hidden, head, *learned):
        nll, out = token_logps.token_nll(hidden, head, *learned, **kwargs)
        return 2.5 * nll + (hidden**2).sum(), out

    def by_parts(hidden, head, *learned):
        out = token_logps.token_logps(hidden, head, *learned, **kwargs)
        return -2.5 * out.logps.sum() + (hidden**2).sum(), out

    def compared(*given):
        both = (jax.value_and_grad(f, (0, 1), has_aux=True)(*given) for f in (by_sum, by_parts))
        return *both, token_logps.token_nll(*given, **kwargs)[0]  # the last without a gradient

    by_sum_and_parts = jax.jit(compared)(hidden, head, tokens, wanted)
    ((value, out), grads), ((wanted_value, parts), wanted_grads), evaluated = by_sum_and_parts
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, out, parts)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evaluated, -parts.logps.sum(), rtol=1e-6)


@pytest.mark.parametrize("at_once", [10**6, 1])  # all chunks are kept, or few
@pytest.mark.parametrize("core", [token_logps.token_logps, token_logps.token_nll])
def test_soft_caps_of_logits_equal_torch(core, at_once):
    hidden, head, tokens = head_and_hidden()
    kwargs = {"vocab_size": VOCAB, "cap": 2.0, "chunk_logits": at_once * COLUMNS}

    def ours(hidden, head, tokens):
        out = core(hidden, head, tokens, **kwargs)
        nll, parts = out if core is token_logps.token_nll else (-out.logps.sum(), out)
        return nll, parts

    of_ours = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    (value, out), grads = of_ours(hidden, head, tokens)
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    logits = 2 * torch.tanh((h @ w)[:, :-1, :VOCAB] / 2)
    logps = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, 1:, None])[..., 0]
    (-logps.sum()).backward()
    np.testing.assert_allclose(value, -logps.sum().item(), rtol=1e-5)
    np.testing.assert_allclose(out.mean_logits[:, 1:], logits.mean(-1).detach(), atol=1e-5)
    for ours_grad, parameter in zip(grads, (h, w), strict=True):
        np.testing.assert_allclose(ours_grad, parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core", [token_logps.token_logps, token_logps.token_nll])
def test_memory_does_not_grow_with_the_vocabulary(core):
    """Besides the head and its gradient, which the caller holds, only chunks of logits."""

    def held(columns):
        hidden = jax.ShapeDtypeStruct((8, 513, 32), jnp.float32)
        head = jax.ShapeDtypeStruct((32, columns), jnp.float32)
        tokens = jax.ShapeDtypeStruct((8, 513), jnp.int32)

        def total(hidden, head, tokens):
            out = core(hidden, head, tokens, vocab_size=columns, cap=None, chunk_logits=2**21)
            return out.logps.sum() if core is token_logps.token_logps else out[0]

        step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        memory = step.lower(hidden, head, tokens).compile().memory_analysis()
        return memory.temp_size_in_bytes - 2 * 4 * 32 * columns

    small, large = held(8_192), held(65_536)
    assert large < 1.1 * small
    assert large < 8 * 512 * 65_536  # a tenth of what full logits and their gradient take


def test_padding_of_the_vocabulary_has_no_probability():
    hidden, head, tokens = head_and_hidden()
    head[:, VOCAB:] = 50 * np.sign(hidden[0, 0])[:, None]  # would win every softmax
    hidden, head, tokens = map(jnp.asarray, (hidden, head, tokens))
    cut = token_logps.token_logps(hidden, head[:, :VOCAB], tokens, vocab_size=VOCAB, cap=None)
    padded = token_logps.token_logps(hidden, head, tokens, vocab_size=VOCAB, cap=None)
    for a, b in zip(cut, padded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_log_softmax_is_float32_for_bfloat16_states():
    hidden, head, tokens = map(jnp.asarray, head_and_hidden())
    low = token_logps.token_logps(
        hidden.astype(jnp.bfloat16), head, tokens, vocab_size=VOCAB, cap=None
    ).logps
    rounded = hidden.astype(jnp.bfloat16).astype(jnp.float32)
    rounded_head = head.astype(jnp.bfloat16).astype(jnp.float32)
    high = token_logps.token_logps(rounded, rounded_head, tokens, vocab_size=VOCAB, cap=None).logps
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=1e-5, atol=1e-5)


def test_pair_sums_by_pair_and_side():
    segments = np.array([[1, 1, 1, 2, 2, 0], [2, 2, 1, 1, 3, 3]])
    sides = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 0, 0]])
    mask = np.array([[0, 1, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0]], bool)
    values = np.arange(12.0).reshape(2, 6) + 1
    arrays = map(jnp.asarray, (values, mask, segments, sides))
    sums = preference.answer_sums(*arrays, examples=3)
    np.testing.assert_array_equal(sums, [[2 + 3, 10], [8, 5], [0, 0]])


@pytest.mark.parametrize("tail", [0.0, 0.3])
def test_tokens_beyond_the_shorter_answer_have_their_weight(tail):
    """Answers of 2 and 4, 3 and 1, 2 and 2 tokens; prompts and padding do not count."""
    rng = np.random.default_rng(0)
    rows, answers = [], {}
    for pair, lengths in enumerate(((2, 4), (3, 1), (2, 2))):
        for side, length in enumerate(lengths):
            rows += [(pair + 1, side + 1, False)] * 2 + [(pair + 1, side + 1, True)] * length
            answers[pair, side] = range(len(rows) - length, len(rows))
    rows += [(0, 0, False)] * (-len(rows) % 2)
    values = rng.normal(0, 1, len(rows))
    segments, sides, mask = (jnp.array(x)[None] for x in zip(*rows, strict=True))
    arrays = jnp.asarray(values, jnp.float32)[None], mask, segments, sides
    sums = preference.answer_sums(*arrays, examples=3, tail=tail)
    for (pair, side), places in answers.items():
        shared = min(len(answers[pair, 0]), len(answers[pair, 1]))
        head, rest = values[places[:shared]].sum(), values[places[shared:]].sum()
        assert float(sums[pair, side]) == pytest.approx(head + tail * rest, rel=1e-5, abs=1e-6)


class OnlyHead:
    """A model whose parameters are its hidden states and its head."""

    head_options = {"vocab_size": VOCAB, "cap": None}

    def apply(self, params, batch, key):
        return params


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing": 0.1}])
@pytest.mark.slow
def test_losses_of_sft_equal_torch_and_transformers(options, cap, monkeypatch):
    """With masked tokens. Label smoothing: that of torch's cross_entropy and LabelSmoother."""
    hidden, head, tokens = head_and_hidden()
    wanted = np.random.default_rng(1).random((ROWS, LENGTH)) < 0.6
    wanted[:, 0] = False
    monkeypatch.setattr(OnlyHead, "head_options", {"vocab_size": VOCAB, "cap": cap})
    for name in ("token_logps", "token_nll"):
        chunked = partial(getattr(token_logps, name), chunk_logits=7 * COLUMNS)
        monkeypatch.setattr(token_logps, name, chunked)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(wanted)}
    loss_fn = sft(OnlyHead(), SFTConfig(**options))

    def ours(hidden, head):
        sums = loss_fn((hidden, head), None, batch, None)
        return sums["loss"][0] / sums["loss"][1], sums

    def compared(hidden, head):  # the last without a gradient
        with_gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(hidden, head)
        return with_gradients, loss_fn((hidden, head), None, batch, None)["loss"][0]

    ((value, sums), grads), evaluated = jax.jit(compared)(hidden, head)
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    logits = (h @ w)[..., :VOCAB]
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    labels = torch.where(torch.tensor(wanted), torch.tensor(tokens), -100)
    if options.get("loss_type") == "dft":
        logps = -F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        theirs = -(logps.exp().detach() * logps).sum() / wanted.sum()
    else:
        theirs = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], label_smoothing=0.1)
        smoothed = LabelSmoother(epsilon=0.1)({"logits": logits}, labels, shift_labels=True)
        torch.testing.assert_close(smoothed, theirs)
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    for ours_grad, parameter in zip(grads, (h, w), strict=True):
        np.testing.assert_allclose(ours_grad, parameter.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evaluated, sums["loss"][0], rtol=1e-6)
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()
    assert int(sums["mean_token_accuracy"][0]) == int(hits)


def formula(loss, h_w, h_l, beta, e, n_w, n_l):
    """Each loss in torch, from its paper, for one pair."""
    m = beta * (h_w - h_l)
    s = F.logsigmoid
    if loss == "sigmoid":
        return -(1 - e) * s(m) - e * s(-m)
    if loss == "ipo_sum":
        return (h_w - h_l - 1 / (2 * beta)) ** 2
    if loss == "ipo":
        return (h_w / n_w - h_l / n_l - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return torch.clamp(1 - m, min=0)
    if loss == "robust":
        return (-(1 - e) * s(m) + e * s(-m)) / (1 - 2 * e)
    if loss in ("sigmoid_norm", "dpo_norm"):
        return -s(beta * (h_w / n_w - h_l / n_l))
    if loss == "apo_zero":
        return (1 - torch.sigmoid(beta * h_w)) + torch.sigmoid(beta * h_l)
    if loss == "apo_down":
        return torch.sigmoid(beta * h_w) + (1 - torch.sigmoid(m))
    if loss == "exo_pair":
        p = torch.stack([torch.sigmoid(m), torch.sigmoid(-m)])
        q = torch.tensor([[1 - e], [e]], dtype=p.dtype)
        return (p * (p.log() - q.log())).sum(0)
    if loss == "nca_pair":
        return -s(beta * h_w) - 0.5 * s(-beta * h_w) - 0.5 * s(-beta * h_l)
    if loss == "bco_pair":
        return -torch.log(torch.sigmoid(beta * h_w)) - torch.log(1 - torch.sigmoid(beta * h_l))
    if loss == "sppo_hard":
        return (h_w - 0.5 / beta) ** 2 + (h_l + 0.5 / beta) ** 2
    if loss == "dpop":
        return -s(m - beta * 2.0 * torch.clamp(-h_w, min=0))
    if loss == "discopop":
        mixed = torch.sigmoid(m / 0.05)
        return (1 - mixed) * -s(m) + mixed * torch.exp(-m)
    if loss == "simpo":
        return -s(beta * h_w / n_w - beta * h_l / n_l - 0.7)
    if loss == "orpo":
        p_w, p_l = torch.exp(h_w / n_w), torch.exp(h_l / n_l)
        odds = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        return -beta * torch.log(odds / (1 + odds))
    raise KeyError(loss)


OPTIONS = {"dpop": {"dpop_lambda": 2.0}, "simpo": {"simpo_gamma": 0.7}}
OPTIONS |= {loss: {"label_smoothing": 0.1} for loss in SMOOTHED_LOSSES}


@pytest.mark.parametrize("loss", preference.PREFERENCE_LOSSES)
def test_each_loss_and_its_gradient_equal_the_formula(loss):
    rng = np.random.default_rng(0)
    logratios = rng.normal(0, 3, (50, 2))
    if LOSSES[loss].reference == "none":  # log-probabilities
        logratios = -np.abs(logratios)
    lengths = rng.integers(1, 9, (50, 2)).astype(float)
    kwargs, betas = OPTIONS.get(loss, {}), (0.1, 0.8)

    @jax.jit
    def ours(logratios, lengths):
        def summed(x, beta):
            values = preference.preference_loss(loss, x, lengths, beta=beta, **kwargs)
            return values.sum(), values

        return [jax.grad(summed, has_aux=True)(logratios, beta) for beta in betas]

    given = (np.asarray(x, np.float32) for x in (logratios, lengths))
    for beta, (grads, values) in zip(betas, ours(*given), strict=True):
        h, n = torch.tensor(logratios, requires_grad=True), torch.tensor(lengths)
        e = kwargs.get("label_smoothing", 0.0)
        theirs = formula(loss, h[:, 0], h[:, 1], beta, e, n[:, 0], n[:, 1])
        theirs.sum().backward()
        np.testing.assert_allclose(values, theirs.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads, h.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [name for name, use in LOSSES.items() if use.margins])
def test_margins_reduce_the_difference_of_the_rewards(loss):
    rng = np.random.default_rng(0)
    logratios = rng.normal(0, 3, (50, 2))
    lengths = rng.integers(1, 9, (50, 2)).astype(float)
    margins = rng.uniform(0, 1, 50)
    e = 0.1 if loss in SMOOTHED_LOSSES else 0.0
    options = {"label_smoothing": e, "simpo_gamma": 0.7}
    arrays = (jnp.asarray(x, jnp.float32) for x in (logratios, lengths))
    ours = preference.preference_loss(
        loss, *arrays, beta=0.1, margins=jnp.asarray(margins, jnp.float32), **options
    )
    h, n, margins = map(torch.tensor, (logratios, lengths, margins))
    h = h / n if preference.PREFERENCE_LOSSES[loss].per_token else h
    m = 0.1 * (h[:, 0] - h[:, 1]) - margins - (0.7 if loss == "simpo" else 0)
    smoothed = -(1 - e) * F.logsigmoid(m), -e * F.logsigmoid(-m)
    theirs = smoothed[0] + smoothed[1]
    if loss == "hinge":
        theirs = torch.clamp(1 - m, min=0)
    if loss == "robust":
        theirs = (smoothed[0] - smoothed[1]) / (1 - 2 * e)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_of_wpo_are_mean_probabilities_without_a_gradient():
    rng = np.random.default_rng(0)
    aligned, lengths = -np.abs(rng.normal(0, 1, (6, 2))), rng.integers(1, 9, (6, 2))
    lengths[5] = aligned[5] = 0  # no pair
    arrays = [jnp.asarray(x, jnp.float32) for x in (aligned, lengths)]
    wanted = np.exp((aligned / np.maximum(lengths, 1)).sum(1))
    np.testing.assert_allclose(preference.wpo_weights(*arrays), wanted, rtol=1e-5)
    grads = jax.grad(lambda x: preference.wpo_weights(x, arrays[1]).sum())(arrays[0])
    assert not grads.any()


def test_kto_and_its_gradient_equal_the_formula():
    """Two groups: one whose estimate of the KL divergence is above 0, one with 0."""
    rng = np.random.default_rng(0)
    own, other = rng.normal(0, 9, 8), rng.normal(0, 9, 8)
    other[:4], other[4:] = np.abs(other[:4]), -np.abs(other[4:])
    labels = np.array([1, 0, 0, 1, 1, 1, 0, 0])
    options = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7}

    def ours(own, other):
        kl = preference.kl_of_groups(other, 4)
        return preference.kto(own, kl, jnp.asarray(labels) > 0, **options)

    arrays = [jnp.asarray(x, jnp.float32) for x in (own, other)]
    h = torch.tensor(own, requires_grad=True)
    z = torch.tensor([max(other[:4].mean(), 0)] * 4 + [max(other[4:].mean(), 0)] * 4)
    assert z[0] > 0 and z[4] == 0
    good, bad = 1 - torch.sigmoid(0.1 * (h - z)), 1 - torch.sigmoid(0.1 * (z - h))
    theirs = torch.where(torch.tensor(labels) > 0, 1.3 * good, 0.7 * bad)
    theirs.sum().backward()
    np.testing.assert_allclose(ours(*arrays), theirs.detach(), rtol=1e-5)
    grads = jax.grad(lambda *x: ours(*x).sum(), (0, 1))(*arrays)
    np.testing.assert_allclose(grads[0], h.grad, rtol=1e-5, atol=1e-7)
    assert not grads[1].any()


def test_the_values_of_the_lineage():
    """EasyLM's losses at zero margin and at one worked example; a margin of 2, beta 0.1."""
    none = jnp.array([[0.0, 0.0]])
    margins = jnp.array([[-10.0 - -11.0, -12.0 - -11.0]])
    ones = jnp.ones((1, 2))

    def of(loss, logratios, e=0.0):
        return float(
            preference.preference_loss(loss, logratios, ones, beta=0.1, label_smoothing=e)[0]
        )

    assert of("sigmoid", none) == pytest.approx(math.log(2), abs=1e-7)
    assert of("ipo_sum", none) == pytest.approx(25.0, abs=1e-5)
    assert of("sigmoid", margins) == pytest.approx(0.598139, abs=1e-6)
    assert of("sigmoid", margins, 0.1) == pytest.approx(0.618139, abs=1e-6)
    assert of("ipo_sum", margins) == pytest.approx(9.0, abs=1e-5)


def test_ipo_does_not_change_when_answers_are_doubled_token_by_token():
    logratios, lengths = jnp.array([[3.0, -2.0]]), jnp.array([[4.0, 5.0]])
    once, twice = (
        preference.preference_loss("ipo", logratios * k, lengths * k, beta=0.1) for k in (1, 2)
    )
    np.testing.assert_allclose(once, twice, rtol=1e-6)


def test_the_configuration_and_the_losses_have_the_same_names_and_options():
    assert LOSSES.keys() - {"sft"} == preference.PREFERENCE_LOSSES.keys()
    for name, loss in preference.PREFERENCE_LOSSES.items():
        taken = inspect.signature(loss.function).parameters
        assert set(loss.options) <= taken.keys()
        assert ("label_smoothing" in loss.options) == LOSSES[name].smoothed
    assert {name for loss in preference.PREFERENCE_LOSSES.values() for name in loss.options} <= {
        field.name for field in fields(DPOConfig)
    }


@pytest.mark.parametrize("loss", preference.PREFERENCE_LOSSES)
@pytest.mark.slow
def test_losses_are_finite_far_out(loss):
    logratios = jnp.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]])

    def total(x):
        ones = jnp.ones((3, 2))
        return preference.preference_loss(loss, x, ones, beta=0.1, **OPTIONS.get(loss, {})).sum()

    value, grads = jax.value_and_grad(total)(logratios)
    assert jnp.isfinite(value) and jnp.isfinite(grads).all()


@pytest.mark.parametrize(
    "kind, alpha",
    [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js_divergence", 0.5)]
    + [("alpha_divergence", alpha) for alpha in (0.5, 1.0, 1.5)],
)
def test_divergences_are_the_derivatives_of_their_functions(kind, alpha):
    """Of f with D = E_ref[f(pi / pi_ref)], up to a constant; and their gradients."""

    def f(u):
        if kind == "reverse_kl" or alpha == 1.0:
            return u * torch.log(u)
        if kind == "forward_kl":
            return -torch.log(u)
        if kind == "js_divergence":
            return u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2)
        return (u**alpha - alpha * u) / (alpha * (alpha - 1))

    h = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    u = torch.exp(h)
    (slope,) = torch.autograd.grad(f(u).sum(), u, create_graph=True)
    (wanted_grad,) = torch.autograd.grad(slope.sum(), h)
    slope = slope.detach().numpy()

    def ours(h):
        return preference.divergence_score(kind, h, alpha=alpha)

    inputs = jnp.asarray(h.detach().numpy(), jnp.float32)
    score = ours(inputs)
    np.testing.assert_allclose(score - score[6], slope - slope[6], rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda x: ours(x).sum())(inputs)
    np.testing.assert_allclose(grads, wanted_grad, rtol=1e-5, atol=1e-5)
    far = ours(jnp.array([-1e4, 1e4]))
    assert jnp.isfinite(far).all()


def test_a_list_of_losses_is_the_sum_of_its_weighted_losses():
    """MPO: 0.8 sigmoid + 0.2 bco_pair + 1.0 sft, Wang et al. (2024)."""
    rng = np.random.default_rng(0)
    logps, ref = -np.abs(rng.normal(0, 9, (6, 2))), -np.abs(rng.normal(0, 9, (6, 2)))
    lengths = rng.integers(1, 9, (6, 2)).astype(float)
    config = DPOConfig(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], label_smoothing=0.1)
    ones = jnp.ones((6, 2))
    scores = AnswerScores(
        *(jnp.asarray(x, jnp.float32) for x in (logps, lengths, ones, ones, ones))
    )
    total, count = dpo_sums(scores, jnp.asarray(ref, jnp.float32), config)["loss"]
    h_w, h_l = (logps - ref).T
    m = 0.1 * (h_w - h_l)
    log_s = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    wanted = 0.8 * (-0.9 * log_s(m) - 0.1 * log_s(-m))
    wanted += 0.2 * (-log_s(0.1 * h_w) - log_s(-0.1 * h_l)) - logps[:, 0] / lengths[:, 0]
    assert float(total / count) == pytest.approx(wanted.mean(), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "aot"}, "aot sorts the margins of the whole batch"),
        ({"loss_type": "aot_pair"}, "aot_pair sorts"),
        ({"loss_type": ["sigmoid", "aot_unpaired"]}, "aot_unpaired sorts"),
        ({"loss_type": "tr_dpo"}, "tr_dpo moves the reference"),
        ({"loss_type": "sigmod"}, "got sigmod; did you mean sigmoid"),
        ({"loss_type": "sft"}, "sft alone compares no answers"),
        ({"loss_type": []}, "expected one or more of sigmoid, .*, got none"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 losses"),
        ({"loss_type": "simpo"}, "simpo has no reference; set dpo.reference none"),
        ({"loss_type": "dpop", "reference": "none"}, "dpop needs a reference"),
        ({"loss_type": "orpo", "reference": "none"}, "set dpo.sft_weight to 1"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "apo_zero has reverse_kl"),
        (
            {"reference": "none", "f_divergence_type": "js_divergence"},
            "sigmoid without a reference has reverse_kl only",
        ),
        ({"loss_type": "ipo", "ld_alpha": 0.5}, "ipo divides by the whole length"),
        ({"loss_type": "dpop", "label_smoothing": 0.1}, "dpop has no smoothing"),
        ({"loss_type": ["kto", "sft"]}, "kto takes single answers and other losses pairs"),
        ({"loss_type": "kto", "sft_weight": 1.0}, "dpo.sft_weight: applies to pairs only"),
        ({"loss_type": "kto", "reference": "none"}, "dpo.reference: applies to pairs only"),
        ({"loss_type": "kto", "simpo_gamma": 1.0}, "dpo.simpo_gamma: applies to simpo only"),
        ({"dpop_lambda": 5.0}, "dpo.dpop_lambda: applies to dpop only"),
        ({"loss_type": ["ipo", "sft"], "kto_group": 4}, "dpo.kto_group: applies to kto only"),
        ({"f_alpha_divergence_coef": 0.7}, "applies to alpha_divergence only"),
    ],
)
def test_combinations_without_a_meaning_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**options)


@pytest.mark.slow
def test_dynamic_fine_tuning_has_no_smoothing():
    with pytest.raises(ConfigError, match="sft.label_smoothing: dft has no smoothing"):
        SFTConfig(loss_type="dft", label_smoothing=0.1)
