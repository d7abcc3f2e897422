"""Generation settings in config.json and generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from easyaira.data.template import Template
from easyaira.errors import ConfigError

GENERATION_CONFIG = "generation_config.json"
# settings that change no token here: names, caches, outputs, settings of beams, and those of
# `generate` that replace each other
WITHOUT_EFFECT = (
    *("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
    *("unk_token_id", "transformers_version", "_from_model_config", "use_cache"),
    *("cache_implementation", "cache_config", "output_attentions", "output_hidden_states"),
    *("output_logits", "output_scores", "return_dict_in_generate", "early_stopping"),
    *("length_penalty", "max_length", "renormalize_logits", "remove_invalid_values"),
)
ONE_CHANGES_NOTHING = (
    *("num_beams", "num_beam_groups", "num_return_sequences"),
    *("typical_p", "encoder_repetition_penalty", "guidance_scale"),
)
NUMBERS = {  # setting: kind, smallest value, largest value
    "temperature": (float, 0.0, math.inf),
    "top_k": (int, 0, math.inf),
    "top_p": (float, 0.0, 1.0),
    "min_p": (float, 0.0, 1.0),
    "repetition_penalty": (float, 1e-3, math.inf),
    "max_new_tokens": (int, 1, math.inf),
    "min_new_tokens": (int, 0, math.inf),
}


def files_of(origin: Any) -> dict[str, Mapping[str, Any]]:
    """The files of a Pretrained model that name its end tokens, for `end_ids`."""
    return {"config.json": origin.config, GENERATION_CONFIG: origin.generation_config}


def end_ids(
    template: Template, files: Mapping[str, Mapping[str, Any]], vocab_size: int
) -> list[int]:
    """Tokens that end an answer: the template's and the tokenizer's, and the `eos_token_id` of each
    of `files`, in case they disagree.

    Raises:
        ConfigError: an eos_token_id is not a token of the model.
    """
    ids = list(template.end_ids)
    for name, content in files.items():
        stored = content.get("eos_token_id")
        check_ids({"eos_token_id": stored}, name, vocab_size)
        ids += stored if isinstance(stored, list) else [stored]
    return [token for token in dict.fromkeys(ids) if token is not None]


def check_ids(content: Mapping[str, Any], file: str, vocab_size: int) -> None:
    """Check every entry of a file that names one token or several.

    Raises:
        ConfigError: one is not a token of the model.
    """
    for name, stored in content.items():
        if not name.endswith("_token_id"):
            continue
        for token in stored if isinstance(stored, list) else [stored]:
            if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
                raise ConfigError(
                    f"{file}: {name}: found {token!r:.80}, expected ids below {vocab_size}, the "
                    "model's vocabulary; correct or remove it"
                )


def number_of(name: str, value: Any, where: str = GENERATION_CONFIG) -> int | float:
    """A setting of NUMBERS, which may be a number of NumPy's, as one of Python's.

    Args:
        where: the file, for messages.

    Raises:
        ConfigError: it is out of range.
    """
    kind, least, most = NUMBERS[name]
    number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not number or not least <= value <= most or value == math.inf:
        words = "a number" if kind is float else "a whole number"
        upto = f" to {most:g}" if most < math.inf else ""
        raise ConfigError(
            f"{where}: {name}: found {value!r:.80}, expected {words} from {least:g}{upto}; "
            "correct or remove it"
        )
    return kind(value)


def stop_strings(value: Any, where: str = GENERATION_CONFIG) -> tuple[str, ...]:
    """The setting of this name: None, a text, or texts in a list or tuple.

    Args:
        where: the file, for messages.

    Raises:
        ConfigError: it is something else, or a text is empty.
    """
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
        raise ConfigError(
            f"{where}: stop_strings: found {value!r:.80}, expected texts; correct or remove it"
        )
    return tuple(stops)


def options_of(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `processors.Sampling` that generation_config.json sets.

    Raises:
        ConfigError: a setting that `generate` does not have, or an impossible value.
    """
    options = {}
    for name, value in generation_config.items():
        if value is None or name in (*WITHOUT_EFFECT, "do_sample"):
            continue
        if name in NUMBERS:
            options[name] = number_of(name, value)
        elif name == "stop_strings":
            options[name] = stop_strings(value)
        elif value and not (value == 1 and name in ONE_CHANGES_NOTHING):
            raise ConfigError(
                f"{GENERATION_CONFIG}: {name} {value!r} is not supported here; remove it, or "
                "generate with transformers"
            )
    sample = generation_config.get("do_sample") or False
    if not isinstance(sample, bool):
        raise ConfigError(f"{GENERATION_CONFIG}: do_sample: found {sample!r}, expected a boolean")
    if sample:
        return {"temperature": 1.0, "top_k": 50} | options  # transformers' defaults
    sampling = ("temperature", "top_k", "top_p", "min_p")
    return {name: value for name, value in options.items() if name not in sampling}
