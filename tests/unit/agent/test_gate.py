"""The gate decides on a snapshot: every rule closes it, unknown values never do."""

from typing import Any

import pytest

from liberatai_agent.config import GateSettings
from liberatai_agent.gate import MIB, Snapshot, decide

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
    assert decide(Snapshot(**FINE), RULES) == (True, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"load_others": 1.5}, "1.50 processors"),
        ({"battery_percent": 49}, "battery at 49 %"),
        ({"temperature_c": 81}, "81 °C"),
        ({"disk_free_bytes": 31 * MIB}, "31 MiB disk"),
        ({"memory_available_bytes": 63 * MIB}, "63 MiB memory"),
        (
            {"day_bytes": 50 * MIB, "day_quota_bytes": 50 * MIB},
            "quota is used up: 50.0 of 50 MiB; goes on tomorrow",
        ),
    ],
)
def test_each_rule_closes_the_gate_and_says_why(changes: dict[str, Any], reason: str) -> None:
    is_open, why = decide(Snapshot(**FINE | changes), RULES)
    assert not is_open
    assert reason in why


def test_all_broken_rules_are_named() -> None:
    assert decide(Snapshot(**FINE | {"temperature_c": 99, "battery_percent": 1}), RULES)[1].count(";") == 1


def test_what_cannot_be_measured_does_not_close_the_gate() -> None:
    assert decide(Snapshot(), RULES) == (True, "")


def test_a_low_battery_on_mains_may_train() -> None:
    assert decide(Snapshot(**FINE | {"battery_percent": 1, "on_mains": True}), RULES)[0]


def test_a_quota_that_is_not_used_up_or_not_set_closes_nothing() -> None:
    assert decide(Snapshot(**FINE | {"day_bytes": 50 * MIB - 1, "day_quota_bytes": 50 * MIB}), RULES)[0]
    assert decide(Snapshot(**FINE | {"day_bytes": 50 * MIB, "day_quota_bytes": None}), RULES)[0]


def test_a_rule_that_is_off_never_closes() -> None:
    off = GateSettings(
        min_battery_percent=None, max_temp_c=None, min_free_disk_mb=None, min_free_memory_mb=None
    )
    bad = Snapshot(
        load_others=9,
        battery_percent=0,
        on_mains=False,
        temperature_c=150,
        disk_free_bytes=0,
        memory_available_bytes=0,
    )
    assert decide(bad, off) == (True, "")


def test_the_default_rules_do_not_look_at_load() -> None:
    assert decide(Snapshot(load_others=64), GateSettings())[0]
