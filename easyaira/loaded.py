"""A model in Python: load a folder, generate answers, compute log-probabilities and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from numbers import Integral
from os import PathLike, fspath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyaira.data.batches import LAYOUT, Batches
from easyaira.data.chat_templates import as_argument
from easyaira.data.examples import Parts, check_embedded, of_parts
from easyaira.data.listed import Prompt, at, read_answers, read_prompts
from easyaira.data.template import Template
from easyaira.distributed import mesh as meshes
from easyaira.distributed.compiler import keep_order
from easyaira.distributed.mesh import data_shards
from easyaira.errors import ConfigError, DataError, did_you_mean
from easyaira.generation.chat import text_of
from easyaira.generation.forward import Weights
from easyaira.generation.processors import Sampling
from easyaira.generation.programs import Programs
from easyaira.generation.sampler import ROWS, Sampler
from easyaira.generation.settings import (
    NUMBERS,
    end_ids,
    files_of,
    number_of,
    options_of,
    stop_strings,
)
from easyaira.losses.token_logps import token_logps
from easyaira.models.attention import implementation_for
from easyaira.models.layers import Compute
from easyaira.models.registry import model_of
from easyaira.rewards.model import RewardModel
from easyaira.storage import pretrained
from easyaira.storage.frozen import load_frozen
from easyaira.train.resolve import has_weights

TEXTS = 16  # per device and call
DTYPES = ("float32", "bfloat16")


def load(
    name: str | PathLike[str],
    *,
    mesh: str | None = None,
    dtype: str = "float32",
    template: str | PathLike[str] = "chat",
) -> LoadedModel | RewardModel:
    """Load a language model, or a reward or toxicity model.

    Args:
        name: run folder (also with adapters), checkpoint, Hugging Face folder, adapter of a
            language model in PEFT's format, or hub id.
        mesh: devices, as for training; None: all of them.
        dtype: float32 or bfloat16, to compute in.
        template: as `data.template`; chat: the model's own. Encoders have one form.

    Raises:
        EasyAiraError: the folder cannot be read, or is an encoder without a score head.
    """
    keep_order()
    if dtype not in DTYPES:
        near = did_you_mean(str(dtype), DTYPES)
        raise ConfigError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}{near}")
    if not isinstance(name, str | PathLike):
        raise ConfigError(f"load: expected a folder or a hub id, got {name!r}")
    if not isinstance(template, str | PathLike):
        raise ConfigError(f"template: expected a name or a .jinja file, got {template!r}")
    if not isinstance(mesh, str | None):
        raise ConfigError(f"mesh: expected a text such as dp=1,fsdp=-1,tp=1, got {mesh!r}")
    mesh, template = "fsdp=-1" if mesh is None else mesh, fspath(template)
    origin = pretrained.find(fspath(name))
    if model_of(origin.config, origin.where).scorer:
        return RewardModel(origin, meshes.make_mesh(mesh), dtype, template).load()
    loaded = LoadedModel(origin, mesh=mesh, dtype=dtype, template=template)
    _ = loaded.params  # read them now, so that errors are raised here
    return loaded


class LoadedModel:
    """A language model, whose weights are read when `params` is first used.

    Attributes:
        config: content of config.json.
        tokenizer: that of transformers.
        template: encodes messages.
        params: weights, in EasyAira's layout; matrices in `dtype`.
    """

    def __init__(
        self,
        origin: Any,
        *,
        mesh: str,
        dtype: str,
        template: str,
        devices: Any = None,
        planned: bool = False,
    ):
        """
        Args:
            planned: the model will not run, so that its weights may be absent.
        """
        self.mesh = meshes.make_mesh(mesh, devices)
        compute = Compute(jnp.dtype(dtype), attention=implementation_for(self.mesh))
        self.origin = origin
        self.model = model_of(origin.config, origin.where, compute, scorer=False)
        if has_weights(origin) or not planned:
            origin.check(self.model)
        with as_argument():
            self.template = Template(origin.tokenizer(), template, origin.config["model_type"])
        self.config, self.tokenizer = origin.config, self.template.tokenizer
        self._logps = jax.jit(self._logps_of)
        self._weights: Weights | None = None
        self._programs: dict[Sampling, Programs] = {}

    @cached_property
    def params(self) -> Any:
        with self.model.on(self.mesh):
            return load_frozen(self.origin, self.model, self.mesh)

    def weights(self, sampler: Sampler) -> Weights:
        """Weights for any sampler of this model, prepared once: of `params` where they have been
        read, else of the files."""
        if self._weights is None:
            with self.model.on(self.mesh):
                if "params" in vars(self):
                    self._weights = sampler.weights(self.params)
                else:
                    self._weights = sampler.read(partial(self.origin.load, self.model, self.mesh))
        return self._weights

    def sampling(self, **options: Any) -> Sampling:
        """Sampling settings: `options` override those of the folder's generation_config.json.

        Raises:
            ConfigError: an option does not exist, is out of range, or has no effect.
        """
        known = {field.name for field in fields(Sampling)} - {"end_ids"}
        if unknown := options.keys() - known:
            hint = "; it is called stop_strings" if min(unknown) == "stop" else ""
            raise ConfigError(
                f"generate: option {min(unknown)!r} is unknown{hint}; choose from "
                f"{', '.join(sorted(known))}"
            )
        for name in options.keys() & NUMBERS.keys():
            options[name] = number_of(name, options[name], "generate")
        ends = end_ids(self.template, files_of(self.origin), self.model.vocab_size)
        settings = options_of(self.origin.generation_config) | options
        sampling = Sampling(**{"end_ids": tuple(ends)} | settings)
        for name in ("top_k", "top_p", "min_p"):
            if name in options and sampling.greedy:
                raise ConfigError(
                    f"{name}: has no effect on greedy generation; set temperature, too"
                )
        if sampling.min_new_tokens > sampling.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens: {sampling.min_new_tokens} exceeds max_new_tokens, "
                f"{sampling.max_new_tokens}; lower it"
            )
        return sampling

    def sampler(self, sampling: Sampling, rows: int = ROWS, steps: int | None = None) -> Sampler:
        """A sampler with these settings. Settings that need the same programs share them."""
        sampler = Sampler(
            self.model,
            sampling,
            text=self.template.text,
            rows=rows,
            steps=steps,
            programs=self._programs.values(),
        )
        self._programs[sampler.programs.sampling] = sampler.programs
        return sampler

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int = 1,
        batch_size: int = ROWS,
        seed: int = 0,
        **options: Any,
    ) -> list[list[str]]:
        """Answers to each prompt, `num_samples` of them.

        Args:
            prompts: texts of a user, or lists of messages.
            batch_size: answers that are generated together.
            options: fields of `Sampling`, such as max_new_tokens and temperature; defaults are
                those of the folder's generation_config.json.

        Raises:
            ConfigError: an option does not exist, is out of range, or has no effect.
            DataError: a prompt leaves no room for an answer.
        """
        numbers = ("num_samples", num_samples, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)
        for option, number, least in numbers:
            whole = isinstance(number, Integral) and not isinstance(number, bool)  # also NumPy's
            if not whole or not least <= number < 2**32:
                raise ConfigError(
                    f"generate: {option}: expected a whole number from {least}, below 2**32, got "
                    f"{number!r}"
                )
        if "stop_strings" in options:
            options["stop_strings"] = stop_strings(options["stop_strings"], "generate")
        sampling = self.sampling(**options)
        sampling.check(int(num_samples))
        sampler = self.sampler(sampling, int(batch_size))
        tokens = []
        for i, messages in enumerate(read_prompts("generate", prompts)):
            with at(f"generate: place {i}"):
                tokens.append(self.template.prompt(messages).tolist())
        with self.model.on(self.mesh):
            weights = self.weights(sampler)
            answers = dict(sampler.answers(weights, tokens, num_samples=num_samples, seed=seed))
        texts = [self.text(answers[i], sampling) for i in range(len(answers))]
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def text(self, answer: Any, sampling: Sampling) -> str:
        """Text of an answer, up to the first stop string."""
        return text_of(answer, self.template, sampling.stop_strings)

    def logps(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Log-probability of each answer given its prompt, in nats, including its end token.

        Returns:
            [n] float32: sums over the answer's tokens, as DPO's.

        Raises:
            DataError: a prompt with its answer exceeds the model's positions.
        """
        asked, replies = read_prompts("logps", prompts), read_answers("logps", answers)
        if len(asked) != len(replies):
            raise ConfigError(
                f"logps: found {len(asked)} prompts and {len(replies)} answers; give each "
                "prompt one answer"
            )
        conversations = [
            [*messages, {"role": "assistant", "content": reply}]
            for messages, reply in zip(asked, replies, strict=True)
        ]
        for i, conversation in enumerate(conversations):
            with at(f"logps: place {i}"):
                self.template.accepts(conversation)
        parts = [_parts(spans) for spans in self.template.encode(conversations)]
        result = np.zeros(len(parts), np.float32)
        with self.model.on(self.mesh):
            for index, segments, rows in self._batches(parts):
                logps = np.asarray(self._logps(self.params, rows))
                sums = np.bincount(rows["segment_ids"].ravel(), logps.ravel())
                result[index] = sums[segments]
        return result

    def _batches(
        self, parts: Sequence[Parts]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """Yield (indices of texts [n], their segment ids [n], rows in the layout of training).

        Raises:
            DataError: a text exceeds the model's positions.
        """
        if not parts:
            return
        examples = of_parts(parts)
        check_embedded(examples.tokens, self.model.vocab_size)
        lengths = examples.lengths()[:, 0]
        positions = self.model.config.max_positions
        if lengths.max() > positions:
            raise DataError(
                f"text {np.argmax(lengths)} has {lengths.max()} tokens with its answer, and the "
                f"model has {positions} positions; shorten it"
            )
        shards = data_shards(self.mesh)
        order = np.argsort(lengths, kind="stable")
        batches = Batches(examples.take(order), TEXTS * shards, shards=shards)
        for number in range(len(batches)):
            batch = batches[number]
            rows = {name: batch.arrays[name][0] for name in LAYOUT}
            yield order[batch.examples], 1 + batch.slots[:, 1], rows

    def _logps_of(self, params: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        """Log-probability of each learned token [R, T]."""
        hidden, head = self.model.apply(params, rows)
        options = self.model.head_options
        return token_logps(hidden, head, rows["tokens"], rows["loss_mask"], **options).logps


def _parts(spans: Sequence[tuple[np.ndarray, bool]]) -> Parts:
    """The last span is the answer."""
    prompt = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in spans[:-1])])
    answer = spans[-1][0]
    learned = np.arange(len(prompt), len(prompt) + len(answer)) > 0  # nothing precedes the first
    return Parts(prompt, np.zeros(len(prompt), bool), [(answer, learned)])
