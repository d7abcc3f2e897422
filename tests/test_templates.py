"""Messages to tokens: what each template shows, what is learned, and what text can never become."""

import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer

from easyaira.data.templates import AIRA_TOKENS, Template
from easyaira.errors import ConfigError, DataError, TokenizerError

TURN = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Good day."}]
TURNS = [*TURN, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]

shared = pytest.mark.skipif(not tiny.SHARED.exists(), reason="shared data are not here")
REAL = {
    "gpt2": (tiny.SHARED / "tokenizers/gpt2", "gpt2"),
    "opt": (tiny.SHARED / "tokenizers/opt", "opt"),
    "llama2": (tiny.SHARED / "tokenizers/llama2", "llama"),
    "stories": (tiny.SHARED / "models/stories260k", "llama"),
}


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
    assert template.added == 4  # gpt2 keeps its unknown token
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


def test_a_template_cannot_run_code(tmp_path):
    file = tmp_path / "evil.jinja"
    file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="unsafe"):
        Template(tiny.tokenizer(), str(file), "gpt2").accepts(TURN)


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
@pytest.mark.parametrize("name", REAL)
def test_tulu_ids_equal_apply_chat_template(name):
    folder, kind = REAL[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template(tokenizer, "tulu", kind)
    for messages in (TURN, [{"role": "system", "content": "Be kind."}, *TURNS]):
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template.jinja, tokenize=True, return_dict=True
        )
        assert rendered["input_ids"] == ids(template, messages)
        prompt = tokenizer.apply_chat_template(
            messages[:-1],
            chat_template=template.jinja,
            add_generation_prompt=True,
            return_dict=True,
        )
        assert prompt["input_ids"] == template.prompt(messages[:-1]).tolist()


@shared
@pytest.mark.parametrize("name", REAL)
def test_plain_prompts_equal_the_tokenizers_own_call(name):
    folder, kind = REAL[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template(tokenizer, "plain", kind)
    for text in ("Once upon a time", " leading space", "two\n\nlines"):
        messages = [{"role": "user", "content": text}]
        assert template.prompt(messages).tolist() == tokenizer(text).input_ids
