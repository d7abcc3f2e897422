"""On-policy training: the current weights answer prompts, a reward scores the answers, and an
objective learns from them.

A rollout is a function of the weights, the seed and its number. So nothing of it is saved: a run
resumes only between rollouts. Shapes: P prompts with K answers each, G = P x K answers of at most
C tokens; A micro-batches of B answers, in examples of `together` answers that share their prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easyaira.algorithms import grpo, online_dpo, ppo, rloo
from easyaira.algorithms.held_out import HeldOut, rewards_of
from easyaira.algorithms.on_policy import Objective, known_of, logps_of, loss_of, values_of
from easyaira.algorithms.reference import make_score, reference_model, reference_weights
from easyaira.config.data import DataConfig
from easyaira.config.rl import RLConfig
from easyaira.config.run import TrainRL
from easyaira.data.batches import LAYOUT, Batches
from easyaira.data.dataset import columns_of, questions_of
from easyaira.data.examples import Examples, of_tokens
from easyaira.data.recipe import Recipe, recipe_of
from easyaira.distributed import hosts, watchdog
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError, StorageError
from easyaira.files import json_line, parse_json, reason, write_file
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import ROWS, Answer, Sampler
from easyaira.generation.settings import end_ids, files_of
from easyaira.models.model import Model
from easyaira.rewards.reward import Reward
from easyaira.train import loader
from easyaira.train.algorithm import Algorithm, Beginning, OnPolicy
from easyaira.train.critic import critic_of
from easyaira.train.loader import Ready
from easyaira.train.setup import Setup
from easyaira.train.step import LossFn

OBJECTIVES = {
    "grpo": Objective(grpo.advantages, grpo.loss),
    "rloo": Objective(rloo.advantages, rloo.loss),
    "online_dpo": Objective(online_dpo.advantages, online_dpo.loss, together=2),
    "ppo": Objective(None, ppo.loss, targets=ppo.targets),
}
SHOWN = 4  # answers of a rollout in COMPLETIONS
COMPLETIONS = "completions.jsonl"  # in the run folder


def rl_algorithm(config: TrainRL) -> Algorithm:
    """On-policy training, as `run` expects an algorithm."""
    rl, longest = config.rl, int(config.rl.max_completion_length)
    objective = OBJECTIVES[rl.algorithm]

    def epoch(prompts: Examples) -> int:
        count = config.answers // rl.answers_per_prompt
        if len(prompts) < count:
            raise ConfigError(
                f"data.train: {len(prompts)} prompts are fewer than the {count} of a rollout; "
                "lower train_batch_size or raise rl.num_generations"
            )
        for names, data in rewards_of(config):  # raises if there is none
            Reward(names, None, None, "float32", partial(columns_of, config.data, data))
        return len(prompts) // count * config.cycle

    def together(answers: int) -> list[int]:
        """Numbers of answers that an example may hold without changing the answers of any
        update."""
        own, whole = int(rl.answers_per_prompt), config.answers == config.train_batch_size
        if not whole and objective.together < own:
            return [1]
        return [n for n in range(1, own + 1) if own % n == answers % n == 0]

    def loss_fn(setup: Setup) -> LossFn:
        value = setup.critic and setup.trainable.value
        return loss_of(setup.model, rl, objective, value)

    return Algorithm(
        recipe=partial(prompts_of, config.data, rl),
        loss_fn=loss_fn,
        frozen=lambda setup: None,
        begin=lambda setup, params, folder, first: Beginning(),
        known=lambda setup: known_of(objective, rl, setup.batches.examples.answers),
        critic=partial(critic_of, rl.value_model, config.model.init) if objective.targets else None,
        on_policy=OnPolicy(
            largest=partial(largest_update, answers=int(config.train_batch_size), longest=longest),
            together=together,
            epoch=epoch,
            cycle=config.cycle,
            source=Rollouts,
        ),
    )


def prompts_of(data: DataConfig, rl: RLConfig, max_length: int) -> Recipe:
    """Recipe of prompts that leave room for an answer.

    Raises:
        ConfigError: the longest answer leaves no room.
    """
    longest = int(rl.max_completion_length)
    if longest >= max_length:
        raise ConfigError(
            f"rl.max_completion_length: {longest} leaves no room for a prompt in {max_length} "
            "positions; lower it"
        )
    return recipe_of("prompt", data, max_length - longest)


def largest_update(prompts: Examples, together: int, *, answers: int, longest: int) -> Examples:
    """The longest prompts, with answers of `longest` tokens, `together` in an example."""
    starts, ends = prompts.bounds[:, 0], prompts.bounds[:, 1]
    order = np.resize(np.argsort(starts - ends, kind="stable"), answers // together)
    tokens = [prompts.tokens[starts[i] : ends[i]] for i in order]
    own = [np.zeros(longest, np.int32)] * together
    return of_tokens(tokens, [own] * len(order), prompts.rows[order])


def make_sampler(setup: Setup) -> Sampler:
    """Sampler of the rollouts."""
    config: TrainRL = setup.config
    files = {} if config.model.tokenizer else files_of(setup.origin)
    sampling = Sampling(
        max_new_tokens=int(config.rl.max_completion_length),
        temperature=config.rl.temperature,
        top_k=int(config.rl.top_k),
        top_p=config.rl.top_p,
        end_ids=tuple(end_ids(setup.template, files, setup.model.vocab_size)),
    )
    return Sampler(setup.model, sampling, rows=ROWS * meshes.data_shards(setup.mesh))


def largest_cache(setup: Setup, sampler: Sampler) -> tuple[int, int]:
    """Upper bounds on the rows and slots of a rollout's cache."""
    config: TrainRL = setup.config
    lengths = np.sort(np.diff(setup.data.train.bounds[:, :2])[:, 0])
    own = int(config.rl.answers_per_prompt)
    return sampler.largest_cache(lengths[-(config.answers // own) :].tolist(), own)


class Rollouts:
    """Makes the batches of an on-policy run; see train.loader.Stored for the interface.

    Args:
        folder: the run folder, which gets some answers of each rollout.
        start: first update of this process.
        stopping: returns whether a signal has requested a stop.
    """

    def __init__(self, setup: Setup, folder: Path, start: int, stopping: Callable[[], bool]):
        config: TrainRL = setup.config
        self.setup, self.config, self.rl, self.stopping = setup, config, config.rl, stopping
        count = config.answers // self.rl.answers_per_prompt
        data = setup.data.train
        self.prompts = Batches(data, count, seed=config.order_seed, drop_last=True)
        reward = Reward(
            self.rl.rewards, self.rl.reward_weights, setup.mesh, setup.model.compute.dtype
        )
        self.questions = questions_of(config.data, data, config.data.train, reward.takes)
        reward.check(self.questions)
        self.reward = reward.load()
        self.sampler = make_sampler(setup)
        score_by = partial(make_score, names=(*LAYOUT, "prompt_lengths"))
        self.score = score_by(partial(of_policy, setup.model, config.rl))
        if setup.critic:
            self.score_values = score_by(partial(of_critic, setup.trainable.value, config.rl))
        self.reference: Any = None
        if self.rl.beta:
            self.score_ref = self.score
            if config.model.ref_name_or_path is not None:
                self.score_ref = score_by(partial(of_policy, reference_model(setup), config.rl))
            self.reference = reference_weights(setup)
        self.together = setup.batches.examples.answers
        self.batches: Batches | None = None
        self.held_out = setup.data.held_out and HeldOut(setup, self.sampler, self.reward)
        self.log = Log(folder / COMPLETIONS, start) if hosts.first() else None

    def __len__(self) -> int:
        return len(self.prompts) * self.config.cycle

    def rows(self, update: int) -> np.ndarray:
        members = self.prompts.members(update // self.config.cycle)
        return self.setup.data.train.rows[members]

    def __call__(self, update: int, params: Any) -> Ready | None:
        begun = time.perf_counter()
        number, part = divmod(update, self.config.cycle)
        if part == 0:
            self.batches = self.roll_out(number, params)
            if self.batches is None:
                return None
        watchdog.beat(f"computing batch {update + 1} of the training")
        first = self.by_example({"first": np.full(self.config.answers, part == 0, np.float32)})
        batches = replace(self.batches, known=self.batches.known | first)
        batch = batches[part]
        arrays = loader.to_device(batch, self.setup.mesh)
        return Ready(batch._replace(arrays={}), arrays, time.perf_counter() - begun)

    def roll_out(self, number: int, params: Any) -> Batches | None:
        """Batches of answers by the policy, with rewards; None if a signal interrupted it."""
        weights = self.setup.trainable.weights(params)
        K = int(self.rl.answers_per_prompt)
        members = self.prompts.members(number)
        data = self.setup.data.train
        prompts = [data.tokens[start:end] for start, end in data.bounds[members, :2]]
        seed = int(np.random.SeedSequence([self.config.seed, 4, number]).generate_state(1)[0])
        answers = self.sample(weights, prompts, seed)
        if answers is None:
            return None
        texts = [self.setup.template.text(answer.content) for answer in answers]
        asked = [self.questions[i] for i in members for _ in range(K)]
        each = self.reward(asked, texts)
        rewards = self.reward.total(each)
        cut = np.array([answer.reason == "length" for answer in answers], np.float32)
        if self.log:
            self.log.write(number * self.config.cycle, asked, texts, rewards)
        rewards = rewards - np.float32(self.rl.missing_eos_penalty) * cut
        own = [prompts[i // K] for i in range(len(answers))]
        batches = self.layout(own, answers, np.repeat(data.rows[members], K), seed)
        old = self.by_token(weights, batches, self.score)
        ref = np.zeros_like(old)
        if self.rl.beta:
            ref = self.by_token(self.reference, batches, self.score_ref)
        lengths = np.array([len(answer.tokens) for answer in answers], np.float32)
        mask = np.arange(old.shape[1]) < lengths[:, None]
        per_token = (old - ref) * mask if self.rl.beta else np.zeros_like(old)
        kl = per_token.sum(1)
        groups = rewards.reshape(-1, K)
        objective = OBJECTIVES[self.rl.algorithm]
        if objective.targets:
            values = self.by_token(params["value"], batches, self.score_values)
            learned = objective.targets(rewards, per_token, values, mask, self.rl)
            learned["old_values"] = values
        else:
            advantages = objective.advantages(groups, kl.reshape(-1, K), self.rl)
            learned = {"advantages": advantages.ravel()}
        of_all = {
            "reward_std": rewards.std(ddof=1) if len(rewards) > 1 else 0.0,
            "mean_length": lengths.mean(),
        }
        known = {
            "rewards": rewards,
            "zero_std": np.repeat(groups.std(1) == 0, K),
            "cut": cut,
            "kl_sums": kl,
            **learned,
            **self.reward.logged(each),
            **{name: np.full(len(answers), value) for name, value in of_all.items()},
        }
        known = {name: np.asarray(values, np.float32) for name, values in known.items()}
        known |= {"old_logps": old, "ref_logps": ref}
        return replace(batches, known=batches.known | self.by_example(known))

    def sample(self, weights: Any, prompts: list[np.ndarray], seed: int) -> list[Answer] | None:
        """K answers to each prompt, in order."""
        answers: dict[int, Answer] = {}
        K = int(self.rl.answers_per_prompt)
        for number, answer in self.sampler.answers(
            self.sampler.weights(weights),
            [prompt.tolist() for prompt in prompts],
            num_samples=K,
            seed=seed,
        ):
            watchdog.beat(f"sampling answer {len(answers) + 1} of {len(prompts) * K}")
            if self.stopping():
                return None
            answers[number] = answer
        return [answers[number] for number in range(len(answers))]

    def layout(
        self, prompts: list[np.ndarray], answers: list[Answer], rows: np.ndarray, seed: int
    ) -> Batches:
        """Arrange the answers in updates; every pass over them is shuffled anew."""
        plan, n = self.setup.batches, self.together
        lengths = {
            "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.float32),
            "lengths": np.array([len(answer.tokens) for answer in answers], np.float32),
        }
        tokens = [answer.tokens for answer in answers]
        own = [tokens[i : i + n] for i in range(0, len(tokens), n)]
        return replace(
            plan,
            examples=of_tokens(prompts[::n], own, rows[::n]),
            seed=seed,
            together=max(OBJECTIVES[self.rl.algorithm].together // n, 1),
            known=self.by_example(lengths),
            length=plan.shapes[-1].length,
        )

    def by_example(self, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of answers [G, ...] by example, [G / together, together, ...]."""
        return {name: x.reshape(-1, self.together, *x.shape[1:]) for name, x in known.items()}

    def by_token(self, weights: Any, batches: Batches, score: Callable) -> np.ndarray:
        """Log-probabilities or values [G, C] of the answers."""
        longest = int(self.rl.max_completion_length)
        by_answer = np.zeros((self.config.answers, longest), np.float32)
        by_example = by_answer.reshape(-1, self.together, longest)
        for part in range(len(batches)):
            watchdog.beat(f"scoring tokens of answers, part {part + 1} of {len(batches)}")
            batch = batches[part]
            values = np.asarray(score(weights, loader.to_device(batch, self.setup.mesh)))
            values = values.reshape(len(values), -1, self.together, longest)
            by_example[batch.examples] = values[tuple(batch.slots.T)]
        return by_answer


def of_policy(model: Model, config: RLConfig, weights: Any, part: Mapping[str, jax.Array]) -> Any:
    """Log-probabilities [B, C]."""
    return logps_of(model, weights, part, config)[0]


def of_critic(model: Model, config: RLConfig, weights: Any, part: Mapping[str, jax.Array]) -> Any:
    """Values [B, C]."""
    return values_of(model, weights, part, config)


class Log:
    """Appends some answers of each rollout to a file.

    Args:
        start: rows of this update and later ones are removed.

    Raises:
        StorageError: the file cannot be written, here or later.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        try:
            kept = [row for row in read(path) if row["update"] < start]
            write_file(path, "".join(map(json_line, kept)))
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path}: cannot be written: {reason(error)}")

    def write(self, update: int, asked: list[Any], texts: list[str], rewards: np.ndarray) -> None:
        """Append the first answers of the rollout before this update."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                for question, text, score in list(zip(asked, texts, rewards, strict=True))[:SHOWN]:
                    row = {"update": update, "prompt": question.messages[-1]["content"]}
                    file.write(json_line(row | {"completion": text, "reward": float(score)}))
        except OSError as error:
            raise self._failed(error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a completions.jsonl, without damaged ones."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("update")) is int:
            rows.append(row)
    return rows
