"""Messages to tokens, by one mechanism for every template.

A template is a Jinja chat template. The contents are filled into its layout and encoded as plain
text, so that nothing in them becomes a control token. The loss of an answer includes the control
token that ends it and the spaces around it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np

from easyaira.data.chat_templates import (
    AIRA_TOKENS,
    ENCODER,
    TEMPLATES,
    add_tokens,
    find_template,
    with_start,
)
from easyaira.data.layout import (
    LEFT,
    PLACE,
    Content,
    Layout,
    Part,
    any_of,
    layout_of,
    placeholder,
    stripped,
)
from easyaira.data.plain_text import PlainText, Text
from easyaira.data.rendering import Broken, Child, Ended, Refused, Rendered, render
from easyaira.errors import ConfigError, DataError, TokenizerError

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # spelling of added tokens that are controls
ROLE = re.compile(r"\w[\w .-]{0,39}")  # templates write it as it is
DATED = (
    "data.template: may write today's date, so the same command gives other tokens on another "
    "day; name a .jinja file with a fixed date"
)


class Start(int):
    """A start token that the tokenizer adds and the template lacks; text after it has no anchor."""


Plan = list[tuple[int | Text, bool]]


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
        own = tokenizer.chat_template
        self._own = own.strip() if isinstance(own, str) else ""
        self.model_type = model_type
        self._allowed_names = tuple(allowed)
        known = set(tokenizer.get_vocab().values())
        add_tokens(name, tokenizer, model_type)
        self.encoder = name == "encoder"
        if self.encoder and None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            raise TokenizerError("tokenizer: has no cls_token or no sep_token, which encoders need")
        if padded and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.add_special_tokens({"pad_token": AIRA_TOKENS["pad_token"]})
        vocabulary = tokenizer.get_vocab()
        self.added = sorted(set(vocabulary.values()) - known)  # ids that are new to the model
        if len(set(vocabulary.values())) < len(vocabulary):
            raise TokenizerError(
                "tokenizer: two tokens have the same id; save it with ids in a row"
            )
        self.jinja, self._where = find_template(name, tokenizer)
        self.end = tokenizer.eos_token_id
        if self.end is None:
            self.end = tokenizer.sep_token_id  # the end token of encoders
        if self.end is None:
            raise TokenizerError(
                "tokenizer: has no eos_token to end an answer; set one in its tokenizer_config.json"
            )
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
        self._lstrips, self._rstrips = (
            {index for index, token in added.items() if getattr(token, side)}
            for side in ("lstrip", "rstrip")
        )
        self._allowed = any_of(allowed)
        self._typed = any_of(set(self.controls) - set(allowed))
        self._texts = PlainText(tokenizer, markers, self.end)
        self.first = tokenizer("").input_ids[:1]  # start tokens that this tokenizer adds
        self._starts = {*self.first, tokenizer.bos_token_id}
        tokens = tokenizer.special_tokens_map
        self._reads_contents = self.jinja not in (*TEMPLATES.values(), ENCODER)
        self._rendered = (
            Child(self.jinja, tokens).render
            if self._reads_contents
            else partial(render, self.jinja, tokens)
        )
        self._layout = lru_cache(maxsize=4096)(self._layout_uncached)
        self._check()

    def released(self) -> str:
        """The template for others' `apply_chat_template`, with the start token."""
        user = [{"role": "user", "content": "Hi there"}]
        with suppress(DataError):  # it takes other roles
            text = self._render(user, add_generation_prompt=True).text
            return with_start(self.jinja, text, self.prompt(user).tolist(), self.tokenizer)
        return self.jinja

    def _check(self) -> None:
        """Render a conversation, to find faults of template and tokenizer before any row is read.

        Raises:
            TokenizerError: the template cannot be rendered, or the tokenizer finds other control
                tokens in its text than the template writes.
        """
        turns = (("user", "Hi there"), ("assistant", "Good day."))
        try:
            text = self._rendered([{"role": role, "content": text} for role, text in turns]).text
        except Refused:
            return  # it may take other roles
        except Broken as error:
            raise TokenizerError(f"{self._where}: cannot be rendered: {error}") from error
        written = [self.controls[token] for token in re.findall(any_of(self.controls), text)]
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        unknown = {self.tokenizer.unk_token_id}.difference(written)  # of the template's own text
        read = [t for t in tokens if t in self.controls.values() and t not in unknown]
        if read != written:
            raise TokenizerError(
                f"tokenizer: reads the control tokens {read} where {self._where} writes {written}; "
                "add them without single_word and normalized"
            )

    def _render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> Rendered:
        try:
            return self._rendered(messages, add_generation_prompt)
        except Ended as error:
            raise TokenizerError(f"{self._where}: cannot be rendered: {error}") from error
        except Refused as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the template refuses the roles {roles}: {error}") from error
        except Broken as error:
            raise DataError(f"the template cannot be rendered: {error}") from error

    def _layout_uncached(self, roles: tuple[str, ...]) -> Layout:
        """Layout of a conversation with these roles."""
        for role in roles:
            if not ROLE.fullmatch(role):
                raise DataError(f"a role must be a word, such as user, found {role[:40]!r}")
        messages = [{"role": role, "content": placeholder(i)} for i, role in enumerate(roles)]
        rendered = self._render(messages)
        opening = self._opening(rendered.text, messages)
        return layout_of(rendered, roles, self.controls, self.end, opening)

    def _opening(self, text: str, messages: Sequence[Mapping[str, str]]) -> str:
        """Text between the generation prompt and the content of the last answer, which the model
        has to write."""
        *before, last = messages
        if not before or last["role"] != "assistant":
            return ""
        try:
            prompt, without = (self._render(before, asked).text for asked in (True, False))
        except DataError:  # it refuses to end here
            return ""
        start = text.find(last["content"].strip())
        if prompt == without or not text.startswith(prompt):
            return ""
        return text[len(prompt) : start].rstrip(LEFT)

    def encode(
        self, conversations: Iterable[Sequence[Mapping[str, str]]]
    ) -> list[list[tuple[np.ndarray, bool]]]:
        """Encode each conversation as a list of spans (tokens, learned).

        The assistant's answers, each with the control token that ends it, are learned spans. The
        tokens of a prompt are always a prefix of those of prompt and answer: no token spans both.

        Raises:
            DataError: a conversation that `accepts` refuses.
            TokenizerError: the tokenizer fails.
        """
        return self._encode_plans(
            self._plan(self._layout(_roles(messages)).parts, messages) for messages in conversations
        )

    def _encode_plans(self, plans: Iterable[Plan]) -> list[list[tuple[np.ndarray, bool]]]:
        plans = list(plans)
        texts = {item for plan in plans for item, _ in plan if isinstance(item, Text)}
        ids_of = self._texts.encode(texts)
        encoded = []
        for plan in plans:
            spans: list[tuple[list[int], bool]] = []
            for item, learned in plan:
                if not spans or spans[-1][1] != learned:
                    spans.append(([], learned))
                spans[-1][0].extend(ids_of[item] if isinstance(item, Text) else [item])
            encoded.append([(np.array(ids, np.int32), learned) for ids, learned in spans])
        return encoded

    def _plan(self, parts: Sequence[Part], messages: Sequence[Mapping[str, str]]) -> Plan:
        """Fill in the parts of a layout: control token ids and texts, each learned or not."""
        items: list[tuple[int | str, bool]] = []

        def put(item: int | str, learned: bool) -> None:
            if items and isinstance(item, str) and isinstance(items[-1][0], str):
                if items[-1][1] == learned:
                    items[-1] = (items[-1][0] + item, learned)
                    return
            items.append((item, learned))

        if self.first and not (parts and parts[0].item in self._starts):
            items += [(Start(token), False) for token in self.first]
        for item, learned in parts:
            if not isinstance(item, Content):
                put(item, learned)
                continue
            text, end = item.of(messages[item.message]["content"]), 0
            for match in self._allowed.finditer(text):
                put(text[end : match.start()], learned)
                put(self.controls[match[0]], learned)
                end = match.end()
            put(text[end:], learned)
        plan: Plan = []
        for item, learned in stripped(items, self._lstrips, self._rstrips):
            if isinstance(item, str):
                before = plan[-1][0] if plan else Start()
                anchored = self._texts.anchored[int if isinstance(before, int) else Text]
                item = Text(item, anchored and not isinstance(before, Start))
            plan.append((item, learned))
        return plan

    def accepts(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Check that the template writes every turn once, as it is.

        Raises:
            DataError: it refuses these roles, drops or repeats a turn, or changes a content.
        """
        layout = self._layout(_roles(messages))
        if self._reads_contents and self._render(messages).text != layout.filled(messages):
            raise DataError("the template changes the content of a turn")

    def fingerprint(self) -> str:
        """Hash of everything that determines the tokens of a text."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        rest = (self.jinja, self.controls, self.first, self.end, self._allowed_names)
        digest.update(repr(rest).encode())
        return digest.hexdigest()

    def own(self) -> str:
        """Compare the text of this template for a question and its answer with that of the
        tokenizer's own, apart from blanks and the start token: `same`, `other`, or `none` if the
        tokenizer has none that can be rendered."""
        if not self._own or self._own == self.jinja.strip():
            return "same" if self._own else "none"
        tokens = self.tokenizer.special_tokens_map
        ours = self._own in (template.strip() for template in TEMPLATES.values())
        rendered = partial(render, self._own, tokens) if ours else Child(self._own, tokens).render
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        try:
            texts = [write(turns).text for write in (rendered, self._rendered)]
        except (Broken, Refused):
            return "none"
        start = tokens.get("bos_token") or ""
        one, other = ("".join(text.strip().removeprefix(start).split()) for text in texts)
        return "same" if one == other else "other"

    def doubts(self, scorer: bool) -> Iterator[str]:
        """Warnings: the template may write the date, or answers are learned after another text than
        its generation prompt, which other programs use."""
        if "strftime_now" in self.jinja:
            yield DATED
        try:
            parts = self._layout(("user", "assistant")).prompt
            user = {"role": "user", "content": placeholder(0)}
            asked = self._render([user], add_generation_prompt=True).text
        except DataError:
            return
        names = {index: token for token, index in self.controls.items()}
        items = (names.get(item, item) if isinstance(item, int) else item for item, _ in parts)
        learned = "".join("\0" if isinstance(item, Content) else item for item in items).rstrip()
        asked = re.sub(PLACE, "\0", asked).rstrip()
        if learned != asked and not scorer:
            before, after = (repr(text.rpartition("\0")[2])[:60] for text in (learned, asked))
            yield (
                f"data.template: answers are learned after {before}, but the generation prompt "
                f"is {after}, which other programs use; make them the same"
            )

    @property
    def end_ids(self) -> list[int]:
        """Control tokens that end an answer: the template's, and the tokenizer's own."""
        end = self._layout(("user", "assistant")).parts[-1].item
        return list(dict.fromkeys([end, self.end]))

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """Tokens of the prompt that ends with `messages`, as in training.

        Raises:
            DataError: see `accepts`.
        """
        answered = [*messages, {"role": "assistant", "content": "x"}]
        self.accepts(answered)
        parts = self._layout(_roles(answered)).prompt
        spans = self._encode_plans([self._plan(parts, messages)])[0]
        return np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in spans)])

    def judged(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts with the tokenizer's own start and end tokens, for models that score."""
        alone = self._texts.encode([Text("a", False)])[Text("a", False)]
        framed = self.tokenizer("a").input_ids
        start = next(i for i in range(len(framed)) if framed[i : i + len(alone)] == alone)
        before, after = framed[:start], framed[start + len(alone) :]
        encoded = self._texts.encode({Text(text, False) for text in texts})
        return [np.array(before + encoded[Text(t, False)] + after, np.int32) for t in texts]

    def bare(self, text: str) -> str:
        """The text without the start and end tokens at its edges that `whole` puts there."""
        for token in self.tokenizer.convert_ids_to_tokens(self.first):
            text = text.removeprefix(token)
        return text.removesuffix(self.tokenizer.convert_ids_to_tokens(self.end))

    def whole(self, texts: Iterable[str]) -> list[list[tuple[np.ndarray, bool]]]:
        """Encode texts as learned spans, without a template: the start token that the tokenizer
        adds, the text and the end token."""
        parts = [Part(Content(0, False, False), True), Part(self.end, True)]
        return self._encode_plans(self._plan(parts, [{"content": text}]) for text in texts)

    def types_control(self, text: str) -> bool:
        """Whether a text spells a control token that is encoded as plain text."""
        return self._typed.search(text) is not None

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds; a character of several tokens belongs to the last one."""
        texts, start, before, first = [], 0, "", 0
        for i in range(len(tokens)):
            text = self.tokenizer.decode(list(tokens[start : i + 1]))
            if text.endswith("\ufffd") and i + 1 < len(tokens):
                texts.append("")
                continue
            texts.append(text[len(before) :])
            before = text
            if i - start >= 16:  # restart at a whole character: a window is enough context
                start, before = first, self.tokenizer.decode(list(tokens[first : i + 1]))
            first = i + 1
        return texts

    def text(self, tokens: Sequence[int]) -> str:
        """Decode tokens to text, without control tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def _roles(messages: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)
