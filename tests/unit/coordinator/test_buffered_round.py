"""A round of a buffered job as a list of events: who was asked earlier answers in whichever round is open."""

import msgspec
import pytest

from liberatai_coordinator.rounds.round import (
    Abandon,
    Accept,
    Action,
    Close,
    Gone,
    Invitation,
    Phase,
    Refuse,
    Round,
    Store,
    StoreFailed,
    Tick,
    UpdateArrived,
    UpdateStored,
    buffer_size,
    standing,
)
from liberatai_core.contract.messages import Update, update_id

OLD, NEW = b"o" * 16, b"n" * 16


def invitation(device: str, number: int, base: bytes, **more: object) -> Invitation:
    name = update_id(device, "job", number, base)
    made = Invitation(device=device, structure="mlp", base=base, update_id=name, round=number)
    return msgspec.structs.replace(made, **more)


def make_round(target: int = 2) -> Round:
    """Round 7: `slow` still has the task of round 3, three others have one of round 7."""
    asked = [invitation("slow", 3, OLD), *(invitation(f"d{n}", 7, NEW) for n in range(3))]
    return Round(
        job="job",
        number=7,
        invitations={one.device: one for one in asked},
        target=target,
        quorum=1,
        closes_s=100.0,
        buffered=True,
    )


def update(device: str, number: int = 7, base: bytes = NEW) -> Update:
    return Update(
        update_id=update_id(device, "job", number, base),
        device=device,
        job="job",
        round=number,
        epoch=1,
        structure="mlp",
        base=base,
        samples=10,
        codec="topk",
        body=b"x",
    )


def answer(now: Round, one: Update) -> list[Action]:
    """Let an update arrive and be stored at once."""
    assert [type(action) for action in now.handle(UpdateArrived(update=one))] == [Store]
    return now.handle(UpdateStored(device=one.device, update_id=one.update_id, outcome="stored"))


def test_a_late_update_counts_in_the_round_that_is_open() -> None:
    now = make_round()
    late, fresh = update("slow", 3, OLD), update("d1")
    assert answer(now, late) == [Accept(device="slow", update_id=late.update_id)]
    assert answer(now, fresh)[-1] == Close(update_ids=tuple(sorted([late.update_id, fresh.update_id])))


def test_a_full_buffer_closes_the_round_without_the_slow_device() -> None:
    now = make_round()
    answer(now, update("d0"))
    assert isinstance(answer(now, update("d2"))[-1], Close)


def test_a_late_update_that_is_being_stored_when_the_buffer_is_full_still_counts() -> None:
    now, late = make_round(), update("slow", 3, OLD)
    assert [type(a) for a in now.handle(UpdateArrived(update=late))] == [Store]
    answer(now, update("d0"))
    assert not any(isinstance(action, Close) for action in answer(now, update("d1")))
    end = now.handle(UpdateStored(device="slow", update_id=late.update_id, outcome="stored"))[-1]
    assert isinstance(end, Close)
    assert late.update_id in end.update_ids


def test_an_update_that_comes_while_others_are_stored_counts_and_after_the_close_it_waits() -> None:
    now, late = make_round(), update("slow", 3, OLD)
    now.handle(UpdateArrived(update=update("d0")))
    answer(now, update("d1"))
    answer(now, update("d2"))  # the buffer is full, but d0 is on its way to the disk
    assert now.phase is Phase.CLOSING
    answer(now, late)
    end = now.handle(UpdateStored(device="d0", update_id=update("d0").update_id, outcome="stored"))[-1]
    assert isinstance(end, Close)
    assert len(end.update_ids) == 4
    closed = make_round(target=1)
    answer(closed, update("d0"))
    (refused,) = closed.handle(UpdateArrived(update=late))
    assert isinstance(refused, Refuse)
    assert refused.error.code == "E_BUSY"


def test_a_device_answers_the_task_that_it_has_and_no_other() -> None:
    for wrong in (update("slow"), update("slow", 5, OLD), update("d0", 3, OLD), update("stranger")):
        (refused,) = make_round().handle(UpdateArrived(update=wrong))
        assert isinstance(refused, Refuse)
        assert refused.error.code == "E_ROUND_UNKNOWN"
    (refused,) = make_round().handle(UpdateArrived(update=update("slow", 3, NEW)))
    assert isinstance(refused, Refuse)
    assert refused.error.code == "E_BASE_MODEL"


