"""Generation ends where the model's files say, and takes or refuses their settings."""

import errno
import fcntl
import json
import os
import shutil
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyaira import evaluate, generate
from easyaira.data.chat_templates import TEMPLATES
from easyaira.data.template import Template
from easyaira.errors import ConfigError, DataError, Preempted
from easyaira.export import hf_config
from easyaira.generation import prompts, settings
from easyaira.generation.chat import CUT, Live, text_of
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import Answer
from easyaira.generation.sampler import generate as answers_of
from easyaira.run import samples
from easyaira.storage.pretrained import Pretrained
from easyaira.train.setup import prepare
from helpers import tiny
from helpers.processes import call, start
from helpers.runs import configure, same_bits, stop_after, train

PROMPT = "what do you"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tiny.save(folder, tiny.CONFIGS["gpt2"])
    return folder


def answer_of_transformers(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    answer = model.generate(ids, do_sample=False, pad_token_id=0, **options)[0, ids.shape[1] :]
    return answer.tolist(), tokenizer


def with_settings(folder, target, config=None, **generation):
    """A copy of a folder with other settings."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "generation_config.json").write_text(json.dumps(generation))
    if config:
        content = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(content))
    return target


def ask(folder, capsys, *flags):
    arguments = [folder, f"--prompt={PROMPT}", "--template=plain", *flags]
    return call(generate.main, arguments, capsys)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_answer_ends_at_every_end_token_of_the_models_files(file, gpt2, tmp_path, capsys):
    long, tokenizer = answer_of_transformers(gpt2, max_new_tokens=12)
    end = next(token for token in long[3:] if token not in long[:3])
    ends = {"eos_token_id": [0, end]}
    options = {"config": ends} if file == "config.json" else ends
    folder = with_settings(gpt2, tmp_path / "model", **options)
    answer, _ = answer_of_transformers(gpt2, max_new_tokens=12, **ends)
    assert len(answer) < 12 and answer[-1] == end
    status, out, _ = ask(folder, capsys, "--max_new_tokens=12")
    assert status == 0 and out == tokenizer.decode(answer[:-1]) + "\n"


def test_the_settings_of_generation_config_are_those_of_transformers(gpt2, tmp_path, capsys):
    chosen = {"repetition_penalty": 1.7, "max_new_tokens": 9, "temperature": 0.3, "top_k": 5}
    folder = with_settings(gpt2, tmp_path / "model", do_sample=False, **chosen)
    answer, tokenizer = answer_of_transformers(folder)
    plain, _ = answer_of_transformers(gpt2, max_new_tokens=9)
    status, out, _ = ask(folder, capsys)
    assert status == 0 and out == tokenizer.decode(answer) + "\n" != tokenizer.decode(plain) + "\n"


@pytest.mark.slow
def test_sampling_settings_count_where_sampling_is_on_and_flags_override_them(
    gpt2, tmp_path, capsys
):
    on = {"do_sample": True, "temperature": 2.0, "top_k": 40, "top_p": 0.9, "max_new_tokens": 8}
    assert settings.options_of(on) == {name: on[name] for name in on if name != "do_sample"}
    assert settings.options_of(on | {"do_sample": False}) == {"max_new_tokens": 8}
    of_transformers = {"temperature": 1.0, "top_k": 50}  # version 5.24 where a file is silent
    assert settings.options_of({"do_sample": True}) == of_transformers
    folder = with_settings(gpt2, tmp_path / "model", **on)
    greedy, tokenizer = answer_of_transformers(gpt2, max_new_tokens=8)
    assert ask(folder, capsys, "--temperature=0")[1] == tokenizer.decode(greedy) + "\n"
    assert len({ask(folder, capsys, f"--seed={seed}")[1] for seed in (1, 2)}) == 2


def test_a_temperature_near_0_is_greedy(gpt2):
    model, params = tiny.load(gpt2)

    def sample(temperature):
        sampling = Sampling(max_new_tokens=5, temperature=temperature, end_ids=(0,))
        return answers_of(model, params, [[5, 6]], sampling)

    assert sample(1e-300) == sample(1e-6) == sample(0.0)


@pytest.mark.parametrize(
    "flag, problem",
    [
        ("--max_new_tokens=-5", "max_new_tokens: expected"),
        ("--max_new_tokens=0", "max_new_tokens: expected"),
        ("--max_new_tokens=1.5", "max_new_tokens: "),
        ("--temperature=-1", "temperature: expected"),
        ("--temperature=nan", "temperature: expected"),
        ("--temperature=inf", "temperature: expected"),
        ("--top_p=0", "top_p: expected"),
        ("--top_p=5", "top_p: expected"),
        ("--top_p=0.5", "top_p: has no effect on greedy generation"),
        ("--seed=-1", "seed: expected"),
        (f"--seed={2**70}", "seed: expected"),
        ("--prompt=caf\udce9", "prompt: is not UTF-8"),
        ("--prompt=", "a prompt without tokens"),
        (f"--prompt={'what do you like ' * 40}", "leaves no room in the model's 64 positions"),
        ("--chat", "give one of --prompt, --chat, --prompts; found prompt and chat"),
        ("--output=x", "--prompts and --output: need each other"),
        ("--min_p=0.1", "min_p: has no effect on greedy generation"),
        ("--min_new_tokens=300", "min_new_tokens: 300 exceeds max_new_tokens, 200"),
        ("--stop=", "--stop: found an empty text"),
        ("--num_samples=0", "num_samples: expected"),
        ("--num_samples=2", "num_samples: 2 answers at temperature 0 are equal; raise temp"),
    ],
)
def test_an_option_without_sense_is_refused_in_one_line(flag, problem, gpt2, capsys):
    status, out, err = ask(gpt2, capsys, flag)
    assert status == 2 and problem in err and len(err.splitlines()) == 1 and not out


def test_what_a_terminal_may_send_or_refuse_ends_in_one_line(gpt2, capsys, monkeypatch):
    """All of these were tracebacks; a closed input ends the conversation."""
    arguments = [gpt2, "--chat", "--template=plain"]
    monkeypatch.setattr("builtins.input", lambda _: "caf\udce9")
    status, _, err = call(generate.main, arguments, capsys)
    assert status == 2 and err == (
        "error: the question is not UTF-8; set the terminal's encoding to it\n"
    )
    monkeypatch.setattr("sys.stdin", None)
    assert call(generate.main, arguments, capsys)[0] == 0
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        status, _, err = ask(gpt2, capsys, "--max_new_tokens=2")
    problem = "error: standard output: No space left on device"
    assert status == 4 and err.splitlines()[-1] == problem


def test_a_huge_limit_is_that_of_the_models_positions(gpt2, capsys):
    answer, tokenizer = answer_of_transformers(
        gpt2, max_new_tokens=64 - len(tiny.tokenizer()(PROMPT).input_ids)
    )
    status, out, _ = ask(gpt2, capsys, f"--max_new_tokens={10**9}")
    assert status == 0 and out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    "content, problem",
    [
        ({"num_beams": 4}, "num_beams 4 is not supported here; remove it"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size 1 is not supported"),
        ({"stop_strings": ["x", 5]}, "stop_strings: found"),
        ({"stop_strings": ""}, "stop_strings: found"),
        ({"min_new_tokens": -1}, "min_new_tokens: found -1"),
        ({"min_p": 2}, "min_p: found 2"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id"),
        ({"temperature": "0.5"}, "temperature: found '0.5', expected a number from 0;"),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"top_k": 2.5}, "top_k: found 2.5, expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0"),
        ({"do_sample": "yes"}, "do_sample: found 'yes'"),
    ],
)
def test_a_setting_that_is_not_there_or_makes_no_sense_is_refused(content, problem):
    with pytest.raises(ConfigError, match=r"^generation_config.json: " + problem):
        settings.options_of(content)


def test_settings_that_change_no_token_are_taken():
    neutral = {"num_beams": 1, "length_penalty": 0.5, "max_length": 20, "bos_token_id": 0}
    neutral |= {"suppress_tokens": [], "min_length": 0, "use_cache": True, "pad_token_id": None}
    assert settings.options_of(neutral) == {}


@pytest.mark.parametrize(
    "file, wrong",
    [
        (file, ids)
        for file in ("config.json", "generation_config.json")
        for ids in (300, -1, [0, 300])
    ]
    # transformers refuses the types of config.json itself
    + [("generation_config.json", ids) for ids in ("0", True, 1.0, [[0]], {})],
)
def test_an_end_token_outside_the_vocabulary_is_refused(file, wrong, gpt2, tmp_path, capsys):
    ends = {"eos_token_id": wrong}
    options = {"config": ends} if file == "config.json" else ends
    status, _, err = ask(with_settings(gpt2, tmp_path / "model", **options), capsys)
    assert status == 2 and f"error: {file}: eos_token_id: found" in err


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """Folders that generate nothing: a scorer, an encoder, and one with too few embeddings."""
    root = tmp_path_factory.mktemp("unusable")
    for name, config in (("scorer", "gpt2"), ("encoder", "bert")):
        tiny.save(root / name, tiny.SCORERS[config])
    tiny.save(root / "few", tiny.CONFIGS["gpt2"] | {"vocab_size": 260})
    tiny.tokenizer().save_pretrained(root / "few")
    return root


UNUSABLE = {
    "scorer": "scorer: is a reward or toxicity model and generates no text; name a language",
    "encoder": "bert is an encoder and generates no text",
    "few": " and the embedding has 260 rows; use the model's own tokenizer",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_models_that_cannot_generate_are_refused_in_one_line(name, unusable, tmp_path, capsys):
    for flags in ([], ["--dry_run"]):
        status, out, err = ask(unusable / name, capsys, *flags)
        assert (status, out) == (2, "") and UNUSABLE[name] in err and len(err.splitlines()) == 1
    rows = tiny.write_rows(tmp_path / "in.jsonl", [{"prompt": PROMPT}])
    assert answer_file(unusable / name, rows, tmp_path / "out.jsonl", capsys)[0] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    if name != "few":
        data = tiny.SHARED / "eval" if tiny.SHARED.exists() else tmp_path
        arguments = [unusable / name, "--tasks=arc_easy", f"--data={data}"]
        status, _, err = call(evaluate.main, arguments, capsys)
        assert status == 2 and UNUSABLE[name] in err and len(err.splitlines()) == 1


# Files of prompts


ROWS = [
    {"prompt": "what do you", "id": 7},
    {"messages": [{"role": "user", "content": "the capital"}]},
    {"prompt": "red <|endoftext|> and", "id": "half of a pair: \ud83d"},
    {"prompt": "I like blue and red. yes"},
]
ASKED = ("--template=plain", "--max_new_tokens=9", "--temperature=1", "--num_samples=2")


@pytest.fixture(scope="module")
def answered(gpt2, tmp_path_factory):
    """A folder with prompts, and the output of an uninterrupted command."""
    root = tmp_path_factory.mktemp("answered")
    rows = tiny.write_rows(root / "in.jsonl", ROWS)
    generate.main([str(gpt2), f"--prompts={rows}", f"--output={root / 'out.jsonl'}", *ASKED])
    return root


def answer_file(gpt2, source, output, capsys, *flags):
    arguments = [gpt2, f"--prompts={source}", f"--output={output}", *ASKED, *flags]
    return call(generate.main, arguments, capsys)


@pytest.mark.slow
def test_a_file_of_prompts_becomes_a_file_of_answers(gpt2, answered):
    lines = [json.loads(line) for line in (answered / "out.jsonl").read_text().splitlines()]
    written = {"generated", "finish_reason", "sample"}
    assert [{k: v for k, v in row.items() if k not in written} for row in lines] == [
        row for row in ROWS for _ in range(2)
    ]
    assert [row["sample"] for row in lines] == [0, 1] * 4
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    model, params = tiny.load(gpt2)
    prompts = [tokenizer(text).input_ids for text in ("what do you", "the capital")]
    answers = answers_of(model, params, prompts, SAMPLED, num_samples=2)
    texts = [tokenizer.decode(answer.content, skip_special_tokens=True) for answer in answers]
    assert [row["generated"] for row in lines[:4]] == texts


SAMPLED = Sampling(max_new_tokens=9, temperature=1.0, end_ids=(0,))


@pytest.mark.parametrize("share", [0, 0.35, 0.6, 0.999, 1])
@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(
    share, gpt2, answered, tmp_path, capsys
):
    whole = (answered / "out.jsonl").read_bytes()
    left = whole[: int(share * len(whole))]
    (tmp_path / "out.jsonl").write_bytes(left)
    settings_file = "out.jsonl.settings.json"
    (tmp_path / settings_file).write_bytes((answered / settings_file).read_bytes())
    inside = (tmp_path / "out.jsonl").stat().st_ino
    status, out, _ = answer_file(gpt2, answered / "in.jsonl", tmp_path / "out.jsonl", capsys)
    assert status == 0 and (tmp_path / "out.jsonl").read_bytes() == whole
    assert (tmp_path / "out.jsonl").stat().st_ino == inside
    assert ("all 8 answers are there" in out) == (share == 1)


@pytest.mark.slow
def test_a_real_sigkill_changes_no_byte(gpt2, tmp_path, capsys):
    rows = tiny.write_rows(tmp_path / "in.jsonl", [{"prompt": f"what do {i}"} for i in range(200)])
    assert answer_file(gpt2, rows, tmp_path / "whole.jsonl", capsys)[0] == 0
    output = tmp_path / "out.jsonl"
    words = ["-m", "easyaira.generate", gpt2, f"--prompts={rows}", f"--output={output}", *ASKED]
    child = start([*words, "--batch_size=1"])
    while child.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.002)
    child.kill()
    child.communicate()
    assert 0 < len(output.read_bytes().splitlines()) < 400
    assert answer_file(gpt2, rows, output, capsys)[0] == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "flags, rows, problem",
    [
        (["--seed=1"], ROWS, "with seed 0, but 1 is asked for; name another file"),
        (["--top_k=3"], ROWS, "with top_k 0, but 3 is asked for"),
        ([], ROWS[1:], "its line 1 is of another prompt"),
    ],
)
def test_answers_of_another_command_are_kept(
    flags, rows, problem, gpt2, answered, tmp_path, capsys
):
    before = (answered / "out.jsonl").read_bytes()
    rows = tiny.write_rows(tmp_path / "in.jsonl", rows)
    status, _, err = answer_file(gpt2, rows, answered / "out.jsonl", capsys, *flags)
    assert status == 2 and problem in err and len(err.splitlines()) == 1
    assert (answered / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.json", "out.csv", "out.parquet"])
def test_an_output_that_would_be_read_as_another_format_is_refused(name, gpt2, tmp_path, capsys):
    rows = tiny.write_rows(tmp_path / "in.jsonl", ROWS)
    status, _, err = answer_file(gpt2, rows, tmp_path / name, capsys)
    assert status == 2 and f"{name}: answers are written as JSON lines; name it .jsonl" in err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", ["a folder", "no regular file"])
def test_an_output_that_is_no_file_is_refused_before_its_settings(kind, gpt2, tmp_path, capsys):
    """/dev/null left /dev/null.settings.json."""
    path = tmp_path / "output"
    path.mkdir() if kind == "a folder" else os.mkfifo(path)
    rows = tiny.write_rows(tmp_path / "in.jsonl", ROWS)
    status, _, err = answer_file(gpt2, rows, path, capsys)
    assert status == 2 and f"output: {path} is {kind}; name a file, such as answers.jsonl" in err
    assert {file.name for file in tmp_path.iterdir()} == {"output", "in.jsonl"}


def test_answers_of_weights_that_were_replaced_are_not_gone_on_with(
    gpt2, answered, tmp_path, capsys
):
    model, output = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(gpt2, model)
    assert answer_file(model, answered / "in.jsonl", output, capsys)[0] == 0
    before = output.read_bytes()
    output.write_bytes(b"".join(before.splitlines(keepends=True)[:3]))
    tiny.save(model, tiny.CONFIGS["gpt2"], std=0.19)
    status, _, err = answer_file(model, answered / "in.jsonl", output, capsys)
    assert status == 2 and "exists with model" in err.splitlines()[-1]
    assert len(output.read_bytes().splitlines()) == 3


def test_a_template_that_has_changed_is_not_gone_on_with(gpt2, answered, tmp_path, capsys):
    """Its name is the same, and so was what the settings recorded."""
    jinja, output = tmp_path / "t.jinja", tmp_path / "out.jsonl"
    jinja.write_text(TEMPLATES["plain"])
    words = (gpt2, answered / "in.jsonl", output, capsys, f"--template={jinja}")
    assert answer_file(*words)[0] == 0
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:3]))
    jinja.write_text(TEMPLATES["zephyr"])
    status, _, err = answer_file(*words)
    assert status == 2 and "exists with template" in err.splitlines()[-1]


def test_two_commands_do_not_write_one_file(gpt2, answered, tmp_path, capsys):
    """Both ended with 0, and the file had lines of both."""
    output, source = tmp_path / "out.jsonl", answered / "in.jsonl"
    for name in ("out.jsonl", "out.jsonl.settings.json"):
        (tmp_path / name).write_bytes((answered / name).read_bytes())
    whole = output.read_bytes()
    for left in (whole[:200], b""):  # seen at the start, or once the first answer is there
        output.write_bytes(left)
        with open(output, "rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            status, _, err = answer_file(gpt2, source, output, capsys)
        assert status == 2 and "another command writes" in err.splitlines()[-1]
        assert output.read_bytes() == left
    assert answer_file(gpt2, source, output, capsys)[0] == 0 and output.read_bytes() == whole


def test_a_full_disk_is_one_line(gpt2, answered, tmp_path, capsys, monkeypatch):
    """Closing the file, which tries once more, was a traceback."""
    full = SimpleNamespace(write=len, tell=lambda: 0, truncate=len, fileno=lambda: 0)

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    full.flush = full.close = fail
    full.truncate = lambda size: None
    monkeypatch.setattr(prompts, "open", lambda *_: full, raising=False)
    monkeypatch.setattr(prompts, "lock", lambda *_: True)
    status, _, err = answer_file(gpt2, answered / "in.jsonl", tmp_path / "out.jsonl", capsys)
    assert status == 4 and err.splitlines()[-1].endswith(
        "cannot be written: No space left on device"
    )


def test_an_output_that_is_not_ours_is_kept(gpt2, answered, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    status, _, err = answer_file(gpt2, answered / "in.jsonl", tmp_path / "out.jsonl", capsys)
    assert status == 2 and "name another file" in err
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "what do you like " * 2000}, "in.jsonl:2: the prompt has"),
        ({"question": "what"}, "in.jsonl:2: wanted a column prompt or messages; found question"),
        ({"prompt": "x", "messages": []}, "in.jsonl:2: columns prompt, messages: both hold"),
        ({"prompt": 5}, "in.jsonl:2: column prompt: wanted text"),
        ({"messages": []}, "in.jsonl:2: column messages: must end in a message to answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end in a message to answer"),
        (
            {"prompt": "x", "generated": "y"},
            "generated: rename it; the output adds one of this name",
        ),
        ({"prompt": ""}, "a prompt without tokens"),
        (None, "no rows"),
    ],
)
def test_a_bad_file_of_prompts_is_refused_before_anything_is_written(
    row, problem, gpt2, tmp_path, capsys
):
    rows = tiny.write_rows(tmp_path / "in.jsonl", [{"prompt": "what"}, row] if row else [])
    status, _, err = answer_file(gpt2, rows, tmp_path / "out.jsonl", capsys)
    assert status == 2 and problem in err and len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_weights_that_are_not_finite_write_nothing(gpt2, answered, tmp_path, capsys, monkeypatch):
    load = Pretrained.load

    def broken(*given, each):
        return load(*given, each=lambda path, leaf: each(path, leaf * jnp.nan))

    monkeypatch.setattr(Pretrained, "load", broken)
    status, _, err = answer_file(gpt2, answered / "in.jsonl", tmp_path / "out.jsonl", capsys)
    assert status == 2 and "the model's logits are not finite" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_conversation_knows_its_turns_and_ends_when_its_context_is_full(
    gpt2, capsys, monkeypatch
):
    typed = iter(["what do you", "the capital", "and", "red " * 30])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    arguments = [gpt2, "--chat", "--template=plain", "--max_new_tokens=12"]
    status, out, err = call(generate.main, arguments, capsys)
    assert status == 2 and "the conversation has" in err and "shorten it" in err
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    model, params = tiny.load(gpt2)
    template = Template(tokenizer, "plain", "gpt2")
    messages, wanted = [], ""
    for question in ("what do you", "the capital", "and"):
        messages.append({"role": "user", "content": question})
        prompt = template.prompt(messages).tolist()
        sampling = Sampling(max_new_tokens=12, end_ids=(0,))
        (answer,) = answers_of(model, params, [prompt], sampling)
        messages.append({"role": "assistant", "content": template.text(answer.content)})
        wanted += messages[-1]["content"] + "\n"
        wanted += f"[{CUT}]\n" if answer.reason == "length" else ""
    assert out == wanted


def test_a_stop_string_is_not_shown_while_an_answer_is_written():
    """Nor any part of it, wherever the tokens are cut; what only begins like one is."""

    class Letters:
        text = staticmethod("".join)

    for letters in ("red END and on", "red EN", "END"):
        written = []
        live = Live(Letters, written.append, ["END", "\n"])
        for letter in letters:
            live(0, [letter])
        wanted, shown = letters.partition("END")[0], "".join(written)
        assert wanted.startswith(shown) and len(shown) == live.shown >= len(wanted) - 2
        answer = Answer(list(letters), [0.0] * len(letters), "stop")
        assert shown + text_of(answer, Letters, ["END"])[live.shown :] == wanted


@pytest.fixture
def setup_of(gpt2, tmp_path):
    def setup_of(rows, *flags, **generation):
        folder = with_settings(gpt2, tmp_path / "model", **generation)
        rows = tiny.write_rows(tmp_path / "sft.jsonl", rows)
        return prepare(*configure("sft", folder, rows, tmp_path / "run", "--num_samples=2", *flags))

    return setup_of


def end_ids_of_samples(setup, folder):
    return samples.Samples(setup, folder / "samples.json").make_sampler().sampling.end_ids


def test_samples_and_release_end_where_the_models_files_say(setup_of, tmp_path):
    setup = setup_of(tiny.sft_rows(8), eos_token_id=[7, 0])
    assert end_ids_of_samples(setup, tmp_path) == (0, 7)
    assert hf_config.released(setup).config["eos_token_id"] == [0, 7]


def test_samples_end_where_config_json_says_too(setup_of, tmp_path):
    setup = setup_of(tiny.sft_rows(8), eos_token_id=0)
    setup.origin.config["eos_token_id"] = [0, 9]
    assert end_ids_of_samples(setup, tmp_path) == (0, 9)


def test_a_release_with_new_tokens_ends_at_its_own(setup_of):
    setup = setup_of(
        tiny.sft_rows(8), "--data.template=aira", "--model.resize=mean", eos_token_id=7
    )
    assert hf_config.released(setup).config["eos_token_id"] == 301


@pytest.mark.slow
def test_samples_at_every_evaluation_change_no_bit_and_survive_a_stop(gpt2, tmp_path, monkeypatch):
    rows = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(40))
    options = {"data.eval": 0.1, "max_steps": 4, "eval_steps": 2}

    def weights(name, count):
        trained = train("sft", gpt2, rows, tmp_path / name, num_samples=count, **options)
        return trained[1]

    def sampled(name):
        return json.loads((tmp_path / name / "samples.json").read_text())

    plain = weights("plain", 0)
    assert not (tmp_path / "plain/samples.json").exists()
    same_bits(weights("whole", 2), plain)
    whole = sampled("whole")
    assert [list(row["answers"]) for row in whole] == [["0", "2", "4"]] * 2
    assert whole[0]["answers"]["0"] != whole[0]["answers"]["4"]
    assert whole[0]["answers"]["0"].endswith(" ...")  # noise without an end
    board = EventAccumulator(str(tmp_path / "whole/tensorboard")).Reload()
    shown = [
        (text.step, text.tensor_proto.string_val[0].decode()) for text in board.Tensors("answers/1")
    ]
    wanted = [f"{whole[0]['prompt']}\n\n{text}" for text in whole[0]["answers"].values()]
    literal = ["".join(f"    {line}\n" for line in text.splitlines()) for text in wanted]
    assert shown == list(zip((0, 2, 4), literal, strict=True))

    with monkeypatch.context() as patch:  # a signal while the answers after update 2 are sampled
        stop_after(patch, 2, samples.Sampler, "weights")
        with pytest.raises(Preempted):
            weights("stopped", 2)
    assert [list(row["answers"]) for row in sampled("stopped")] == [["0"]] * 2
    same_bits(weights("stopped", 2), plain)
    assert sampled("stopped") == whole


def test_samples_leave_out_examples_without_a_prompt(setup_of, tmp_path):
    rows = [{"prompt": "", "completion": f"I like {i}"} for i in range(3)]
    setup = setup_of([*rows, {"prompt": "what?", "completion": "red"}])
    assert len(samples.Samples(setup, tmp_path / "samples.json").prompts) == 1


def test_samples_say_what_was_cut(setup_of, tmp_path):
    rows = [{"prompt": "what?", "completion": text} for text in ("red", "red and blue " * 9)]
    shown = samples.Samples(setup_of(rows, "--data.max_length=16"), tmp_path / "samples.json")
    short, long = sorted(row["wanted"] for row in shown.rows)
    assert short == "red" and long.startswith("red and") and long.endswith(" ...")


def test_a_prompt_without_tokens_is_refused(gpt2):
    model, params = tiny.load(gpt2)
    with pytest.raises(DataError, match="a prompt without tokens"):
        answers_of(model, params, [[5], []], Sampling(max_new_tokens=2))
