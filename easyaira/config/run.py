"""Options of a run, and the configuration of each command that trains.

Groups are frozen dataclasses, so each option has one owner. A value's type says what it may be;
`__post_init__` checks how values combine. The text below an option is its `--help`. Nothing in
`config/` imports jax or numpy, so `--help` and a misspelt option answer at once."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from easyaira.config.algorithms import DPOConfig, OptimizerConfig, RewardConfig, SFTConfig
from easyaira.config.data import DataConfig
from easyaira.config.model import LoraConfig, ModelConfig, PolicyConfig
from easyaira.config.ranges import MaxSteps, TopP
from easyaira.errors import ConfigError

PROVENANCE = "provenance"  # what a run adds to its config.yaml; a record, so it is read past


class DryRun(NamedTuple):
    """A run that is only planned: for which pod, if not for the devices at hand, and whether better
    settings are to be looked for."""

    topology: str | None = None
    search: bool = False


@dataclass(frozen=True)
class EnergyConfig:
    """Energy and CO2 of the training, by CodeCarbon (the extra `energy`), in emissions.csv."""

    country: str
    """Where the machine stands, whose electricity mix decides the CO2: three letters of ISO 3166,
    such as BRA."""


@dataclass(frozen=True)
class GenerationConfig:
    """What generation_config.json of the released model says. Null leaves what the starting model's
    file says."""

    do_sample: bool | None = None
    """Draw tokens, or take the likeliest."""
    temperature: PositiveFloat | None = None
    """Logits are divided by it; below 1 makes likely tokens likelier."""
    top_k: PositiveInt | None = None
    """Draw from so many of the likeliest tokens."""
    top_p: TopP | None = None
    """Draw from the likeliest tokens that together have this probability."""
    repetition_penalty: PositiveFloat | None = None
    """Above 1 makes tokens that stand in the text already less likely."""
    max_new_tokens: PositiveInt | None = None
    """An answer is cut here."""
    renormalize_logits: bool | None = None
    """Normalise again after all of the above."""

    def __post_init__(self):
        if self.do_sample is False and (self.temperature or self.top_k or self.top_p):
            raise ConfigError(
                "generation.do_sample: false would ignore temperature, top_k and top_p; leave "
                "them out, or set it to true"
            )


@dataclass(frozen=True)
class CardConfig:
    """What the model card says and a run cannot know. What is left out is said to be unknown."""

    license: str | None = None
    """Of the released model, as the hub names it: apache-2.0, or other with the next two."""
    license_name: str | None = None
    """Name of another licence."""
    license_link: str | None = None
    """Where another licence can be read."""
    base_license: str | None = None
    """Of the starting model, and of what that was made from."""
    data_licenses: dict[str, str] = field(default_factory=dict)
    """Source of data.train -> its licence."""
    language: list[str] = field(default_factory=list)
    """Of the data: en, pt."""
    widget: list[str] = field(default_factory=list)
    """Texts to try on the model's page on the hub, as the model takes them."""
    inference: dict[str, Any] = field(default_factory=dict)
    """Settings of generation on that page."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run: one on each TPU host, or one on each GPU or machine of GPUs.
    TPU VMs, GKE, SLURM and Open MPI say who they are; elsewhere the first three options do."""

    coordinator_address: str | None = None
    """Address and a free port of the first process, such as 10.0.0.1:1234."""
    num_processes: PositiveInt | None = None
    """How many processes there are."""
    process_id: NonNegativeInt | None = None
    """Which of them this is, from 0."""
    detect: bool = True
    """Ask the launcher who the others are; false: without coordinator_address, run alone."""
    initialization_timeout: PositiveInt = 300
    """Seconds to wait for the others at the start."""
    timeout: PositiveInt = 60
    """Seconds after which a silent process is lost, and all others end with exit status 5."""
    hang_timeout: PositiveInt = 1800
    """Seconds without progress after which a process ends with exit status 5, and says where it
    was. It must be longer than the longest compilation and the longest save."""

    def __post_init__(self):
        rest = (self.num_processes, self.process_id)
        if self.coordinator_address is None and rest != (None, None):
            raise ConfigError(
                "distributed.coordinator_address: num_processes and process_id say nothing "
                "without it; set it to the address of process 0"
            )
        if None not in rest and self.process_id >= self.num_processes:
            raise ConfigError(
                f"distributed.process_id: {self.process_id} of {self.num_processes} processes; "
                f"they are counted from 0 to {self.num_processes - 1}"
            )


