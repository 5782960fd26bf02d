"""The gate decides on a snapshot: every rule closes it, unknown values never do."""

from typing import Any

import pytest

from liberatai_agent.config import GateSettings
from liberatai_agent.machine.gate import MIB, RUN_S, Gate, Snapshot, decide, quota_spent, quota_words

RULES = GateSettings(
    max_load_others=1.0,
    min_battery_percent=50,
    max_temp_c=80,
    min_free_disk_mb=32,
    min_free_memory_mb=64,
)
FINE: dict[str, Any] = {
    "load_others": 0.5,
    "battery_percent": 90,
    "on_mains": False,
    "temperature_c": 60,
    "disk_free_bytes": 64 * MIB,
    "memory_available_bytes": 128 * MIB,
}


def test_a_machine_within_all_limits_may_train() -> None:
    assert decide(Snapshot(**FINE), RULES) == Gate()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"load_others": 1.5}, "1.50 processors"),
        ({"battery_percent": 49}, "battery at 49 %"),
        ({"temperature_c": 81}, "81 °C"),
        ({"disk_free_bytes": 31 * MIB}, "31 MiB disk"),
        ({"memory_available_bytes": 63 * MIB}, "63 MiB memory"),
    ],
)
def test_each_rule_closes_the_gate_and_says_why(changes: dict[str, Any], reason: str) -> None:
    gate = decide(Snapshot(**FINE | changes), RULES)
    assert not gate.open
    assert reason in gate.reason


def test_all_broken_rules_are_named() -> None:
    assert (
        decide(Snapshot(**FINE | {"temperature_c": 99, "battery_percent": 1}), RULES).reason.count(";") == 1
    )


def test_what_cannot_be_measured_does_not_close_the_gate() -> None:
    assert decide(Snapshot(), RULES) == Gate()


def test_a_low_battery_on_mains_may_train() -> None:
    assert decide(Snapshot(**FINE | {"battery_percent": 1, "on_mains": True}), RULES).open


NOTHING_LEFT = Snapshot(
    load_others=9,
    battery_percent=0,
    on_mains=False,
    temperature_c=150,
    disk_free_bytes=0,
    memory_available_bytes=0,
)


def test_a_rule_that_is_off_never_closes() -> None:
    off = GateSettings(
        min_battery_percent=None, max_temp_c=None, min_free_disk_mb=None, min_free_memory_mb=None
    )
    assert decide(NOTHING_LEFT, off).open


def test_a_limit_of_zero_is_broken_by_nothing_from_below() -> None:
    zero = GateSettings(
        min_battery_percent=0, max_temp_c=None, min_free_disk_mb=0, min_free_memory_mb=0, max_load_others=0
    )
    assert decide(NOTHING_LEFT, zero).reason == "other programs use 9.00 processors (max 0)"
    assert decide(Snapshot(**FINE | {"load_others": 0.0}), zero).open


def test_what_the_training_itself_holds_does_not_close_the_gate() -> None:
    """The machine had 400 MiB left, the training took 380 of them."""
    seen = Snapshot(**FINE | {"memory_available_bytes": 20 * MIB}, own_memory_bytes=380 * MIB, training=True)
    assert decide(seen, RULES, Gate(began_s=0.0), 1e6).open
    others = Snapshot(**FINE | {"memory_available_bytes": 20 * MIB}, own_memory_bytes=10 * MIB)
    assert decide(others, RULES).reason == "30 MiB memory available (min 64)"


@pytest.mark.parametrize(
    ("name", "broken", "between", "well"),
    [
        ("load_others", 1.1, 0.9, 0.7),
        ("battery_percent", 49, 54, 56),
        ("temperature_c", 81, 76, 74),
        ("disk_free_bytes", 31 * MIB, 39 * MIB, 41 * MIB),
        ("memory_available_bytes", 63 * MIB, 79 * MIB, 81 * MIB),
    ],
)
def test_a_rule_opens_again_only_with_a_margin(name: str, broken: float, between: float, well: float) -> None:
    def look(value: float, before: Gate | None = None) -> Gate:
        return decide(Snapshot(**FINE | {name: value}), RULES, before)

    assert look(between).open
    shut = look(broken)
    assert not look(between, shut).open
    assert look(well, shut).open
    assert look(between, look(well, shut)).open


def test_a_training_is_not_stopped_by_a_short_excess_but_by_a_long_or_a_large_one() -> None:
    warm, hot = (Snapshot(**FINE | {"temperature_c": heat}, training=True) for heat in (85, 91))
    running = decide(Snapshot(**FINE, training=True), RULES, None, 0.0)
    assert decide(warm, RULES, running, 59.0).open
    assert not decide(warm, RULES, running, 60.0).open
    assert not decide(hot, RULES, running, 1.0).open
    idle = Snapshot(**FINE | {"temperature_c": 85})
    assert not decide(idle, RULES, decide(Snapshot(**FINE), RULES), 1.0).open, "nothing new begins"


def trainings(needs_s: float, hours: float) -> tuple[int, int]:
    """Return how many trainings began and ended on a board that gets too hot from each: 90 °C in the end."""
    gate, heat, now, ran, began, ended = Gate(), 50.0, 0.0, 0.0, 0, 0
    training = False
    while now < hours * 3600:
        now += 5.0
        heat += (((89.0 if training else 50.0) - heat) * 5.0) / 30.0
        gate = decide(Snapshot(temperature_c=heat, training=training), RULES, gate, now)
        ran = ran + 5.0 if training else 0.0
        if training and ran >= needs_s:
            training, ended = False, ended + 1
        elif training and not gate.open:
            training = False
        elif not training and gate.open:
            training, began, ran = True, began + 1, 0.0
    return began, ended


@pytest.mark.parametrize("needs_s", [30.0, 300.0, 3000.0])
def test_a_board_that_every_training_heats_beyond_the_limit_finishes_them_all_the_same(
    needs_s: float,
) -> None:
    began, ended = trainings(needs_s, 24)
    assert ended >= 3
    assert ended >= began // 10


def test_after_a_finished_training_the_usual_patience_holds_again() -> None:
    patient = Gate(run_s=960.0, began_s=0.0)
    assert decide(Snapshot(**FINE, training=False), RULES, patient, 900.0).run_s == RUN_S
    assert decide(Snapshot(**FINE, training=True), RULES, patient, 900.0).run_s == 960.0


def test_a_quota_is_spent_when_it_is_reached() -> None:
    assert quota_spent(50 * MIB, 50 * MIB)
    assert not quota_spent(50 * MIB - 1, 50 * MIB)
    assert not quota_spent(50 * MIB, None)
    assert "50.0 of 50 MiB" in quota_words(50 * MIB, 50 * MIB)
