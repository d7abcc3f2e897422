"""Tokenizers as people have them: ids with holes, or without tokenizer.json."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.mistral import tokenizer as mistral
from transformers.models.auto import tokenization_auto

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


CHAT = "{% for m in messages %}<s>{{ m.role }}\n\n{{ m.content }}</s>\n{% endfor %}"


def spaced():
    """A tokenizer that marks spaces, begins a text with one, and has a token for two line feeds."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    controls = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(special_tokens=controls, show_progress=False)
    trained.train_from_iterator(["user\n\nHi.\n\nassistant Yes"] * 4, trainer)
    unknown, start, end = controls
    tokens = {"bos_token": start, "eos_token": end, "unk_token": unknown}
    return PreTrainedTokenizerFast(tokenizer_object=trained, chat_template=CHAT, **tokens)


def ids_of(tokenizer, answer, jinja=CHAT):
    """Ours, and those of apply_chat_template, up to the answer's end."""
    tokenizer.chat_template = jinja
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}]
    spans = Template(tokenizer, "chat", "llama").encode([turns])[0]
    ours = [int(token) for tokens, _ in spans for token in tokens]
    theirs = tokenizer.apply_chat_template(turns, return_dict=False)
    return ours, theirs[: len(ours)]


def test_line_feeds_that_merge_with_those_after_them_are_encoded_as_elsewhere():
    tokenizer = spaced()
    assert "\n\n" in tokenizer.get_vocab()
    for answer in ("Yes", "Yes\n\nHi."):
        ours, theirs = ids_of(tokenizer, answer)
        assert ours == theirs
    ours, theirs = ids_of(tokenizer, "\n\nYes", CHAT.replace("\n\n{{", "<s>{{"))
    assert ours == theirs


def test_a_template_may_write_characters_that_the_tokenizer_does_not_know():
    tokenizer = spaced()
    ours, theirs = ids_of(tokenizer, "Yes", CHAT.replace("{{ m.role }}", "[{{ m.role }}]"))
    assert ours == theirs and ours.count(tokenizer.unk_token_id) == 4


def test_a_tokenizer_that_strips_texts_or_draws_tokens_is_refused():
    """Each part of a conversation would lose its blanks; a run would not be repeatable."""
    strips = tiny.tokenizer()
    strips.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Strip()])
    with pytest.raises(TokenizerError, match="strips the blanks around a text"):
        Template(strips, "plain", "gpt2")
    draws = tiny.tokenizer()
    draws.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(TokenizerError, match="chooses tokens at random"):
        Template(draws, "plain", "gpt2")


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


def test_tokenizer_json_is_read_beside_a_file_of_mistral_common(tmp_path, monkeypatch):
    """With that package, transformers 5 would read tekken.json, which is no fast tokenizer."""
    tiny.save_config(tmp_path, tiny.CASES["mistral"])
    (tmp_path / "tekken.json").write_text("{}")
    monkeypatch.setitem(
        tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend"
    )
    monkeypatch.setattr(mistral, "is_mistral_common_available", lambda: True)
    tokenizer = Pretrained(str(tmp_path), tmp_path).tokenizer()
    assert tokenizer("what?").input_ids == tiny.tokenizer()("what?").input_ids
