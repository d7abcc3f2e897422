"""From logits to the next token: pure functions of arrays, with the results of transformers.

Shapes: R rows, V vocabulary. A token that may not be chosen has the logit -inf. Nothing sorts the
vocabulary, since that costs more than the model's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from easyaira.errors import ConfigError
from easyaira.models.product import few_at_a_time, row_dot

GREEDY = 1e-5  # temperatures below it would overflow float32
BLOCK = 128  # tokens whose weights are summed at once, see `_first_beyond`

Logits = Float[Array, "R V"]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, and when to stop. The order is that of transformers.

    Attributes:
        max_new_tokens: maximal length of an answer; the model's positions limit it, too.
        min_new_tokens: no end token before an answer has so many tokens.
        temperature: divisor of the logits; 0: greedy, and the next three have no effect.
        top_k: sample from this many of the likeliest tokens; 0: from all.
        top_p: sample from the smallest set of tokens with this share of the probability (Holtzman
            et al., 2020, The Curious Case of Neural Text Degeneration, eq. 2).
        min_p: sample from the tokens with at least this share of the likeliest one's probability
            (Nguyen et al., 2024, Turning Up the Heat, section 3); 0: from all.
        repetition_penalty: divisor of the positive logits, and factor of the negative ones, of
            tokens that the row already has (Keskar et al., 2019, CTRL, section 4.1).
        end_ids: tokens that end an answer.
        stop_strings: texts that end an answer.
    """

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    end_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY

    def check(self, num_samples: int) -> None:
        """Check that several answers to a prompt can differ.

        Raises:
            ConfigError: they are greedy.
        """
        if num_samples > 1 and self.greedy:
            raise ConfigError(
                f"num_samples: {num_samples} answers at temperature 0 are equal; raise temperature"
            )

    @property
    def compiled(self) -> Sampling:
        """The options that decide a compiled program. Others take their defaults: those that only
        the host reads, and those without effect on greedy answers."""
        none = {"max_new_tokens": 0, "stop_strings": ()}
        if self.greedy:
            none |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return replace(self, **none)


def process(
    logits: Logits,
    sampling: Sampling,
    seen: Bool[Array, "R V"] | None = None,
    counts: Int[Array, " R"] | None = None,
) -> Logits:
    """Logits of the distribution to draw from.

    Args:
        seen: tokens that a row already has; needed for a repetition penalty.
        counts: tokens of the answer so far; needed for `min_new_tokens`.
    """
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.min_new_tokens:
        logits = forbid_end(logits, counts, sampling.min_new_tokens, sampling.end_ids)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def penalise(logits: Logits, seen: Bool[Array, "R V"], penalty: float) -> Logits:
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_end(
    logits: Logits, counts: Int[Array, " R"], least: int, end_ids: Sequence[int]
) -> Logits:
    ends = np.isin(np.arange(logits.shape[-1]), end_ids)
    return jnp.where((counts < least)[:, None] & ends, -jnp.inf, logits)


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the k largest logits, and those equal to the last of them."""
    top, places = jax.lax.top_k(logits, k)
    # without the barrier, XLA's CPU backend drops the unused indices, and then sorts everything;
    # on several devices, it aborts if the barrier holds the two results alone
    top, *_ = jax.lax.optimization_barrier((top, places, logits[:, 0]))
    return jnp.where(logits < top[:, -1:], -jnp.inf, logits)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the smallest set of the likeliest tokens whose probabilities sum up to p.

    Among equally likely tokens at the cut-off, those with the lowest ids are kept.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    least = few_at_a_time(partial(_cut_off, p), (logits, probs), 2 * logits.shape[1])[:, None]
    above, ties = logits > least, logits == least
    missing = p - jnp.where(above, probs, 0).sum(-1)
    wanted = jnp.maximum(jnp.ceil(missing / jnp.where(ties, probs, 0).max(-1)), 1)
    last = _first_beyond(ties.astype(jnp.float32), (wanted - 0.5) / ties.sum(-1))[:, None]
    return jnp.where(above | ties & (jnp.arange(logits.shape[1]) <= last), logits, -jnp.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    probs = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probs < p * probs.max(-1, keepdims=True), -jnp.inf, logits)


def _cut_off(p: float, logits: jax.Array, probs: jax.Array) -> jax.Array:
    """The largest logit [R] such that all tokens with at least this logit have probability p.

    Bisects the bit patterns of float32, whose order as integers is that of the numbers.
    """
    bits = jax.lax.bitcast_convert_type(logits + 0.0, jnp.int32)  # -0.0 becomes 0.0
    order = jnp.where(bits < 0, ~bits ^ jnp.int32(-(2**31)), bits)

    def halve(_, bounds):
        low, high = bounds  # the sum from low on is enough, that from high on is not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.where(order >= middle[:, None], probs, 0).sum(-1) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 32, halve, (order.min(-1), order.max(-1) + 1))
    return jnp.where(order >= low[:, None], logits, jnp.inf).min(-1)


def largest(logits: Logits) -> Int[Array, " R"]:
    """The first token with the largest logit. XLA's CPU takes three times as long for argmax."""
    tokens = jnp.arange(logits.shape[1])
    at_top = logits == logits.max(-1, keepdims=True)
    return jnp.where(at_top, tokens, logits.shape[1]).min(-1)


def uniform(
    seed: jax.Array | int, streams: Integer[Array, " R"], places: Int[Array, " R"]
) -> Float[Array, " R"]:
    """A number from [0, 1) for each row [R]: a function of the seed, the row's stream and the place
    of the token in its answer."""
    key = jax.random.key(seed)

    def one(stream, place):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, stream), place))

    return jax.vmap(one)(streams, places)


def draw(logits: Logits, numbers: Float[Array, " R"]) -> Int[Array, " R"]:
    """Draw a token from each row's distribution: the first one whose cumulative probability exceeds
    its number from [0, 1). One random number per row serves a vocabulary of any size."""
    return _first_beyond(jnp.exp(logits - logits.max(-1, keepdims=True)), numbers)


def _first_beyond(weights: jax.Array, share: jax.Array) -> jax.Array:
    """First index [R] at which the cumulative weight exceeds this share [R] of the row's total.

    The first block is sought by the sums of the blocks' weights, then the place in that block.
    """
    R, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
    block, rest = _in_one_pass(blocks.sum(-1), share)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    return block * BLOCK + _in_one_pass(chosen, rest)[0]


def _in_one_pass(weights: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_first_beyond` by one cumulative sum, and the share of that index's weight that remains."""
    sums = jnp.cumsum(weights, -1)
    wanted = jnp.minimum(share * sums[:, -1], jnp.nextafter(sums[:, -1], 0.0))[:, None]
    place = (sums <= wanted).sum(-1)  # its weight is not 0, since the sum grows there
    at = place[:, None]
    weight = jnp.take_along_axis(weights, at, -1)
    before = jnp.take_along_axis(sums, at, -1) - weight
    return place, jnp.clip((wanted - before) / weight, 0, 1)[:, 0]


def logps_of(logits: Logits, tokens: Int[Array, " R"]) -> Float[Array, " R"]:
    """log p(token) of the model's own distribution, before any processing."""
    at = jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0]
    top = logits.max(-1)
    weights = jnp.exp(logits - top[:, None])
    # summed by a product: fused with a sum, XLA's CPU computes one exponential at a time
    return at - top - jnp.log(row_dot(weights, jnp.ones_like(weights)))
