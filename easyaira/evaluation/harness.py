"""EasyAira's scorer and sampler as a model of lm-evaluation-harness."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import tasks as harness_tasks
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from easyaira.data.examples import check_embedded
from easyaira.errors import ConfigError, DataError, shortened
from easyaira.evaluation import local
from easyaira.evaluation.likelihood import Likelihoods, Request
from easyaira.evaluation.results import METRICS, Result, digest
from easyaira.files import reason
from easyaira.generation.processors import Sampling
from easyaira.generation.programs import Programs
from easyaira.generation.sampler import Sampler

SEED = 1234  # of the few-shot examples, as the harness's own
MOST_NEW_TOKENS = 256  # of an answer whose task states no number, as in the harness
logging.getLogger("lm_eval").setLevel(logging.ERROR)


class EasyAiraLM(TemplateLM):
    """A language model as the harness's `hf` backend shows it: the same tokens, the same sums.

    Args:
        likelihoods: computes the log-likelihoods.
        tokenizer: that of the model.
        end_ids: tokens that end a generated text.

    Attributes:
        truncated: requests whose context was cut on the left, since it exceeded the model's
            positions.
    """

    def __init__(self, likelihoods: Likelihoods, tokenizer: Any, end_ids: Sequence[int]):
        super().__init__()
        self.likelihoods, self.tokenizer, self.end_ids = likelihoods, tokenizer, tuple(end_ids)
        self.model = likelihoods.model
        self.truncated = 0
        # the choices of a question follow each other, with the same context
        self._encode = lru_cache(maxsize=4)(self._encode_anew)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.config.max_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._encode(string, add_special_tokens)

    def _encode_anew(self, string: str, add_special_tokens: bool | None) -> list[int]:
        if add_special_tokens is None:
            first = self.tokenizer.decode(self.prefix_token_id)
            given = {"add_special_tokens": False} if has_bos_prefix(string, first) else {}
        else:
            given = {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def loglikelihood(self, requests, disable_tqdm=False):
        return super().loglikelihood(requests, disable_tqdm=True)  # it shows only the tokenising

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        prepared = [self._fitted(*request) for request in requests]
        with tqdm(total=len(prepared), unit="request", disable=None) as bar:
            return [tuple(one) for one in self.likelihoods(prepared, bar.update)]

    def _fitted(self, texts: Any, context: list[int], continuation: list[int]) -> Request:
        """A request whose tokens fit into the model's positions."""
        if not continuation:
            raise DataError(f"a choice of the task has no tokens: {shortened(repr(texts[1]))}")
        if len(continuation) > self.max_length:
            raise DataError(
                f"a choice of the task has {len(continuation)} tokens, and the model has "
                f"{self.max_length} positions: {shortened(repr(texts[1]))}"
            )
        check_embedded([*context, *continuation], self.model.vocab_size)
        kept = self.max_length + 1 - len(continuation)
        self.truncated += len(context) > kept
        return Request(context[-kept:], continuation)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(("", ""), *utils.make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        likelihoods = iter(self._loglikelihood_tokens(windows))
        return [sum(next(likelihoods)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests, disable_tqdm=False):
        answers: list[Any] = [None] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)
        programs: list[Programs] = []
        weights = None  # the same for all ways to sample
        with tqdm(total=len(requests), unit="answer", disable=None) as bar:
            for index in kinds.values():
                sampling, until = self._sampling(requests[index[0]].args[1])
                sampler = Sampler(self.model, sampling, text=self._text, programs=programs)
                programs.append(sampler.programs)
                prompts = [self._prompt(requests[i].args[0], sampling) for i in index]
                with self.model.on(self.likelihoods.mesh):
                    weights = weights or sampler.weights(self.likelihoods.params)
                    for number, answer in sampler.answers(weights, prompts):
                        text = postprocess_generated_text(self._text(answer.content), until, None)
                        answers[index[number]] = text
                        bar.update()
        return answers

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _prompt(self, text: str, sampling: Sampling) -> list[int]:
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"the task asks for {sampling.max_new_tokens} new tokens, and the model has "
                f"{self.max_length} positions; choose another task"
            )
        tokens = self.tok_encode(text)
        self.truncated += len(tokens) > room
        return tokens[-room:]

    def _sampling(self, given: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """Sampling options of a task, and the texts that end an answer."""
        options = dict(normalize_gen_kwargs(given, MOST_NEW_TOKENS))
        end = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until", None), eos=end)
        sample, most = options.pop("do_sample", False), options.pop("max_gen_toks")
        temperature = options.pop("temperature", 1.0) if sample else 0.0
        options.pop("temperature", None)
        known = {field.name for field in fields(Sampling)}
        if unknown := options.keys() - known:
            raise ConfigError(f"the task sets {min(unknown)}, which the sampler does not have")
        stops = tuple(text for text in until if text)
        return (
            Sampling(
                max_new_tokens=most,
                temperature=temperature,
                end_ids=self.end_ids,
                stop_strings=stops,
                **options,
            ),
            until,
        )


def load(names: list[str], folder: Path | None) -> dict[str, Any]:
    """Tasks of the harness by name.

    Args:
        folder: of data files; None: the hub's data.

    Raises:
        ConfigError: a task is unknown, or its data cannot be loaded.
        DataError: a file cannot be read.
    """
    if folder is None:
        manager = harness_tasks.TaskManager()
        check_names(names, manager.all_tasks, "; `lm-eval ls tasks` lists them")
        wanted: Any = names
    else:
        check_names(names, local.LOCAL, f"; with --data, choose from {', '.join(local.LOCAL)}")
        places = local.definitions(names, Path(harness_tasks.__file__).parent)
        manager = harness_tasks.TaskManager(include_path=places, include_defaults=False)
        # a group takes tasks of the index with changed entries
        wanted = {"group": "local", "task": [local.overrides(folder, name) for name in names]}
    try:
        return manager.load(wanted)["tasks"]
    except (ConfigError, DataError):
        raise
    except Exception as error:  # the harness, datasets and the hub raise many types
        raise ConfigError(
            f"tasks: the data of {', '.join(names)} cannot be loaded: {shortened(reason(error))}; "
            "without network, give local files with --data"
        ) from error


def check_names(names: list[str], known: Any, hint: str) -> None:
    """Refuse names that are not among `known`.

    Raises:
        ConfigError: names the nearest one.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"tasks: {name}: no such task" + (f"; did you mean {near[0]}?" if near else hint)
            )


def place(name: str, task: Any, data: Path | None) -> str:
    """Hash of where a task's rows come from (see `Result.place`)."""
    if data:
        return digest(str(local.find(data, local.LOCAL[name].file).resolve()))
    return digest(str(task.config.dataset_path), str(task.config.dataset_name))


def result(
    lm: EasyAiraLM,
    name: str,
    task: Any,
    *,
    num_fewshot: int | None,
    limit: int | None,
    data: Path | None,
    dtype: str,
    step: int | None,
    versions: dict[str, Any],
) -> Result:
    """Evaluate one task.

    Args:
        data: folder of data files; None: the hub's data.
        dtype, step, versions: see `Result`.
    """
    lm.truncated = 0
    outcome = run(lm, {name: task}, num_fewshot=num_fewshot, limit=limit)
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in outcome["results"][name].items()
        if "," in key and "_stderr" not in key and isinstance(value, float | int)
    }
    metric = next((known for known in METRICS if known in metrics), next(iter(metrics)))
    samples = outcome["samples"][name]
    documents = {sample["doc_id"]: sample["doc_hash"] for sample in samples}
    values = [sample[metric] for sample in samples if metric in sample]
    is_mean = values and all(isinstance(value, float | int) for value in values)
    is_mean = is_mean and abs(float(np.mean(values)) - metrics[metric]) < 1e-9
    higher = outcome["higher_is_better"][name].get(metric.partition(",")[0], True)
    return Result(
        task=name,
        metric=metric,
        metrics=metrics,
        better="higher" if higher else "lower",
        examples=len(documents),
        data=local.LOCAL[name].file if data else str(task.config.dataset_path),
        dtype=dtype,
        stderr=float(np.std(values, ddof=1) / len(values) ** 0.5)
        if is_mean and len(values) > 1
        else None,
        num_fewshot=outcome["n-shot"][name],
        limit=limit,
        truncated=lm.truncated,
        step=step,
        versions=versions | {"task": outcome["versions"][name]},
        place=place(name, task, data),
        content=digest(*documents.values()),
    )


def run(
    lm: Any, tasks: dict[str, Any], *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The harness's results, with its samples.

    Args:
        lm: EasyAiraLM, or any model of the harness.
        num_fewshot: see `set_shots`.
        limit: questions of each task.
    """
    for task in tasks.values():
        set_shots(task, num_fewshot)
        task.set_fewshot_seed(SEED)
    return evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)


def set_shots(task: Any, num_fewshot: int | None) -> int:
    """Set and return the number of examples in each prompt: of a task that fixes it at 0, 0; for
    None, as the task says, or 0."""
    stated = task.get_config("num_fewshot")
    if stated is None or (num_fewshot is not None and stated != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    return task.get_config("num_fewshot")
