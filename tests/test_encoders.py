"""Scorers against transformers: encoders and decoders with one number for a text."""

import json
import warnings
from copy import deepcopy
from functools import cache, partial

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from easyaira import convert
from easyaira.distributed.mesh import make_mesh
from easyaira.errors import ConfigError, WeightsError
from easyaira.models.registry import MODELS, model_of
from easyaira.storage.pretrained import Pretrained
from helpers import tiny

CASES = {
    **tiny.SCORERS,
    "bert-eps-relu-types": tiny.SCORERS["bert"]
    | {"layer_norm_eps": 1e-2, "hidden_act": "relu", "type_vocab_size": 3},
    "bert-tanh-gelu": tiny.SCORERS["bert"] | {"hidden_act": "gelu_new"},
    "roberta-pad-5": tiny.SCORERS["roberta"] | {"pad_token_id": 5, "type_vocab_size": 2},
    "opt-350m": tiny.SCORERS["opt"]
    | {"do_layer_norm_before": False, "word_embed_proj_dim": 8, "activation_function": "gelu"},
    **{kind: tiny.scorer(config) for kind, config in tiny.FAMILIES.items()},
    "llama-tied": tiny.SCORERS["llama"] | {"tie_word_embeddings": True},
}
ENCODERS = [case for case, config in CASES.items() if MODELS[config["model_type"]].encoder]
LENGTHS = (12, 9, 5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny.loaded_once(tmp_path_factory, CASES)


@pytest.fixture(scope="module")
def value_and_grad(loaded):
    """Gradient of the weighted sum of three texts' scores, and the scores; compiled once a case."""

    @cache
    def compiled(case):
        _, model, _ = loaded(case)

        def total(params, batch, weights):
            scores, exists = model.score(params, batch, examples=3, answers=1)
            assert scores.shape == exists.shape == (3, 1)
            return (scores[:, 0] * weights).sum(), (scores, exists)

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    return compiled


def texts(lengths=LENGTHS, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(6, tiny.VOCAB, n) for n in lengths]


def padded(rows, side, pad):
    """Tokens, which are real, and each token's place in its text."""
    width = max(map(len, rows)) + 2 * (side != "none")
    tokens, real = np.full((len(rows), width), pad), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(len(row))
        tokens[i, at], real[i, at] = row, True
    return tokens, real, np.maximum(real.cumsum(1) - 1, 0)


def their_scores(theirs, tokens, real, positions):
    """As the class computes them. An encoder's reads the first column, also where it is padding, so
    with padding in front its own parts are called one by one."""
    kind = theirs.config.model_type
    known = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real).long()}
    if kind != "roberta":  # which counts what is not its padding token
        known["position_ids"] = torch.tensor(positions)
    if real[:, 0].all() or kind not in ("bert", "roberta"):
        return theirs(**known).logits[:, 0]
    hidden = getattr(theirs, kind)(**known).last_hidden_state
    first = hidden[torch.arange(len(tokens)), torch.tensor(real.argmax(1))][:, None]
    return theirs.classifier(theirs.bert.pooler(first) if kind == "bert" else first)[:, 0]


