"""Logits of a Hugging Face folder in PyTorch, in a separate process that frees its memory.

A language model gets one prompt at a time. A scorer gets all prompts in one batch, padded with its
pad_token_id, as in typical use.

python -m easyaira.export.torch_logits FOLDER '[[1, 2, 3]]' [BASE]     writes an .npz to stdout

With BASE, FOLDER is an adapter in PEFT's format for the model in BASE. A scorer's adapter contains
the head, so the head of BASE may be missing or different.
"""

import io
import json
import os
import sys
import warnings
from typing import Any


def main(folder: str, prompts: list[list[int]], base: str | None = None) -> None:
    stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    warnings.simplefilter("error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np

    content = io.BytesIO()
    np.savez(content, *logits_of(folder, prompts, base))
    with open(stdout, "wb") as pipe:
        pipe.write(content.getbuffer())


def logits_of(folder: str, prompts: list[list[int]], base: str | None = None) -> list[Any]:
    """Logits of each prompt: [T, V], [1] for a scorer, or [T] for a value model."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        BatchEncoding,
    )

    config = AutoConfig.from_pretrained(base or folder)
    name = (config.architectures or [""])[0]
    scorer = name.endswith("ForSequenceClassification")
    value = name.endswith("ForTokenClassification")
    options, replaced, pad = {}, (), None
    if base:
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            adapter = json.load(file)
        scorer = adapter["task_type"] == "SEQ_CLS"
        if scorer:
            pad = AutoTokenizer.from_pretrained(folder).pad_token_id
            options = {"num_labels": 1}
            replaced = tuple(adapter["modules_to_save"])
    auto = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    auto = AutoModelForTokenClassification if value else auto
    model, info = auto.from_pretrained(
        base or folder,
        dtype="float32",
        output_loading_info=True,
        use_safetensors=True,
        **options,
    )
    if replaced:
        info["missing_keys"] = [
            key for key in info["missing_keys"] if not set(replaced) & set(key.split("."))
        ]
        info["unexpected_keys"] = []  # heads of other tasks; our weight table checked ours
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        sys.exit(f"keys do not match: {problems}")
    if base:
        for outdated in (DeprecationWarning, FutureWarning):  # raised by peft's use of transformers
            warnings.simplefilter("ignore", outdated)
        from peft import PeftModel  # its warnings about keys are errors here

        rows = model.get_input_embeddings().weight.shape[0]
        if (longest := _rows(folder, adapter)) > rows:  # as AutoPeftModel does
            model.resize_token_embeddings(longest, mean_resizing=False)
        if pad is not None:
            model.config.pad_token_id = pad  # may be one of the new tokens
        model = PeftModel.from_pretrained(model, folder)
    model.eval()

    def run(**batch):
        return model(**BatchEncoding(batch, tensor_type="pt")).logits.detach().numpy()

    if value:
        return [run(input_ids=[ids])[0, :, 0] for ids in prompts]
    if not scorer:
        return [run(input_ids=[ids])[0] for ids in prompts]
    longest = max(map(len, prompts))
    padded = [ids + [model.config.pad_token_id] * (longest - len(ids)) for ids in prompts]
    real = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in prompts]
    return list(run(input_ids=padded, attention_mask=real))


def _rows(folder: str, adapter: dict[str, Any]) -> int:
    """Rows that an adapter needs in the embedding: for the tokens that it trains, or as many as its
    own tables have."""
    from safetensors import safe_open

    ids = adapter.get("trainable_token_indices") or []
    ids = ids if isinstance(ids, list) else [i for own in ids.values() for i in own]
    tables = tuple(f".{name}.weight" for name in adapter.get("modules_to_save") or ())
    with safe_open(os.path.join(folder, "adapter_model.safetensors"), "np") as tensors:
        names = [name for name in tensors.keys() if name.endswith(tables)]
        return max(
            [i + 1 for i in ids] + [tensors.get_slice(n).get_shape()[0] for n in names] + [0]
        )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
