"""Translated configurations: every key has a verdict, every translation is a configuration, and
every number is the one that its trainer computes."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from easyaira import cli, translate
from easyaira.config.data import Source
from easyaira.config.model import LoraConfig
from easyaira.config.run import TrainDPO, TrainReward, TrainSFT
from easyaira.errors import ConfigError
from easyaira.option_errors import OTHER_NAMES, no_such_option, options_of
from easyaira.translation import recipe
from easyaira.translation.easylm import flags_of
from easyaira.translation.translation import translate as translated
from easyaira.translation.verdicts import Computed, NoEffect, Same, Unsupported
from helpers import tiny
from helpers.examples import load

SOURCES = translate.SOURCES
FIELDS = {  # of TRL 1.16 and transformers 5.24
    "training": """
        output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
        lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
        adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
        average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
        bf16_full_eval fp16_full_eval tf32 activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
        torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
        liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps
        auto_find_batch_size logging_strategy logging_steps logging_first_step
        log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
        log_level_replica disable_tqdm report_to run_name project trackio_space_id
        trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
        eval_use_gather_object eval_accumulation_steps include_for_metrics
        batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node
        save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
        hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
        metric_for_best_model greater_is_better ignore_data_skip
        restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
        accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
        label_names train_sampling_strategy length_column_name ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict
        resume_from_checkpoint local_rank
    """,
    "sft": """
        model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path
        dataset_text_field dataset_kwargs dataset_num_proc eos_token max_length
        truncation_mode shuffle_dataset packing packing_strategy padding_free
        pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type
        activation_offloading pad_token
    """,
    "dpo": """
        model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout
        dataset_num_proc max_length truncation_mode padding_free pad_to_multiple_of
        precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha
        f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting
        discopop_tau activation_offloading sync_ref_model ref_model_mixup_alpha
        ref_model_sync_steps pad_token
    """,
    "kto": """
        model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout
        dataset_num_proc max_length pad_to_multiple_of precompute_ref_log_probs
        precompute_ref_batch_size loss_type beta desirable_weight undesirable_weight
        activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    """,
    "reward": """
        model_init_kwargs trust_remote_code chat_template_path disable_dropout
        dataset_num_proc eos_token max_length pad_to_multiple_of center_rewards_coefficient
        activation_offloading pad_token
    """,
    "model": """
        model_name_or_path model_revision dtype attn_implementation use_peft lora_r
        lora_alpha lora_dropout lora_target_modules lora_target_parameters
        lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit
        bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    """,
    "data": """
        dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
        ignore_bias_buffers datasets streaming test_split_size
    """,
}
OF_TASK = {task: ("training", task, "model", "data") for task in ("sft", "dpo", "reward")}
OF_TASK["dpo"] += ("kto",)


def write(path, **keys):
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def ours(capsys, *argv):
    """The configuration that our own command makes of a translated file, and its text."""
    translate.main(list(argv))
    text = capsys.readouterr().out
    kinds = {"sft": TrainSFT, "dpo": TrainDPO, "reward": TrainReward}
    task = text.partition("easyaira ")[2].split()[0]
    return cli.configuration(kinds[task], yaml.safe_load(text)), text


MINIMAL = {"model_name_or_path": "m", "dataset_name": "o/d", "output_dir": "out"}


# The page of keys, written anew by: python tests/test_translate.py

PAGE = Path(__file__).parents[1] / "docs/coming_from.md"


def table(name):
    """The keys of a source by verdict, as a table; a task's own ones are marked."""
    tables = SOURCES[name].tables
    keys = {key: verdict for table in tables.values() for key, verdict in table.items()}
    rows = {}
    for key, verdict in keys.items():
        tasks = [task for task, table in tables.items() if key in table]
        mark = f" ({', '.join(tasks)})" if len(tasks) < len(tables) else ""
        match verdict:
            case Same(option):
                rows.setdefault(("same", ""), []).append(f"{key}{mark} → `{option}`")
            case Computed():
                rows.setdefault(("computed", ""), []).append(f"{key}{mark}")
            case NoEffect(why):
                rows.setdefault(("no effect here", f": {why}"), []).append(f"{key}{mark}")
            case Unsupported(why):
                rows.setdefault(("not supported", f": {why}"), []).append(f"{key}{mark}")
    lines = [f"### {SOURCES[name].name}", "", "| verdict | keys |", "| --- | --- |"]
    order = ("same", "computed", "no effect here", "not supported")
    for kind, why in sorted(rows, key=lambda row: order.index(row[0])):
        lines.append(f"| {kind}{why} | {', '.join(rows[kind, why])} |")
    return "\n".join(lines)


def page():
    """The page with the tables as they are."""
    tables = "\n\n".join(map(table, SOURCES))
    head, tail = PAGE.read_text().split("<!-- keys -->")[::2]
    return f"{head}<!-- keys -->\n\n{tables}\n\n<!-- keys -->{tail}"


def test_the_page_has_every_key_with_its_verdict():
    assert PAGE.read_text() == page(), (
        "after a change that is meant: python tests/test_translate.py"
    )


# Every key


@pytest.mark.parametrize("task", OF_TASK)
def test_every_field_of_trl_has_a_verdict(task):
    names = {name for group in OF_TASK[task] for name in FIELDS[group].split()}
    assert names - SOURCES["trl"].tables[task].keys() == set()


def test_the_frozen_fields_are_those_of_trl():
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"the tables are those of TRL 1.16, and this is {trl.__version__}")
    data = (trl.ScriptArguments, trl.DatasetMixtureConfig)
    training = names_of(transformers.TrainingArguments)
    classes = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}
    classes["reward"] = trl.RewardConfig
    now = {task: names_of(kind) - training for task, kind in classes.items()}
    now |= {"training": training, "model": names_of(trl.ModelConfig)}
    now |= {"data": set().union(*map(names_of, data))}
    assert now == {name: set(text.split()) for name, text in FIELDS.items()}


def names_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("task", OF_TASK)
def test_a_default_of_trl_is_ours_or_written_out(task):
    trl = pytest.importorskip("trl")
    kinds = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig}
    config = cli.configuration(
        {"sft": TrainSFT, "dpo": TrainDPO, "reward": TrainReward}[task],
        {"model": {"name_or_path": "m"}, "data": {"train": "d"}},
    )
    source = SOURCES["trl"]
    for field in (*dataclasses.fields(kinds[task]), *dataclasses.fields(trl.ModelConfig)):
        verdict = source.tables[task][field.name]
        if isinstance(verdict, Same) and field.default is not None:
            value = config
            for part in verdict.option.split("."):
                value = getattr(value, part)
            expected = source.defaults[task].get(field.name, value)
            assert field.default == expected, field.name
        if isinstance(verdict, Unsupported) and field.default is not dataclasses.MISSING:
            assert field.default in verdict.unless, field.name


@pytest.mark.parametrize("task", OF_TASK)
def test_a_name_of_trl_leads_to_our_option(task):
    parser = cli.parser_of(translate.CONFIGS[task])
    for key, verdict in SOURCES["trl"].tables[task].items():
        if isinstance(verdict, Same) and verdict.option != key:
            group = verdict.option.rpartition(".")[0]
            for name in (key, f"{group}.{key}"):
                if name != verdict.option:
                    message = no_such_option(name, options_of(parser))
                    assert message.endswith(f"did you mean {verdict.option}?"), message


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_lead_to_options(name):
    known = set(options_of(cli.parser_of(TrainDPO)))
    known |= {f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)}
    assert name not in known and OTHER_NAMES[name] in known


@pytest.mark.parametrize("name", SOURCES)
def test_every_verdict_names_an_option_or_says_why(name):
    for task, table in SOURCES[name].tables.items():
        known = set(options_of(cli.parser_of(translate.CONFIGS[task])))
        known |= {f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)}
        for key, verdict in table.items():
            match verdict:
                case Same(option):
                    assert option in known, key
                case NoEffect(why) | Unsupported(why):
                    assert len(why) > 10, key
                case Computed(fact):
                    assert fact, key


@pytest.mark.parametrize("name", SOURCES)
def test_every_computed_fact_is_read(name):
    folder = Path(recipe.__file__).parent
    files = [folder / file for file in ("recipe.py", "rows.py", "ends.py")]
    files += folder.glob(f"{name.replace('-', '_')}*.py")
    text = "".join(file.read_text() for file in files)
    facts = {
        verdict.fact
        for table in SOURCES[name].tables.values()
        for verdict in table.values()
        if isinstance(verdict, Computed)
    }
    assert {fact for fact in facts if f'"{fact}"' not in text} == set()


