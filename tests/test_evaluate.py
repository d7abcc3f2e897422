"""Evaluation: log-likelihoods, tasks of the harness, scorers, tables."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from easyaira import evaluate, loaded
from easyaira.config.data import Source
from easyaira.data.packing import Shape
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError, DataError, StorageError, WeightsError
from easyaira.evaluation import judges, likelihood, local, results, rewardbench
from easyaira.evaluation.likelihood import Likelihoods, Request
from easyaira.evaluation.results import Result
from helpers import tiny
from helpers.processes import call
from helpers.tasks import text, write_data

pytest.importorskip("lm_eval")
pytestmark = [  # of the harness and what it imports
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ARC = ("arc_challenge", "arc_easy")


LLAMA = tiny.CONFIGS["llama"] | {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder, LLAMA)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("files") / "eval")


@pytest.fixture(scope="module")
def model(folder):
    return loaded.load(str(folder), template="plain")


# Log-likelihoods


def requests_of(rng, positions):
    """Contexts with several continuations, some of one token, some that fill all positions."""
    requests = []
    for i in range(9):
        context = rng.integers(0, tiny.VOCAB, rng.integers(1, positions // 2)).tolist()
        for n in (1, 3, 3, 7, 1)[: i % 5 + 1]:
            requests.append(Request(context, rng.integers(0, tiny.VOCAB, n).tolist()))
    full = rng.integers(0, tiny.VOCAB, positions - 2).tolist()
    return [*requests, *(Request(full, full[i : i + 3]) for i in range(3))]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_likelihoods_are_those_of_transformers(kind, models, devices):
    devices(2)  # rows over both
    model = loaded.load(str(models / kind), template="plain")
    positions = model.model.config.max_positions
    requests = requests_of(np.random.default_rng(0), positions)
    scorer = Likelihoods(model.model, model.params, model.mesh, tokens=256)
    done = []
    likelihoods = scorer(requests, done.append)
    theirs = tiny.torch_model(tiny.CONFIGS[kind])
    for (context, continuation), ours in zip(requests, likelihoods, strict=True):
        ids = torch.tensor([[*context, *continuation[:-1]]])
        with torch.no_grad():
            logps = theirs(ids).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = logps.gather(-1, torch.tensor(continuation)[:, None]).sum().item()
        assert abs(ours.logp - wanted) < 1e-4
        assert ours.greedy == (logps.argmax(-1).tolist() == continuation)
    assert sum(done) == len(requests)


def test_a_shared_context_is_computed_once():
    context = list(range(2, 42))
    requests = [Request(context, [7] * n) for n in (3, 1, 5)]
    (only,) = likelihood.sequenced(requests)
    assert only.members == [0, 1, 2] and only.length == 39 + 3 + 1 + 5
    assert sum(s.length for s in likelihood.sequenced(requests, share=False)) == 3 * 39 + 9
    arrays, places = likelihood.layout(requests, [[only.members]], Shape(1, 56))
    row = {name: array[0] for name, array in arrays.items()}
    assert row["tokens"][:40].tolist() == context
    assert row["positions"][39:48].tolist() == [39, 40, 41, 39, 39, 40, 41, 42, 43]
    assert row["sides"][36:50].tolist() == [0] * 3 + [1] * 3 + [2] + [3] * 5 + [0] * 2
    assert [row["targets"][start:end].tolist() for _, _, start, end in places] == [
        [7] * n for n in (3, 1, 5)
    ]
    assert row["loss_mask"].sum() == 9 and row["segment_ids"].sum() == 48


def test_a_long_list_of_continuations_does_not_make_an_endless_row():
    requests = [Request([5], [6] * 100) for _ in range(20)]
    lengths = [sequence.length for sequence in likelihood.sequenced(requests)]
    assert len(lengths) == 4 and max(lengths) <= likelihood.ROOM


@pytest.mark.parametrize("shards, most", [(1, 1.05), (2, 1.1)])
def test_rows_of_uneven_lengths_hold_little_padding(shards, most, model, devices):
    """Rows as long as the longest sequence held one each: 2.4 positions per token."""
    devices(shards)
    mesh = meshes.make_mesh("dp=-1")
    model_ = replace(model.model, compute=replace(model.model.compute, attention="tiles"))
    lengths = [128] * 50 + [223, 190, 137, 60, 56] * 3
    rows = list(Likelihoods(model_, None, mesh, tokens=4096 // shards).batches(lengths))
    inside = [i for _, group in rows for row in group for i in row]
    assert sorted(inside) == list(range(len(lengths)))
    assert sum(shape.rows * shape.length for shape, _ in rows) < most * sum(lengths)


# Tasks


@pytest.fixture(scope="module")
def harness():
    from easyaira.evaluation import harness

    return harness


@pytest.fixture(scope="module")
def ours(harness, model):
    return harness.EasyAiraLM(
        Likelihoods(model.model, model.params, model.mesh),
        model.tokenizer,
        [model.tokenizer.eos_token_id],
    )


@pytest.fixture(scope="module")
def theirs(folder):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)


def both(harness, ours, theirs, names, data, **options):
    """The results of both for each task."""
    results = [harness.run(lm, harness.load(names, data), **options) for lm in (ours, theirs)]
    for name in names:
        yield name, *(one["samples"][name] for one in results)


def compared(name, ours, theirs):
    """Equal prompts, log-likelihoods within 1e-4, the same choices."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one["arguments"] == other["arguments"]
        for got, wanted in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert abs(got[0] - wanted[0]) < 1e-4, name
            assert got[1] == wanted[1], name
        for metric in one["metrics"]:
            np.testing.assert_allclose(one[metric], other[metric], atol=1e-4)


