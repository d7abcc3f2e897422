"""config.json and generation_config.json of a released model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from easyaira.config.run import to_dict
from easyaira.errors import ConfigError, shortened
from easyaira.generation.settings import (
    GENERATION_CONFIG,
    NUMBERS,
    check_ids,
    end_ids,
    number_of,
)
from easyaira.storage.pretrained import Pretrained
from easyaira.torchless import import_transformers
from easyaira.train.setup import Setup

AUTO = ".models.auto.modeling_auto"  # of transformers: its classes by model type


@dataclass(frozen=True)
class Facts:
    """Everything an export needs besides the weights. Checkpoints store it.

    Attributes:
        config, generation_config: content of these files.
        stored_dtypes: map from tensor name to stored dtype; "" stands for all other tensors.
    """

    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    stored_dtypes: Mapping[str, str]

    @classmethod
    def of(cls, origin: Pretrained) -> Facts:
        """Those of a model that is only converted."""
        dtypes = origin.stored_dtypes()
        config = with_dtype(origin.config, dtypes[""] if origin.is_rounded() else None)
        return cls(config, origin.generation_config, dtypes)

    def to_meta(self) -> dict[str, Any]:
        return asdict(self)


def generation_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Content of generation_config.json with these settings, valid for transformers.

    Raises:
        ConfigError: transformers refuses the settings, or would compute nonsense with them.
    """
    # with this key, transformers would replace the settings by those in config.json
    settings = {k: v for k, v in settings.items() if k != "_from_model_config"}
    sampling = {"temperature", "top_p", "top_k"} & settings.keys()
    if settings.get("do_sample") is False:
        settings = {k: v for k, v in settings.items() if k not in sampling}
    elif sampling:
        settings["do_sample"] = True  # transformers refuses sampling settings without it
    for name in NUMBERS.keys() & settings.keys():
        if settings[name] is not None:
            number_of(name, settings[name])
    try:
        import_transformers().GenerationConfig(**settings).validate(strict=True)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"generation_config.json: transformers refuses it: {reason}") from error
    return settings


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json with this dtype, under the keys that it uses (`dtype`, `torch_dtype` or both)."""
    if dtype is None:
        return dict(config)
    keys = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}
    return dict(config) | dict.fromkeys(keys, dtype)


def released(setup: Setup) -> Facts:
    """config.json and generation_config.json of the release: the originals plus the run's changes.

    Weights keep the stored dtypes of the initial model. Ids of control tokens are those of the
    tokenizer, equal in both files.

    Raises:
        ConfigError: transformers refuses the generation settings, an id of a control token is not
            in the vocabulary, or the card's examples hold control tokens of another model.
    """
    origin, tokenizer, options = setup.origin, setup.tokenizer, to_dict(setup.config)
    random = setup.config.model.init == "random"
    dtypes = {"": "float32"} if random else origin.stored_dtypes()
    config = with_dtype(origin.config, dtypes[""]) | {"vocab_size": setup.model.vocab_size}
    if positions := options["model"]["max_positions"]:
        config["max_position_embeddings"] = positions
    if setup.model.scorer:
        config |= _scored(setup)
        check_ids(config, "config.json", setup.model.vocab_size)
        return Facts(config, {}, dtypes)
    _check_widget(setup)
    changed = setup.template.added or setup.config.model.tokenizer is not None
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    if tokenizer.sep_token_id is not None:  # encoder templates use it; both files name it
        ids |= {name: getattr(tokenizer, name) for name in ("sep_token_id", "unk_token_id")}
    ids = {name: token for name, token in ids.items() if token is not None}
    # without the ids of config.json, which may be stale
    files = {} if changed else {GENERATION_CONFIG: origin.generation_config}
    ends = end_ids(setup.template, files, setup.model.vocab_size)
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    asked = {k: v for k, v in options["generation"].items() if v is not None}
    config |= ids | {"architectures": [language_model(config)]}
    settings = dict(origin.generation_config)
    for file in (config, settings):
        if file.get("pad_token_id") == -1:  # early Llamas write -1 for none
            file["pad_token_id"] = None
    for name in ("bos_token_id", "pad_token_id"):
        config.setdefault(name, None)  # else transformers has a default: SmolLM3's pad is 128004
    generation = generation_config(settings | asked | ids)
    check_ids(config, "config.json", setup.model.vocab_size)
    check_ids(generation, GENERATION_CONFIG, setup.model.vocab_size)
    return Facts(config, generation, dtypes)


def _check_widget(setup: Setup) -> None:
    """Refuse example inputs with control tokens that neither the tokenizer nor the template has."""
    tokens = re.findall(r"<\|\w+\|>", "".join(setup.config.card.widget))
    foreign = [token for token in tokens if token not in setup.tokenizer.get_vocab()]
    if foreign:
        prompt = setup.template.prompt([{"role": "user", "content": "x"}])
        text = setup.tokenizer.decode(prompt)
        if lost := [token for token in foreign if token not in text]:
            raise ConfigError(
                f"card.widget: {lost[0]} is not a token of this run; write examples in the form of "
                f"data.template {shortened(setup.template.name)}"
            )


def value_released(setup: Setup) -> Facts | None:
    """config.json of a value model, as transformers' token classifier with one label; None if
    transformers has none of its architecture."""
    classes = import_transformers(AUTO).MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    critic = setup.critic
    config = critic.origin.config  # type: ignore[union-attr]
    if config["model_type"] not in classes:
        return None
    name = classes[config["model_type"]]
    dtypes = {"": "float32"}
    if not critic.random:  # type: ignore[union-attr]
        dtypes = critic.origin.stored_dtypes()  # type: ignore[union-attr]
    config = with_dtype(config, dtypes[""])
    config.pop("problem_type", None)
    config |= {"architectures": [name], "id2label": {"0": "value"}, "label2id": {"value": 0}}
    config["pad_token_id"] = setup.tokenizer.pad_token_id
    return Facts(config, {}, dtypes)


def language_model(config: Mapping[str, Any]) -> str:
    """Name of a language model's class in transformers, from which programs choose the loader."""
    return import_transformers(AUTO).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]


def _scored(setup: Setup) -> dict[str, Any]:
    """config.json entries of a scorer, including the pad token id that PyTorch needs."""
    label = setup.config.reward.label  # type: ignore[attr-defined]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    changed = names if setup.template.added else names[2:]
    return {
        "architectures": [setup.model.hf_class],
        "id2label": {"0": label},
        "label2id": {label: 0},
        "problem_type": "regression",  # use the raw score, not a probability
        **{name: getattr(setup.tokenizer, name) for name in changed},
    }