# Numbers


def test_the_batch_counts_devices_and_accumulation(tmp_path, capsys):
    file = write(
        tmp_path / "a.yaml", **MINIMAL, per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    config, text = ours(capsys, "trl", file, "--task", "sft", "--devices", "8")
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (96, 3)
    assert "96 is 4 per device x 3 accumulation steps x 8 devices" in text


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"warmup_steps": 7}, (7, 0.0)),
        ({"warmup_steps": 0.25}, (0, 0.25)),  # transformers 5 takes it for a share
        ({"warmup_ratio": 0.1}, (0, 0.1)),
        ({"warmup_ratio": 0.1, "warmup_steps": 7}, (7, 0.0)),  # as in transformers
        ({"warmup_ratio": "1e-1"}, (0, 0.1)),  # YAML 1.1 reads it as text
        ({}, (0, 0.0)),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, (0, 0.0)),
    ],
)
def test_warm_up_is_a_number_or_a_share(given, expected, tmp_path, capsys):
    config, _ = ours(capsys, "trl", write(tmp_path / "a.yaml", **MINIMAL, **given), "--task=dpo")
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_ratio) == expected


def test_defaults_that_differ_are_written_out(tmp_path, capsys):
    config, text = ours(capsys, "trl", write(tmp_path / "a.yaml", **MINIMAL), "--task", "dpo")
    assert (config.optimizer.learning_rate, config.num_train_epochs) == (1e-6, 3.0)
    assert (config.data.max_length, config.model.gradient_checkpointing) == (1024, "full")
    assert (config.model.dtype, config.optimizer.lr_scheduler_type) == ("bfloat16", "linear")
    assert "learning_rate: 1.0e-06" in text and config.data.eval is None


def test_a_floor_of_the_schedule_becomes_a_share(tmp_path, capsys):
    file = write(
        tmp_path / "a.yaml", **MINIMAL, learning_rate=1e-4, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5},
    )  # fmt: skip
    config, _ = ours(capsys, "trl", file, "--task", "sft")
    assert config.optimizer.min_lr_rate == pytest.approx(0.1)


def test_adapters_keep_their_defaults_and_lose_dropout_in_dpo(tmp_path, capsys):
    file = write(
        tmp_path / "a.yaml", **MINIMAL, use_peft=True, lora_target_modules="all-linear",
        load_in_4bit=True,
    )  # fmt: skip
    config, _ = ours(capsys, "trl", file, "--task", "sft")
    lora = config.lora
    assert (lora.r, lora.alpha, lora.dropout, lora.quantize) == (16, 32, 0.05, "nf4")
    assert lora.target_modules == "all-linear"
    config, text = ours(capsys, "trl", file, "--task", "dpo")
    assert config.lora.dropout == 0 and "lora.dropout is 0 (0.05 there)" in text


def test_the_best_model_is_looked_for_here_too(tmp_path, capsys):
    keys = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    file = write(tmp_path / "a.yaml", **MINIMAL, **keys, metric_for_best_model="eval_loss")
    config, _ = ours(capsys, "trl", file, "--task", "sft")
    assert config.load_best_model_at_end and config.metric_for_best_model == "eval_loss"
    file = write(tmp_path / "b.yaml", **MINIMAL, metric_for_best_model="eval_loss")
    config, _ = ours(capsys, "trl", file, "--task", "sft")  # unused there
    assert not config.load_best_model_at_end and config.metric_for_best_model is None


def test_other_losses_keep_their_options(tmp_path, capsys):
    config, _ = ours(
        capsys, "trl", write(tmp_path / "a.yaml", **MINIMAL, loss_type="dft"), "--task=sft"
    )
    assert config.sft.loss_type == "dft"
    file = write(tmp_path / "b.yaml", **MINIMAL, ld_alpha=0.5, use_weighting=True)
    config, _ = ours(capsys, "trl", file, "--task", "dpo")
    assert (config.dpo.ld_alpha, config.dpo.use_weighting) == (0.5, True)
    file = write(tmp_path / "c.yaml", **MINIMAL, center_rewards_coefficient=0.01)
    config, _ = ours(capsys, "trl", file)
    assert config.reward.center_rewards_coefficient == 0.01


@pytest.mark.parametrize("loss, smoothing", [("sigmoid", 0.0), ("robust", 0.1)])
def test_label_smoothing_is_that_which_trl_reads(loss, smoothing, tmp_path, capsys):
    file = write(tmp_path / "a.yaml", **MINIMAL, loss_type=[loss], label_smoothing=0.1)
    config, text = ours(capsys, "trl", file)
    assert config.dpo.label_smoothing == smoothing
    assert ("TRL 1.16 reads 0.1 for robust" in text) == (not smoothing)


@pytest.mark.parametrize(
    "row, options, template, learned",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "chat", (False, False)),
        ({"messages": []}, {"assistant_only_loss": True}, "chat", (True, True)),
        ({"prompt": "a", "completion": "b"}, {}, "plain", (True, True)),
        ({"prompt": "a", "completion": "b"}, {"completion_only_loss": False}, "plain",
         (False, True)),
        ({"prompt": [{}], "completion": [{}]}, {}, "chat", (True, True)),
    ],
)  # fmt: skip
def test_what_is_learned_follows_from_the_columns(
    row, options, template, learned, tmp_path, capsys
):
    tiny.write_rows(tmp_path / "rows.jsonl", [row])
    keys = MINIMAL | {"dataset_name": str(tmp_path / "rows.jsonl")} | options
    config, _ = ours(capsys, "trl", write(tmp_path / "a.yaml", **keys), "--task", "sft")
    assert config.data.template == template
    assert (config.sft.completion_only_loss, config.sft.assistant_only_loss) == learned


@pytest.mark.parametrize(
    "row, options, columns",
    [
        ({"text": "a", "id": 1}, {}, {}),
        ({"body": "a"}, {"dataset_text_field": "body"}, {"text": "body"}),
        (None, {"dataset_text_field": "body"}, {"text": "body"}),
    ],
)
def test_rows_of_plain_text_are_learned_whole(row, options, columns, tmp_path, capsys):
    file = tmp_path / "rows.jsonl" if row else "o/d"
    if row:
        tiny.write_rows(file, [row])
    keys = MINIMAL | {"dataset_name": str(file), "eval_strategy": "steps"} | options
    config, text = ours(capsys, "trl", write(tmp_path / "a.yaml", **keys), "--task", "sft")
    assert config.data.template == "plain" and "in a row of plain text stays text" in text
    assert config.data.train[0].columns == config.data.eval[0].columns == columns
    with pytest.raises(ConfigError, match="truncation_mode .keep_end drops a long text here"):
        keys["truncation_mode"] = "keep_end"
        translate.main(["trl", write(tmp_path / "a.yaml", **keys), "--task", "sft"])


def test_rows_that_were_not_looked_at_may_be_plain_text(tmp_path, capsys):
    file = write(tmp_path / "a.yaml", **MINIMAL, dataset_text_field="text")
    config, text = ours(capsys, "trl", file)
    assert config.data.template == "chat" and config.data.train[0].columns == {}
    assert "in a row of plain text stays text" in text


def test_columns_without_a_form_are_named(tmp_path):
    file = tiny.write_rows(tmp_path / "rows.jsonl", [{"body": "a", "id": 1}])
    keys = MINIMAL | {"dataset_name": str(file)}
    with pytest.raises(ConfigError, match="dataset_name .body and id are no form of rows for SFT"):
        translate.main(["trl", write(tmp_path / "a.yaml", **keys), "--task", "sft"])


def test_axolotls_completions_are_texts(tmp_path, capsys):
    texts = [{"path": "o/a", "type": "completion", "field": "body"}, {"path": "o/b"}]
    texts[1] |= {"type": "completion", "data_files": ["b.jsonl"]}
    keys = {"datasets": texts, "test_datasets": texts[:1], "excess_length_strategy": "raise"}
    keys = ALPACA_QLORA | {"val_set_size": 0} | keys
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
    assert [source.columns for source in config.data.train] == [{"text": "body"}, {}]
    assert [source.path for source in config.data.train] == ["o/a", "b.jsonl"]
    assert config.data.eval[0].columns == {"text": "body"}
    assert (config.data.template, config.data.truncation) == ("plain", "keep_start")
    assert (config.data.max_dropped, config.data.texts) == (0.05, "split")
    assert "there up to 64 x sequence_len tokens" in text
    compared = write(tmp_path / "b.yaml", **keys, dataset_exact_deduplication=True)
    config, text = ours(capsys, "axolotl", compared)
    assert (config.data.texts, config.data.deduplicate) == ("whole", True)
    assert "data.deduplicate compares whole texts" in text
    mixed = keys | {"datasets": [*ALPACA_QLORA["datasets"], texts[1]], "test_datasets": []}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **mixed))
    assert (config.data.template, config.data.truncation) == ("chat", "drop")
    assert config.data.texts == "whole"
    assert "axolotl divides it into several examples" in text
    assert "in a row of plain text stays text" in text


