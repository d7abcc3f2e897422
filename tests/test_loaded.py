"""Models in Python: easyaira.load."""

import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import torch

import easyaira
from easyaira.algorithms import rollouts
from easyaira.data.listed import read_texts
from easyaira.distributed.tree import by_path, path_of
from easyaira.errors import ConfigError, DataError, EasyAiraError
from easyaira.models.layers import is_matrix
from helpers import tiny

QUESTIONS = ["Who?", "What is the capital of Peru?", [{"role": "user", "content": "Why"}]]
ANSWERS = ["A cat.", "Lima", "Because of that, they say."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder, tiny.CASES["llama"])
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return easyaira.load(str(folder), template="plain")


def test_importing_easyaira_alone_loads_nothing():
    code = "import sys, easyaira; print({'jax', 'numpy', 'easyaira.errors'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'lead'"):
        easyaira.lead  # noqa: B018


@pytest.mark.parametrize("long", [False, True])
def test_logps_are_those_of_transformers(long, model, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    answers = ANSWERS
    if long:  # rows that attention computes in tiles
        folder, answers = tmp_path, [answer * 9 for answer in ANSWERS]
        tiny.save(folder, tiny.CASES["llama"] | {"max_position_embeddings": 400})
        model = easyaira.load(str(folder), template="plain")
        assert model.model.compute.attention == "tiles"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    actual = model.logps(QUESTIONS, answers)
    assert actual.shape == (3,) and actual.dtype == np.float32
    for question, answer, ours in zip(QUESTIONS, answers, actual, strict=True):
        text = question if isinstance(question, str) else question[0]["content"]
        messages = [{"role": "user", "content": text}]
        start = len(model.template.prompt(messages))
        spans = model.template.encode([[*messages, {"role": "assistant", "content": answer}]])[0]
        ids = torch.tensor(np.concatenate([tokens for tokens, _ in spans]))[None].long()
        with torch.no_grad():
            logps = theirs(ids).logits[0, :-1].log_softmax(-1)
        wanted = logps.gather(-1, ids[0, 1:, None])[start - 1 :].sum()
        assert ids[0, -1] == model.template.end
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    assert long == (ids.shape[1] > 128)  # the last answer is the longest


def test_logps_of_more_texts_than_a_batch_are_in_order(model):
    answers = [("a" * (1 + i % 7)) for i in range(20)]
    logps = model.logps(["Say it"] * 20, answers)
    np.testing.assert_allclose(logps, np.resize(logps[:7], 20), rtol=1e-5)
    assert len(set(logps[:7].round(3))) == 7
    assert model.logps([], []).shape == (0,)


@pytest.mark.slow
def test_generated_texts_are_those_of_the_command(model, folder, capsys):
    from easyaira import generate

    options = [
        "--template",
        "plain",
        "--max_new_tokens",
        "8",
        "--temperature",
        "0.9",
        "--seed",
        "3",
    ]
    generate.main([str(folder), "--prompt", QUESTIONS[1], "--num_samples", "2", *options])
    printed = capsys.readouterr().out
    answers = model.generate(
        [QUESTIONS[1]], num_samples=2, seed=3, max_new_tokens=8, temperature=0.9
    )
    assert len(answers) == 1 and len(answers[0]) == 2
    assert printed == "".join(f"{text}\n" for text in answers[0])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_scores_are_those_of_transformers(kind, tmp_path):
    theirs = tiny.save(tmp_path, tiny.SCORERS.get(kind) or tiny.scorer(tiny.CONFIGS[kind]))
    model = easyaira.load(str(tmp_path), template="plain" if kind == "llama" else "chat")
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    texts = [*pairs, "A text alone", pairs[0]]
    scores = model.score(texts)
    assert scores.shape == (5,) and scores.dtype == np.float32 and scores[0] == scores[4]
    spans = model.template.encode(
        [
            [{"role": "user", "content": q if isinstance(q, str) else q[0]["content"]}]
            + [{"role": "assistant", "content": answer}]
            for q, answer in pairs
        ]
    )
    ids = [np.concatenate([tokens for tokens, _ in row]) for row in spans]
    ids.append(model.template.judged(["A text alone"])[0])
    for tokens, ours in zip(ids, scores, strict=False):
        with torch.no_grad():
            wanted = theirs(torch.tensor(tokens)[None].long()).logits[0, 0]
        np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)
    assert model.score([]).shape == (0,)


