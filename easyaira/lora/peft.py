"""PEFT's format: write an adapter as a folder for peft, and read one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from easyaira.config.model import LoraConfig
from easyaira.distributed.tree import by_path
from easyaira.errors import ConfigError, WeightsError
from easyaira.files import read_json
from easyaira.hf import safetensors
from easyaira.hf.table import TRANSPOSE, Row
from easyaira.lora.adapter import Adapter, nested
from easyaira.lora.targets import LM_HEAD, beside, module_of, rows_of, table_name, tied
from easyaira.models.model import Model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
TABLE = re.compile(r"(embed|wte|lm_head)[^.]*\.weight$")  # a whole table of vectors
PEFT_HEADS = {"classifier", "score"}  # peft lists both for every scorer; a model has one of them

# adapter_config.json keys without effect on what the tensors compute, given PEFT_NEUTRAL's values
PEFT_HARMLESS = set(
    """
    alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode layers_pattern loftq_config lora_alpha
    lora_dropout lora_ga_config megatron_config megatron_core modules_to_save peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules task_type
    trainable_token_indices use_dora use_rslora
    """.split()
)
# keys that change the numbers: their supported values. Any other key must be empty.
PEFT_NEUTRAL: dict[str, tuple] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "peft_type": ("LORA",),
}
PATTERNS = ("rank_pattern", "alpha_pattern")
EMPTY = (None, False, 0, [], {}, "")


def _peft_names(row: Row, layer: int) -> dict[str, str]:
    """peft's names of a layer's tensors, by ours."""
    module = PEFT_PREFIX + module_of(row).format(layer)
    return {
        "lora_a": f"{module}.lora_A.weight",
        "lora_b": f"{module}.lora_B.weight",
        "lora_magnitude": f"{module}.lora_magnitude_vector",
    }


def _peft_layout(name: str, leaf: np.ndarray) -> np.ndarray:
    """A layer's A as [r, in], its B as [out, r], or its magnitudes as [out]."""
    return leaf.reshape(-1) if name == "lora_magnitude" else leaf.reshape(len(leaf), -1).T


def _peft_rows(row: Row) -> str:
    """Name of the trained vectors [n, D] of a table, which peft calls a delta."""
    return f"{PEFT_PREFIX}{module_of(row)}.token_adapter.trainable_tokens_delta"


def to_peft(adapter: Adapter, params: Any) -> dict[str, np.ndarray]:
    """Tensors with peft's names and layout: A [r, in], B [out, r] and magnitudes [out] for each
    layer, those of what is trained in full, and vectors [n, D] of trained tokens."""
    flat, tensors = by_path(params), {}
    for row in adapter.targets:
        for name in _own(adapter):
            for i, leaf in enumerate(np.asarray(flat[beside(row, name)])):
                tensors[_peft_names(row, i)[name]] = np.ascontiguousarray(_peft_layout(name, leaf))
    for row in adapter.whole:
        tensor = row.cut(np.asarray(flat[row.ours]), adapter.model.vocab_size)
        tensors |= dict.fromkeys(_whole_names(adapter, row), np.ascontiguousarray(tensor))
    for row in adapter.tables:
        tensors[_peft_rows(row)] = np.asarray(flat[rows_of(row)])
    return tensors


