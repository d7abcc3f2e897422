"""Trackers in addition to metrics.jsonl: TensorBoard, and others whose packages are extras.

They are opened on the first process. A tracker that fails later is dropped with a warning, since
metrics.jsonl has everything; only a full disk ends the run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyaira.config.run import RunConfig, to_dict
from easyaira.errors import ConfigError, StorageError
from easyaira.files import reason

Values = Mapping[str, float]


def _without_tensorboard(print_error: Callable[..., Any]) -> Callable[..., None]:
    """A threading.excepthook that leaves out errors of TensorBoard's thread, which its next call
    raises again."""

    def hook(unhandled: Any) -> None:
        if not type(unhandled.thread).__module__.startswith("tensorboard."):
            print_error(unhandled)

    return hook


threading.excepthook = _without_tensorboard(threading.excepthook)


class TensorBoard:
    """Event files in tensorboard/."""

    def __init__(self, config: RunConfig, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._metadata, self._tensor = SummaryMetadata, TensorProto
        # tensorboard.summary.Writer stores scalars as tensors, of which TensorBoard's loader keeps
        # 10 by default; scalars as simple_value keep every step
        self.place = folder / "tensorboard"
        try:
            self._writer = EventFileWriter(str(self.place))
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self.place}: cannot be written: {reason(error)}")

    def write(self, step: int, values: Values) -> None:
        scalars = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._add(step, scalars)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts as literal blocks, since TensorBoard renders Markdown."""
        plugin = self._metadata.PluginData(plugin_name="text")
        values = []
        for name, text in texts.items():
            literal = "".join(f"    {line}\n" for line in text.splitlines())
            tensor = self._tensor(dtype="DT_STRING", string_val=[literal.encode()])
            metadata = self._metadata(plugin_data=plugin)
            values.append(self._summary.Value(tag=name, metadata=metadata, tensor=tensor))
        self._add(step, values)

    def _add(self, step: int, values: list[Any]) -> None:
        summary = self._summary(value=values)
        try:
            self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # metrics.jsonl, in the same folder, has reported it
            self._writer.close()


class Other:
    """A tracker without texts."""

    def __init__(self, config: RunConfig, folder: Path):
        """Open the run of this folder, or continue it."""

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        pass


class Wandb(Other):
    """Weights & Biases; its own variables (WANDB_PROJECT, WANDB_MODE, ...) apply."""

    def __init__(self, config: RunConfig, folder: Path):
        import wandb

        own = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            name=folder.name, id=own, resume="allow", dir=str(folder), config=to_dict(config)
        )

    def write(self, step: int, values: Values) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Other):
    """Trackio, with the folder's parent as its project; TRACKIO_DIR applies."""

    def __init__(self, config: RunConfig, folder: Path):
        import trackio

        place = folder.absolute()
        self.trackio = trackio
        trackio.init(
            project=place.parent.name or "easyaira",
            name=place.name,
            resume="allow",
            config=to_dict(config),
        )

    def write(self, step: int, values: Values) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()


class MLflow(Other):
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply."""

    def __init__(self, config: RunConfig, folder: Path):
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_dict(to_dict(config), "config.yaml")

    def write(self, step: int, values: Values) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


# metrics of an update's cost, not of what it learns
COSTS = frozenset(
    "compilations cpu_time data_wait mfu num_tokens padding positions step_time "
    "tokens_per_second".split()
)


def tag(metric: str) -> str:
    """Name of a metric in a tracker, which groups by the first part: train/ or eval/ as in
    transformers, perf/ for costs."""
    held_out = metric.removeprefix("eval_")
    if held_out != metric:
        return f"eval/{held_out}"
    return f"perf/{metric}" if metric in COSTS else f"train/{metric}"


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}


def check(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed, before anything is written.

    Raises:
        ConfigError: one is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f'report_to: needs {name}; pip install ".[{name}]", or leave {name} out'
            )


class Trackers:
    """The trackers of a run.

    Raises:
        ConfigError: one cannot be opened.
        StorageError: event files for TensorBoard cannot be written, here or later.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self.open: dict[str, Any] = {}
        for name in dict.fromkeys(config.report_to):
            try:
                self.open[name] = TRACKERS[name](config, folder)
            except StorageError:
                self.close()
                raise
            except Exception as error:  # each library raises its own
                self.close()
                raise ConfigError(
                    f"report_to: {name} cannot be opened: {reason(error)}; set it up, or leave "
                    f"{name} out"
                ) from error

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Pass the known values of a row to the trackers, under their tags."""
        known = {tag(name): value for name, value in values.items() if value is not None}
        self._each("write", step, known)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._each("texts", step, texts)

    def close(self) -> None:
        self._each("close")
        self.open.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.open.items()):
            try:
                getattr(tracker, method)(*arguments)
            except StorageError:
                raise
            except Exception as error:  # each library raises its own
                del self.open[name]
                print(f"warning: report_to: {name} fails and is left out: {reason(error)}")
