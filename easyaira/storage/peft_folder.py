"""A folder in PEFT's format as a model: an adapter, merged into the base that it names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from easyaira.errors import ConfigError
from easyaira.files import read_json
from easyaira.hf.transfer import Each
from easyaira.lora import peft
from easyaira.lora.adapter import Adapter, adapter_of
from easyaira.models.model import Model
from easyaira.storage.base import as_stored, load_resized
from easyaira.storage.pretrained import Pretrained, find, sampled

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class PeftFolder(Pretrained):
    """An adapter of a language model, as peft or a release of ours writes it."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Content of adapter_config.json.

        Raises:
            ConfigError: it cannot be read, uses an unsupported feature, names no base, or is of a
                scorer.
        """
        file = self.folder / peft.ADAPTER_CONFIG
        settings = read_json(file)
        peft.check_features(settings, file)
        base = settings.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{file}: base_model_name_or_path: {base!r:.80}; name the base")
        if settings.get("task_type") == "SEQ_CLS":
            raise ConfigError(
                f"{self.name}: holds an adapter that makes a scorer of {base}; name its run "
                "folder, or merge it in peft"
            )
        return settings

    @cached_property
    def base(self) -> Pretrained:
        name, revision = (self.settings.get(k) for k in ("base_model_name_or_path", "revision"))
        try:
            return find(name, revision)
        except ConfigError as error:
            raise ConfigError(
                f"{self.name}: the base of its adapter, base_model_name_or_path: {error}"
            ) from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of the base's config.json, with room for the tokens that the adapter adds."""
        tokens = max(peft.trained_tokens(self.settings), default=-1) + 1
        tables = [len(table) for name, table in self._tensors.items() if peft.TABLE.search(name)]
        config = self.base.config
        return config | {"vocab_size": max(config["vocab_size"], tokens, *tables)}

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return peft.open_weights(self.folder)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return super().generation_config or self.base.generation_config

    @property
    def adapter(self) -> dict[str, Any]:
        return {"config": dict(self.settings), "base": self.base.location()}

    def tokenizer(self, name: str | None = None) -> Any:
        """The adapter's own tokenizer, or that of its base."""
        own = any((self.folder / file).exists() for file in TOKENIZER_FILES)
        return super().tokenizer(name) if name or own else self.base.tokenizer()

    def stored_dtypes(self) -> dict[str, str]:
        return self.base.stored_dtypes()

    def sample(self) -> str:
        both = f"{self.base.sample()} {sampled(self._tensors)}"
        return hashlib.sha256(both.encode()).hexdigest()

    def check(self, model: Model) -> list[str]:
        """Raises like `Pretrained.check`; and ConfigError if the adapter is not of this model."""
        self.of(model)
        self.base.check(as_stored(self.base, model))
        return [row.ours for row in model.score_rows]

    def of(self, model: Model) -> Adapter:
        """The adapter, without its weights."""
        file = self.folder / peft.ADAPTER_CONFIG
        try:
            return adapter_of(peft.lora_config(self.settings, file, model), model)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error

    def load(
        self,
        model: Model,
        mesh: Any,
        *,
        head_key: jax.Array | None = None,
        each: Each | None = None,
    ) -> Any:
        """Load the parameters with the adapter merged, see `Pretrained.load`."""
        adapter = self.of(model)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, adapter.target(mesh))
        params = jax.device_put(peft.read_peft(adapter, self.folder), shardings)
        key = jax.random.key(0) if head_key is None else head_key
        merged = adapter.merging(params)

        def ready(path: tuple, leaf: jax.Array) -> Any:
            leaf = merged(path, leaf)
            return leaf if each is None else each(path, leaf)

        return load_resized(self.base, model, mesh, key=key, each=ready)