def test_a_late_update_that_is_sent_twice_counts_once() -> None:
    now, late = make_round(target=3), update("slow", 3, OLD)
    answer(now, late)
    again = now.handle(UpdateArrived(update=late))
    assert again == [Accept(device="slow", update_id=late.update_id, code="E_DUP")]
    answer(now, update("d0"))
    end = answer(now, update("d1"))[-1]
    assert isinstance(end, Close)
    assert len(end.update_ids) == 3


def test_the_deadline_makes_a_version_of_what_has_come() -> None:
    now = make_round(target=3)
    answer(now, update("d0"))
    assert now.handle(Tick(now_s=99.0)) == []
    (end,) = now.handle(Tick(now_s=100.0))
    assert end == Close(update_ids=(update("d0").update_id,))


def test_a_deadline_with_nothing_abandons_nothing_but_the_wait() -> None:
    now = make_round()
    (end,) = now.handle(Tick(now_s=100.0))
    assert isinstance(end, Abandon)
    assert end.update_ids == ()


def test_a_round_does_not_wait_for_devices_that_are_gone() -> None:
    now = make_round(target=4)
    now.handle(Gone(device="slow"))
    answer(now, update("d0"))
    answer(now, update("d1"))
    assert isinstance(answer(now, update("d2"))[-1], Close)


def test_a_late_update_that_could_not_be_stored_may_come_again() -> None:
    now, late = make_round(), update("slow", 3, OLD)
    now.handle(UpdateArrived(update=late))
    assert now.handle(StoreFailed(device="slow", update_id=late.update_id)) == []
    assert [type(a) for a in now.handle(UpdateArrived(update=late))] == [Store]
    assert now.phase is Phase.OPEN


def still(invitations: list[Invitation], **changes: object) -> list[str]:
    given: dict[str, object] = {
        "version": 6,
        "max_staleness": 100,
        "free": set(),
        "opened_after_s": 0.0,
        "counted": set(),
    }
    given |= changes
    counted = given.pop("counted")
    return [one.device for one in standing(invitations, counted, **given)]  # type: ignore[arg-type]


def test_an_invitation_stands_until_it_is_answered() -> None:
    asked = [invitation("a", 3, OLD), invitation("b", 3, OLD)]
    assert still(asked) == ["a", "b"]
    assert still(asked, counted={asked[0].update_id}) == ["b"]


def test_an_invitation_ends_when_too_many_versions_have_come_since() -> None:
    asked = [invitation("a", 3, OLD, version=2), invitation("b", 6, NEW, version=3)]
    assert still(asked, max_staleness=3) == ["b"]
    assert still(asked, max_staleness=4) == ["a", "b"]


def test_an_overdue_invitation_ends_only_if_the_device_can_be_asked_again() -> None:
    asked = [
        invitation("there", 3, OLD, opened_s=10.0),
        invitation("away", 3, OLD, opened_s=10.0),
        invitation("in-time", 3, OLD, opened_s=20.0),
    ]
    assert still(asked, opened_after_s=15.0, free={"there", "in-time"}) == ["away", "in-time"]


@pytest.mark.parametrize(
    ("given", "devices", "hostile", "structures", "wanted"),
    [
        (None, 1, 0.0, 1, 1),
        (None, 10, 0.0, 1, 2),
        (None, 100, 0.0, 4, 15),
        (None, 10, 0.2, 1, 3),  # against one hostile device of three
        (None, 10, 0.2, 2, 6),
        (None, 2, 0.2, 1, 2),  # no more than there are
        (5, 100, 0.0, 1, 5),
        (5, 3, 0.0, 1, 3),
    ],
)
def test_a_buffer_is_a_share_of_the_devices_and_enough_for_the_rule(
    given: int | None, devices: int, hostile: float, structures: int, wanted: int
) -> None:
    assert buffer_size(given, devices, hostile, structures) == wanted


def test_what_an_older_release_wrote_of_invitations_can_be_read() -> None:
    before = msgspec.msgpack.encode(
        [{"device": "a", "structure": "mlp", "base": OLD, "update_id": b"u" * 16}]
    )
    (read,) = msgspec.msgpack.decode(before, type=list[Invitation])
    assert (read.device, read.round, read.way) == ("a", 0, None)
    assert msgspec.msgpack.encode([read]) == before
