"""The data of axolotl 0.19: its sets, their forms and templates, and tokens of the file's own."""

from __future__ import annotations

from typing import Any

from easyaira.translation.recipe import Recipe
from easyaira.translation.rows import TEXTS

ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\\n\\n### Instruction:\\n' + m['content'] + "
    "'\\n\\n### Response:\\n' }}{% endif %}{% endfor %}"
)
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA_2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
READ = (  # keys of a source that are read
    "path split name data_files type field_messages message_property_mappings roles "
    "field_chosen field_rejected ds_type revision chat_template field message_field_role "
    "message_field_content conversation drop_system_message"
).split()
AS_HERE = {  # keys of a source -> values that mean the behaviour here
    "roles_to_train": (None, ["assistant"], ["gpt"]),
    "train_on_eos": (None, "turn"),
    "train_on_eot": (None, "turn"),
}
FORMS = {  # type -> template
    "alpaca": ALPACA,
    "chat_template": None, "chat_template.default": None, "chat_template.argilla": None,
    "sharegpt": None, "bradley_terry.chat_template": None, "chat_template.llama3": None,
    "completion": None,
}  # fmt: skip
RATED_FORMS = {  # form of rated answers -> column of the prompt
    "argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt",
}  # fmt: skip


def templates(run: Recipe) -> None:
    template = run.get("axolotl_template")
    run.facts["template_name"] = template
    if run.get("chat_template_jinja"):
        run.facts["chat_template"] = run.get("chat_template_jinja")
    elif template == "chatml":
        run.facts["chat_template"] = "chatml"
    elif template not in (None, "tokenizer_default"):
        run.note(f"data.template chat: the tokenizer's own template, in the place of {template}")


def tokens(run: Recipe) -> None:
    """Tokens of the file's own: the tokenizer's, those that template chatml adds, or refused.
    After `templates`."""
    chatml = run.get("chat_template") == "chatml"
    own = {k: v for k, v in run.get("special_tokens", {}).items() if k != "pad_token" and v}
    further = {"tokens": run.get("tokens")}
    further["special_tokens"] = own.pop("additional_special_tokens", None)
    if chatml:
        lists = [given for given in further.values() if isinstance(given, list)]
        _chatml(run, [token for given in (*lists, own.values()) for token in given], own)
    if own.get("eos_token") != LLAMA_2["eos_token"]:
        run.facts["eos_token"] = own.pop("eos_token", None)
        run.keys["eos_token"] = "special_tokens"
    for key, given in further.items():
        alike = chatml and isinstance(given, list) and all(token in CHATML for token in given)
        if given and not alike:
            run.refuse(key, "adds tokens to the tokenizer; save it with them")
    if own and not own.items() <= LLAMA_2.items():
        run.refuse("special_tokens", "changes tokens of the tokenizer; save it with them")
    elif own:
        run.note(f"special tokens are the tokenizer's own ({', '.join(own)} in the file)")


def _chatml(run: Recipe, named: list[Any], own: dict[str, Any]) -> None:
    """Note what differs for the tokens that template chatml adds. Take its start token out of
    `own`."""
    start, end = CHATML
    if start in named and end in named:
        run.note(f"{start} and {end} are added to the tokenizer by data.template chatml")
    else:
        run.note(
            f"data.template chatml adds {start} and {end} to a tokenizer that lacks them; there, "
            "what tokens and special_tokens do not name is spelled in several tokens"
        )
    if not run.get("mean_resizing_embeddings"):
        run.note("the vectors of added tokens begin at the mean of all others; there at random")
    if run.get("use_peft"):
        run.note("beside adapters, the vectors of added tokens are trained")
    if own.get("bos_token") == start:
        del own["bos_token"]
        run.note(f"the tokenizer keeps its start token, which stands before the first {start}")
    elif run.task == "sft":
        run.note("a conversation begins with the tokenizer's start token, if any; there with none")
    if run.task == "sft" and own.get("eos_token") != end:
        run.note(f"{end} is learned; there if eos_token or eot_tokens names it")


def sources(run: Recipe) -> None:
    """The data sets of a run, and the facts that follow from their forms."""
    if run.get("axolotl_streaming") and not run.get("axolotl_texts"):
        run.refuse("axolotl_streaming", "set streaming in the sources of the translated file")
    entries = _pretraining(run) or run.get("axolotl_datasets", [])
    run.facts["sources"] = [_source(run, entry) for entry in entries]
    run.facts["held_out"] = [_source(run, entry) for entry in run.get("axolotl_held_out", [])]
    whole = [entry.get("type") == "completion" for entry in entries]
    run.facts |= {"texts": bool(whole) and all(whole), "has_texts": any(whole)}
    if any(whole):
        run.note(TEXTS)
    if any(whole) and not all(whole):
        run.note(
            "a text above max_length is cut or dropped, and counted; axolotl divides it into "
            "several examples, as data.texts split does where all rows are texts"
        )
    if run.facts["texts"]:  # their parts are never too long there
        _split(run)
        run.facts["truncation_mode"] = "keep_start"
        run.options.pop("data.max_dropped", None)
    if run.facts["held_out"]:
        run.facts.setdefault("eval_strategy", "epoch")