FULL = {"adapter": None, "load_in_4bit": False, "reinit_weights": True}


def test_axolotls_pretraining_is_of_texts_in_parts(tmp_path, capsys):
    entry = {"path": "o/c4", "name": "en", "type": "pretrain", "text_column": "body"}
    keys = ALPACA_QLORA | {"datasets": None, "val_set_size": 0, "max_steps": 9}
    keys |= {"pretraining_dataset": [entry], "streaming": True, "sample_packing": True}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
    (source,) = config.data.train
    assert (source.path, source.subset, source.columns) == ("o/c4", "en", {"text": "body"})
    assert (config.data.texts, config.max_steps) == ("split", 9)
    assert "repeats up to 256 tokens" in text and "set data.max_examples (texts)" in text
    assert "there a row is one text" not in text
    shared = write(tmp_path / "a.yaml", **keys, pretrain_multipack_attn=False)
    assert "there a row is one text" in ours(capsys, "axolotl", shared)[1]
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys | FULL))
    assert config.model.init == "random" and "other numbers" in text
    alone = keys | {"sample_packing": False, "pretraining_sample_concatenation": True}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **alone))
    assert (config.data.texts, config.data.truncation) == ("whole", "keep_start")
    assert "texts that share a row are one" in text
    for wrong in ([entry] * 2, [entry | {"skip": 3}], [entry | {"type": "completion"}]):
        with pytest.raises(ConfigError, match="pretraining_dataset .(axolotl reads|skip and type)"):
            translate.main(
                ["axolotl", write(tmp_path / "a.yaml", **keys | {"pretraining_dataset": wrong})]
            )


def test_trl_balances_the_experts_of_mixtral(tmp_path, capsys):
    keys = MINIMAL | {"model_name_or_path": "o/Mixtral-8x7B"}
    for task, coefficient in (("sft", None), ("dpo", None), ("sft", 0.0), ("reward", None)):
        file = write(tmp_path / "a.yaml", **keys, router_aux_loss_coef=coefficient)
        config, text = ours(capsys, "trl", file, "--task", task)
        balanced = task == "sft" and coefficient is None
        assert task != "sft" or config.sft.router_aux_loss == balanced
        assert ("there of a micro-batch" in text) == balanced
        assert ("there router_aux_loss_coef times it" in text) == (task == "dpo")
    other = write(tmp_path / "a.yaml", **MINIMAL)
    config, text = ours(capsys, "trl", other, "--task", "sft")
    assert not config.sft.router_aux_loss and "there of a micro-batch" not in text
    file = write(tmp_path / "a.yaml", **keys, router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match="router_aux_loss_coef .only sft.router_aux_loss adds"):
        translate.main(["trl", file, "--task", "sft"])


def test_trls_wrapped_packing_joins_texts(tmp_path, capsys):
    keys = MINIMAL | {"packing": True, "packing_strategy": "wrapped", "dataset_text_field": "body"}
    config, text = ours(capsys, "trl", write(tmp_path / "a.yaml", **keys))
    assert (config.data.texts, config.sft.completion_only_loss) == ("join", False)
    assert "the last example of joined texts" in text and "raise it by the examples" not in text
    config, _ = ours(capsys, "trl", write(tmp_path / "a.yaml", **keys | {"packing": False}))
    assert config.data.texts == "whole"
    rows = keys | {"dataset_name": str(tiny.write_rows(tmp_path / "a.jsonl", tiny.sft_rows(2)))}
    with pytest.raises(ConfigError, match="packing_strategy .only rows of plain text are joined"):
        translate.main(["trl", write(tmp_path / "a.yaml", **rows)])


def test_a_form_that_axolotl_names_is_not_doubted(tmp_path, capsys):
    file = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    keys = ALPACA_QLORA | {"datasets": [{"path": str(file), "type": "alpaca"}]}
    config, _ = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
    assert "### Instruction:" in config.data.train[0].template


CHATS, ALPACAS, BODIES = (
    {"path": "o/d", "type": kind} for kind in ("chat_template", "alpaca", "completion")
)
EOT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eot_id|>\n{% endfor %}"
ANY_END = EOT.replace("<|eot_id|>", "{{ eos_token }}")


@pytest.mark.parametrize(
    "keys, token, accepted",
    [
        ({"chat_template": "llama3"}, "<|eot_id|>", "ends an answer and is learned"),
        ({"chat_template": "chatml"}, "<|im_end|>", "becomes the tokenizer's end token"),
        ({"chat_template": "chatml", "datasets": [BODIES]}, "<|im_end|>", "becomes the tokenizer"),
        ({"chat_template": "qwen3", "rl": "dpo"}, "<|im_end|>", "ends an answer and is learned"),
        ({"chat_template_jinja": EOT}, "<|eot_id|>", "ends an answer and is learned"),
        ({"chat_template": "llama3"}, "<|end_of_text|>", ""),
        ({"chat_template": "chatml"}, "<|eot_id|>", ""),
        ({"chat_template": "tokenizer_default"}, "<|eot_id|>", ""),
        ({}, "<|eot_id|>", ""),
        ({"chat_template": "llama3", "datasets": [CHATS, ALPACAS]}, "<|eot_id|>", ""),
        ({"chat_template": "llama3", "datasets": [CHATS, BODIES]}, "<|eot_id|>", ""),
        ({"chat_template_jinja": ANY_END}, "<|eot_id|>", ""),
        ({"chat_template_jinja": "<|eot_id|>{% broken %}"}, "<|eot_id|>", ""),
        ({"chat_template_jinja": "<|eot_id|>" + ANY_END}, "<|eot_id|>", ""),
    ],
)
@pytest.mark.slow
def test_an_end_token_is_accepted_where_the_template_writes_it(
    keys, token, accepted, tmp_path, capsys
):
    keys = {"datasets": [CHATS]} | keys
    keys["special_tokens"] = {"eos_token": token, "pad_token": "<pad>"}
    file = write(tmp_path / "a.yaml", **ALPACA_QLORA | keys)
    if accepted:
        assert f"# - {token} {accepted}" in ours(capsys, "axolotl", file)[1]
        return
    with pytest.raises(ConfigError, match="special_tokens .changes tokens of the tokenizer"):
        translate.main(["axolotl", file])


@pytest.mark.parametrize(
    "keys, accepted",
    [
        ({"chat_template": EOT}, True),
        ({"chat_template": ANY_END}, False),
        ({}, False),
        ({"chat_template": EOT, "dataset_text_field": "body"}, False),
    ],
)
@pytest.mark.slow
def test_trls_end_token_is_accepted_where_the_template_writes_it(keys, accepted, tmp_path, capsys):
    file = write(tmp_path / "a.yaml", **MINIMAL, eos_token="<|eot_id|>", **keys)
    if accepted:
        for task in ("sft", "reward"):
            assert "<|eot_id|> ends an answer" in ours(capsys, "trl", file, "--task", task)[1]
        return
    with pytest.raises(ConfigError, match="eos_token .changes tokens of the tokenizer"):
        translate.main(["trl", file, "--task", "sft"])


def test_trls_template_is_not_for_rows_of_text(tmp_path, capsys):
    tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    keys = MINIMAL | {"dataset_name": str(tmp_path / "rows.jsonl"), "chat_template": EOT}
    config, text = ours(capsys, "trl", write(tmp_path / "a.yaml", **keys), "--task", "sft")
    assert config.data.template == "plain" and "chat_template is not used for rows of text" in text
    file = write(tmp_path / "a.yaml", **keys, eos_token="<|eot_id|>")
    with pytest.raises(ConfigError, match="eos_token .changes tokens of the tokenizer"):
        translate.main(["trl", file, "--task", "sft"])


