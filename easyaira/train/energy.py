"""Energy and CO2 of a training, by CodeCarbon: emissions.csv in the run folder, a line a session.

A session is what one start of the command trains: the sum over the lines is what the run took. A
line is opened when a session begins and filled in when it ends, however it ends; one that stays
open was killed, and its energy is not in the sum. CodeCarbon measures only where the machine lets
power be read (RAPL for processors, the driver for GPUs) and estimates elsewhere; `source` says of
each part which it was.
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
SECONDS = 15  # between two readings: CodeCarbon's own default, which costs a run nothing
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
    """What a run took, over its sessions.

    Attributes:
        kwh, co2_kg, seconds: sums over the sessions that ended.
        place: name of the country.
        sources: what was measured and what estimated, as `source` says.
        lost: sessions that were killed, whose energy is not known.
    """

    kwh: float
    co2_kg: float
    seconds: float
    place: str
    sources: tuple[str, ...]
    lost: int


def check(config: EnergyConfig | None) -> None:
    """Whether energy can be tracked as asked for, before anything is written.

    Raises:
        ConfigError: CodeCarbon is not installed, or knows no such country.
    """
    if config is None:
        return
    if importlib.util.find_spec("codecarbon") is None:
        raise ConfigError('energy: needs CodeCarbon; pip install ".[energy]", or leave energy out')
    from codecarbon.input import DataSource

    if config.country not in DataSource().get_global_energy_mix_data():
        raise ConfigError(
            f"energy.country: no electricity mix is known for {config.country!r}; give the three "
            "letters of ISO 3166, such as BRA, DEU or USA"
        )


@contextmanager
def track(config: EnergyConfig | None, folder: Path) -> Iterator[None]:
    """Track what happens inside, on the first of the run's processes; without `config`, nothing.

    Raises:
        StorageError: emissions.csv cannot be written when the session begins. What fails later is
            said in a line, and the run goes on.
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
            print("energy  could not be read in this session", flush=True)
        else:
            row = {k: v for k, v in data.values.items() if k in COLUMNS}
            row |= {"timestamp": opened, "source": _source(tracker)}
            try:
                _write(folder, [*before, row])
            except OSError as error:
                print(f"energy  {folder / FILE} cannot be written: {error}", flush=True)


def _tracker(config: EnergyConfig) -> Any:
    from codecarbon import OfflineEmissionsTracker

    # it speaks before it reads `log_level`
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    # process: where power has to be estimated from load, others on the machine are not our doing.
    # Everything that would reach over the network is said to be off, whatever a file of CodeCarbon
    # in the home folder says.
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
    """Where the figures of each part come from."""
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
        parts.append(f"{platform.upper()} not included, its power cannot be read")
    if jax.process_count() > 1:
        parts.append(f"one of {jax.process_count()} processes' machines, the others not included")
    return "; ".join([*parts, "memory estimated from its size"])


def read(folder: Path) -> list[dict[str, str]]:
    """The lines of emissions.csv; none where there is no such file."""
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
    """What the run in this folder took; None if no session of it was tracked to its end."""
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
