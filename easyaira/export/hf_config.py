"""config.json and generation_config.json of a released model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from easyaira.config.run import to_dict
from easyaira.errors import ConfigError
from easyaira.train.setup import Setup


@dataclass(frozen=True)
class Facts:
    """What an export needs to know of a model beside its weights; checkpoints keep it.

    Attributes:
        config, generation_config: the files of these names.
        stored_dtypes: tensor name -> dtype its weights are stored with; "" stands for all others.
    """

    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    stored_dtypes: Mapping[str, str]

    def to_meta(self) -> dict[str, Any]:
        return asdict(self)


def generation_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json with these settings, as transformers reads it.

    Raises:
        ConfigError: transformers would refuse it.
    """
    from transformers import GenerationConfig

    # this mark would let transformers put config.json's settings in the place of these
    settings = {k: v for k, v in settings.items() if k != "_from_model_config"}
    sampling = {"temperature", "top_p", "top_k"} & settings.keys()
    if settings.get("do_sample") is False:
        settings = {k: v for k, v in settings.items() if k not in sampling}
    elif sampling:
        settings["do_sample"] = True  # transformers refuses settings that it would ignore
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"generation_config.json: transformers refuses it: {reason}") from error
    return settings


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json, which says how its weights are stored under one of two names."""
    if dtype is None:
        return dict(config)
    return dict(config) | {"dtype" if "dtype" in config else "torch_dtype": dtype}


def released(setup: Setup) -> Facts:
    """What the files beside the weights will say: the original's words, and what the run changed.

    Weights are stored as they were in the model that the run began with. The ids of control tokens
    are the tokenizer's, alike in config.json and generation_config.json.

    Raises:
        ConfigError: transformers would not read these files.
    """
    origin, tokenizer, options = setup.origin, setup.tokenizer, to_dict(setup.config)
    random = setup.config.model.init == "random"
    dtypes = {"": "float32"} if random else origin.stored_dtypes()
    config: dict[str, Any] = dict(origin.config) | {"vocab_size": setup.model.vocab_size}
    config["dtype" if "dtype" in config else "torch_dtype"] = dtypes[""]
    if positions := options["model"]["max_positions"]:
        config["max_position_embeddings"] = positions
    if setup.model.scorer:
        return Facts(config | _scored(setup), {}, dtypes)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    if tokenizer.sep_token_id is not None:  # a token of the template, which both files name
        ids |= {name: getattr(tokenizer, name) for name in ("sep_token_id", "unk_token_id")}
    ids = {name: token for name, token in ids.items() if token is not None}
    ends = list(setup.template.end_ids)
    if not setup.template.added and setup.config.model.tokenizer is None:
        stored = origin.generation_config.get("eos_token_id", [])
        stored = stored if isinstance(stored, list) else [stored]
        ends += [token for token in stored if token is not None and token not in ends]
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    asked = {k: v for k, v in options["generation"].items() if v is not None}
    generation = generation_config(origin.generation_config | asked | ids)
    return Facts(config | ids, generation, dtypes)


def _scored(setup: Setup) -> dict[str, Any]:
    """What config.json says of a scorer, also of how PyTorch tells a text from its padding."""
    label = setup.config.reward.label  # type: ignore[attr-defined]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    changed = names if setup.template.added else names[2:]
    return {
        "architectures": [setup.model.hf_class],
        "id2label": {"0": label},
        "label2id": {label: 0},
        "problem_type": "regression",  # the score itself, and no probability of it
        **{name: getattr(setup.tokenizer, name) for name in changed},
    }
