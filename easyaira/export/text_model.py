"""The text model of a model for images or sound: its config, and its tensors under its own names.

Both follow transformers, which decides what config.json leaves out and whether the head is tied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from easyaira.errors import ConfigError, WeightsError, on_one_line, shown_as
from easyaira.export.hf_config import language_model
from easyaira.files import read_json
from easyaira.hf import safetensors
from easyaira.hf.lazy import slices
from easyaira.hf.table import VOCAB
from easyaira.models.model import Model
from easyaira.models.registry import model_of
from easyaira.storage.pretrained import Pretrained, without_most_common
from easyaira.torchless import import_transformers

TEXT_PART = "language_model"
OTHER_PARTS = ("vision_tower", "audio_tower", "multi_modal_projector", "image_newline")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class TextModel(NamedTuple):
    """A text model and its stored tensors.

    Attributes:
        config: content of its config.json.
        tensors: by their names in a folder of its own.
        left_out: the other parts of the folder.
    """

    model: Model
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    left_out: list[str]


def text_model(origin: Pretrained) -> TextModel:
    """Find the text model in a folder, and check all of it before any data is read.

    Raises:
        ConfigError: the folder has none, or one that is not supported.
        WeightsError: a tensor is missing, has another shape, or belongs to an unknown part.
    """
    config = _config(origin)
    model = model_of(config, origin.where, scorer=False)
    with shown_as(origin.folder, origin.where):
        stored = safetensors.open_folder(origin.folder)
    tensors: dict[str, np.ndarray] = {}
    left_out = set()
    for name, tensor in stored.items():
        own = _own_name(name, model.architecture.prefix)
        if own is None:
            part = name.removeprefix("model.").partition(".")[0]
            if part not in OTHER_PARTS:
                raise WeightsError(
                    f"{origin.where}: {name} is neither of the text model nor of "
                    f"{', '.join(OTHER_PARTS)}; remove it if nothing needs it"
                )
            left_out.add(part)
        elif own in tensors:
            raise WeightsError(f"{origin.where}: {own} is stored under two names; remove one")
        else:
            tensors[own] = tensor
    table = next(row.theirs for row in model.rows if row.op is VOCAB)
    if config["tie_word_embeddings"] and {"lm_head.weight", table} <= tensors.keys():
        if _equal(tensors["lm_head.weight"], tensors[table]):
            del tensors["lm_head.weight"]
        else:  # transformers ties no weights that differ, whatever config.json says
            config["tie_word_embeddings"] = False
            model = model_of(config, origin.where, scorer=False)
    tensors = model.match(tensors, origin.where)
    dtype = without_most_common({name: t.dtype.name for name, t in tensors.items()})[""]
    config |= {"architectures": [language_model(config)], "dtype": dtype}
    return TextModel(model, config, tensors, sorted(left_out))


def _config(origin: Pretrained) -> dict[str, Any]:
    """The text model's config, with what transformers takes from the whole model's."""
    outer = origin.config
    if not isinstance(outer.get("text_config"), Mapping):
        raise ConfigError(
            f"{origin.where}: config.json has no text_config, so it describes no model with other "
            "parts than text; use it as it is"
        )
    try:
        auto = import_transformers().AutoConfig
        whole = auto.from_pretrained(str(origin.folder), trust_remote_code=False)
        config = json.loads(whole.get_text_config(decoder=True).to_json_string())
    except Exception as error:  # transformers raises many types; all mean the same here
        reason = on_one_line(error)
        raise ConfigError(
            f"{origin.where}: transformers cannot read config.json ({reason}); correct it"
        ) from error
    config |= {name: outer[name] for name in TOKEN_IDS if outer.get(name) is not None}
    return config | {"tie_word_embeddings": bool(getattr(whole, "tie_word_embeddings", False))}


def _own_name(stored: str, prefix: str) -> str | None:
    """Name of a stored tensor in a folder of the text model alone, where names of its backbone
    begin with `prefix`; None if the tensor is of another part."""
    if stored.startswith("lm_head."):
        return stored
    if stored.startswith(f"model.{TEXT_PART}."):
        return prefix + stored.removeprefix(f"model.{TEXT_PART}.")
    if stored.startswith(f"{TEXT_PART}."):
        return stored.removeprefix(f"{TEXT_PART}.")
    return None


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal, without a copy of either."""
    pieces = slices(one.shape, one.itemsize)
    return one.shape == other.shape and all(np.array_equal(one[i], other[i]) for i in pieces)


def tokenizer_of(origin: Pretrained) -> Any:
    """The folder's tokenizer, with the chat template that older folders hold for the processor."""
    tokenizer = origin.tokenizer()
    file = origin.folder / "chat_template.json"
    if tokenizer.chat_template is None and file.exists():
        tokenizer.chat_template = read_json(file).get("chat_template")
    return tokenizer
