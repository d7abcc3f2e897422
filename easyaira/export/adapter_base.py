"""The base that a released adapter names, in a form that peft can load."""

from __future__ import annotations

from typing import Any

import jax

from easyaira.errors import ConfigError
from easyaira.export import proof
from easyaira.models.model import Model
from easyaira.storage.integrity import fingerprint
from easyaira.storage.pretrained import Pretrained, find


def loadable(base: Pretrained) -> Pretrained | None:
    """A base that peft can load: the base itself if it is no checkpoint, else the release of its
    run, if that holds this checkpoint's weights unrounded, as its proof says. None: neither."""
    if base.step is None:
        return base
    folder = base.folder / "hf"
    try:
        record = proof.read(folder)
    except ConfigError:
        return None
    run, tensors = record.get("run") or {}, record.get("tensors") or {}
    unrounded = {entry["dtype"] for entry in tensors.values()} == {"float32"}
    if record.get("base") is not None or run.get("updates") != base.step or not unrounded:
        return None
    return Pretrained(str(folder), folder)


def compared(base: Pretrained, model: Model, mesh: Any) -> Pretrained | None:
    """`loadable`, after comparing all weights of the release with those of the checkpoint."""
    release = loadable(base)
    if release in (None, base):
        return release

    def bits(origin: Pretrained) -> str:
        return fingerprint(origin.load(model, mesh, head_key=jax.random.key(0)))

    return release if bits(release) == bits(base) else None


def to_convert(base: Pretrained, place: str) -> str:
    """The command that writes a base as a folder for peft; `place` names the base."""
    merge = " --merge" if base.adapter is not None else ""
    return f"easyaira convert to_hf {place} BASE{merge}"


def warning(base: Pretrained) -> str | None:
    """Warning if peft cannot load this base as it is: how to make the release usable."""
    if loadable(base) is not None:
        return None
    place = base.location()["name"]
    return (
        f"hf/ will hold an adapter on {place}, which peft cannot load. To use it, run "
        f"`{to_convert(base, place)}` and name BASE in its adapter_config.json, or export this run "
        "with convert to_hf --merge"
    )


def moved(adapter: str, base: Pretrained) -> str | None:
    """Warning if the adapter that a run continues was trained on other weights than this base.
    Releases on a checkpoint, and adapters of other programs, hold no hash of weights."""
    try:
        of = proof.read(find(adapter).folder).get("base") or {}
    except ConfigError:
        return None
    stored = None if of.get("name", "").isdigit() else loadable(base)
    if stored is None or of.get("sha256") in (None, proof.base_hash(stored)):
        return None
    return (
        f"lora.adapter: {adapter} was trained on {of['name']}, and {base.name} holds other "
        "weights; name that model in model.name_or_path, unless you mean this one"
    )