def _pretraining(run: Recipe) -> list[dict[str, Any]]:
    """The entry of pretraining_dataset as one of datasets; axolotl reads the first alone."""
    if not (given := run.get("axolotl_texts")):
        return []
    entry, others = dict(given[0]), given[1:]
    if others or run.get("axolotl_datasets"):
        run.refuse("axolotl_texts", "axolotl reads one data set of it; leave out the others")
    if entry.pop("skip", None) or entry.pop("type", "pretrain") not in (None, "pretrain"):
        run.refuse("axolotl_texts", "skip and type have no translation")
    entry.pop("trust_remote_code", None)
    field = {"field": entry.pop("text_column", None) or "text"}
    run.note(
        "all texts are tokenised before the first update; where the run visits a part of them, set "
        "data.max_examples (texts), and streaming in data.train"
    )
    return [entry | field | {"type": "completion"}]


def _split(run: Recipe) -> None:
    """Texts above max_length: parts of them are examples."""
    if not run.get("axolotl_texts"):
        if run.get("dataset_exact_deduplication"):
            return run.note(
                "a text above max_length is cut, since data.deduplicate compares whole texts; "
                "axolotl divides it into several examples"
            )
        run.note("a text is read to its end; there up to 64 x sequence_len tokens")
    elif run.get("packing"):
        run.note(
            "parts of a text do not overlap, and the last one ends with an end token; there each "
            "part repeats up to 256 tokens of the one before, and each ends with an end token"
        )
        if run.facts.get("pretrain_multipack_attn") is False:
            run.note("each text is apart from the others of its row; there a row is one text")
    else:
        return run.note(
            "a text above max_length is cut; examples are apart from each other"
            + (", and there texts that share a row are one"
               if run.get("pretraining_sample_concatenation") else "")
        )  # fmt: skip
    run.options["data.texts"] = "split"


def filters(run: Recipe) -> None:
    """Rows that are left out. After `sources`."""
    if least := run.get("min_sample_len"):  # without it 2, below which there is nothing to learn
        run.options["data.min_length"] = least
        run.note(
            "rows below min_sample_len are counted as dropped; data.max_dropped limits the share "
            "of dropped rows"
        )
        if run.get("has_texts") and "data.texts" not in run.options:
            run.note("data.min_length is of whole texts; there of the parts of a long one, too")
    if not run.get("dataset_exact_deduplication"):
        return
    run.options["data.deduplicate"] = True
    if run.task == "dpo":
        run.note("a pair is a repeat by its tokens; there by columns that are not used, too")
    elif run.get("held_out"):
        run.note("held-out rows that are also trained on are left out; there they stay")


def _rated(run: Recipe, kind: str, made: dict[str, Any]) -> dict[str, Any]:
    """A source of KTO, whose rows have a prompt, a completion and a label."""
    template, _, form = kind.partition(".")
    if template not in ("chatml", "llama3") or form not in RATED_FORMS:
        run.refuse("axolotl_datasets", f"type {kind} has no translation for kto")
        return made
    made["template"] = "chatml" if template == "chatml" else "chat"
    if (column := RATED_FORMS[form]) != "prompt":
        made["columns"] = {"prompt": column}
    return made


def _source(run: Recipe, entry: dict[str, Any]) -> dict[str, Any]:
    """A source of ours from one of axolotl's."""
    kind = entry.get("type")
    rated = run.get("loss_type") == "kto" and isinstance(kind, str)
    if not rated and (not isinstance(kind, str) or kind not in FORMS):
        run.refuse("axolotl_datasets", f"type {kind} has no translation")
        return {}
    for key, values in AS_HERE.items():
        if entry.get(key) not in values:
            run.refuse("axolotl_datasets", f"{key} {entry[key]} of a data set has no translation")
    if unknown := entry.keys() - {*READ, *AS_HERE}:
        run.refuse("axolotl_datasets", f"{min(unknown)} of a data set has no translation")
    made = {"path": entry.get("data_files") or entry.get("path")}
    if isinstance(made["path"], list):
        if len(made["path"]) > 1:
            run.refuse("axolotl_datasets", "several data_files: write one source for each")
        made["path"] = made["path"][0]
    for key, ours in (("split", "split"), ("name", "subset")):
        if entry.get(key) not in (None, "train", "default"):
            made[ours] = entry[key]
    if rated:
        return _rated(run, str(kind), made)
    if template := FORMS[kind]:
        made["template"] = template
        run.note(
            "type alpaca: the input of a row follows the instruction on a line of its own, without "
            "the heading of axolotl's"
        )
    columns = {
        ours: entry[theirs]
        for ours, theirs in {"chosen": "field_chosen", "rejected": "field_rejected"}.items()
        if entry.get(theirs) not in (None, ours)
    }
    field = entry.get("field_messages")
    if kind == "completion":
        if run.task != "sft":
            run.refuse("axolotl_datasets", "type completion has no answers to compare")
        columns["text"] = entry.get("field", "text")
        return made | ({"columns": columns} if columns["text"] != "text" else {})
    if run.task != "sft":
        columns |= {"prompt": field} if field else {}
    elif field not in (None, "messages", "conversations"):
        columns["messages"] = field
    return made | ({"columns": columns} if columns else {})
