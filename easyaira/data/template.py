"""Messages to tokens, by one mechanism for every template.

A template is a Jinja chat template. It is rendered once per sequence of roles, with placeholders
for the contents, and split into control tokens (as ids), text and placeholders. The contents are
filled in afterwards and encoded as plain text, so that nothing in them becomes a control token. The
loss of an answer includes the control token that ends it and the spaces around it.
"""

from __future__ import annotations

import copy
import hashlib
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from easyaira.data.chat_templates import (
    AIRA_TOKENS,
    CHATML_TOKENS,
    ENCODER,
    KEEPS_UNKNOWN,
    TEMPLATES,
)
from easyaira.errors import ConfigError, DataError, TokenizerError

ANCHOR = "\n"
SPACE = "\u2003"  # around placeholders, to detect stripping; no template writes it
MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # spelling of added tokens that are controls
RENDER_SECONDS = 10


@dataclass(frozen=True)
class Content:
    """Placeholder of a message's content: how to strip it, and the template's spaces around it."""

    message: int
    lstrip: bool
    rstrip: bool
    before: str = ""
    after: str = ""

    def of(self, text: str) -> str:
        text = text.lstrip() if self.lstrip else text
        return self.before + (text.rstrip() if self.rstrip else text) + self.after


class Start(int):
    """A start token that the tokenizer adds and the template lacks; text after it starts a text."""


class Text(NamedTuple):
    """Text to encode separately, and whether it needs an anchor (see Template._probe)."""

    text: str
    anchored: bool


