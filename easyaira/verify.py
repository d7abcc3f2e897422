"""Logits of a Hugging Face folder as PyTorch computes them. A process of its own, for its memory.

A language model is given one prompt at a time, a scorer all of them in a batch, padded with its
pad_token_id, as those who use it will do.

python -m easyaira.verify FOLDER '[[1, 2, 3]]' [BASE]     writes FOLDER/logits.npz

With BASE, FOLDER is an adapter in PEFT's format of the model in BASE.
"""

import json
import os
import sys
import warnings


def main(folder: str, prompts: list[list[int]], base: str | None = None) -> None:
    warnings.simplefilter("error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BatchEncoding,
    )

    config = AutoConfig.from_pretrained(base or folder)
    scorer = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    auto = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    model, info = auto.from_pretrained(base or folder, dtype="float32", output_loading_info=True)
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        sys.exit(f"keys do not match: {problems}")
    if base:
        for outdated in (DeprecationWarning, FutureWarning):  # that peft's use of transformers is
            warnings.simplefilter("ignore", outdated)
        from peft import PeftModel  # it warns of keys that do not match, which is an error here

        model = PeftModel.from_pretrained(model, folder)
    model.eval()

    def run(**batch):
        return model(**BatchEncoding(batch, tensor_type="pt")).logits.detach().numpy()

    if scorer:
        longest = max(map(len, prompts))
        padded = [ids + [config.pad_token_id] * (longest - len(ids)) for ids in prompts]
        real = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in prompts]
        logits = run(input_ids=padded, attention_mask=real)
    else:
        logits = [run(input_ids=[ids])[0] for ids in prompts]
    np.savez(os.path.join(folder, "logits.npz"), *logits)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