@pytest.mark.slow
def test_every_local_task_gives_what_the_hf_backend_gives(harness, ours, theirs, data):
    for samples in both(harness, ours, theirs, list(local.LOCAL), data, num_fewshot=3):
        compared(*samples)
    assert ours.truncated > 0  # of LAMBADA


@pytest.mark.slow
def test_on_the_small_pretrained_llama(harness):
    place = tiny.SHARED / "models/stories260k"
    if not place.exists():
        pytest.skip("the shared data is not here")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    model = loaded.load(str(place), template="plain")
    ours = harness.EasyAiraLM(
        Likelihoods(model.model, model.params, model.mesh), model.tokenizer, [2]
    )
    theirs = HFLM(str(place), device="cpu", dtype="float32", batch_size=8)
    names = ["arc_challenge", "lambada_openai"]
    for samples in both(harness, ours, theirs, names, tiny.SHARED, limit=8):
        compared(*samples)


class Asked:
    """A request of the harness."""

    def __init__(self, *args):
        self.args = args


def test_rolling_likelihoods_are_those_of_the_hf_backend(ours, theirs):
    rng = np.random.default_rng(2)
    asked = [Asked(text(rng, n)) for n in (1, 40, 400)]  # the last fills the positions twice
    samples = ours.loglikelihood_rolling(asked)
    np.testing.assert_allclose(samples, theirs.loglikelihood_rolling(asked), rtol=1e-6)


@pytest.mark.slow
def test_generated_answers_are_those_of_the_hf_backend(ours, theirs):
    rng = np.random.default_rng(3)
    options = {"max_gen_toks": 12, "until": ["e", "\n"], "do_sample": False}
    asked = [Asked(text(rng, n), dict(options)) for n in (3, 8, 400)]
    before = ours.truncated
    assert ours.generate_until(asked) == [theirs.generate_until([one])[0] for one in asked]
    assert ours.truncated == before + 1
    with pytest.raises(ConfigError, match="the task sets num_beams"):
        ours.generate_until([Asked("x", {"num_beams": 2, "until": []})])


def test_requests_that_no_model_can_answer_are_refused(ours):
    with pytest.raises(DataError, match="a choice of the task has no tokens: ''"):
        ours.loglikelihood([Asked("a", "")])
    with pytest.raises(DataError, match="a choice of the task has .* 256 positions"):
        ours.loglikelihood([Asked("a", "red " * 300)])


