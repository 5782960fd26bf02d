"""A round is a list of events: late, doubled, lost and hostile updates included."""

import dataclasses

import msgspec
import pytest

from liberatai_coordinator.rounds.round import (
    Abandon,
    Accept,
    Action,
    Back,
    Close,
    Failed,
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
    invited,
)
from liberatai_core.contract.messages import Update, update_id

BASE = b"b" * 16


def make_round(devices: int = 4, target: int = 4, quorum: int = 3, closes_s: float = 100.0) -> Round:
    invitations = {
        f"d{n}": Invitation(
            device=f"d{n}", structure="mlp", base=BASE, update_id=update_id(f"d{n}", "job", 7, BASE)
        )
        for n in range(devices)
    }
    return Round(
        job="job", number=7, invitations=invitations, target=target, quorum=quorum, closes_s=closes_s
    )


def update(device: str) -> Update:
    return Update(
        update_id=update_id(device, "job", 7, BASE),
        device=device,
        job="job",
        round=7,
        epoch=1,
        structure="mlp",
        base=BASE,
        samples=10,
        codec="topk",
        body=b"x",
    )


def answer(now: Round, device: str, outcome: str = "stored") -> list[Action]:
    """Let an update arrive and be stored at once."""
    actions = now.handle(UpdateArrived(update=update(device)))
    assert [type(action) for action in actions] == [Store]
    stored = UpdateStored(device=device, update_id=update(device).update_id, outcome=outcome)
    return now.handle(stored)


def ids(*devices: str) -> tuple[bytes, ...]:
    return tuple(sorted(update(device).update_id for device in devices))


def test_all_answers_close_the_round_with_the_sorted_set() -> None:
    now = make_round()
    for device in ("d3", "d0", "d1"):
        assert answer(now, device) == [Accept(device=device, update_id=update(device).update_id)]
    last = answer(now, "d2")
    assert last[-1] == Close(update_ids=ids("d0", "d1", "d2", "d3"))
    assert now.phase is Phase.CLOSED


def test_the_target_closes_an_over_selected_round_early() -> None:
    now = make_round(devices=6, target=4, quorum=3)
    for device in ("d0", "d1", "d2"):
        answer(now, device)
    assert answer(now, "d5")[-1] == Close(update_ids=ids("d0", "d1", "d2", "d5"))


def test_a_late_update_is_refused_with_a_code() -> None:
    now = make_round(devices=5, target=4)
    for device in ("d0", "d1", "d2", "d3"):
        answer(now, device)
    (refused,) = now.handle(UpdateArrived(update=update("d4")))
    assert isinstance(refused, Refuse)
    assert refused.error.code == "E_ROUND_CLOSED"


def test_a_repeated_update_is_receipted_again_and_counted_once() -> None:
    now = make_round()
    answer(now, "d0")
    for _ in range(100):
        (again,) = now.handle(UpdateArrived(update=update("d0")))
        assert again == Accept(device="d0", update_id=update("d0").update_id, code="E_DUP")
    assert len(now.stored) == 1


def test_a_repetition_after_the_close_is_still_receipted() -> None:
    now = make_round()
    for device in ("d0", "d1", "d2", "d3"):
        answer(now, device)
    (again,) = now.handle(UpdateArrived(update=update("d1")))
    assert again == Accept(device="d1", update_id=update("d1").update_id, code="E_DUP")


def test_a_repetition_while_the_first_is_being_stored_is_not_stored_twice() -> None:
    now = make_round()
    assert len(now.handle(UpdateArrived(update=update("d0")))) == 1
    assert now.handle(UpdateArrived(update=update("d0"))) == []


def test_the_deadline_closes_with_a_quorum() -> None:
    now = make_round(closes_s=100.0)
    for device in ("d0", "d1", "d2"):
        answer(now, device)
    assert now.handle(Tick(now_s=99.9)) == []
    assert now.handle(Tick(now_s=100.0)) == [Close(update_ids=ids("d0", "d1", "d2"))]


def test_the_deadline_abandons_without_a_quorum_and_lists_what_it_had() -> None:
    now = make_round(closes_s=100.0)
    answer(now, "d0")
    (ended,) = now.handle(Tick(now_s=101.0))
    assert isinstance(ended, Abandon)
    assert ended.update_ids == ids("d0")
    assert "1 of 3" in ended.reason


def test_an_update_on_its_way_to_the_disk_at_the_deadline_belongs_to_the_round() -> None:
    """P1: what gets a receipt is in the frozen set."""
    now = make_round(closes_s=100.0)
    answer(now, "d0")
    answer(now, "d1")
    now.handle(UpdateArrived(update=update("d2")))
    assert now.handle(Tick(now_s=100.0)) == []
    stored = UpdateStored(device="d2", update_id=update("d2").update_id, outcome="stored")
    assert now.handle(stored)[-1] == Close(update_ids=ids("d0", "d1", "d2"))


def test_a_failed_store_lets_the_device_try_again() -> None:
    now = make_round()
    now.handle(UpdateArrived(update=update("d0")))
    now.handle(StoreFailed(device="d0", update_id=update("d0").update_id))
    assert [type(a) for a in now.handle(UpdateArrived(update=update("d0")))] == [Store]


def test_another_update_of_the_same_device_is_a_conflict() -> None:
    now = make_round()
    (refused,) = answer(now, "d0", outcome="conflict")
    assert isinstance(refused, Refuse)
    assert refused.error.code == "E_DUP_CONFLICT"
    assert now.stored == {}


