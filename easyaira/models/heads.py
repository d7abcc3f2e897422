"""Heads on top of a backbone: logits and scores. Shapes: see layers.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from easyaira.distributed.mesh import BATCH_AXES
from easyaira.distributed.sharding import Rules, constrain, parts_of
from easyaira.hf.table import TRANSPOSE, VOCAB_TRANSPOSE, Row
from easyaira.models.layers import Compute, whole
from easyaira.models.layout import UNATTENDED
from easyaira.models.linear import Linear
from easyaira.models.parameter import parameter
from easyaira.models.token_rows import trained


class Kernel(nn.Module):
    """A matrix parameter, returned without being applied."""

    shape: tuple[int, int]
    std: float
    columns: int  # the remaining columns are padding, zero

    @nn.compact
    def __call__(self) -> jax.Array:
        def init(key, shape, dtype=jax.numpy.float32):
            drawn = jax.random.normal(key, (shape[0], self.columns), dtype) * self.std
            return jax.numpy.zeros(shape, dtype).at[:, : self.columns].set(drawn)

        return trained(self, parameter(self, "kernel", init, self.shape), axis=1)


LM_HEAD = "lm_head"  # parameter of an untied head


class CausalLM(nn.Module):
    """Map tokens to hidden states [R, T, D] and the head [D, V] that projects them to logits.

    The loss computes the logits in chunks and never stores all of them
    (losses.token_logps.token_logps). A tied head is the transposed token table.
    """

    backbone: type[nn.Module]
    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, sides) -> tuple[jax.Array, jax.Array]:
        c = self.config
        backbone = self.backbone(c, self.compute, name="model")
        hidden_RTD, table_VD = backbone(tokens, positions, segment_ids, sides)
        hidden_RTD = whole(hidden_RTD)
        if c.tie_word_embeddings:
            return hidden_RTD, table_VD.T
        shape = (hidden_RTD.shape[-1], table_VD.shape[0])
        return hidden_RTD, Kernel(shape, c.initializer_range, c.vocab_size, name=LM_HEAD)()


LM_HEAD_RULES = ((rf"^{LM_HEAD}/kernel$", P("fsdp", "tp")),)
LM_HEAD_ROWS = (Row(f"{LM_HEAD}/kernel", "lm_head.weight", VOCAB_TRANSPOSE),)


@dataclass(frozen=True)
class ScoreHead:
    """How an architecture scores a text.

    Attributes:
        module: takes (config, compute) and maps states [..., D] to scores [...]; its parameters are
            under `score`.
        rules, rows: partition rules and weight-table rows of the head.
        first_token: true: score the first token, which must attend to all others; false: the last.
        every_token: score every token instead: a value model.
    """

    module: type[nn.Module]
    rules: Rules
    rows: Sequence[Row]
    first_token: bool = False
    every_token: bool = False


class LastTokenScore(nn.Module):
    """Map states of last tokens [..., D] to scores [...] by one linear layer without bias."""

    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, states):
        return Linear(1, self.config.initializer_range, name="linear")(states)[..., 0]


LAST_TOKEN = ScoreHead(
    LastTokenScore,
    rules=((r"^score/linear/kernel$", P("fsdp", None)),),
    rows=(Row("score/linear/kernel", "score.weight", TRANSPOSE),),
)


class EveryTokenScore(nn.Module):
    """Map states of tokens [..., D] to scores [...] by one linear layer with a bias."""

    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, states):
        return Linear(1, self.config.initializer_range, use_bias=True, name="linear")(states)[
            ..., 0
        ]


def every_token(model_type: str) -> ScoreHead:
    """Head of a value model, under the names of transformers' token classifiers."""
    name = "classifier" if model_type == "gpt2" else "score"
    return ScoreHead(
        EveryTokenScore,
        rules=((r"^score/linear/kernel$", P("fsdp", None)), (r"^score/linear/bias$", P(None))),
        rows=(
            Row("score/linear/kernel", f"{name}.weight", TRANSPOSE),
            Row("score/linear/bias", f"{name}.bias"),
        ),
        every_token=True,
    )


class Scorer(nn.Module):
    """Map rows of texts to one float32 score per answer [B, A], and a mask of existing answers.

    The head is applied to one token per answer, in float32. With a head for every token, scores and
    mask are those of tokens, [R, T].
    """

    backbone: type[nn.Module]
    head: ScoreHead
    config: Any
    compute: Compute

    @nn.compact
    def __call__(
        self, tokens, positions, segment_ids, sides, *, examples: int, answers: int
    ) -> tuple[jax.Array, jax.Array]:
        backbone = self.backbone(self.config, self.compute, name="model")
        hidden_RTD, _ = backbone(tokens, positions, segment_ids, sides)
        head = self.head.module(self.config, self.compute, name="score")
        if self.head.every_token:
            with jax.default_matmul_precision("highest"):
                return head(whole(hidden_RTD).astype(jnp.float32)), segment_ids > 0
        states_BAD, exists_BA = answer_states(
            whole(hidden_RTD),
            segment_ids,
            sides,
            examples=examples,
            answers=answers,
            first_token=self.head.first_token,
        )
        with jax.default_matmul_precision("highest"):
            return head(states_BAD.astype(jnp.float32)), exists_BA


def answer_states(
    hidden_RTD: jax.Array,
    segment_ids_RT: jax.Array,
    sides_RT: jax.Array,
    *,
    examples: int,
    answers: int,
    first_token: bool,
) -> tuple[jax.Array, jax.Array]:
    """Hidden state of each answer's first or last token [B, A, D], and whether the answer exists.

    Example b has segment id b + 1; of several answers, answer k has side k + 1. A shared prompt
    (side 0) belongs to none of them, and unattended tokens are padding. Each device gathers only
    from its own rows, which contain all of its examples.
    """
    R, T, D = hidden_RTD.shape
    shards = parts_of(R, BATCH_AXES)
    shards = shards if examples % shards == 0 else 1
    local = examples // shards * answers  # answers per shard

    def flat(x: jax.Array) -> jax.Array:  # [S, tokens per shard, ...]
        x = x.reshape(shards, R // shards * T, *x.shape[2:])
        return constrain(x, BATCH_AXES, *(None,) * (x.ndim - 1))

    def take(hidden, segment_ids, sides, shard):
        side = sides - 1 if answers > 1 else 0 * sides
        answer = (segment_ids - 1) * answers + side - shard * local
        is_text = (segment_ids > 0) & (sides != UNATTENDED) & (side >= 0)
        answer = jnp.where(is_text, answer, local)
        place = jnp.arange(len(answer))
        reduce = jax.ops.segment_min if first_token else jax.ops.segment_max
        places = reduce(place, answer, num_segments=local + 1)[:-1]
        exists = (places >= 0) & (places < len(place))  # an empty segment gives an extreme integer
        # indices are unique, also those of missing answers: the gradient is a write, not a sum
        beyond = len(place) + jnp.arange(local)
        taken = hidden.at[jnp.where(exists, places, beyond)]
        return taken.get(mode="fill", fill_value=0, unique_indices=True), exists

    states, exists = jax.vmap(take)(
        flat(hidden_RTD), flat(segment_ids_RT), flat(sides_RT), jnp.arange(shards)
    )
    return states.reshape(examples, answers, D), exists.reshape(examples, answers)
