"""Plain text to tokens, in parts: nothing in a text becomes a control token."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from easyaira.errors import TokenizerError
from easyaira.files import reason

ANCHORS = ("\n", "a")  # the second where a text begins with line feeds that merge with the first


class Text(NamedTuple):
    """Text to encode separately, and whether it needs an anchor (see PlainText.anchored)."""

    text: str
    anchored: bool


class PlainText:
    """Encoder of the texts between control tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        markers: control tokens that the tokenizer does not call special.
        end: id of a control token.

    Attributes:
        anchored: whether text after a control token (int) and after text (Text) needs an anchor.
            SentencePiece-like tokenizers prepend a space to a text, which is wrong in the middle of
            a sequence. Such text is encoded after an anchor, whose tokens are then removed.

    Raises:
        TokenizerError: the tokenizer cannot encode in parts.
    """

    def __init__(self, tokenizer: Any, markers: Sequence[str], end: int):
        self._tokenizer = tokenizer
        if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
            raise TokenizerError(
                "tokenizer: chooses tokens at random; set dropout to null in its tokenizer.json"
            )
        if markers:  # only special tokens can be split
            self._tokenizer = copy.deepcopy(tokenizer)
            self._tokenizer.add_special_tokens({"additional_special_tokens": list(markers)})
        token = tokenizer.added_tokens_decoder.get(end)
        probes = ["b", "Hi"] if token is not None and token.rstrip else ["b", " b", "Hi"]
        alone = self._alone(probes)
        anchored = self._behind_anchor(probes)
        control = tokenizer.convert_ids_to_tokens(end)
        joint = tokenizer([control + p for p in probes], add_special_tokens=False).input_ids
        joint = [ids[1:] for ids in joint]
        if end in self._alone([control])[0]:
            raise TokenizerError(
                "tokenizer: encodes plain text as control tokens; save and reload it"
            )
        bare, *ended, two = self._alone(["b", "b\n", "\nb", "b\nb"])
        if bare in ended and two != bare + bare:
            raise TokenizerError(
                "tokenizer: strips the blanks around a text, which templates need; remove Strip "
                "from the normalizer in its tokenizer.json"
            )
        if joint not in (alone, anchored):
            raise TokenizerError(
                "tokenizer: encodes text after a control token in an unknown way; name another "
                "one in model.tokenizer"
            )
        self.anchored = {Text: alone != anchored, int: joint != alone}

    def encode(self, texts: Iterable[Text]) -> dict[Text, list[int]]:
        """Map each text to its tokens.

        Raises:
            TokenizerError: the tokenizer fails.
        """
        texts = list(texts)
        alone = [text for text in texts if not text.anchored]
        anchored = [text for text in texts if text.anchored]
        return dict(zip(alone, self._alone([t.text for t in alone]), strict=True)) | dict(
            zip(anchored, self._behind_anchor([t.text for t in anchored]), strict=True)
        )

    def _alone(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        try:
            return self._tokenizer(
                list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
            ).input_ids
        except BaseException as error:
            # the library raises plain Exceptions, and panics, which are BaseExceptions
            if type(error) is Exception or type(error).__name__ == "PanicException":
                raise TokenizerError(f"tokenizer: fails on a text: {reason(error)}") from error
            raise

    def _behind_anchor(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = [[]] * len(texts)
        left = list(range(len(texts)))
        for anchor in ANCHORS:
            ids, *behind = self._alone([anchor, *(anchor + texts[i] for i in left)])
            merged = []
            for i, tokens in zip(left, behind, strict=True):
                if tokens[: len(ids)] == ids:
                    encoded[i] = tokens[len(ids) :]
                else:
                    merged.append(i)
            left = merged
        if left:
            raise TokenizerError(
                "tokenizer: a line feed does not stay a token of its own; name another one in "
                "model.tokenizer"
            )
        return encoded
