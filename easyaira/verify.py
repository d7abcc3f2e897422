"""Logits of a Hugging Face folder as PyTorch computes them. A process of its own, for its memory.

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
    from transformers import AutoModelForCausalLM, BatchEncoding

    model, info = AutoModelForCausalLM.from_pretrained(
        base or folder, dtype="float32", output_loading_info=True
    )
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        sys.exit(f"keys do not match: {problems}")
    if base:
        for outdated in (DeprecationWarning, FutureWarning):  # that peft's use of transformers is
            warnings.simplefilter("ignore", outdated)
        from peft import PeftModel  # it warns of keys that do not match, which is an error here

        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    logits = []
    for ids in prompts:
        batch = BatchEncoding({"input_ids": [ids]}, tensor_type="pt")
        logits.append(model(**batch).logits[0].detach().numpy())
    np.savez(os.path.join(folder, "logits.npz"), *logits)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
