"""Sources of a pretrained model: the hub, a Hugging Face folder, or a run folder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easyaira.config.run import PROVENANCE
from easyaira.distributed import hosts
from easyaira.distributed.tree import by_path, path_of
from easyaira.errors import (
    ConfigError,
    StorageError,
    WeightsError,
    escaped,
    shown_as,
)
from easyaira.files import check_links, named_path, read_json, read_yaml
from easyaira.hf import safetensors, transfer
from easyaira.hf.lazy import Lazy
from easyaira.lora.adapter import Adapter, nested, of_record
from easyaira.lora.peft import ADAPTER_CONFIG
from easyaira.models.model import Model
from easyaira.models.registry import model_of
from easyaira.storage.base import as_stored, load_base
from easyaira.storage.checkpoints import Checkpoints
from easyaira.storage.chosen import chosen
from easyaira.storage.hub import TEXTS, download
from easyaira.storage.object_store import finished_steps
from easyaira.storage.tokenizers import load_tokenizer

TOKENIZER = "tokenizer"  # subfolder of a run folder
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Pretrained:
    """Location of a model's files, which are read on demand.

    Attributes:
        name: the name that was asked for.
        folder: a Hugging Face folder or a run folder.
        step: checkpoint step in a run folder; None for a Hugging Face folder.
        commit: commit of a model from the hub; else None.
    """

    name: str
    folder: Path
    step: int | None = None
    commit: str | None = None

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Meta record of the checkpoint in a run folder."""
        with closing(Checkpoints(checkpoint_dir(self.folder))) as checkpoints:
            return checkpoints.meta(self.step)

    def _recorded(self, name: str) -> dict[str, Any]:
        if not isinstance(self.meta.get(name), dict):
            place = f"{checkpoint_dir(self.folder)}/{self.step}"
            raise StorageError(f"{place}: its meta record has no {name}; use another checkpoint")
        return self.meta[name]

    @property
    def where(self) -> str:
        """Its folder, for messages; of a model from the hub its name, as the cache is private."""
        return str(self.folder) if self.commit is None else self.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        if self.step is not None:
            return self._recorded("config")
        file = self.folder / "config.json"
        if not file.exists() and self.commit is None:
            models = [*self.folder.glob("*/config.json"), *self.folder.glob(f"*/{CHECKPOINTS}")]
            such = f", such as {min(models).parent}" if models else ""
            raise ConfigError(
                f"{self.name}: holds no config.json, so it is not a model; name a run folder or a "
                f"Hugging Face folder{such}"
            )
        with shown_as(self.folder, self.where):
            return read_json(file)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        if self.step is not None:
            return self._recorded("generation_config")
        file = self.folder / "generation_config.json"
        with shown_as(self.folder, self.where):
            return read_json(file) if file.exists() else {}

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        with shown_as(self.folder, self.where):
            return safetensors.open_folder(self.folder)

    def sample(self) -> str:
        """Hash that identifies these weights without reading them all.

        It covers step and meta record of a checkpoint, or is `sampled` of a Hugging Face folder."""
        if self.step is not None:
            record = json.dumps([self.step, self.meta], sort_keys=True)
            return hashlib.sha256(record.encode()).hexdigest()
        return sampled(self._tensors)

    def stored_dtypes(self) -> dict[str, str]:
        """Map from tensor name to stored dtype; "" stands for all other tensors. Float64 counts as
        float32, to which weights are rounded when they are read."""
        if self.step is not None:
            return self._recorded("stored_dtypes")
        dtypes = {name: tensor.dtype.name for name, tensor in self._tensors.items()}
        return without_most_common({n: d.replace("float64", "float32") for n, d in dtypes.items()})

    def is_rounded(self) -> bool:
        """Whether weights lose bits when they are read."""
        return self.step is None and any(t.dtype == np.float64 for t in self._tensors.values())

    @property
    def adapter(self) -> dict[str, Any] | None:
        """Adapter record of a run with adapters (see lora.adapter.to_record), or None."""
        return self.meta.get("lora") if self.step is not None else None

    @cached_property
    def base(self) -> Pretrained:
        """The base model of a run's adapters."""
        base = self.adapter["base"]
        try:
            return find(base["name"], base["commit"])
        except ConfigError as error:
            raise ConfigError(f"{self.name}: put the base of its adapters back: {error}") from error

    def location(self) -> dict[str, Any]:
        """Name and commit that identify this model from any working directory."""
        if self.commit is not None:
            return {"name": self.name, "commit": self.commit}
        folder = self.folder.resolve()
        at = folder if self.step is None else folder / CHECKPOINTS / str(self.step)
        return {"name": str(at), "commit": None}

    def identity(self) -> dict[str, Any]:
        """Location and hash of the weights, which may be replaced in their folder."""
        return self.location() | {"weights": self.sample()[:16]}

    def check(self, model: Model) -> list[str]:
        """Check names and shapes of the stored tensors before reading any. Returns the paths of
        score head parameters that are not stored and must be initialised.

        Raises:
            ConfigError: the base of the adapters no longer exists.
            WeightsError: another tensor is missing, left over or of another shape.
        """
        if self.step is None:
            return _missing(model, self._matched(model))
        if self.adapter is not None:
            self.base.check(as_stored(self.base, self._saved))
        if self._saved.scorer and not model.scorer:
            raise WeightsError(
                f"{self.name}: is a scorer, which has no language model head; name a language model"
            )
        return [] if self._saved.scorer else [row.ours for row in model.score_rows]

    @cached_property
    def _saved(self) -> Model:
        """The model whose weights the checkpoint holds."""
        return model_of(self.config, self.where)

    def _matched(self, model: Model) -> dict[str, np.ndarray]:
        return model.match(self._tensors, self.where)

    def load(
        self,
        model: Model,
        mesh: Any,
        *,
        head_key: jax.Array | None = None,
        each: transfer.Each | None = None,
    ) -> Any:
        """Load the float32 parameters, sharded over `mesh`. Adapters are merged into their base.

        Args:
            model: the model that takes the parameters.
            mesh: devices to load onto.
            head_key: initialises those parameters of a score head that are not stored.
            each: applied to every parameter as soon as it is read.

        Raises:
            WeightsError: see `check`; or a tensor is not finite or not what was exported, the head
                is not stored and `head_key` is None, or the base of the adapters has changed.
            StorageError: the checkpoint cannot be read.
        """
        target = model.target(mesh)
        stored = self._matched(model) if self.step is None else None
        missing = self.check(model) if stored is None else _missing(model, stored)
        if missing and head_key is None:
            raise WeightsError(no_score_head(self.name, missing))
        drawn = model.init_some(missing, target, head_key) if missing else {}
        if stored is not None:
            self._check_exported()
            return transfer.from_hf(stored, target, model.rows, drawn, each, where=self.where)
        if self.adapter is not None and each is not None and self._saved.scorer == model.scorer:
            return self._merged(model, mesh, each)
        if self._saved.scorer == model.scorer:
            params = self._stored(model, mesh)
        else:
            leaves = by_path(self._stored(self._saved, mesh)) | drawn
            params = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_of(path)], target)
        if each is None:
            return params
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        del params
        return each_of(leaves, tree, each)

    def lazy(self, model: Model, mesh: Any) -> Any:
        """The parameters of `load` as `Lazy` arrays; merged adapters need all at once. Raises like
        `load`, also when they are read."""
        if self.adapter is not None or self.check(model):
            return self.load(model, mesh)
        target, leaves = model.target(mesh), jax.tree.leaves
        if self.step is None:
            self._check_exported()
            return transfer.lazy_from_hf(self._matched(model), target, model.rows, where=self.where)
        with closing(Checkpoints(checkpoint_dir(self.folder))) as checkpoints:
            shapes = checkpoints.shapes(self.step)
        saved = {name.removeprefix("params/") for name in shapes if name.startswith("params/")}
        if odd := saved ^ by_path(target).keys():
            raise StorageError(f"{self.where}: {min(odd)} is missing, or not of this model")

        def lazy(key_path: tuple, leaf: Any) -> Lazy:
            one = nested({path_of(key_path): leaf})
            return Lazy(leaf.shape, leaf.dtype, lambda: leaves(self._restore(one, part=True)))

        return jax.tree_util.tree_map_with_path(lazy, target)

    def _check_exported(self) -> None:
        if hosts.first():
            with shown_as(self.folder, self.where):
                safetensors.check_exported(self.folder, self._tensors)

    def _stored(self, model: Model, mesh: Any) -> Any:
        """Parameters of the checkpoint, with adapters merged."""
        if self.adapter is None:
            return self._restore(model.target(mesh))
        return self._merged(model, mesh, lambda path, leaf: leaf)

    def _merged(self, model: Model, mesh: Any, each: transfer.Each) -> Any:
        """Parameters of the base, each merged with the adapters as soon as it is read."""
        adapter = of_record(self.adapter, model)
        merged = adapter.merging(self.load_adapter(adapter, mesh))
        return load_base(self, adapter, mesh, lambda path, leaf: each(path, merged(path, leaf)))

    def load_adapter(self, adapter: Adapter, mesh: Any) -> Any:
        """Load only the parameters of the adapters."""
        return self._restore(adapter.target(mesh))

    def _restore(self, target: Any, *, part: bool = False) -> Any:
        with closing(Checkpoints(checkpoint_dir(self.folder))) as checkpoints:
            return checkpoints.restore_params(self.step, target, part=part)

    def tokenizer(self, name: str | None = None) -> Any:
        """Load the model's tokenizer, or that of `name`.

        Raises:
            TokenizerError: there is no tokenizer, or it is not a fast one.
        """
        if name is not None:
            return find(name).tokenizer()
        folder = self.folder / TOKENIZER if self.step is not None else self.folder
        return load_tokenizer(folder, str(folder) if self.commit is None else self.name)