def test_every_architecture_is_covered():
    assert {case["model_type"] for case in CASES.values()} == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, side",
    [(case, "none") for case in CASES]
    + [(case, side) for case in [*tiny.SCORERS, "roberta-pad-5"] for side in ("left", "right")],
)
def test_scores_and_gradients(case, side, loaded, value_and_grad, request):
    if case.startswith("gemma"):  # whose gradients amplify rounding; optimized code rounds less
        request.getfixturevalue("optimized")
    theirs, model, params = loaded(case)
    if side == "none":  # in float32 theirs is off by more than ours; with padding float64 gives NaN
        theirs = deepcopy(theirs).double()
    # texts of seed 1 amplify rounding in Gemma 3, PyTorch's in float32, too
    rows = texts((12, 12, 12), seed=3) if side == "none" else texts((10, 9, 5))
    tokens, real, positions = padded(rows, side, CASES[case]["pad_token_id"])
    weights = np.array([0.3, -1.2, 0.7], np.float32)

    wanted = their_scores(theirs, tokens, real, positions)
    theirs.zero_grad()
    (wanted * torch.tensor(weights)).sum().backward()

    segments = real * np.arange(1, 4)[:, None]
    batch = tiny.layout(tokens, segment_ids=segments, positions=positions)
    (_, (scores, exists)), grads = value_and_grad(case)(params, batch, weights)
    wanted = wanted.detach().numpy()
    assert exists.all()
    assert np.abs(scores[:, 0] - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1)
    grads = tiny.as_theirs(model, grads)
    for name, wanted in tiny.gradients(theirs).items():
        difference = np.abs(grads.pop(name) - wanted).max()
        assert difference <= 1e-5 * max(np.abs(wanted).max(), 1), name
    assert not grads


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ENCODERS, *tiny.ATTENTION])
def test_packed_side_by_side_each_scores_as_alone(case, loaded):
    """Two pairs and a single side of a third: in two rows, between padding."""
    _, model, params = loaded(case)
    rows = texts((7, 4, 3, 8, 5))
    of = [(1, 1), (1, 2), (2, 2), (2, 1), (3, 1)]  # example, side

    tokens, segments, sides, positions = np.zeros((4, 2, 14), int)
    corners = [(0, 0), (0, 7), (0, 11), (1, 1), (1, 9)]
    for (row, start), text, (segment, side) in zip(corners, rows, of, strict=True):
        place = (row, slice(start, start + len(text)))
        tokens[place], segments[place], sides[place] = text, segment, side
        positions[place] = np.arange(len(text))
    batch = tiny.layout(tokens, segment_ids=segments, sides=sides, positions=positions)
    score = jax.jit(partial(model.score, examples=4, answers=2))
    scores, exists = map(np.asarray, score(params, batch))

    def alone(text):
        tokens, real = np.zeros((2, 2, 14), int)
        tokens[0, : len(text)], real[0, : len(text)] = text, 1
        return np.asarray(score(params, tiny.layout(tokens, segment_ids=real, sides=real))[0])[0, 0]

    wanted = [alone(rows[i]) for i in (0, 1, 3, 2, 4)]
    np.testing.assert_allclose(scores.ravel()[:5], wanted, atol=1e-5, rtol=1e-5)
    assert exists.ravel().tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("case", ["bert", "gpt2"])
def test_scores_of_rows_divided_over_devices(case, tmp_path, devices):
    """Examples lie in the rows of their own device; the last example does not exist."""
    tiny.save(tmp_path, CASES[case])
    model, params = tiny.load(tmp_path)
    tokens, real, positions = padded(texts((5, 7, 3, 6, 4, 8, 7)), "right", 0)
    tokens, real, positions = (np.pad(x, ((0, 1), (0, 0))) for x in (tokens, real, positions))
    segments = real * np.arange(1, 9)[:, None]
    batch = tiny.layout(tokens, segment_ids=segments, positions=positions)
    one, exists = jax.jit(partial(model.score, examples=8, answers=1))(params, batch)
    assert exists.ravel().tolist() == [True] * 7 + [False]
    devices(8)
    model, params = tiny.load(tmp_path, "dp=2,fsdp=2,tp=2")
    with jax.set_mesh(make_mesh("dp=2,fsdp=2,tp=2")):
        many, exists_on_many = jax.jit(partial(model.score, examples=8, answers=1))(params, batch)
    np.testing.assert_allclose(many[:7], one[:7], atol=1e-5, rtol=1e-5)
    assert np.array_equal(exists, exists_on_many)


@pytest.mark.parametrize("case", ENCODERS)
def test_a_token_of_an_encoder_sees_its_whole_text_and_no_other(case, loaded):
    _, model, params = loaded(case)
    score = jax.jit(partial(model.score, examples=2, answers=1))
    tokens = texts((10,))[0][None]
    segments, positions = np.array([[1] * 5 + [2] * 5]), np.array([[*range(5), *range(5)]])

    def scores(tokens):
        batch = tiny.layout(tokens, segment_ids=segments, positions=positions)
        return np.asarray(score(params, batch)[0][:, 0])

    before = scores(tokens)
    for place in range(10):
        changed = tokens.copy()
        changed[0, place] += 1 if tokens[0, place] < tiny.VOCAB - 1 else -1
        after = scores(changed)
        assert (after != before).tolist() == [place < 5, place >= 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, dtype", [(case, torch.float32) for case in tiny.SCORERS] + [("bert", torch.bfloat16)]
)
def test_there_and_back_bit_for_bit(case, dtype, tmp_path):
    theirs = tiny.save(tmp_path / "hf", CASES[case], dtype=dtype)
    convert.from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"))
    convert.to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "back", dtype="auto", output_loading_info=True
        )
    assert not any(info.values()), info
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "back")]
    assert configs[0] == configs[1]


SIZES = {  # of the models that Aira's reward and toxicity models are made of
    108_311_041: {"model_type": "bert", "vocab_size": 28996},
    108_923_905: {"model_type": "bert", "vocab_size": 29794},
    124_646_401: {
        "model_type": "roberta",
        "vocab_size": 50265,
        "type_vocab_size": 1,
        "max_position_embeddings": 514,
    },
}