def from_peft(adapter: Adapter, tensors: Mapping[str, np.ndarray], where: str) -> Any:
    """Inverse of `to_peft`; checks names and shapes.

    Raises:
        WeightsError: a tensor is missing, left over, of another shape or not finite.
    """
    shapes, flat, left = by_path(adapter.shapes), {}, dict(tensors)

    def take(name: str, wanted: tuple[int, ...]) -> np.ndarray:
        tensor = left.pop(name, None)
        if tensor is None or tensor.shape != wanted:
            problem = "is missing" if tensor is None else f"has shape {tensor.shape}"
            raise WeightsError(
                f"{where}: {name} {problem}; expected shape {wanted}. Is it an adapter of this "
                f"model, with these lora.target_modules{_modules_hint(adapter)}?"
            )
        if not np.isfinite(tensor).all():
            raise WeightsError(
                f"{where}/{ADAPTER_WEIGHTS}: {name}: contains NaN or infinity; the file is damaged "
                "or the model diverged"
            )
        return tensor.astype(np.float32)

    for row in adapter.targets:
        for name in _own(adapter):
            layers, *shape = shapes[beside(row, name)].shape
            layout = _peft_layout(name, np.empty(shape)).shape
            own = (take(_peft_names(row, i)[name], layout) for i in range(layers))
            flat[beside(row, name)] = np.stack([tensor.T.reshape(shape) for tensor in own])
    for row in adapter.whole:
        shape = shapes[row.ours].shape
        layout = row.cut(np.broadcast_to(np.float32(0), shape), adapter.model.vocab_size).shape
        name, *others = _whole_names(adapter, row)
        tensor = take(name, layout)
        for other in others:
            if other not in left or not np.array_equal(take(other, layout), tensor):
                raise WeightsError(
                    f"{where}: {other} differs from {name}, so they were trained separately, "
                    "but this model's head is its embedding; train the adapter with peft's "
                    "ensure_weight_tying"
                )
        padding = zip(shape, row.op.to_ours(tensor).shape, strict=True)  # of the vocabulary
        flat[row.ours] = np.pad(row.op.to_ours(tensor), [(0, a - b) for a, b in padding])
    for row in adapter.tables:
        flat[rows_of(row)] = take(_peft_rows(row), shapes[rows_of(row)].shape)
    if whole := sorted(filter(TABLE.search, left)):
        raise WeightsError(
            f"{where}: holds {whole[0]}, and lora.modules_to_save does not name it; add it, or "
            "save the adapter with peft's save_embedding_layers=False"
        )
    if left:
        raise WeightsError(
            f"{where}: has {sorted(left)[0]}, which is not in lora.target_modules; add it"
        )
    return nested(flat)


def _own(adapter: Adapter) -> tuple[str, ...]:
    """Our names of the tensors of a linear layer's adapter."""
    return ("lora_a", "lora_b", *(("lora_magnitude",) if adapter.config.dora else ()))


def _modules_hint(adapter: Adapter) -> str:
    return f" and modules_to_save {adapter.modules_to_save}" if adapter.whole else ""


def _whole_names(adapter: Adapter, row: Row) -> list[str]:
    """peft's names of a tensor that is trained in full. A tied head is stored beside it."""
    names = [row.theirs]
    if row.op.vocab_axis is not None and tied(adapter.model):
        names.append(f"{LM_HEAD}.weight")
    return [PEFT_PREFIX + name for name in names]


def peft_config(adapter: Adapter, base: str, revision: str | None) -> dict[str, Any]:
    """Content of adapter_config.json."""
    alpha, saved = adapter.config.alpha, adapter.modules_to_save
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if adapter.model.scorer else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": adapter.config.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.config.dropout,
        "rank_pattern": adapter.config.rank_pattern or {},
        "alpha_pattern": adapter.config.alpha_pattern or {},
        "use_rslora": adapter.config.rslora,
        "use_dora": adapter.config.dora,
        "target_modules": adapter.target_modules,
        "fan_in_fan_out": any(row.op is not TRANSPOSE for row in adapter.targets),
        "bias": "none",
        "modules_to_save": saved or None,
        # peft ties them where the name of one of them is lm_head
        **({"ensure_weight_tying": True} if tied(adapter.model) and saved else {}),
        "trainable_token_indices": _token_indices(adapter),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _token_indices(adapter: Adapter) -> list[int] | dict[str, list[int]] | None:
    """`trainable_token_indices` of adapter_config.json: a list for the embedding, which a tied head
    follows; with an untied head, a list for each table that is not trained in full."""
    names = [table_name(row) for row in adapter.tables]
    if len(names) > 1 or LM_HEAD in names:
        return dict.fromkeys(names, adapter.tokens)
    return adapter.tokens or None


def lora_config(settings: Mapping[str, Any], file: Path, model: Model) -> LoraConfig:
    """The adapter that adapter_config.json describes, without dropout.

    Raises:
        ConfigError: a value is of another kind.
    """
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    for name, value, kinds in (("r", rank, int), ("lora_alpha", alpha, (int, float))):
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise ConfigError(f"{file}: {name}: {value!r:.80}; expected a number above 0")
    for name in PATTERNS:
        pattern = settings.get(name) or {}
        if not isinstance(pattern, dict) or not all(
            type(x) in (int, float) for x in pattern.values()
        ):
            raise ConfigError(f"{file}: {name}: {pattern!r:.80}; expected numbers by name")
    targets = settings.get("target_modules")
    if not isinstance(targets, str) and not _names(targets):
        raise ConfigError(f"{file}: target_modules: {targets!r:.80}; expected names of layers")
    follows = {LM_HEAD} if tied(model) else set()  # peft lists a tied head beside the embedding
    saved = _saved(settings, file) - follows
    return LoraConfig(
        target_modules=targets,
        r=rank,
        alpha=float(alpha),
        rank_pattern=settings.get("rank_pattern") or None,
        alpha_pattern=settings.get("alpha_pattern") or None,
        rslora=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
        trainable_token_indices=trained_tokens(settings) or None,
        modules_to_save=sorted(saved) or None,
    )


