"""Rules inside a structure, against sums made by hand; what hostile devices can and cannot do."""

import tracemalloc
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest

from liberatai_coordinator.config import Rule
from liberatai_core.aggregator import packed, rules
from liberatai_core.aggregator.centred_clipping import bucketing, centred_weights
from liberatai_core.aggregator.mean import Update, aggregate, mean
from liberatai_core.aggregator.median import median_of_senders
from liberatai_core.aggregator.neighbour_vote import elected
from liberatai_core.aggregator.nnm import mixed, neighbours
from liberatai_core.aggregator.norm_clip import clip_factors
from liberatai_core.aggregator.rules import RULES, Merged, Sender, Settings, feared, merge
from liberatai_core.aggregator.trimmed_mean import trimmed_mean, trimmed_mean_of_senders
from liberatai_core.errors import DuplicateError, NonFiniteError, SchemaError, StructureError, TooLargeError
from liberatai_core.weights import to_bytes

ROBUST = sorted(set(RULES) - {"mean"})


def senders(*differences: Any, samples: Any = None) -> list[Sender]:
    values = [np.array(one, dtype=np.float32) for one in differences]
    counts = [1] * len(values) if samples is None else samples
    return [
        Sender(id=f"{place:04d}", samples=count, read=partial(np.array, one))
        for place, (one, count) in enumerate(zip(values, counts, strict=True))
    ]


def merged(rule: Any, some: list[Sender], **settings: Any) -> Merged:
    return merge(Settings(rule=rule, **settings), some[0].read().size, some)


def column(*values: float) -> Any:
    return np.array(values, dtype=np.float64)[:, None]


# --- single algorithms -------------------------------------------------------------------------------


def test_the_job_knows_every_rule() -> None:
    assert set(get_args(Rule)) == set(RULES) == set(get_args(rules.Name))


def test_lengths_are_cut_to_a_multiple_of_the_median() -> None:
    """Median of 1, 2, 4 is 2; one that sent nothing is no yardstick and stays as it is."""
    assert clip_factors([1, 2, 4, 0], 1.0).tolist() == [1, 1, 0.5, 1]
    assert clip_factors([1, 2, 4, 0], 2.0).tolist() == [1, 1, 1, 1]
    assert clip_factors([0, 0], 1.0).tolist() == [1, 1]


def test_the_largest_and_the_smallest_values_are_left_out() -> None:
    assert trimmed_mean(column(1, 2, 9, -50, 3), 1).tolist() == [2.0]


def test_only_values_that_were_sent_are_trimmed() -> None:
    """Four of eight sent: 1 and 100 go, the mean of 2 and 4 counts half. One sender alone is not cut away."""
    assert trimmed_mean_of_senders(column(0, 1, 0, 100, 2, 4, 0, 0), 1).tolist() == [1.5]
    assert trimmed_mean_of_senders(column(0, 8, 0, 0, 0, 0, 0, 0), 1).tolist() == [1.0]
    assert trimmed_mean_of_senders(column(0, 0, 0), 1).tolist() == [0.0]


def test_with_dense_values_both_trimmed_means_agree() -> None:
    values = np.random.default_rng(0).normal(size=(9, 50))
    assert trimmed_mean_of_senders(values, 2) == pytest.approx(trimmed_mean(values, 2))


def test_the_median_is_that_of_the_senders() -> None:
    """Of -1, 2, 50 it is 2, of 1 and 3 it is 2; times senders / devices."""
    assert median_of_senders(column(0, 50, -1, 2)).tolist() == [2 * 3 / 4]
    assert median_of_senders(column(0, 1, 3, 0)).tolist() == [1.0]
    assert median_of_senders(column(0, 0, 0, 0)).tolist() == [0.0]
    assert median_of_senders(column(5, 7, 1)).tolist() == [5.0]


def test_a_mixture_holds_the_nearest_ones_and_itself() -> None:
    """Points 0, 1, 3, 100 on a line, one may be hostile: everybody leaves out the farthest one."""
    points = column(0, 1, 3, 100)
    near = neighbours(points @ points.T, 1)
    assert near.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    assert mixed(points, near)[:, 0] == pytest.approx([4 / 3, 4 / 3, 4 / 3, 104 / 3])


def test_twins_keep_themselves_in_their_mixtures() -> None:
    points = column(2, 2, 2, 2, 2)
    assert np.diag(neighbours(points @ points.T, 3)).all()


def test_buckets_hold_two_devices_each_and_follow_the_seed() -> None:
    buckets = bucketing(5, 7)
    assert buckets.shape == (3, 5)
    assert buckets.sum(axis=1) == pytest.approx(np.ones(3))
    assert ((buckets > 0).sum(axis=0) == 1).all()
    assert buckets.tolist() == bucketing(5, 7).tolist()
    assert any(buckets.tolist() != bucketing(5, seed).tolist() for seed in range(8, 12))