@pytest.mark.parametrize("count", SIZES)
def test_parameters_are_counted_from_the_config_alone(count):
    model = model_of(SIZES[count], "config.json")
    assert model.parameter_count() == count
    assert model.config.max_positions == 512


# ---------------------------------------------------------------------------------------------
# heads that are not stored


def masked_lm(folder, config):
    """A folder with a masked language model in place of a scorer."""
    settings = {k: v for k, v in config.items() if k not in ("architectures", "id2label")}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**settings))
    model.save_pretrained(folder)
    return model.state_dict()


def origin_of(folder):
    return Pretrained(str(folder), folder)


def drawn(folder, seed=0):
    origin = origin_of(folder)
    model = model_of(origin.config, str(folder), scorer=True)
    params = origin.load(model, make_mesh("fsdp=-1"), head_key=jax.random.key(seed))
    return origin.check(model), tiny.as_theirs(model, params)


@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_a_masked_language_model_is_given_a_head(case, tmp_path):
    stored = masked_lm(tmp_path, CASES[case])
    missing, tensors = drawn(tmp_path)
    assert len(missing) == 4 and all(path.startswith("score/") for path in missing)
    new = {name for name in tensors if name not in stored}
    assert len(new) == 4
    for name in tensors.keys() - new:
        assert np.array_equal(tensors[name], stored[name]), name
    for name in new:
        if name.endswith("bias"):
            assert not tensors[name].any()
        elif "out_proj" not in name and name != "classifier.weight":
            assert tensors[name].std() == pytest.approx(0.02, rel=0.2)
    repeated, other = drawn(tmp_path)[1], drawn(tmp_path, seed=1)[1]
    for name in new:
        assert np.array_equal(repeated[name], tensors[name])
        assert np.array_equal(other[name], tensors[name]) == name.endswith("bias")
    with pytest.raises(WeightsError, match="is not a reward model, as it has no score"):
        origin = origin_of(tmp_path)
        origin.load(model_of(origin.config, "x", scorer=True), make_mesh("fsdp=-1"))


def test_a_stored_pooler_is_kept_and_its_classifier_drawn(tmp_path):
    theirs = tiny.save(tmp_path, CASES["bert"])
    tensors = load_file(tmp_path / "model.safetensors")
    rest = {k: v for k, v in tensors.items() if not k.startswith("classifier")}
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in rest.items()}
    old = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in old.items()}
    old["cls.seq_relationship.weight"] = torch.ones(2, 16)  # of the pretraining tasks
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    missing, ours = drawn(tmp_path)
    assert missing == ["score/classifier/kernel", "score/classifier/bias"]
    for name in rest:
        assert np.array_equal(ours[name], theirs.state_dict()[name]), name


@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_a_causal_language_model_is_given_a_head(case, tmp_path):
    stored = tiny.save(tmp_path, tiny.CONFIGS[case]).state_dict()
    missing, tensors = drawn(tmp_path)
    assert missing == ["score/linear/kernel"]
    for name in tensors.keys() - {"score.weight"}:
        assert np.array_equal(tensors[name], stored[name]), name
    assert tensors["score.weight"].shape == (1, 16) and tensors["score.weight"].any()


def test_other_tensors_are_never_ignored_and_none_is_drawn_by_halves(tmp_path):
    tiny.save(tmp_path, CASES["bert"])
    tensors = load_file(tmp_path / "model.safetensors")
    for change, message in (
        ({"extra.weight": torch.ones(2)}, "unknown to this architecture extra.weight"),
        ({"classifier.bias": None}, "missing classifier.bias"),
        ({"bert.pooler.dense.weight": None}, "missing bert.pooler.dense.weight"),
        ({"bert.encoder.layer.0.output.dense.bias": None}, "missing bert.encoder.layer.0"),
        ({"classifier.weight": torch.ones(3, 16)}, "classifier.weight has shape .3, 16."),
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=message):
            drawn(tmp_path)


def test_what_cannot_be_built_is_refused(tmp_path):
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    for config, options, message in (
        (CASES["bert"] | labels, {}, "has 3 labels"),
        (CASES["gpt2"] | {"id2label": None}, {}, "has 2 labels"),
        (CASES["bert"] | {"position_embedding_type": "relative_key"}, {}, "only absolute"),
        (CASES["roberta"] | {"is_decoder": True}, {}, "is_decoder: True is not supported"),
        (CASES["bert"], {"scorer": False}, "is an encoder and generates no text"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_of(config, "config.json", **options)