def test_an_error_has_the_unit_of_its_value():
    """A share is shown in percent; a score such as BLEU is not."""
    score = {"better": "higher", "examples": 4, "data": "x", "dtype": "float32"}
    bleu = Result("gen", "bleu_max", {"bleu_max": 12.5}, stderr=0.25, **score)
    share = Result("arc", "acc", {"acc": 0.5}, stderr=0.25, **score)
    rows = [line.split() for line in results.table([bleu, share]).splitlines()]
    assert rows[1][:4] == ["gen", "bleu_max", "12.5", "0.25"]
    assert rows[2][:4] == ["arc", "acc", "50.00", "25.00"]


# The command


def command(*argv):
    evaluate.main([str(word) for word in argv])


def test_the_command_writes_results_and_prints_their_average(folder, data, tmp_path, capsys):
    tasks = "arc_challenge,truthfulqa_mc2"
    options = ("--num_fewshot", 2, "--limit", 4, "--output", tmp_path)
    command(folder, "--tasks", tasks, "--data", data.parent, *options)
    samples = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(samples) == ["arc_challenge-2.json", "truthfulqa_mc2-0.json"]  # fixed at 0 shots
    arc = Result(**samples["arc_challenge-2.json"])
    assert (arc.metric, arc.examples, arc.limit, arc.step) == ("acc_norm", 4, 4, None)
    assert arc.data == "arc_challenge.jsonl.gz" and arc.versions["lm_eval"]
    share = arc.metrics["acc_norm"]
    assert arc.stderr == pytest.approx((share * (1 - share) / 3) ** 0.5)
    mean = 50 * (share + samples["truthfulqa_mc2-0.json"]["metrics"]["acc"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["average", f"{mean:.2f}"]
    assert lines[-3].split()[:4] == ["arc_challenge,", "2-shot", "acc_norm", f"{100 * share:.2f}"]


def test_a_result_of_all_questions_is_named_before_computing(folder, data, tmp_path, monkeypatch):
    """The result is that of the last task. The model is not loaded."""
    whole = Result(
        "truthfulqa_mc2", "acc", {"acc": 0.5}, "higher", 9, "a", "float32", num_fewshot=0
    )
    path = results.write(tmp_path, whole)
    monkeypatch.setattr(loaded, "LoadedModel", None)
    options = ("--data", data.parent, "--limit", 4, "--output", tmp_path, "--num_fewshot", 2)
    with pytest.raises(ConfigError, match=f"--limit: {path} is of all questions and would be"):
        command(folder, "--tasks", "arc_challenge,truthfulqa_mc2", *options)


def test_a_damaged_result_is_named_before_another_replaces_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("")
    with pytest.raises(ConfigError, match=f"{path}: .*; remove it, or set --output"):
        results.check_earlier(path, None, None)


def test_results_of_all_questions_are_not_replaced_by_those_of_a_few(tmp_path):
    whole = Result("a", "acc", {"acc": 0.5}, "higher", 9, "a.jsonl", "float32")
    limited = replace(whole, limit=4, examples=4)
    path = results.write(tmp_path, limited)
    results.write(tmp_path, whole)
    with pytest.raises(ConfigError, match=f"--limit: {path} is of all questions and would be rep"):
        results.write(tmp_path, limited)
    assert json.loads(path.read_text())["limit"] is None
    results.write(tmp_path, whole)


def test_rows_of_one_name_do_not_replace_each_others_result(scorers, tmp_path, capsys):
    """Files in two folders; splits have results of their own."""
    pairs = [{"prompt": f"a {i}?", "chosen": "yes", "rejected": "no no"} for i in range(3)]

    def score(folder, *options):
        file = tiny.write_rows(tmp_path / folder / "rows.jsonl", pairs)
        arguments = [scorers / "gpt2", "--rows", file, "--template", "plain", *options]
        return call(evaluate.main, [*arguments, "--output", tmp_path / "out"], capsys)

    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    assert [score("first")[0] for _ in range(2)] == [0, 0]
    status, _, err = score("second")
    problem = f"{tmp_path / 'out/rows.jsonl.json'}: is of other rows of this name and would be"
    assert status == 2 and problem in err
    assert score("second", "--split", "train")[0] == 0
    assert [r.task for r in results.read(tmp_path / "out")] == ["rows.jsonl/train", "rows.jsonl"]


def test_a_task_of_other_files_does_not_replace_a_result(folder, tmp_path, capsys):
    """Nor do questions of the hub."""
    options = ("--tasks", "arc_easy", "--limit", 2, "--output", tmp_path / "out")
    first, second = (write_data(tmp_path / name) for name in ("first", "second"))
    command(folder, *options, "--data", first)
    path = tmp_path / "out/arc_easy-0.json"
    kept = path.read_bytes()
    with pytest.raises(ConfigError, match=f"^{path}: is of other rows of this name and would be"):
        command(folder, *options, "--data", second)
    assert path.read_bytes() == kept
    command(folder, *options, "--data", first)
    hub = results.digest("allenai/ai2_arc", "ARC-Easy")
    with pytest.raises(ConfigError, match="is of other rows of this name"):
        results.check_earlier(path, 2, hub)


def test_a_place_without_room_for_results_is_named_before_they_are_computed(tmp_path, folder):
    file = tmp_path / "file"
    file.write_text("kept")
    problem = f"{file / 'results'}: {file} is not a folder; set --output"
    with pytest.raises(StorageError, match=problem):
        command(folder, "--tasks", "no_such_task", "--output", file / "results")
    assert file.read_text() == "kept"


def test_an_encoder_has_no_tasks(tmp_path):
    (tmp_path / "bert").mkdir()
    tiny.save(tmp_path / "bert", tiny.SCORERS["bert"])
    with pytest.raises(ConfigError, match="encoder"):
        command(tmp_path / "bert", "--tasks", "arc_easy", "--data", write_data(tmp_path / "eval"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["M"], "give one of --tasks, --rows, --compare; found none"),
        (["--tasks", "arc_easy"], "model: is missing"),
        (["M", "--tasks", "a", "--rows", "b"], "found tasks and rows"),
        (
            ["M", "--tasks", " , "],
            "--tasks: found ' , ', expected names such as arc_challenge,piqa",
        ),
        (["M", "--tasks", "a", "--by", "target"], "--by: has no effect on --tasks"),
        (["M", "--rows", "a", "--num_fewshot", "2"], "--num_fewshot: has no effect on --rows"),
        (["M", "--tasks", "a", "--data", "nowhere"], "data: nowhere: no such folder"),
        (["--compare", "nowhere"], "compare: nowhere has no results; evaluate it first"),
    ],
)
def test_options_that_contradict_each_other(argv, message):
    with pytest.raises(ConfigError, match=message):
        command(*argv)


@pytest.mark.parametrize("file", ["config.json", "config.yaml"])
def test_a_model_without_results_is_not_compared(file, tmp_path):
    """Its own files were taken for damaged results, to be removed."""
    (tmp_path / file).write_text("{}")
    (tmp_path / "data_report.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no results; evaluate it first"):
        command("--compare", str(tmp_path))


def test_an_empty_choice_is_named_with_its_row(tmp_path):
    row = {"query": "Question: what?", "choices": ["a", ""], "gold": 0}
    path = tiny.write_rows(tmp_path / "arc.jsonl", [row])
    with pytest.raises(DataError, match="arc.jsonl:1: .*an empty choice"):
        local.read(path, local.LOCAL["arc_easy"].rows)


@pytest.mark.parametrize(
    "task, row, problem",
    [
        (
            "arc_easy",
            {"query": "x?", "choices": ["a", "b"], "gold": -1},
            "gold is -1, not one of 0, 1",
        ),
        (
            "arc_easy",
            {"query": "x?", "choices": ["a", "b"], "gold": 2},
            "gold is 2, not one of 0, 1",
        ),
        ("toxigen", {"text": "x", "label": 2}, "label is 2, not one of 0, 1"),
        ("toxigen", {"text": "x"}, "it lacks 'label'"),
        (
            "enem_2024",
            {"question": "x", "alternatives": list("abcde"), "label": "F"},
            "label is 'F', n",
        ),
        (
            "pira_mcqa",
            {"text": "x", "alternative": None},
            "alternative is None, not one of A, B, C",
        ),
    ],
)
def test_a_label_that_is_no_choice_is_named_with_its_row(task, row, problem, tmp_path):
    """The last choice was right for -1, and the harness named neither file nor line."""
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=f"rows.jsonl:1: is not a row of this task: .*{problem}"):
        local.read(path, local.LOCAL[task].rows)