def trained_tokens(settings: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens whose vectors adapter_config.json trains, those of the first table."""
    stored = settings.get("trainable_token_indices") or []
    return next(iter(stored.values()), []) if isinstance(stored, dict) else stored


def _saved(settings: Mapping[str, Any], file: Path) -> set[str]:
    """Last parts of the names in modules_to_save."""
    saved = settings.get("modules_to_save") or []
    if not _names(saved):
        raise ConfigError(f"{file}: modules_to_save: {saved!r:.80}; expected a list of names")
    return {name.rpartition(".")[2] for name in saved}


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def check_features(config: Mapping[str, Any], file: Path) -> None:
    """Check that an adapter is LoRA or DoRA on the base as it is stored.

    Raises:
        ConfigError: a feature that is not supported, or a key that is unknown and filled.
    """
    for key, value in config.items():
        if key in PEFT_HARMLESS:
            continue
        if key == "init_lora_weights" and value not in PEFT_NEUTRAL[key]:
            raise ConfigError(
                f"{file}: init_lora_weights: {value!r:.80} changes the base, which is not "
                "supported; convert it with peft's path_initial_model_for_weight_conversion"
            )
        if value not in PEFT_NEUTRAL.get(key, EMPTY):
            accepted = PEFT_NEUTRAL.get(key, EMPTY)[0]
            raise ConfigError(f"{file}: {key}: {value!r:.80} is not supported; only {accepted!r}")


def read_peft(adapter: Adapter, folder: Path) -> Any:
    """Read the parameters of an adapter from a folder in PEFT's format.

    Raises:
        ConfigError: adapter_config.json cannot be read, uses an unsupported feature, or differs
            from `adapter` in rank, scale or magnitudes.
        WeightsError: see `from_peft`.
    """
    file = folder / ADAPTER_CONFIG
    config = read_json(file)
    check_features(config, file)
    stored, wanted = _saved(config, file), {*adapter.modules_to_save}
    either = {LM_HEAD} if tied(adapter.model) else PEFT_HEADS if adapter.model.scorer else set()
    if (stored ^ wanted) - either:
        raise ConfigError(
            f"{file}: modules_to_save: is {sorted(stored)!r:.80}, but the run trains "
            f"{sorted(wanted)} in full; set lora.modules_to_save, which takes tables alone"
        )
    names = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
    names |= {name: name for name in PATTERNS}
    for ours, theirs in names.items():
        wanted, stored = getattr(adapter.config, ours), config.get(theirs, False)
        if (wanted or False) != (stored or False):
            raise ConfigError(
                f"lora.{ours}: is {wanted}, but {file} has {stored}; set it to {stored}"
            )
    wanted, stored = _token_indices(adapter), config.get("trainable_token_indices") or None
    if isinstance(stored, dict) and isinstance(wanted, list):  # the embedding, by its name
        (table,) = adapter.tables
        stored = stored.get(table_name(table)) if len(stored) == 1 else stored
    if wanted != stored:
        raise ConfigError(
            f"{file}: trainable_token_indices: is {stored!r:.80}, but the run trains {wanted!r:.80}"
            "; use its data.template, or set lora.trainable_token_indices"
        )
    tensors = open_weights(folder)
    safetensors.check_exported(folder, tensors)
    return from_peft(adapter, tensors, str(folder))


def open_weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter, which are read when they are used.

    Raises:
        WeightsError: there is no adapter_model.safetensors, or it is damaged.
    """
    weights = folder / ADAPTER_WEIGHTS
    if not weights.exists() and (pickle := folder / "adapter_model.bin").exists():
        raise WeightsError(
            f"{folder}: no {weights.name}; {pickle.name} is a pickle, which could run code, so it "
            "is not read; convert the adapter to safetensors with peft's save_pretrained"
        )
    return safetensors.open_file(weights)
