"""Quick compilation for tests: XLA's compiler options without its fusion emitters for CPUs, which
take two thirds of the time."""

import jax
from jax._src import compiler

compile_options = compiler.get_compile_options


def quick_options(*args, env_options_overrides=None, backend=None, **kwargs):
    """In place of JAX's function; nothing changes where programs are optimized."""
    options = dict(env_options_overrides or {})
    quick = jax.config.read("jax_disable_most_optimizations")
    switch = jax.__version_info__ < (0, 11)  # JAX 0.12 has none; 0.11 was not tried
    if quick and switch and getattr(backend, "platform", "") == "cpu":
        options["xla_cpu_use_fusion_emitters"] = False
    return compile_options(*args, env_options_overrides=options, backend=backend, **kwargs)


def use():
    compiler.get_compile_options = quick_options
