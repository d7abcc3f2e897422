"""The command line: files and flags, and errors that name the key."""

import contextlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from easyaira import __main__, __version__, cli, errors, inspect, train_dpo
from easyaira.config.data import Source
from easyaira.config.run import TrainDPO, TrainReward, TrainRL, TrainSFT, to_dict
from easyaira.errors import ConfigError
from easyaira.files import named_path
from helpers.processes import call

NEEDED = ["--model.name_or_path", "m", "--data.train", "d"]


def parse(*argv, command=TrainDPO):
    return cli.parse(command, [*NEEDED, *argv])[0]


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    for name, text in {
        "a.yaml": "optimizer: {learning_rate: 1e-5, weight_decay: 1e-2}\nseed: 1\ndpo: {beta: 0.3}",
        "b.yaml": "optimizer: {learning_rate: 5e-7}\nseed: 2",
    }.items():
        (tmp_path / name).write_text(text)
    files = [f"--config={tmp_path / name}" for name in ("a.yaml", "b.yaml")]
    config = parse(*files, "--seed", "3")
    assert config.optimizer.learning_rate == 5e-7
    assert config.optimizer.weight_decay == 1e-2
    assert (config.seed, config.dpo.beta) == (3, 0.3)


def test_a_run_without_a_folder_is_named_after_the_last_configuration(tmp_path, capsys):
    (plain := tmp_path / "mine.v2.yaml").write_text("seed: 1")
    (other := tmp_path / "other.yaml").write_text("seed: 2")
    (named := tmp_path / "named.yaml").write_text("output_dir: runs/run")
    assert parse().output_dir == "runs/run"
    assert parse("--config", f"{plain}").output_dir == "runs/mine.v2"
    assert parse(f"--config={plain}", "--seed", "3", "--config", f"{other}").output_dir == (
        "runs/other"
    )
    assert parse(f"--config={named}", f"--config={other}").output_dir == "runs/run"
    assert parse("--output_dir", "runs/run", f"--config={other}").output_dir == "runs/run"
    assert parse(f"--config={other}", "--output_dir=here").output_dir == "here"
    with pytest.raises(ConfigError, match="config: expected a value, got nothing"):
        parse("--config", "--seed", "3")
    with pytest.raises(SystemExit):
        parse(f"--config={other}", "--print_config")
    assert "output_dir: runs/other" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--optimizer.learning_rat", "1"],
            "optimizer.learning_rat: no such option; did you mean optimizer.learning_rate?",
        ),
        (["--beta", "1"], "beta: no such option; did you mean dpo.beta?"),
        (["--rpo_alpha", "1"], "rpo_alpha: no such option; did you mean dpo.sft_weight?"),
        (["--lora_r", "8"], "lora_r: no such option; did you mean lora.r?"),
        (["--lora.lora_alpha", "8"], "lora.lora_alpha: no such option; did you mean lora.alpha?"),
        (["--lora", "{use_dora: true}"], "lora.use_dora: no such option; did you mean lora.dora?"),
        (["--bf16", "true"], "bf16: no such option; did you mean model.dtype?"),
        (["--train_batch_size", "many"], "train_batch_size: "),
        (["--seed"], "seed: expected a value, got nothing; write --seed VALUE"),
        (
            ["--load_best_model_at_end", "--seed", "1"],
            "load_best_model_at_end: expected a value, got nothing; write "
            "--load_best_model_at_end true",
        ),
        (
            ["--train_batch_size", "0"],
            "train_batch_size: expected a whole number from 1, below 2**31, got 0",
        ),
        (["--max_steps", "2.5"], "max_steps: "),
        (["--max_steps", ""], "or a whole number from 1, below 2**31, got an empty text"),
        (["--data.max_length", ""], "data.max_length: expected a whole number from 1"),
        (["--export", ""], "export: expected true or false, got an empty text"),
        (["--optimizer.learning_rate", "nan"], "optimizer.learning_rate: expected a number"),
        (["--optimizer.adam_beta2", "1.5"], "optimizer.adam_beta2: expected a number"),
        (["--dpo.loss_type", "sigmod"], "did you mean sigmoid?"),
        (["--dpo.loss_type", "[]"], "dpo.loss_type: expected one or more of sigmoid"),
        (["--data.template", "null"], "data.template: expected a value, got null"),
        (["--output_dir=null"], "output_dir: expected a value, got null"),
        (["--data.train=[]"], "data.train: names no data"),
        (["--data.train", ""], "data.train: names no data"),  # a variable that was not set
        (["--data.eval", " "], "data.eval: names no data"),
        (["--output_dir", ""], "output_dir: found an empty text; name a folder"),
        (["--dpo.beta", "0"], "dpo.beta: expected a number above 0"),
        (["--dpo.label_smoothing", "0.1", "--dpo.loss_type", "ipo"], "ipo has no smoothing"),
        (["--dpo.loss_type", "exo_pair"], "exo_pair needs a value above 0"),
        (["--model.dropout", "0.1"], "model.dropout: would make policy and"),
        (["--model.dtype", "float16"], "model.dtype: expected auto or float32 or"),
        (["--lora", "{r: 8}"], "lora.target_modules: required where lora is not null"),
        (["--lora", "{target_modules: [q], rank: 8}"], "lora.rank: no such option"),
        (
            ["--lora", "{target_modules: [q], rank_pattern: {q: 0}}"],
            "lora.rank_pattern: expected pairs of a name and a whole number from 1, below 2**31",
        ),
        (
            ["--data.columns", "[a]"],
            "data.columns: expected pairs such as {a: b} (a blank ",
        ),
        (["--lora", "{target_modules: [q], r: 0}"], "lora.r: expected a whole number from 1"),
        (["--lora", "{target_modules: [q], dropout: 1}"], "lora.dropout: expected a number"),
        (
            ["--lora", "{target_modules: [q], quantize: int4}"],
            "lora.quantize: expected int8 or nf4",
        ),
        (
            ["--lora", "{target_modules: [q]}", "--model.init=random"],
            "lora: needs pretrained weights",
        ),
        (
            ["--train_batch_size", "6", "--gradient_accumulation_steps", "4"],
            "6 is not a multiple of",
        ),
        (["--optimizer.warmup_steps", "3", "--optimizer.warmup_ratio", "0.1"], "set one of them"),
        (["--sft.completion_only_loss", "true"], "no such option"),
        (["--config", "nothing.yaml"], "nothing.yaml: cannot be read: No such file or directory"),
        (["mine.yaml"], "mine.yaml: belongs to no option; write --config mine.yaml"),
        (["--report_to", "[wandb]", "mlflow"], "mlflow: belongs to no option; write --NAME"),
        (["--report_to", "wandb"], "a list such as [a, b], got wandb; write [wandb]"),
        (["--report_to", "wandb,mlflow"], "got wandb,mlflow; write [wandb, mlflow]"),
        (
            ["--lora", "{target_modules: [q], trainable_token_indices: 3}"],
            "expected a list such as [1, 2] or null, got 3; write [3]",
        ),
        (["--model", "small"], "got small; did you mean model.name_or_path?"),
        (["--data", "a.jsonl"], "got a.jsonl; did you mean data.train?"),
        (["--lora", "true"], "got true; did you mean lora.target_modules?"),
        (["--energy", "BRA"], "got BRA; did you mean energy.country?"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(argv, message):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "needs --model.name_or_path and --data.train, here or in a --config file"),
        (NEEDED[2:], "needs --model.name_or_path, here or in a --config file"),
    ],
)
def test_what_is_missing_is_named_as_it_is_given(argv, message):
    with pytest.raises(ConfigError) as error:
        cli.parse(TrainSFT, argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "command, argv, message",
    [
        ("convert", [], "needs a command: to_hf, from_hf, from_easylm, text_model"),
        ("convert", ["to_hf"], "needs source and out; --help explains them"),
        ("convert", ["runs/a", "out"], "command: expected to_hf or from_hf or"),
        ("translate", ["a.yaml"], "source: expected trl or open-instruct or"),
        ("generate", ["runs/a", "hello"], "hello: belongs to no option; write --prompt hello"),
        ("push", ["runs/a/hf", "me/mine"], "me/mine: belongs to no option"),
        ("best_of", ["runs/a"], "needs --prompts and --reward and --output; --help explains them"),
        ("quickstart", ["--out", "x"], "--out x: expected one folder, or nothing"),
        ("quickstart", [__file__], "is a file; name a folder"),
    ],
)
def test_what_is_wrong_in_other_commands_is_one_line(command, argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main([command, *argv])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: small", r"got .small.; did you mean model.name_or_path\?"),
        ("optimizer: {lr: 1}", "optimizer.lr: no such option"),
        ("model: {rev: x}", "model.rev: no such option; did you mean model.revision?"),
        ("trainer: {x: 1}", "trainer"),
        ("optimiser: {learning_rate: 1}", r"did you mean optimizer\?"),
        ("seed: [1, 2]", "seed"),
        (
            "optimizer.weight_decay: 1\noptimizer: {learning_rate: 1}",
            "optimizer.weight_decay: write it inside",
        ),
        ("data: {packing: true}\ndata.packing: false", "data.packing: write it inside data"),
        ("config: other.yaml", ":1: config: is for the command line; give it there as --config"),
        ("seed: null", ":1: seed: expected a value, got null"),
        ("report_to: wandb", r"report_to: expected a list such as \[a, b\], got wandb"),
        ("output_dir: 123", r"output_dir: expected text \(quoted in a file\), got 123"),
        ("export: 1", "export: expected true or false, got 1"),
        ("data:\n  packing:\n", ":2: data.packing: expected a value, got null"),
        ("data: {train: [{path: a, weight: null}]}", r"data.train\[0\].weight: expected a value"),
        ("lora: {target_modules: [q], r: null}", "lora.r: expected a value, got null"),
        ("optimizer: {learning_rate: !!python/object/apply:os.getcwd []}", "line 1: could not"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        parse(f"--config={tmp_path / 'c.yaml'}")
    assert "\n" not in str(error.value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
PATHS = "expected a path or a list such as [{path: FILE}], got "


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "optimizer: {learning_rate: 1}\nseed: 1\noptimizer: {weight_decay: 1}",
            "PLACE: cannot be read: line 3: the key 'optimizer' is set in line 1, too; remove one",
        ),
        ("# nothing yet", "PLACE: is empty; expected options as `name: value`"),
        ("", "PLACE: is empty; expected options as `name: value`"),
        ("- seed: 1", "PLACE: expected options as `name: value`, found a list"),
        ("seed: [1", "PLACE: cannot be read: line 1: "),
        (BOMB + "data: {allowed_tokens: *a9}", "PLACE: cannot be read: line 5: more than 100000"),
        (BOMB + "card: {inference: {x: *a9}}", "PLACE: cannot be read: line 5: more than 100000"),
        ("card: {license: \xe7}", "PLACE: cannot be read: not UTF-8: byte 0xe7 at 16"),
        (
            "seed: 1\n\nlearning_rate: 1e-5",
            "PLACE:3: learning_rate: no such option; did you mean optimizer.learning_rate?",
        ),
        (
            "seed: 1\noptimizer:\n  # a comment\n  lr: 1",
            "PLACE:4: optimizer.lr: no such option; did you mean optimizer.learning_rate?",
        ),
        ("seed: 1\nfoo: 2", "PLACE:2: foo: no such option; --help lists them"),
        (
            "optimizer:\nseed: 1",
            "PLACE:1: optimizer: expected options as `name: value`, got nothing",
        ),
        ("optimizer: 3", "PLACE:1: optimizer: expected options as `name: value`, got 3"),
        ("1: 2", "PLACE:1: 1: no such option"),
        (
            "data: {train: [{path: a, weight: 2000}]}",
            "PLACE:1: data.train[0].weight: expected a number above 0, up to 1000, got 2000",
        ),
        ("model_name_or_path: x", "did you mean model.name_or_path?"),
        ("per_device_train_batch_size: 1", "did you mean train_batch_size?"),
        ("seed: x" + "9" * 5000, "PLACE:1: seed: "),
        ("train_batch_size: " + "x" * 5000, "PLACE:1: train_batch_size: "),
        (
            "data: {train: [a.jsonl]}",
            "PLACE:1: data.train[0]: expected options such as {path: FILE}, got 'a.jsonl'",
        ),
        ("data: {train: {path: a.jsonl}}", f"PLACE:1: data.train: {PATHS}{{'path': 'a.jsonl'}}"),
        ("data: {eval: [a.jsonl]}", "PLACE:1: data.eval[0]: expected options such as {path: FILE}"),
        ("data: {eval: {path: a.jsonl}}", f"PLACE:1: data.eval: {PATHS}{{'path': 'a.jsonl'}}"),
        (
            "data: {eval: [{path: a, weihgt: 2}]}",
            "data.eval[0].weihgt: no such option; did you mean",
        ),
        (
            "data:\n  train:\n  - path: a\n  - path: b\n    colums: {}",
            "PLACE:5: data.train[1].colums: no such option; did you mean columns?",
        ),
        ("lora: {target_modules: [q], rr: {}}", "PLACE:1: lora.rr: no such option; did you mean"),
        ("lora: [a]", "PLACE:1: lora: expected options as `name: value` or null, got ['a']"),
        ("energy: x.y", "PLACE:1: energy: "),
        ("card: {inference: {x: {y: 1}}}", "PLACE:1: card.inference.x: expected one value"),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_file_of_options_is_refused_in_one_short_line(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        parse(f"--config={file}")
    refusal = str(error.value)
    assert message.replace("PLACE", str(file)) in refusal
    assert "\n" not in refusal and len(refusal) < 450 + len(str(file))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.train=[{pth: a}]", "data.train[0].pth: no such option; did you mean path?"),
        ("data.train=[{path: a}, {split: b}]", "data.train[1].path: each entry needs it"),
        ("data.train=[{path: a}, 3]", "data.train[1]: expected options such as {path: FILE}"),
        ("data.train=[{path: a, weight: b}]", "data.train[0].weight: expected a number above 0"),
        ("data.train=[{path: a, colums: {}}]", "data.train[0].colums: no such option; did you"),
        (
            "data.train=[{path: a, columns: {x: 3}}]",
            "data.train[0].columns: expected text (quoted in",
        ),
        ("data.eval=[{path: a, splt: b}]", "data.eval[0].splt: no such option; did you mean"),
        ("data.train={path: a, splt: b}", "data.train: expected a path or a list such as"),
        ("card={infernce: {}}", "card.infernce: no such option; did you mean card.inference?"),
        (
            "card={inference: 3}",
            "card.inference: expected pairs such as {a: b} (a blank follows ",
        ),
        ("card.inference={x: {y: 2}}", "card.inference.x: expected one value, got {'y': 2}"),
        ("optimizer={learning_rate: x}", "optimizer.learning_rate: expected a number from 0"),
        ("optimizer={a: 1, a: 2}", "optimizer: line 1: the key 'a'"),
        ("lora={target_modules: [q], rr: {}}", "lora.rr: no such option; did you mean lora.r?"),
    ],
)
def test_a_wrong_key_in_a_list_or_map_on_the_command_line_is_named(flag, message):
    for argument in ([f"--{flag}"], f"--{flag}".split("=", 1)):
        with pytest.raises(ConfigError) as error:
            parse(*argument)
        assert str(error.value).startswith(message)


def test_maps_on_the_command_line():
    config = parse("--optimizer={learning_rate: 1e-4, warmup_steps: 3}", "--data.train", "[ab].csv")
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.warmup_steps == 3
    assert config.data.train == "[ab].csv"


@pytest.mark.parametrize("template", ["{% for m in messages %}x{% endfor %}", "{{ a }}", "{a: 1}"])
def test_a_template_on_the_command_line_is_text(template):
    assert parse("--data.template", template).data.template == template
    assert parse(f"--data.template={template}").data.template == template


OUT_OF_RANGE = {  # option: values that are refused
    "optimizer.learning_rate": "-1 inf nan 1e39",
    "optimizer.weight_decay": "-1 inf nan 1e39",
    "optimizer.adam_beta1": "-1 1 nan 0.99999999",
    "optimizer.adam_beta2": "-1 1 nan 0.99999999",  # 1 in float32
    "optimizer.adam_epsilon": "0 -1 inf nan 1e-50",  # 0 in float32
    "optimizer.max_grad_norm": "-1 inf nan",
    "optimizer.warmup_steps": "-1 1.5 nan 2147483648",
    "optimizer.warmup_ratio": "-1 1 nan",
    "num_train_epochs": "0 -1 inf nan 1e39",
    "max_steps": "0 -2 1.5 2147483648",
    "train_batch_size": "0 -1 1.5 true 2147483648",
    "gradient_accumulation_steps": "0 -1",
    "seed": "-1 1.5 4294967296",
    "save_steps": "-1",
    "eval_steps": "-1",
    "logging_steps": "0",
    "save_total_limit": "0",
    "num_samples": "-1",
    "model.dropout": "-0.1 1 nan",
    "model.max_positions": "0 -1 1e9",
    "data.max_length": "0 -1 nan",
    "data.max_dropped": "-0.1 1 nan",
    "data.eval": "1.5 -0.1 -1 nan inf",
    "dpo.beta": "0 -1 inf nan 1e-50",
    "dpo.label_smoothing": "-0.1 0.5 nan",
    "dpo.sft_weight": "-1 inf nan",
    "generation.temperature": "0 -1 inf nan 1e-50",
    "generation.top_p": "0 1.5 nan",
    "generation.top_k": "0 -1",
    "generation.repetition_penalty": "0 inf nan",
    "distributed.timeout": "0 -1",
}


@pytest.mark.parametrize("option", OUT_OF_RANGE)
@pytest.mark.slow
def test_a_number_out_of_range_is_refused_in_words(option):
    for value in OUT_OF_RANGE[option].split():
        with pytest.raises(ConfigError) as error:
            parse(f"--{option}={value}")
        words = r"expected .*(number|share)\b.*, got " + re.escape(value)
        assert re.fullmatch(rf"{option}: {words}", str(error.value)), error.value


def test_null_is_refused_where_an_option_has_none_and_kept_where_it_has():
    parser = cli.parser_of(TrainDPO)
    for group, values in to_dict(parse()).items():
        nested = values if isinstance(values, dict) else {"": values}
        for option, value in {f"{group}.{key}".strip("."): v for key, v in nested.items()}.items():
            flag = [f"--{option}=null"]
            if value is None:
                assert cli._expanded(flag, parser) == flag
            else:
                with pytest.raises(ConfigError, match=f"^{option}: expected a value, got null"):
                    cli._expanded(flag, parser)


def test_every_number_of_a_configuration_has_a_range():
    """No option is a plain int or float, which may be anything."""
    plain = []

    def look(config):
        for name, kind in get_type_hints(config).items():
            for part in get_args(kind) or (kind,):
                if part in (int, float):
                    plain.append(f"{config.__name__}.{name}")
                elif is_dataclass(part):
                    look(part)

    for config in (TrainSFT, TrainDPO, TrainReward, Source):
        look(config)
    assert set(plain) == set()


def test_sources_that_are_not_understood_are_no_path():
    for value in ('{"path": "a", "x": 1}', '["a"'):
        for option in ("train", "eval"):
            with pytest.raises(ConfigError, match="a path or a list such as"):
                parse(f"--data.{option}={value}")


def test_a_folder_and_a_pipe_are_no_file_of_options(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place, problem in ((tmp_path, "Is a directory"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(ConfigError, match=f"{place}: cannot be read: {problem}"):
            parse(f"--config={place}")


@pytest.mark.parametrize(
    "place",
    [
        "card: {inference: {x: CLASS}}",
        "card: {inference: CLASS}",
        "card: {data_licenses: {x: CLASS}}",
        "card: {language: [CLASS]}",
        "data: {columns: {x: CLASS}}",
        "data: {train: CLASS}",
        "data: {eval: [CLASS]}",
        "optimizer: CLASS",
        "lora: CLASS",
        "energy: CLASS",
        "provenance: {x: CLASS}",
    ],
)
def test_a_class_named_in_a_file_is_not_called(place, tmp_path):
    mark = tmp_path / "called"
    call_of = f"{{class_path: pathlib.Path.touch, init_args: {{self: {mark}}}}}"
    run = f"{{class_path: subprocess.Popen, init_args: {{args: [touch, {mark}]}}}}"
    for named in (call_of, run):
        (tmp_path / "c.yaml").write_text(place.replace("CLASS", named))
        with contextlib.suppress(ConfigError):
            to_dict(parse(f"--config={tmp_path / 'c.yaml'}"))
    time.sleep(0.1)
    assert not mark.exists()


def test_a_reference_is_an_option_of_dpo_alone():
    assert parse("--model.ref_name_or_path", "r").model.ref_name_or_path == "r"
    with pytest.raises(ConfigError, match="model.ref_name_or_path: no such option"):
        parse("--model.ref_name_or_path", "r", command=TrainSFT)


@pytest.mark.parametrize("mesh", ["-1,1,1", "1,-1,1", "dp=-1", "dp:1,fsdp:-1,mp:2"])
def test_every_form_of_mesh_passes_the_command_line(mesh):
    assert parse("--mesh", mesh).mesh == parse(f"--mesh={mesh}").mesh == mesh


def test_the_home_folder_is_meant_where_no_shell_has_replaced_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("output_dir: ~/runs/a")
    for given in (["--config=~/a.yaml"], ["--output_dir=~/runs/a"]):
        assert parse(*given).output_dir == str(tmp_path / "runs/a")
    assert named_path("~/x") == tmp_path / "x" and named_path("~nobody.txt") == Path("~nobody.txt")


def test_a_share_and_a_path_for_held_out_rows():
    assert parse("--data.eval", "0.02").data.eval == 0.02
    assert [parse("--data.eval", n).data.eval for n in ("0", "200")] == [0, 200]
    assert parse("--data.eval", "held_out.jsonl").data.eval == "held_out.jsonl"
    sources = parse("--data.train", "[{path: x}, {path: y, columns: {prompt: q}}]").data.train
    assert [s.path for s in sources] == ["x", "y"] and sources[1].columns == {"prompt": "q"}


def test_a_runs_own_record_can_be_given_as_its_configuration(tmp_path):
    config = parse("--optimizer.learning_rate", "3e-4", "--data.eval", "0.1")
    record = to_dict(config) | {"provenance": {"versions": {"jax": "0"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    reread, _ = cli.parse(TrainDPO, [f"--config={tmp_path / 'config.yaml'}"])
    assert to_dict(reread) == to_dict(config)


def test_print_config_prints_the_resolved_configuration(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--print_config")
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["learning_rate"] == 5e-5


@pytest.mark.parametrize("command", [TrainSFT, TrainDPO, TrainReward, TrainRL])
def test_help_shows_the_common_options_and_help_all_the_rest(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as end:
            cli.parse(command, [flag])
        assert not end.value.code
        shown[flag] = capsys.readouterr().out
    short, whole = shown.values()
    assert len(short.splitlines()) <= 80 and max(map(len, short.splitlines())) <= 80
    options = re.findall(r"^  --([\w.]+)", short, re.M)
    assert 20 <= len(options) <= 27 and "optimizer.adam_beta1" not in options
    assert all(f"--{name}" in whole for name in options)
    assert "--optimizer.adam_beta1" in whole and "--lora.help lists its options" in " ".join(
        short.split()
    )
    assert not re.search(r"Literal|PositiveInt|type:", short + whole)


@pytest.mark.parametrize("name", ["generate", "evaluate", "best_of", "convert", "verify", "demo"])
def test_help_of_other_commands_has_no_python(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"easyaira.{name}").main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"Literal|type:|null|True\)|False\)|Args:|python -m", shown)
    if name == "best_of":  # its own default, and not that of generate
        assert (
            "0: greedy. (default: 0.6)" in shown and "seed of the sampling. (default: 0)" in shown
        )


def test_inspect_shows_what_it_uses(capsys):
    with pytest.raises(SystemExit):
        inspect.main(["--help"])
    shown = capsys.readouterr().out
    assert "--data.max_length" in shown and "gradient_accumulation_steps" not in shown
    with pytest.raises(ConfigError, match="--dry_run: inspect trains nothing"):
        inspect.main(["--model.name_or_path=m", "--data.train=d", "--dry_run"])


def test_lines_are_folded_between_words_in_a_terminal_alone(monkeypatch):
    line = "model   a/long-name: 260,032 parameters, vocabulary 512, on 1 x cpu"
    assert errors.folded(line) == line
    monkeypatch.setattr(errors.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    folded = errors.folded(f"{line}\nrun     2").split("\n")
    assert folded[0] == "model   a/long-name: 260,032 parameters," and folded[-1] == "run     2"
    assert all(row.startswith(" " * 8) and len(row) <= 40 for row in folded[1:-1])


def test_the_command_alone_lists_all_commands(capsys):
    for argv in ([], ["--help"], ["-h"]):
        __main__.main(argv)
        listed = capsys.readouterr().out.splitlines()
        assert listed[0].startswith("usage: easyaira COMMAND")
        assert [line.split()[0] for line in listed[3:]] == list(__main__.COMMANDS)


def test_every_command_has_its_module():
    missing = [
        name
        for name, (module, _) in __main__.COMMANDS.items()
        if importlib.util.find_spec(f"easyaira.{module}") is None
    ]
    assert not missing


@pytest.mark.parametrize(
    "name, fix",
    [
        ("dpp", "did you mean dpo?"),
        ("train_reward", "did you mean reward?"),
        ("zzz", "choose one of sft, dpo, "),
        ("--verbose", "begin with one, such as easyaira sft --help"),
        ("train", "did you mean sft?"),
        ("merge-lora", "did you mean convert?"),
        ("chat", "did you mean generate?"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(name, fix, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main([name, "--max_steps", "1"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.startswith(f"error: {name}: no such command; ") and err.count("\n") == 1
    assert fix in err


def test_a_command_gets_its_arguments_and_its_exit_status(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(train_dpo, "main", given.extend)
    monkeypatch.setattr(sys, "argv", ["easyaira", "dpo", "--config", "a b.yaml"])
    __main__.main()
    assert given == ["--config", "a b.yaml"] and sys.argv[0] == "easyaira dpo"
    monkeypatch.undo()
    status, _, err = call(train_dpo.main, ["--beta", "1"], capsys)
    with pytest.raises(SystemExit) as end:
        __main__.main(["dpo", "--beta", "1"])
    assert (end.value.code, capsys.readouterr().err) == (status, err) == (2, err)


def test_the_package_and_its_command_answer_at_once():
    """Nothing but the standard library is imported for a list, a version or a wrong name."""
    code = (
        "import sys, easyaira; from easyaira.__main__ import main\n"
        "main([]); main(['--version'])\n"
        "try: main(['dpp'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'transformers', 'jsonargparse', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"easyaira {__version__}\n" in done.stdout
    argv = [sys.executable, "-m", "easyaira", "--version"]
    assert subprocess.check_output(argv, text=True) == f"easyaira {__version__}\n"


def test_the_package_installs_the_command():
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    assert '"easyaira = easyaira.__main__:main"' in setup


def test_names_of_other_trainers_lead_to_commands():
    assert {*__main__.ELSEWHERE.values()} <= __main__.COMMANDS.keys()
    assert not __main__.ELSEWHERE.keys() & __main__.COMMANDS.keys()