def no_score_head(name: str, missing: list[str]) -> str:
    return (
        f"{name}: is not a reward model, as it has no {missing[0]}; train one with easyaira reward"
    )


def each_of(leaves: list, tree: Any, each: transfer.Each) -> Any:
    """Apply `each` to every parameter. Empties `leaves`, pairs of path and array, so that each
    original is freed as soon as it is converted."""
    return jax.tree.unflatten(tree, [each(*leaves.pop(0)) for _ in range(len(leaves))])


def sampled(tensors: Mapping[str, np.ndarray]) -> str:
    """Hash of the name, dtype, shape and first and last 64 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(flat[:64].tobytes() + flat[-64:].tobytes())
    return digest.hexdigest()


def without_most_common(dtypes: Mapping[str, str]) -> dict[str, str]:
    """Names of dtypes by tensor; "" stands for all tensors of the most common one."""
    kinds = sorted(set(dtypes.values()), key=list(dtypes.values()).count)
    return {n: kind for n, kind in dtypes.items() if kind != kinds[-1]} | {"": kinds[-1]}


def _missing(model: Model, stored: Mapping[str, Any]) -> list[str]:
    """Paths of the model's parameters that are not among the stored tensors."""
    return [row.ours for row in model.rows if row.theirs.format(0) not in stored]


