"""The registry: nothing a device says counts before it is approved."""

import msgspec
import pytest

from liberatai_coordinator.fleet.devices import (
    EXPIRED_AT_ONCE,
    MAX_PENDING,
    PENDING_KEPT_S,
    PENDING_SILENT_S,
    Device,
    Fleet,
)
from liberatai_coordinator.fleet.traffic import MAX_TOTAL, DeviceTraffic
from liberatai_core.contract.frame import key_id
from liberatai_core.contract.limits import MAX_SESSION
from liberatai_core.contract.messages import Capability, Event, Report, State, Telemetry
from liberatai_core.errors import (
    NotFoundError,
    ReplayError,
    RevokedError,
    SchemaError,
    SignatureError,
    UnknownDeviceError,
)

KEY, OTHER = b"k" * 32, b"o" * 32


def capability(name: str = "d0", key: bytes = KEY, session: int = 1) -> Capability:
    return Capability(device=name, public_key=key, session=session, agent_version="1", tier="full")


def test_a_new_device_waits_for_approval() -> None:
    fleet = Fleet(enrolment="approve")
    heard = fleet.hear(capability(), KEY, 1.0)
    assert (heard.device.status, heard.new, heard.lasting) == ("pending", True, True)
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
    assert len(fleet.ready_names) == 2


def test_what_changes_nothing_lasting_is_not_written_down() -> None:
    fleet = Fleet(enrolment="open")
    fleet.hear(capability(), KEY, 1.0)
    heard = fleet.hear(Report(device="d0", session=1, phase="idle"), KEY, 2.0)
    assert not heard.lasting
    assert not heard.changed
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
    heard = fleet.hear(changed, KEY, 2.0)
    assert heard.lasting
    assert heard.changed
    assert heard.device.capability == changed


# --- bytes and quotas ----------------------------------------------------------------------------


def traffic(*samples: tuple[int, int, int]) -> DeviceTraffic:
    """Return the totals after samples of (session, sent, received)."""
    found = DeviceTraffic()
    for sample in samples:
        found = found.heard(*sample)
    return found


def totals(found: DeviceTraffic) -> tuple[int, int]:
    return found.sent_bytes, found.received_bytes


def test_counters_of_one_start_are_totals_not_sums() -> None:
    assert totals(traffic((1, 100, 10), (1, 150, 10), (1, 150, 40))) == (150, 40)


def test_counters_begin_anew_at_every_start_and_the_total_goes_on() -> None:
    assert totals(traffic((1, 100, 10), (2, 30, 5), (2, 40, 5), (5, 1, 1))) == (141, 16)


def test_doubled_late_and_older_samples_add_nothing() -> None:
    assert totals(traffic((2, 100, 10), (2, 90, 10), (2, 100, 10), (1, 900, 900), (2, 110, 10))) == (110, 10)


def test_totals_stop_at_what_a_database_takes() -> None:
    assert totals(traffic(*[(n, 2**53, 2**53) for n in range(1, 2000)])) == (MAX_TOTAL, MAX_TOTAL)


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


# --- signs of life -------------------------------------------------------------------------------


def online(name: str = "d0", session: int = 1) -> State:
    return State(device=name, state="online", session=session)


def fleet_of(*names: str) -> Fleet:
    """Return a fleet in which these devices said at 0 s that they are online."""
    fleet = Fleet(enrolment="open")
    for name in names:
        key = name.encode().ljust(32, b"-")
        fleet.hear(capability(name, key), key, 0.0)
        fleet.hear(online(name), key, 0.0)
    return fleet


def key_of(name: str) -> bytes:
    return name.encode().ljust(32, b"-")


def names(found: list[Device]) -> list[str]:
    return [device.id for device in found]


def test_a_device_without_signs_of_life_is_unknown_and_gets_no_work() -> None:
    """Its will may have been refused: what stands at the broker says online for ever."""
    fleet = fleet_of("d0", "d1")
    fleet.hear(Telemetry(device="d1", session=1), key_of("d1"), 170.0)
    assert fleet.expire(179.9) == []
    assert names(fleet.expire(180.0)) == ["d0"]
    assert fleet.shown(fleet.require("d0")) == ("unknown", fleet.require("d0").note)
    assert "nothing heard for 180 s" in fleet.require("d0").note
    assert names(fleet.ready()) == ["d1"]
    assert names(fleet.expire(1000.0)) == ["d1"]
    assert fleet.expire(10_000.0) == []


