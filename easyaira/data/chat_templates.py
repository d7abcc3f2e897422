"""Jinja chat templates by name, and the tokens that they add to a tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easyaira.errors import ConfigError, TokenizerError, did_you_mean, kind_of
from easyaira.files import named_path, read_file, reason

PLAIN = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
AIRA = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + m['content'] + sep_token }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
TULU = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'].strip() + eos_token }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'].strip() }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}"
    "{% endif %}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() }}"
    "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
ENCODER = "{{ cls_token }}{% for m in messages %}{{ m['content'] + sep_token }}{% endfor %}"
TEMPLATES = {
    "plain": PLAIN,
    "aira": AIRA,
    "tulu": TULU,
    "zephyr": ZEPHYR,
    "chatml": CHATML,
    "llama-2": LLAMA_2,
}

# tokens that a template adds to a tokenizer, in the order of their ids in the released models
AIRA_TOKENS = {
    "bos_token": "<|startofinstruction|>",
    "eos_token": "<|endofcompletion|>",
    "unk_token": "<|unk|>",
    "sep_token": "<|endofinstruction|>",
    "pad_token": "<|pad|>",
}
STARTS = ("{{ bos_token }}", "{{ bos_token + ' ' }}")  # before a template, in a release
KEEPS_UNKNOWN = ("gpt2", "bloom")  # model types that keep their own unk_token
CHATML_TOKENS = {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}


def add_tokens(name: str, tokenizer: Any, model_type: str) -> None:
    """Add the tokens of the template called `name` to a tokenizer."""
    if name == "aira":
        wanted = dict(AIRA_TOKENS)
        if model_type in KEEPS_UNKNOWN:
            del wanted["unk_token"]
        tokenizer.add_special_tokens(wanted)
    elif name == "chatml":
        tokenizer.add_special_tokens(CHATML_TOKENS)


def find_template(name: str, tokenizer: Any) -> tuple[str, str]:
    """The Jinja template called `name`, and the place to name in errors about it.

    Raises:
        ConfigError: there is no such template.
        TokenizerError: the tokenizer has none.
    """
    if name in TEMPLATES:
        return TEMPLATES[name], f"template {name}"
    if name == "encoder":
        return ENCODER, "template encoder"
    if name == "chat":
        return _own(tokenizer)
    if "{{" in name or "{%" in name:
        return name, "data.template"
    path = named_path(name)
    if path.suffix in (".jinja", ".j2") and path.exists():
        try:
            return read_file(path).decode(), str(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {reason(error)}") from error
    if path.suffix in (".jinja", ".j2"):
        raise ConfigError(f"data.template: {path}: no such file; check the path")
    raise ConfigError(
        f"data.template: no template {name!r}; choose {', '.join(TEMPLATES)}, chat, a .jinja "
        f"file or a Jinja template{did_you_mean(name, TEMPLATES)}"
    )


@contextlib.contextmanager
def as_argument() -> Iterator[None]:
    """Errors name the argument `template`, where there is no `data.template`."""
    try:
        yield
    except (ConfigError, TokenizerError) as error:
        raise type(error)(str(error).removeprefix("data.")) from error


def with_start(jinja: str, text: str, wanted: list[int], tokenizer: Any) -> str:
    """A template from which `apply_chat_template` makes the tokens of training. It does not add the
    start token that the tokenizer adds, so the template has to write it; and a blank after it,
    where the tokenizer has one at the start of a text alone.

    Args:
        text: what `jinja` writes for a question.
        wanted: the question's tokens in training.
    """
    bos = tokenizer.bos_token or ""
    for start, written in zip(("", *STARTS), ("", bos, f"{bos} "), strict=True):
        if tokenizer(written + text, add_special_tokens=False).input_ids == wanted:
            return start + jinja
    return jinja


def _own(tokenizer: Any) -> tuple[str, str]:
    """The tokenizer's template, and the file that holds it."""
    if not tokenizer.chat_template:
        raise TokenizerError(
            "data.template: the tokenizer has no chat template; choose "
            f"{', '.join(TEMPLATES)} or a .jinja file"
        )
    folder = Path(tokenizer.name_or_path)
    files = [folder / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    where = str(next((file for file in files if file.is_file()), "chat template"))
    if folder.parent.name == "snapshots":  # in the cache of the model hub
        repository = folder.parents[1].name.removeprefix("models--").replace("--", "/")
        where = where.replace(str(folder), repository)
    if not isinstance(tokenizer.chat_template, str | dict):
        kind = kind_of(tokenizer.chat_template)
        raise TokenizerError(f"{where}: chat_template: expected a text, found {kind}")
    try:
        jinja = tokenizer.get_chat_template()
        plain = {start + template: template for start in STARTS for template in TEMPLATES.values()}
        return plain.get(jinja, jinja), where
    except ValueError as error:
        raise TokenizerError(
            f"{where}: has the templates {', '.join(tokenizer.chat_template)}, but no default; "
            "write one of them to a .jinja file and name it in data.template"
        ) from error