class Template:
    """Encoder of messages for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        name: a key of TEMPLATES, chat (the tokenizer's own), a .jinja file, a Jinja template, or
            encoder (the format of BERT and RoBERTa for several texts).
        model_type: model type, which decides whether the template aira adds an unknown token.
        allowed: control tokens that may be spelled in the contents.
        padded: add a padding token if there is none that differs from the end token, so that a
            text's last token can be told from padding.

    Raises:
        ConfigError: the template or a control token does not exist.
        TokenizerError: the tokenizer has no template, lacks a token, or cannot encode in parts.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        model_type: str,
        allowed: Sequence[str] = (),
        *,
        padded: bool = False,
    ):
        self.tokenizer = tokenizer
        self.name = name
        self.model_type = model_type
        self._allowed_names = tuple(allowed)
        length = len(tokenizer)
        if name == "aira":
            wanted = dict(AIRA_TOKENS)
            if model_type in KEEPS_UNKNOWN:
                del wanted["unk_token"]
            tokenizer.add_special_tokens(wanted)
        elif name == "chatml":
            tokenizer.add_special_tokens(CHATML_TOKENS)
        self.encoder = name == "encoder"
        if self.encoder and None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            raise TokenizerError("tokenizer: has no cls_token or no sep_token, which encoders need")
        if padded and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.add_special_tokens({"pad_token": AIRA_TOKENS["pad_token"]})
        self.added = len(tokenizer) - length  # tokens that are new to the model
        self.jinja = self._find(name)
        self.end = tokenizer.eos_token_id
        if self.end is None:
            self.end = tokenizer.sep_token_id  # the end token of encoders
        if self.end is None:
            raise TokenizerError("tokenizer: has no eos_token to end an answer; set one")
        added = tokenizer.added_tokens_decoder
        markers = [
            token.content
            for token in added.values()
            if not token.special and MARKER.fullmatch(token.content)
        ]
        self.controls = {
            token.content: index
            for index, token in added.items()
            if token.special or token.content in markers
        }
        if unknown := [token for token in allowed if token not in self.controls]:
            raise ConfigError(
                f"data.allowed_tokens: {unknown[0]!r} is not a control token; choose from "
                f"{', '.join(self.controls)}"
            )
        self._allowed = _any_of(allowed)
        self._typed = _any_of(set(self.controls) - set(allowed))
        # contents are encoded by a copy where all controls are special, so that they can be split
        self._texts = tokenizer
        if markers:
            self._texts = copy.deepcopy(tokenizer)
            self._texts.add_special_tokens({"additional_special_tokens": markers})
        self.first = tokenizer("").input_ids[:1]  # start tokens that this tokenizer adds
        self._anchored_text, self._anchored_control = self._probe()
        self._parts = lru_cache(maxsize=4096)(self._parts_uncached)

    def _find(self, name: str) -> str:
        if name in TEMPLATES:
            return TEMPLATES[name]
        if name == "encoder":
            return ENCODER
        if name == "chat":
            if not self.tokenizer.chat_template:
                raise TokenizerError(
                    "data.template: the tokenizer has no chat template; choose "
                    f"{', '.join(TEMPLATES)} or a .jinja file"
                )
            return self.tokenizer.chat_template
        if "{{" in name or "{%" in name:
            return name
        path = Path(name).expanduser()
        if path.suffix in (".jinja", ".j2") and path.is_file():
            return path.read_text(encoding="utf-8")
        raise ConfigError(
            f"data.template: no template {name!r}; choose {', '.join(TEMPLATES)}, chat, a .jinja "
            "file or a Jinja template"
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._texts(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids

    def _probe(self) -> tuple[bool, bool]:
        """Whether text after text, and text after a control token, needs an anchor.

        SentencePiece-like tokenizers prepend a space to a text, which is wrong in the middle of a
        sequence. Such text is encoded after an anchor, a line feed whose tokens are then removed.
        """
        probes = ["b", " b", "Hi"]
        alone = self._encode(probes)
        anchored = self._behind_anchor(probes)
        control = self.tokenizer.convert_ids_to_tokens(self.end)
        joint = self.tokenizer([control + p for p in probes], add_special_tokens=False).input_ids
        joint = [ids[1:] for ids in joint]
        if self.end in self._encode([control])[0]:
            raise TokenizerError(
                "tokenizer: encodes plain text as control tokens; save and reload it"
            )
        if joint not in (alone, anchored):
            raise TokenizerError("tokenizer: encodes text after a control token in an unknown way")
        return alone != anchored, joint != alone

    def _behind_anchor(self, texts: Sequence[str]) -> list[list[int]]:
        anchor, *encoded = self._encode([ANCHOR, *(ANCHOR + text for text in texts)])
        if any(ids[: len(anchor)] != anchor for ids in encoded):
            raise TokenizerError("tokenizer: a line feed does not stay a token of its own")
        return [ids[len(anchor) :] for ids in encoded]

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        """Render the template as text, within a time limit: Jinja's sandbox bounds single loops but
        not nested ones."""
        result: list[str | Exception] = []

        def render():
            try:
                result.append(
                    self.tokenizer.apply_chat_template(
                        messages, chat_template=self.jinja, tokenize=False
                    )
                )
            except Exception as error:  # Jinja's errors, and those that a template raises
                result.append(error)

        thread = threading.Thread(target=render, daemon=True)
        thread.start()
        thread.join(RENDER_SECONDS)
        if not result:
            raise TokenizerError(f"data.template: does not finish within {RENDER_SECONDS} seconds")
        if isinstance(result[0], Exception):
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the template refuses the roles {roles}: {result[0]}") from result[0]
        return result[0]

    def _parts_uncached(self, roles: tuple[str, ...]) -> list[int | str | Content]:
        """Render the template for these roles as control token ids, text, and placeholders."""
        text = self._render(
            [{"role": r, "content": f"{SPACE}\ue000{i}\ue001{SPACE}"} for i, r in enumerate(roles)]
        )
        place = rf"{SPACE}?\ue000\d+\ue001{SPACE}?"
        parts: list[int | str | Content] = []
        for piece in re.split(rf"({place}|{_any_of(self.controls).pattern})", text):
            if piece in self.controls:
                parts.append(self.controls[piece])
            elif number := re.search(r"\ue000(\d+)\ue001", piece):
                stripped = (not piece.startswith(SPACE), not piece.endswith(SPACE))
                parts.append(Content(int(number[1]), *stripped))
            elif piece:
                parts.append(piece)
        shown = [part.message for part in parts if isinstance(part, Content)]
        if shown != list(range(len(roles))):
            lost = [roles[i] for i in range(len(roles)) if i not in shown]
            raise DataError(f"the template drops or repeats a turn: {', '.join(lost or roles)}")
        return self._with_start_and_end(_with_spaces(parts, roles), roles)

    def _with_start_and_end(self, parts: list, roles: tuple[str, ...]) -> list:
        """Add the tokenizer's start token if missing, and end after the last answer's end token."""
        if self.first and parts[0] not in (*self.first, self.tokenizer.bos_token_id):
            parts = [*map(Start, self.first), *parts]
        last = max(i for i, part in enumerate(parts) if isinstance(part, Content))
        if roles[-1] != "assistant":
            return parts[: last + 1]
        if not (last + 1 < len(parts) and isinstance(parts[last + 1], int)):
            return [*parts[: last + 1], self.end]
        return parts[: last + 2]

    def encode(
        self, conversations: Iterable[Sequence[dict[str, str]]]
    ) -> list[list[tuple[np.ndarray, bool]]]:
        """Encode each conversation as a list of spans (tokens, learned).

        The assistant's answers, each with the control token that ends it, are learned spans. The
        tokens of a prompt are always a prefix of those of prompt and answer: no token spans both.

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
        """Fill in the template: control token ids and texts, each with whether it is learned."""
        items: list[tuple[int | str, bool]] = []

        def put(item: int | str, learned: bool) -> None:
            if items and isinstance(item, str) and isinstance(items[-1][0], str):
                if items[-1][1] == learned:
                    items[-1] = (items[-1][0] + item, learned)
                    return
            items.append((item, learned))

        after_answer = False
        for part in self._parts(tuple(message["role"] for message in messages)):
            if isinstance(part, Content):
                message = messages[part.message]
                after_answer = message["role"] == "assistant"
                text, end = part.of(message["content"]), 0
                for match in self._allowed.finditer(text):
                    put(text[end : match.start()], after_answer)
                    put(self.controls[match[0]], after_answer)
                    end = match.end()
                put(text[end:], after_answer)
                continue
            put(part, after_answer and isinstance(part, int))  # it ends the answer before it
            after_answer = False
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
        """Raise DataError unless the template renders turns of these roles, each exactly once."""
        self._parts(tuple(message["role"] for message in messages))

    def fingerprint(self) -> str:
        """Hash of everything that determines the tokens of a text."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        rest = (self.jinja, self.controls, self.first, self.end, self._allowed_names)
        digest.update(repr(rest).encode())
        return digest.hexdigest()

    @property
    def end_ids(self) -> list[int]:
        """Control tokens that end an answer: the template's, and the tokenizer's own."""
        end = self._parts(("user", "assistant"))[-1]
        return list(dict.fromkeys([end, self.end]))

    def prompt(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Tokens of the prompt that ends with `messages`, as in training."""
        spans = self.encode([[*messages, {"role": "assistant", "content": ""}]])[0]
        return np.concatenate([tokens for tokens, _ in spans[:-1]])

    def judged(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts with the tokenizer's own start and end tokens, for models that score."""
        alone, framed = self._encode(["a"])[0], self.tokenizer("a").input_ids
        start = next(i for i in range(len(framed)) if framed[i : i + len(alone)] == alone)
        before, after = framed[:start], framed[start + len(alone) :]
        encoded = self._encode_texts({Text(text, False) for text in texts})
        return [np.array(before + encoded[Text(t, False)] + after, np.int32) for t in texts]

    def types_control(self, text: str) -> bool:
        """Whether a text spells a control token that is encoded as plain text."""
        return self._typed.search(text) is not None

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds; a character of several tokens belongs to the last one."""
        texts, start, before = [], 0, ""
        for i in range(len(tokens)):
            text = self.tokenizer.decode(list(tokens[start : i + 1]))
            if text.endswith("\ufffd") and i + 1 < len(tokens):
                texts.append("")
                continue
            texts.append(text[len(before) :])
            before = text
            if i - start >= 16:  # restart: a window is enough context
                start, before = i, self.tokenizer.decode([tokens[i]])
        return texts

    def text(self, tokens: Sequence[int]) -> str:
        """Decode tokens to text, without control tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Pattern that matches any of `words`, longest first; no words match nothing."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _with_spaces(parts: list, roles: tuple[str, ...]) -> list:
    """Move the spaces before an answer, and blank text between it and a control token, into the
    answer: tokenizers merge a space with the next word."""
    parts = list(parts)
    for i, part in enumerate(parts):
        if not isinstance(part, Content) or roles[part.message] != "assistant":
            continue
        before, after = (parts[j] if 0 <= j < len(parts) else None for j in (i - 1, i + 1))
        if isinstance(before, str) and before.endswith(" "):
            parts[i - 1] = before.rstrip(" ")
            part = replace(part, before=" " * (len(before) - len(parts[i - 1])))
        ends = i + 2 < len(parts) and isinstance(parts[i + 2], int)
        if isinstance(after, str) and not after.strip() and ends:
            part = replace(part, after=after)
            parts[i + 1] = ""
        parts[i] = part
    return [part for part in parts if part != ""]
