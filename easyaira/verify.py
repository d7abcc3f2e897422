"""Logits of a Hugging Face folder as PyTorch computes them. A process of its own, for its memory.

python -m easyaira.verify FOLDER '[[1, 2, 3]]'     writes FOLDER/logits.npz
"""

import json
import os
import sys
import warnings


def main(folder: str, prompts: list[list[int]]) -> None:
    warnings.simplefilter("error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    from transformers import AutoModelForCausalLM, BatchEncoding

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        sys.exit(f"keys do not match: {problems}")
    model.eval()
    logits = []
    for ids in prompts:
        batch = BatchEncoding({"input_ids": [ids]}, tensor_type="pt")
        logits.append(model(**batch).logits[0].detach().numpy())
    np.savez(os.path.join(folder, "logits.npz"), *logits)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