def test_of_many_silent_devices_some_are_found_at_a_time_and_none_is_forgotten() -> None:
    fleet = fleet_of(*(f"d{n}" for n in range(2 * EXPIRED_AT_ONCE + 5)))
    assert [len(fleet.expire(500.0)) for _ in range(4)] == [EXPIRED_AT_ONCE, EXPIRED_AT_ONCE, 5, 0]
    assert len(fleet.ready_names) == 0


def test_any_word_of_a_silent_device_brings_it_back() -> None:
    fleet = fleet_of("d0")
    fleet.expire(180.0)
    heard = fleet.hear(Report(device="d0", session=1, phase="idle"), key_of("d0"), 200.0)
    assert heard.changed
    assert (heard.device.state, heard.device.note) == ("online", "")
    assert names(fleet.expire(380.0)) == ["d0"]
    assert fleet.note_alive("d0", 390.0, 1.0)
    assert names(fleet.ready()) == ["d0"]
    assert not fleet.note_alive("d0", 391.0, 1.0)


def test_the_silence_follows_the_devices_own_interval() -> None:
    fleet = fleet_of("d0", "d1")
    for name, interval_s in (("d0", 1.0), ("d1", 600.0)):
        changed = msgspec.structs.replace(capability(name, key_of(name)), telemetry_s=interval_s)
        fleet.hear(changed, key_of(name), 1.0)
        fleet.hear(Telemetry(device=name, session=1), key_of(name), 181.0)
    assert fleet.expire(210.0) == []
    assert names(fleet.expire(211.0)) == ["d0"]
    assert fleet.expire(1980.0) == []
    assert names(fleet.expire(1981.0)) == ["d1"]


def test_what_the_broker_had_in_store_is_believed_for_the_same_time_and_no_longer() -> None:
    fleet = Fleet(enrolment="open")
    fleet.restore([Device(id="d0", public_key=KEY, status="approved", session=1, last_seen_s=5.0)])
    fleet.hear(capability(), KEY, 100.0, wall_s=1e9, retained=True)
    for now_s in (100.0, 150.0, 250.0):  # said again after every connect, it stays as old as it is
        fleet.hear(online(), KEY, now_s, wall_s=1e9, retained=True)
    assert names(fleet.ready()) == ["d0"]
    assert fleet.require("d0").last_seen_s == 5.0
    assert names(fleet.expire(280.0)) == ["d0"]
    fleet.hear(online(), KEY, 300.0, retained=True)
    assert fleet.ready() == []


def test_a_will_is_no_sign_of_life() -> None:
    fleet = fleet_of("d0")
    heard = fleet.hear(State(device="d0", state="lost", session=1), key_of("d0"), 9.0)
    assert heard.changed
    assert (heard.device.state, heard.device.last_seen_s) == ("lost", 0.0)


def test_a_device_whose_quota_is_spent_may_be_silent() -> None:
    fleet = fleet_of("d0")
    spent = msgspec.structs.replace(capability("d0", key_of("d0")), quota_spent=True)
    fleet.hear(spent, key_of("d0"), 10.0)
    assert fleet.expire(50_000.0) == []
    fleet.hear(capability("d0", key_of("d0")), key_of("d0"), 60_000.0)
    assert names(fleet.expire(70_000.0)) == ["d0"]


def test_without_a_broker_nobody_is_known_to_be_there() -> None:
    fleet = fleet_of("d0")
    fleet.set_connected(False, 100.0)
    assert (fleet.ready(), len(fleet.ready_names)) == ([], 0)
    assert fleet.shown(fleet.require("d0")) == ("unknown", "the coordinator has no broker")
    assert fleet.expire(5000.0) == []
    fleet.set_connected(True, 5000.0)
    assert names(fleet.ready()) == ["d0"]
    assert fleet.expire(5179.0) == []
    assert names(fleet.expire(5180.0)) == ["d0"]


# --- session numbers that went back --------------------------------------------------------------