@pytest.mark.slow
def test_programs_are_compiled_once_for_all_options_that_they_do_not_depend_on(model):
    def programs(**options):
        model.generate(["x"], max_new_tokens=3, **options)
        return model.sampler(model.sampling(max_new_tokens=3, **options)).programs

    greedy, longer = programs(), model.sampler(model.sampling(max_new_tokens=9)).programs
    stopped = programs(stop_strings=("never",))
    assert greedy.decode is longer.decode is stopped.decode and greedy.admit is longer.admit
    compiled = greedy.prefill._cache_size()
    drawn = programs(temperature=0.5)
    assert drawn.decode is not greedy.decode and drawn.admit is not greedy.admit
    assert drawn.prefill is greedy.prefill and drawn.weights is greedy.weights
    samplers = [model.sampler(model.sampling(temperature=t)) for t in (0, 1)]
    assert model.weights(samplers[0]) is model.weights(samplers[1])
    assert greedy.prefill._cache_size() == compiled
    penalised = programs(repetition_penalty=1.2)  # which has to know the tokens of a prompt
    assert penalised.prefill is not greedy.prefill and penalised.decode is not greedy.decode


def test_options_are_checked_as_the_commands(model):
    for options, message in (
        ({"temperature": -1.0}, "generate: temperature: found -1.0, expected a number from 0"),
        ({"max_new_tokens": 2.5}, "generate: max_new_tokens: found 2.5, expected a whole number"),
        ({"top_k": 3}, "top_k: has no effect on greedy generation; set temperature, too"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: 9 exceeds max_new_tokens, 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate(["x"], **options)


def test_errors_name_the_option_and_the_text(model, folder):
    with pytest.raises(ConfigError, match="^template: no template 'nothing'; choose plain, "):
        easyaira.load(folder, template="nothing")
    with pytest.raises(ConfigError, match="dtype: expected .*, got 'bf16'; did you mean bfloat16"):
        easyaira.load(folder, dtype="bf16")
    for prompts in ([None], ["x", 3]):
        with pytest.raises(DataError, match=r"generate: place \d: wanted text or a list of "):
            model.generate(prompts)
    with pytest.raises(DataError, match=r"score: place 1: wanted a text or \(prompt, answer\), "):
        read_texts("score", ["x", {"prompt": "a", "answer": "b"}])
    with pytest.raises(ConfigError, match="option 'top_q' is unknown; choose from .*top_k"):
        model.generate(["x"], top_q=1)
    with pytest.raises(ConfigError, match="num_samples: 2 answers at temperature 0 are equal"):
        model.generate(["x"], num_samples=2)
    with pytest.raises(ConfigError, match="num_samples: expected a whole number from 1, below 2"):
        model.generate(["x"], num_samples=0)
    for size in (0.5, True):
        with pytest.raises(ConfigError, match="batch_size: expected a whole number from 1, below"):
            model.generate(["x"], batch_size=size)
    for seed in ("x", 2**32):
        with pytest.raises(ConfigError, match="seed: expected a whole number from 0, below 2"):
            model.generate(["x"], seed=seed)
    for stops in (5, {"a": 1}, ["a", None]):
        with pytest.raises(ConfigError, match="generate: stop_strings: found .*, expected texts; "):
            model.generate(["x"], stop_strings=stops)
    with pytest.raises(ConfigError, match="option 'stop' is unknown; it is called stop_strings"):
        model.generate(["x"], stop="a")
    for options, message in (
        ({"template": None}, "template: expected a name or a .jinja file, got None"),
        ({"mesh": 1}, "mesh: expected a text such as dp=1,fsdp=-1,tp=1, got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            easyaira.load(folder, **options)
    for answer in (None, [{"role": "assistant", "content": "b"}], []):
        with pytest.raises(DataError, match="logps: place 1: wanted a text as answer, found "):
            model.logps(["a", "a"], ["b", answer])
    drawn = {
        "num_samples": np.int64(2),
        "batch_size": np.int64(1),
        "seed": np.int64(1),
        "temperature": np.float32(1),
    }
    assert len(model.generate(["x"], **drawn)[0]) == 2
    with pytest.raises(ConfigError, match="load: expected a folder or a hub id, got None"):
        easyaira.load(None)
    with pytest.raises(ConfigError, match="expected a dictionary or a TrainSFT, got None"):
        easyaira.train_sft(None)
    with pytest.raises(ConfigError, match=r"score: expected a list, got one pair; write \[pair\]"):
        read_texts("score", ("Why?", "So."))
    with pytest.raises(DataError, match=r"text 1 has \d+ tokens with its answer, .* 64 positions"):
        model.logps(["x", "x"], ["y", "y " * 200])


def test_no_stop_string_and_a_template_in_a_file(model, folder, tmp_path):
    """As a Path, and with transformers' own default."""
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    own = easyaira.load(folder, template=tmp_path / "own.jinja")
    assert own.generate(["x"], max_new_tokens=2, stop_strings=None)[0]
    answers = model.generate(["x"], max_new_tokens=2, stop_strings=None)
    assert answers == model.generate(["x"], max_new_tokens=2)


def test_training_outside_the_main_thread_is_refused(folder):
    """Its signal handlers raised ValueError."""
    with ThreadPoolExecutor() as threads:
        training = threads.submit(easyaira.train_sft, {})
        with pytest.raises(ConfigError, match="in the main thread only; call it there, or start"):
            training.result()


@pytest.mark.parametrize(
    "name, value",
    [("dry_run", True), ("topology", "v5p:2x2x1"), ("search", True), ("memory", "16GiB")],
)
def test_options_of_planning_are_for_the_command(name, value):
    """They were dropped, and the run began."""
    with pytest.raises(ConfigError, match=f"{name}: is for the command line; give it there as --"):
        easyaira.train_sft({name: value})


USER, ASSISTANT = ({"role": role, "content": role} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([USER, ASSISTANT], "must end in a message to answer"),
        ([ASSISTANT], "must end in a message to answer"),
        ([], "must end in a message to answer"),
        (["x"], r"a message must be {role: ..., content: text}"),
        ([{"role": "user"}], "wanted text as content, found "),
        ([USER | {"tool_calls": [{"name": "f"}]}], "tool calls are not supported"),
    ],
)
def test_prompts_in_python_are_refused_as_those_of_a_file(model, prompt, message):
    """One that ends in an answer was answered as if it did not, and had wrong log-probabilities."""
    for name, call in {
        "generate": lambda: model.generate(["x", prompt]),
        "logps": lambda: model.logps(["x", prompt], ["y", "y"]),
        "score": lambda: read_texts("score", ["x", (prompt, "y")]),
    }.items():
        with pytest.raises(DataError, match=f"^{name}: place 1: {message}"):
            call()


def test_a_prompt_in_parts_is_that_of_their_text(model):
    parts = [{"type": "text", "text": text} for text in ("us", "er")]
    prompts = [[USER], [{"role": "user", "content": parts}], [{"from": "human", "value": "user"}]]
    assert len(set(model.logps(prompts, ["x"] * 3))) == 1


def test_one_prompt_in_place_of_a_list_is_refused(model, tmp_path):
    """Each of its characters was answered."""
    asked = [{"role": "user", "content": "Why"}]
    for call, message in (
        (lambda: model.generate("Why"), r"generate: expected a list, got one text; write \[text\]"),
        (lambda: model.generate(asked), "generate: expected a list, got one conversation; write"),
        (lambda: model.logps(["Why"], "B"), "logps: expected a list, got one text"),
        (lambda: model.logps(["Why", "x"], ["B"]), "logps: found 2 prompts and 1 answers; give"),
        (
            lambda: model.generate(iter(["x"])),
            "generate: expected a list, got an object of type list_iterator",
        ),
        (lambda: model.generate(asked[0]), "generate: expected a list, got an object of type dict"),
        (
            lambda: model.generate(["x", "caf\udce9"]),
            "place 1: wanted text, found a lone surrogate",
        ),
        (lambda: model.logps(["x"], ["\ud83d"]), "logps: place 0: found a lone surrogate at 0; "),
        (
            lambda: model.generate(["x"], stop_strings=[""]),
            r"stop_strings: found \[''\], expected texts",
        ),
    ):
        with pytest.raises(EasyAiraError, match=message):
            call()
    tiny.save(tmp_path, tiny.SCORERS["bert"])
    with pytest.raises(ConfigError, match="score: expected a list, got one text"):
        easyaira.load(str(tmp_path)).score("Why")


def short_run(folder, tmp_path, rows, **options):
    """Configuration of two updates on rows."""
    return {
        "model": {"name_or_path": str(folder)},
        "data": {"train": str(tiny.write_rows(tmp_path / "rows.jsonl", rows)), "template": "plain"},
        "train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "num_samples": 0,
        "export": False,
        "output_dir": str(tmp_path / "run"),
        **options,
    }


@pytest.mark.slow
def test_a_run_in_python(folder, tmp_path):
    config = short_run(folder, tmp_path, tiny.sft_rows(8))
    with pytest.raises(ConfigError, match="data.tran: no such option; did you mean data.train"):
        easyaira.train_sft(config | {"data": {"tran": "x"}})
    paths = {"model": {"name_or_path": folder}, "output_dir": tmp_path / "run"}  # no text
    run = easyaira.train_sft(config | paths)
    assert run.folder == tmp_path / "run"
    assert [row["step"] for row in run.metrics] == [1, 2] and run.metrics[1]["loss"] > 0
    assert len(run.model.generate(["Who?"], max_new_tokens=2)[0][0]) <= 20
    assert run.model.template.text([]) == ""


@pytest.mark.slow
def test_an_on_policy_run_in_python(folder, tmp_path, monkeypatch):
    """Its reward is a function of the script."""

    def short(prompts, completions):
        return [-len(completion) for completion in completions]

    monkeypatch.setattr(sys.modules["__main__"], "short", short, raising=False)
    rows = [{"prompt": f"what do you like {i}?"} for i in range(8)]
    reward = {"reward": "__main__:short", "num_generations": 2, "max_completion_length": 4}
    config = short_run(folder, tmp_path, rows, rl=reward)
    run = easyaira.train_rl(config)
    assert [row["step"] for row in run.metrics] == [1, 2]
    for row in rollouts.read(run.folder / rollouts.COMPLETIONS):
        assert row["reward"] == -len(row["completion"])
    assert run.metrics[0]["reward"] < 0


@pytest.mark.parametrize(
    "kind, scorer",
    [
        *((kind, False) for kind in ("gpt2", "llama", "mixtral", "gemma3")),
        *((kind, True) for kind in ("gpt2", "llama", "bert", "roberta")),
    ],
)
def test_matrices_are_held_in_the_dtype_of_their_use_which_changes_no_bit(kind, scorer, tmp_path):
    encoder = kind not in tiny.CASES
    config = tiny.SCORERS[kind] if encoder else tiny.CASES[kind]
    tiny.save(tmp_path, tiny.scorer(config) if scorer and not encoder else config)
    template = "chat" if encoder else "plain"
    model = easyaira.load(tmp_path, dtype="bfloat16", template=template)
    dtypes = {path: leaf.dtype.name for path, leaf in by_path(model.params).items()}
    for path, dtype in dtypes.items():
        matrix = path.endswith(("/kernel", "/embedding")) and not path.startswith("score/")
        assert dtype == ("bfloat16" if matrix else "float32"), path

    def values():
        return model.score(ANSWERS) if scorer else model.logps(QUESTIONS, ANSWERS)

    held = values()
    with model.model.on(model.mesh):
        model.params = model.origin.load(model.model, model.mesh)
    np.testing.assert_array_equal(held, values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind, mesh", [("gpt2", None), ("llama", None), ("llama", "fsdp=2,tp=2")])
def test_a_sampler_reads_weights_one_by_one(kind, mesh, dtype, tmp_path, devices):
    """As it prepares those that are there."""
    devices(4 if mesh else 1)
    tiny.save(tmp_path, tiny.CASES[kind])
    model = easyaira.load(tmp_path, mesh=mesh, dtype=dtype, template="plain")
    sampler, earlier = model.sampler(model.sampling()), []

    def load(each):
        def noted(path, leaf):
            assert not any(ref() for ref in earlier), path
            if dtype == "bfloat16" and is_matrix(path_of(path)):  # in float32, it may be kept
                earlier.append(weakref.ref(leaf))
            return each(path, leaf)

        return model.origin.load(model.model, model.mesh, each=noted)

    with model.model.on(model.mesh):
        jax.tree.map(
            np.testing.assert_array_equal, sampler.read(load), sampler.weights(model.params)
        )
