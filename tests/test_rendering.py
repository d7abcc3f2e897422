"""Chat templates as they come: what they mark, what they do to contents, and what stops them."""

import resource
import time

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from easyaira.config.data import DataConfig
from easyaira.data import rendering
from easyaira.data import template as template_module
from easyaira.data.chat_templates import TEMPLATES
from easyaira.data.template import Template
from easyaira.errors import DataError, TokenizerError
from helpers import tiny
from helpers.examples import load

END = "<|endoftext|>"
TURN = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Good day."}]
TURNS = [*TURN, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
CHAT = PLAIN + ASKS


@pytest.fixture
def in_a_child(monkeypatch):
    """Render as runs do. Other tests render in this process: a child takes a second to start."""
    monkeypatch.setattr(template_module, "Child", rendering.Child)


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def template_of(jinja, tokenizer=None):
    return Template(tokenizer or tiny.tokenizer(), jinja, "gpt2")


def learned(template, messages):
    """The learned spans, as text."""
    encoded = template.encode([messages])[0]
    return [template.tokenizer.decode(tokens) for tokens, is_learned in encoded if is_learned]


def whole(template, messages):
    return [int(i) for tokens, _ in template.encode([messages])[0] for i in tokens]


# templates that read contents: jinja, a conversation that it leaves alone, one that it changes
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ 'BOT: ' + c + eos_token }}{% else %}{{ 'USER: ' + m.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'BOT: ' }}{% endif %}"
)
SKIPS = (
    "{% for m in messages %}{% if m.content %}{{ m.role + ': ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}" + ASKS
)


def filtered(name):
    return PLAIN.replace("m.content", f"(m.content|{name})") + ASKS


READERS = {
    "reasoning cut away": (THINKING, chat("2+2?", "4"), chat("2+2?", "<think>easy</think>4")),
    "an empty turn skipped": (SKIPS, chat("a", "b"), chat("", "b")),
    "replace": (filtered("replace('\n', ' ')"), chat("a b", "c"), chat("a\nb", "c")),
    "upper": (filtered("upper"), chat("A B", "C"), chat("a b", "c")),
    "escape": (
        PLAIN.replace(" + m.content + ", " }}{{ m.content|e }}{{ ") + ASKS,
        chat("a", "b"),
        chat("a < b", "c"),
    ),
    "truncate": (filtered("truncate(9)"), chat("a", "b"), chat("a long text it is", "c")),
    "line feeds stripped": (
        PLAIN.replace("m.content", "m.content.strip('\n')") + ASKS,
        chat(" a ", "b"),
        chat("a\n", "b"),
    ),
}


@pytest.mark.parametrize("case", READERS)
@pytest.mark.slow
def test_a_content_that_the_template_changes_is_refused(case):
    jinja, same, changed = READERS[case]
    template = template_of(jinja)
    template.accepts(same)
    theirs = template.tokenizer.apply_chat_template(same, chat_template=jinja, return_dict=False)
    ours = whole(template, same)
    assert theirs[: len(ours)] == ours
    with pytest.raises(DataError, match="the template changes the content of a turn"):
        template.accepts(changed)


def test_json_around_contents_is_refused_where_it_escapes_and_kept_where_not():
    jinja = PLAIN.replace("m.content", "(m.content|tojson)")
    template = template_of(jinja)
    template.accepts(TURNS)
    theirs = template.tokenizer.apply_chat_template(TURNS, chat_template=jinja, tokenize=False)
    assert template.tokenizer.decode(whole(template, TURNS)) == theirs
    assert learned(template, TURNS) == [f'Good day."{END}', f'so."{END}']
    with pytest.raises(DataError, match="changes the content"):
        template.accepts(chat('say "a"', "b"))


def test_rows_that_the_template_changes_are_counted(tmp_path):
    rows = [{"messages": chat("a", "b")}, {"messages": chat("a", "<think>x</think>b")}]
    path = tiny.write_rows(tmp_path / "a.jsonl", rows)
    data = load(path, template=THINKING, max_dropped=0.5)
    assert data.report["train"]["dropped"] == {"the template changes the content of a turn": 1}


