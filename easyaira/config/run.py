"""Options of a run, and the configuration of each training command.

Groups are frozen dataclasses, so each option has one owner. The type of a field restricts its
value; `__post_init__` checks combinations. The string below an option is its `--help`. Nothing in
`config/` imports jax or numpy, so `--help` and the error for a misspelt option are fast."""

from __future__ import annotations

import json
import os
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from easyaira.config.algorithms import OptimizerConfig, RewardConfig, SFTConfig
from easyaira.config.data import DataConfig
from easyaira.config.dpo import DPOConfig
from easyaira.config.model import LoraConfig, ModelConfig, PolicyConfig
from easyaira.config.ranges import Count, CountOrZero, MaxSteps, Positive, Seed, TopP
from easyaira.config.rl import RLConfig
from easyaira.errors import ConfigError

PROVENANCE = "provenance"  # record that a run adds to its config.yaml; ignored when read
# options that may differ when a run resumes: they change results by rounding at most
MAY_CHANGE = """
    mesh dcn output_dir checkpoint_dir resume export num_samples logging_steps eval_steps save_steps
    report_to save_total_limit push_to_hub hub_private_repo gradient_accumulation_steps
    model.gradient_checkpointing data.cache_dir
""".split()
GROUPS_MAY_CHANGE = {"distributed", "energy", "generation", "card"}


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class DryRun(NamedTuple):
    """A run that is planned and not executed.

    Attributes:
        topology: the TPU pod or GPUs to plan for; None: the devices of this machine.
        search: search for faster settings.
        memory: bytes of a device; without a topology, of a GPU of any kind.
    """

    topology: str | None = None
    search: bool = False
    memory: float | None = None


@dataclass(frozen=True)
class EnergyConfig:
    """Training energy and CO2, measured by CodeCarbon (the extra `energy`) into emissions.csv."""

    country: str
    """Country of the machine, whose electricity mix determines the CO2: ISO 3166 alpha-3 code, such
    as BRA."""


@dataclass(frozen=True)
class GenerationConfig:
    """Values of generation_config.json in the release. Null keeps the starting model's value."""

    do_sample: bool | None = None
    """true: sample tokens; false: take the most likely one."""
    temperature: Positive | None = None
    """Divisor of the logits; below 1, likely tokens become likelier."""
    top_k: Count | None = None
    """Sample from the k most likely tokens."""
    top_p: TopP | None = None
    """Sample from the most likely tokens whose probabilities add up to this."""
    repetition_penalty: Positive | None = None
    """Above 1, tokens that already occur in the text become less likely."""
    max_new_tokens: Count | None = None
    """Longest answer in tokens."""
    renormalize_logits: bool | None = None
    """Renormalise the probabilities after all of the above."""

    def __post_init__(self):
        if self.do_sample is False and (self.temperature or self.top_k or self.top_p):
            raise ConfigError(
                "generation.do_sample: false would ignore temperature, top_k and top_p; leave "
                "them out, or set it to true"
            )