def test_devices_that_are_gone_are_not_waited_for_once_there_is_a_quorum() -> None:
    now = make_round()
    answer(now, "d0")
    answer(now, "d1")
    assert now.handle(Gone(device="d3")) == []
    assert answer(now, "d2")[-1] == Close(update_ids=ids("d0", "d1", "d2"))


def test_a_device_that_came_back_is_waited_for_again() -> None:
    now = make_round()
    now.handle(Gone(device="d3"))
    now.handle(Back(device="d3"))
    for device in ("d0", "d1", "d2"):
        answer(now, device)
    assert now.phase is Phase.OPEN


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"round": 6}, "E_ROUND_UNKNOWN"),
        ({"job": "other"}, "E_ROUND_UNKNOWN"),
        ({"device": "stranger"}, "E_ROUND_UNKNOWN"),
        ({"base": b"x" * 16}, "E_BASE_MODEL"),
        ({"structure": "cnn"}, "E_SCHEMA"),
        ({"update_id": b"x" * 16}, "E_SCHEMA"),
    ],
)
def test_an_update_that_does_not_belong_is_refused(changes: dict[str, object], code: str) -> None:
    now = make_round()
    hostile = msgspec.structs.replace(update("d0"), **changes)
    (refused,) = now.handle(UpdateArrived(update=hostile))
    assert isinstance(refused, Refuse)
    assert refused.error.code == code
    assert now.storing == {}


def test_over_selection_asks_thirty_per_cent_more_but_never_more_than_there_are() -> None:
    assert invited(100, 10, 1.3) == 13
    assert invited(11, 10, 1.3) == 11
    assert invited(8, None, 1.3) == 8


def test_events_and_actions_are_frozen() -> None:
    for kind in (Tick, Store, Close, UpdateArrived):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind.__new__(kind), dataclasses.fields(kind)[0].name, None)


def test_devices_that_failed_are_not_waited_for() -> None:
    now = make_round(devices=4, target=4, quorum=2)
    answer(now, "d0")
    assert now.handle(Gone(device="d3")) == []
    assert answer(now, "d1") == [Accept(device="d1", update_id=update("d1").update_id)]
    assert now.waiting == {"d2"}
    assert now.handle(Gone(device="d2")) == [Close(update_ids=ids("d0", "d1"))]


def test_a_round_that_nobody_can_answer_ends_at_once() -> None:
    now = make_round(devices=2, target=2, quorum=1)
    assert now.handle(Gone(device="d0")) == []
    (end,) = now.handle(Gone(device="d1"))
    assert isinstance(end, Abandon)
    assert "no device is left" in end.reason


def test_too_few_updates_wait_for_a_device_that_may_come_back() -> None:
    now = make_round(devices=3, target=3, quorum=2)
    answer(now, "d0")
    assert now.handle(Gone(device="d1")) == []
    assert now.handle(Gone(device="d2")) == []
    assert answer(now, "d1")[-1] == Close(update_ids=ids("d0", "d1"))


def test_an_event_costs_the_same_whatever_the_number_of_invitations() -> None:
    class Counted(dict):  # what walks over all invitations is seen
        walks = 0

        def __iter__(self):
            Counted.walks += 1
            return super().__iter__()

    now = make_round(devices=50, target=50, quorum=50)
    now.invitations = Counted(now.invitations)
    for n in range(49):
        answer(now, f"d{n}")
        now.handle(Tick(now_s=1.0))
    assert Counted.walks == 0


def test_a_device_that_failed_has_answered_and_the_others_close_the_round() -> None:
    now = make_round()
    for device in ("d0", "d1"):
        answer(now, device)
    assert now.handle(Failed(device="d3")) == []
    assert answer(now, "d2")[-1] == Close(update_ids=ids("d0", "d1", "d2"))


def test_the_last_word_may_be_that_of_the_device_that_failed() -> None:
    now = make_round()
    for device in ("d0", "d1", "d2"):
        answer(now, device)
    assert now.handle(Failed(device="d3")) == [Close(update_ids=ids("d0", "d1", "d2"))]


def test_a_round_that_cannot_reach_its_quorum_any_more_ends_at_once() -> None:
    now = make_round()
    answer(now, "d0")
    answer(now, "d1")
    now.handle(Failed(device="d2"))
    (end,) = now.handle(Failed(device="d3"))
    assert isinstance(end, Abandon)
    assert end.update_ids == ids("d0", "d1")
    assert "2 of 3 needed updates and no device is left" in end.reason
    assert "2 failed" in end.reason


def test_who_is_lost_may_come_back_to_a_round_that_needs_it() -> None:
    now = make_round()
    answer(now, "d0")
    answer(now, "d1")
    now.handle(Failed(device="d2"))
    assert now.handle(Gone(device="d3")) == []
    assert answer(now, "d3")[-1] == Close(update_ids=ids("d0", "d1", "d3"))


def test_a_device_that_failed_and_then_sends_after_all_counts() -> None:
    now = make_round()
    now.handle(Failed(device="d0"))
    now.handle(Back(device="d0"))
    for device in ("d1", "d2", "d3"):
        answer(now, device)
    assert answer(now, "d0")[-1] == Close(update_ids=ids("d0", "d1", "d2", "d3"))


def test_a_failed_device_whose_connection_breaks_is_still_not_waited_for() -> None:
    now = make_round()
    answer(now, "d0")
    answer(now, "d1")
    now.handle(Failed(device="d2"))
    now.handle(Gone(device="d2"))
    (end,) = now.handle(Failed(device="d3"))
    assert isinstance(end, Abandon)