def test_centred_clipping_follows_its_formula() -> None:
    """The same steps on vectors instead of scalar products."""
    random = np.random.default_rng(3)
    x = random.normal(size=(6, 10)) + 1
    weights = centred_weights(x @ x.T, 1.0, 5)
    means, centre = bucketing(6, 5) @ x, np.zeros(10)
    for _ in range(3):
        lengths = np.linalg.norm(means - centre, axis=1)
        kept = np.minimum(1, np.median(lengths) / lengths)
        centre = centre + (kept[:, None] * (means - centre)).mean(axis=0)
    assert weights @ x == pytest.approx(centre)


def test_scalar_products_are_exact_to_21_bits_of_a_blocks_largest_value() -> None:
    random = np.random.default_rng(1)
    dense = random.normal(size=(7, 5000)).astype(np.float32)
    dense[:4][random.random((4, 5000)) < 0.95] = 0
    found = packed.gram([packed.pack(one) for one in dense])
    assert found == pytest.approx(dense.astype(np.float64) @ dense.astype(np.float64).T, abs=1e-2)
    assert (found == found.T).all()


def test_packing_loses_nothing_and_saves_memory_where_little_was_sent() -> None:
    sparse = np.zeros(5000, dtype=np.float32)
    sparse[[0, 2047, 2048, 4999]] = [1, -2, 3, -4]
    one, other = packed.pack(sparse), packed.pack(np.ones(5000, dtype=np.float32))
    assert one.values.size == 4
    assert other.positions is None
    assert packed.unpack(one).tolist() == sparse.tolist()
    whole = np.concatenate([values for _, values in packed.blocks([one, other])], axis=1)
    assert whole.tolist() == [sparse.tolist(), [1.0] * 5000]


# --- all rules ---------------------------------------------------------------------------------------


def test_the_mean_is_the_exact_mean_byte_for_byte() -> None:
    random = np.random.default_rng(2)
    differences = random.normal(size=(5, 100)).astype(np.float32)
    counts = [1, 20, 300, 4000, 50_000]
    updates = [
        Update(id=f"{place:04d}", difference=one, samples=count)
        for place, (one, count) in enumerate(zip(differences, counts, strict=True))
    ]
    found = merged("mean", senders(*differences, samples=counts), cap=1000, hostile=0.4)
    assert to_bytes(found.difference) == to_bytes(aggregate(mean(1000), 100, updates))
    assert {one.verdict for one in found.contributions} == {"accepted"}


def test_lengths_and_angles_of_contributions() -> None:
    first, second = merged("mean", senders([3, 4, 0], [3, -4, 0])).contributions
    assert (first.norm, second.norm) == (5.0, 5.0)
    assert first.cosine == pytest.approx(0.6)
    assert second.cosine == pytest.approx(0.6)
    (alone,) = merged("mean", senders([0, 0])).contributions
    assert (alone.norm, alone.cosine, alone.verdict) == (0.0, 0.0, "accepted")


def test_no_device_buys_weight_with_the_number_of_its_samples() -> None:
    """Median of the counts is 10: the boaster weighs 10 of 40."""
    some = senders([1], [1], [1], [-1], samples=[10, 10, 10, 10_000_000])
    assert merged("norm_clip", some).difference.tolist() == [0.5]
    for rule in set(ROBUST) - {"norm_clip"}:
        modest = senders([1], [1], [1], [-1], samples=[10, 10, 10, 10])
        assert merged(rule, some).difference.tolist() == merged(rule, modest).difference.tolist()


