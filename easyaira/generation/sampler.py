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


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
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
        top_p: sample from the smallest set of tokens with this share of the probability.
        seed: seed of the samples.

    Raises:
        DataError: a prompt fills all of the model's positions.
    """
    positions = model.config.max_positions
    lengths = np.array([len(prompt) for prompt in prompts])
    if lengths.max() >= positions:
        raise DataError(
            f"a prompt of {lengths.max()} tokens leaves no room in the model's {positions} "
            "positions"
        )
    limits = jnp.array(np.minimum(lengths + max_new_tokens, positions))
    width = min(bucket(int(limits.max()), 8), positions)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = jnp.array(list(eos_ids))
    rows = jnp.arange(len(prompts))

    def choose(logits, key):
        if temperature == 0:
            return logits.argmax(-1)
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits / temperature, order, -1)
        before = jnp.cumsum(jax.nn.softmax(ranked), -1) - jax.nn.softmax(ranked)
        rank = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf))
        return order[rows, rank]

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
