"""Rollouts as lists of events: who gets what when, and what makes them go back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liberatai_coordinator.fleet.rollout import (
    ENDED,
    Action,
    Cancel,
    Event,
    GoBack,
    Gone,
    Offer,
    Pause,
    Plan,
    Resume,
    Rollout,
    TakeBack,
    Tick,
    Told,
    accuracy,
    order,
    step,
)

MEMBERS = tuple(f"d{number:03}" for number in range(100))
PLAN = Plan(stages=(0.01, 0.1, 0.5, 1.0), soak_s=60.0, failed_min=5, deadline_s=600.0)


class Run:
    """A rollout that is stepped through, and everything that it asked for."""

    def __init__(self, plan: Plan = PLAN, members: tuple[str, ...] = MEMBERS) -> None:
        self.plan, self.members, self.now_s = plan, members, 0.0
        self.rollout = Rollout(name="r1")
        self.actions: list[Action] = []

    def on(self, event: Event) -> "Run":
        self.rollout, actions = step(self.plan, self.rollout, event)
        self.actions += actions
        return self

    def tick(self, seconds: float = 1.0) -> "Run":
        self.now_s += seconds
        return self.on(Tick(now_s=self.now_s, members=self.members))

    def told(self, device: str, outcome: Any = "done", **more: Any) -> "Run":
        return self.on(Told(device=device, now_s=self.now_s, outcome=outcome, **more))

    def offered(self) -> set[str]:
        return {name for name, part in self.rollout.parts.items() if part.state == "offered"}

    def all_done(self, **more: Any) -> "Run":
        for device in sorted(self.offered()):
            self.told(device, **more)
        return self

    def stage(self) -> "Run":
        """Let a stage be done and soak."""
        return self.tick().all_done().tick().tick(self.plan.soak_s)


def test_stages_reach_growing_shares_in_a_drawn_order_and_finish() -> None:
    run = Run()
    reached = []
    for _ in PLAN.stages:
        run.tick()
        reached.append(len(run.rollout.parts))
        run.all_done().tick()
        assert run.rollout.state == "soaking"
        run.tick(59.0)
        assert run.rollout.state == "soaking"
        run.tick(1.0)
    assert reached == [1, 10, 50, 100]
    assert run.rollout.state == "finished"
    assert list(run.rollout.parts) == order("r1", MEMBERS)
    assert order("r1", MEMBERS) != order("r2", MEMBERS)


def test_a_rollout_without_a_device_waits_and_never_finishes() -> None:
    run = Run(members=())
    for _ in range(50):
        run.tick(3600.0)
    assert (run.rollout.state, run.rollout.reason) == ("waiting", "no device belongs to the group")
    run.members = ("a",)
    run.tick()
    assert run.actions == [Offer(devices=("a",))]


def test_a_stage_that_nobody_has_done_is_not_over() -> None:
    run = Run(members=("a", "b"))
    run.tick().tick(700.0)
    assert {part.state for part in run.rollout.parts.values()} == {"late"}
    assert (run.rollout.state, run.rollout.reason) == ("running", "no device has done it yet")
    for _ in range(50):
        run.tick(3600.0)
    assert run.rollout.state == "running"
    late = next(iter(run.rollout.parts))
    assert run.told(late).tick().rollout.state == "soaking"  # late is better than never


def test_a_stage_in_which_all_failed_goes_back_however_small_it_is() -> None:
    run = Run().tick()
    (first,) = run.offered()
    run.told(first, "failed", reason="E_BUDGET: too small").tick()
    assert run.rollout.state == "rolling back"
    assert run.rollout.reason == "all that it was offered to failed: E_BUDGET"


def test_too_many_failures_stop_it_and_take_it_back_with_the_reason() -> None:
    run = Run().stage()
    run.tick()
    for number, device in enumerate(sorted(run.offered())):
        run.told(device, "failed" if number < 2 else "done", reason="E_DIGEST: damaged" if number < 2 else "")
        if run.rollout.state == "rolling back":
            break
    assert run.rollout.state == "rolling back"
    assert run.rollout.reason == "2 of 5 failed (40%; at most 5%): E_DIGEST"
    (back,) = [action for action in run.actions if isinstance(action, TakeBack)]
    assert set(back.devices) == set(run.rollout.parts)
    for device in back.devices:
        run.told(device)
    assert str(run.rollout.state) == "rolled back"
    assert {part.state for part in run.rollout.parts.values()} == {"back"}
    assert run.rollout.reason == "2 of 5 failed (40%; at most 5%): E_DIGEST"


def test_a_small_group_is_judged_although_it_is_smaller_than_the_least_number() -> None:
    run = Run(Plan(stages=(1.0,), failed_min=10), members=("a", "b", "c"))
    run.tick().told("a").told("b")
    assert run.told("c", "failed", reason="E_QUOTA: too large").rollout.state == "rolling back"


def test_a_bad_model_fails_the_accuracy_gate_at_ten_per_cent_and_goes_back_with_the_reason() -> None:
    """One device's few answers say nothing yet; those of a tenth of the fleet do."""
    run = Run()
    run.tick().all_done(evaluation=(5, 10), before=(9, 10)).tick().tick(60.0)
    assert (run.rollout.state, run.rollout.stage) == ("running", 1)
    run.tick()
    assert len(run.offered()) == 9
    for device in sorted(run.offered()):
        if run.rollout.state == "running":
            run.told(device, evaluation=(5, 10), before=(9, 10))
    assert run.rollout.state == "rolling back"
    reason = "accuracy on the devices fell from 90.0% to 50.0% over 30 answers (at most 2.0% less)"
    assert run.rollout.reason == reason
    (back,) = [action for action in run.actions if isinstance(action, TakeBack)]
    assert len(back.devices) == 10  # also who was offered it and has not answered
    for device in back.devices:
        run.told(device)
    assert (run.rollout.state, run.rollout.reason) == ("rolled back", reason)
    assert not [action for action in run.tick(3600.0).actions if isinstance(action, Offer)][2:]


