"""Signs of reward hacking in the metrics of on-policy runs."""

import json

import pytest

from easyaira.run import closing, report
from easyaira.run.hacking import warnings


def run(**ends):
    """Metrics of ten updates that go in a line from the first value to the second."""
    sound = {
        "reward": (0.2, 1.2),
        "reward_std": (0.4, 0.4),
        "entropy": (1.4, 1.0),
        "completions/mean_length": (30, 36),
        "completions/clipped_ratio": (0.1, 0.15),
        "objective/kl": (0.0, 4.0),
    }
    ends = sound | {name.replace("__", "/"): values for name, values in ends.items()}
    return [
        {"step": i + 1} | {name: a + (b - a) * i / 9 for name, (a, b) in ends.items()}
        for i in range(10)
    ]


@pytest.mark.parametrize(
    "ends, sign",
    [
        ({"entropy": (1.4, 0.1)}, "entropy fell from 1.3 to 0.17 nats a token"),
        ({"completions__mean_length": (30, 60)}, "answers grew from 32 to 58 tokens"),
        ({"objective__kl": (0, 140)}, "the model is 3.7 nats a token away from its reference"),
        ({"completions__clipped_ratio": (0.1, 0.9)}, "86% of the answers are cut, 14% at first"),
    ],
)
def test_each_sign_is_named_while_the_reward_rises(ends, sign):
    (warning,) = warnings(run(**ends)).values()
    assert warning.startswith("The reward rose from 0.256 to 1.14, but " + sign)
    assert "completions.jsonl" in warning
    assert warnings(run(**ends | {"reward": (0.2, 0.25)})) == {}  # no rise, nothing to game
    assert warnings(run(**ends)[:4]) == {}  # too short to say


def evaluated(rewards):
    """Sound rows, among them evaluations with these held-out rewards; that before the first update
    has no other metric."""
    rows = [{"step": 0}, *run()]
    for row, reward in zip(rows[:: len(rows) // len(rewards)], rewards, strict=False):
        row |= {"eval_reward": reward, "eval_reward_std": 0.4}
    return rows


def test_a_held_out_reward_that_falls_is_named():
    (warning,) = warnings(evaluated([0.2, 0.9, 0.6]), prompts=64).values()
    assert warning.startswith(
        "The reward rose from 0.256 to 1.14, but that of held-out prompts fell from 0.9 after "
        "update 3 to 0.6: stop there (load_best_model_at_end"
    )
    assert warnings(evaluated([0.2, 0.9, 0.75]), prompts=64) == {}  # 0.375 deviations
    assert warnings(evaluated([0.2, 0.9, 1.1]), prompts=64) == {}
    assert warnings(evaluated([0.9]), prompts=64) == {}
    # eight prompts: three errors of a difference are 1.5 deviations
    assert warnings(evaluated([0.2, 0.9, 0.4]), prompts=8) == {}
    assert "eval_reward" in warnings(evaluated([0.2, 0.9, 0.2]), prompts=8)
    flat = [row | ({"reward": 0.2} if "reward" in row else {}) for row in evaluated([0.9, 0.1])]
    assert warnings(flat, prompts=64) == {}  # nothing to game


def test_sound_runs_are_not_accused():
    assert warnings(run()) == {}
    assert warnings(run(completions__clipped_ratio=(0.9, 0.95))) == {}  # it was so at first
    without = [{k: v for k, v in row.items() if k != "objective/kl"} for row in run()]
    assert warnings(without) == {}  # rl.beta 0
    assert warnings([{"step": i, "loss": 1.0} for i in range(10)]) == {}  # SFT


def test_all_signs_of_a_gamed_reward():
    """The figures of the run of GRPO in docs/results.md, at updates 5 to 60."""
    rewards = [0.20, 1.22, 4.40, 10.0, 14.5, 15.1, 26.6]
    divergences = [1.3, 8.8, 33, 88, 140, 146, 244]
    entropies = [1.43, 1.41, 1.15, 0.59, 0.12, 0.12, 0.34]
    rows = [
        {
            "reward": reward,
            "reward_std": 0.5,
            "objective/kl": divergence,
            "entropy": entropy,
            "completions/mean_length": 32.0,
        }
        for reward, divergence, entropy in zip(rewards, divergences, entropies, strict=True)
    ]
    entropy, divergence = warnings(rows).values()
    assert "entropy fell" in entropy and "nats a token away" in divergence


def test_the_report_and_the_end_of_the_log_warn(tmp_path):
    rows = run(entropy=(1.4, 0.1))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    report.write(tmp_path, title="toy", facts={}, samples=([], []))
    (warning,) = warnings(rows).values()
    assert f'<p class="warning">{warning}.</p>' in (tmp_path / "report.html").read_text()
    lines = [f"warning: {warning}"]
    after, line, _ = closing.lines(rows, 1.0, None, "runs/toy", scorer=False, warnings=lines)
    assert "reward of answers 0.2 -> 1.2" in after
    assert line == f"warning: {warning}"
