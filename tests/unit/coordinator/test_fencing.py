"""A coordinator that was put back from a copy believes its own signature, and nothing else, about its epoch."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from liberatai_coordinator.intake.fencing import (
    BEGIN_2026_S,
    LAST_EPOCH,
    MAX_JUMPS,
    Fencing,
    first_epoch,
    generation,
    presence_frame,
)
from liberatai_coordinator.store.ledger import Ledger
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.messages import Head, Presence
from liberatai_core.errors import (
    FrameError,
    ReplacedError,
    ReplayError,
    SignatureError,
    UnknownDeviceError,
)

OWN, OTHER = Signer.from_seed(b"o" * 32, "f"), Signer.from_seed(b"x" * 32, "f")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(tmp_path)
    yield opened
    opened.close()


def fencing(ledger: Ledger, jumps: int = 0) -> Fencing:
    return Fencing(ledger=ledger, fleet="f", coordinator="co1", public_key=OWN.public_key, jumps=jumps)


def epoch_after_restart(ledger: Ledger) -> int:
    ledger.close()
    again = Ledger.open(ledger.folder)
    again.close()
    return again.epoch


@pytest.mark.parametrize("state", ["online", "offline", "lost"])
def test_its_own_presence_in_store_at_the_broker_shows_how_far_it_was(
    ledger: Ledger, state: Presence
) -> None:
    found = fencing(ledger)
    found.own_presence(presence_frame(OWN, "co1", 41, state))
    assert found.behind
    assert epoch_after_restart(ledger) == 42


def test_what_a_device_shows_of_its_own_words_counts(ledger: Ledger) -> None:
    found = fencing(ledger)
    found.shown("d0", presence_frame(OWN, "co1", 7, "online"))
    assert found.behind
    assert epoch_after_restart(ledger) == 8


@pytest.mark.parametrize("epoch", [0, 1])
def test_what_is_not_higher_changes_nothing(ledger: Ledger, epoch: int) -> None:
    found = fencing(ledger)
    found.own_presence(presence_frame(OWN, "co1", epoch, "online"))
    found.shown("d0", presence_frame(OWN, "co1", epoch, "online"))
    assert not found.behind
    assert epoch_after_restart(ledger) == 2


def test_nobody_elses_word_counts(ledger: Ledger) -> None:
    found = fencing(ledger)
    word = presence_frame(OWN, "co1", 99, "online")
    for bad, error in (
        (presence_frame(OTHER, "co1", 99, "online"), UnknownDeviceError),
        (word[:20] + bytes([word[20] ^ 1]) + word[21:], SignatureError),
        (word[:-1], SignatureError),
        (presence_frame(Signer.from_seed(b"o" * 32, "g"), "co1", 99, "online"), SignatureError),
        (presence_frame(OWN, "co2", 99, "online"), ReplayError),
        (seal(Head(job="j", epoch=99, version=1, state="running", chains={}), OWN), FrameError),
        (b"", FrameError),
    ):
        with pytest.raises(error):
            found.shown("d0", bad)
        if error is not UnknownDeviceError:
            with pytest.raises(error):
                found.own_presence(bad)
    assert not found.behind
    assert epoch_after_restart(ledger) == 2


def test_an_epoch_without_room_above_it_is_a_fault_and_never_taken(ledger: Ledger) -> None:
    found = fencing(ledger)
    found.shown("d0", presence_frame(OWN, "co1", 2**53, "online"))
    assert not found.behind
    assert "new key" in found.fault
    assert epoch_after_restart(ledger) == 2


def test_another_key_at_its_topic_is_said_once_and_means_nothing(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    found = fencing(ledger)
    for _ in range(3):
        found.own_presence(presence_frame(OTHER, "co1", 9, "online"))
    assert not found.behind
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1


def test_two_that_jump_above_each_other_come_to_an_end(ledger: Ledger) -> None:
    found = fencing(ledger, jumps=MAX_JUMPS)
    found.shown("d0", presence_frame(OWN, "co1", 9, "online"))
    assert not found.behind
    assert found.fault


# --- one that was put in the place of another ----------------------------------------------------------

NOW_S = BEGIN_2026_S + 365 * 86_400


@pytest.mark.parametrize("now_s", [0.0, NOW_S, 2e10])
@pytest.mark.parametrize(
    "before", [0, 1, 5, first_epoch(3, NOW_S) + 7, first_epoch(first_epoch(3, NOW_S), NOW_S)]
)
def test_whoever_takes_a_place_begins_above_it_whatever_the_clock_says(before: int, now_s: float) -> None:
    epoch = first_epoch(before, now_s)
    assert generation(epoch) > generation(before)
    assert before < epoch < LAST_EPOCH
    assert generation(epoch + 1000) == generation(epoch)  # its next starts


def test_the_later_of_two_restored_ones_takes_the_place() -> None:
    assert generation(first_epoch(5, NOW_S + 60)) > generation(first_epoch(5, NOW_S))


@pytest.mark.parametrize("epoch", [1, 10**6, 10**9, 2**40, 2**52, LAST_EPOCH])
def test_plain_numbers_are_no_generation(epoch: int) -> None:
    assert generation(epoch) == 0


def test_one_that_was_replaced_never_starts_again_unless_told_to(ledger: Ledger) -> None:
    found = fencing(ledger)
    other = first_epoch(3, NOW_S)
    found.shown("d0", presence_frame(OWN, "co1", other, "online"))
    assert (found.replaced, found.behind, found.ends) == (True, False, True)
    ledger.close()
    for _ in range(2):
        with pytest.raises(ReplacedError, match="--take-over"):
            Ledger.open(ledger.folder)
    back = Ledger.open(ledger.folder, epoch_after=lambda before: first_epoch(before, NOW_S))
    assert generation(back.epoch) > generation(other)
    back.close()
    again = Ledger.open(ledger.folder)
    assert again.epoch == back.epoch + 1
    again.close()


def test_one_that_was_put_in_the_place_goes_on_above_a_copy_of_its_own(ledger: Ledger) -> None:
    mine = first_epoch(0, NOW_S)
    ledger.raise_epoch(mine)
    ledger.close()
    again = Ledger.open(ledger.folder)
    found = fencing(again)
    found.own_presence(presence_frame(OWN, "co1", 5, "online"))
    assert not found.ends
    found.own_presence(presence_frame(OWN, "co1", mine + 9, "online"))
    assert (found.replaced, found.behind) == (False, True)
    again.close()
