"""Energy of a run: a line a session, whatever ends it; sums; said where it comes from."""

import csv
import types

import pytest

from easyaira import cli, train_sft
from easyaira.config.run import EnergyConfig
from easyaira.errors import ConfigError
from easyaira.export import torch_check
from easyaira.train import energy


def test_the_sum_over_sessions_counts_and_killed_sessions_are_told(tmp_path):
    rows = [
        {"duration": 60, "energy_consumed": 0.25, "emissions": 0.1, "source": "a"},
        {"timestamp": "killed"},
        {"duration": 30.5, "energy_consumed": 0.5, "emissions": 0.2, "source": 'b, "c"'},
    ]
    energy._write(tmp_path, [row | {"country_name": "Brazil"} for row in rows])
    used = energy.used(tmp_path)
    assert (used.kwh, used.seconds, used.lost) == (0.75, 90.5, 1)
    assert used.co2_kg == pytest.approx(0.3)
    assert used.sources == ("a", 'b, "c"') and used.place == "Brazil"


def test_nothing_is_known_of_a_run_that_did_not_track(tmp_path):
    with energy.track(None, tmp_path):
        pass
    assert not list(tmp_path.iterdir()) and energy.used(tmp_path) is None
    energy._write(tmp_path, [{"timestamp": "killed"}])
    assert energy.used(tmp_path) is None


class Tracker:
    """As CodeCarbon's, with energy of 2 kWh."""

    started = stopped = 0
    _hardware = ()

    def start(self):
        Tracker.started += 1

    def stop(self):
        Tracker.stopped += 1
        values = {"energy_consumed": 2.0, "emissions": 0.5, "duration": 1.0, "os": "not a column"}
        self.final_emissions_data = types.SimpleNamespace(values=values)


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt, ConfigError, MemoryError])
def test_a_session_is_filled_in_however_it_ends(ends, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_tracker", lambda config: Tracker())
    for session in (1, 2):
        try:
            with energy.track(EnergyConfig("BRA"), tmp_path):
                opened = energy.read(tmp_path)
                assert len(opened) == session and opened[-1]["energy_consumed"] == ""
                if ends:
                    raise ends("x")
        except (KeyboardInterrupt, ConfigError, MemoryError) as error:
            assert type(error) is ends
        assert energy.used(tmp_path).kwh == 2 * session
    assert "os" not in energy.read(tmp_path)[0]


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(energy.jax, "process_index", lambda: 1)
    with energy.track(EnergyConfig("BRA"), tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_and_a_full_disk_do_not_end_the_run(tmp_path, monkeypatch, capsys):
    failed = types.SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(energy, "_tracker", lambda config: failed)
    with energy.track(EnergyConfig("BRA"), tmp_path):
        pass
    assert "not measured" in capsys.readouterr().out and energy.used(tmp_path) is None

    monkeypatch.setattr(energy, "_tracker", lambda config: Tracker())

    def full(*_):
        raise OSError("disk is full")

    with energy.track(EnergyConfig("BRA"), tmp_path):
        monkeypatch.setattr(energy, "_write", full)
    assert "disk is full" in capsys.readouterr().out


def test_what_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    def fails(country):
        arguments = [
            f"--model.name_or_path={tmp_path}/no", "--data.train=no.jsonl",
            f"--energy.country={country}", f"--output_dir={tmp_path}/run",
        ]  # fmt: skip
        with pytest.raises(SystemExit) as end:
            cli.run_command(train_sft.main, arguments)
        assert end.value.code == 2 and not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "energy.country: no electricity mix is known for 'ZZZ'" in fails("ZZZ")
    find = energy.importlib.util.find_spec
    monkeypatch.setattr(
        energy.importlib.util,
        "find_spec",
        lambda name: None if name == "codecarbon" else find(name),
    )
    assert 'pip install ".[energy]"' in fails("BRA")


@pytest.mark.slow
def test_a_run_tracks_its_sessions_offline(models, data, tmp_path, monkeypatch, capfd):
    """The real CodeCarbon, with a home folder that asks it to send all it knows."""
    pytest.importorskip("codecarbon")
    import requests

    def send(*_, **__):
        raise AssertionError("something is sent")

    monkeypatch.setattr(requests.Session, "request", send)
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "api,csv")
    monkeypatch.setenv("CODECARBON_ELECTRICITYMAPS_API_TOKEN", "token")
    out = tmp_path / "run"
    arguments = [
        f"--model.name_or_path={models / 'gpt2'}", f"--data.train={data / 'sft.jsonl'}",
        "--data.template=plain", "--max_steps=3", "--num_samples=0", "--export=false",
        f"--output_dir={out}",
    ]  # fmt: skip
    cli.run_command(train_sft.main, [*arguments, "--energy.country=DEU"])
    with (out / "emissions.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["energy_consumed"]) > 0 and float(row["emissions"]) > 0
    assert row["country_name"] == "Germany" and row["tracking_mode"] == "process"
    parts = row["source"].split("; ")
    assert parts[-1] == "memory estimated from its size"
    assert any(part.startswith("processor ") for part in parts)
    # a finished run has nothing to track, even if it is exported later
    monkeypatch.setattr(
        torch_check, "compare_logits", lambda *_: {"compared": False, "why": "quick"}
    )
    cli.run_command(train_sft.main, [*arguments, "--export=true", "--energy.country=DEU"])
    assert len(energy.read(out)) == 1 and " kg of CO2" in (out / "hf/README.md").read_text()
    assert "in Germany" in (out / "hf/README.md").read_text()
    assert "codecarbon" not in capfd.readouterr().err