@pytest.mark.parametrize(
    "names, message",
    [
        ("arc_challange", "no such task; did you mean arc_challenge?"),
        ("zzz", "with --data, choose from arc_challenge, arc_easy"),
        ("toxigen", "has no toxigen_en.jsonl.gz; name the folder that holds it"),
        ("arc_easy", r"arc_easy.jsonl:1: is not a row of this task: it lacks 'choices'"),
    ],
)
def test_tasks_and_files_that_are_not_there(names, message, folder, tmp_path, monkeypatch):
    task = local.LOCAL["arc_easy"]._replace(file="arc_easy.jsonl")
    monkeypatch.setitem(local.LOCAL, "arc_easy", task)
    tiny.write_rows(tmp_path / "arc_easy.jsonl", [{"query": "Who?", "gold": 1}])
    with pytest.raises((ConfigError, DataError), match=message):
        command(folder, "--tasks", names, "--data", tmp_path)
    assert not (folder / "evaluation").exists()


def test_without_the_harness_the_command_says_what_to_install(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "easyaira.evaluation.harness", raising=False)
    import easyaira.evaluation as package

    monkeypatch.delattr(package, "harness", raising=False)
    with pytest.raises(ConfigError, match="pip install 'lm-eval>="):
        command(folder, "--tasks", "arc_easy")