def checkpoint_dir(run: Path) -> Path | str:
    """Checkpoint folder of a run folder; config.yaml may set `checkpoint_dir`."""
    try:
        written = read_yaml(run / "config.yaml")
    except ConfigError:
        written = {}  # not a run folder, or another program's
    return (PROVENANCE in written and written.get("checkpoint_dir")) or run / CHECKPOINTS


def find(name: str, revision: str | None = None, *, weights_wanted: bool = True) -> Pretrained:
    """Locate the model called `name`.

    Args:
        name: a run folder (see `chosen`), a checkpoint (RUN/checkpoints/STEP, also where
            checkpoint_dir is elsewhere), a Hugging Face folder, or a hub id.
        revision: of a hub id.
        weights_wanted: whether to download weights from the hub, too.

    Raises:
        ConfigError: no model is found.
    """
    path = named_path(name)
    if revision and path.is_dir():
        raise ConfigError(
            f"model.revision: {name} is a local folder without revisions; leave it out"
        )
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        run = path.parent.parent
        if path.is_dir() or checkpoint_dir(run) != run / CHECKPOINTS:
            return _of_run(name, run, int(path.name))
    if path.is_dir():
        place = checkpoint_dir(path)
        if place != path / CHECKPOINTS or place.is_dir():
            if (step := chosen(place)) is None:
                raise ConfigError(
                    f"{name}: this run folder has no finished checkpoint; run its command again"
                )
            return _of_run(name, path, step)
        check_links(path, TEXTS)
        return _of_folder(name, path)
    if path.is_file():
        raise ConfigError(f"{name}: is a file; name the folder that it is in")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        of_run = path.parent.name == CHECKPOINTS and path.parent.is_dir()
        steps = finished_steps(path.parent) if of_run else []
        others = f"; the run has {', '.join(map(str, steps))}" if steps else ""
        raise ConfigError(f"{name}: no such folder; check the path{others}")
    folder = download(name, revision, weights_wanted=weights_wanted)
    return _of_folder(name, folder, folder.name)


def _of_folder(name: str, folder: Path, commit: str | None = None) -> Pretrained:
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        from easyaira.storage.peft_folder import PeftFolder  # late: it calls `find`

        return PeftFolder(name, folder, commit=commit)
    return Pretrained(name, folder, commit=commit)


def _of_run(name: str, run: Path, step: int) -> Pretrained:
    if (run / TOKENIZER).is_dir():
        check_links(run / TOKENIZER, TEXTS)
    if (place := checkpoint_dir(run)) != run / CHECKPOINTS:
        _tell(f"{name}: checkpoints are read from {place}")
    return Pretrained(name, run, step=step)


@cache
def _tell(line: str) -> None:
    """Print a line once; not to stdout, which may be an answer."""
    print(escaped(line), file=sys.stderr, flush=True)
