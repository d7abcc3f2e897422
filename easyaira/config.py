"""Every option, with its default and its meaning: the text below an option is its `--help`.

Groups are frozen dataclasses, so that each option has one owner. What a single value may be is
said by its type; what several values may be together is checked in `__post_init__`. Nothing here
imports jax or numpy, so that `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from easyaira.errors import ConfigError

Share = restricted_number_type("Share", float, [(">=", 0.0), ("<", 1.0)])
HalfShare = restricted_number_type("HalfShare", float, [(">=", 0.0), ("<", 0.5)])
TopP = restricted_number_type("TopP", float, [(">", 0.0), ("<=", 1.0)])
MaxSteps = restricted_number_type("MaxSteps", int, [(">=", -1), ("!=", 0)])

SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair")


@dataclass(frozen=True)
class Source:
    """One data set."""

    path: str
    """Hub id, local file (.jsonl .jsonl.gz .json .csv .parquet .arrow) or folder."""
    split: str = "train"
    """Split of a hub data set; a local file has only one."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the column's name there, such as {prompt: question, completion: answer}."""
    weight: PositiveFloat = 1.0
    """How often an epoch shows its rows: 2 shows each twice, 0.5 half of them."""
    template: str | None = None
    """Of this source; default: data.template."""
    streaming: bool = False
    """Read a hub data set over the network, row by row, without storing it first."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    name_or_path: str
    """Hugging Face folder, hub id (owner/name), or a run folder of EasyAira."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit that was read is recorded in the run."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: read only config.json and draw the weights as Hugging Face does."""
    resize: Literal["mean", "normal"] | None = None
    """Make the embedding as long as the tokenizer. New rows are the mean of the old ones, or drawn
    with the model's own standard deviation (as Aira's originals were). By default the embedding
    changes only for tokens that the template adds, with the mean."""
    max_positions: PositiveInt | None = None
    """Longest sequence, where it shall be another than config.json says: only for models with
    rotary positions. The released config.json will say it."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Precision of the computation: auto is bfloat16 on accelerators and float32 on CPU. tf32 is
    float32 with products of 10-bit mantissas, on GPUs that have them; float32 never rounds so.
    Weights, optimizer state, norms, softmax and losses are always float32."""
    gradient_checkpointing: Literal["none", "dots", "full"] = "none"
    """Keep all activations, only results of matrix products, or only the input of each layer."""
    attention: Literal["auto", "xla", "cudnn", "pallas", "splash"] = "auto"
    """How attention is computed: by XLA everywhere; by cuDNN's kernel (in bfloat16) or EasyAira's
    own (pallas) on GPUs; by the splash kernel on TPUs. auto takes the first of these kernels that
    agrees with XLA on the run's own rows, and XLA if none does."""
    dropout: Share = 0.0
    """Dropout on embeddings, attention and residual branches. Off unless asked for, whatever the
    model's config.json says; DPO refuses it."""


