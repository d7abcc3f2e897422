"""Scores of reward and toxicity models, each with its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easyaira.data.batches import Batches
from easyaira.data.chat_templates import as_argument
from easyaira.data.examples import Examples, check_embedded, of_tokens
from easyaira.data.listed import Prompt, read_texts
from easyaira.data.template import Template
from easyaira.distributed import mesh as meshes
from easyaira.distributed.sharding import constrain
from easyaira.errors import ConfigError, DataError, WeightsError
from easyaira.models.attention import implementation_for
from easyaira.models.layers import Compute
from easyaira.models.registry import model_of
from easyaira.storage import pretrained
from easyaira.storage.frozen import load_frozen
from easyaira.storage.pretrained import Pretrained
from easyaira.train import loader
from easyaira.train.resolve import has_weights

TEXTS = 16  # texts per device and call
SHORTEST_ROW = 64  # tokens

Message = Mapping[str, str]


class RewardModel:
    """A model that scores texts. Its weights are read by `load`.

    Args:
        origin: run folder of `train_reward`, Hugging Face folder or hub id; or the result of
            `pretrained.find` for it.
        mesh: devices to compute on.
        dtype: float32 or bfloat16, to compute in.
        template: as `data.template`; encoders have one form.

    Attributes:
        config: content of config.json.
        tokenizer: that of transformers.
        template: encodes messages.
        params: weights, in EasyAira's layout; matrices in `dtype`, and the score head in float32.

    Raises:
        ConfigError: it is not a reward model.
        EasyAiraError: its files cannot be read.
    """

    def __init__(
        self,
        origin: str | Pretrained,
        mesh: Mesh | None,
        dtype: Any = "float32",
        template: str = "chat",
    ):
        self.name, self.mesh = origin if isinstance(origin, str) else origin.where, mesh
        self.origin = pretrained.find(origin) if isinstance(origin, str) else origin
        compute = Compute(jnp.dtype(dtype), attention=implementation_for(mesh))
        self.model = model_of(self.origin.config, self.origin.where, compute, scorer=True)
        # a plan needs no weights; without them, `load` fails
        if has_weights(self.origin) and (missing := self.origin.check(self.model)):
            raise ConfigError(pretrained.no_score_head(self.name, missing))
        if self.model.architecture.encoder:
            if template != "chat":
                raise ConfigError("template: encoders have one form; leave it out")
            template = "encoder"
        self.config, model_type = self.origin.config, self.origin.config["model_type"]
        with as_argument():
            self.template = Template(self.origin.tokenizer(), template, model_type)
        self.tokenizer = self.template.tokenizer
        # transformers scores a decoder at the last token that is not padding, also where the end
        # token serves as padding
        self._pad = None if self.template.encoder else self.config.get("pad_token_id")
        self.params: Any = None
        self._score = jax.jit(self._scores_of)

    def load(self) -> RewardModel:
        """Read the weights; return self."""
        with self.model.on(self.mesh):
            self.params = load_frozen(self.origin, self.model, self.mesh)
        return self

    def check(self, messages: Sequence[Message]) -> None:
        """Check that a prompt leaves room for an answer.

        Raises:
            DataError: it does not, or the template refuses its roles.
        """
        (prompt, _), *_ = self._encoded([[*messages, {"role": "assistant", "content": "x"}]])
        self._room(len(prompt))

    def _room(self, length: int) -> int:
        """Tokens that an answer may have after a prompt of this length."""
        positions = self.model.config.max_positions
        if length + 1 >= positions:
            raise DataError(
                f"a prompt has {length} tokens for {self.name}, which has {positions} positions; "
                "shorten it"
            )
        return positions - length

    def score(self, texts: Sequence[str | tuple[Prompt, str]]) -> np.ndarray:
        """Score of each text, or of each pair of a prompt and its answer: the higher, the better.

        Args:
            texts: a prompt is a user's message, or the messages before the answer.

        Returns:
            [n] float32. Raises and cuts as `of_answers`.
        """
        read = list(enumerate(read_texts("score", texts)))
        alone = {i: text for i, text in read if isinstance(text, str)}
        pairs = {i: messages for i, messages in read if not isinstance(messages, str)}
        scores = np.zeros(len(texts), np.float32)
        scores[[*alone]] = self.of_texts([*alone.values()])
        scores[[*pairs]] = self.of_answers([*pairs.values()])
        return scores

    def of_answers(self, conversations: Sequence[Sequence[Message]]) -> np.ndarray:
        """Scores [n] float32 of the last messages, each given those before it.

        An answer that is too long for the model's positions is cut at its end, as in training.

        Raises:
            DataError: a prompt fills all of the model's positions.
            WeightsError: a score is not finite.
        """
        prompts, answers = [], []
        for prompt, answer in self._encoded(conversations):
            answer = self._cut(answer, self._room(len(prompt)))
            whole = self._scored(np.concatenate([prompt, answer]))
            start = min(len(prompt), len(whole) - 1)
            prompts.append(whole[:start])
            answers.append([whole[start:]])
        return self._scores(of_tokens(prompts, answers)) if prompts else np.zeros(0, np.float32)

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Scores [n] float32 of texts without a prompt; raises as `of_answers`."""
        positions = self.model.config.max_positions
        judged = self.template.judged(texts)
        cut = [self._scored(self._cut(tokens, positions)) for tokens in judged]
        empty = np.zeros(0, np.int32)
        if not cut:
            return np.zeros(0, np.float32)
        return self._scores(of_tokens([empty] * len(cut), [[tokens] for tokens in cut]))

    def _cut(self, tokens: np.ndarray, room: int) -> np.ndarray:
        """At most `room` tokens; encoders keep the closing one."""
        if len(tokens) <= room:
            return tokens
        closing = int(self.template.encoder)
        return np.concatenate([tokens[: room - closing], tokens[len(tokens) - closing :]])

    def _scored(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens up to the one whose score counts."""
        written = (
            np.flatnonzero(tokens != self._pad) if self._pad is not None else [len(tokens) - 1]
        )
        return tokens[: (written[-1] if len(written) else 0) + 1]

    def _encoded(
        self, conversations: Sequence[Sequence[Message]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens of each prompt, and of its answer."""
        for spans in self.template.encode(conversations):
            *before, (answer, _) = spans
            yield np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in before)]), answer

    def _scores(self, examples: Examples) -> np.ndarray:
        check_embedded(examples.tokens, self.model.vocab_size)
        shards = meshes.data_shards(self.mesh)
        longest = max(int(examples.lengths().max()), SHORTEST_ROW)
        batches = Batches(
            examples,
            TEXTS * shards,
            shards=shards,
            local=meshes.local_shards(self.mesh),
            length=1 << (longest - 1).bit_length(),  # few lengths, so few programs
        )
        scores = np.zeros(len(examples), np.float32)
        with self.model.on(self.mesh):
            for number in range(len(batches)):
                batch = batches[number]
                values = self._score(self.params, loader.to_device(batch, self.mesh))
                scores[batch.examples] = np.asarray(values)[batch.slots[:, 1]]
        if not np.isfinite(scores).all():
            raise WeightsError(
                f"{self.name}: gave a score that is not finite; its weights hold NaN, or overflow "
                "in this dtype"
            )
        return scores

    def _scores_of(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        rows = {name: array[0] for name, array in batch.items()}
        size = TEXTS * meshes.data_shards(self.mesh)
        scores, _ = self.model.score(params, rows, examples=size, answers=1)
        return constrain(scores[:, 0], None)