def honest(devices: int = 16, parameters: int = 500) -> Any:
    random = np.random.default_rng(4)
    way = random.normal(size=parameters)
    differences = (way + random.normal(size=(devices, parameters))).astype(np.float32)
    for one in differences:
        one[np.argsort(np.abs(one))[: parameters // 2]] = 0
    return way, differences


def test_giants_move_the_mean_wherever_they_want_and_robust_rules_hardly() -> None:
    way, good = honest()
    bad = np.tile(-1000 * way, (4, 1)).astype(np.float32)
    some = senders(*good, *bad)

    def cosine(rule: Any) -> float:
        found = merged(rule, some, hostile=0.2, clip=1.0).difference.astype(np.float64)
        return float(found @ way / np.linalg.norm(found) / np.linalg.norm(way))

    assert cosine("mean") < -0.9
    for rule in ROBUST:
        assert cosine(rule) > 0.8, rule


@pytest.mark.parametrize("rule", ROBUST)
def test_a_giants_updates_are_clipped_or_refused_and_honest_ones_are_not_refused(rule: str) -> None:
    way, good = honest()
    found = merged(rule, senders(*good, *np.tile(-1000 * way, (4, 1))), hostile=0.2)
    *fine, a, b, c, d = found.contributions
    refused = "refused" if rule in ("nnm_trimmed_mean", "neighbour_vote", "screened_mean") else "clipped"
    assert [one.verdict for one in (a, b, c, d)] == [refused] * 4
    assert all(one.cosine < 0 for one in (a, b, c, d))
    assert all(one.verdict != "refused" and one.cosine > 0 for one in fine)


def test_the_vote_leaves_out_a_short_update_that_is_nearest_to_everybody() -> None:
    """Honest ones lie far apart; minus a tenth of their mean is nearer to each of them than they are."""
    random = np.random.default_rng(6)
    good = random.normal(size=(8, 200)) + 0.6
    bad = np.tile(-good.mean(axis=0) / 10, (2, 1))
    some = senders(*good, *bad)
    mixture = [one.verdict for one in merged("nnm_trimmed_mean", some, hostile=0.2).contributions]
    vote = [one.verdict for one in merged("neighbour_vote", some, hostile=0.2).contributions]
    assert mixture[-2:] == ["accepted"] * 2
    assert vote[-2:] == ["refused"] * 2
    assert "refused" not in vote[:-2]


def test_the_vote_leaves_out_as_many_as_are_feared() -> None:
    _, good = honest()
    found = merged("neighbour_vote", senders(*good), hostile=0.25).contributions
    assert [one.verdict for one in found].count("refused") == 4
    assert elected(np.zeros((5, 5)), 2).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("rule", ROBUST)
def test_what_one_honest_device_alone_sent_is_not_lost(rule: str) -> None:
    """Ranks over all devices would cut it: nine zeros and one value."""
    differences = np.zeros((10, 40), dtype=np.float32)
    for device, one in enumerate(differences):
        one[device * 4 : device * 4 + 4] = 1
    found = merged(rule, senders(*differences), hostile=0.2).difference
    assert (found >= 0).all()
    assert found.sum() > 0.4 * 4


@pytest.mark.parametrize("rule", ROBUST)
def test_a_structure_is_frozen_where_the_feared_could_be_the_majority(rule: str) -> None:
    frozen = merged(rule, senders([1, 2], [1, 2]), hostile=0.2)
    assert frozen.difference.tolist() == [0, 0]
    assert "3 are needed against 1" in frozen.frozen
    assert [one.verdict for one in frozen.contributions] == ["frozen"] * 2
    three = merged(rule, senders([1, 2], [1, 2], [1, 2]), hostile=0.2)
    assert three.frozen == ""
    assert three.difference == pytest.approx([1, 2], rel=1e-6)
    assert merged(rule, senders([1, 2]), hostile=0.0).difference == pytest.approx([1, 2], rel=1e-6)


def test_the_mean_is_never_frozen() -> None:
    assert merged("mean", senders([1, 2]), hostile=0.4).difference.tolist() == [1, 2]


def test_the_feared_share_is_rounded_up_but_not_by_a_binary_fraction() -> None:
    assert [feared(0.2, devices) for devices in (0, 1, 5, 6, 10, 20, 35)] == [0, 1, 1, 2, 2, 4, 7]
    assert feared(0.0, 1000) == 0
    assert all(2 * feared(0.49, devices) < devices for devices in range(101, 200))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_updates_that_do_not_fit_are_refused(rule: str) -> None:
    good = senders([1, 2], [1, 2], [1, 2])
    for bad, error in (
        ([*good, *senders([1, 2])], DuplicateError),
        (senders([1, 2], [1, 2, 3], [1, 2]), StructureError),
        (senders([1, 2], [1, np.nan], [1, 2]), NonFiniteError),
        (senders([1, 2], [1, np.inf], [1, 2]), NonFiniteError),
        (senders([1, 2], [1, 2], samples=[1, 0]), SchemaError),
        ([], SchemaError),
    ):
        with pytest.raises(error):
            merge(Settings(rule=rule), 2, bad)  # type: ignore[arg-type]


def test_settings_out_of_range_are_refused() -> None:
    for settings in (
        {"hostile": 0.5},
        {"hostile": -0.1},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"rule": "krum"},
        {"over": "nobody"},
        {"rule": "median", "over": "mean_over_senders"},
    ):
        with pytest.raises(ValueError, match=r"hostile|rule|go with"):
            merge(Settings(**settings), 2, senders([1, 2]))


def test_more_devices_than_can_be_compared_are_refused_before_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "MAX_COMPARED", 3)
    for rule in ("nnm_trimmed_mean", "centred_clipping"):
        with pytest.raises(TooLargeError):
            merged(rule, senders([1], [1], [1], [1]))


@pytest.mark.parametrize("rule", ["mean", "norm_clip"])
def test_the_mean_and_norm_clipping_need_no_memory_per_device(rule: Any) -> None:
    """Every difference is made anew when it is read; a list of them would grow with their number."""
    parameters = 200_000

    def peak(devices: int) -> int:
        some = [
            Sender(id=f"{n:03}", samples=1, read=partial(np.full, parameters, 1 + n, np.float32))
            for n in range(devices)
        ]
        tracemalloc.start()
        try:
            merge(Settings(rule=rule), parameters, some)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(40) < 1.2 * peak(4)
