"""The reward of answers: reward models and functions, weighted and added up."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from easyaira.data.dataset import Question
from easyaira.distributed import hosts, watchdog
from easyaira.errors import ConfigError, DataError, RewardError, WeightsError, shortened
from easyaira.files import named_path
from easyaira.rewards.model import RewardModel

TEXTS = ("prompts", "completions")  # of every function
RETRY = "fix the reward and run the command again: no update is lost"


def function_of(
    name: str, columns: Callable[[], Iterable[str]] | None = None
) -> Callable[..., Any]:
    """The function called `file.py:function` or `module:function`. Its code is run.

    Args:
        columns: reads those of the prompts; None: the function's arguments are not checked.

    Raises:
        ConfigError: there is none, or it needs an argument that is no column.
    """
    place, _, attribute = name.rpartition(":")
    try:
        path = named_path(place) if place.endswith(".py") else None
        folder = str(path.resolve().parent if path else Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)  # at the end, so that its files hide no library
        if path:
            # a unique name hides no library; dataclasses and pickle look for it in sys.modules
            spec = importlib.util.spec_from_file_location(f"easyaira_reward_{path.stem}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # of any kind: it is the user's code
        raise ConfigError(
            f"rl.reward: {place} cannot be imported: {type(error).__name__}: "
            f"{shortened(str(error), 200)}"
        ) from error
    if not callable(function := getattr(module, attribute, None)):
        raise ConfigError(f"rl.reward: {place} has no function {attribute!r}")
    if columns is not None:
        names = list(columns())
        try:
            _bound(function, dict.fromkeys((*TEXTS, *names), []))
        except TypeError as error:
            raise ConfigError(
                f"rl.reward: {name}: {error}; a function gets prompts, completions and the columns "
                f"of the data: {', '.join(names)}"
            ) from error
    return function


class Reward:
    """Weighted sum of reward models and functions.

    Args:
        mesh: devices to compute on; None: only check the names.
        columns: reads those of the prompts; None: the arguments of functions are not checked.

    Raises:
        EasyAiraError: a model or function cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None,
        mesh: Mesh | None,
        dtype: Any,
        columns: Callable[[], Iterable[str]] | None = None,
    ):
        if file := next((name for name in names if name.endswith(".py")), None):
            raise ConfigError(f"rl.reward: {file} is a file; name a function in it as {file}:NAME")
        self.mesh = mesh
        self.weights = [1.0] * len(names) if weights is None else weights
        self.scorers = [
            function_of(name, columns) if ":" in name else RewardModel(name, mesh, dtype)
            for name in names
        ]
        self.names = names

    def load(self) -> Reward:
        """Read the weights of the models; return self."""
        for scorer in self.scorers:
            if isinstance(scorer, RewardModel):
                scorer.load()
        return self

    def takes(self, column: str) -> bool:
        """Whether a function has an argument for a column."""
        functions = [scorer for scorer in self.scorers if not isinstance(scorer, RewardModel)]
        return column not in TEXTS and any(_names(function, [column]) for function in functions)

    def check(self, questions: Sequence[Question]) -> None:
        """Check that every prompt leaves room for an answer in every model.

        Raises:
            DataError: one does not.
        """
        for scorer in self.scorers:
            if isinstance(scorer, RewardModel):
                for question in questions:
                    scorer.check(question.messages)

    def __call__(self, questions: Sequence[Question], answers: Sequence[str]) -> np.ndarray:
        """Each reward [R, n] float32 of n answers; NaN where a function gives None.

        Raises:
            RewardError: a function fails, gives other than n finite numbers and Nones, or all give
                None for an answer.
        """
        rewards = np.zeros((len(self.names), len(answers)), np.float32)
        for i, (name, scorer) in enumerate(zip(self.names, self.scorers, strict=True)):
            watchdog.beat(f"computing the reward {name}")
            if isinstance(scorer, RewardModel):
                conversations = [
                    [*question.messages, {"role": "assistant", "content": answer}]
                    for question, answer in zip(questions, answers, strict=True)
                ]
                try:
                    rewards[i] = scorer.of_answers(conversations)
                except (DataError, WeightsError) as error:
                    raise RewardError(str(error)) from error
            else:
                rewards[i] = self._of_function(name, scorer, questions, answers)
        without = np.isnan(rewards).all(0)
        if without.any():
            answer = answers[int(without.argmax())]
            raise RewardError(
                f"rl.reward: no function gives a number for the answer {shortened(answer)!r}; "
                f"{RETRY}"
            )
        return rewards

    def total(self, rewards: np.ndarray) -> np.ndarray:
        """Weighted sum [n] of rewards [R, n]; NaN counts as 0, as in TRL 1.16."""
        total = np.zeros(rewards.shape[1:], np.float32)
        for weight, own in zip(self.weights, np.nan_to_num(rewards), strict=True):
            total += np.float32(weight) * own
        return total

    def logged(self, rewards: np.ndarray) -> dict[str, np.ndarray]:
        """Each of several rewards [R, n], by its metric."""
        metrics = metrics_of(self.names)
        return dict(zip(metrics, rewards, strict=True)) if metrics else {}

    def _of_function(self, name, function, questions, answers) -> np.ndarray:
        """Call a function on the first host; all hosts get its numbers, or its fault."""
        rewards, problem = np.zeros(len(answers), np.float32), None
        if hosts.first():
            try:
                columns = {n: [q.columns[n] for q in questions] for n in questions[0].columns}
                texts = dict(zip(TEXTS, (prompts_of(questions), list(answers)), strict=True))
                given, named = _bound(function, columns | texts)
                given = function(*given, **named)
                rewards[:] = _numbers(name, given, answers)
            except RewardError as error:
                problem = str(error)
            except (Exception, SystemExit) as error:  # of any kind: it is the user's code
                last = traceback.extract_tb(error.__traceback__)[-1]
                problem = (
                    f"rl.reward: {name} raised {type(error).__name__}: "
                    f"{shortened(str(error), 200)} ({last.filename}:{last.lineno})"
                )
        if (problem := hosts.problem_of_any(problem)) is not None:
            raise RewardError(f"{problem}; {RETRY}")
        return hosts.from_first(rewards, self.mesh)