@pytest.mark.parametrize("packing", [None, True, False])
def test_llama_factorys_pretraining_is_of_texts(packing, tmp_path, capsys):
    keys = {"model_name_or_path": "m", "stage": "pt", "dataset": "c4", "finetuning_type": "full"}
    file = write(tmp_path / "a.yaml", **keys, output_dir="out", packing=packing)
    config, text = ours(capsys, "llama-factory", file)
    assert (config.data.template, config.data.train[0].path) == ("plain", "c4")
    assert config.data.texts == ("whole" if packing is False else "join")
    assert ("all texts of a data set are joined" in text) == (packing is not False)
    assert "raise it by the examples that fill a row" not in text
    assert "in a row of plain text stays text" in text
    file = write(tmp_path / "a.yaml", **keys, output_dir="out", template="llama3")
    assert "there with <|end_of_text|>" in ours(capsys, "llama-factory", file)[1]


@pytest.mark.parametrize("size", [0.25, 2000])
def test_held_out_rows_are_a_share_or_a_number(size, tmp_path, capsys):
    file = write(tmp_path / "a.yaml", **ALPACA_QLORA | {"val_set_size": size})
    config, _ = ours(capsys, "axolotl", file)
    assert config.data.eval == size


def test_a_mixture_keeps_its_weights_and_splits(tmp_path, capsys):
    file = write(
        tmp_path / "a.yaml", model_name_or_path="m", dataset_mixer={"o/a": 1.0, "o/b": 0.5},
        dataset_splits=["train_prefs", "test_prefs"], eval_strategy="steps", eval_steps=5,
        dataset_configs=["en", "default"], rpo_alpha=0.1,
    )  # fmt: skip
    config, _ = ours(capsys, "trl", file)
    assert [s.subset for s in config.data.train] == ["en", None]
    assert [(s.path, s.split, s.weight) for s in config.data.train] == [
        ("o/a", "train_prefs", 1.0), ("o/b", "train_prefs", 0.5),
    ]  # fmt: skip
    assert [s.split for s in config.data.eval] == ["test_prefs"] * 2 and config.eval_steps == 5


# Nothing is silent


def test_keys_without_effect_are_named(tmp_path, capsys):
    _, text = ours(
        capsys, "trl", write(tmp_path / "a.yaml", **MINIMAL, use_liger_kernel=True), "--task=sft"
    )
    assert "# - use_liger_kernel: says how PyTorch computes" in text


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha (is no loss of EasyAira)"),
        ({"optim": "adafactor"}, "optim (adafactor is neither AdamW"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type (polynomial is none of"),
        (
            {"learning_rat": 1},
            "learning_rat: TRL 1.16's sft has no such key; did you mean learning_rate?",
        ),
        ({"beta": 0.1}, "beta: TRL 1.16's sft has no such key; it belongs to dpo (--task)"),
        ({"learning_rate": -1.0}, "translated, optimizer.learning_rate: expected"),
        ({"use_peft": True}, "lora_target_modules (is not set"),
    ],
)
def test_what_has_no_translation_is_an_error_that_drop_leaves_out(keys, message, tmp_path, capsys):
    file = write(tmp_path / "a.yaml", **MINIMAL, **keys)
    with pytest.raises(ConfigError) as error:
        translate.main(["trl", file, "--task", "sft"])
    assert message in str(error.value) and error.value.exit_status == 2
    assert capsys.readouterr().out == ""
    _, text = ours(capsys, "trl", file, "--task", "sft", "--drop", next(iter(keys)))
    assert f"# Left out by --drop: {next(iter(keys))}" in text


def test_a_task_that_the_keys_do_not_tell_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="do not tell the task; add --task, one of sft, dpo"):
        translate.main(["trl", write(tmp_path / "a.yaml", **MINIMAL)])


def test_a_comment_cannot_leave_its_line(tmp_path, capsys):
    file = write(tmp_path / "a\nmodel: x.yaml", **MINIMAL)
    config, _ = ours(capsys, "trl", file, "--task", "sft")
    assert config.model.name_or_path == "m"


def test_the_input_is_not_changed():
    given = {**MINIMAL, "lr_scheduler_kwargs": {}}
    before = dict(given)
    translated(SOURCES["trl"], given, place="x", task="sft")
    assert given == before


# The other sources

TULU_DPO = {
    "model_name_or_path": "m", "dataset_mixer": {"o/a": 1.0, "o/b": 500}, "output_dir": "out",
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 5e-7,
    "lr_scheduler_type": "linear", "warmup_ratio": 0.1, "num_epochs": 1, "max_seq_length": 2048,
    "dpo_loss_type": "dpo_norm", "dpo_beta": 5, "use_lora": False, "checkpointing_steps": 1000,
}  # fmt: skip
ALPACA_QLORA = {
    "base_model": "m", "datasets": [{"path": "o/alpaca", "type": "alpaca", "split": "train[:9]"}],
    "val_set_size": 0.05, "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16,
    "lora_target_linear": True, "peft_use_dora": True, "sequence_len": 4096, "sample_packing": True,
    "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 4,
    "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 0.0002,
    "bf16": "auto", "tf32": False, "warmup_steps": 10, "evals_per_epoch": 4,
    "saves_per_epoch": 1, "output_dir": "out",
    "special_tokens": {"pad_token": "<pad>"}, "wandb_project": None,
}  # fmt: skip
FACTORY = {
    "model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "lora_rank": 4,
    "lora_target": "q_proj, v_proj", "dataset": "a,b", "template": "llama3", "cutoff_len": 512,
    "max_samples": 1000, "learning_rate": 1e-4, "bf16": True, "output_dir": "out", "use_dora": True,
}  # fmt: skip
EASYLM_LINE = (
    "python3 -m EasyLM.models.llama.llama_train_dpo --mesh_dim='-1,16,16' --dtype='bf16' "
    "--num_epochs=3 --load_llama_config='7b' --load_checkpoint='params::gs://b/tulu2' "
    "--optimizer.type='adamw' --optimizer.adamw_optimizer.weight_decay=0.0 "
    "--optimizer.adamw_optimizer.lr=5e-7 --optimizer.adamw_optimizer.end_lr=0 "
    "--optimizer.adamw_optimizer.warmup_ratio=0.1 --optimizer.accumulate_gradient_steps=4 "
    "--train_dataset.type='preference_json_torch' "
    "--train_dataset.json_torch_dataset.hf_name='o/d' "
    "--train_dataset.json_torch_dataset.hf_split='train_prefs' "
    "--train_dataset.json_torch_dataset.seq_length=4096 "
    "--train_dataset.json_torch_dataset.batch_size=8 "
    '--logger.output_dir="gs://out" &> all.log &'
)


ODD = [None, "", "5", "0.5", "abc", 0, -1, 0.5, True, [], ["a"], {}, {"a": 1}, [{"path": "x"}]]
ODD += [[1, 2], [None], "auto", "1e-4"]


@pytest.mark.parametrize("source", ["trl", "open-instruct", "axolotl", "llama-factory", "easylm"])
def test_a_value_of_any_kind_is_translated_or_refused(source):
    """YAML has lists, mappings and texts where a file should have a number; none is a fault."""
    trl = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "out"}
    axolotl = [{"path": "d", "type": "chat_template"}]
    bases = {
        "trl": {"sft": trl, "dpo": trl, "reward": trl},
        "open-instruct": {"dpo": TULU_DPO},
        "axolotl": {"sft": ALPACA_QLORA, "dpo": {"base_model": "m", "datasets": axolotl}},
        "llama-factory": {"sft": FACTORY, "dpo": FACTORY | {"stage": "dpo"}},
        "easylm": {"dpo": flags_of(EASYLM_LINE)},
    }
    for task, base in bases[source].items():
        translated(SOURCES[source], base, place="x", task=task)
        keys = SOURCES[source].tables[task].items()
        for key in [key for key, verdict in keys if isinstance(verdict, Same | Computed)]:
            for value in ODD:
                try:
                    translated(SOURCES[source], base | {key: value}, place="x", task=task)
                except ConfigError as error:
                    assert "\n" not in str(error)


