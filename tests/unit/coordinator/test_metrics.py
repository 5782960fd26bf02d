"""Metrics: what is shown is what is there, series stay when their number is zero, big fleets have sums only."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from liberatai_coordinator.api.metrics import MAX_DEVICES, MAX_JOBS, Seen, text
from liberatai_coordinator.client.views import JobSummary
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.fleet.traffic import DeviceTraffic
from liberatai_core.errors import ConfigError
from liberatai_core.settings import parse

ROOT = Path(__file__).parents[3]
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def device(name: str, said: str = "online", **more: Any) -> Device:
    return replace(Device(id=name, public_key=name.encode(), status="approved", said=said), **more)


def job(name: str, **more: Any) -> JobSummary:
    fields: dict[str, Any] = {"state": "running", "rounds_done": 2, "rounds_total": 5, "created_s": 1.0}
    return JobSummary(name=name, **(fields | more))


def shown(tmp_path: Path, **more: Any) -> Series:
    """Return every series of a scrape: (name, labels) -> value."""
    fields: dict[str, Any] = {
        "fleet": "test",
        "epoch": 3,
        "connected": True,
        "faults": (),
        "started_s": 10.0,
        "ready": 1,
        "devices": (),
        "refusals": {},
        "jobs": (),
        "state_dir": tmp_path,
    }
    found = text(Seen(**(fields | more)))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(found.decode())
        for sample in family.samples
    }


def one(series: Series, name: str, **labels: str) -> float:
    return series[f"liberatai_{name}", tuple(sorted(labels.items()))]


def test_numbers_are_those_of_the_fleet(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(bytes(100))
    moved = DeviceTraffic(sent_bytes=5, received_bytes=7)
    devices = (
        device("a", updates=3, traffic=moved, last_seen_s=99.0),
        device("b", "lost", traffic=moved),
        device("c", silent=True),
        replace(device("d", "unknown"), status="pending"),
    )
    series = shown(
        tmp_path,
        devices=devices,
        refusals={"E_SIG": 4},
        jobs=(job("first"), job("second", reason="waits: nobody is there")),
    )
    assert one(series, "devices", state="online") == 1
    assert one(series, "devices", state="unknown") == 2, "one of them is silent"
    assert one(series, "devices_by_status", status="pending") == 1
    assert one(series, "device_traffic_bytes_total", direction="sent") == 10
    assert one(series, "updates_total") == 3
    assert one(series, "refusals_total", code="E_SIG") == 4
    assert one(series, "device_last_seen_seconds", device="a") == 99.0
    assert one(series, "job_rounds_done", job="first") == 2
    assert [one(series, "job_waits", job=name) for name in ("first", "second")] == [0, 1]
    assert one(series, "ledger_bytes") == 100
    assert one(series, "disk_free_bytes") > 0
    assert series["process_resident_memory_bytes", ()] > 0


def test_series_stay_when_their_number_is_zero(tmp_path: Path) -> None:
    series = shown(tmp_path, connected=False, faults=("no broker",))
    assert one(series, "devices", state="lost") == 0
    assert one(series, "jobs", state="failed") == 0
    assert one(series, "ready") == 0
    assert one(series, "broker_connected") == 0


@pytest.mark.parametrize("more", [0, 1])
def test_a_large_fleet_has_sums_only(tmp_path: Path, more: int) -> None:
    count = MAX_DEVICES + more
    series = shown(tmp_path, devices=tuple(device(f"d{number}") for number in range(count)))
    assert one(series, "devices", state="online") == count
    each = {name for name, labels in series if dict(labels).get("device")}
    assert bool(each) != bool(more)


def test_the_newest_jobs_have_series(tmp_path: Path) -> None:
    series = shown(tmp_path, jobs=tuple(job(f"j{number}") for number in range(MAX_JOBS + 5)))
    named = {dict(labels)["job"] for name, labels in series if name == "liberatai_job_rounds"}
    assert len(named) == MAX_JOBS
    assert f"j{MAX_JOBS + 4}" in named


def test_a_state_folder_that_is_gone_hides_its_numbers_only(tmp_path: Path) -> None:
    series = shown(tmp_path / "gone")
    assert ("liberatai_disk_free_bytes", ()) not in series
    assert one(series, "epoch") == 3


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9464", "192.168.1.2:9464", "9464", "127.0.0.1", "example.org:1"]
)
def test_metrics_are_for_this_machine_alone(address: str) -> None:
    with pytest.raises(ConfigError, match="metrics"):
        parse(f"fleet: f\nmetrics: {address!r}\n", CoordinatorConfig, "test")


def test_alerts_and_dashboard_ask_for_series_that_there_are(tmp_path: Path) -> None:
    devices = (device("a"),)
    series = shown(tmp_path, devices=devices, refusals={"E_SIG": 1}, jobs=(job("first"),))
    names = {name for name, _ in series}
    asked = (ROOT / "deploy/prometheus/alerts.yaml").read_text(encoding="utf-8")
    board = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text(encoding="utf-8"))
    asked += " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    wanted = set(re.findall(r"\b(?:liberatai|process)_[a-z_]+\b", asked)) - {"liberatai_coordinator"}
    # Phases of devices that report one.
    assert wanted - names <= {"liberatai_devices_by_phase"}
    assert len(wanted) > 10