def test_what_a_generation_prompt_lacks_is_learned():
    """A model that gets `BOT:` at inference has to write the empty thoughts itself."""
    jinja = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'BOT:\n' }}"
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + eos_token }}"
        "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'BOT:\n' }}{% endif %}"
    )
    template = template_of(jinja)
    assert learned(template, TURNS) == [
        f"Good day.{END}",
        f"<think>\n\n</think>\n\nso.{END}",
    ]
    asked = template.tokenizer.apply_chat_template(
        TURNS[:-1], chat_template=jinja, add_generation_prompt=True, return_dict=False
    )
    assert template.prompt(TURNS[:-1]).tolist() == asked


def doubts(jinja, scorer=False):
    return list(template_of(jinja).doubts(scorer))


@pytest.mark.slow
def test_a_generation_prompt_that_no_answer_is_learned_after_is_told():
    """That of DeepSeek-R1's distilled models begins the thoughts, which their answers lack."""
    thinks = CHAT.replace("'assistant: '", "'assistant: <think>\\n'")
    assert doubts(CHAT) == doubts(thinks, scorer=True) == []
    (doubt,) = doubts(thinks)
    assert "learned after '<|endoftext|>assistant:', but the generation prompt" in doubt
    assert "'<|endoftext|>assistant: <think>', which other programs use" in doubt
    assert "generation prompt is '<|endoftext|>'" in doubts(PLAIN)[0]
    for name in TEMPLATES:
        assert not [*Template(tiny.tokenizer(), name, "gpt2").doubts(scorer=False)]


def test_a_template_that_writes_the_date_is_told():
    """Those of SmolLM3 and Llama 3.2: a run on another day has other tokens."""
    (doubt,) = doubts("{{ strftime_now('%d %b %Y') }}" + CHAT, scorer=True)
    assert "may write today's date" in doubt


MARKED = "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
ROLES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'BOT:\n' }}ANSWER"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
)
GENERATION = {
    "all answers": (MARKED, [f"Good day.{END}", f"so.{END}"]),
    "the last answer": (
        "{% if loop.last %}" + MARKED + "{% else %}{{ m.content + eos_token }}{% endif %}",
        [f"so.{END}"],
    ),
    "the end outside": (
        "{%- generation -%}{{ m.content }}{%- endgeneration -%}{{ eos_token }}",
        [f"Good day.{END}", f"so.{END}"],
    ),
    "text before and after": (
        "{% generation %}{{ '(' + m.content + ')' + eos_token + '\n' }}{% endgeneration %}",
        [f"(Good day.){END}\n", f"(so.){END}"],
    ),
}


@pytest.mark.parametrize("case", GENERATION)
def test_generation_blocks_say_what_is_learned(case):
    answer, wanted = GENERATION[case]
    jinja = ROLES.replace("ANSWER", answer)
    template = template_of(jinja)
    assert learned(template, TURNS) == wanted
    theirs = template.tokenizer.apply_chat_template(
        TURNS, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = template.encode([TURNS])[0]
    mask = [int(is_learned) for tokens, is_learned in ours for _ in tokens]
    if case != "the end outside":  # the end is learned all the same
        assert mask == theirs["assistant_masks"][: len(mask)]
    assert whole(template, TURNS) == theirs["input_ids"][: len(mask)]
    prompt = template.prompt(TURNS[:-1]).tolist()
    assert whole(template, TURNS)[: len(prompt)] == prompt


def test_the_space_before_a_generation_block_is_learned_with_the_word_that_it_merges_with():
    jinja = ROLES.replace("BOT:\n", "BOT: ").replace("ANSWER", MARKED)
    template = template_of(jinja)
    assert learned(template, TURNS) == [f" Good day.{END}", f" so.{END}"]
    theirs = template.tokenizer.apply_chat_template(TURNS, chat_template=jinja, return_dict=False)
    assert whole(template, TURNS) == theirs


def test_an_answer_outside_all_generation_blocks_is_refused():
    jinja = ROLES.replace(
        "ANSWER", "{% if loop.first %}" + MARKED + "{% else %}{{ m.content }}{% endif %}"
    )
    with pytest.raises(DataError, match="generation %} blocks leave out"):
        template_of(jinja).accepts(TURNS)


def test_a_generation_block_that_cuts_a_content_in_two_is_refused():
    cut = "{{ m.content[:2] }}{% generation %}{{ m.content[2:] }}{% endgeneration %}"
    jinja = "{% for m in messages %}" + cut + "{{ eos_token }}{% endfor %}"
    with pytest.raises(DataError, match="generation %} blocks leave out or cut"):
        template_of(jinja).accepts(TURNS)


@pytest.mark.parametrize("side", [{"rstrip": True}, {"lstrip": True}, {}], ids=str)
@pytest.mark.parametrize("start", ["tiny", "llama"])
def test_tokens_that_strip_their_neighbours_do_so_here_too(side, start):
    if start == "llama" and not tiny.SHARED.exists():
        pytest.skip("shared data are not here")
    tokenizer = (
        tiny.tokenizer()
        if start == "tiny"
        else AutoTokenizer.from_pretrained(tiny.SHARED / "models/stories260k")
    )
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False, **side) for n in names])
    jinja = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|' + m.role + '|>\n' + m.content + '\n <|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    template = template_of(jinja, tokenizer)
    for messages in (TURN, TURNS, chat(" a \n", "\u2003 b", "  ", "c\t")):
        theirs = tokenizer.apply_chat_template(messages, chat_template=jinja, return_dict=False)
        ours = whole(template, messages)
        joined = tokenizer.decode(theirs[: len(ours)])
        assert tokenizer.decode(ours) == joined
        asked = tokenizer.apply_chat_template(
            messages[:-1], chat_template=jinja, add_generation_prompt=True, return_dict=False
        )
        assert template.prompt(messages[:-1]).tolist() == asked