@dataclass(frozen=True)
class RunConfig:
    """A run: what every command that trains has in common."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    """Train adapters and leave the model's own weights as they are; null trains all weights."""
    train_batch_size: PositiveInt = 8
    """Examples (pairs in DPO) per update, over all devices and accumulation steps."""
    gradient_accumulation_steps: PositiveInt = 1
    """Parts in which an update is computed one after another, to save memory."""
    num_train_epochs: PositiveFloat = 1.0
    """Times that the data is gone through."""
    max_steps: MaxSteps = -1
    """Updates in all; -1: as num_train_epochs says."""
    eval_steps: NonNegativeInt = 200
    """Evaluate on the held-out rows every so many updates, and before the first and after the last;
    0: only then."""
    save_steps: NonNegativeInt = 200
    """Save a checkpoint every so many updates, and after the last; 0: only then."""
    save_total_limit: PositiveInt = 2
    """Checkpoints that are kept."""
    logging_steps: PositiveInt = 10
    """Write metrics every so many updates, averaged over them."""
    num_samples: NonNegativeInt = 4
    """Held-out prompts that are answered before and after training, for report.html."""
    seed: NonNegativeInt = 42
    """Decides the order of the data, the held-out share, random weights and dropout."""
    mesh: str = "dp=1,fsdp=-1,tp=1"
    """Devices per axis: dp (copies of the weights), fsdp (weights divided, data divided), tp (each
    product divided). Named in any order, -1 for the rest, or EasyLM's dp,fsdp,tp: 1,-1,1."""
    dcn: str | None = None
    """How often an axis of mesh is cut over the network between TPU slices, or else between hosts:
    dp=2 puts one copy of the weights on each of two, fsdp=2 half of each. tp cannot be cut so."""
    output_dir: str = "runs/run"
    """The run folder. The same command continues the run that it holds."""
    checkpoint_dir: str | None = None
    """Where checkpoints lie; default: output_dir/checkpoints. A folder or a URL (gs://bucket/path,
    s3://bucket/path) that every host sees."""
    resume: Literal["auto", "must"] = "auto"
    """auto: continue what output_dir holds, or start; must: an error if it holds no run."""
    export: bool = True
    """Write the Hugging Face folder output_dir/hf at the end."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    energy: EnergyConfig | None = None
    """Track the energy that training takes: {country: BRA}."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    card: CardConfig = field(default_factory=CardConfig)

    def __post_init__(self):
        if self.lora is not None and self.model.init == "random":
            raise ConfigError(
                "lora: adapters on random weights, which are kept nowhere; set model.init to "
                "pretrained, or lora to null"
            )
        if re.match(r"\w+:/", place := self.checkpoint_dir or "") and not re.match(
            r"(gs|s3)://[^/]+", place
        ):
            raise ConfigError(
                f"checkpoint_dir: cannot read {place!r}; write a folder, gs://bucket/path or "
                "s3://bucket/path"
            )
        if self.train_batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"train_batch_size: {self.train_batch_size} does not divide into "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}; use a multiple"
            )


@dataclass(frozen=True)
class TrainSFT(RunConfig):
    """Supervised fine-tuning of a language model on prompts with completions."""

    sft: SFTConfig = field(default_factory=SFTConfig)


@dataclass(frozen=True, kw_only=True)
class TrainDPO(RunConfig):
    """Direct preference optimisation of a language model on pairs of answers."""

    model: PolicyConfig
    dpo: DPOConfig = field(default_factory=DPOConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.model.dropout:
            raise ConfigError(
                "model.dropout: policy and reference would differ before the first update; "
                "set it to 0 for DPO"
            )


@dataclass(frozen=True)
class TrainReward(RunConfig):
    """A reward or toxicity model from pairs of answers, pairs of texts, or texts with a label."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    num_samples: NonNegativeInt = 0
    """A model that scores answers no prompts, so there is nothing to show."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples:
            raise ConfigError("num_samples: a model that scores answers no prompts; leave it out")
        if self.generation != GenerationConfig():
            raise ConfigError("generation: a model that scores writes nothing; leave it out")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, as they stand in config.yaml."""
    return json.loads(json.dumps(asdict(config)))  # jsonargparse's number types become plain ones
