"""Greedy or sampled generation with the forward pass of training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.data.packing import bucket
from easyaira.distributed.sharding import constrain
from easyaira.errors import DataError
from easyaira.models.model import Model

GREEDY = 1e-5  # temperatures below it would overflow float32


def likeliest(logits: jax.Array, top_k: int, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The tokens of each row, likeliest first, and their logits: -inf for those beyond the first
    `top_k`, and beyond the smallest set with the share `top_p` of the remaining probability."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, -1)
    if top_k:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    before = jnp.cumsum(jax.nn.softmax(ranked), -1) - jax.nn.softmax(ranked)
    return order, jnp.where(before < top_p, ranked, -jnp.inf)


def penalised(logits: jax.Array, penalty: float) -> jax.Array:
    return jnp.where(logits < 0, logits * penalty, logits / penalty)


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Generate the tokens that follow each prompt, without the end token.

    There is no KV cache: every token recomputes its whole row, with the arithmetic of training.

    Args:
        model, params: the model and its weights.
        prompts: token ids, of any lengths.
        eos_ids: tokens that end an answer.
        max_new_tokens: maximal length of an answer; the model's positions limit it, too.
        temperature: 0: greedy.
        top_k: sample from this many of the likeliest tokens; 0: from all.
        top_p: sample from the smallest set of tokens with this share of the probability.
        repetition_penalty: divisor of the positive logits, and factor of the negative ones, of
            tokens that the row already has (Keskar et al., 2019, CTRL).
        seed: seed of the samples.

    Raises:
        DataError: a prompt is empty, or fills all of the model's positions.
    """
    positions = model.config.max_positions
    lengths = np.array([len(prompt) for prompt in prompts])
    if lengths.min() == 0:
        raise DataError(
            "a prompt without tokens, and this tokenizer has no start token; give a text"
        )
    if lengths.max() >= positions:
        raise DataError(
            f"a prompt of {lengths.max()} tokens leaves no room in the model's {positions} "
            "positions; shorten it"
        )
    limits = jnp.array(np.minimum(lengths + min(max_new_tokens, positions), positions))
    width = min(bucket(int(limits.max()), 8), positions)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = jnp.array(list(eos_ids))
    rows = jnp.arange(len(prompts))

    def choose(logits, key):
        if temperature < GREEDY:
            return logits.argmax(-1)
        order, ranked = likeliest(logits / temperature, top_k, top_p)
        return order[rows, jax.random.categorical(key, ranked)]

    def step(params, carry):
        tokens, filled, done, key = carry
        places = jnp.arange(width)
        layout = {
            "tokens": tokens,
            "positions": jnp.broadcast_to(places, tokens.shape),
            "segment_ids": (places < filled[:, None]).astype(jnp.int32),
            "sides": jnp.zeros_like(tokens),
        }
        hidden, head = model.apply(params, layout)
        last = hidden[rows, filled - 1].astype(jnp.float32)
        logits = (last @ head)[:, : model.vocab_size]
        if repetition_penalty != 1:
            seen = jnp.zeros(logits.shape, bool)
            seen = seen.at[rows[:, None], tokens].max(places < filled[:, None], mode="drop")
            logits = jnp.where(seen, penalised(logits, repetition_penalty), logits)
        key, step_key = jax.random.split(key)
        token = choose(logits, step_key)
        ended = done | (token[:, None] == ends).any(-1) | (filled >= limits)
        place = jnp.where(ended, width, filled)  # beyond the row: the write is dropped
        return tokens.at[rows, place].set(token, mode="drop"), filled + ~ended, ended, key

    def run(params, tokens, lengths):
        start = (tokens, lengths, jnp.zeros(len(prompts), bool), jax.random.key(seed))
        carry = jax.lax.while_loop(lambda c: ~c[2].all(), partial(step, params), start)
        # replicated, so that all hosts can read them
        return constrain(carry[0], None, None), constrain(carry[1], None)

    tokens, filled = jax.device_get(jax.jit(run)(params, tokens, jnp.array(lengths)))
    return [row[len(p) : n].tolist() for row, p, n in zip(tokens, prompts, filled, strict=True)]
