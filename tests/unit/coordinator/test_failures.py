"""Who failed is asked again when something changed, or after a while."""

import msgspec
import pytest

from liberatai_coordinator.fleet.failures import FIRST_S, MOST_S, Failures
from liberatai_core.contract.messages import Capability
from liberatai_core.structure import DataContract

CAPS = Capability(
    device="d0",
    public_key=b"k" * 32,
    session=3,
    agent_version="1",
    tier="full",
    samples=10,
    data=DataContract(input_shape=(2,), classes=2),
)


def changed(**fields: object) -> Capability:
    return msgspec.structs.replace(CAPS, **fields)


def test_who_never_failed_may_try() -> None:
    assert Failures().may_try("d0", CAPS, 0.0)
    assert Failures().words("d0", 0.0) == ""


def test_who_failed_waits_and_longer_every_time_up_to_a_limit() -> None:
    failures, now_s = Failures(), 100.0
    for pause_s in (FIRST_S, 2 * FIRST_S, 4 * FIRST_S):
        failures.note("d0", "failed", CAPS, now_s)
        assert not failures.may_try("d0", CAPS, now_s + pause_s - 1)
        assert failures.may_try("d0", CAPS, now_s + pause_s)
        now_s += pause_s
    for _ in range(100):
        failures.note("d0", "failed", CAPS, now_s)
    assert failures.may_try("d0", CAPS, now_s + MOST_S)
    assert "103 times in a row" in failures.words("d0", now_s)


@pytest.mark.parametrize("fields", [{"session": 4}, {"samples": 11}, {"data": None}, {"agent_version": "2"}])
def test_a_change_that_matters_ends_the_pause(fields: dict[str, object]) -> None:
    failures = Failures()
    failures.note("d0", "failed", CAPS, 0.0)
    assert failures.may_try("d0", changed(**fields), 1.0)


@pytest.mark.parametrize("fields", [{"disk_free_bytes": 7}, {"up_bits_s": 9.0}, {"gflops": 2.0}])
def test_what_varies_by_itself_does_not_end_the_pause(fields: dict[str, object]) -> None:
    failures = Failures()
    failures.note("d0", "failed", CAPS, 0.0)
    assert not failures.may_try("d0", changed(**fields), 1.0)


def test_a_stored_update_ends_all() -> None:
    failures = Failures()
    failures.note("d0", "failed", CAPS, 0.0)
    failures.clear("d0")
    assert failures.may_try("d0", CAPS, 0.0)
    failures.note("d0", "failed", CAPS, 0.0)
    assert failures.may_try("d0", CAPS, FIRST_S)


def test_to_be_lost_once_costs_nothing_but_again_and_again_does_though_every_start_has_a_new_number() -> None:
    failures = Failures()
    failures.note("d0", "lost", CAPS, 0.0)
    assert failures.may_try("d0", CAPS, 0.0)
    failures.note("d0", "lost", changed(session=4), 10.0)
    assert not failures.may_try("d0", changed(session=5), 11.0)
    assert "was lost 2 times in a row" in failures.words("d0", 11.0)
    assert failures.may_try("d0", changed(session=5, samples=11), 11.0)
    assert failures.may_try("d0", changed(session=5), 10.0 + FIRST_S)