def test_a_number_or_mapping_in_quotes_is_read():
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "out"}
    given |= {
        "warmup_steps": "5",
        "max_grad_norm": "0.5",
        "lr_scheduler_type": "cosine_with_min_lr",
    }
    given |= {"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}', "save_steps": "abc"}
    with pytest.raises(ConfigError, match="x: save_steps: wanted a number, found 'abc'$"):
        translated(SOURCES["trl"], given, place="x", task="sft")
    options = translated(SOURCES["trl"], given | {"save_steps": "7"}, place="x", task="sft").options
    made = options["optimizer"]
    assert (made["warmup_steps"], made["max_grad_norm"], made["min_lr_rate"]) == (5, 0.5, 0.1)
    assert options["save_steps"] == 7


def test_data_sets_without_a_config_are_not_lost():
    given = {"model_name_or_path": "m", "dataset_mixer": {"o/a": 1.0, "o/b": 0.5}}
    given |= {"dataset_configs": ["main"], "output_dir": "out"}
    with pytest.raises(ConfigError, match="dataset_configs .names 1 for 2 data sets"):
        translated(SOURCES["trl"], given, place="x", task="sft")


def test_open_instruct_counts_rows_and_names_its_losses(tmp_path, capsys):
    file = write(tmp_path / "a.yaml", **TULU_DPO)
    config, text = ours(capsys, "open-instruct", file, "--devices", "8")
    assert config.train_batch_size == 128 and config.dpo.loss_type == "sigmoid_norm"
    assert config.dpo.beta == 5 and config.optimizer.max_grad_norm == 0  # it does not clip
    assert [s.split for s in config.data.train] == ["train", "train[:500]"]
    assert (config.data.template, config.save_steps) == ("tulu", 1000)
    sft = {key: value for key, value in TULU_DPO.items() if "dpo" not in key}
    config, _ = ours(capsys, "open-instruct", write(tmp_path / "b.yaml", **sft), "--task", "sft")
    assert config.sft.completion_only_loss and config.sft.assistant_only_loss


def test_open_instruct_keeps_every_entry_of_its_list(tmp_path, capsys):
    both = {"dataset_mixer_list": ["o/a", "0.5", "o/a", "20"], "dataset_mixer_list_splits": ["x"]}
    sft = {key: value for key, value in TULU_DPO.items() if not re.search("dpo|mixer", key)} | both
    config, _ = ours(capsys, "open-instruct", write(tmp_path / "a.yaml", **sft), "--task", "sft")
    rows = [(source.path, source.split, source.weight) for source in config.data.train]
    assert rows == [("o/a", "x", 0.5), ("o/a", "x[:20]", 1)]
    file = write(tmp_path / "c.yaml", **sft | {"dataset_mixer_list": ["o/a", "0.5", "o/b"]})
    with pytest.raises(ConfigError, match="dataset_mixer_list .is a list of names, each with its"):
        translate.main(["open-instruct", file, "--task", "sft"])
    file = write(tmp_path / "d.yaml", **sft | {"dataset_mixer_list": ["o/a", "all"]})
    with pytest.raises(ConfigError, match="'all' is neither a share nor a number of rows"):
        translate.main(["open-instruct", file, "--task", "sft"])
    quoted = TULU_DPO | {"dataset_mixer": {"o/a": "0.5", "o/b": "7"}}
    config, _ = ours(capsys, "open-instruct", write(tmp_path / "e.yaml", **quoted))
    rows = [(source.path, source.split, source.weight) for source in config.data.train]
    assert rows == [("o/a", "train", 0.5), ("o/b", "train[:7]", 1)]
    file = write(tmp_path / "b.yaml", **sft | {"dataset_mixer_list_splits": ["x", "x", "y", "y"]})
    with pytest.raises(ConfigError, match="dataset_mixer_list_splits .differ"):
        translate.main(["open-instruct", file, "--task", "sft"])


TULU_SFT = {key: value for key, value in TULU_DPO.items() if "dpo" not in key}


def test_open_instructs_margin_of_simpo_has_two_names(tmp_path, capsys):
    """Its loss is -log sigmoid(beta (x - ratio)), and ours -log sigmoid(beta x - gamma)."""
    older = {"dpo_loss_type": "simpo", "dpo_gamma_beta_ratio": 0.4, "dpo_beta": 8}
    newer = {"loss_type": "simpo", "gamma_beta_ratio": 0.4, "beta": 8}
    for keys in (older, newer):
        file = write(tmp_path / "a.yaml", **TULU_SFT | keys)
        config, _ = ours(capsys, "open-instruct", file)
        assert (config.dpo.loss_type, config.dpo.beta) == ("simpo", 8)
        assert config.dpo.simpo_gamma == pytest.approx(8 * 0.4)


@pytest.mark.parametrize(
    "mixer, each",
    [
        ({"o/a": 1.0}, 1000),
        ({"o/a": 0.5}, 2000),
        ({"o/a": 0.5, "o/b": 2.0}, 400),
        ({"o/a": 700, "o/b": 900}, 500),
        (["o/a", "1.0", "o/b", "1.0"], 500),
    ],
)
def test_open_instructs_limit_is_of_all_data_sets_together(mixer, each, tmp_path, capsys):
    name = "dataset_mixer" if isinstance(mixer, dict) else "dataset_mixer_list"
    sft = {key: value for key, value in TULU_SFT.items() if key != "dataset_mixer"}
    file = write(tmp_path / "a.yaml", **sft, **{name: mixer}, max_train_samples=1000)
    config, text = ours(capsys, "open-instruct", file, "--task", "sft")
    assert config.data.max_examples == each
    rows = [each * source.weight for source in config.data.train]
    assert sum(rows) == 1000 and ("about 1000 in all" in text) == (each != 1000)


@pytest.mark.parametrize(
    "keys, note",
    [
        ({}, "writes one with add_bos alone"),
        ({"add_bos": True}, ""),
        ({}, "not of means over devices and accumulation steps"),
        ({"reduce_loss": "sum"}, "not their sum, with which updates of more tokens weigh more"),
        ({}, "DeepSpeed clips at 1.0"),
        ({"clip_grad_norm": 0.5}, ""),
        ({"weight_decay": 0.1}, "there biases alone"),
        ({"max_seq_length": None}, "there at tokenizer.model_max_length"),
        ({}, "there others, drawn at random"),
        ({}, "Alpaca's prompt"),
    ],
)
def test_open_instructs_differences_are_said(keys, note, tmp_path, capsys):
    _, text = ours(
        capsys, "open-instruct", write(tmp_path / "a.yaml", **TULU_SFT | keys), "--task", "sft"
    )
    without = {"add_bos": "start token", "clip_grad_norm": "DeepSpeed"}
    assert note in text and ("their sum" in text) == ("reduce_loss" in keys)
    assert all(word not in text for key, word in without.items() if key in keys)


def test_open_instructs_normalised_loss_is_over_all_answers_of_a_conversation(tmp_path, capsys):
    for loss, noted in (("dpo", False), ("dpo_norm", True), ("simpo", True)):
        file = write(tmp_path / "a.yaml", **TULU_DPO | {"dpo_loss_type": loss})
        _, text = ours(capsys, "open-instruct", file)
        assert ("a length-normalised loss is over all its answers" in text) == noted
        assert "of means" not in text


def test_open_instruct_keeps_three_checkpoints(tmp_path, capsys):
    for keys, kept in (({}, 3), ({"keep_last_n_checkpoints": 5}, 5)):
        file = write(tmp_path / "a.yaml", **TULU_DPO | keys)
        config, text = ours(capsys, "open-instruct", file)
        assert config.save_total_limit == kept and "two newest" not in text


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"prm_prepro": True}, "prm_prepro (rewards of single steps"),
        ({"dataset_mixer": {"o/a": 1}}, "dataset_mixer (1 is one row in some versions"),
        ({"dataset_mixer": {"o/a": 1, "o/b": 0.5}}, "dataset_mixer (1 is one row in some"),
        ({"reduce_loss": "sum", "clip_grad_norm": 1.0}, "clip_grad_norm (clips the gradient of"),
        ({"tokenizer_revision": "v2"}, "tokenizer_revision (is another one than the model's"),
        ({"load_balancing_loss": True}, "load_balancing_loss (only sft.router_aux_loss adds"),
    ],
)
def test_open_instruct_refuses_what_would_be_another_run(keys, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        translate.main(
            ["open-instruct", write(tmp_path / "a.yaml", **TULU_SFT | keys), "--task", "sft"]
        )
    assert message in str(error.value)


def test_a_key_that_stands_twice_has_its_last_value_as_there(tmp_path, capsys, monkeypatch):
    text = yaml.safe_dump(TULU_DPO) + "learning_rate: 2.0e-6\n"
    (tmp_path / "a.yaml").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    config, report = ours(capsys, "open-instruct", "~/a.yaml")  # also where no shell replaces ~
    assert config.optimizer.learning_rate == yaml.safe_load(text)["learning_rate"] == 2e-6
    assert "learning_rate occurs twice in the file; the last value counts" in report
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(FACTORY) + "learning_rate: 2.0e-6\n")
    with pytest.raises(ConfigError, match="the key 'learning_rate' is set in line"):
        translate.main(["llama-factory", str(tmp_path / "b.yaml")])  # OmegaConf refuses it, too