def test_a_tokenizer_that_misses_the_templates_tokens_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, single_word=True)])
    with pytest.raises(TokenizerError, match="reads the control tokens"):
        template_of("{% for m in messages %}{{ 'x<|user|>x' + m.content }}{% endfor %}", tokenizer)


@pytest.mark.parametrize("role", [END, "user<|endoftext|>", "\ue0000\ue001", "", "a\nb", "x" * 99])
def test_a_role_is_a_word_and_never_a_control_token(role):
    template = Template(tiny.tokenizer(), "zephyr", "gpt2")
    with pytest.raises(DataError, match="a role must be a word"):
        template.accepts([{"role": role, "content": "x"}, *TURN])


def test_the_default_of_several_templates_is_used_as_by_transformers():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"tool_use": "TOOLS" + CHAT, "default": CHAT}
    assert whole(Template(tokenizer, "chat", "gpt2"), TURN) == whole(template_of(CHAT), TURN)
    tokenizer.chat_template = {"tool_use": "TOOLS" + CHAT, "rag": CHAT}
    with pytest.raises(TokenizerError, match=r"templates tool_use, rag, but no default; write"):
        Template(tokenizer, "chat", "gpt2")
    tokenizer.chat_template = 5
    with pytest.raises(TokenizerError, match="chat_template: expected a text, found a number"):
        Template(tokenizer, "chat", "gpt2")


@pytest.mark.parametrize(
    "jinja, problem",
    [
        ("{% for m in messages %}{{ m.content }}\n{% endif %}", "line 2: .*endif"),
        ("{% for m in messages %}{{ m.content }}", "end of template"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ bos_token + pad_token }}", "'pad_token' is undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
    ids=["syntax", "cut", "name", "token", "code", "file", "surrogate"],
)
@pytest.mark.slow
def test_a_templates_own_fault_is_told_before_rows_are_read_with_its_file(jinja, problem, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(jinja)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=problem) as raised:
        Template(tokenizer, "chat", "gpt2")
    assert str(raised.value).startswith(f"{tmp_path}/chat_template.jinja: cannot be rendered: ")
    with pytest.raises(TokenizerError, match=problem) as raised:
        Template(tiny.tokenizer(), str(tmp_path / "chat_template.jinja"), "gpt2")
    assert str(raised.value).startswith(f"{tmp_path}/chat_template.jinja: ")


def test_a_template_from_the_hub_is_named_by_its_repository(tmp_path):
    folder = tmp_path / "models--owner--name" / "snapshots" / "1234"
    tiny.tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ nothing() }}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(TokenizerError, match="^owner/name/chat_template.jinja: cannot be"):
        Template(tokenizer, "chat", "gpt2")


