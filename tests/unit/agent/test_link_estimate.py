"""The link's rate follows real transfers, not freaks; a day's quota is given once, whatever the clock says."""

import math
from collections.abc import Iterable

import pytest

from liberatai_agent.exchange.link_estimate import (
    ANNOUNCE_S,
    DAY_S,
    DRIFT_HALF_LIFE_S,
    MAX_COUNT,
    MAX_STEP,
    NOTHING,
    LinkEstimate,
    announce,
    count,
    drifted,
    received,
    sent,
)

KIB = 1024


def uploads(link: LinkEstimate, transfers: Iterable[tuple[int, float]]) -> LinkEstimate:
    """Return the link after (bytes, seconds) of every transfer."""
    for size, seconds in transfers:
        link = sent(link, size, seconds)
    return link


def rate(link: LinkEstimate) -> float:
    assert link.up_bits_s is not None
    return link.up_bits_s


# --- rates ---------------------------------------------------------------------------------------


def test_the_first_transfer_gives_the_rate() -> None:
    assert rate(uploads(LinkEstimate(), [(8 * KIB, 1.024)])) == pytest.approx(64_000)


def test_small_messages_say_nothing_about_the_rate() -> None:
    link = uploads(LinkEstimate(), [(200, 0.3), (1024, 0.2), (1500, 0.2), (4095, 0.2)])
    assert link.up_bits_s is None
    assert link.latency_s == 0.2


def test_latency_is_taken_off_larger_transfers() -> None:
    """16 KiB at 64 kbit/s over a satellite: 2.05 s of transfer and 0.6 s of waiting."""
    link = uploads(LinkEstimate(), [(100, 0.6), (16 * KIB, 16 * KIB * 8 / 64_000 + 0.6)])
    assert rate(link) == pytest.approx(64_000)


def test_the_latency_falls_at_once_and_rises_slowly() -> None:
    link = uploads(LinkEstimate(), [(100, 0.5), (100, 0.1)])
    assert link.latency_s == 0.1
    assert uploads(link, [(100, 10.0)]).latency_s == pytest.approx(0.1 + 9.9 / 16)


def test_a_transfer_that_is_mostly_latency_raises_the_rate_but_never_lowers_or_starts_it() -> None:
    waiting = uploads(LinkEstimate(), [(100, 0.5)])
    assert uploads(waiting, [(4 * KIB, 0.55)]).up_bits_s is None
    slow = uploads(LinkEstimate(latency_s=0.5, up_s_per_byte=8 / 10_000), [(4 * KIB, 0.55)])
    assert 10_000 < rate(slow) < 4 * KIB * 8 / 0.55
    fast = LinkEstimate(latency_s=0.5, up_s_per_byte=8 / 10e6)
    assert uploads(fast, [(4 * KIB, 0.55)] * 100) == fast


@pytest.mark.parametrize("size", [300, 1024, 2048, 4095])
def test_a_small_transfer_raises_the_rate_but_never_beyond_what_it_shows(size: int) -> None:
    low = LinkEstimate(latency_s=0.1, up_s_per_byte=8 / 2000)
    shown = size * 8 / 0.12
    assert 2000 * 1.1 < rate(uploads(low, [(size, 0.12)])) < shown
    assert rate(uploads(low, [(size, 0.12)] * 200)) == pytest.approx(shown, rel=0.01)


@pytest.mark.parametrize("size", [100, 1024, 4095])
def test_a_small_transfer_never_lowers_the_rate(size: int) -> None:
    high = LinkEstimate(latency_s=0.1, up_s_per_byte=8 / 300_000)
    assert uploads(high, [(size, 30.0)] * 50).up_s_per_byte == high.up_s_per_byte
    assert received(high, size, 30.0).down_s_per_byte is None


def test_a_small_download_raises_the_downlink() -> None:
    link = received(LinkEstimate(down_s_per_byte=8 / 2000), 700, 0.1)
    assert link.down_bits_s is not None
    assert link.down_bits_s > 2200


def test_nothing_at_all_is_no_transfer() -> None:
    link = LinkEstimate(up_s_per_byte=8 / 2000, down_s_per_byte=8 / 2000)
    assert received(link, 0, 0.0) == link