def test_axolotl_keeps_what_is_learned_and_how_rows_are_written(tmp_path, capsys):
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **ALPACA_QLORA))
    assert (config.train_batch_size, config.data.eval, config.eval_steps) == (8, 0.05, 0)
    assert (config.lora.quantize, config.lora.target_modules) == ("nf4", "all-linear")
    assert (config.lora.dropout, config.model.dtype) == (0.0, "bfloat16")
    assert config.lora.dora
    assert "### Instruction:" in config.data.train[0].template
    assert config.data.train[0].split == "train[:9]" and config.sft.completion_only_loss
    assert config.optimizer.state_dtype == "8bit"
    assert "raise it by the examples that fill a row" in text


IN_ORDER = {  # source -> a file, and its keys for rows in their own order
    "axolotl": (ALPACA_QLORA, {"curriculum_sampling": True, "sample_packing_sequentially": True}),
    "trl": (MINIMAL | {"packing": False}, {"train_sampling_strategy": "sequential"}),
    "llama-factory": (FACTORY, {"disable_shuffling": True}),
}


@pytest.mark.parametrize("source", IN_ORDER)
def test_rows_may_keep_their_order(source, tmp_path, capsys):
    keys, in_order = IN_ORDER[source]
    file = write(tmp_path / "a.yaml", **keys | in_order)
    assert not ours(capsys, source, file)[0].data.shuffle
    assert ours(capsys, source, write(tmp_path / "a.yaml", **keys))[0].data.shuffle


def test_batches_of_one_length_are_refused(tmp_path):
    keys = MINIMAL | {"packing": False, "train_sampling_strategy": "group_by_length"}
    with pytest.raises(ConfigError, match="group_by_length is no order here; rows are packed"):
        translate.main(["trl", write(tmp_path / "a.yaml", **keys)])


def test_llama_factory_splits_its_lists(tmp_path, capsys):
    config, text = ours(capsys, "llama-factory", write(tmp_path / "a.yaml", **FACTORY))
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert (config.lora.r, config.lora.alpha) == (4, 8)  # twice the rank, unless it is set
    assert config.lora.dora
    assert [source.path for source in config.data.train] == ["a", "b"]
    assert config.data.max_length == 512 and "write that" in text


def test_llama_factorys_muon_is_ours(tmp_path, capsys):
    keys = {"finetuning_type": "full", "use_muon": True, "optim": "adamw_8bit", "use_dora": False}
    file = write(tmp_path / "a.yaml", **FACTORY | keys)
    config, text = ours(capsys, "llama-factory", file)
    assert (config.optimizer.name, config.optimizer.state_dtype) == ("muon", "float32")
    assert "norms and biases do not decay here" in text


def test_easylm_flags_are_read_from_the_line(capsys):
    config, text = ours(capsys, "easylm", EASYLM_LINE)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (32, 4)
    assert (config.mesh, config.num_train_epochs) == ("-1,16,16", 3)
    assert (config.optimizer.learning_rate, config.optimizer.adam_beta2) == (5e-7, 0.95)
    assert config.data.train[0].split == "train_prefs" and config.checkpoint_dir == "gs://out"
    assert "convert it (easyaira convert from_easylm)" in text


def test_easylms_pretraining_joins_texts(capsys):
    """The keys of young-geng/EasyLM's examples/pretrain_llama_7b.sh."""
    line = (
        "python -m EasyLM.models.llama.llama_train --mesh_dim='-1,64,1' --dtype='fp32' "
        "--total_steps=250000 --save_milestone_freq=2500 --load_llama_config='7b' "
        "--update_llama_config='' --load_dataset_state='' --load_checkpoint='' "
        "--optimizer.adamw_optimizer.lr=3e-4 --optimizer.adamw_optimizer.end_lr=3e-5 "
        "--optimizer.adamw_optimizer.lr_warmup_steps=2000 "
        "--optimizer.adamw_optimizer.lr_decay_steps=250000 --train_dataset.type='json' "
        "--train_dataset.text_processor.fields='text' "
        "--train_dataset.json_dataset.path='/p/redpajama.jsonl' "
        "--train_dataset.json_dataset.seq_length=2048 --train_dataset.json_dataset.batch_size=2048 "
        "--train_dataset.json_dataset.tokenizer_processes=16 --logger.output_dir=out |& tee a.txt"
    )
    config, text = ours(capsys, "easylm", line)
    assert (config.model.name_or_path, config.model.init) == ("7b", "random")
    assert (config.data.texts, config.data.shuffle, config.data.max_length) == ("join", False, 2048)
    assert (config.data.template, config.max_steps) == ("plain", 250000)
    assert "stands for a folder with config.json" in text and "set data.max_examples" in text
    hub = line.replace("'json'", "'huggingface'").replace("json_dataset.", "huggingface_dataset.")
    hub = hub.replace("seq_length=2048", "name=vi").replace("='text'", "='body'")
    config, _ = ours(capsys, "easylm", hub)
    assert config.data.train[0].columns == {"text": "body"} and config.data.max_length == 1024
    assert config.data.train[0].subset == "vi"
    config, _ = ours(capsys, "easylm", hub.replace("name=vi", "name=''"))
    assert config.data.train[0].subset is None
    for wrong in ("'[prompt],completion'", "'{body}'"):
        with pytest.raises(ConfigError, match="fields"):
            translate.main(["easylm", line.replace("'text'", wrong)])
    with pytest.raises(ConfigError, match="json_torch has no translation"):
        translate.main(["easylm", line.replace("'json'", "'json_torch'")])


TOKENS = {"tokens": ["<|im_start|>"], "special_tokens": {"eos_token": "<|im_end|>"}}
BOTH = ["<|im_start|>", "<|im_end|>"]


def test_tokens_that_template_chatml_adds_are_accepted(tmp_path, capsys):
    keys = ALPACA_QLORA | {"datasets": [CHATS], "chat_template": "chatml"}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys | TOKENS))
    assert config.data.template == "chatml"
    assert "<|im_start|> and <|im_end|> are added to the tokenizer by data.template" in text
    assert "begin at the mean of all others; there at random" in text
    assert "the vectors of added tokens are trained" in text and "is learned; there" not in text
    further = {"special_tokens": {"additional_special_tokens": BOTH}}
    _, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys | further))
    assert "are added to the tokenizer by data.template" in text
    assert "<|im_end|> is learned; there if eos_token or eot_tokens names it" in text
    first = {"special_tokens": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}}
    _, text = ours(
        capsys, "axolotl",
        write(tmp_path / "a.yaml", **keys | first, rl="dpo", mean_resizing_embeddings=True),
    )  # fmt: skip
    assert "keeps its start token, which stands before the first <|im_start|>" in text
    assert "begin at the mean" not in text
    _, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
    assert "adds <|im_start|> and <|im_end|> to a tokenizer that lacks them; there, what" in text


@pytest.mark.parametrize(
    "keys, refused",
    [
        ({"chat_template": "llama3"} | TOKENS, {"tokens", "special_tokens"}),
        ({"chat_template": "chatml", "tokens": [*BOTH, "<x>"]}, {"tokens"}),
        ({"chat_template": "chatml", "tokens": "<|im_start|>"}, {"tokens"}),
        ({"chat_template": "chatml", "special_tokens": {"bos_token": "<x>"}}, {"special_tokens"}),
        (
            {
                "chat_template": "chatml",
                "special_tokens": {"additional_special_tokens": [*BOTH, "<x>"]},
            },
            {"special_tokens"},
        ),
        ({"tokens": BOTH}, {"tokens"}),
        ({"special_tokens": {"bos_token": "<|im_start|>"}}, {"special_tokens"}),
    ],
)
def test_other_tokens_of_the_file_are_refused(keys, refused, tmp_path):
    keys = ALPACA_QLORA | {"datasets": [CHATS]} | keys
    with pytest.raises(ConfigError, match="not supported") as error:
        translate.main(["axolotl", write(tmp_path / "a.yaml", **keys)])
    named = {
        key for key in ("tokens", "special_tokens") if re.search(rf"\b{key} \(", str(error.value))
    }
    assert named == refused


