"""EasyAira: align language models in JAX, with numbers that are proven and runs that repeat."""

__version__ = "0.1.0"
