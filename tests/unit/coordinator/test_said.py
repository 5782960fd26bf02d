"""The coordinator's log says what jobs, rounds and devices do: a line each, and no flood."""

import logging

import pytest

from liberatai_coordinator.fleet.devices import Device, Status
from liberatai_coordinator.intake.said import MANY, Devices
from liberatai_coordinator.jobs import said as of_jobs
from liberatai_coordinator.jobs.records import Stats
from liberatai_coordinator.models.evaluation import CentralScores


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def a_device(name: str, status: Status = "approved", reason: str = "") -> Device:
    return Device(id=name, public_key=b"k" * 32, status=status, reason=reason)


def test_a_device_has_a_line_when_it_comes_goes_or_is_shut_out(caplog: pytest.LogCaptureFixture) -> None:
    said, device = Devices(), a_device("camera")
    said.changed([device], lambda _: ("unknown", ""))
    said.changed([device], lambda _: ("online", ""))
    said.changed([device], lambda _: ("online", ""))
    said.changed([device], lambda _: ("lost", ""))
    said.changed([a_device("camera", "quarantined", "sends nonsense")], lambda _: ("lost", ""))
    assert [record.getMessage() for record in caplog.records] == [
        "device camera: approved, online",
        "device camera: lost",
        "device camera: quarantined (sends nonsense)",
    ]
    assert vars(caplog.records[-1])["status"] == "quarantined"
    assert vars(caplog.records[-1])["device"] == "camera"


def test_ten_thousand_devices_that_come_together_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    said = Devices()
    devices = [a_device(f"d-{number}") for number in range(10_000)]
    said.changed(devices, lambda one: ("lost" if one.id == "d-7" else "online", ""))
    (record,) = caplog.records
    assert record.getMessage() == "10,000 devices changed: 1 lost, 9,999 online"
    said.changed(devices[:MANY], lambda _: ("lost", ""))
    assert len(caplog.records) == 1 + MANY - 1  # d-7 was lost already


def test_strangers_fill_neither_the_log_nor_memory(caplog: pytest.LogCaptureFixture) -> None:
    said = Devices()
    said.changed([a_device(f"d-{number}", "pending") for number in range(9)], lambda _: ("online", ""))
    assert not caplog.records
    assert not said._said


def test_a_round_says_whom_it_asked_and_what_became_of_it(caplog: pytest.LogCaptureFixture) -> None:
    of_jobs.opened("digits", 3, 1)
    scores = CentralScores(version=3, samples=100, ensemble=0.875)
    stats = Stats(seconds=8.4, up_bytes=5970, down_bytes=65_536, test=scores, frozen={"cnn": "too few"})
    of_jobs.published("digits", 3, 3, (987, 1000), stats)
    of_jobs.abandoned("digits", 4, "2 of 9 updates")
    of_jobs.job("digits", "finished")
    assert [record.getMessage() for record in caplog.records] == [
        "round 3 of digits: open, 1 device invited",
        (
            "round 3 of digits: published version 3, 987 of 1,000 updates, 8.4 s, 5.83 KiB up, 64 KiB down, "
            "accuracy 87.5%, cnn frozen: too few"
        ),
        "round 4 of digits: abandoned, 2 of 9 updates",
        "job digits: finished",
    ]
    assert caplog.records[2].levelno == logging.WARNING
    assert {vars(record)["job"] for record in caplog.records} == {"digits"}
