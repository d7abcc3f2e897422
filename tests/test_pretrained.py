"""A really pretrained Llama (stories260K) on real data, from import to a released folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyaira import train_dpo, train_sft
from easyaira.generation.processors import Sampling
from easyaira.generation.sampler import generate
from easyaira.losses import token_logps
from easyaira.train import log
from helpers import tiny

STORIES = tiny.SHARED / "models/stories260k"
pytestmark = pytest.mark.skipif(not STORIES.exists(), reason="shared data are not here")


@pytest.fixture(scope="module")
def reference():
    return json.loads((STORIES / "reference.json").read_text())["cases"]


@pytest.mark.slow
def test_losses_logits_and_greedy_tokens_are_those_of_pytorch(reference):
    model, params = tiny.load(STORIES)
    for case in reference:
        ids = np.array([case["input_ids"]])
        hidden, head = model.apply(params, tiny.layout(ids))
        out = token_logps.token_logps(hidden, head, jnp.asarray(ids), **model.head_options)
        np.testing.assert_allclose(-out.logps[0, 1:], case["token_nll"], atol=1.1e-5)  # 5 decimals
        assert -out.logps[0, 1:].mean() == pytest.approx(case["mean_nll"], abs=1.1e-5)
        logits = np.asarray(hidden[0, -1] @ head)
        top5 = np.argsort(-logits)[:5]
        assert top5.tolist() == case["last_top5_ids"]
        np.testing.assert_allclose(logits[top5], case["last_top5_logits"], atol=1e-4)
    prompts = [case["input_ids"] for case in reference]
    greedy = generate(model, params, prompts, Sampling(max_new_tokens=40))
    assert [answer.tokens for answer in greedy] == [case["greedy_next_40"] for case in reference]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")  # its 120 updates take longer than their compilation
def test_sft_then_dpo_on_real_data_then_pytorch(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = ["--data.template=plain", "--data.max_length=160", "--data.eval=0.05"]
    common += ["--num_samples=0", "--train_batch_size=8", "--eval_steps=0"]
    train_sft.main(
        [
            f"--model.name_or_path={STORIES}",
            f"--data.train={tiny.SHARED / 'sft/aira1_en.jsonl.gz'}",
            "--max_steps=60",
            "--optimizer.learning_rate=2e-3",
            f"--output_dir={tmp_path / 'sft'}",
            *common,
        ]
    )
    rows = log.read(tmp_path / "sft/metrics.jsonl")
    assert rows[0]["eval_loss"] > 3.5 and rows[-1]["eval_loss"] < 2.5
    train_dpo.main(
        [
            f"--model.name_or_path={tmp_path / 'sft'}",
            f"--data.train={tiny.SHARED / 'preference/truthfulqa_pairs_en.jsonl.gz'}",
            "--max_steps=60",
            "--optimizer.learning_rate=3e-4",
            f"--output_dir={tmp_path / 'dpo'}",
            *common,
        ]
    )
    rows = log.read(tmp_path / "dpo/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert rows[0]["eval_rewards/accuracies"] == 0
    assert rows[-1]["eval_rewards/accuracies"] > 0.7
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dpo/hf", output_loading_info=True
    )
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dpo/hf")
    batch = tokenizer("What is your name?", return_tensors="pt")
    theirs = model.generate(**batch, max_new_tokens=20, do_sample=False)[0].tolist()
    ours, params = tiny.load(tmp_path / "dpo/hf")
    prompt = batch["input_ids"][0].tolist()
    ends = (tokenizer.eos_token_id, 1)
    (answer,) = generate(ours, params, [prompt], Sampling(max_new_tokens=20, end_ids=ends))
    assert theirs[len(prompt) :][: len(answer.content)] == answer.content
    assert jax.tree.leaves(params)[0].dtype == np.float32
