"""Every configuration in configs/: it parses, has the published sizes, updates and schedule, and a
shrunken copy of it trains, is exported, and is read by transformers."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from easyaira import cli, train_dpo, train_rl, train_sft
from easyaira.algorithms.rollouts import rl_algorithm
from easyaira.algorithms.sft import sft_algorithm
from easyaira.config.run import TrainDPO, TrainRL, TrainSFT
from easyaira.data.batches import Batches
from easyaira.data.examples import Examples
from easyaira.data.template import Template
from easyaira.distributed.mesh import make_mesh
from easyaira.errors import ConfigError
from easyaira.export import torch_check
from easyaira.models.registry import model_of
from easyaira.train import optimizer
from easyaira.train.resolve import find
from easyaira.train.setup import prepare, updates
from helpers import tiny

CONFIGS = Path(__file__).parents[1] / "configs"


def gpt2(width, layers, heads):
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads}
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, **sizes}


def opt(width, layers, heads, **settings):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {
        "model_type": "opt", "vocab_size": 50272, "ffn_dim": 4 * width,
        "max_position_embeddings": 2048, "word_embed_proj_dim": width, **sizes, **settings,
    }  # fmt: skip


def bloom(width):
    sizes = {"hidden_size": width, "n_layer": 24, "n_head": 16, "vocab_size": 250_880}
    return {"model_type": "bloom", "seq_length": 2048, **sizes}


def llama(width, inner, layers, heads, kv_heads, positions):
    return {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }  # fmt: skip


# what the published config.json files of the starting models say
GPT2 = gpt2(768, 12, 12)
AIRA = GPT2 | {"vocab_size": 50261}
OPT_350M = opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)
TINYLLAMA = llama(2048, 5632, 22, 32, 4, 2048)
LLAMA_7B = llama(4096, 11008, 32, 32, 32, 4096)
LLAMA_13B = llama(5120, 13824, 40, 40, 40, 4096)
MISTRAL_7B = llama(4096, 14336, 32, 32, 8, 32768) | {
    "model_type": "mistral", "sliding_window": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA_3_8B = llama(4096, 14336, 32, 32, 8, 131_072) | {
    "vocab_size": 128_256, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
SMOLLM2 = llama(2048, 8192, 24, 32, 32, 8192) | {
    "vocab_size": 49_152, "tie_word_embeddings": True, "rope_theta": 130_000,
}  # fmt: skip
SMOLLM3 = llama(2048, 11008, 36, 16, 4, 65_536) | {
    "model_type": "smollm3", "vocab_size": 128_256, "tie_word_embeddings": True, "rope_theta": 5e6,
    "no_rope_layer_interval": 4,
}  # fmt: skip
QWEN3 = llama(1024, 3072, 28, 16, 8, 40_960) | {
    "model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "tie_word_embeddings": True,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
LLAMA_3_1B = LLAMA_3_8B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "tie_word_embeddings": True, "rope_scaling": LLAMA_3_8B["rope_scaling"] | {"factor": 32.0},
}  # fmt: skip
TULU_13B = LLAMA_13B | {"max_position_embeddings": 8192, "rms_norm_eps": 1e-6}


@dataclass(frozen=True)
class Case:
    """A configuration and what was published of it.

    Attributes:
        base: config.json of the starting model.
        rows: of the published data set.
        parameters, updates, warmup, peak: of the run.
        ids: of bos, eos, unk, sep, pad.
        starts: bos tokens in a prompt of one turn.
        controls: control tokens of the tokenizer and their ids, and `length`, its length; default:
            by the kind of the model.
    """

    base: dict
    rows: int
    parameters: int
    updates: int
    warmup: int
    peak: float
    ids: list[int | None] = field(default_factory=list)
    dpo: bool = False
    starts: int = 1
    controls: dict[str, tuple[str, int]] | None = None
    length: int | None = None


GPT2_IDS = [50257, 50258, 50256, 50259, 50260]
BLOOM_CONTROLS = {
    "unk": ("<unk>", 0), "bos": ("<s>", 1), "eos": ("</s>", 2), "pad": ("<pad>", 3),
}  # fmt: skip
OF_BLOOM = {"controls": BLOOM_CONTROLS, "length": 250_680}
BLOOM_IDS = [250680, 250681, 0, 250682, 250683]
LLAMA_3_CONTROLS = {"bos": ("<|begin_of_text|>", 128000), "eos": ("<|end_of_text|>", 128001)}
OF_LLAMA_3 = {"controls": LLAMA_3_CONTROLS, "length": 128_256}
TULU_3_CONTROLS = LLAMA_3_CONTROLS | {"pad": ("<pad>", 128256)}
OF_SMOLLM2 = {
    "controls": {
        "unk": ("<|endoftext|>", 0), "bos": ("<|im_start|>", 1), "eos": ("<|im_end|>", 2),
    },
    "length": 49_152,
    "starts": 2,
}  # fmt: skip
OF_SMOLLM3 = {
    "controls": {"other": ("<|im_start|>", 128_011), "eos": ("<|im_end|>", 128_012)},
    "length": 128_256,
    "starts": 0,
}
OF_QWEN3 = {
    "controls": {
        "pad": ("<|endoftext|>", 151_643), "other": ("<|im_start|>", 151_644),
        "eos": ("<|im_end|>", 151_645),
    },
    "length": 151_669,
    "starts": 0,
}  # fmt: skip
OPT_IDS = [50265, 50266, 50267, 50268, 50269]
TULU = [1, 2, 0, None, None]
CASES = {
    "aira-2-124m": Case(GPT2, 41762, 124_442_880, 6530, 100, 5e-4, GPT2_IDS),
    "aira-2-355m": Case(gpt2(1024, 24, 16), 41762, 354_827_264, 7833, 100, 5e-4, GPT2_IDS),
    "aira-2-774m": Case(gpt2(1280, 36, 20), 41762, 774_035_200, 15663, 100, 5e-4, GPT2_IDS),
    "aira-2-1b5": Case(gpt2(1600, 48, 25), 41762, 1_557_617_600, 31323, 100, 5e-4, GPT2_IDS),
    "aira-2-portuguese-124m": Case(
        GPT2, 40945, 124_442_880, 8535, 100, 5e-4, [50257, 50258, 0, 50259, 50260]
    ),
    "aira-2-portuguese-560m": Case(
        bloom(1024), 40945, 559_013_888, 15357, 100, 5e-4, BLOOM_IDS, **OF_BLOOM
    ),
    "aira-2-portuguese-1b7": Case(
        bloom(2048), 40945, 1_722_007_552, 30711, 100, 5e-4, BLOOM_IDS, **OF_BLOOM
    ),
    "aira-opt-125m": Case(opt(768, 12, 12), 41762, 125_237_760, 6530, 100, 5e-4, OPT_IDS),
    "aira-opt-350m": Case(OPT_350M, 41762, 331_195_392, 7833, 100, 1e-4, OPT_IDS),
    "aira-opt-1b3": Case(opt(2048, 24, 32), 41762, 1_315_753_984, 31323, 100, 5e-5, OPT_IDS),
    "aira-2-1b1": Case(
        TINYLLAMA, 41762, 1_100_068_864, 31323, 100, 5e-4, [32000, 32001, 32002, 32003, 32004]
    ),
    "aira-2-124m-dpo": Case(AIRA, 35000, 124_442_880, 4375, 100, 5e-5, GPT2_IDS, dpo=True),
    "aira-2-portuguese-124m-dpo": Case(
        AIRA, 35000, 124_442_880, 2400, 100, 1e-5, [50257, 50258, 0, 50259, 50260], dpo=True
    ),
    "tulu-2-sft-7b": Case(LLAMA_7B, 326_154, 6_738_415_616, 5096, 153, 2e-5, TULU),
    "tulu-2-sft-13b": Case(LLAMA_13B, 326_154, 13_015_864_320, 5096, 153, 2e-5, TULU),
    "tulu-2.5-dpo-13b-uf-overall": Case(
        TULU_13B, 58_933, 13_015_864_320, 5523, 553, 5e-7, TULU, dpo=True
    ),
    "zephyr-7b-sft": Case(MISTRAL_7B, 207_865, 7_241_732_096, 1624, 163, 2e-5, TULU),
    "zephyr-7b-dpo": Case(MISTRAL_7B, 61_135, 7_241_732_096, 478, 48, 5e-7, TULU, dpo=True),
    "tulu-3-8b-sft": Case(
        LLAMA_3_8B,
        939_343,
        8_030_261_248,
        14_678,
        441,
        5e-6,
        [128000, 128001, None, None, None],
        **OF_LLAMA_3,
    ),
    "tulu-3-8b-dpo": Case(
        LLAMA_3_8B | {"vocab_size": 128_264},
        271_409,
        8_030_326_784,
        2121,
        213,
        5e-7,
        [128000, 128001, None, None, 128256],
        dpo=True,
        controls=TULU_3_CONTROLS,
        length=128_257,
    ),
    "smollm2-1.7b-dpo": Case(
        SMOLLM2,
        61_135,
        1_711_376_384,
        1434,
        144,
        1e-6,
        [1, 2, 0, None, None],
        dpo=True,
        **OF_SMOLLM2,
    ),
    "smollm3-3b-apo": Case(
        SMOLLM3,
        115_250 + 54_096,
        3_075_098_624,
        5293,
        530,
        1e-6,
        [None, 128_012, None, None, None],
        dpo=True,
        **OF_SMOLLM3,
    ),
    "qwen3-0.6b-dpo": Case(
        QWEN3,
        62_100,
        596_049_920,
        1000,
        0,
        5e-7,
        [None, 151_645, None, None, 151_643],
        dpo=True,
        **OF_QWEN3,
    ),
}


def encoder(kind, vocabulary, **settings):
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
        "pad_token_id": 0, **settings,
    }  # fmt: skip


BERT, BERTIMBAU = encoder("bert", 28996), encoder("bert", 29794)
ROBERTA = encoder(
    "roberta", 50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
    layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
REWARD = {
    "aira-reward": Case(BERT, 35000, 108_311_041, 1200, 0, 5e-5),
    "aira-reward-pt": Case(BERTIMBAU, 35000, 108_923_905, 1200, 0, 5e-5),
    "aira-toxicity": Case(ROBERTA, 41843, 124_646_401, 1000, 0, 5e-5),
    "aira-toxicity-pt": Case(BERTIMBAU, 28103, 108_923_905, 1000, 0, 5e-5),
}
RL = {
    "tulu-2.5-ppo-13b": Case(TULU_13B, 60_908, 13_015_864_320, 944, 95, 1e-6, TULU),
    "aira-2-124m-rl": Case(AIRA, 41762, 124_442_880, 652, 66, 5e-6, GPT2_IDS),
}
BACKWARD = Case(LLAMA_7B, 9846, 6_738_415_616, 616, 19, 1e-4)
ALPACA = Case(LLAMA_3_1B, 50_000, 1_235_814_400, 1563, 10, 2e-4, **OF_LLAMA_3)  # rows: any number
LORA = {  # with the trainable parameters, the adapted matrices of a layer, and the scale
    "backward-llama-2-7b": (BACKWARD, 8_388_608, 4, 4),
    "llama-3.2-1b-lora": (ALPACA, 11_272_192, 7, 2),
}


def tokenizer_of(case, name, length=None):
    """A byte-level tokenizer as long as the published one, with its control tokens at their ids."""
    kind = case.base["model_type"]
    if kind in ("bert", "roberta"):
        controls, length = {"cls": "[CLS]", "pad": "[PAD]", "sep": "[SEP]"}, length or 1000
        places = [2, case.base["pad_token_id"], 3]
    elif case.controls and length is None:
        controls = {key: token for key, (token, _) in case.controls.items()}
        places, length = [place for _, place in case.controls.values()], case.length
    elif kind in ("llama", "mistral", "smollm3", "qwen3"):
        controls, length = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, length or 32000
        places = [0, 1, 2]
    elif kind == "opt":
        controls, length = {"pad": "<pad>", "bos": "</s>"}, length or 50265
        places = [1, 2]
    elif kind == "bloom":
        controls, places = {key: token for key, (token, _) in case.controls.items()}, range(4)
    else:
        controls, length = {"bos": "<|endoftext|>"}, length or 50257
        places = [0 if "portuguese" in name else length - 1]
    words = pre_tokenizers.ByteLevel.alphabet() + [f"\u0394{i}" for i in range(length)]
    at = dict(zip(places, controls.values(), strict=True))
    rest = iter(words)
    vocabulary = {at.get(i) or next(rest): i for i in range(length)}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    if "cls" in controls:
        names = ("[CLS]", "[SEP]")
        fast.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in names]
        )
    elif kind not in ("gpt2", "bloom") and "bos" in controls:
        bos = controls["bos"]  # these put a start token in front of a text
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    named = {f"{key}_token": value for key, value in controls.items()}
    if "other" in controls:
        named["additional_special_tokens"] = [named.pop("other_token")]
    if kind in ("gpt2", "opt"):
        named |= {"eos_token": controls["bos"], "unk_token": controls["bos"]}
    return PreTrainedTokenizerFast(tokenizer_object=fast, **named)


def folder_of(case, name, folder, shrunk=False):
    """The starting model as a folder without weights."""
    base, length = dict(case.base), None
    if shrunk:
        layers = "n_layer" if "n_layer" in base else "num_hidden_layers"
        width = "n_embd" if "n_embd" in base else "hidden_size"
        ratio = base.get("num_attention_heads", 4) // base.get("num_key_value_heads", 4) or 1
        heads = "n_head" if "n_head" in base else "num_attention_heads"
        base |= {layers: 2, width: 16, heads: 4}
        base |= {k: 24 for k in ("intermediate_size", "ffn_dim") if k in base}
        base |= {"num_key_value_heads": max(1, 4 // ratio)} if "num_key_value_heads" in base else {}
        if "word_embed_proj_dim" in base:
            narrow = case.base["word_embed_proj_dim"] < case.base["hidden_size"]
            base["word_embed_proj_dim"] = 8 if narrow else 16
        length = 300
        base["vocab_size"] = 307 if base["model_type"] == "opt" else 300
    tokenizer = tokenizer_of(case, name, length)
    if case.base is AIRA:
        Template(tokenizer, "aira", "gpt2")  # adds its tokens: the start has them
        base["vocab_size"] = len(tokenizer)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(base))
    tokenizer.save_pretrained(folder)
    return folder


def argv_of(name, folder, *flags):
    return [
        f"--config={CONFIGS / name}.yaml", f"--model.name_or_path={folder}",
        "--model.init=random", *flags,
    ]  # fmt: skip


def examples(count):
    """So many, of which nothing else is known."""
    return Examples(*[np.zeros((count, 3), np.int64)] * len(fields(Examples)))


def test_every_configuration_has_its_case():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        *CASES,
        *REWARD,
        *RL,
        *LORA,
        "humpback-llama-2-7b",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sizes_updates_and_schedule_are_the_published_ones(name, tmp_path):
    case = CASES[name]
    kind = TrainDPO if case.dpo else TrainSFT
    argv = argv_of(name, folder_of(case, name, tmp_path / "base"), "--mesh=fsdp=-1")
    config, _ = cli.parse(kind, argv)
    assert config.output_dir == f"runs/{name}" and config.data.eval is None
    resolved = find(config, make_mesh(config.mesh))
    assert resolved.model.parameter_count() == case.parameters
    t = resolved.tokenizer
    ids = [t.bos_token_id, t.eos_token_id, t.unk_token_id, t.sep_token_id, t.pad_token_id]
    assert ids == case.ids
    prompt = resolved.template.prompt([{"role": "user", "content": "Hi"}]).tolist()
    assert prompt.count(case.ids[0]) == case.starts
    assert prompt[0] == case.ids[0] or not case.starts
    epoch = len(
        Batches(examples(case.rows), config.train_batch_size, drop_last=config.data.drop_last)
    )
    total = updates(config, epoch)
    assert (total, optimizer.warmup_steps(config.optimizer, total)) == (case.updates, case.warmup)
    schedule = optimizer.make_schedule(config.optimizer, total)
    rates = [float(schedule(step)) for step in (0, case.warmup, total)]
    first, last = case.peak * (not case.warmup), case.peak * config.optimizer.min_lr_rate
    np.testing.assert_allclose(rates, [first, case.peak, last], atol=1e-12, rtol=1e-6)
    assert max(float(schedule(step)) for step in range(0, total, 97)) <= case.peak * (1 + 1e-6)
    assert resolved.max_length == config.data.max_length


def test_the_schedule_of_aira_2_124m_at_its_published_points(tmp_path):
    case = CASES["aira-2-124m"]
    folder = folder_of(case, "aira-2-124m", tmp_path / "base")
    config, _ = cli.parse(TrainSFT, argv_of("aira-2-124m", folder))
    schedule = optimizer.make_schedule(config.optimizer, 6530)
    rates = [float(schedule(step)) for step in (0, 50, 100, 3315, 6530)]
    np.testing.assert_allclose(rates, [0, 2.5e-4, 5e-4, 2.5e-4, 0], atol=1e-9)


@pytest.mark.parametrize(
    "vocabulary, parameters", [(50259, 124_441_344), (50261, 124_442_880), (50262, 124_443_648)]
)
def test_the_three_published_sizes_of_aira_2_124m_are_those_of_three_vocabularies(
    vocabulary, parameters
):
    """The card's, the released checkpoint's, and the published script's."""
    model = model_of(GPT2 | {"vocab_size": vocabulary}, "here")
    assert model.parameter_count() == parameters


