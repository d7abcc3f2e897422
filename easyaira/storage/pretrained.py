"""Where a model comes from: the hub, a Hugging Face folder, or a run folder of ours."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from easyaira.config.run import PROVENANCE
from easyaira.distributed.tree import by_path, path_of
from easyaira.errors import ConfigError, TokenizerError, WeightsError
from easyaira.hf import safetensors, transfer
from easyaira.lora.adapter import Adapter, of_record
from easyaira.lora.base import check_base
from easyaira.models.model import Model
from easyaira.models.registry import model_of
from easyaira.storage.checkpoints import Checkpoints
from easyaira.storage.integrity import fingerprint

TOKENIZER = "tokenizer"  # the tokenizer's folder in a run folder
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Pretrained:
    """A model's files, found and not yet read.

    Attributes:
        name: as it was asked for.
        folder: a Hugging Face folder, or a run folder.
        step: of the checkpoint in a run folder; None for a Hugging Face folder.
        commit: that a hub id stood for.
    """

    name: str
    folder: Path
    step: int | None = None
    commit: str | None = None

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint of ours says of its model."""
        checkpoints = Checkpoints(checkpoint_dir(self.folder))
        try:
            return checkpoints.meta(self.step)
        finally:
            checkpoints.close()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.meta["config"] if self.step is not None else _json(self.folder / "config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        if self.step is not None:
            return self.meta["generation_config"]
        file = self.folder / "generation_config.json"
        return _json(file) if file.exists() else {}

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        return safetensors.open_folder(self.folder)

    def sample(self) -> str:
        """A hash that tells these weights from others without reading all: of what a checkpoint
        says of its run, or of each stored tensor's name, dtype, shape and first and last values."""
        if self.step is not None:
            record = json.dumps([self.step, self.meta], sort_keys=True)
            return hashlib.sha256(record.encode()).hexdigest()
        found = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            flat = tensor.reshape(-1)
            found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            found.update(flat[:64].tobytes() + flat[-64:].tobytes())
        return found.hexdigest()

    def stored_dtypes(self) -> dict[str, str]:
        """Name of a tensor -> the dtype it is stored with; "" stands for all others."""
        if self.step is not None:
            return self.meta["stored_dtypes"]
        names = {name: tensor.dtype.name for name, tensor in self._tensors.items()}
        kinds = sorted(set(names.values()), key=list(names.values()).count)
        return {n: kind for n, kind in names.items() if kind != kinds[-1]} | {"": kinds[-1]}

    @property
    def adapter(self) -> dict[str, Any] | None:
        """What a checkpoint of a run with adapters says of them (lora.adapter.to_record)."""
        return self.meta.get("lora") if self.step is not None else None

    @cached_property
    def base(self) -> Pretrained:
        """What the adapters of a run stand on."""
        base = self.adapter["base"]
        return find(base["name"], base["commit"])

    def location(self) -> dict[str, Any]:
        """Where this is found again, from any working directory."""
        if self.commit is not None:
            return {"name": self.name, "commit": self.commit}
        folder = self.folder.resolve()
        at = folder if self.step is None else folder / CHECKPOINTS / str(self.step)
        return {"name": str(at), "commit": None}

    def check(self, model: Model) -> list[str]:
        """Compare the files with what the model's config wants, before anything is read. Returns
        the paths of a scorer's head that are not stored, and will have to be drawn.

        Raises:
            ConfigError: adapters whose base is gone.
            WeightsError: other tensors are missing, left over or of another shape.
        """
        if self.step is None:
            return _absent(model, self._matched(model))
        if self.adapter is not None:
            self.base.check(self._saved)
        if self._saved.scorer and not model.scorer:
            raise WeightsError(f"{self.name}: holds a scorer, which has no head to write with")
        return [] if self._saved.scorer else [row.ours for row in model.score_rows]

    @cached_property
    def _saved(self) -> Model:
        """The model that a checkpoint of ours holds."""
        return model_of(self.config, str(self.folder))

    def _matched(self, model: Model) -> dict[str, np.ndarray]:
        return transfer.match(
            self._tensors,
            model.shapes,
            model.rows,
            vocab_size=model.vocab_size,
            prefix=model.architecture.prefix,
            ignored=model.ignored,
            renamed=model.architecture.renamed,
            optional=model.optional,
            tied=model.config.tie_word_embeddings,
            where=str(self.folder),
        )

    def load(
        self,
        model: Model,
        mesh: Any,
        *,
        head_key: jax.Array | None = None,
        each: transfer.Each | None = None,
    ) -> Any:
        """The float32 parameters, each device with its own slice. Adapters are merged into theirs.

        Args:
            model: what they are for.
            mesh: where they will lie.
            head_key: draws the head of a scorer, as far as it is not stored.
            each: what becomes of a parameter as soon as it is read.

        Raises:
            WeightsError: as `check`, and a tensor that is not finite, a head that is not stored, or
                adapters whose base is not what it was.
            StorageError: a checkpoint that cannot be read.
        """
        target = model.target(mesh)
        stored = self._matched(model) if self.step is None else None
        missing = self.check(model) if stored is None else _absent(model, stored)
        if missing and head_key is None:
            raise WeightsError(f"{self.name}: has no {missing[0]}; train_reward gives it a head")
        drawn = _drawn(model, target, missing, head_key) if missing else {}
        if stored is not None:
            return transfer.from_hf(stored, target, model.rows, drawn, each)
        if self._saved.scorer == model.scorer:
            params = self._stored(model, mesh)
        else:
            found = by_path(self._stored(self._saved, mesh)) | drawn
            params = jax.tree_util.tree_map_with_path(lambda path, _: found[path_of(path)], target)
        if each is None:
            return params
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        del params
        # one after another, so that each may be freed as soon as something else has become of it
        leaves = [each(*leaves.pop(0)) for _ in range(len(leaves))]
        return jax.tree.unflatten(tree, leaves)

    def _stored(self, model: Model, mesh: Any) -> Any:
        """What a checkpoint of ours holds."""
        if self.adapter is None:
            return self._restore(model.target(mesh))
        adapter = of_record(self.adapter, model)
        return adapter.merge(self.load_base(adapter, mesh), self.load_adapter(adapter, mesh))

    def load_base(self, adapter: Adapter, mesh: Any) -> Any:
        """What adapters stand on, in float32, if it is still what it was; a head that it has not
        got is drawn, and will be replaced."""
        params = self.base.load(adapter.model, mesh, head_key=jax.random.key(0))
        frozen, _ = adapter.parted(params)
        check_base(self.adapter, fingerprint(frozen), self.name)
        return params

    def load_adapter(self, adapter: Adapter, mesh: Any) -> Any:
        """The parameters of adapters alone."""
        return self._restore(adapter.target(mesh))

    def _restore(self, target: Any) -> Any:
        checkpoints = Checkpoints(checkpoint_dir(self.folder))
        try:
            return checkpoints.restore_params(self.step, target)
        finally:
            checkpoints.close()

    def tokenizer(self, name: str | None = None) -> Any:
        """The model's tokenizer, or the one that `name` says.

        Raises:
            TokenizerError: there is none, or it is of a kind that cannot be used.
        """
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
        from transformers import AutoTokenizer

        # warns of long texts; what is cut is decided and counted in data/tokenise.py
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        folder = self.folder / TOKENIZER if self.step is not None else self.folder
        if name is not None:
            folder = find(name).folder
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds, all of them mean the same here
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise TokenizerError(
                f"{folder}: no tokenizer could be loaded ({reason}); name one in model.tokenizer"
            ) from error
        if not tokenizer.is_fast:
            raise TokenizerError(f"{folder}: only fast tokenizers (tokenizer.json) can be used")
        return tokenizer


def _absent(model: Model, stored: Mapping[str, Any]) -> list[str]:
    """Paths of what a model wants and is not among its stored tensors."""
    return [row.ours for row in model.rows if row.theirs.format(0) not in stored]


def _drawn(model: Model, target: Any, paths: list[str], key: jax.Array) -> dict[str, jax.Array]:
    """These parameters of new weights. The compiler leaves out all others."""

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        leaves = by_path(model.init(key))
        return {path: leaves[path] for path in paths}

    places = by_path(target)
    return jax.jit(draw, out_shardings={path: places[path].sharding for path in paths})(key)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: wanted an object, found {type(content).__name__}")
    return content


def checkpoint_dir(run: Path) -> Path | str:
    """Where the checkpoints of a run folder lie; its config.yaml may name another place."""
    try:
        written = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        written = None  # no run folder, or of another program
    ours = isinstance(written, dict) and PROVENANCE in written
    return (ours and written.get("checkpoint_dir")) or run / CHECKPOINTS


def find(name: str, revision: str | None = None, *, weights_wanted: bool = True) -> Pretrained:
    """The files that `name` stands for: a run folder (its newest checkpoint) or one of its
    checkpoints (RUN/checkpoints/STEP, wherever they lie), a Hugging Face folder, or a hub id.

    Raises:
        ConfigError: nothing is there.
    """
    path = Path(name).expanduser()
    if revision and path.is_dir():
        raise ConfigError(f"model.revision: {name} is a local folder, which has no revisions")
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        run = path.parent.parent
        if path.is_dir() or checkpoint_dir(run) != run / CHECKPOINTS:
            return Pretrained(name, run, step=int(path.name))
    if path.is_dir():
        place = checkpoint_dir(path)
        if place != path / CHECKPOINTS or place.is_dir():
            checkpoints = Checkpoints(place)
            step = checkpoints.latest()
            checkpoints.close()
            if step is None:
                raise ConfigError(f"{name}: a run folder without a finished checkpoint")
            return Pretrained(name, path, step=step)
        return Pretrained(name, path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{name}: no such folder; check the path")
    return _download(name, revision, weights_wanted)


def _download(name: str, revision: str | None, weights_wanted: bool) -> Pretrained:
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + ["*.safetensors"] * weights_wanted
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except Exception as error:  # the library raises many kinds, all of them mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name}: no such folder, and not found on the model hub ({reason}); check the name, "
            "or the network"
        ) from error
    return Pretrained(name, Path(folder), commit=Path(folder).name)