# Scorers


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    root = tmp_path_factory.mktemp("scorers")
    for kind in ("bert", "gpt2"):
        tiny.save(root / kind, tiny.SCORERS[kind])
    padded = tiny.tokenizer(pad="<|pad|>")
    padded.save_pretrained(root / "gpt2")
    return root


WEBGPT = [
    {
        "question": {"full_text": f"what do you like {i}?"},
        "answer_0": "yes, I like red" if i % 2 else "no",
        "answer_1": "the capital of France",
        "score_0": (-0.5, 0.0, 0.5)[i % 3],
        "score_1": (0.5, 0.0, -0.5)[i % 3],
    }
    for i in range(12)
]


def test_comparisons_are_judged_as_pairs_without_ties(scorers, tmp_path):
    file = tiny.write_rows(tmp_path / "webgpt.jsonl", WEBGPT)
    judged = judges.judge(str(scorers / "bert"), Source(str(file)))
    assert judged.ties == 4 and len(judged.margins) == 8
    pairs = [row for row in WEBGPT if row["score_0"] != row["score_1"]]
    theirs = tiny.torch_model(tiny.SCORERS["bert"])
    tokenizer = tiny.tokenizer_of(tiny.SCORERS["bert"])
    for row, (chosen, rejected) in zip(pairs, judged.scores, strict=True):
        better = int(row["score_1"] > row["score_0"])
        for number, score in ((better, chosen), (1 - better, rejected)):
            parts = [row["question"]["full_text"], row[f"answer_{number}"]]
            ids = [tokenizer.cls_token_id]
            for part in parts:
                ids += [*tokenizer.encode(part, add_special_tokens=False), tokenizer.sep_token_id]
            with torch.no_grad():
                wanted = theirs(torch.tensor([ids])).logits.item()
            assert abs(wanted - score) < 1e-5
    accuracy = judged.metrics()["accuracy"]
    assert judged.metrics() == {"accuracy": (judged.scores[:, 0] > judged.scores[:, 1]).mean()}
    assert 0 <= accuracy <= 1