def rows_of(name, case):
    """Rows in the columns of the published data."""
    if name.startswith("tulu"):
        ask = {"role": "user", "content": "what do you like?"}
        say = [{"role": "assistant", "content": text} for text in ("red", "blue and red")]
        if case.dpo:
            rows = [{"chosen": [ask, say[i % 2]], "rejected": [ask, say[1 - i % 2]], "source": "x"}
                    for i in range(24)]  # fmt: skip
        else:
            rows = [{"dataset": "x", "id": str(i), "messages": [ask, say[i % 2], ask, say[0]]}
                    for i in range(24)]  # fmt: skip
        return rows
    if case.dpo:
        names = ("instruction", "chosen_response", "rejected_response")
        return [dict(zip(names, row.values(), strict=True)) for row in tiny.dpo_rows(24)]
    return tiny.sft_rows(24)


# one of each kind; the others are the same when they are shrunk, but for figures of the optimizer
SHRUNK = """
    aira-2-124m aira-opt-350m aira-2-1b1 aira-2-124m-dpo tulu-2-sft-7b tulu-2.5-dpo-13b-uf-overall
    aira-2-portuguese-560m
""".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRUNK)
def test_a_shrunken_copy_trains_and_is_read_by_transformers(name, tmp_path, monkeypatch):
    case = CASES[name]
    skipped = {"compared": False, "why": "this test compares"}  # in one process, which is quicker
    monkeypatch.setattr(torch_check, "compare_logits", lambda *_: skipped)
    data = tiny.write_rows(tmp_path / "data.jsonl", rows_of(name, case))
    argv = argv_of(
        name, folder_of(case, name, tmp_path / "base", shrunk=True), f"--data.train={data}",
        "--data.split=train", "--max_steps=3", "--optimizer.warmup_ratio=0",
        "--optimizer.warmup_steps=1", "--train_batch_size=8", "--num_samples=0",
        "--logging_steps=1", "--mesh=fsdp=-1", f"--output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    cli.run_command(train_dpo.main if case.dpo else train_sft.main, argv)
    out = tmp_path / "run/hf"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 + case.dpo and np.isfinite(losses).all()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = [getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad", "sep", "unk")]
    for hf_config in (model.config, model.generation_config):
        assert [hf_config.bos_token_id, hf_config.eos_token_id, hf_config.pad_token_id] == ids[:3]
    assert model.config.vocab_size == len(tokenizer)
    ours, params = tiny.load(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    hidden, head = jax.jit(ours.apply)(params, tiny.layout(tokens.numpy()))
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()
    np.testing.assert_allclose((hidden @ head)[..., : ours.vocab_size], theirs, atol=1e-5)
    if name.startswith("aira"):
        g = model.generation_config
        assert (g.do_sample, g.temperature, g.top_k, g.top_p) == (True, 0.3, 30, 0.3)
        assert (g.repetition_penalty, g.max_new_tokens) == (1.2, 512)
        assert g.renormalize_logits is True
    if name.startswith("tulu-2-sft"):
        assert model.config.max_position_embeddings == 8192


def test_only_rotary_positions_can_be_other_than_stored(tmp_path):
    case = CASES["aira-2-124m"]
    folder = folder_of(case, "aira-2-124m", tmp_path / "base", shrunk=True)
    argv = argv_of("aira-2-124m", folder, "--model.max_positions=2048")
    with pytest.raises(ConfigError, match="has no others than its 1024"):
        find(cli.parse(TrainSFT, argv)[0], make_mesh("fsdp=-1"))


def run_usage(folder):
    """What the model card says how to use the model."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('"path/to/this/folder"', repr(str(folder))), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARD)
def test_reward_models_have_the_published_sizes_and_train(name, tmp_path, monkeypatch):
    from easyaira import train_reward
    from easyaira.config.run import TrainReward

    case = REWARD[name]
    argv = argv_of(name, folder_of(case, name, tmp_path / "base"), "--mesh=fsdp=-1")
    config, _ = cli.parse(TrainReward, argv)
    resolved = find(config, make_mesh(config.mesh), scorer=True)
    assert resolved.model.parameter_count() == case.parameters
    assert resolved.max_length == (config.data.max_length or 512)
    assert (updates(config, 1), config.output_dir) == (case.updates, f"runs/{name}")
    schedule = optimizer.make_schedule(config.optimizer, case.updates)
    rates = [float(schedule(step)) for step in (0, case.updates // 2, case.updates)]
    np.testing.assert_allclose(rates, [5e-5, 2.5e-5, 0], atol=1e-12)
    if name.endswith("-pt"):  # when they are shrunk, they are the same as the English ones
        return

    skipped = {"compared": False, "why": "this test compares"}
    monkeypatch.setattr(torch_check, "compare_logits", lambda *_: skipped)
    names = ("instruction", "chosen_response", "rejected_response")
    rows = [dict(zip(names, row.values(), strict=True)) for row in tiny.dpo_rows(24)]
    if "toxicity" in name:
        rows = [{"harmless": r["chosen_response"] + str(i), "harmful": r["rejected_response"]}
                for i, r in enumerate(rows)]  # fmt: skip
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    argv = argv_of(
        name, folder_of(case, name, tmp_path / "small", shrunk=True), f"--data.train={data}",
        "--data.split=train", "--max_steps=3", "--train_batch_size=8", "--logging_steps=1",
        "--mesh=fsdp=-1", f"--output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    cli.run_command(train_reward.main, argv)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/hf")
    assert model.num_labels == 1 and model.config.id2label == {0: "REWARD"}
    run_usage(tmp_path / "run/hf")


def test_humpback_has_the_published_schedule(tmp_path):
    name, case = "humpback-llama-2-7b", BACKWARD
    argv = argv_of(name, folder_of(case, name, tmp_path / "base"), "--mesh=fsdp=-1")
    config, _ = cli.parse(TrainSFT, argv)
    resolved = find(config, make_mesh(config.mesh))
    assert resolved.model.parameter_count() == case.parameters
    total = updates(config, len(Batches(examples(3200), config.train_batch_size)))
    schedule = optimizer.make_schedule(config.optimizer, total)
    assert total == 500 and {float(schedule(n)) for n in (0, 250, 500)} == {1e-5}
    assert config.optimizer.weight_decay == config.model.dropout == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", RL)
def test_on_policy_runs_have_their_sizes_and_train(name, tmp_path, monkeypatch):
    case = RL[name]
    argv = argv_of(name, folder_of(case, name, tmp_path / "base"), "--mesh=fsdp=-1")
    config, _ = cli.parse(TrainRL, argv)
    assert config.output_dir == f"runs/{name}"
    resolved = find(config, make_mesh(config.mesh))
    assert resolved.model.parameter_count() == case.parameters
    prompts = config.answers // config.rl.answers_per_prompt
    total = updates(config, case.rows // prompts * config.cycle)
    assert (total, optimizer.warmup_steps(config.optimizer, total)) == (case.updates, case.warmup)
    schedule = optimizer.make_schedule(config.optimizer, total)
    rates = [float(schedule(step)) for step in (0, case.warmup, total)]
    np.testing.assert_allclose(rates, [0, case.peak, case.peak], atol=1e-12, rtol=1e-6)

    skipped = {"compared": False, "why": "this test compares"}
    monkeypatch.setattr(torch_check, "compare_logits", lambda *_: skipped)
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"prompt": f"what {i}?"} for i in range(24)])
    argv = argv_of(
        name, folder_of(case, name, tmp_path / "small", shrunk=True), f"--data.train={data}",
        "--data.split=train", "--max_steps=3", "--train_batch_size=8", "--num_samples=0",
        "--rl.generation_batch_size=16", "--rl.max_completion_length=8", "--rl.value_model=null",
        "--rl.reward=easyaira.rewards.rules:concise", "--logging_steps=1", "--mesh=fsdp=-1",
        f"--output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    if name == "aira-2-124m-rl":  # a shrunken copy is trained as the other is
        config, _ = cli.parse(TrainRL, argv)
        assert len(prepare(config, rl_algorithm(config)).data.train) == 24
        return
    cli.run_command(train_rl.main, argv)
    value = AutoModelForTokenClassification.from_pretrained(tmp_path / "run/value")
    assert value.num_labels == 1 and value.config.id2label == {0: "value"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf")


@pytest.mark.slow
@pytest.mark.parametrize("name", LORA)
def test_adapters_have_the_published_sizes_and_train(name, tmp_path, monkeypatch):
    from easyaira.lora.adapter import adapter_of

    case, trainable, matrices, scale = LORA[name]
    argv = [
        f"--config={CONFIGS / name}.yaml",
        f"--model.name_or_path={folder_of(case, name, tmp_path / 'base')}", "--mesh=fsdp=-1",
    ]  # fmt: skip
    config, _ = cli.parse(TrainSFT, argv)
    model = model_of(case.base, "here")
    adapter = adapter_of(config.lora, model)
    shapes = jax.tree.leaves(jax.eval_shape(adapter.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in shapes) == trainable
    assert {*adapter.scales.values()} == {scale}
    assert model.parameter_count() == case.parameters
    total = updates(config, len(Batches(examples(case.rows), config.train_batch_size)))
    assert (total, optimizer.warmup_steps(config.optimizer, total)) == (case.updates, case.warmup)

    skipped = {"compared": False, "why": "this test compares"}
    monkeypatch.setattr(torch_check, "compare_logits", lambda *_, **__: skipped)
    folder = folder_of(case, name, tmp_path / "small", shrunk=True)
    tiny.torch_model(json.loads((folder / "config.json").read_text())).save_pretrained(folder)
    rows = [{"text": f"### Human: what {i}?### Assistant: yes"} for i in range(24)]
    if case is ALPACA:
        rows = [{"instruction": "what", "input": f"{i}?", "output": "yes"} for i in range(24)]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    argv = [
        argv[0], f"--model.name_or_path={folder}", f"--data.train={data}", "--mesh=fsdp=-1",
        "--max_steps=3", "--train_batch_size=8", "--num_samples=0",
        "--optimizer.warmup_ratio=0", "--optimizer.warmup_steps=1",
        f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    if case is ALPACA:  # a shrunken copy is trained as the other is
        config, _ = cli.parse(TrainSFT, argv)
        setup = prepare(config, sft_algorithm(config))
        assert len(setup.data.train) == 24 and len(setup.adapter.targets) == matrices
        return
    cli.run_command(train_sft.main, argv)
    peft = pytest.importorskip("peft")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/hf")
    trained = [p for n, p in loaded.named_parameters() if "lora_B" in n]
    assert len(trained) == 2 * matrices and all(p.abs().sum() > 0 for p in trained)
    run_usage(tmp_path / "run/hf")
