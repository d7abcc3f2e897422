"""A model in Python: load a folder, generate answers, compute log-probabilities. See `load`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.data.packing import bucket
from easyaira.data.template import Template
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError, DataError
from easyaira.generation.chat import text_of
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import Sampler
from easyaira.generation.settings import end_ids, files_of, options_of
from easyaira.losses.token_logps import token_logps
from easyaira.models.layers import Compute
from easyaira.models.registry import model_of
from easyaira.storage import pretrained

Message = Mapping[str, str]
Prompt = str | Sequence[Message]  # a user's message, or a conversation that ends before the answer

ROWS = 16  # texts per call of `logps`


def load(
    name: str, *, mesh: str = "fsdp=-1", dtype: str = "float32", template: str = "chat"
) -> LoadedModel:
    """Load a language model.

    Args:
        name: run folder (also with adapters), checkpoint, Hugging Face folder or hub id.
        mesh: devices, as for training.
        dtype: float32 or bfloat16, to compute in.
        template: as `data.template`; chat: the model's own.

    Raises:
        EasyAiraError: the folder cannot be read, or is no language model.
    """
    origin = pretrained.find(name)
    model = model_of(origin.config, origin.where, Compute(dtype=jnp.dtype(dtype)), scorer=False)
    origin.check(model)
    encoder = Template(origin.tokenizer(), template, origin.config["model_type"])
    devices = meshes.make_mesh(mesh)
    with model.on(devices):
        return LoadedModel(origin, model, origin.load(model, devices), encoder, devices)


class LoadedModel:
    """A language model with its weights on devices.

    Attributes:
        config: content of config.json.
        tokenizer: that of transformers.
        template: encodes messages.
        params: weights, in EasyAira's layout.
    """

    def __init__(self, origin: Any, model: Any, params: Any, template: Template, mesh: Any):
        self.origin, self.model, self.params = origin, model, params
        self.template, self.mesh = template, mesh
        self.config, self.tokenizer = origin.config, template.tokenizer
        self._logps = jax.jit(self._logps_of)

    def generate(
        self, prompts: Sequence[Prompt], *, num_samples: int = 1, seed: int = 0, **options: Any
    ) -> list[list[str]]:
        """Answers to each prompt, `num_samples` of them.

        Args:
            prompts: texts of a user, or lists of messages.
            options: fields of `Sampling`, such as max_new_tokens and temperature; defaults are
                those of the folder's generation_config.json.

        Raises:
            ConfigError: an option does not exist.
            DataError: a prompt leaves no room for an answer.
        """
        known = {field.name for field in fields(Sampling)} - {"end_ids"}
        if unknown := options.keys() - known:
            raise ConfigError(
                f"generate: option {min(unknown)!r} is unknown; choose from "
                f"{', '.join(sorted(known))}"
            )
        ends = end_ids(self.template, files_of(self.origin), self.model.vocab_size)
        options = options_of(self.origin.generation_config) | options
        sampling = Sampling(**{"end_ids": tuple(ends)} | options)
        sampler = Sampler(self.model, sampling, text=self.template.text)
        tokens = [self.template.prompt(_messages(prompt)).tolist() for prompt in prompts]
        with self.model.on(self.mesh):
            weights = sampler.weights(self.params)
            answers = dict(sampler.answers(weights, tokens, num_samples=num_samples, seed=seed))
        stops = sampling.stop_strings
        texts = [text_of(answers[i], self.template, stops) for i in range(len(answers))]
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def logps(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Log-probability of each answer given its prompt, in nats, with the token that ends it.

        Returns:
            [n] float32: sums over the answer's tokens, as DPO's.

        Raises:
            DataError: a prompt with its answer exceeds the model's positions.
        """
        messages = [
            [*_messages(prompt), {"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for conversation in messages:
            self.template.accepts(conversation)
        encoded = self.template.encode(messages)
        result = np.zeros(len(encoded), np.float32)
        with self.model.on(self.mesh):
            for index, rows in self._batches(encoded):
                result[index] = np.asarray(self._logps(self.params, rows))[: len(index)]
        return result

    def _batches(self, encoded: list[Any]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of similar lengths, and which texts they are."""
        lengths = np.array([sum(len(tokens) for tokens, _ in spans) for spans in encoded])
        positions = self.model.config.max_positions
        if len(lengths) and lengths.max() > positions:
            raise DataError(
                f"text {lengths.argmax()} has {lengths.max()} tokens with its answer, and the "
                f"model has {positions} positions; shorten it"
            )
        order = np.argsort(lengths, kind="stable")
        count = ROWS * meshes.data_shards(self.mesh)
        for index in np.split(order, range(count, len(order), count)) if len(order) else ():
            length = min(bucket(int(lengths[index].max()), 8), positions)
            tokens = np.zeros((count, length), np.int32)
            segment_ids, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
            for row, i in enumerate(index):
                spans = encoded[i]
                tokens[row, : lengths[i]] = np.concatenate([ids for ids, _ in spans])
                segment_ids[row, : lengths[i]] = 1
                mask[row, lengths[i] - len(spans[-1][0]) : lengths[i]] = True
            mask[:, 0] = False  # nothing precedes it
            places = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
            yield (
                index,
                {
                    "tokens": tokens,
                    "positions": places,
                    "segment_ids": segment_ids,
                    "sides": np.zeros_like(tokens),
                    "loss_mask": mask,
                },
            )

    def _logps_of(self, params: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        hidden, head = self.model.apply(params, rows)
        vocab_size = self.model.vocab_size
        stats = token_logps(hidden, head, rows["tokens"], rows["loss_mask"], vocab_size=vocab_size)
        return stats.logps.sum(-1)


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