def test_alpacas_answers_end_with_the_end_token_that_chatml_sets(tmp_path):
    keys = ALPACA_QLORA | {"chat_template": "chatml"} | TOKENS
    made = translated(SOURCES["axolotl"], keys, place="a.yaml").options["data"]
    file = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    source = Source(str(file), template=made["train"][0]["template"])
    tokenizer = tiny.tokenizer()
    data = load(
        [source], template=made["template"], tokenizer=tokenizer, vocab_size=400, max_length=256
    )
    assert tokenizer.decode(data.train.tokens).endswith("### Response:\nb<|im_end|>")
    assert data.train.tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_filters_of_axolotl_are_ours(tmp_path, capsys):
    keys = ALPACA_QLORA | {"dataset_exact_deduplication": True, "min_sample_len": 9}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
    assert config.data.deduplicate and config.data.min_length == 9
    assert "rows below min_sample_len are counted as dropped" in text and "there they" not in text
    held_out = {"test_datasets": [ALPACAS], "val_set_size": 0}
    _, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys | held_out))
    assert "held-out rows that are also trained on are left out; there they stay" in text
    texts = {"datasets": [BODIES]}
    _, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys | texts))
    assert "data.min_length is of whole texts" in text
    pairs = keys | {"rl": "dpo", "datasets": [CHATS]} | held_out | {"test_datasets": [CHATS]}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **pairs))
    assert config.data.deduplicate and config.data.min_length is None
    assert "min_sample_len: axolotl 0.19 reads it for SFT alone" in text
    assert "there by columns that are not used, too" in text and "there they stay" not in text
    for nothing in (None, 0, False):
        keys |= {"dataset_exact_deduplication": nothing, "min_sample_len": nothing}
        config, _ = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
        assert not config.data.deduplicate and config.data.min_length is None


@pytest.mark.parametrize("key", ["model_config", "overrides_of_model_config"])
def test_a_switch_of_experts_changes_nothing_in_a_model_without(key, tmp_path, capsys):
    keys = ALPACA_QLORA | {key: {"output_router_logits": True}}
    _, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
    assert f"{key}: output_router_logits is of mixtures of experts, and base_model is" in text
    both = {"output_router_logits": True, "rope_theta": 1.0}
    for name, changes in (
        ("o/some-MoE", keys[key]),
        ("o/frankenmistral-4x7B", keys[key]),
        ("Qwen/Qwen3-30B-A3B", keys[key]),
        ("m", both),
    ):
        with pytest.raises(ConfigError, match=f"{key} .the model is loaded as it is stored"):
            file = write(tmp_path / "a.yaml", **keys | {"base_model": name, key: changes})
            translate.main(["axolotl", file])
    ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys | {key: {}}))


@pytest.mark.parametrize("key", ["model_config", "overrides_of_model_config"])
def test_mixtral_balances_its_experts_and_adapts_its_attention(key, tmp_path, capsys):
    keys = ALPACA_QLORA | {"base_model": "mistralai/Mixtral-8x7B-v0.1"}
    on = keys | {key: {"output_router_logits": True}}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **on))
    assert config.sft.router_aux_loss and "and there of a micro-batch" in text
    assert config.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config.lora.quantize == "nf4" and "lora.quantize includes the experts" in text
    named = on | {"lora_target_linear": None, "lora_target_modules": ["q_proj"]}
    named |= {"quantize_moe_experts": True}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **named))
    assert config.lora.target_modules == ["q_proj"] and "includes the experts" not in text
    off = keys | {key: {"output_router_logits": False}}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **off))
    assert not config.sft.router_aux_loss and f"{key}: output_router_logits is false here" in text
    pairs = on | {"rl": "dpo", "datasets": [CHATS], "val_set_size": 0}
    with pytest.raises(ConfigError, match="adds a loss that balances the experts, here to SFT al"):
        translate.main(["axolotl", write(tmp_path / "a.yaml", **pairs)])
    with pytest.raises(
        ConfigError, match="is for mixtures of experts; Mixtral is the only one here"
    ):
        other = named | {"base_model": "o/other", key: {}}
        translate.main(["axolotl", write(tmp_path / "a.yaml", **other)])


RATED = {"path": "o/d", "type": "chatml.argilla"}
KTO = {  # the same run, of each source that has one
    "trl": MINIMAL | {
        "beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5,
        "per_device_train_batch_size": 4, "loss_type": "kto",
    },
    "axolotl": ALPACA_QLORA | {
        "rl": "kto", "rl_beta": 0.2, "kto_desirable_weight": 1.5, "kto_undesirable_weight": 0.5,
        "micro_batch_size": 4, "gradient_accumulation_steps": 1, "datasets": [RATED],
    },
    "llama-factory": FACTORY | {
        "stage": "kto", "pref_beta": 0.2, "kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5,
        "per_device_train_batch_size": 4, "pref_loss": "simpo",
    },
}  # fmt: skip


@pytest.mark.parametrize("source", KTO)
def test_kto_keeps_its_weights(source, tmp_path, capsys):
    config, text = ours(capsys, source, write(tmp_path / "a.yaml", **KTO[source]), "--devices", "2")
    dpo = config.dpo
    assert (dpo.loss_type, dpo.beta) == ("kto", 0.2)
    assert (dpo.desirable_weight, dpo.undesirable_weight) == (1.5, 0.5)
    assert (dpo.kto_group, config.train_batch_size) == (4, 8)
    assert "is estimated from 4 examples, not from all devices'" in text
    if source == "axolotl":
        assert config.data.train[0].template == "chatml"
        assert config.data.train[0].columns == {"prompt": "instruction"}


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, ("drop", 0.99)),
        ({"excess_length_strategy": "truncate"}, ("keep_start", 0.05)),
        ({"excess_length_strategy": "raise"}, ("drop", 0.0)),
    ],
)
def test_axolotl_leaves_out_what_is_too_long(keys, expected, tmp_path, capsys):
    config, _ = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **ALPACA_QLORA | keys))
    assert (config.data.truncation, config.data.max_dropped) == expected


def test_axolotl_may_say_what_is_learned_anyway(tmp_path, capsys):
    turns = {"path": "o/d", "type": "chat_template", "roles_to_train": ["assistant"]}
    rows = ALPACA_QLORA | {"datasets": [turns | {"train_on_eos": "turn"}]}
    config, _ = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **rows))
    assert config.data.train[0].path == "o/d"
    file = write(tmp_path / "b.yaml", **rows | {"datasets": [turns | {"train_on_eos": "last"}]})
    with pytest.raises(ConfigError, match="train_on_eos last of a data set has no translation"):
        translate.main(["axolotl", file])


FAST = ["liger.LigerPlugin", "cut_cross_entropy.CutCrossEntropyPlugin"]


@pytest.mark.parametrize(
    "names",
    [["swanlab.SwanLabPlugin"], FAST, ["swanlab.SwanLabPlugin", *FAST], [*FAST, FAST[0]]],
)
def test_axolotls_plugins_that_change_no_number_are_named(names, tmp_path, capsys):
    plugins = {"plugins": [f"axolotl.integrations.{name}" for name in names]}
    text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **ALPACA_QLORA | plugins))[1]
    assert "# - plugins: says how PyTorch computes or logs" in text
    plugins["plugins"].append("axolotl.integrations.kernels.KernelsPlugin")
    file = write(tmp_path / "b.yaml", **ALPACA_QLORA | plugins)
    with pytest.raises(ConfigError, match=r"plugins \(only those that change no number"):
        translate.main(["axolotl", file])


def test_axolotls_mistral_common_is_not_used(tmp_path, capsys):
    for asked in (True, False):
        keys = ALPACA_QLORA | {"tokenizer_use_mistral_common": asked}
        text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))[1]
        note = "# - tokenizer.json and the chat template of the model's folder are used, and not"
        assert (note in text.partition("# Without effect")[0]) == asked


