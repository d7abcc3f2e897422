"""Tokenizers as people have them: ids with holes, or without tokenizer.json."""

import json

import pytest
from transformers import AutoTokenizer

from easyaira.data.template import Template
from easyaira.errors import TokenizerError
from easyaira.storage.pretrained import Pretrained
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.runs import configure


def with_holes(folder, moved):
    """A model whose tokenizer has other ids for its last tokens."""
    tiny.save(folder, tiny.CONFIGS["gpt2"])
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: moved(index) for token, index in vocab.items()}
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def holes(tmp_path):
    size = len(tiny.tokenizer())
    return with_holes(tmp_path / "model", lambda i: i + 20 if i >= size - 5 else i), size


@pytest.mark.parametrize(
    "flags", [["--model.resize=mean"], ["--data.template=chatml"], ["--data.template=aira"]]
)
def test_a_vocabulary_with_holes_gets_a_row_for_each_id(holes, flags, tmp_path):
    folder, size = holes
    rows = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    setup = prepare(*configure("sft", folder, rows, tmp_path / "run", *flags))
    largest = max(setup.tokenizer.get_vocab().values())
    assert largest >= size + 19
    assert setup.model.vocab_size == largest + 1
    assert setup.data.train.tokens.max() <= largest


def test_an_id_beyond_the_embedding_is_refused_with_advice_that_helps(holes, tmp_path):
    folder, size = holes
    rows = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    rare = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(size + 19)
    tiny.write_rows(rows, [{"prompt": "a", "completion": rare.replace("\u0120", " ")}])
    with pytest.raises(TokenizerError, match="gives id 319 .* 300 rows; .* or set model.resize"):
        prepare(*configure("sft", folder, rows, tmp_path / "run"))
    prepare(*configure("sft", folder, rows, tmp_path / "run", "--model.resize=mean"))


def test_two_tokens_with_one_id_are_refused(tmp_path):
    """The library numbers new tokens by the size of the vocabulary, where an id may be taken."""
    size = len(tiny.tokenizer())
    folder = with_holes(tmp_path / "model", lambda i: i + 1 if i == size - 1 else i)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(TokenizerError, match="two tokens have the same id"):
        Template(tokenizer, "chatml", "gpt2")


def test_tokenizer_model_alone_needs_sentencepiece(tmp_path):
    tiny.save_config(tmp_path, tiny.CONFIGS["llama"])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(TokenizerError, match="needs sentencepiece: pip install sentencepiece, or"):
        Pretrained(str(tmp_path), tmp_path).tokenizer()