BOMBS = {
    "a constant power": ("{% if 7 ** (10 ** 9) > 1 %}x{% endif %}", "not finish within 2 seconds"),
    "a power": ("{% if (messages|length + 5) ** (10 ** 9) > 1 %}x{% endif %}", "not finish"),
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "not finish",
    ),
    "a long text": (
        "{{ ('a' * (messages|length * 3 * 10 ** 9))|length }}",
        "takes more than 512 MiB of memory",
    ),
    "a wide number": ("{{ '%1000000000d' % 1 }}", "takes more than 512 MiB of memory"),
    "much text": (
        "{% set a = 'a' * 2000000 %}{% for i in range(90000) %}{{ a }}{% endfor %}",
        "takes more than 512 MiB of memory",
    ),
    "more text than a row": (  # its length is not known to Jinja's compiler, which would fold it
        "{{ 'a' * (messages|length * 7 * 10 ** 7) }}",
        "writes more than 64 MiB",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}


@pytest.mark.usefixtures("in_a_child")
@pytest.mark.slow
@pytest.mark.parametrize("case", BOMBS)
def test_a_template_takes_neither_time_nor_memory_without_bound(case):
    jinja, problem = BOMBS[case]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TokenizerError, match=f"data.template: cannot be rendered: .*{problem}"):
        template_of(CHAT + jinja)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 8
    assert after.ru_maxrss <= max(before.ru_maxrss, 2**20)  # KiB, of the largest child so far


@pytest.mark.usefixtures("in_a_child")
@pytest.mark.slow
def test_a_row_that_makes_a_template_endless_is_named(tmp_path):
    slow = "{% if 'slow' in messages[0].content %}{{ 7 ** (10 ** 9) > messages|length }}{% endif %}"
    slow = slow.replace("7 **", "(messages|length + 5) **")
    rows = [{"messages": chat("quick", "b")}, {"messages": chat("slow", "b")}]
    path = tiny.write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(TokenizerError, match=r"a\.jsonl:2: data.template: .*not finish within 2"):
        load(path, template=CHAT + slow)


def test_a_child_answers_as_this_process_does():
    jinja = ROLES.replace("ANSWER", MARKED) + "{% if messages|length == 1 %}"
    jinja += "{% if messages[0].role == 'user' %}{{ raise_exception('odd') }}{% endif %}"
    jinja += "{{ nothing() }}{% endif %}"
    child = rendering.Child(jinja, {"eos_token": END})

    def outcome(render, *arguments):
        try:
            return render(*arguments)
        except (rendering.Broken, rendering.Refused) as error:
            return type(error), str(error)

    inputs = [TURNS, TURNS[:1], TURNS[1:2], TURNS]
    here = [outcome(rendering.render, jinja, {"eos_token": END}, input) for input in inputs]
    assert [outcome(child.render, input) for input in inputs] == here
    assert here[0].marks and here[1][0] is rendering.Refused and here[2][0] is rendering.Broken


@pytest.mark.usefixtures("in_a_child")
def test_a_child_serves_many_renderings_and_ends_with_its_template():
    template = template_of(CHAT)
    child = template._rendered.__self__._process
    start = time.process_time()
    for i in range(300):
        template.accepts(chat(f"question {i}", "b"))
    assert child.poll() is None
    assert time.process_time() - start < 1
    del template
    import gc

    gc.collect()
    assert child.poll() is not None


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_own_templates_need_no_child(name, monkeypatch):
    monkeypatch.setattr(rendering.subprocess, "Popen", None)
    Template(tiny.tokenizer(), name, "gpt2").accepts(TURN)


def test_a_panic_of_the_tokenizer_names_the_row(tmp_path):
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny.tokenizer()
    split = pre_tokenizers.Split(Regex("(?:(?:a|a)+)+$"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, tokenizer.backend_tokenizer.pre_tokenizer]
    )
    template = Template(tokenizer, "plain", "gpt2")
    rows = [*tiny.sft_rows(3), {"prompt": "a" * 5000 + "!", "completion": "b"}]
    path = tiny.write_rows(tmp_path / "a.jsonl", rows)
    from easyaira.data import dataset
    from easyaira.data.recipe import recipe_of

    settings = DataConfig(train=str(path), template="plain")
    with pytest.raises(TokenizerError, match=r"a\.jsonl:4: tokenizer: fails on a text: .*retry"):
        dataset.load(
            settings,
            recipe_of("conversation", settings, 64),
            template=template,
            vocab_size=tiny.VOCAB,
            seed=0,
        )