@dataclass(frozen=True)
class PolicyConfig(ModelConfig):
    """The policy that is trained, and the reference it is held to."""

    ref_name_or_path: str | None = None
    """Weights of the DPO reference; default: those the policy starts from."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    train: str | list[Source]
    """Hub id, file or folder, or a list of {path, split, columns, weight, template, streaming}."""
    split: str = "train"
    """Split of a hub data set that is named by a plain string."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the column's name there, for sources named by a plain string."""
    eval: OpenUnitInterval | str | list[Source] | None = None
    """Held-out rows: a share of train split off by prompt (0.02), or sources like train."""
    template: str = "chat"
    """plain (prompt, completion, EOS, nothing between), aira, tulu, zephyr, chatml, llama-2, chat
    (the tokenizer's own), a .jinja file, or a Jinja template itself."""
    reverse: bool = False
    """Learn the prompt, given the completion: a backward model, for instruction backtranslation."""
    allowed_tokens: list[str] = field(default_factory=list)
    """Control tokens that stand for themselves where a text spells them. All others stay text."""
    max_examples: PositiveInt | None = None
    """Read only so many rows of each source of train."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read: stop and say where, or count it and go on."""
    max_length: PositiveInt | None = None
    """Longest example in tokens; default: the model's number of positions."""
    max_prompt_length: PositiveInt | None = None
    """A longer prompt keeps its start token and its last tokens."""
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """What happens to an example above max_length: its end is cut (and then no EOS is learned), the
    start of its prompt is cut, or the row is dropped. Counted in data_report.json."""
    packing: bool = True
    """Put the examples of an update side by side in rows, each seeing only itself. It changes the
    amount of padding and nothing else."""
    share_prompt: Literal["auto", "always", "never"] = "auto"
    """Store the prompt of a pair once, seen by both answers. It changes the work and nothing else;
    auto does it where it saves enough, and says so."""
    drop_last: bool = False
    """Leave out an epoch's last, smaller update."""
    max_dropped: Share = 0.05
    """Stop if more than this share of the rows cannot be trained on."""
    compat: Literal["aira"] | None = None
    """aira: for study, the loss of Aira's original scripts, on prompts and on padding up to
    max_length (SFT only)."""
    cache_dir: str | None = None
    """Where tokenised data are kept; default: EASYAIRA_CACHE, or easyaira in the user's cache."""

    def __post_init__(self):
        if isinstance(self.eval, list) and any(source.weight != 1 for source in self.eval):
            raise ConfigError("data.eval: held-out rows are shown once each; leave out weight")
        named = isinstance(self.train, str) or isinstance(self.eval, str)
        if not named and (self.split != "train" or self.columns):
            raise ConfigError(
                "data.split and data.columns: speak of sources named by a plain string; in a list, "
                "each source has its own"
            )


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning."""

    completion_only_loss: bool = True
    """Learn what follows the prompt only; false learns the prompt, too. In a conversation, the
    prompt is all that stands before the first answer."""
    assistant_only_loss: bool = True
    """Of what follows the prompt, learn the assistant's turns only; false learns all of it."""
    last_turn_only: bool = False
    """Learn the last answer of a conversation only; all before it is the prompt."""


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation."""

    loss_type: Literal[
        "sigmoid",
        "ipo",
        "ipo_sum",
        "hinge",
        "robust",
        "sigmoid_norm",
        "apo_zero",
        "apo_down",
        "exo_pair",
        "nca_pair",
    ] = "sigmoid"
    """The preference loss; each is one function of easyaira/losses.py, with its paper."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: HalfShare = 0.0
    """Share of pairs whose label is assumed wrong (sigmoid, robust, exo_pair)."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of the chosen answers, per token (RPO)."""
    precompute_ref_log_probs: bool = True
    """Compute the reference's log-probabilities once, before training, instead of in every step."""

    def __post_init__(self):
        if self.label_smoothing and self.loss_type not in SMOOTHED_LOSSES:
            raise ConfigError(
                f"dpo.label_smoothing: the loss {self.loss_type} has none; set it to 0, or use "
                f"one of {', '.join(SMOOTHED_LOSSES)}"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ConfigError(
                "dpo.label_smoothing: exo_pair takes its logarithm, so it must be above 0; "
                "0.001 is usual"
            )


@dataclass(frozen=True)
class RewardConfig:
    """A reward or toxicity model: one number for a text, the higher, the better.

    Pairs of answers, or of texts, learn by how much the better one scores higher; texts with a
    label learn on which side of 0 they belong.
    """

    margin: NonNegativeFloat = 0.0
    """Of pairs: the lead of the better answer's score at which its loss is ln 2."""
    positive_label: Literal[0, 1] = 0
    """Of texts with a label: the label whose texts are to score above 0. In toxicity sets, 1 means
    toxic, and a toxic text scores below 0 (as Aira's models do), so it is 0."""
    label: str = "REWARD"
    """What the score is called in the released config.json."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Norms and biases do not decay."""

    learning_rate: NonNegativeFloat = 5e-5
    """The peak of the schedule."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    """How the rate goes from its peak to the end: to 0 for linear and cosine."""
    warmup_steps: NonNegativeInt = 0
    """Updates in which the rate climbs from 0 (the first update has rate 0)."""
    warmup_ratio: Share = 0.0
    """The same as a share of all updates, rounded up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices and embeddings."""
    adam_beta1: Share = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Share = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""

    def __post_init__(self):
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("optimizer.warmup_steps and optimizer.warmup_ratio: set one of them")


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
class LoraConfig:
    """Low-rank adapters (LoRA) beside frozen linear layers."""

    target_modules: list[str] | str
    """Hugging Face's names of the linear layers that get one, as in peft: a list of last parts
    ([q_proj, k_proj, v_proj, o_proj]), or a regular expression that fits whole names."""
    r: PositiveInt = 8
    """Rank of an adapter."""
    alpha: PositiveFloat = 8.0
    """An adapter's product is multiplied by alpha / r."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    dropout: Share = 0.0
    """Dropout on the input of adapters."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the frozen linear layers in 8 or 4 bits (QLoRA); null: in the precision of the
    computation."""
    adapter: str | None = None
    """Adapter to go on with: a folder in PEFT's format, ours or peft's, or its hub id. Its rank,
    alpha and targets must be those given here."""


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
