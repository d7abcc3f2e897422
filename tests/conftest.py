"""Tests run with eight virtual CPU devices; the fixture `devices` sets how many are used.

Fixtures import their own dependencies, so that test files without a model start at once.
"""

import ast
import gc
import os
import tempfile

import psutil

from easyaira.allocator import give_back_memory
from easyaira.distributed.compiler import keep_order

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch's threads would spin beside those of other workers
# tests and their child processes share a cache of programs that take 0.02 s to compile
cache = os.path.join(tempfile.gettempdir(), f"easyaira-tests-{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# XLA compiles the same operations in half the time; 0 tests its optimized machine code
QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
# and in less as one module of machine code a program
ONE_MODULE = "--xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {ONE_MODULE * QUICK}"
keep_order()
gc.set_threshold(200_000, 20, 100)  # the collector takes a tenth of the time of tracing

import jax
import pytest
from jaxtyping import _import_hook, install_import_hook

# argument types are checked in modules that take arrays; in others beartype rejects valid values,
# such as jsonargparse's restricted numbers
CHECKED = """
    losses models.attention models.embedding data.batches generation.processors train.optimizer
""".split()
CHECKED = [f"easyaira.{name}" for name in CHECKED]
visit_function = _import_hook.JaxtypingTransformer.visit_FunctionDef


def visit_outer_function(self, node):
    """Leave out functions inside others: each call of the outer one would build their checks."""
    inside = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
    return node if inside else visit_function(self, node)


_import_hook.JaxtypingTransformer.visit_FunctionDef = visit_outer_function
install_import_hook(CHECKED, "beartype.beartype")

from helpers import programs, quick

programs.share()
quick.use()

from easyaira.distributed import mesh as meshes

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def devices(monkeypatch):
    """`devices(4)` sets the number of visible devices; the default is one."""

    def use(count: int) -> None:
        monkeypatch.setattr(meshes, "all_devices", lambda: jax.devices()[:count])

    return use


@pytest.fixture(scope="session", autouse=True)
def children_in_process():
    """Leave out child processes, which import for seconds; the tests of each start it."""
    from helpers import in_process

    in_process.use()


@pytest.fixture
def optimized():
    """Compile as users do, where different programs must give the same bits."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICK)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Give each test its own data cache."""
    monkeypatch.setenv("EASYAIRA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def one_device(devices):
    devices(1)


LARGE = max(3e9, psutil.virtual_memory().total / 5)  # a machine has several workers, and children


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Free compiled programs after each test file, while this process holds LARGE. What a file
    leaves is frozen: else each later collection would walk it, and late tests take twice as long.
    """
    yield
    full = psutil.Process().memory_info().rss > LARGE
    if full:
        gc.unfreeze()
        jax.clear_caches()
        programs.shared.clear()
    gc.collect()
    gc.freeze()
    if full:
        give_back_memory()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with a Hugging Face model of each architecture."""
    from helpers import tiny

    return tiny.ground(tmp_path_factory.mktemp("models"), tiny.CONFIGS | tiny.FAMILIES)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder with rows for SFT and DPO."""
    from helpers import tiny

    root = tmp_path_factory.mktemp("data")
    return tiny.ground(root, sft=tiny.sft_rows(40), dpo=tiny.dpo_rows(40))