def test_a_link_that_was_bad_for_an_hour_is_used_again_although_its_updates_became_small() -> None:
    """A plan that lets an update take 2 s; the link carries 300 kbit/s again after some very slow uploads."""
    link = uploads(LinkEstimate(), [(100, 0.1)] + [(10_240, 0.1 + 10_240 * 8 / 300_000)] * 8)
    link = uploads(link, [(10_240, 50.0)] * 4)
    assert rate(link) < 3000
    for _ in range(60):
        size = min(10_240, int(rate(link) * 2.0 / 8))
        link = sent(link, size, 0.1 + size * 8 / 300_000)
    assert rate(link) == pytest.approx(300_000, rel=0.1)


# --- estimates grow old --------------------------------------------------------------------------


def test_a_low_estimate_returns_to_the_profile_half_of_the_way_per_half_life() -> None:
    low = LinkEstimate(up_s_per_byte=0.005, down_s_per_byte=0.003)
    link = drifted(low, DRIFT_HALF_LIFE_S, up_bits_s=8000, down_bits_s=8e6)
    assert link.up_s_per_byte == pytest.approx((0.005 + 0.001) / 2)
    assert link.down_s_per_byte == pytest.approx((0.003 + 1e-6) / 2)
    assert rate(drifted(low, 60 * DRIFT_HALF_LIFE_S, up_bits_s=8000)) == pytest.approx(8000)


def test_without_a_profile_the_rate_doubles_per_half_life_and_stays_a_rate() -> None:
    low = LinkEstimate(up_s_per_byte=0.005)
    assert rate(drifted(low, DRIFT_HALF_LIFE_S)) == pytest.approx(2 * 1600)
    assert rate(drifted(low, 1e12)) <= 1e12


def test_a_device_that_trains_once_a_day_believes_its_link_at_most_four_times_too_fast() -> None:
    assert rate(drifted(LinkEstimate(up_s_per_byte=0.001), DAY_S)) <= 4.001 * 8000


def test_many_short_times_are_one_long_time() -> None:
    low = link = LinkEstimate(up_s_per_byte=0.005)
    for _ in range(1000):
        link = drifted(link, 5.0, up_bits_s=64_000)
    assert rate(link) == pytest.approx(rate(drifted(low, 5000.0, up_bits_s=64_000)))


@pytest.mark.parametrize("ran_s", [0.0, -5.0, math.nan])
def test_no_time_changes_nothing(ran_s: float) -> None:
    low = LinkEstimate(up_s_per_byte=0.005)
    assert drifted(low, ran_s, up_bits_s=8e6) == low


def test_what_is_faster_than_the_profile_or_was_never_measured_stays() -> None:
    link = LinkEstimate(up_s_per_byte=8 / 1e6)
    assert drifted(link, 1e6, up_bits_s=64_000, down_bits_s=64_000) == link


@pytest.mark.parametrize("bits_s", [2e3, 64e3, 1e6, 20e6, 1e9])
def test_a_steady_link_is_measured_within_a_percent_at_any_speed(bits_s: float) -> None:
    link = uploads(LinkEstimate(), [(100, 0.0005)] + [(128 * KIB, 128 * KIB * 8 / bits_s + 0.0005)] * 5)
    assert rate(link) == pytest.approx(bits_s, rel=0.01)


def test_one_freak_moves_the_rate_by_less_than_its_step_and_is_forgotten() -> None:
    """A device that slept for an hour in the middle of an upload."""
    good = [(8 * KIB, 0.065)] * 20
    before = uploads(LinkEstimate(), good)
    after = uploads(before, [(8 * KIB, 3600.0)])
    assert rate(before) / (MAX_STEP / 2 + 0.5) <= rate(after) < rate(before)
    assert rate(uploads(after, good * 3)) == pytest.approx(rate(before), rel=0.05)


def test_a_link_that_becomes_slower_is_noticed_after_a_few_transfers() -> None:
    fast = uploads(LinkEstimate(), [(64 * KIB, 0.026)] * 10)
    assert rate(fast) == pytest.approx(20e6, rel=0.02)
    slow = uploads(fast, [(8 * KIB, 1.024)] * 30)
    assert rate(slow) == pytest.approx(64_000, rel=0.05)