@pytest.mark.parametrize(
    "pattern, names",
    [
        (
            r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
            "up down gate q k v o",
        ),
        (r"language_model\.model\.layers\.\d+\.(mlp|self_attn)\.(q|v)_proj", "q v"),
        (
            r"model.language_model.layers.[\d]+.(_checkpoint_wrapped_module.)?(mlp|self_attn).(q|o)_proj",
            "q o",
        ),
    ],
)
def test_axolotls_layers_of_a_text_model_are_those_of_its_own_folder(
    pattern, names, tmp_path, capsys
):
    keys = ALPACA_QLORA | {"lora_target_modules": pattern, "lora_target_linear": False}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **keys))
    assert config.lora.target_modules == [f"{name}_proj" for name in names.split()]
    assert "take it out first, and name its folder in model.name_or_path (easyaira convert" in text
    ends = [f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj" for name in names.split()]
    heads = ("model.language_model", "language_model.model")  # read as peft does
    whole = [
        all(re.fullmatch(pattern, f"{head}.layers.12.{end}") for end in ends) for head in heads
    ]
    assert any(whole)


@pytest.mark.parametrize(
    "keys",
    [
        {"processor_type": "AutoProcessor"},
        {"lora_target_modules": r"model.language_model.layers.[\d]+.(mlp).(up|q)_proj"},
        {"lora_target_modules": r"model.language_model.layers.[12]+.(mlp|self_attn).(q)_proj"},
        {"lora_target_modules": r"model.language_model.layers.\d+.(mlp|self_attn).(q|qkv)_proj"},
        {"lora_target_modules": "model.language_model.layers.(0.mlp.up_proj|.*)"},
    ],
    ids=["images", "one part", "some layers", "other names", "another form"],
)
def test_axolotls_layers_of_other_parts_are_refused(keys, tmp_path):
    pattern = r"model.language_model.layers.[\d]+.(mlp|self_attn).(q|v)_proj"
    keys = {"lora_target_modules": pattern, "lora_target_linear": False} | keys
    file = write(tmp_path / "a.yaml", **ALPACA_QLORA | keys)
    with pytest.raises(ConfigError, match=r"lora_target_modules \(names parts of a model for im"):
        translate.main(["axolotl", file])


@pytest.mark.parametrize(
    "keys, weight", [({}, 1.0), ({"cpo_alpha": 0.0}, 0.0), ({"cpo_alpha": 0.5}, 0.5)]
)
def test_axolotls_simpo_adds_the_likelihood_of_its_trainer(keys, weight, tmp_path, capsys):
    """Of CPOTrainer, whose cpo_alpha is 1 unless the file has it."""
    pairs = {"datasets": [{"path": "o/d", "type": "chat_template.argilla"}]}
    simpo = ALPACA_QLORA | pairs | {"rl": "simpo", "simpo_gamma": 1.0, "rl_beta": 2.0} | keys
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **simpo))
    assert (config.dpo.loss_type, config.dpo.sft_weight) == ("simpo", weight)
    assert (config.dpo.simpo_gamma, config.dpo.beta) == (1.0, 2.0)
    assert (f"cpo_alpha {weight}, 1 where" in text) == bool(weight)


def test_axolotls_orpo_says_that_prompts_are_not_learned(tmp_path, capsys):
    pairs = {"datasets": [{"path": "o/d", "type": "chat_template.argilla"}]}
    orpo = ALPACA_QLORA | pairs | {"rl": "orpo", "orpo_alpha": 0.1}
    config, text = ours(capsys, "axolotl", write(tmp_path / "a.yaml", **orpo))
    assert (config.dpo.loss_type, config.dpo.sft_weight) == ("orpo", 1.0)
    assert "of its prompt, too" in text


def test_weights_of_kto_tell_its_loss(tmp_path, capsys):
    weights = MINIMAL | {"desirable_weight": 1.5}
    config, _ = ours(capsys, "trl", write(tmp_path / "a.yaml", **weights))
    assert (config.dpo.loss_type, config.dpo.desirable_weight) == ("kto", 1.5)
    assert config.dpo.kto_group == 8  # TRL's default batch of a device
    for keys, message in (
        ({"loss_type": ["hinge"]}, "desirable_weight (weighs answers of kto"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size (kto needs other"),
    ):
        with pytest.raises(ConfigError) as error:
            translate.main(["trl", write(tmp_path / "a.yaml", **weights | keys)])
        assert message in str(error.value)


@pytest.mark.parametrize(
    "source, base", [("trl", MINIMAL), ("llama-factory", FACTORY)], ids=["trl", "llama-factory"]
)
def test_smoothed_labels_are_those_of_sft(source, base, tmp_path, capsys):
    """Of transformers' LabelSmoother: (1 - e) nll + e x the mean over the vocabulary."""
    base = base | {"label_smoothing_factor": 0.1}
    config, _ = ours(capsys, source, write(tmp_path / "a.yaml", **base), "--task", "sft")
    assert config.sft.label_smoothing == 0.1
    dft = {"trl": {"loss_type": "dft"}, "llama-factory": {"use_dft_loss": True}}[source]
    file = write(tmp_path / "b.yaml", **base | dft)
    config, text = ours(capsys, source, file, "--task", "sft")
    assert config.sft.label_smoothing == 0 and "dft does not read 0.1" in text
    base = {key: value for key, value in base.items() if key != "stage"}
    for task in ("dpo", "reward"):
        _, text = ours(capsys, source, write(tmp_path / "c.yaml", **base), "--task", task)
        assert "# - label_smoothing_factor: only the loss of SFT reads it" in text


def test_trained_tokens_are_those_of_peft(tmp_path, capsys):
    for given in ([5, 7], {"embed_tokens": [5, 7], "lm_head": [5, 7]}):
        file = write(tmp_path / "a.yaml", **ALPACA_QLORA, peft_trainable_token_indices=given)
        config, text = ours(capsys, "axolotl", file)
        assert config.lora.trainable_token_indices == [5, 7] and "untied head" in text
    apart = {"embed_tokens": [5, 7], "lm_head": [5]}
    file = write(tmp_path / "a.yaml", **ALPACA_QLORA, peft_trainable_token_indices=apart)
    with pytest.raises(ConfigError, match="peft_trainable_token_indices .trains other tokens"):
        translate.main(["axolotl", file])


ADAPTERS = {"use_peft": True, "lora_target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "source, keys, name",
    [
        ("axolotl", ALPACA_QLORA, "lora_modules_to_save"),
        ("trl", MINIMAL | ADAPTERS | {"assistant_only_loss": True}, "lora_modules_to_save"),
        ("llama-factory", FACTORY, "additional_target"),
    ],
    ids=["axolotl", "trl", "llama-factory"],
)
def test_whole_tables_are_those_of_peft(source, keys, name, tmp_path, capsys):
    for given in (["embed_tokens", "lm_head"], ["model.embed_tokens", "lm_head"]):
        given = ",".join(given) if source == "llama-factory" else given
        file = write(tmp_path / "a.yaml", **keys, **{name: given})
        config, text = ours(capsys, source, file)
        assert config.lora.modules_to_save == ["embed_tokens", "lm_head"] and "tied head" in text
    file = write(tmp_path / "a.yaml", **keys, **{name: ["embed_tokens", "norm"]})
    with pytest.raises(ConfigError, match=f"{name} .norm is no embedding or language model head"):
        translate.main([source, file])


def test_the_head_of_a_scorer_is_named_in_vain(tmp_path, capsys):
    file = write(tmp_path / "a.yaml", **MINIMAL, **ADAPTERS, lora_modules_to_save=["score"])
    config, _ = ours(capsys, "trl", file, "--task", "reward")
    assert config.lora.modules_to_save is None


@pytest.mark.parametrize(
    "source, keys, message",
    [
        ("open-instruct", {"dpo_loss_type": "wpo"}, "dpo_loss_type (wpo is none of"),
        ("axolotl", {"rl": "grpo"}, "rl (is no algorithm"),
        ("axolotl", {"rl": "kto"}, "type alpaca has no translation for kto"),
        ("llama-factory", {"stage": "ppo"}, "stage (is no stage that is translated"),
        ("axolotl", {"datasets": [{"path": "p", "type": "metharme"}]}, "type metharme has no"),
        (
            "axolotl",
            {"rl": "dpo", "datasets": [{"path": "p", "type": "completion"}]},
            "type completion has no answers",
        ),
        (
            "axolotl",
            {"datasets": [{"path": "p", "data_files": ["a", "b"], "type": "alpaca"}]},
            "datasets (several data_files: write one source for each)",
        ),
        ("axolotl", {"special_tokens": {"eos_token": "<x>"}}, "special_tokens (changes tokens"),
        ("axolotl", {"model_config": {"rope_theta": 1.0}}, "model_config (the model is loaded as"),
        ("axolotl", {"lr_scheduler": "one_cycle"}, "lr_scheduler (one_cycle is none of"),
        ("llama-factory", {"finetuning_type": "freeze"}, "finetuning_type (freeze has no"),
        ("llama-factory", {"use_muon": True}, "use_muon (adapters are trained by AdamW"),
        ("axolotl", {"optimizer": "muon"}, "optimizer (its updates have another scale"),
        ("llama-factory", {"use_galore": True}, "use_galore (the optimizers are AdamW and Muon"),
    ],
)
def test_other_sources_refuse_by_name(source, keys, message, tmp_path):
    base = {"open-instruct": TULU_DPO, "axolotl": ALPACA_QLORA, "llama-factory": FACTORY}[source]
    with pytest.raises(ConfigError) as error:
        translate.main([source, write(tmp_path / "a.yaml", **base | keys)])
    assert message in str(error.value)


def test_a_line_without_flags_is_refused():
    with pytest.raises(ConfigError, match="expected a command line"):
        translate.main(["easylm", "x.yaml"])


if __name__ == "__main__":
    PAGE.write_text(page())
