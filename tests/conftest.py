"""All tests run in processes with eight virtual CPU devices; `devices` says how many are used.

Fixtures import what only they need: a file of tests that needs no model starts at once.
"""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# what one test has compiled, the next one reads
cache = os.path.join(tempfile.gettempdir(), f"easyaira-tests-{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from jaxtyping import install_import_hook

# arguments are checked where arrays are; elsewhere beartype refuses what is no mistake, such as
# jsonargparse's restricted numbers
CHECKED = [
    f"easyaira.{name}" for name in ("losses", "models.attention", "data.batches", "train.optimizer")
]
install_import_hook(CHECKED, "beartype.beartype")

from easyaira.distributed import mesh as meshes

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def devices(monkeypatch):
    """`devices(4)`: from here on there are four devices. One, unless a test says otherwise."""

    def use(count: int) -> None:
        monkeypatch.setattr(meshes, "all_devices", lambda: jax.devices()[:count])

    return use


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Pages of runs come without their curves, which take seconds to draw..."""
    from helpers import undrawn

    with pytest.MonkeyPatch.context() as patch:
        undrawn.leave_out(patch.setattr)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """... but for tests that look at them."""
    from helpers import undrawn

    for module, name, drawn in undrawn.PICTURES:
        monkeypatch.setattr(module, name, drawn)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tokenised data of a test are its own."""
    monkeypatch.setenv("EASYAIRA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def one_device(devices):
    devices(1)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Programs of a file's tests are not kept in memory for those of the next."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A Hugging Face folder of each architecture."""
    from helpers import tiny

    return tiny.ground(tmp_path_factory.mktemp("models"), tiny.CONFIGS)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Rows of each task."""
    from helpers import tiny

    root = tmp_path_factory.mktemp("data")
    return tiny.ground(root, sft=tiny.sft_rows(40), dpo=tiny.dpo_rows(40))
