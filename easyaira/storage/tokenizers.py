"""Tokenizers of transformers: read from a model's folder, and written to one."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from easyaira.errors import StorageError, TokenizerError, on_one_line
from easyaira.files import reason
from easyaira.torchless import import_transformers


def load_tokenizer(folder: Path, where: str) -> Any:
    """Load the tokenizer of a folder; `where` names it in messages.

    Raises:
        TokenizerError: there is no tokenizer, or it is not a fast one.
    """
    transformers = import_transformers()
    # drop warnings: of long texts, which data/tokenise.py truncates and counts; of token ids, which
    # are checked where they are used; of a failure, which is raised below
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        # tokenizer.json alone, whether mistral-common is installed or not
        read = {"trust_remote_code": False, "mistral_format": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **read)
    except Exception as error:  # transformers raises many types; all mean the same here
        only_model = [file.name for file in folder.glob("tokenizer.*")] == ["tokenizer.model"]
        if only_model and importlib.util.find_spec("sentencepiece") is None:
            raise TokenizerError(
                f"{where}: has tokenizer.model without tokenizer.json, which needs "
                "sentencepiece: pip install sentencepiece, or save a tokenizer.json there"
            ) from error
        raise TokenizerError(
            f"{where}: no tokenizer could be loaded ({on_one_line(error)}); set model.tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"{where}: only fast tokenizers (tokenizer.json) are supported; name one in "
            "model.tokenizer"
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files.

    Raises:
        StorageError: they cannot be written.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # on a full disk, the tokenizers library raises a plain Exception
        raise StorageError(f"{folder}: cannot be written: {reason(error)}") from error
