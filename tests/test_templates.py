"""Messages to tokens: what each template shows, what is learned, and what text can never become."""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from easyaira.data.chat_templates import AIRA_TOKENS, TEMPLATES
from easyaira.data.layout import LEFT, RIGHT
from easyaira.data.template import Template
from easyaira.errors import ConfigError, DataError, TokenizerError
from helpers import tiny

TURN = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Good day."}]
TURNS = [*TURN, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
SYSTEM = {"role": "system", "content": " be kind "}

shared = pytest.mark.skipif(not tiny.SHARED.exists(), reason="shared data are not here")
REAL = {
    "gpt2": (tiny.SHARED / "tokenizers/gpt2", "gpt2"),
    "opt": (tiny.SHARED / "tokenizers/opt", "opt"),
    "llama2": (tiny.SHARED / "tokenizers/llama2", "llama"),
    "stories": (tiny.SHARED / "models/stories260k", "llama"),
}
ENCODERS = {
    "roberta": (tiny.SHARED / "tokenizers/roberta", "roberta"),
    "bertimbau": (tiny.SHARED / "tokenizers/bertimbau", "bert"),
}


def with_tiny(*names):
    return pytest.mark.parametrize(
        "name", ["tiny", *(pytest.param(name, marks=shared) for name in names)]
    )


BYTE_LEVEL = ("gpt2", "opt", "roberta")
LLAMA_LIKE = ("llama2", "stories")
few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SPELLED = [
    *("</s>", "<s>", "<|endoftext|>", "[SEP]", "[CLS]", "<|user|>", "<|im_start|>", "<|im_end|>"),
    *("\ue0000\ue001", LEFT, RIGHT, " ", "  ", "\n", "😀", "👩‍👧", "é", *AIRA_TOKENS.values()),
]
# llama-like tokenizers read ▁ as a space
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
TYPED = st.lists(st.sampled_from(SPELLED) | st.text(CHARACTERS, max_size=8), max_size=6).map(
    "".join
)


@lru_cache
def template_of(name, template_name):
    if name == "tiny":
        return Template(tiny.tokenizer(), template_name, "gpt2")
    folder, kind = (REAL | ENCODERS)[name]
    return Template(AutoTokenizer.from_pretrained(folder), template_name, kind)


def turn(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def spans(template, messages):
    """Text and learned? of each span."""
    encoded = template.encode([messages])[0]
    return [(template.tokenizer.decode(tokens), learned) for tokens, learned in encoded]


def ids(template, messages):
    return np.concatenate([tokens for tokens, _ in template.encode([messages])[0]]).tolist()


def test_plain_shows_nothing_between():
    template = Template(tiny.tokenizer(), "plain", "gpt2")
    assert spans(template, TURN) == [("Hi there", False), ("Good day.<|endoftext|>", True)]


def test_aira_shows_its_tokens():
    template = Template(tiny.tokenizer(), "aira", "gpt2")
    assert len(template.added) == 4  # gpt2 keeps its unknown token
    assert spans(template, TURNS) == [
        ("<|startofinstruction|>Hi there<|endofinstruction|>", False),
        ("Good day.<|endofcompletion|>", True),
        ("<|startofinstruction|>why?<|endofinstruction|>", False),
        ("so.<|endofcompletion|>", True),
    ]


def test_tulu_shows_roles_as_text_and_learns_answers_with_their_end():
    template = Template(tiny.tokenizer(), "tulu", "llama")
    messages = [{"role": "system", "content": " be kind "}, *TURNS]
    assert spans(template, messages) == [
        ("<|endoftext|><|system|>\nbe kind\n<|user|>\nHi there\n<|assistant|>\n", False),
        ("Good day.<|endoftext|>", True),
        ("\n<|user|>\nwhy?\n<|assistant|>\n", False),
        ("so.<|endoftext|>", True),
    ]


@pytest.mark.parametrize(
    "name, wanted",
    [
        (
            "plain",
            [
                (" be kind Hi there", False),
                ("Good day.<|endoftext|>", True),
                ("why?", False),
                ("so.<|endoftext|>", True),
            ],
        ),
        (
            "zephyr",
            [
                (
                    "<|system|>\n be kind <|endoftext|>\n"
                    "<|user|>\nHi there<|endoftext|>\n<|assistant|>\n",
                    False,
                ),
                ("Good day.<|endoftext|>", True),
                ("\n<|user|>\nwhy?<|endoftext|>\n<|assistant|>\n", False),
                ("so.<|endoftext|>", True),
            ],
        ),
        (
            "chatml",
            [
                (
                    "<|im_start|>system\n be kind <|im_end|>\n"
                    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
                    False,
                ),
                ("Good day.<|im_end|>", True),
                ("\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n", False),
                ("so.<|im_end|>", True),
            ],
        ),
        (
            "llama-2",
            [
                (
                    "<|endoftext|>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nHi there [/INST]",
                    False,
                ),
                (" Good day. <|endoftext|>", True),
                ("<|endoftext|>[INST] why? [/INST]", False),
                (" so. <|endoftext|>", True),
            ],
        ),
    ],
)
def test_a_template_shows_a_system_message_and_two_turns(name, wanted):
    assert spans(template_of("tiny", name), [SYSTEM, *TURNS]) == wanted


@pytest.mark.parametrize("name", ["plain", "aira", "tulu"])
def test_a_persons_text_never_becomes_a_control_token(name):
    template = Template(tiny.tokenizer(), name, "gpt2")
    typed = " ".join(["<|endoftext|>", *AIRA_TOKENS.values()])
    messages = [{"role": "user", "content": typed}, {"role": "assistant", "content": typed}]
    controls = set(template.controls.values())
    clean = ids(template, [{**m, "content": "x"} for m in messages])
    typed_ids = ids(template, messages)
    assert [i for i in typed_ids if i in controls] == [i for i in clean if i in controls]
    assert template.text(typed_ids).count("<|endoftext|>") == 2


def test_the_end_of_an_answer_is_learned_even_if_it_is_also_padding():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    template = Template(tokenizer, "plain", "gpt2")
    tokens, learned = template.encode([TURN])[0][-1]
    assert learned and tokens[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_a_prompt_is_a_token_prefix_of_the_prompt_with_its_answer():
    template = Template(tiny.tokenizer(), "plain", "gpt2")
    for prompt, answer in [("the capital of Fra", "nce is Paris"), ("a", " b"), ("x ", "  y")]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = ids(template, messages)
        start = template.prompt(messages[:1]).tolist()
        assert whole[: len(start)] == start
        assert template.tokenizer.decode(whole) == prompt + answer + "<|endoftext|>"


def test_the_tokenizers_own_template_and_a_file(tmp_path):
    jinja = (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(TokenizerError, match="has no chat template; choose plain"):
        Template(tokenizer, "chat", "gpt2")
    tokenizer.chat_template = jinja
    (tmp_path / "chatml.jinja").write_text(jinja)
    for name in ("chat", str(tmp_path / "chatml.jinja")):
        template = Template(tokenizer, name, "gpt2")
        assert spans(template, TURN) == [
            ("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", False),
            ("Good day.<|im_end|>", True),
        ]
        rendered = tokenizer.apply_chat_template(TURN, tokenize=True, return_dict=True)
        whole = ids(template, TURN)
        assert rendered["input_ids"][: len(whole)] == whole
        prompt = tokenizer.apply_chat_template(
            TURN[:1], add_generation_prompt=True, return_dict=True
        )
        assert prompt["input_ids"] == template.prompt(TURN[:1]).tolist()


def test_what_a_template_cannot_show_is_refused(tmp_path):
    drops = tmp_path / "drops.jinja"
    drops.write_text(
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    )
    template = Template(tiny.tokenizer(), str(drops), "gpt2")
    template.accepts(TURN)
    with pytest.raises(DataError, match="drops or repeats a turn: system"):
        template.accepts([{"role": "system", "content": "x"}, *TURN])
    raises = tmp_path / "raises.jinja"
    raises.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        Template(tiny.tokenizer(), str(raises), "gpt2").accepts(TURN)
    with pytest.raises(ConfigError, match="no template 'nothing'"):
        Template(tiny.tokenizer(), "nothing", "gpt2")
    with pytest.raises(ConfigError, match="no template 'llama2'.*; did you mean llama-2"):
        Template(tiny.tokenizer(), "llama2", "gpt2")
    with pytest.raises(ConfigError, match=r"data.template: my.jinja: no such file"):
        Template(tiny.tokenizer(), "my.jinja", "gpt2")


@shared
@pytest.mark.parametrize(
    "name, wanted",
    [
        ("gpt2", [50257, 50258, 50256, 50259, 50260, 50261]),
        ("opt", [50265, 50266, 50267, 50268, 50269, 50270]),
        ("llama2", [32000, 32001, 32002, 32003, 32004, 32005]),
    ],
)
def test_aira_ids_are_those_of_the_released_models(name, wanted):
    folder, kind = REAL[name]
    t = Template(AutoTokenizer.from_pretrained(folder), "aira", kind).tokenizer
    got = [t.bos_token_id, t.eos_token_id, t.unk_token_id, t.sep_token_id, t.pad_token_id, len(t)]
    assert got == wanted


@shared
@pytest.mark.parametrize("template_name", ["plain", "aira", "tulu"])
@pytest.mark.parametrize("name", REAL)
def test_exactly_one_start_token_where_the_tokenizer_has_one(name, template_name):
    folder, kind = REAL[name]
    template = Template(AutoTokenizer.from_pretrained(folder), template_name, kind)
    whole = ids(template, TURN)
    starts = {template.tokenizer.bos_token_id, *template.first}
    ends = set(template.end_ids)
    if template_name == "plain" and not template.first:
        assert not starts - ends & set(whole[:-1])
    else:
        assert whole[0] in starts
        assert not starts & set(whole[1:-1])
    assert whole[-1] in ends


@shared
@pytest.mark.parametrize("template_name", ["tulu", "zephyr", "chatml", "llama-2"])
@pytest.mark.parametrize("name", REAL)
def test_ids_equal_apply_chat_template(name, template_name):
    template = template_of(name, template_name)
    tokenizer = template.tokenizer

    def theirs(messages, **kwargs):
        return tokenizer.apply_chat_template(
            messages, chat_template=template.jinja, return_dict=True, **kwargs
        )["input_ids"]

    start = [] if "bos_token" in template.jinja else template.first
    for messages in (TURN, TURNS, [SYSTEM, *TURNS]):
        whole = theirs(messages)
        end = max(i for i, token in enumerate(whole) if token in template.end_ids) + 1
        assert ids(template, messages) == start + whole[:end]
        assert tokenizer.decode(whole[end:]) == ("\n" if template_name == "chatml" else "")
        prompt = theirs(messages[:-1], add_generation_prompt=True)
        assert template.prompt(messages[:-1]).tolist() == start + prompt


@shared
@pytest.mark.parametrize("template_name", TEMPLATES)
@pytest.mark.parametrize("name", REAL)
def test_the_released_template_gives_others_the_prompts_of_training(name, template_name):
    """apply_chat_template adds no start token: models of Llama and OPT were asked without it."""
    folder, kind = REAL[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template(tokenizer, template_name, kind)
    tokenizer.chat_template = template.released()
    for messages in (TURN[:-1], TURNS[:-1]):
        theirs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert template.prompt(messages).tolist() == theirs
    later = Template(tokenizer, "chat", kind)  # of a run that starts from the release
    assert later.jinja == template.jinja and later.released() == tokenizer.chat_template


@shared
@pytest.mark.parametrize("name", REAL)
def test_plain_prompts_equal_the_tokenizers_own_call(name):
    folder, kind = REAL[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template(tokenizer, "plain", kind)
    for text in ("Once upon a time", " leading space", "two\n\nlines"):
        messages = [{"role": "user", "content": text}]
        assert template.prompt(messages).tolist() == tokenizer(text).input_ids


@pytest.mark.parametrize("template_name", TEMPLATES)
@with_tiny(*REAL, "roberta")
@few
@given(asked=TYPED, before=TYPED, prompt=TYPED, answer=TYPED)
@pytest.mark.slow
def test_a_prompt_is_a_prefix_whatever_is_typed(name, template_name, asked, before, prompt, answer):
    template = template_of(name, template_name)
    messages = [*turn(asked, before), *turn(prompt, answer)]
    whole, start = ids(template, messages), template.prompt(messages[:-1]).tolist()
    assert whole[: len(start)] == start


@pytest.mark.parametrize("template_name", TEMPLATES)
@with_tiny(*REAL, "roberta")
@few
@given(prompt=TYPED, answer=TYPED)
@pytest.mark.slow
def test_no_control_token_stems_from_what_is_typed(name, template_name, prompt, answer):
    template = template_of(name, template_name)
    actual, wanted = (
        [i for i in ids(template, messages) if i in template.controls.values()]
        for messages in (turn(prompt, answer), TURN)
    )
    assert actual == wanted
    if template_name == "plain":
        assert actual == [*template.first, template.end]


@pytest.mark.parametrize("template_name", ["plain", "zephyr", "chatml"])
@with_tiny(*REAL, "roberta")
@few
@given(prompt=TYPED, answer=TYPED)
def test_what_is_learned_is_the_answer_and_its_end(name, template_name, prompt, answer):
    template = template_of(name, template_name)
    tokenizer = template.tokenizer
    # llama-like tokenizers put a space in front of a text; inside a sequence there is none
    anchor = "\n" if name in LLAMA_LIKE else ""
    start, whole = tokenizer(
        [anchor, anchor + answer], add_special_tokens=False, split_special_tokens=True
    ).input_ids
    encoded = template.encode([turn(prompt, answer)])[0]
    learned = [token for tokens, learned in encoded if learned for token in tokens.tolist()]
    assert learned == [*whole[len(start) :], template.end]
    assert tokenizer.decode(start + learned) == anchor + answer + tokenizer.eos_token


@with_tiny(*REAL, "roberta")
@few
@given(prompt=TYPED)
@example(prompt=" two  spaces")
def test_a_plain_prompt_decodes_to_itself(name, prompt):
    template = template_of(name, "plain")
    tokens = template.prompt(turn(prompt, "")[:1])[len(template.first) :]
    # llama2 puts its space in front of a text only if there is none
    wanted = prompt.removeprefix(" ") if name == "llama2" else prompt
    assert template.tokenizer.decode(tokens) == wanted


@shared
@few
@given(prompt=TYPED, answer=TYPED)
def test_an_encoder_frames_a_prompt_and_its_answer(prompt, answer):
    template = template_of("bertimbau", "plain")
    tokenizer = template.tokenizer
    whole, start = ids(template, turn(prompt, answer)), template.prompt(turn(prompt, "")[:1])
    assert whole[: len(start)] == start.tolist()
    texts = tokenizer(
        [prompt, answer], add_special_tokens=False, split_special_tokens=True
    ).input_ids
    assert whole == [tokenizer.cls_token_id, *texts[0], *texts[1], tokenizer.sep_token_id]
    controls = set(template.controls.values()) - {tokenizer.unk_token_id}
    assert [i for i in whole if i in controls] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


@with_tiny(*REAL)
def test_an_allowed_control_token_becomes_its_id_and_others_stay_text(name):
    folder, kind = REAL.get(name, (None, "gpt2"))
    tokenizer = AutoTokenizer.from_pretrained(folder) if folder else tiny.tokenizer()
    allowed, other = "<|endofinstruction|>", "<|startofinstruction|>"
    template = Template(tokenizer, "aira", kind, allowed=[allowed])
    messages = turn(f"a{allowed}b{other}c", f"d{allowed}{other}")
    of = template.controls
    controls = [i for i in ids(template, messages) if i in of.values()]
    assert controls == [of[other], of[allowed], of[allowed], of[allowed], template.end]
    assert template.text(ids(template, messages)).count(other) == 2
    assert template.types_control(f"a {other}")
    assert not template.types_control(f"a {allowed} <|user|>")
    assert Template(tokenizer, "aira", kind).types_control(allowed)


def test_only_a_control_token_can_be_allowed():
    with pytest.raises(ConfigError, match=r"'<\|user\|>' is not a control token.*<\|endoftext\|>"):
        Template(tiny.tokenizer(), "plain", "gpt2", allowed=["<|user|>"])


@lru_cache
def template_with_words(name):
    folder, kind = (REAL | ENCODERS).get(name, (None, "gpt2"))
    tokenizer = AutoTokenizer.from_pretrained(folder) if folder else tiny.tokenizer()
    tokenizer.add_tokens(["<|marker|>", "Aira"])
    return Template(tokenizer, "plain", kind)


@with_tiny(*REAL, *ENCODERS)
@few
@given(typed=TYPED)
def test_an_added_token_that_looks_like_a_marker_is_never_typed(name, typed):
    template = template_with_words(name)
    marker, word = template.tokenizer.convert_tokens_to_ids(["<|marker|>", "Aira"])
    text = f"<|marker|>{typed}<<|marker|>> Aira <|marker|><|marker|>"
    whole = ids(template, turn(text, text))
    assert whole.count(marker) == 0
    assert whole.count(word) == 2
    assert template.types_control("a<|marker|>") and not template.types_control("Aira")


@shared
@pytest.mark.parametrize(
    "typed, lower", [("<|mar\0ker|>", False), ("<|MARKER|>", True)], ids=["nul", "case"]
)
def test_a_text_that_normalises_to_a_marker_is_never_one(typed, lower):
    folder, kind = ENCODERS["bertimbau"]
    tokenizer = AutoTokenizer.from_pretrained(folder, do_lower_case=lower)
    tokenizer.add_tokens(["<|marker|>"])
    template = Template(tokenizer, "plain", kind)
    assert template.controls["<|marker|>"] not in ids(template, turn(typed, typed))


def test_the_longest_allowed_token_wins():
    tokenizer = tiny.tokenizer()
    tokens = ["<|a", "<|a|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    template = Template(tokenizer, "plain", "gpt2", allowed=tokens)
    assert template.controls["<|a|>"] in ids(template, turn("<|a|>", "b"))


@with_tiny(*REAL, *ENCODERS)
@few
@given(text=TYPED)
def test_a_text_to_be_judged_is_framed_as_by_its_tokenizer(name, text):
    template = template_of(name, "plain")
    tokenizer = template.tokenizer
    framed = [tokens.tolist() for tokens in template.judged(["Hi there", text])]
    assert framed[0] == tokenizer("Hi there").input_ids
    assert framed[1] == tokenizer(text, split_special_tokens=True).input_ids


@pytest.mark.parametrize("name", [pytest.param(name, marks=shared) for name in ENCODERS])
@few
@given(prompt=TYPED, answer=TYPED)
@example(prompt="What? ", answer=" Said he.\n")
def test_an_encoder_takes_a_prompt_with_its_answer_as_one_string(name, prompt, answer):
    """As Aira's reward models were trained: tokenizer(instruction + sep_token + response)."""
    template = template_of(name, "encoder")
    actual = ids(template, turn(prompt, answer))
    tokenizer = template.tokenizer
    separator = tokenizer.sep_token_id
    assert actual.count(separator) == 2 and actual[0] == tokenizer.cls_token_id
    if not template.types_control(prompt + answer):
        assert actual == tokenizer(prompt + tokenizer.sep_token + answer).input_ids


@with_tiny(*BYTE_LEVEL)
@few
@given(prompt=TYPED, answer=TYPED)
@example(prompt="👩‍👧" * 20, answer="é😀" * 20)
def test_pieces_join_to_the_text(name, prompt, answer):
    template = template_of(name, "aira")
    tokens = ids(template, turn(prompt, answer))
    pieces = template.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == template.tokenizer.decode(tokens)


def test_pieces_of_bytes_are_whole_characters():
    """Llama's tokens of single bytes: text that begins inside a character cannot be decoded."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: i for i, name in enumerate(names)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    bytewise.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    template = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=bytewise))
    for start in range(17):
        text = "x" * start + "preocupação definição 日本語" * 3
        tokens = [1 + byte for byte in text.encode()]
        assert "".join(Template.pieces(template, tokens)) == text


@pytest.mark.parametrize("text", ["a\ufffd", "\ufffd" * 40, "cut 😀"], ids=["one", "many", "cut"])
def test_pieces_show_replacement_characters_at_the_end(text):
    template = template_of("tiny", "plain")
    tokens = template.tokenizer(text).input_ids
    tokens = tokens[:-1] if text.startswith("cut") else tokens
    assert "".join(template.pieces(tokens)) == template.tokenizer.decode(tokens)


@pytest.mark.parametrize("name", ["plain", "tulu", "zephyr", "llama-2"])
def test_a_template_can_be_given_as_jinja(name):
    given_as_jinja = Template(tiny.tokenizer(), TEMPLATES[name], "gpt2")
    assert ids(given_as_jinja, TURNS) == ids(template_of("tiny", name), TURNS)
