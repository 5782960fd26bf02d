"""The registry: nothing a device says counts before it is approved."""

import msgspec
import pytest

from liberatai_coordinator.fleet.devices import MAX_PENDING, MAX_TOTAL, Device, DeviceTraffic, Fleet
from liberatai_core.contract.frame import key_id
from liberatai_core.contract.messages import Capability, Report, State, Telemetry
from liberatai_core.errors import (
    NotFoundError,
    ReplayError,
    RevokedError,
    SignatureError,
    UnknownDeviceError,
)

KEY, OTHER = b"k" * 32, b"o" * 32


def capability(name: str = "d0", key: bytes = KEY, session: int = 1) -> Capability:
    return Capability(device=name, public_key=key, session=session, agent_version="1", tier="full")


def test_a_new_device_waits_for_approval() -> None:
    fleet = Fleet(enrolment="approve")
    device, lasting = fleet.hear(capability(), KEY, 1.0)
    assert (device.status, lasting) == ("pending", True)
    with pytest.raises(UnknownDeviceError, match="approve d0"):
        fleet.admit("d0")
    fleet.set_status("d0", "approved")
    assert fleet.admit("d0").id == "d0"


def test_open_enrolment_takes_the_first_key_and_no_other() -> None:
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(), KEY, 1.0)
    assert fleet.admit("d0").public_key == KEY
    with pytest.raises(SignatureError, match="another key"):
        fleet.hear(capability(key=OTHER), OTHER, 2.0)


def test_an_allow_list_refuses_strangers_and_knows_its_own() -> None:
    fleet = Fleet(enrolment="allowlist", allowed={"d0": KEY})
    fleet.restore([])
    assert fleet.admit("d0").public_key == KEY
    assert fleet.owner(key_id(KEY)) == "d0"
    with pytest.raises(UnknownDeviceError):
        fleet.hear(capability("d1", OTHER), OTHER, 1.0)


def test_only_an_introduction_introduces() -> None:
    with pytest.raises(UnknownDeviceError):
        Fleet(enrolment="open").hear(State(device="d0", state="online", session=1), KEY, 1.0)


def test_an_older_session_is_a_replay() -> None:
    """The will of a connection that is long over must not declare a living device lost."""
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(session=5), KEY, 1.0)
    fleet.hear(State(device="d0", state="online", session=6), KEY, 2.0)
    with pytest.raises(ReplayError):
        fleet.hear(State(device="d0", state="lost", session=5), KEY, 3.0)
    assert fleet.require("d0").online


def test_a_quarantined_device_is_refused_with_its_reason() -> None:
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(), KEY, 1.0)
    fleet.set_status("d0", "quarantined", "odd updates")
    with pytest.raises(RevokedError, match="odd updates"):
        fleet.admit("d0")


def test_ready_devices_are_approved_online_and_introduced() -> None:
    fleet = Fleet(enrolment="open")
    for name in ("b", "a", "c"):
        fleet.hear(capability(name, name.encode() * 32), name.encode() * 32, 1.0)
    for name in ("b", "a"):
        fleet.hear(State(device=name, state="online", session=1), name.encode() * 32, 1.0)
    assert [device.id for device in fleet.ready()] == ["a", "b"]


def test_what_changes_nothing_lasting_is_not_written_down() -> None:
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(), KEY, 1.0)
    _, lasting = fleet.hear(Report(device="d0", session=1, phase="idle"), KEY, 2.0)
    assert not lasting
    assert fleet.require("d0").last_seen_s == 2.0


def test_strangers_cannot_fill_the_memory() -> None:
    fleet = Fleet(enrolment="approve")
    fleet.restore([Device(id=f"p{n}", public_key=b"", status="pending") for n in range(MAX_PENDING)])
    with pytest.raises(UnknownDeviceError, match="wait for approval"):
        fleet.hear(capability("new"), KEY, 1.0)


def test_a_changed_key_is_found_under_its_new_id() -> None:
    fleet = Fleet(enrolment="allowlist", allowed={"d0": KEY})
    fleet.restore([])
    assert fleet.key(key_id(KEY)) == KEY
    fleet.allowed["d0"] = OTHER
    fleet.restore(list(fleet.devices.values()))
    assert fleet.key(key_id(OTHER)) == OTHER
    assert fleet.key(key_id(KEY)) is None


def test_an_unknown_device_is_not_found() -> None:
    with pytest.raises(NotFoundError):
        Fleet(enrolment="open").require("nobody")


def test_a_new_capability_replaces_the_old_one() -> None:
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(), KEY, 1.0)
    changed = msgspec.structs.replace(capability(), cores=4)
    device, lasting = fleet.hear(changed, KEY, 2.0)
    assert lasting
    assert device.capability == changed


# --- bytes and quotas ----------------------------------------------------------------------------


def heard(*samples: tuple[int, int, int]) -> DeviceTraffic:
    """Return the totals after samples of (session, sent, received)."""
    found = DeviceTraffic()
    for sample in samples:
        found = found.heard(*sample)
    return found


def totals(found: DeviceTraffic) -> tuple[int, int]:
    return found.sent_bytes, found.received_bytes


def test_counters_of_one_start_are_totals_not_sums() -> None:
    assert totals(heard((1, 100, 10), (1, 150, 10), (1, 150, 40))) == (150, 40)


def test_counters_begin_anew_at_every_start_and_the_total_goes_on() -> None:
    assert totals(heard((1, 100, 10), (2, 30, 5), (2, 40, 5), (5, 1, 1))) == (141, 16)


def test_doubled_late_and_older_samples_add_nothing() -> None:
    assert totals(heard((2, 100, 10), (2, 90, 10), (2, 100, 10), (1, 900, 900), (2, 110, 10))) == (110, 10)


def test_totals_stop_at_what_a_database_takes() -> None:
    assert totals(heard(*[(n, 2**53, 2**53) for n in range(1, 2000)])) == (MAX_TOTAL, MAX_TOTAL)


def test_telemetry_adds_to_a_devices_totals() -> None:
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(), KEY, 1.0)
    fleet.hear(Telemetry(device="d0", session=1, sent_bytes=70, received_bytes=7), KEY, 2.0)
    fleet.hear(Telemetry(device="d0", session=2, sent_bytes=30, received_bytes=3), KEY, 3.0)
    fleet.count_update("d0")
    found = fleet.require("d0")
    assert (totals(found.traffic), found.updates) == ((100, 10), 1)


def test_a_device_whose_quota_is_spent_gets_no_work_until_it_says_otherwise() -> None:
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(), KEY, 1.0)
    fleet.hear(State(device="d0", state="online", session=1), KEY, 1.0)
    fleet.hear(msgspec.structs.replace(capability(), quota_spent=True), KEY, 2.0)
    assert fleet.ready() == []
    fleet.hear(capability(), KEY, 3.0)
    assert [device.id for device in fleet.ready()] == ["d0"]
