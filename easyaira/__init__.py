"""EasyAira: align language models in JAX, with numbers that are proven and runs that repeat."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load`, imported with JAX when it is first used."""
    if name == "load":
        from easyaira.loaded import load

        return load
    raise AttributeError(f"module 'easyaira' has no attribute {name!r}")