def test_pairs_of_rewardbench_by_section(scorers, tmp_path, capsys):
    """By the counts of its code: a section is a mean over pairs, in which the 447 of mathematics
    count as 984, as many as those of code; the whole is the mean of the sections."""
    names = ["alpacaeval-easy", "mt-bench-med", "llmbar-natural", "donotanswer", "math-prm"]
    names += ["hep-go", "hep-go", "hep-rust"]
    rows = [row | {"subset": names[i % 8], "id": i} for i, row in enumerate(tiny.dpo_rows(40))]
    file = tiny.write_rows(tmp_path / "bench.jsonl", rows)
    command(scorers / "gpt2", "--rows", file, "--by", "subset", "--template", "plain",
            "--output", tmp_path / "out")  # fmt: skip
    (result,) = results.read(tmp_path / "out")
    source = Source(str(file))
    judged = judges.judge(str(scorers / "gpt2"), source, by="subset", template="plain")
    right, of = judged.margins > 0, np.array(judged.groups)
    weights = np.where(of == "math-prm", 984 / 447, 1.0)
    inside = {
        "Chat": ["alpacaeval-easy", "mt-bench-med"],
        "Chat Hard": ["llmbar-natural"],
        "Safety": ["donotanswer"],
        "Reasoning": ["math-prm", "hep-go", "hep-rust"],
    }
    wanted = {
        name: np.average(right[np.isin(of, own)], weights=weights[np.isin(of, own)])
        for name, own in inside.items()
    }
    wanted["RewardBench"] = np.mean(list(wanted.values()))
    assert result.metrics == pytest.approx(wanted | {"accuracy": right.mean()})
    out = capsys.readouterr().out
    assert re.search(rf"^RewardBench +{100 * wanted['RewardBench']:.2f}$", out, re.M)
    groups = dict(result.groups)
    assert "RewardBench" not in rewardbench.sections({"math-prm": groups["math-prm"]})
    assert rewardbench.sections(groups | {"other": groups["math-prm"]}) == {}


def test_labelled_texts_by_target(scorers, tmp_path, capsys):
    rows = tiny.label_rows(30)
    for i, row in enumerate(rows):
        row["target"] = ["women", "all"][i % 3 > 0]
    file = tiny.write_rows(tmp_path / "hatecheck.jsonl", rows)
    command(scorers / "bert", "--rows", file, "--by", "target", "--output", tmp_path / "out")
    (result,) = results.read(tmp_path / "out")
    judged = judges.judge(str(scorers / "bert"), Source(str(file)), by="target")
    right = np.array([row["label"] for row in rows]) == (judged.scores[:, 0] < 0)
    assert result.metrics["accuracy"] == right.mean()
    first = [i for i, row in enumerate(rows) if row["target"] == "women"]
    assert result.groups["women"] == {"examples": 10, "accuracy": right[first].mean()}
    assert list(result.groups) == ["all", "women"]
    toxic = np.array([bool(row["label"]) for row in rows])
    harmless, harmful = judged.scores[~toxic, 0], judged.scores[toxic, 0]
    auc = (harmless[:, None] > harmful).mean() + (harmless[:, None] == harmful).mean() / 2
    assert result.metrics["auc"] == pytest.approx(auc)
    assert "women" in capsys.readouterr().out
    inverted = judges.judge(str(scorers / "bert"), Source(str(file)), positive_label=1)
    assert inverted.metrics()["auc"] == pytest.approx(1 - auc)


def test_a_decoder_scores_pairs_with_a_shared_prompt(scorers, tmp_path):
    file = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.dpo_rows(10))
    judged = judges.judge(str(scorers / "gpt2"), Source(str(file)), template="plain", limit=7)
    assert judged.scores.shape == (7, 2) and judged.account.read == 7


def test_a_decoder_that_pads_with_its_end_token_scores_before_it(tmp_path):
    """As transformers does, and as best_of and train_rl do."""
    theirs = tiny.save(tmp_path / "gpt2", tiny.SCORERS["gpt2"] | {"pad_token_id": 0})
    tokenizer = tiny.tokenizer()
    file = tiny.write_rows(tmp_path / "pairs.jsonl", rows := tiny.dpo_rows(5))
    judged = judges.judge(str(tmp_path / "gpt2"), Source(str(file)), template="plain")
    for row, (chosen, rejected) in zip(rows, judged.scores, strict=True):
        for name, score in (("chosen", chosen), ("rejected", rejected)):
            ids = tokenizer.encode(row["prompt"]) + tokenizer.encode(row[name]) + [0]
            with torch.no_grad():
                assert abs(theirs(torch.tensor([ids])).logits.item() - score) < 1e-5


