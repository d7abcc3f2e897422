"""Checks of a released folder against its proof.json."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from easyaira.config.run import PROVENANCE
from easyaira.errors import ConfigError, EasyAiraError
from easyaira.export import card, proof, torch_check
from easyaira.export.records import Records
from easyaira.files import read_file, read_json, reason
from easyaira.hf import safetensors
from easyaira.lora import peft
from easyaira.storage import pretrained

LONGEST = 80  # characters of a value in a message
SHOWN = 3  # problems in a message


class Result(NamedTuple):
    """Outcome of a check. `ok` is None where it could not be made."""

    check: str
    ok: bool | None
    message: str


class NotMade(Exception):
    """A check that cannot be made here, with the reason."""


class Release:
    """A released folder and its proof; each check lists its problems, and what it compared."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.proof = proof.read(folder)

    def results(self) -> Iterator[Result]:
        """Make every check that applies."""
        yield from (self._result(name, check) for name, check in self._checks().items())

    def _checks(self) -> dict[str, Callable[[], tuple[list[str], str]]]:
        checks = {"proof": self._report, "tensors": self._tensors, "files": self._files}
        if self.proof["base"]:
            checks["base"] = self._base
        checks |= {"logits": self._logits, "card": self._card}
        if self.proof["run"] and (self.folder.resolve().parent / "config.yaml").exists():
            checks["run"] = self._run
        return checks

    def _result(self, name: str, check: Callable[[], tuple[list[str], str]]) -> Result:
        try:
            problems, compared = check()
        except NotMade as why:
            return Result(name, None, f"not checked: {why}")
        except EasyAiraError as error:
            problems, compared = [str(error)], ""
        except OSError as error:
            problems, compared = [f"{error.filename}: {reason(error)}"], ""
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems, compared = [f"{proof.FILE} does not fit this check: {reason(error)}"], ""
        if not problems:
            return Result(name, True, compared)
        rest = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        return Result(name, False, "; ".join([*problems[:SHOWN], *rest]))

    def _report(self) -> tuple[list[str], str]:
        """Compare proof.json with its own hash, and with export_report.json."""
        if not proof.intact(self.proof):
            return [f"{proof.FILE} was changed after the release; get the original file"], ""
        report = read_json(self.folder / proof.REPORT)
        if report["tensors"] != self.proof["tensors"]:
            return [f"{proof.FILE} and {proof.REPORT} are of different releases"], ""
        return [], f"{proof.FILE} is as it was written"

    def _stored(self) -> dict[str, np.ndarray]:
        if self.proof["base"]:
            return safetensors.open_file(self.folder / peft.ADAPTER_WEIGHTS)
        return safetensors.open_folder(self.folder)

    def _unread(self) -> list[str]:
        """Weights that are no part of the release; a program may read all files of a folder."""
        if self.proof["base"]:
            own = {peft.ADAPTER_WEIGHTS}
        else:
            own = safetensors.weight_files(self.folder)
        return [path.name for path in self.folder.glob("*.safetensors") if path.name not in own]

    def _tensors(self) -> tuple[list[str], str]:
        released, stored = self.proof["tensors"], self._stored()
        names = {entry["sha256"]: name for name, entry in released.items()}
        problems = [f"{name}: is missing" for name in released if name not in stored]
        problems += [f"{name}: was not released" for name in stored if name not in released]
        changed = 0
        for name, tensor in stored.items():
            if name not in released:
                continue
            now, was = proof.described(tensor), released[name]
            changed += now != was
            if different := [key for key in ("dtype", "shape") if now[key] != was[key]]:
                key = different[0]
                problems.append(f"{name}: {key} is {now[key]}, was released as {was[key]}")
            elif now != was and (other := names.get(now["sha256"])):
                problems.append(f"{name}: holds the tensor that was released as {other}")
            elif now != was:
                problems.append(f"{name}: other values than were released")
        if changed and changed == len(released):
            problems.insert(0, f"no tensor is as in {proof.FILE}: rounded again, or of another run")
        return problems, f"{len(released)} tensors are as released, bit for bit"

    def _files(self) -> tuple[list[str], str]:
        released, present = self.proof["files"], proof.files(self.folder)
        problems = [f"{name}: is missing" for name in released if name not in present]
        problems += [f"{name}: was not released" for name in present if name not in released]
        problems += [f"{name}: was not released" for name in self._unread()]
        for name in released.keys() & set(present):
            was = released[name]
            if proof.file_hash(self.folder / name) == was["sha256"]:
                continue
            if "content" not in was:
                problems.append(f"{name}: is another file than was released")
                continue
            now = read_json(self.folder / name, type(was["content"]))
            problems += [f"{name}: {line}" for line in _differences(was["content"], now)]
        return sorted(
            problems
        ), f"{len(released)} files of configuration and tokenizer are as released"

    def _base_model(self) -> pretrained.Pretrained:
        config = read_json(self.folder / peft.ADAPTER_CONFIG)
        try:
            return pretrained.find(config["base_model_name_or_path"], config.get("revision"))
        except ConfigError as error:
            raise NotMade(f"the base: {error}") from error

    def _base(self) -> tuple[list[str], str]:
        base = self._base_model()
        if proof.base_hash(base) != self.proof["base"]["sha256"]:
            return [f"{base.name}: holds other weights than the base of this adapter"], ""
        return [], f"{base.name} is the base of this adapter"

    def _logits(self) -> tuple[list[str], str]:
        released = self.proof["logits"]
        if not released["compared"]:
            raise NotMade(f"they were not compared at the release either ({released['why']})")
        sizes = [math.prod(entry["shape"]) for entry in self.proof["tensors"].values()]
        base = self._base_model() if self.proof["base"] else None
        if base is not None:
            tensors = safetensors.open_folder(base.folder).values()
            sizes += [tensor.size for tensor in tensors]
        if why := torch_check.obstacle(sum(sizes), adapter=base is not None):
            raise NotMade(why)
        self._stored()  # nothing but readable safetensors is given to PyTorch
        prompts = [prompt["ids"] for prompt in released["prompts"]]
        logits = torch_check.torch_logits(self.folder, prompts, base and base.folder)
        difference = max(
            float(np.abs(np.array(torch_check.summary(now)) - np.array(prompt["logits"])).max())
            for now, prompt in zip(logits, released["prompts"], strict=True)
        )
        if not difference <= released["tolerance"]:
            bound = f"more than {released['tolerance']:.2g}"
            return [f"PyTorch's differ from the released ones by {difference:.2g}, {bound}"], ""
        return [], f"PyTorch's are within {difference:.1g} of those at the release"

    def _card(self) -> tuple[list[str], str]:
        released = self.proof["card"]
        now = card.stated(read_file(self.folder / proof.CARD).decode("utf-8"))
        problems = _differences(released["front"], now["front"])
        for heading, lines in released["sections"].items():
            current = now["sections"].get(heading, [])
            added = [line for line in current if line not in lines]
            for line in lines:
                if line not in current:
                    near = difflib.get_close_matches(line, added, 1)
                    actual = f", says {_shown(near[0])}" if near else ""
                    problems.append(f"{heading}: released with {_shown(line)}{actual}")
                    added = [other for other in added if other not in near]
            problems += [f"{heading}: {_shown(line)} was added" for line in added if "|" in line]
        return [f"{proof.CARD}: {line}" for line in problems], "the card's figures are as released"

    def _run(self) -> tuple[list[str], str]:
        """Compare with the run folder around this one."""
        run = self.proof["run"]
        records = Records(self.folder.resolve().parent, run["updates"])
        current = proof.of_run(records)
        problems = []
        if current["configuration_sha256"] != run["configuration_sha256"]:
            lines = _differences(run["configuration"], current["configuration"])
            problems += [f"config.yaml: {line}" for line in lines or ["another configuration"]]
        if current["data"] != run["data"]:
            problems.append("config.yaml: its data_fingerprint is of other data")
        for when, figures in run["metrics"].items():
            lines = _differences(figures, current["metrics"][when])
            problems += [f"metrics.jsonl: {line}" for line in lines]
        name = records.config[PROVENANCE]["data_fingerprint"][:12]
        return (
            problems,
            f"configuration, data ({name}...) and metrics are those of {records.folder}",
        )


def verify(folder: Path) -> list[Result]:
    """Check a release against its proof.json.

    Raises:
        ConfigError: the folder holds no proof.json.
    """
    return list(Release(folder).results())


def _differences(was: Any, now: Any, key: str = "") -> list[str]:
    """Keys whose values differ, a line each."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        lines = []
        for name in sorted(was.keys() | now.keys()):
            missing = object()
            values = was.get(name, missing), now.get(name, missing)
            path = f"{key}.{name}" if key else name
            if values[1] is missing:
                lines.append(f"{path} is missing, was released as {_shown(values[0])}")
            elif values[0] is missing:
                lines.append(f"{path} is {_shown(values[1])}, was released without it")
            else:
                lines += _differences(*values, path)
        return lines
    if was == now and type(was) is type(now):
        return []
    return [f"{key} is {_shown(now)}, was released as {_shown(was)}"]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
