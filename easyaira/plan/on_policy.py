"""Memory of an on-policy run: weights held beside its updates, and a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from easyaira.algorithms import rollouts
from easyaira.algorithms.reference import reference_model
from easyaira.config.run import TrainRL
from easyaira.plan import decoding
from easyaira.plan.cost import per_device
from easyaira.plan.hlo import Program
from easyaira.rewards.model import RewardModel
from easyaira.rewards.reward import Reward
from easyaira.storage.frozen import frozen_target
from easyaira.train.setup import Setup


class RollOut(NamedTuple):
    """Bytes per device.

    Attributes:
        reference, rewards: their weights, held throughout the run.
        weights: prepared for sampling.
        cache: keys and values of the most tokens.
        temporaries: of a step of decoding.
        rows, slots: of the cache, over all devices.
    """

    reference: int
    rewards: int
    weights: int
    cache: int
    temporaries: int
    rows: int
    slots: int

    @property
    def beside(self) -> int:
        """Held beside an update."""
        return self.reference + self.rewards

    @property
    def sampling(self) -> int:
        """Beside weights and optimizer state, while answers are sampled."""
        return self.beside + self.weights + self.cache + self.temporaries


def measure(setup: Setup) -> RollOut:
    """Count the weights, and compile or count the decoding."""
    config: TrainRL = setup.config  # type: ignore[assignment]
    reference = 0
    own = config.model.ref_name_or_path is None
    if config.rl.beta and not (own and setup.adapter):  # the base of adapters is their reference
        reference = per_device(reference_model(setup).target(setup.mesh))
    names = config.rl.rewards + (config.rl.eval_rewards or [])
    reward = Reward(names, None, setup.mesh, setup.model.compute.dtype)
    models = [scorer.model for scorer in reward.scorers if isinstance(scorer, RewardModel)]
    rewards = sum(per_device(frozen_target(model, setup.mesh)) for model in models)
    sampler = rollouts.make_sampler(setup)
    rows, slots = rollouts.largest_cache(setup, sampler)
    _, _, weights, cache, program = decoding.measure(sampler, setup.mesh, rows, slots)
    return RollOut(reference, rewards, weights, cache, program.temporaries, rows, slots)


def show(setup: Setup, update: Program, held: float, room: float | None) -> Iterator[str]:
    """Lines about a rollout, and whether the run fits.

    Args:
        update: its program.
        held: bytes of weights, frozen ones too, and optimizer state.
        room: bytes of a device, or None.
    """
    cost = measure(setup)
    yield f"{'bytes per device':24}{'MiB':>10}"
    for name, size, words in (
        ("reference", cost.reference, "held beside updates"),
        ("reward models", cost.rewards, "held beside updates"),
        ("weights for sampling", cost.weights, "in a rollout"),
        ("KV cache", cost.cache, f"of {cost.rows:,} rows in {cost.slots:,} slots, at most"),
        ("decoding", cost.temporaries, "a step of it"),
    ):
        yield f"{name:24}{size / 2**20:>10,.{0 if size >= 10 * 2**20 else 2}f}  {words}"
    updating, sampling = update.memory + cost.beside, held + cost.sampling
    needed = max(updating, sampling)
    enough = "needs" if room is None else "fits:" if needed <= room else "does not fit:"
    of = "" if room is None else f" of {room / 2**30:,.2f} GiB"
    yield (
        f"whole run {enough} {needed / 2**30:,.2f} GiB{of}; {updating / 2**30:,.2f} in an update, "
        f"{sampling / 2**30:,.2f} in a rollout"
    )