@pytest.mark.slow
def test_every_two_answers_are_compared_unless_tied(scorers, tmp_path, capsys):
    """In all three forms; the scores are those of the same answers as pairs."""
    answers = ["yes", "no", "I like red", "the capital of France"]
    numbers = [[4, 1, 4, 2], [1, 2, 3], [5, 5, 5], [2, 1]]  # the third row is a tie
    rows = {"scores": [], "ranks": [], "completions": []}
    pairs = []
    for i, scores in enumerate(numbers):
        ask, own = f"what do you like {i}?", answers[: len(scores)]
        row = {"prompt": ask, "answers": own, "lang": "ab"[i % 2]}
        rows["scores"].append(row | {"scores": scores})
        rows["ranks"].append(row | {"ranks": [5 - score for score in scores]})
        parts = [
            {"response": answer, "overall_score": score}
            for answer, score in zip(own, scores, strict=True)
        ]
        rows["completions"].append({"instruction": ask, "completions": parts, "lang": "ab"[i % 2]})
        pairs += [
            {"prompt": ask, "chosen": own[a], "rejected": own[b]}
            for a in range(len(own))
            for b in range(len(own))
            if scores[a] > scores[b]
        ]
    file = tiny.write_rows(tmp_path / "pairs.jsonl", pairs)
    options = {"template": "plain"}
    wanted = judges.judge(str(scorers / "gpt2"), Source(str(file)), **options)
    assert len(pairs) == 5 + 3 + 1
    for name, form in rows.items():
        file = tiny.write_rows(tmp_path / f"{name}.jsonl", form)
        judged = judges.judge(str(scorers / "gpt2"), Source(str(file)), by="lang", **options)
        np.testing.assert_allclose(sorted(judged.margins), sorted(wanted.margins), atol=1e-5)
        assert judged.metrics() == wanted.metrics() and judged.ties == 1
        assert judged.account.dropped == {"all answers tied": 1}
        assert {name: group["examples"] for name, group in judged.by_group().items()} == {
            "a": 5, "b": 3 + 1,
        }  # fmt: skip
        off = [
            (judged.margins[judged.rows == row] > 0).sum()
            - judged.metrics()["accuracy"] * (judged.rows == row).sum()
            for row in (0, 1, 3)
        ]
        assert judged.stderr() == pytest.approx((1.5 * sum(np.square(off))) ** 0.5 / 9)
    command(scorers / "gpt2", "--rows", file, "--template", "plain", "--output", tmp_path / "out")
    (result,) = results.read(tmp_path / "out")
    assert (result.examples, result.left_out) == (9, {"all answers tied": 1, "tie": 1})


def test_the_error_of_single_comparisons_is_that_of_a_share():
    margins = np.array([1.0, -1, 1, 1])
    judged = judges.Judged(margins, np.arange(4), *[None] * 6)
    assert judged.stderr() == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([{"a": 1}], (), "neither a pair nor a labelled text"),
        ([WEBGPT[1]], (), "every comparison is a tie"),
        (tiny.label_rows(3), ("--by", "topic"), "no column topic, which --by names"),
    ],
)
def test_rows_that_cannot_be_judged(rows, options, message, scorers, tmp_path):
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        command(scorers / "bert", "--rows", file, *options)


def test_a_language_model_has_no_scores(folder, tmp_path):
    file = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.dpo_rows(4))
    with pytest.raises((WeightsError, ConfigError)):
        command(folder, "--rows", file, "--template", "plain")


# Tables


def result(task, value, **kwargs):
    given = {"metric": "acc", "metrics": {"acc": value}, "better": "higher", "examples": 100}
    return Result(**{"task": task, "data": "d", "dtype": "float32"} | given | kwargs)


def test_a_comparison_marks_the_best_and_recomputes_averages(tmp_path, capsys):
    """The figures of the published tables: their averages are truncated, two are wrong."""
    published = {
        "Aira-2-124M-DPO": (24.66, 42.61, 54.79),
        "Aira-2-355M": (27.56, 38.53, 53.19),
        "Aira-2-portuguese-124M": (24.87, 40.60, None),
    }
    for name, values in published.items():
        for task, value in zip(("arc", "truthfulqa", "toxigen"), values, strict=True):
            if value is not None:
                results.write(tmp_path / name / "evaluation", result(task, value / 100))
    command("--compare", *(tmp_path / name for name in published))
    assert capsys.readouterr().out.splitlines() == [
        "| model | average | arc | toxigen | truthfulqa |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| Aira-2-124M-DPO | **40.69** | 24.66 | **54.79** | **42.61** |",
        "| Aira-2-355M | 39.76 | **27.56** | 53.19 | 38.53 |",
        "| Aira-2-portuguese-124M | 32.73 | 24.87 | - | 40.60 |",
    ]


