"""EasyAira: align language models in JAX, with numbers that are proven and runs that repeat."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load` and the training commands, imported when they are first used."""
    import importlib

    if name == "load":
        return importlib.import_module("easyaira.loaded").load
    if name in ("train_sft", "train_dpo", "train_reward", "train_rl"):
        return importlib.import_module(f"easyaira.{name}")
    raise AttributeError(f"module 'easyaira' has no attribute {name!r}")