def test_the_mean_is_that_of_times_because_a_plan_asks_how_long() -> None:
    """Half the bytes at 1 Mbit/s, half at 100 kbit/s: the average byte takes as long as at 182 kbit/s."""
    fast, slow = (8 * KIB, 8 * KIB * 8 / 1e6), (8 * KIB, 8 * KIB * 8 / 1e5)
    found = rate(uploads(LinkEstimate(), [fast, slow] * 100))
    assert 120_000 < found < 260_000


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan, DAY_S + 1.0])
def test_impossible_times_are_ignored(seconds: float) -> None:
    link = uploads(LinkEstimate(), [(100, 0.1), (8 * KIB, 1.0)])
    assert uploads(link, [(100, seconds), (8 * KIB, seconds)]) == link


def test_no_time_at_all_is_no_infinite_rate() -> None:
    assert rate(uploads(LinkEstimate(), [(8 * KIB, 0.0)])) <= 1e12


def test_downloads_are_measured_on_their_own() -> None:
    link = received(LinkEstimate(latency_s=0.25), 32 * KIB, 32 * KIB * 8 / 100_000 + 0.25)
    assert link.down_bits_s == pytest.approx(100_000)
    assert link.up_bits_s is None


# --- what the coordinator is told ----------------------------------------------------------------


def test_the_first_measurement_is_told_at_once_and_small_changes_never() -> None:
    link = LinkEstimate(up_s_per_byte=8 / 100_000)
    told = announce(link, NOTHING, 5.0)
    assert told.up_bits_s == pytest.approx(100_000)
    assert (told.down_bits_s, told.at_s) == (None, 5.0)
    little = LinkEstimate(up_s_per_byte=8 / 81_000)
    assert announce(little, told, 5.0 + 100 * ANNOUNCE_S) is told


def test_a_large_change_is_told_when_the_pause_is_over() -> None:
    told = announce(LinkEstimate(up_s_per_byte=8 / 100_000), NOTHING, 0.0)
    slower = LinkEstimate(up_s_per_byte=8 / 70_000)
    assert announce(slower, told, ANNOUNCE_S - 1) is told
    assert announce(slower, told, ANNOUNCE_S).up_bits_s == pytest.approx(70_000)


def test_nothing_measured_is_nothing_told() -> None:
    assert announce(LinkEstimate(), NOTHING, 1e9) is NOTHING


# --- the day's quota -----------------------------------------------------------------------------


def days(link: LinkEstimate, *looks: tuple[int, int, float]) -> LinkEstimate:
    """Return the link after (day on the clock, bytes, seconds run) of every look."""
    for day, size, ran_s in looks:
        link = count(link, size, 0, day=day, ran_s=ran_s)
    return link


def test_both_ways_count_and_totals_never_start_over() -> None:
    link = count(count(LinkEstimate(), 10, 5, day=100, ran_s=5.0), 1, 2, day=101, ran_s=5.0)
    assert (link.day, link.day_bytes) == (101, 3)
    assert (link.sent_bytes, link.received_bytes) == (11, 7)


def test_a_day_is_counted_on_until_the_next_one() -> None:
    assert days(LinkEstimate(), (100, 10, 5), (100, 20, 5)).day_bytes == 30
    assert days(LinkEstimate(), (100, 10, 5), (100, 20, 5), (101, 7, 5)).day_bytes == 7


def test_a_clock_that_jumps_back_gives_no_new_quota_on_its_way_there_or_back() -> None:
    link = days(LinkEstimate(), (100, 10, 5), (99, 20, 5), (100, 30, 5), (0, 40, 5), (100, 50, 5))
    assert (link.day, link.day_bytes) == (100, 150)


def test_a_clock_that_was_far_ahead_is_believed_again_after_a_day_of_running() -> None:
    link = days(LinkEstimate(), (50_000, 10, 5), (100, 20, DAY_S - 1))
    assert (link.day, link.day_bytes) == (50_000, 30)
    link = days(link, (100, 5, 2))
    assert (link.day, link.day_bytes) == (100, 5)
    assert days(link, (101, 1, 5)).day_bytes == 1


def test_counters_stop_at_their_limit() -> None:
    link = days(LinkEstimate(), (1, MAX_COUNT, 1), (1, MAX_COUNT, 1))
    assert link.day_bytes == link.sent_bytes == MAX_COUNT
