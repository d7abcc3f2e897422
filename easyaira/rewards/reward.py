"""The reward of answers: reward models and functions, weighted and added up."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from jax.sharding import Mesh

from easyaira.distributed import hosts
from easyaira.errors import ConfigError, DataError, RewardError, WeightsError, shortened
from easyaira.files import named_path
from easyaira.rewards.model import RewardModel

Messages = Sequence[Mapping[str, str]]


def function_of(name: str) -> Callable[..., Any]:
    """The function called `file.py:function` or `module:function`. Its code is run.

    Raises:
        ConfigError: there is none, or it needs more than prompts and completions.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = named_path(place)
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
    try:
        _bound(function, [], [])
    except TypeError as error:
        raise ConfigError(
            f"rl.reward: {name}: {error}; a function gets prompts and completions, and no other "
            "column of a row"
        ) from error
    return function


class Reward:
    """Weighted sum of reward models and functions.

    Args:
        mesh: devices to compute on; None: only check the names.

    Raises:
        EasyAiraError: a model or function cannot be read.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[float] | None, mesh: Mesh | None, dtype: Any
    ):
        if file := next((name for name in names if name.endswith(".py")), None):
            raise ConfigError(f"rl.reward: {file} is a file; name a function in it as {file}:NAME")
        self.mesh = mesh
        self.weights = [1.0] * len(names) if weights is None else weights
        self.scorers = [
            function_of(name) if ":" in name else RewardModel(name, mesh, dtype) for name in names
        ]
        self.names = names

    def load(self) -> Reward:
        """Read the weights of the models; return self."""
        for scorer in self.scorers:
            if isinstance(scorer, RewardModel):
                scorer.load()
        return self

    def check(self, questions: Sequence[Messages]) -> None:
        """Check that every prompt leaves room for an answer in every model.

        Raises:
            DataError: one does not.
        """
        for scorer in self.scorers:
            if isinstance(scorer, RewardModel):
                for messages in questions:
                    scorer.check(messages)

    def __call__(self, questions: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """Rewards [n] float32 of answers.

        Raises:
            RewardError: a function fails, or gives other than n finite numbers.
        """
        total = np.zeros(len(answers), np.float32)
        for weight, name, scorer in zip(self.weights, self.names, self.scorers, strict=True):
            if isinstance(scorer, RewardModel):
                conversations = [
                    [*messages, {"role": "assistant", "content": answer}]
                    for messages, answer in zip(questions, answers, strict=True)
                ]
                try:
                    rewards = scorer.of_answers(conversations)
                except (DataError, WeightsError) as error:
                    raise RewardError(str(error)) from error
            else:
                rewards = self._of_function(name, scorer, questions, answers)
            total += np.float32(weight) * rewards
        return total

    def _of_function(self, name, function, questions, answers) -> np.ndarray:
        """Call a function on the first host; all hosts get its numbers, or its fault."""
        rewards, problem = np.zeros(len(answers), np.float32), None
        if hosts.first():
            try:
                given, named = _bound(function, prompts_of(questions), list(answers))
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
            raise RewardError(
                f"{problem}; the state is saved; fix the reward and run the command again"
            )
        return hosts.from_first(rewards, self.mesh)


def prompts_of(questions: Sequence[Messages]) -> list[Any]:
    """Prompts as functions get them: the text of a single message, or all messages."""
    return [
        messages[0]["content"] if len(messages) == 1 else [dict(turn) for turn in messages]
        for messages in questions
    ]


def _bound(
    function: Callable[..., Any], prompts: list[Any], completions: list[str]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Arguments of a call: by name, which may come in any order, as in TRL; a function that has
    other names gets prompts and completions in this order.

    Raises:
        TypeError: it needs further arguments.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # it has none
        return (prompts, completions), {}
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    named = {"prompts": prompts, "completions": completions}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        named = {name: texts for name, texts in named.items() if name in signature.parameters}
    if "completions" in signature.parameters:
        try:
            signature.bind(**named)
            return (), named
        except TypeError:
            if next(iter(signature.parameters)) in named:
                raise
    signature.bind(prompts, completions)
    return (prompts, completions), {}


def _numbers(name: str, given: Any, answers: Sequence[str]) -> list[float]:
    try:
        if isinstance(given, Mapping | Set | str | bytes):  # unordered, or characters
            raise TypeError
        rewards = [float(number) for number in given]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"rl.reward: {name} gave {shortened(repr(given))}, expected a list of numbers"
        ) from error
    if len(rewards) != len(answers):
        raise RewardError(
            f"rl.reward: {name} gave {len(rewards)} numbers for {len(answers)} answers"
        )
    for number, answer in zip(rewards, answers, strict=True):
        if not math.isfinite(number) or abs(number) > 1e30:
            raise RewardError(
                f"rl.reward: {name} gave {number} for the answer {shortened(answer)!r}, expected a "
                "finite number"
            )
    return rewards
