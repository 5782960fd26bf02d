"""Devices that several jobs want: lists of claims and what comes of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liberatai_coordinator.jobs.sharing import Claim, Grant, Sharing, Wait

ALL = frozenset(f"d{n}" for n in range(10))


def claim(job: str, *, least: int = 1, share: float = 1.0, hold_s: float = 60.0, devices=ALL) -> Claim:
    return Claim(job=job, devices=devices, least=least, share=share, hold_s=hold_s)


def opened(sharing: Sharing, wanted: Claim, now_s: float = 0.0) -> list[str]:
    """Let a job take all that it is granted."""
    granted = sharing.ask(wanted, now_s)
    assert isinstance(granted, Grant), granted
    taken = sorted(granted.devices)[: granted.most]
    sharing.take(wanted.job, taken, now_s + wanted.hold_s)
    return taken


def test_a_job_alone_has_every_device() -> None:
    sharing = Sharing()
    assert opened(sharing, claim("a")) == sorted(ALL)


def test_two_jobs_run_side_by_side_by_their_shares() -> None:
    sharing = Sharing()
    sharing.ask(claim("b", share=1), 0)
    assert len(opened(sharing, claim("a", share=4))) == 8
    assert len(opened(sharing, claim("b", share=1))) == 2


def test_a_slow_job_never_starves_a_fast_one() -> None:
    sharing = Sharing()
    assert len(opened(sharing, claim("slow", hold_s=3600))) == 10
    assert sharing.ask(claim("fast", hold_s=1), 1) == Wait(behind=("slow",))
    sharing.give_back("slow", ALL)
    # The fast job waited: it goes first, and the slow one gets what is left for it.
    assert len(opened(sharing, claim("fast", hold_s=1), 3600)) == 5
    assert len(opened(sharing, claim("slow", hold_s=3600), 3600)) == 5
    for second in range(100):
        sharing.give_back("fast", ALL)
        assert len(opened(sharing, claim("fast", hold_s=1), 3601 + second)) == 5


def test_jobs_that_need_every_device_take_turns() -> None:
    sharing = Sharing()
    a, b = claim("a", least=10), claim("b", least=10)
    assert len(opened(sharing, a)) == 10
    turns = []
    for now in range(6):
        assert isinstance(sharing.ask(b, now), Wait)
        sharing.give_back(a.job, ALL)
        assert isinstance(sharing.ask(a, now), Wait)
        turns.append(b.job)
        opened(sharing, b, now)
        a, b = b, a
    assert turns == ["b", "a", "b", "a", "b", "a"]


def test_devices_are_kept_for_the_job_that_waits_longest() -> None:
    sharing = Sharing()
    some = frozenset(["d0", "d1"])
    opened(sharing, claim("held", devices=some, hold_s=100))
    assert sharing.ask(claim("all", least=10), 1) == Wait(behind=("held",))
    late = claim("late", least=8, devices=ALL - some, hold_s=500)
    assert sharing.ask(late, 2) == Wait(behind=("all",))


def test_a_round_that_is_over_in_time_may_use_what_is_kept() -> None:
    sharing = Sharing()
    some = frozenset(["d0", "d1"])
    opened(sharing, claim("held", devices=some, hold_s=100))
    assert isinstance(sharing.ask(claim("all", least=10), 1), Wait)
    assert len(opened(sharing, claim("quick", devices=ALL - some, hold_s=50), 2)) >= 1
    assert isinstance(sharing.ask(claim("quick", devices=ALL - some, hold_s=50), 60), Wait)


def test_devices_of_one_job_only_are_not_shared() -> None:
    sharing = Sharing()
    mine = frozenset(["x0", "x1", "x2"])
    sharing.ask(claim("b"), 0)
    taken = opened(sharing, claim("a", devices=ALL | mine))
    assert len(taken) == 3 + 5


def test_a_job_that_is_over_leaves_everything_behind() -> None:
    sharing = Sharing()
    heard = []
    sharing.on_change = lambda: heard.append(1)
    sharing.ask(claim("b"), 0)
    taken = opened(sharing, claim("a"))
    assert sorted(sharing.leave("a")) == sorted(taken)
    assert heard
    assert len(opened(sharing, claim("b"))) == 10
    assert sharing.holder("d0") == "b"
    assert sharing.give_back("a", ALL) == []


@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 10),
            st.floats(0.1, 10),
            st.floats(1, 100),
            st.sets(st.sampled_from(sorted(ALL)), min_size=1),
        ),
        min_size=1,
        max_size=5,
    ),
    order=st.lists(st.integers(0, 4), min_size=30, max_size=80),
)
def test_every_job_that_can_open_a_round_opens_one_again_and_again(jobs, order) -> None:
    """Rounds end at their deadline; whatever the order of asking, nobody waits for ever."""
    sharing = Sharing()
    claims = [
        claim(f"j{n}", least=min(least, len(devices)), share=share, hold_s=hold_s, devices=frozenset(devices))
        for n, (least, share, hold_s, devices) in enumerate(jobs)
    ]
    rounds = dict.fromkeys((one.job for one in claims), 0)
    ends: dict[str, float] = {}
    now = 0.0
    for step in range(400):
        for job in [job for job, end in ends.items() if end <= now]:
            del ends[job]
            sharing.give_back(job, ALL)
        first = order[step % len(order)] % len(claims)
        for one in claims[first:] + claims[:first]:
            if one.job in ends:
                continue
            found = sharing.ask(one, now)
            if isinstance(found, Grant):
                taken = sorted(found.devices)[: found.most]
                assert len(taken) >= one.least
                assert all(sharing.holder(device) is None for device in taken)
                sharing.take(one.job, taken, now + one.hold_s)
                ends[one.job] = now + one.hold_s
                rounds[one.job] += 1
        now = min(ends.values())
    assert min(rounds.values()) >= 1


def test_a_claim_without_devices_waits() -> None:
    assert Sharing().ask(claim("a", devices=frozenset()), 0) == Wait(behind=())


@pytest.mark.parametrize("least", [1, 3])
def test_the_file_holder_is_remembered(least: int) -> None:
    sharing = Sharing()
    opened(sharing, claim("a", least=least))
    sharing.give_back("a", ALL)
    assert sharing.served_last("d3") == "a"
