"""Signs of illness in DPO runs: each is named, and healthy runs are not accused."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from easyaira.algorithms import reference
from easyaira.algorithms.dpo import AnswerScores, dpo_sums
from easyaira.config.dpo import DPOConfig
from easyaira.data import pairs
from easyaira.data.template import Template
from easyaira.run import health, report
from easyaira.run import signs as run_signs
from easyaira.run.health_facts import Run
from easyaira.run.signs import Signs
from helpers import tiny
from helpers.examples import load
from helpers.runs import train

DOCS = Path(__file__).parents[1] / "docs" / "dpo.md"
START = {
    "loss": 0.6931,
    "rewards/chosen": 0.0,
    "rewards/rejected": 0.0,
    "rewards/margins": 0.0,
    "rewards/accuracies": 0.0,
    "logps/end": -2.0,
    "reference/prefers_chosen": 0.4,
    "reference/prefers_rejected": 0.01,
}
DATA = {
    "train": {
        "kept": 400,
        "noted": {"cut to max_length (keep_start)": 8},
        "answers": {
            "pairs": 400,
            "repeats": 2,
            "chosen longer": 240,
            "rejected longer": 150,
            "chosen tokens": 16000,
            "rejected tokens": 15000,
            "compared": 400,
            "common ends": 50,
        },
    },
    "held out": {"examples": 64, "prompts also trained on": 0},
    "template": "aira",
    "own template": "same",
}
SOUND = {  # metric: from the first update to the last
    "loss": (0.69, 0.45),
    "rewards/chosen": (0.0, -0.3),
    "rewards/rejected": (0.0, -1.0),
    "rewards/margins": (0.0, 0.7),
    "rewards/accuracies": (0.7, 0.85),
    "rewards/longer": (0.5, 0.6),
    "grad_norm": (8.0, 6.0),
    "eval_loss": (0.69, 0.6),
    "eval_rewards/accuracies": (0.6, 0.72),
}


def made(start=(), data=(), answers=(), at=(), **ends):
    """A run of 20 logged updates, each 2 after the other; `at` replaces values of single rows."""
    ends = SOUND | {name.replace("__", "/"): values for name, values in ends.items()}
    rows = [{"step": 0} | START | dict(start)]
    for i in range(20):
        rows.append({"step": 2 * i + 2} | {n: a + (b - a) * i / 19 for n, (a, b) in ends.items()})
    for i, values in dict(at).items():
        rows[i] |= values
    data = DATA | {name: DATA[name] | part for name, part in dict(data).items()}
    data["train"] = data["train"] | {"answers": DATA["train"]["answers"] | dict(answers)}
    return Run(rows, data, beta=0.1, batch=8, warmup=5, planned=40)


ILL = {
    "answers cut": made(data={"train": {"noted": {"cut to max_length (keep_start)": 40}}}),
    "end token unknown": made(start={"logps/end": -8.0}),
    "held-out leaked": made(data={"held out": {"prompts also trained on": 3}}),
    "pairs repeated": made(answers={"repeats": 100}),
    "tails identical": made(answers={"common ends": 390}),
    "length decides": made(answers={"chosen longer": 360, "rejected longer": 30}),
    "labels flipped": made(
        start={"reference/prefers_chosen": 0.28, "reference/prefers_rejected": 0.12}
    ),
    "reference is not the start": made(start={"rewards/chosen": 2.0, "rewards/rejected": 1.0}),
    "rate too low": made(rewards__chosen=(0.0, 0.01), rewards__rejected=(0.0, -0.01)),
    "rate too high": made(
        at={6: {"loss": 0.94}, 9: {"loss": 0.9}, 12: {"loss": 1.1}, 15: {"loss": 0.8}},
        rewards__chosen=(0.0, -1.6),
        rewards__rejected=(0.0, -2.6),
    ),
    "chosen answers fall": made(rewards__chosen=(0.0, -3.0), rewards__rejected=(0.0, -4.0)),
    "accuracy at chance": made(rewards__accuracies=(0.45, 0.52), eval_loss=(0.6, 0.6)),
    "margins explode": made(rewards__margins=(0.0, 4.0), loss=(0.7, 1.9)),
    "gradient spikes": made(at={14: {"grad_norm": 90.0}}),
    "overfitting": made(
        rewards__accuracies=(0.7, 0.99),
        eval_loss=(0.69, 0.8),
        **{"eval_rewards__accuracies": (0.5, 0.6)},
    ),
    "longer preferred": made(rewards__longer=(0.5, 0.9)),
}
OTHER_TEMPLATE = replace(made(), data=DATA | {"own template": "other"})
ILL["other template"] = OTHER_TEMPLATE
TULU_2 = (
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
LIMITS = {sign.name: sign for sign in health.SIGNS}


def test_every_sign_is_tried():
    assert ILL.keys() == LIMITS.keys()


@pytest.mark.parametrize("name", ILL)
def test_each_illness_is_named_alone(name):
    (sentence,) = health.warnings(ILL[name]).values()
    assert list(health.warnings(ILL[name])) == [name]
    assert sentence.endswith(LIMITS[name].do)


def test_metrics_that_are_not_there_or_have_no_value_are_left_out(monkeypatch):
    healthy = made()
    assert health.warnings(replace(healthy, rows=[])) == {}
    monkeypatch.setattr(run_signs, "of_setup", lambda setup, rows: replace(healthy, rows=rows))
    rows = [row | {"mfu": None, "tokens_per_second": None} for row in healthy.rows]
    rows[0] |= {"mfu": 0.5, "tokens_per_second": 100.0}
    assert Signs(None).of(rows) == {}


@pytest.mark.parametrize("name", ILL)
def test_the_limit_decides(name, monkeypatch):
    sign = LIMITS[name]
    lower = ("end token unknown", "rate too low")  # named below the limit
    never = -1e9 if name == "accuracy at chance" else 1e-9 if name in lower else 1e9
    assert sign.seen(ILL[name], sign.limit) and sign.seen(ILL[name], never) is None


@pytest.mark.parametrize(
    "run",
    [
        made(),
        made(loss=(0.69, 0.02), rewards__margins=(0, 6), rewards__rejected=(0, -6)),
        made(loss=(2.78, 2.5), start={"loss": 2.78}),  # ipo
        made(rewards__chosen=(0.0, 0.5)),  # dpo.sft_weight
        made(answers={"chosen longer": 290, "rejected longer": 100}),
        made(at={3: {"loss": 0.9}, 7: {"loss": 0.8}}),  # two hard batches
        made(at={17: {"grad_norm": 14.0}}, grad_norm=(16.0, 0.1)),  # one after solved ones
        replace(made(start={"logps/end": -5.0}), data={}),  # more than two answers to a prompt
        replace(made(), reference=False),
        None,  # no pairs
    ],
)
def test_healthy_runs_are_not_accused(run):
    assert health.warnings(run) == {}


def test_early_curves_are_not_judged():
    for name, run in ILL.items():
        before, early = (health.warnings(replace(run, rows=run.rows[:n])) for n in (1, 6))
        assert early == before, name
    slow = replace(ILL["rate too low"], planned=4000)
    assert health.warnings(slow) == {}  # it has just begun


def test_the_table_of_the_page_is_that_of_the_code():
    page = DOCS.read_text(encoding="utf-8")
    for sign in health.SIGNS:
        limit = f"{sign.limit:g}"
        assert f"| {sign.name} | {sign.when.format(limit)} | {sign.why} | {sign.do} |" in page


def test_the_report_has_them_on_top_and_the_terminal_once(tmp_path):
    run = ILL["gradient spikes"]
    (sentence,) = health.warnings(run).values()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    given = {"title": "toy", "facts": {"model": "tiny"}, "samples": ([], [])}
    seen = report.write(
        tmp_path, **given, signs=lambda rows: health.warnings(replace(run, rows=rows))
    )
    page = (tmp_path / "report.html").read_text()
    heading, shown = "<h2>What looks wrong</h2>", f'<p class="warning">{sentence}.</p>'
    assert page.index(heading) < page.index(shown) < page.index("tiny")
    signs = Signs(None)
    assert list(signs.new(seen)) == [f"warning: {sentence}"] and list(signs.new(seen)) == []
    assert list(signs.new(health.warnings(ILL["answers cut"]))) == []  # told with the data
    report.write(tmp_path, **given)
    assert heading not in (tmp_path / "report.html").read_text()


def test_counts_of_pairs_are_those_of_a_loop(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "yes" * (i + 1) + tail, "rejected": "no" + tail}
        for i, tail in enumerate(
            [".", " and so it is, as ever", ".", " in the end all is the same"]
        )
    ]
    data = load(tiny.write_rows(tmp_path / "a.jsonl", [*rows, rows[0]]), task="pair")
    counts = data.report["train"]["answers"]
    tokens = np.array([np.diff(bounds[1:]) for bounds in data.train.bounds])
    assert counts["pairs"] == counts["compared"] == 5 and counts["repeats"] == 1
    assert counts["chosen longer"] == sum(a > b for a, b in tokens)
    assert counts["rejected longer"] == sum(a < b for a, b in tokens)
    assert [counts[f"{side} tokens"] for side in ("chosen", "rejected")] == tokens.sum(0).tolist()
    assert counts["common ends"] == 2
    weighted = data.train.take(np.arange(5).repeat(2))  # by a weight of 2
    assert pairs.statistics(weighted)["repeats"] == 1


def test_the_share_of_pairs_that_the_reference_finds_wrong(tmp_path):
    rows = [{"prompt": "q", "chosen": "a" * (i + 3), "rejected": "b"} for i in range(4)]
    train = load(tiny.write_rows(tmp_path / "a.jsonl", rows), task="pair").train
    lengths = np.diff(train.bounds[:, 1:])
    per_token = np.array([[-1.0, -2.5], [-3.0, -1.5], [-2.0, -2.9], [-1.0, -1.0]])
    shares = reference.preferences(per_token * lengths, train)
    assert shares == {"reference/prefers_chosen": 0.25, "reference/prefers_rejected": 0.25}


@pytest.mark.parametrize(
    "own, name, wanted",
    [
        (None, "tulu", "none"),
        ("zephyr", "tulu", "other"),
        ("tulu", "tulu", "same"),
        ("tulu", "chat", "same"),
        (TULU_2, "tulu", "same"),  # as published: no start token, other line feeds
        ("{{ raise_exception('no') }}", "tulu", "none"),
    ],
)
def test_another_template_than_the_tokenizers_own_is_seen(own, name, wanted):
    from easyaira.data.chat_templates import TEMPLATES

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATES.get(own, own)
    assert Template(tokenizer, name, "gpt2").own() == wanted


def test_the_share_of_pairs_whose_longer_answer_is_rewarded():
    rng = np.random.default_rng(0)
    logps, ref = rng.normal(-9, 3, (2, 8, 2))
    lengths = rng.integers(1, 4, (8, 2)).astype(float)
    lengths[0] = 2  # equal
    lengths[7] = 0  # an empty place of the last batch
    ones = jnp.ones((8, 2))
    scores = AnswerScores(
        *(jnp.asarray(x, jnp.float32) for x in (logps, lengths, ones, ones, ones))
    )
    total, count = dpo_sums(scores, jnp.asarray(ref, jnp.float32), DPOConfig())["rewards/longer"]
    margins = (logps - ref)[:, 0] - (logps - ref)[:, 1]
    unequal = [i for i in range(7) if lengths[i, 0] != lengths[i, 1]]
    longer_wins = [(margins[i] > 0) == (lengths[i, 0] > lengths[i, 1]) for i in unequal]
    assert (float(total), float(count)) == (sum(longer_wins), len(unequal))


@pytest.mark.slow
def test_a_run_warns_once_before_its_first_update(models, tmp_path, capsys):
    rows = tiny.dpo_rows(20) * 2
    file = tiny.write_rows(tmp_path / "dpo.jsonl", rows)
    options = {"max_steps": 4, "data.eval": 0.2, "eval_steps": 2}
    metrics, _ = train("dpo", models / "gpt2", file, tmp_path / "run", **options)
    printed = capsys.readouterr().out
    assert printed.count("pairs are copies of others") == 1
    assert printed.index("copies of others") < printed.index("step 1:")
    assert "pairs are copies of others" in (tmp_path / "run" / "report.html").read_text()
    assert {"logps/end", "reference/prefers_rejected"} <= metrics[0].keys()
