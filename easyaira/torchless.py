"""transformers without PyTorch, whose import takes half of a command's start. The parts that are
used here, tokenizers and configurations, do not need it."""

import importlib
import os
import sys
from types import ModuleType

hidden = False


def hide_torch() -> None:
    """Have `import_transformers` hide PyTorch. Only for processes that use no model of
    transformers: it cannot be undone. PyTorch itself can still be imported."""
    global hidden
    hidden = True


def import_transformers(part: str = "") -> ModuleType:
    """transformers, or a part such as ".utils"; it takes PyTorch for missing after `hide_torch`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about a missing torch
    if hidden and not {"torch", "transformers"} & sys.modules.keys():
        sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            from transformers.utils import is_torch_available

            is_torch_available()  # transformers remembers the answer
        finally:
            del sys.modules["torch"]
    return importlib.import_module(f"transformers{part}")