def metrics_of(names: Sequence[str]) -> list[str]:
    """Name of each reward in metrics, if there are several: that of the function, or the last part
    of a model's."""
    short = [re.split("[:/]", name.rstrip("/"))[-1] for name in names]
    equal = {name for name, count in Counter(short).items() if count > 1}
    numbered = (f"{name}_{i}" if name in equal else name for i, name in enumerate(short, 1))
    return [f"rewards/{name}/mean" for name in numbered] if len(names) > 1 else []


def prompts_of(questions: Sequence[Question]) -> list[Any]:
    """Prompts as functions get them: the text of a single message, or all messages."""
    return [
        messages[0]["content"] if len(messages) == 1 else [dict(turn) for turn in messages]
        for messages, _ in questions
    ]


def _names(function: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of `names` that a function has an argument for."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # it has none
        return []
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(names)
    return [name for name in names if name in parameters]


def _bound(
    function: Callable[..., Any], lists: Mapping[str, list[Any]]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Arguments of a call: by name, which may come in any order, as in TRL; a function that has
    other names for prompts and completions gets them first, in this order.

    Args:
        lists: prompts, completions, and columns.

    Raises:
        TypeError: it needs further arguments.
    """
    first = [lists[name] for name in TEXTS]
    try:
        signature = inspect.signature(function)
    except ValueError:  # it has none
        return first, {}
    named = {name: lists[name] for name in _names(function, lists)}
    if "completions" in signature.parameters:
        try:
            signature.bind(**named)
            return (), named
        except TypeError:
            if next(iter(signature.parameters)) in named:
                raise
    taken = {*TEXTS, *list(signature.parameters)[:2]}
    named = {name: values for name, values in named.items() if name not in taken}
    signature.bind(*first, **named)
    return first, named


def _numbers(name: str, given: Any, answers: Sequence[str]) -> list[float]:
    """What a function gave, with NaN for None."""
    try:
        if isinstance(given, Mapping | Set | str | bytes):  # unordered, or characters
            raise TypeError
        given = list(given)
        rewards = [math.nan if number is None else float(number) for number in given]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"rl.reward: {name} gave {shortened(repr(given))}, expected a list of numbers"
        ) from error
    if len(rewards) != len(answers):
        raise RewardError(
            f"rl.reward: {name} gave {len(rewards)} numbers for {len(answers)} answers"
        )
    for number, own, answer in zip(rewards, given, answers, strict=True):
        if own is not None and not abs(number) <= 1e30:
            raise RewardError(
                f"rl.reward: {name} gave {number} for the answer {shortened(answer)!r}, expected a "
                "finite number, or None"
            )
    return rewards
