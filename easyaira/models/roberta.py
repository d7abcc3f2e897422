"""RoBERTa (Liu et al., 2019): BERT's encoder with positions that start after the padding token's
row, and its own head. Shapes: see layers.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from easyaira.models import bert
from easyaira.models.heads import ScoreHead
from easyaira.models.layers import Compute, Dropout
from easyaira.models.linear import Linear


@dataclass(frozen=True)
class RobertaConfig(bert.BertConfig):
    """Sizes under Hugging Face's names, with the defaults that differ from BERT's."""

    vocab_size: int = 50265
    pad_token_id: int = 1

    # in fairseq's tables, rows up to the padding token's are not used for text
    offset = property(lambda self: self.pad_token_id + 1)


class Roberta(bert.Bert):
    """Map tokens to hidden states [R, T, D] and the token table [V, D]. All tokens have type 0."""


class DenseScore(nn.Module):
    """Map states of first tokens [..., D] to scores [...]: a tanh layer, then a linear layer."""

    config: Any
    compute: Compute

    @nn.compact
    def __call__(self, states):
        c, dropout = self.config, Dropout(self.compute.dropout)
        linear = partial(Linear, std=c.initializer_range, use_bias=True)
        hidden = jnp.tanh(linear(c.hidden_size, name="dense")(dropout(states)))
        return linear(1, name="out_proj")(dropout(hidden))[..., 0]


PARTITION_RULES = bert.PARTITION_RULES
HF_ROWS = bert.encoder_rows("roberta.")
HF_PREFIX = "roberta."  # missing in files of a bare RobertaModel
HF_IGNORED = (r"^roberta\.lm_head\.", r"^(roberta\.)+pooler\.")  # heads of other tasks
HF_RENAMED = bert.HF_RENAMED
HF_NEUTRAL = bert.HF_NEUTRAL

SCORE_HEAD = ScoreHead(
    DenseScore,
    rules=(
        (r"^score/dense/kernel$", P("fsdp", "tp")),
        (r"^score/dense/bias$", P("tp")),
        (r"^score/out_proj/kernel$", P("tp", None)),
        (r"^score/out_proj/bias$", P()),
    ),
    rows=(
        *bert.dense_rows("score/dense", "classifier.dense"),
        *bert.dense_rows("score/out_proj", "classifier.out_proj"),
    ),
    first_token=True,
)