def test_a_device_put_back_from_a_copy_is_told_the_number_to_go_above_once_in_a_while() -> None:
    fleet = fleet_of("d0")
    fleet.hear(online(session=9), key_of("d0"), 1.0)
    old = online(session=3)
    with pytest.raises(ReplayError):
        fleet.hear(old, key_of("d0"), 2.0)
    assert "went back from 9 to 3" in fleet.shown(fleet.require("d0"))[1]
    assert fleet.answer_replay(old, 2.0) == 9
    assert fleet.answer_replay(old, 11.9) is None
    assert fleet.answer_replay(old, 12.0) == 9
    fleet.hear(online(session=10), key_of("d0"), 13.0)
    assert fleet.shown(fleet.require("d0")) == ("online", "")


def test_the_will_or_goodbye_of_an_older_connection_says_nothing_about_a_copy() -> None:
    fleet = fleet_of("d0")
    fleet.hear(online(session=9), key_of("d0"), 1.0)
    for state in ("lost", "offline"):
        old = msgspec.structs.replace(online(session=3), state=state)
        with pytest.raises(ReplayError):
            fleet.hear(old, key_of("d0"), 2.0)
        assert fleet.answer_replay(old, 2.0) is None
    assert fleet.require("d0").note == ""


def test_a_session_beyond_all_that_a_device_can_be_told_of_is_refused() -> None:
    fleet = fleet_of("d0")
    with pytest.raises(SchemaError, match="session"):
        fleet.hear(online(session=MAX_SESSION + 1), key_of("d0"), 1.0)
    assert fleet.require("d0").session == 1


def test_a_device_that_does_not_believe_this_coordinator_says_so_until_it_obeys() -> None:
    fleet = fleet_of("d0")
    stale = Event(
        device="d0", session=1, number=1, name="stale_task", code="E_REPLAY", text="epoch 1, 4 was seen"
    )
    fleet.hear(stale, key_of("d0"), 1.0)
    fleet.hear(Telemetry(device="d0", session=1), key_of("d0"), 2.0)
    assert "epoch 1, 4 was seen" in fleet.shown(fleet.require("d0"))[1]
    fleet.hear(Report(device="d0", session=1, phase="fetching", job="j", round=1), key_of("d0"), 3.0)
    assert fleet.shown(fleet.require("d0")) == ("online", "")


# --- devices that wait for approval --------------------------------------------------------------


def test_who_waits_for_approval_and_is_silent_makes_room_for_a_newcomer() -> None:
    fleet = Fleet(enrolment="approve")
    for n in range(MAX_PENDING):
        fleet.hear(capability(f"p{n}", key_of(f"p{n}")), key_of(f"p{n}"), 0.0)
    fleet.hear(capability("p0", key_of("p0")), key_of("p0"), PENDING_SILENT_S - 1)
    with pytest.raises(UnknownDeviceError, match="wait for approval"):
        fleet.hear(capability("new"), KEY, PENDING_SILENT_S - 1)
    fleet.hear(capability("new"), KEY, PENDING_SILENT_S)
    assert fleet.forgotten == ["p1"]
    assert fleet.key(key_id(key_of("p1"))) is None
    assert {"p0", "new"} <= set(fleet.devices)


def test_who_waits_for_approval_is_forgotten_after_a_week_of_silence() -> None:
    fleet = Fleet(enrolment="approve")
    for name in ("a", "b", "c"):
        fleet.hear(capability(name, key_of(name)), key_of(name), 0.0)
    fleet.set_status("b", "approved")
    fleet.hear(capability("a", key_of("a")), key_of("a"), 10.0)
    fleet.forget_pending(PENDING_KEPT_S + 9.0)
    assert (fleet.forgotten, set(fleet.devices)) == (["c"], {"a", "b"})


def test_enrolment_ends_where_the_settings_say_and_tells_what_to_do() -> None:
    fleet = Fleet(enrolment="open", max_devices=2)
    for name in ("d0", "d1"):
        fleet.hear(capability(name, key_of(name)), key_of(name), 0.0)
    with pytest.raises(UnknownDeviceError, match="2 devices are known already: raise max_devices"):
        fleet.hear(capability("d2"), KEY, 1.0)
    with pytest.raises(UnknownDeviceError, match="raise max_devices"):
        fleet.enrol("d2", KEY, "approved", 1.0, 1.0)
    fleet.max_devices = 3
    assert fleet.hear(capability("d2"), KEY, 2.0).new
