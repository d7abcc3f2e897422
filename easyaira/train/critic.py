"""The value model of an on-policy run, trained beside the policy with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyaira.config.algorithms import OptimizerConfig
from easyaira.distributed import sharding
from easyaira.errors import ConfigError
from easyaira.models.heads import every_token
from easyaira.models.model import Model
from easyaira.models.registry import model_of
from easyaira.storage import pretrained
from easyaira.storage.pretrained import Pretrained
from easyaira.train import optimizer
from easyaira.train.resolve import Resolved, has_weights
from easyaira.train.step import LossFn
from easyaira.train.trainable import Adapters, FullWeights


class Critic(NamedTuple):
    """A value model before training.

    Attributes:
        origin: location of the weights that it starts from.
        scorer: the model as read, a scorer, whose score head is missing in the policy's files.
        model: the value model, whose head scores every token.
        random: it starts from random weights, as a policy of model.init random.
    """

    origin: Pretrained
    scorer: Model
    model: Model
    random: bool


def critic_of(name: str | None, init: str, resolved: Resolved, mesh: Mesh) -> Critic:
    """The value model of a run: that of `name`, or the policy's weights with a new head.

    Args:
        init: model.init of the policy.

    Raises:
        ConfigError: it is an encoder, lacks a score head, or has another vocabulary.
        EasyAiraError: its files cannot be read.
    """
    origin = resolved.origin if name is None else pretrained.find(name)
    scorer = model_of(origin.config, origin.where, resolved.model.compute, scorer=True)
    if scorer.architecture.encoder:
        raise ConfigError(
            f"rl.value_model: {name} is an encoder, whose tokens see later ones; name a scorer "
            "with causal attention, or leave it out"
        )
    if scorer.vocab_size != resolved.model.vocab_size:
        raise ConfigError(
            f"rl.value_model: its vocabulary has {scorer.vocab_size} tokens, but the policy's has "
            f"{resolved.model.vocab_size}; a value model must share the policy's tokenizer"
        )
    random = name is None and init == "random"
    # a plan needs no weights; without them, `start` fails
    missing = origin.check(scorer) if not random and has_weights(origin) else []
    if name is not None and missing:
        raise ConfigError(
            f"rl.value_model: {name} has no {missing[0]}; name a reward model, or leave it out to "
            "start from the policy's weights with a new head"
        )
    sharding.shardings(scorer.shapes, scorer.rules, mesh)
    head = every_token(origin.config["model_type"])
    architecture = replace(scorer.architecture, score_head=head)
    return Critic(origin, scorer, replace(scorer, architecture=architecture), random)


def make_optimizer(
    config: OptimizerConfig, value_rate: float | None
) -> optax.GradientTransformationExtraArgs:
    """AdamW of an `ActorCritic`: each model has its own clipping, moments and peak learning rate.
    `update` takes the policy's rate, `learning_rate`.

    Args:
        value_rate: peak learning rate of the value model; None: the policy's.
    """
    of_all = optimizer.make_optimizer(replace(config, max_grad_norm=0))
    ratio = (value_rate or config.learning_rate) / (config.learning_rate or 1.0)
    clip = optax.identity()
    if config.max_grad_norm:
        clip = optimizer.clip_by_global_norm(config.max_grad_norm)

    def clipped(grads: Any, params: Any) -> Any:
        return {name: clip.update(own, optax.EmptyState())[0] for name, own in grads.items()}

    def scaled(updates: Any, params: Any) -> Any:  # an update of AdamW is proportional to its rate
        return updates | {"value": jax.tree.map(lambda x: ratio * x, updates["value"])}

    return optax.chain(optax.stateless(clipped), of_all, optax.stateless(scaled))


@dataclass(frozen=True)
class ActorCritic:
    """Policy and value model are trainable; the interface is that of train/trainable.py.

    `params` are `{"policy": ..., "value": ...}`. A checkpoint stores the value model with the
    optimizer state, so that its item `params` is the policy alone.
    """

    policy: FullWeights | Adapters
    critic: Critic
    mesh: Mesh
    seed: int

    @property
    def added(self) -> int:
        return self.policy.added

    @property
    def backward(self) -> int:
        return self.policy.backward

    @property
    def head(self) -> int:
        return self.policy.head

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        return self.policy.compiler_options

    @property
    def value(self) -> Model:
        return replace(self.critic.model, compute=self.policy.model.compute)

    @property
    def target(self) -> Any:
        return {"policy": self.policy.target, "value": self.value.target(self.mesh)}

    @property
    def held(self) -> Any:
        return {"policy": self.policy.held, "value": self.value.target(self.mesh)}

    def parameter_count(self) -> int:
        return self.policy.parameter_count() + self.value.parameter_count()

    def describe(self) -> str:
        count = self.value.parameter_count()
        return f"{self.policy.describe()}value   {self.critic.origin.name}: {count:,} parameters\n"

    def start(self) -> Any:
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.target["value"])
        if self.critic.random:
            value = jax.jit(self.value.init, out_shardings=shardings)(key)
            return {"policy": self.policy.start(), "value": value}
        value = self.critic.origin.load(self.critic.scorer, self.mesh, head_key=key)
        linear = value["score"]["linear"] | {"bias": jnp.zeros(1, jnp.float32)}
        value = value | {"score": {"linear": linear}}
        return {"policy": self.policy.start(), "value": jax.device_put(value, shardings)}

    def weights(self, params: Any) -> Any:
        return self.policy.weights(params["policy"])

    def loss_fn(self, of_weights: LossFn) -> LossFn:
        """Turn a loss of `{"policy": weights, "value": weights}` into one of `params`."""

        def of_params(params, frozen, batch, key):
            def of_policy(weights, frozen, batch, key):
                both = {"policy": weights, "value": params["value"]}
                return of_weights(both, frozen, batch, key)

            return self.policy.loss_fn(of_policy)(params["policy"], frozen, batch, key)

        return of_params

    def frozen(self, of_algorithm: Any) -> Any:
        return self.policy.frozen(of_algorithm)

    def frozen_target(self, reference: Model | None) -> Any:
        return self.policy.frozen_target(reference)

    def saved(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        return params["policy"], {"optimizer": opt_state, "value": params["value"]}

    def restored(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        return {"policy": params, "value": opt_state["value"]}, opt_state["optimizer"]

    def to_meta(self) -> dict[str, Any]:
        return self.policy.to_meta()

    def check(self, saved: Mapping[str, Any], where: str) -> None:
        self.policy.check(saved, where)

    def free_start(self) -> None:
        self.policy.free_start()

    def free(self) -> None:
        self.policy.free()