def test_a_good_model_passes_the_gate_and_a_first_one_is_measured_against_the_least() -> None:
    run = Run(Plan(stages=(1.0,), soak_s=0.0), members=MEMBERS[:10])
    run.tick().all_done(evaluation=(9, 10), before=(9, 10)).tick().tick()
    assert run.rollout.state == "finished"
    first = Run(Plan(stages=(1.0,), accuracy_least=0.8), members=MEMBERS[:10])
    first.tick().all_done(evaluation=(7, 10))
    assert first.rollout.reason == "accuracy on the devices is 70.0%, at least 80.0% is asked"


def test_one_device_cannot_stop_a_rollout_by_claiming_many_wrong_answers() -> None:
    run = Run(Plan(stages=(1.0,)))
    run.tick()
    liar, *others = sorted(run.offered())
    for device in others:
        run.told(device, evaluation=(9, 10), before=(9, 10))
    run.told(liar, evaluation=(0, 10_000_000), before=(10_000_000, 10_000_000))
    assert run.rollout.state == "running"
    after, before, answers = accuracy(run.rollout.parts.values())
    assert after == pytest.approx(0.891)
    assert before == pytest.approx(0.901)
    assert answers == 1000


def test_it_pauses_after_a_stage_and_by_an_operator_and_goes_on() -> None:
    run = Run(Plan(stages=(0.1, 1.0), soak_s=10.0, pause_after=(1,)))
    run.stage()
    assert run.rollout.state == "paused"
    assert "after stage 1 of 2" in run.rollout.reason
    assert run.tick(9999.0).rollout.state == "paused"
    run.on(Resume(now_s=run.now_s)).tick()
    assert len(run.rollout.parts) == 100
    run.on(Pause(now_s=run.now_s)).all_done().tick(100.0)
    assert run.rollout.state == "paused"
    assert run.on(Resume(now_s=run.now_s)).tick().tick(10.0).rollout.state == "finished"


def test_who_cancels_leaves_devices_as_they_are_and_who_goes_back_does_not() -> None:
    run = Run().stage().tick()
    run.on(Cancel(now_s=run.now_s)).tick(9999.0)
    assert run.rollout.state == "cancelled"
    assert not [action for action in run.actions if isinstance(action, TakeBack)]
    back = Run().stage().tick()
    back.on(GoBack(now_s=back.now_s))
    assert back.rollout.state == "rolling back"
    back.tick(700.0)  # who is away goes back when it is there again
    assert str(back.rollout.state) == "rolled back"


def test_who_joins_the_group_later_is_reached_and_who_is_decommissioned_is_forgotten() -> None:
    run = Run(Plan(stages=(1.0,), soak_s=10.0), members=("a",))
    run.tick()
    run.members = ("a", "b")
    run.tick()
    assert run.actions == [Offer(devices=("a",)), Offer(devices=("b",))]
    run.on(Gone(device="b"))
    run.members = ("a",)
    run.told("a").tick().tick(10.0)
    assert run.rollout.state == "finished"


@pytest.mark.parametrize("stages", [(), (0.5, 0.5), (0.5, 0.1)])
def test_stages_must_grow(stages: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="stages"):
        Plan(stages=stages)


EVENTS = st.one_of(
    st.tuples(st.just("tick"), st.floats(0.1, 700.0)),
    st.tuples(st.just("told"), st.integers(0, 19), st.sampled_from(["done", "failed"]), st.integers(0, 10)),
    st.tuples(st.sampled_from(["pause", "resume", "back", "gone", "members"]), st.integers(0, 19)),
)


@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_nobody_is_offered_twice_and_what_ended_stays_ended(events: list[Any]) -> None:
    run = Run(Plan(stages=(0.2, 1.0), soak_s=30.0, deadline_s=500.0), members=MEMBERS[:20])
    gone: set[str] = set()
    for kind, *rest in events:
        before = run.rollout
        if kind == "tick":
            run.tick(rest[0])
        elif kind == "told":
            run.told(MEMBERS[rest[0]], rest[1], evaluation=(rest[2], 10), before=(9, 10))
        elif kind == "members":
            run.members = MEMBERS[: rest[0]]
        elif kind == "gone":
            gone.add(MEMBERS[rest[0]])
            run.on(Gone(device=MEMBERS[rest[0]]))
        else:
            now_s = run.now_s
            made: dict[str, Event] = {
                "pause": Pause(now_s=now_s),
                "resume": Resume(now_s=now_s),
                "back": GoBack(now_s=now_s),
            }
            run.on(made[kind])
        if before.state in {"cancelled", "rolled back"}:
            assert run.rollout.state == before.state
        if run.rollout.state == "finished":
            assert any(part.state == "done" for part in run.rollout.parts.values()) or gone
    offers = [device for action in run.actions if isinstance(action, Offer) for device in action.devices]
    assert len(offers) == len(set(offers)) or gone
    if any(isinstance(action, TakeBack) for action in run.actions):
        assert run.rollout.state in {"rolling back", "rolled back"}
    assert {"finished"} <= ENDED
