"""How messages become tokens: one mechanism for every template.

A template is a Jinja chat template. It is rendered once per sequence of roles with placeholders for
the contents, and taken apart: control tokens by their ids, text between them to be encoded. A
person's text is put in afterwards and encoded so that nothing in it is taken for a control token.
An answer is learned together with the control token that ends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from easyaira.errors import ConfigError, DataError, TokenizerError

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
TEMPLATES = {"plain": PLAIN, "aira": AIRA, "tulu": TULU}

# in the order of their ids in the released models; gpt2 keeps its unknown token
AIRA_TOKENS = {
    "bos_token": "<|startofinstruction|>",
    "eos_token": "<|endofcompletion|>",
    "unk_token": "<|unk|>",
    "sep_token": "<|endofinstruction|>",
    "pad_token": "<|pad|>",
}
KEEPS_UNKNOWN = ("gpt2", "bloom")

ANCHOR = "\n"


@dataclass(frozen=True)
class Content:
    """The place of a message's content in a template."""

    message: int
    stripped: bool


class Start(int):
    """A start token from the tokenizer and not the template: text behind it is a text's start."""


class Text(NamedTuple):
    """Text to be encoded on its own, and whether it needs an anchor (see Template._probe)."""

    text: str
    anchored: bool


class Template:
    """Messages to tokens, for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        name: plain, aira, tulu, chat (the tokenizer's own) or a .jinja file.
        model_type: of the model, which decides aira's unknown token.

    Raises:
        ConfigError: no such template.
        TokenizerError: the tokenizer has no template, or cannot be built from parts.
    """

    def __init__(self, tokenizer: Any, name: str, model_type: str):
        self.tokenizer = tokenizer
        self.name = name
        length = len(tokenizer)
        if name == "aira":
            wanted = dict(AIRA_TOKENS)
            if model_type in KEEPS_UNKNOWN:
                del wanted["unk_token"]
            tokenizer.add_special_tokens(wanted)
        self.added = len(tokenizer) - length  # tokens that the model cannot know yet
        self.jinja = self._find(name)
        if tokenizer.eos_token_id is None:
            raise TokenizerError("tokenizer: has no eos_token, so no answer could end; set one")
        self.controls = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items()
        }
        self.first = tokenizer("").input_ids[:1]  # what this tokenizer puts in front of a text
        self._anchored_text, self._anchored_control = self._probe()
        self._parts = lru_cache(maxsize=4096)(self._parts_uncached)

    def _find(self, name: str) -> str:
        if name in TEMPLATES:
            return TEMPLATES[name]
        if name == "chat":
            if not self.tokenizer.chat_template:
                raise TokenizerError(
                    "data.template: the tokenizer has no chat template; choose "
                    f"{', '.join(TEMPLATES)} or a .jinja file"
                )
            return self.tokenizer.chat_template
        path = Path(name).expanduser()
        if path.suffix in (".jinja", ".j2") and path.is_file():
            return path.read_text(encoding="utf-8")
        raise ConfigError(
            f"data.template: no template {name!r}; choose {', '.join(TEMPLATES)}, chat or a .jinja "
            "file"
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True
        ).input_ids

    def _probe(self) -> tuple[bool, bool]:
        """Whether text that goes on after text, and after a control token, needs an anchor.

        SentencePiece-like tokenizers put a space in front of a text. In the middle of a sequence
        they must not, so such text is encoded behind a line feed, whose tokens are cut off again.
        """
        probes = ["b", " b", "Hi"]
        alone = self._encode(probes)
        anchored = self._behind_anchor(probes)
        control = self.tokenizer.eos_token
        joint = self.tokenizer([control + p for p in probes], add_special_tokens=False).input_ids
        joint = [ids[1:] for ids in joint]
        if self.tokenizer.eos_token_id in self._encode([control])[0]:
            raise TokenizerError(
                "tokenizer: takes typed text for control tokens; save and reload it"
            )
        if joint not in (alone, anchored):
            raise TokenizerError("tokenizer: encodes text after a control token in an unknown way")
        return alone != anchored, joint != alone

    def _behind_anchor(self, texts: Sequence[str]) -> list[list[int]]:
        anchor, *encoded = self._encode([ANCHOR, *(ANCHOR + text for text in texts)])
        if any(ids[: len(anchor)] != anchor for ids in encoded):
            raise TokenizerError("tokenizer: a line feed does not stay a token of its own")
        return [ids[len(anchor) :] for ids in encoded]

    def _parts_uncached(self, roles: tuple[str, ...]) -> list[int | str | Content]:
        """The template rendered for these roles: control token ids, text, places for contents."""
        messages = [{"role": r, "content": f" \ue000{i}\ue001 "} for i, r in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.jinja, tokenize=False
            )
        except Exception as error:  # Jinja's own, or what a template raises
            raise DataError(
                f"the template refuses the roles {', '.join(roles)}: {error}"
            ) from error
        controls = "|".join(sorted(map(re.escape, self.controls), key=len, reverse=True))
        parts: list[int | str | Content] = []
        for piece in re.split(rf"( ?\ue000\d+\ue001 ?|{controls})", text):
            if piece in self.controls:
                parts.append(self.controls[piece])
            elif content := re.fullmatch(r"( ?)\ue000(\d+)\ue001( ?)", piece):
                parts.append(Content(int(content[2]), stripped=not (content[1] and content[3])))
            elif piece:
                parts.append(piece)
        shown = [part.message for part in parts if isinstance(part, Content)]
        if shown != list(range(len(roles))):
            lost = [roles[i] for i in range(len(roles)) if i not in shown]
            raise DataError(f"the template drops or repeats a turn: {', '.join(lost or roles)}")
        return self._with_start_and_end(parts, roles)

    def _with_start_and_end(self, parts: list, roles: tuple[str, ...]) -> list:
        """One start token where the tokenizer has one, and an end token after the last answer."""
        if self.first and parts[0] not in (*self.first, self.tokenizer.bos_token_id):
            parts = [*map(Start, self.first), *parts]
        last = max(i for i, part in enumerate(parts) if isinstance(part, Content))
        if roles[-1] != "assistant":
            return parts[: last + 1]
        if not (last + 1 < len(parts) and isinstance(parts[last + 1], int)):
            return [*parts[: last + 1], self.tokenizer.eos_token_id]
        return parts[: last + 2]

    def encode(
        self, conversations: Iterable[Sequence[dict[str, str]]]
    ) -> list[list[tuple[np.ndarray, bool]]]:
        """Each conversation as spans (tokens, learned?), in order.

        Answers of the assistant and the control token that ends each are learned spans. A prompt is
        always a token prefix of the prompt with its answer: text never merges across their border.

        Raises:
            DataError: a conversation that `accepts` refuses.
        """
        plans = [self._plan(messages) for messages in conversations]
        texts = {item for plan in plans for item, _ in plan if isinstance(item, Text)}
        ids_of = self._encode_texts(texts)
        encoded = []
        for plan in plans:
            spans: list[tuple[list[int], bool]] = []
            for item, learned in plan:
                if not spans or spans[-1][1] != learned:
                    spans.append(([], learned))
                spans[-1][0].extend(ids_of[item] if isinstance(item, Text) else [item])
            encoded.append([(np.array(ids, np.int32), learned) for ids, learned in spans])
        return encoded

    def _plan(self, messages: Sequence[dict[str, str]]) -> list[tuple[int | Text, bool]]:
        """The template filled in: control token ids and texts, each with whether it is learned."""
        items: list[tuple[int | str, bool]] = []
        for part in self._parts(tuple(message["role"] for message in messages)):
            learned = False
            if isinstance(part, Content):
                message = messages[part.message]
                learned = message["role"] == "assistant"
                part = message["content"].strip() if part.stripped else message["content"]
            elif isinstance(part, int) and items:  # it ends an answer if one stands before it
                learned = items[-1][1] and isinstance(items[-1][0], str)
            if items and isinstance(part, str) and isinstance(items[-1][0], str):
                if items[-1][1] == learned:
                    items[-1] = (items[-1][0] + part, learned)
                    continue
            items.append((part, learned))
        plan: list[tuple[int | Text, bool]] = []
        for item, learned in items:
            if isinstance(item, str):
                before = plan[-1][0] if plan else Start()
                anchored = (
                    self._anchored_control if isinstance(before, int) else self._anchored_text
                )
                item = Text(item, anchored and not isinstance(before, Start))
            plan.append((item, learned))
        return plan

    def _encode_texts(self, texts: Iterable[Text]) -> dict[Text, list[int]]:
        alone = [text for text in texts if not text.anchored]
        anchored = [text for text in texts if text.anchored]
        return dict(zip(alone, self._encode([t.text for t in alone]), strict=True)) | dict(
            zip(anchored, self._behind_anchor([t.text for t in anchored]), strict=True)
        )

    def accepts(self, messages: Sequence[dict[str, str]]) -> None:
        """Raises DataError if the template cannot show turns of these roles, each once."""
        self._parts(tuple(message["role"] for message in messages))

    @property
    def end_ids(self) -> list[int]:
        """Control tokens that end an answer: the template's, and the tokenizer's own."""
        end = self._parts(("user", "assistant"))[-1]
        return list(dict.fromkeys([end, self.tokenizer.eos_token_id]))

    def prompt(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """The tokens before the answer to `messages`, as training shows them."""
        spans = self.encode([[*messages, {"role": "assistant", "content": ""}]])[0]
        return np.concatenate([tokens for tokens, _ in spans[:-1]])

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without control tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)
