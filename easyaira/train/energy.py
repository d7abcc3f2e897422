"""Energy and CO2 of a run, by CodeCarbon: emissions.csv in the run folder, one line per session.

A session is one start of the command. The run's energy is the sum over its sessions. A line is
written when a session begins and completed when the session ends, also by an error. A line without
figures belongs to a killed session, whose energy is unknown and not in the sum. CodeCarbon measures
where power can be read (RAPL for processors, the driver for GPUs) and estimates elsewhere. The
column `source` names the method for each component.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from easyaira.config.run import EnergyConfig
from easyaira.errors import ConfigError, StorageError
from easyaira.files import write_file

FILE = "emissions.csv"
SECONDS = 15  # between two readings: CodeCarbon's default; no measurable cost
# CodeCarbon's names: duration in seconds, energy in kWh, emissions in kg of CO2 equivalent
COLUMNS = """
    timestamp duration energy_consumed cpu_energy gpu_energy ram_energy emissions country_name
    country_iso_code tracking_mode cpu_model gpu_model codecarbon_version source
""".split()
MEASURED = {
    "intel_rapl": "processor measured (RAPL)",
    "intel_power_gadget": "processor measured (Power Gadget)",
}


@dataclass(frozen=True)
class Used:
    """Energy, emissions and time of a run.

    Attributes:
        kwh, co2_kg, seconds: sums over the completed sessions.
        place: name of the country.
        sources: distinct values of the column `source`: measured or estimated, by component.
        lost: number of killed sessions, whose energy is unknown.
    """

    kwh: float
    co2_kg: float
    seconds: float
    place: str
    sources: tuple[str, ...]
    lost: int


def check(config: EnergyConfig | None) -> None:
    """Check that energy can be tracked, before anything is written.

    Raises:
        ConfigError: CodeCarbon is not installed, or does not know the country.
    """
    if config is None:
        return
    if importlib.util.find_spec("codecarbon") is None:
        raise ConfigError('energy: needs CodeCarbon; pip install ".[energy]", or leave energy out')
    from codecarbon.input import DataSource

    if config.country not in DataSource().get_global_energy_mix_data():
        raise ConfigError(
            f"energy.country: no electricity mix is known for {config.country!r}; give an ISO 3166 "
            "alpha-3 code, such as BRA, DEU or USA"
        )


@contextmanager
def track(config: EnergyConfig | None, folder: Path) -> Iterator[None]:
    """Track a session on the first process; without `config`, do nothing.

    Raises:
        StorageError: emissions.csv cannot be written when the session begins. Later failures are
            printed and do not stop the run.
    """
    if config is None or jax.process_index():
        yield
        return
    before, opened = read(folder), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        _write(folder, [*before, {"timestamp": opened}])
    except OSError as error:
        raise StorageError(f"{folder / FILE}: cannot be written: {error}") from error
    tracker = _tracker(config)
    tracker.start()  # catches and logs its own failures
    try:
        yield
    finally:
        tracker.stop()
        data = getattr(tracker, "final_emissions_data", None)
        if data is None:
            print("energy  not measured: CodeCarbon returned no data for this session", flush=True)
        else:
            row = {k: v for k, v in data.values.items() if k in COLUMNS}
            row |= {"timestamp": opened, "source": _source(tracker)}
            try:
                _write(folder, [*before, row])
            except OSError as error:
                print(f"energy  {folder / FILE} cannot be written: {error}", flush=True)


def _tracker(config: EnergyConfig) -> Any:
    from codecarbon import OfflineEmissionsTracker

    # CodeCarbon logs before it applies `log_level`
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    # tracking_mode process: power estimated from load excludes other processes on the machine.
    # Every network feature is disabled explicitly, overriding a CodeCarbon configuration file in
    # the home folder.
    return OfflineEmissionsTracker(
        country_iso_code=config.country,
        tracking_mode="process",
        measure_power_secs=SECONDS,
        output_methods=[],
        emissions_endpoint=None,
        electricitymaps_api_token="",
        allow_multiple_runs=True,
        log_level="error",
    )


def _source(tracker: Any) -> str:
    """Value of the column `source`: the method of measurement, by component."""
    from codecarbon.external.hardware import CPU, GPU

    parts = []
    for hardware in tracker._hardware:
        if isinstance(hardware, GPU):
            parts.append("GPU measured (by its driver)")
        elif isinstance(hardware, CPU):
            estimate = "processor estimated from its load and nominal power (TDP)"
            parts.append(MEASURED.get(hardware._mode, estimate))
    platform = jax.devices()[0].platform
    if platform != "cpu" and not any(part.startswith("GPU") for part in parts):
        parts.append(f"{platform.upper()} not included: its power cannot be read")
    if jax.process_count() > 1:
        parts.append(f"only the first of {jax.process_count()} processes' machines included")
    return "; ".join([*parts, "memory estimated from its size"])


def read(folder: Path) -> list[dict[str, str]]:
    """Lines of emissions.csv; empty if the file does not exist."""
    path = folder / FILE
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(folder: Path, rows: list[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_file(folder / FILE, text.getvalue())


def used(folder: Path) -> Used | None:
    """Totals of the run in this folder; None if no session was completed."""
    rows = read(folder)
    ended = [row for row in rows if row["energy_consumed"]]
    if not ended:
        return None
    return Used(
        kwh=sum(float(row["energy_consumed"]) for row in ended),
        co2_kg=sum(float(row["emissions"]) for row in ended),
        seconds=sum(float(row["duration"]) for row in ended),
        place=ended[-1]["country_name"],
        sources=tuple(dict.fromkeys(row["source"] for row in ended)),
        lost=len(rows) - len(ended),
    )
