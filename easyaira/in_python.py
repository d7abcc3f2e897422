"""Training in Python: `easyaira.train_sft(config)` and its like."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from easyaira import cli
from easyaira.errors import ConfigError


class Run:
    """A finished run.

    Attributes:
        folder: the run folder.
        template: its chat template.
    """

    def __init__(self, folder: str, template: str):
        self.folder, self.template = Path(folder), template

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, as for pandas.DataFrame."""
        from easyaira.train import log

        return log.read(self.folder / "metrics.jsonl")

    @cached_property
    def model(self) -> Any:
        """The trained model, see `easyaira.load`."""
        from easyaira.loaded import load

        return load(str(self.folder), template=self.template)


class Training(ModuleType):
    """A module of a training command, which can also be called with its configuration."""

    def __call__(self, config: Any | Mapping[str, Any]) -> Run:
        """Train, or resume, as the command does.

        Args:
            config: the options as a nested dictionary, or a configuration of easyaira.config.run.

        Raises:
            EasyAiraError: as the command's errors; or this is not the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "training handles signals, which Python allows in the main thread only; call it "
                "there, or start its command as a process"
            )
        if isinstance(config, Mapping):
            config = cli.configuration(self.CONFIG, _plain(config))
        if not isinstance(config, self.CONFIG):
            raise ConfigError(f"expected a dictionary or a {self.CONFIG.__name__}, got {config!r}")
        cli.start(config, self.ALGORITHM)
        return Run(config.output_dir, config.data.template)


def _plain(value: Any) -> Any:
    """The same with paths as text, as on a command line."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