@dataclass(frozen=True)
class CardConfig:
    """Facts for the model card that a run cannot know. The card calls missing ones unknown."""

    title: str | None = None
    """Name of the model on the card; default: that of the run folder."""
    license: str | None = None
    """Hub id of the released model's licence, e.g. apache-2.0; with `other`, set license_name and
    license_link."""
    license_name: str | None = None
    """Name of a licence that has no hub id."""
    license_link: str | None = None
    """Link to a licence that has no hub id."""
    base_license: str | None = None
    """Licences of the starting model and of the models it derives from."""
    data_licenses: dict[str, str] = field(default_factory=dict)
    """Source of data.train -> its licence."""
    language: list[str] = field(default_factory=list)
    """Languages of the data, such as [en, pt]."""
    widget: list[str] = field(default_factory=list)
    """Example inputs for the model's page on the hub, in the model's prompt format."""
    inference: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    """Generation settings of the model's page on the hub."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes: TPU VMs, GKE, SLURM and Open MPI are detected.

    Start one process per TPU host, per GPU, or per machine of GPUs. Where no launcher is detected,
    set the first three options."""

    coordinator_address: str | None = None
    """Address and free port of process 0, such as 10.0.0.1:1234."""
    num_processes: Count | None = None
    """Number of processes."""
    process_id: CountOrZero | None = None
    """Index of this process, from 0."""
    detect: bool = True
    """Detect the other processes from the launcher; false: without coordinator_address, run as a
    single process."""
    initialization_timeout: Count = 300
    """Seconds to wait for the other processes at the start."""
    timeout: Count = 60
    """Seconds without a heartbeat after which a process counts as lost and all others exit with
    status 5."""
    hang_timeout: Count = 1800
    """Seconds without progress after which a process exits with status 5 and names its last step.
    Set it longer than the longest compilation and the longest save."""

    def __post_init__(self):
        rest = (self.num_processes, self.process_id)
        if self.coordinator_address is None and rest != (None, None):
            raise ConfigError(
                "distributed.coordinator_address: num_processes and process_id need it; set it to "
                "the address of process 0"
            )
        if None not in rest and self.process_id >= self.num_processes:
            raise ConfigError(
                f"distributed.process_id: {self.process_id} of {self.num_processes} processes; "
                f"ids are 0 to {self.num_processes - 1}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Options that all training commands share."""

    default_metric: ClassVar[str] = "loss"  # that decides which checkpoint is best
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    """Train adapters and freeze the model's own weights; null: train all weights."""
    train_batch_size: Count = 8
    """Examples (DPO: pairs) per update, over all devices and accumulation steps."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per update, computed one after another to save memory."""
    num_train_epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: MaxSteps = -1
    """Total number of updates; -1: set by num_train_epochs."""
    eval_steps: CountOrZero = 200
    """Evaluate on the held-out rows every N updates and always before the first and after the last;
    0: only those two."""
    save_steps: CountOrZero = 200
    """Save a checkpoint every N updates and always after the last; 0: only after the last."""
    save_total_limit: Count = 2
    """Number of checkpoints to keep, in addition to the best."""
    load_best_model_at_end: bool = False
    """Save at each evaluation that is the best so far, keep that checkpoint, and export it."""
    metric_for_best_model: str | None = None
    """Held-out metric that decides which checkpoint is best, with or without eval_; default:
    loss, of rl reward."""
    greater_is_better: bool | None = None
    """Whether larger values are better; default: unless the metric's name ends in loss."""
    early_stopping_patience: Count | None = None
    """Stop after N evaluations in a row without a new best; needs load_best_model_at_end."""
    logging_steps: Count = 10
    """Log metrics every N updates, averaged over them."""
    report_to: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    """Trackers in addition to metrics.jsonl: tensorboard, wandb, trackio, mlflow; []: none."""
    num_samples: CountOrZero = 4
    """Number of held-out prompts to answer at every evaluation, for report.html and TensorBoard."""
    seed: Seed = 42
    """Random seed of the data order, the held-out split, random weights and dropout."""
    mesh: str = "dp=1,fsdp=-1,tp=1"
    """Devices per axis: dp (replicated weights, sharded data), fsdp (sharded weights and data), tp
    (sharded matrix products). Name axes in any order, with -1 for the remaining devices, or write
    dp,fsdp,tp sizes as in EasyLM: 1,-1,1."""
    dcn: str | None = None
    """Parts of a mesh axis that span the network, one per TPU slice, or per host without slices.
    dp=2: a copy of the weights on each of two; fsdp=2: a half on each. tp cannot span it."""
    output_dir: str = "runs/run"
    """Run folder. If it is not set, the last --config file names it: runs/NAME. The same command
    resumes the run in it."""
    checkpoint_dir: str | None = None
    """Checkpoint storage; default: output_dir/checkpoints. A folder or URL (gs://bucket/path,
    s3://bucket/path) that every host can access."""
    resume: Literal["auto", "must"] = "auto"
    """auto: resume the run in output_dir, or start one; must: fail if output_dir holds no run."""
    export: bool = True
    """Export a Hugging Face folder to output_dir/hf at the end."""
    push_to_hub: str | None = None
    """Repository on the hub (owner/name) to upload that folder to, once it is verified. Needs a
    token (hf auth login, or HF_TOKEN)."""
    hub_private_repo: bool | None = None
    """Whether a new repository is private; null: the owner's default."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    energy: EnergyConfig | None = None
    """Track the energy of the training: {country: BRA}."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    card: CardConfig = field(default_factory=CardConfig)

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ConfigError("output_dir: found an empty text; name a folder")
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))
        if self.lora is not None and self.model.init == "random":
            raise ConfigError(
                "lora: needs pretrained weights, since random ones are not saved and the adapter "
                "would be useless; set model.init to pretrained, or lora to null"
            )
        if self.lora is not None and self.optimizer.name == "muon":
            raise ConfigError(
                "optimizer.name: muon trains whole matrices, and adapters are factors of them; "
                "choose adamw, or set lora to null"
            )
        if (lora := self.lora) and lora.modules_to_save and lora.trainable_token_indices:
            raise ConfigError(
                "lora.trainable_token_indices: cannot be combined with lora.modules_to_save, which "
                "trains all vectors of a table; leave one of them out"
            )
        self._check_best()
        if self.push_to_hub is not None and not is_repo(self.push_to_hub):
            raise ConfigError(f"push_to_hub: expected owner/name, got {self.push_to_hub!r:.80}")
        if self.push_to_hub is not None and not self.export:
            raise ConfigError("push_to_hub: uploads the export; set export to true")
        if re.match(r"\w+:/", place := self.checkpoint_dir or "") and not re.match(
            r"(gs|s3)://[^/]+", place
        ):
            raise ConfigError(
                f"checkpoint_dir: cannot read {place!r}; write a folder, gs://bucket/path or "
                "s3://bucket/path"
            )
        if self.train_batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"train_batch_size: {self.train_batch_size} is not a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )

    @property
    def order_seed(self) -> int | None:
        """Seed of the order of the examples; None: their own order."""
        return self.seed if self.data.shuffle else None

    def _check_best(self) -> None:
        if not self.load_best_model_at_end:
            for name in ("metric_for_best_model", "greater_is_better", "early_stopping_patience"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name}: unused without load_best_model_at_end; set that to true"
                    )
        elif not self.data.eval or not self.eval_steps:
            raise ConfigError(
                "load_best_model_at_end: nothing is evaluated on the way; set data.eval and "
                "eval_steps"
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
        if self.dpo.reference == "none" and self.model.ref_name_or_path is not None:
            raise ConfigError(
                "model.ref_name_or_path: unused with dpo.reference none; leave it out"
            )
        if self.dpo.reference == "model":
            _refuse_dropout(self, "DPO")


@dataclass(frozen=True)
class TrainReward(RunConfig):
    """A reward or toxicity model from pairs of answers, pairs of texts, or texts with a label."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    num_samples: CountOrZero = 0
    """Must be 0: a reward model generates no text."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples:
            raise ConfigError("num_samples: a reward model generates no text; leave it out")
        if self.generation != GenerationConfig():
            raise ConfigError("generation: a reward model generates no text; leave it out")


@dataclass(frozen=True, kw_only=True)
class TrainRL(RunConfig):
    """On-policy training of a language model on prompts, with rewards of its own answers."""

    default_metric: ClassVar[str] = "reward"
    model: PolicyConfig
    rl: RLConfig
    train_batch_size: Count = 64
    """Answers per update, over all devices and accumulation steps."""

    def __post_init__(self):
        super().__post_init__()
        _refuse_dropout(self, "on-policy training")
        if self.rl.eval_reward and not self.data.eval:
            raise ConfigError("rl.eval_reward: there are no held-out prompts; set data.eval, too")
        answers, size = self.answers, self.train_batch_size
        for name, divisor in (
            ("train_batch_size", size),
            ("rl.num_generations", self.rl.answers_per_prompt),
        ):
            if answers % divisor:
                given = "rl.generation_batch_size" if self.rl.generation_batch_size else name
                raise ConfigError(
                    f"{given}: the {answers} answers of a rollout are not a multiple of {name} "
                    f"{divisor}; change one of them"
                )
        micro_batch = size // self.gradient_accumulation_steps
        if self.rl.algorithm == "online_dpo" and micro_batch % 2:
            raise ConfigError(
                f"train_batch_size: online_dpo needs pairs, and {size} answers in "
                f"{self.gradient_accumulation_steps} accumulation steps are {micro_batch} at a "
                "time; use an even number"
            )

    @property
    def answers(self) -> int:
        """Answers of a rollout."""
        return self.rl.generation_batch_size or self.train_batch_size

    @property
    def cycle(self) -> int:
        """Updates of a rollout."""
        return self.answers // self.train_batch_size * self.rl.num_iterations


def is_repo(name: str) -> bool:
    """Whether a name is owner/name, as the hub has them."""
    part = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(f"{part}/{part}", name, re.ASCII) is not None and len(name) <= 96


def _refuse_dropout(config: RunConfig, where: str) -> None:
    for name, group in (("model", config.model), ("lora", config.lora)):
        if group is not None and group.dropout:
            raise ConfigError(
                f"{name}.dropout: would make policy and reference differ before the first update; "
                f"set it to 0 for {where}"
            )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, as in config.yaml."""
    return json.loads(json.dumps(asdict(config)))  # jsonargparse's number types become plain ones


def changed(config: Any, group: str = "") -> dict[str, Any]:
    """The options that differ from their defaults, by name; those without a default, too."""
    options: dict[str, Any] = {}
    for option in fields(config):
        value, default = getattr(config, option.name), option.default
        if option.default_factory is not MISSING:
            default = option.default_factory()
        if is_dataclass(value) and default is not None:
            options |= changed(value, f"{group}{option.name}.")
        elif value != default:
            shown = asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
            options[f"{group}{option.name}"] = shown
    return options