def test_results_of_other_questions_stand_in_another_column():
    lower = {"metric": "perplexity", "metrics": {"perplexity": 12.5}, "better": "lower"}
    table = results.compare(
        {
            "a": [result("arc", 0.5), result("wikitext", 0, **lower)],
            "b": [result("arc", 0.5, examples=50), result("wikitext", 0, **lower | {
                "metrics": {"perplexity": 11.0}})],
        }
    )  # fmt: skip
    assert table.splitlines()[0] == "| model | average | arc, n=100 | wikitext | arc, n=50 |"
    assert table.splitlines()[2] == "| a | **50.00** | **50.00** | 12.5 | - |"
    assert table.splitlines()[3] == "| b | **50.00** | - | **11** | **50.00** |"


def test_results_of_other_rows_of_one_name_and_number_stand_in_another_column():
    """They stood in one, as if the models had answered the same questions."""
    first, second = result("arc", 0.5, content="a1b2c3"), result("arc", 0.25, content="d4e5f6")
    other = result("arc", 0.75, content="a1b2c3", examples=50)
    table = results.compare({"a": [first], "b": [second], "c": [first], "d": [other]})
    assert table.splitlines()[0] == (
        "| model | average | arc, n=100, rows a1b2 | arc, n=100, rows d4e5 | arc, n=50 |"
    )
    assert table.splitlines()[2:5] == [
        "| a | 50.00 | **50.00** | - | - |",
        "| b | 25.00 | - | **25.00** | - |",
        "| c | 50.00 | **50.00** | - | - |",
    ]


def test_equal_rows_have_one_column_wherever_they_lie(scorers, folder, tmp_path, capsys):
    pairs = [{"prompt": f"a {i}?", "chosen": "yes", "rejected": "no no"} for i in range(3)]
    for name, rows in (("one", pairs), ("two", pairs), ("three", pairs[::-1])):
        (tmp_path / name).mkdir()
        file = tiny.write_rows(tmp_path / name / "rows.jsonl", rows)
        data = write_data(tmp_path / name / "tasks")
        options = ("--template", "plain", "--output", tmp_path / name / "results")
        command(scorers / "gpt2", "--rows", file, *options)
        command(folder, "--tasks", "arc_easy", "--data", data, "--limit", 2, *options[2:])
    capsys.readouterr()
    command("--compare", *(tmp_path / name / "results" for name in ("one", "two", "three")))
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert [cell.split(",")[0] for cell in head.strip("| ").split(" | ")[2:]] == [
        "arc_easy",
        "rows.jsonl",
        "rows.jsonl",
    ]
    assert [line.count(" - |") for line in lines] == [1, 1, 1]


def test_rows_with_values_that_json_lacks_are_the_same_rows_again(scorers, tmp_path):
    """An image's text is its place in memory; the same rows stood in two columns."""
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    texts = {"prompt": ["a?"] * 3, "chosen": ["yes"] * 3, "rejected": ["no no"] * 3}
    features = {name: datasets.Value("string") for name in texts} | {"seen": datasets.Image()}
    rows = texts | {"seen": [image.new("RGB", (4, 4)) for _ in range(3)]}
    saved = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    saved.save_to_disk(tmp_path / "saved")

    def content(name):
        options = ("--template", "plain", "--output", tmp_path / name)
        command(scorers / "gpt2", "--rows", tmp_path / "saved", *options)
        (one,) = results.read(tmp_path / name)
        return one.content

    assert content("first") == content("second")


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for wrong in ({"task": "arc"}, asdict(result("arc", 0.5)) | {"content": ["x"]}):
        (tmp_path / "evaluation" / "arc.json").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=r"arc\.json: is not a result of easyaira evaluate"):
            command("--compare", tmp_path)
