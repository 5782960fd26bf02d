"""Who is chosen: a pure function of what is known, a seed and the round."""

import math
from collections import Counter
from typing import Any

import pytest

from liberatai_coordinator.rounds.selection import Past, choose

NAMES = [f"d{n:02d}" for n in range(20)]


def chosen(how: Any, wanted: int, **more: Any) -> list[str]:
    given: dict[str, Any] = {
        "past": {},
        "seed": 1,
        "number": 1,
        "sample_cap": 1000,
        "preferred_s": 100.0,
        "ready": NAMES,
    }
    given |= more
    return choose(how, given.pop("ready"), wanted, **given)


def everybody(**changes: Any) -> dict[str, Past]:
    given: dict[str, Any] = {"invited": 3, "round": 3, "loss": 1.0, "samples": 100, "seconds": 10.0}
    given |= changes
    return {name: Past(**given) for name in NAMES}


def often(past: dict[str, Past], rounds: int = 200, wanted: int = 4, **more: Any) -> Counter[str]:
    """Return how often each device is drawn in the late rounds of a long job, with nothing learnt between."""
    return Counter(
        name
        for number in range(300, 300 + rounds)
        for name in chosen("utility", wanted, past=past, seed=number, number=number, **more)
    )


@pytest.mark.parametrize("how", ["random", "fair", "utility"])
@pytest.mark.parametrize("wanted", [0, 1, 7, 20])
def test_as_many_as_wanted_each_once_in_order_and_the_same_again(how: str, wanted: int) -> None:
    past = {name: Past(invited=n, round=n, loss=float(n), samples=n) for n, name in enumerate(NAMES[:12])}
    first = chosen(how, wanted, past=past, number=5)
    assert len(first) == len(set(first)) == wanted
    assert first == sorted(first)
    assert chosen(how, wanted, past=dict(reversed(past.items())), number=5) == first


@pytest.mark.parametrize("how", ["random", "fair", "utility"])
def test_another_seed_draws_others_where_nothing_is_known(how: str) -> None:
    draws = {tuple(chosen(how, 5, seed=seed)) for seed in range(10)}
    assert len(draws) > 5


def test_fair_gives_everybody_a_turn_before_anybody_has_a_second() -> None:
    past: dict[str, Past] = {}
    for number in range(1, 11):
        for name in chosen("fair", 4, past=past, number=number, seed=number):
            before = past.get(name, Past())
            past[name] = Past(invited=before.invited + 1)
        counts = [past.get(name, Past()).invited for name in NAMES]
        assert max(counts) - min(counts) <= 1
    assert {one.invited for one in past.values()} == {2}


def test_fair_counts_invitations_so_that_silent_devices_take_no_more_than_their_turn() -> None:
    past = everybody() | {"d00": Past(invited=4, round=0)}
    assert "d00" not in chosen("fair", 19, past=past)


def test_utility_prefers_who_has_much_to_teach() -> None:
    past = everybody() | {name: Past(invited=3, round=3, loss=3.0, samples=100) for name in NAMES[:4]}
    counts = often(past)
    assert min(counts[name] for name in NAMES[:4]) > 2 * max(counts[name] for name in NAMES[4:])


def test_utility_prefers_who_is_fast() -> None:
    past = everybody() | {
        name: Past(invited=3, round=3, loss=1.0, samples=100, seconds=300.0) for name in NAMES[:4]
    }
    counts = often(past, wanted=10)
    assert max(counts[name] for name in NAMES[:4]) < min(counts[name] for name in NAMES[4:])


def test_a_liar_does_not_take_the_place_of_those_that_have_as_much_to_teach() -> None:
    honest = everybody() | {name: Past(invited=3, round=3, loss=2.0, samples=100) for name in NAMES[1:5]}
    liar = honest | {"d00": Past(invited=3, round=3, loss=1e30, samples=10**9)}
    counts = often(liar)
    # It is cut at the quantile: never worth more than the best honest ones.
    assert counts["d00"] <= 1.3 * min(counts[name] for name in NAMES[1:5])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0, None])
def test_what_is_no_loss_is_worth_nothing_and_harms_nobody(loss: float | None) -> None:
    past = everybody(loss=2.0) | {"d00": Past(invited=3, round=3, loss=loss, samples=10**9)}
    counts = often(past, wanted=10)
    assert counts["d00"] < min(counts[name] for name in NAMES[1:])


def test_no_device_starves_under_utility() -> None:
    past = everybody() | {"d00": Past(invited=3, round=3, loss=0.0, samples=1, seconds=1e4)}
    got: Counter[str] = Counter()
    for number in range(4, 104):
        for name in chosen("utility", 5, past=past, number=number, seed=number):
            got[name] += 1
            one = past[name]
            past[name] = Past(
                invited=one.invited + 1,
                round=number,
                loss=one.loss,
                samples=one.samples,
                seconds=one.seconds,
            )
    assert min(got[name] for name in NAMES) >= 3


def test_a_new_job_explores_and_a_long_one_keeps_exploring_a_fifth() -> None:
    past = {name: Past(invited=3, round=3, loss=1.0, samples=100, seconds=10.0) for name in NAMES[:10]}
    unknown = set(NAMES[10:])

    def share(number: int) -> float:
        draws = [chosen("utility", 5, past=past, seed=seed, number=number) for seed in range(200)]
        return sum(name in unknown for draw in draws for name in draw) / 1000

    assert share(1) == pytest.approx(0.9, abs=0.03)
    assert share(200) == pytest.approx(0.2, abs=0.03)
