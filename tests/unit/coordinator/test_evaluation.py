"""Sums of what devices tell add up, no device outweighs the others, and labels that found weights do not judge."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from liberatai_coordinator.api.present import central_view, local_view
from liberatai_coordinator.client.views import RoundView, newest
from liberatai_coordinator.models import evaluation
from liberatai_coordinator.models.evaluation import (
    MAX_PROFILES,
    MIN_TOTAL,
    Score,
    Told,
    central,
    guard_rows,
    local,
    score,
    worst,
)
from liberatai_core.aggregator.guard import divided
from liberatai_core.contract.limits import MAX_SAMPLES
from liberatai_core.errors import SchemaError


def told(name: str, correct: int, total: int, structure: str = "mlp", profile: str = "pi") -> Told:
    return Told(device=name, structure=structure, profile=profile, correct=correct, total=total)


@some.composite
def fleets(draw: some.DrawFn) -> list[Told]:
    """Some devices with counts that may be, however large."""
    found = []
    for place in range(draw(some.integers(1, 30))):
        total = draw(some.one_of(some.integers(0, 40), some.integers(0, MAX_SAMPLES)))
        found.append(
            told(
                f"dev-{place}",
                draw(some.integers(0, total)),
                total,
                draw(some.sampled_from(["mlp", "cnn", "ds_cnn"])),
                draw(some.sampled_from(["", "pi", "nuc"])),
            )
        )
    return found


# --- the devices' own hold-outs ------------------------------------------------------------------------


@given(fleets())
def test_sums_of_structures_and_of_profiles_are_the_sums_of_all(fleet: list[Told]) -> None:
    found = local(3, fleet)
    if found is None:
        assert sum(one.total for one in fleet) == 0
        return
    expected = (
        sum(one.correct for one in fleet),
        sum(one.total for one in fleet),
        sum(one.total > 0 for one in fleet),
    )
    assert found.version == 3
    for groups in ([found.all], found.structures.values(), found.profiles.values()):
        sums = [(one.correct, one.total, one.devices) for one in groups]
        assert tuple(map(sum, zip(*sums, strict=True))) == expected


@given(fleets())
def test_a_figure_lies_between_the_worst_and_the_best_device_and_needs_no_order(fleet: list[Told]) -> None:
    shares = [one.correct / one.total for one in fleet if one.total]
    found = score(fleet)
    if not shares:
        assert found == Score()
        return
    assert found.accuracy is not None
    assert min(shares) - 1e-12 <= found.accuracy <= max(shares) + 1e-12
    assert score(fleet[::-1]).accuracy == pytest.approx(found.accuracy, abs=1e-12)


@given(fleets(), some.data())
def test_one_device_moves_a_figure_by_two_nth_at_most_whatever_it_claims(
    fleet: list[Told], data: some.DataObject
) -> None:
    fleet = [one for one in fleet if one.total]
    if not fleet:
        return
    total = data.draw(some.integers(1, MAX_SAMPLES))
    before = score([*fleet, told("liar", 0, total)]).accuracy
    after = score([*fleet, told("liar", total, total)]).accuracy
    assert before is not None
    assert after is not None
    assert 0 <= after - before <= 2 / (len(fleet) + 1) + 1e-12


def test_devices_count_by_what_they_held_out_up_to_the_lower_median() -> None:
    fleet = [told("a", 2, 4), told("b", 8, 8), told("c", 0, 1000)]
    # The lower median is 8: weights 4, 8, 8.
    assert score(fleet) == Score(accuracy=(2 + 8 + 0) / 20, correct=10, total=1012, devices=3)
    # Of two, the smaller one sets the cap: the larger claim gets half.
    assert score([told("a", 6, 6), told("c", 0, 1_000_000)]).accuracy == 0.5


def test_a_fleet_that_holds_nothing_out_has_no_figure() -> None:
    assert local(1, []) is None
    assert local(1, [told("a", 0, 0)]) is None


def test_a_device_that_held_nothing_out_is_in_no_group() -> None:
    found = local(1, [told("a", 3, 4), told("b", 0, 0, structure="cnn", profile="nuc")])
    assert found is not None
    assert set(found.structures) == {"mlp"}
    assert set(found.profiles) == {"pi"}
    assert found.all.devices == 1


@pytest.mark.parametrize(("correct", "total"), [(5, 4), (-1, 4), (0, -1)])
def test_counts_that_cannot_be_are_refused(correct: int, total: int) -> None:
    with pytest.raises(SchemaError, match="a has"):
        score([told("a", correct, total)])


def test_a_device_counts_once() -> None:
    with pytest.raises(SchemaError, match="twice"):
        local(1, [told("a", 1, 4), told("a", 1, 4)])


def test_devices_without_a_profile_are_a_group_of_their_own() -> None:
    found = local(1, [told("a", 1, 4, profile=""), told("b", 4, 4)])
    assert found is not None
    assert found.profiles[evaluation.NO_PROFILE].accuracy == 0.25


def test_invented_profiles_do_not_make_a_round_large() -> None:
    fleet = [told(f"liar-{n}", 1, 4, profile=f"invented-{n}") for n in range(1000)]
    fleet += [told(f"dev-{n}", 4, 4, profile="pi") for n in range(5)]
    found = local(1, fleet)
    assert found is not None
    assert len(found.profiles) == MAX_PROFILES
    assert found.profiles["pi"] == Score(accuracy=1.0, correct=20, total=20, devices=5)
    assert found.profiles[evaluation.OTHER_PROFILES].devices == 1000 - (MAX_PROFILES - 2)


# --- the worst tenth -----------------------------------------------------------------------------------


def test_the_worst_tenth_is_one_device_at_least_and_every_device_counts_alike() -> None:
    fleet = [told(f"dev-{n}", n, 20) for n in range(1, 21)]
    found = worst(fleet)
    assert found is not None
    assert (found.devices, found.of) == (2, 20)
    assert found.accuracy == pytest.approx((1 / 20 + 2 / 20) / 2)
    only = worst([told("a", 5, 10)])
    assert only is not None
    assert (only.accuracy, only.devices, only.of) == (0.5, 1, 1)
    eleven = worst(fleet[:11])
    assert eleven is not None
    assert eleven.devices == 2


def test_a_device_with_few_questions_is_not_among_the_worst() -> None:
    few, enough = told("few", 0, MIN_TOTAL - 1), told("enough", 9, MIN_TOTAL)
    found = worst([few, enough])
    assert found is not None
    assert (found.accuracy, found.of) == (0.9, 1)
    assert worst([few]) is None


# --- the coordinator's labels --------------------------------------------------------------------------


def test_labels_that_found_the_weights_do_not_judge_them() -> None:
    y = np.repeat(np.arange(4), 30)
    fitted, judges = divided(y, 7)
    assert guard_rows(y, "stacking", 7).tolist() == judges.tolist()
    assert not set(fitted.tolist()) & set(guard_rows(y, "tpe", 7).tolist())
    assert guard_rows(y, "label_free", 7).tolist() == list(range(120))


def test_every_structure_and_the_version_as_a_whole_are_scored() -> None:
    y = np.array([0, 1, 1, 0])
    right, wrong = np.log([[0.9, 0.1], [0.1, 0.9]])[y], np.log([[0.1, 0.9], [0.9, 0.1]])[y]
    half = np.concatenate([right[:2], wrong[2:]])
    found = central(5, ["cnn", "mlp"], np.stack([half, wrong]), right, y)
    assert found is not None
    assert (found.version, found.samples) == (5, 4)
    assert found.structures == {"cnn": 0.5, "mlp": 0.0}
    assert found.ensemble == 1.0
    with pytest.raises(SchemaError):
        central(5, ["cnn"], np.stack([half, wrong]), right, y)
    with pytest.raises(SchemaError):
        central(5, ["cnn", "mlp"], np.stack([half, wrong]), right, y[:2])
    none = np.zeros(0, dtype=np.int64)
    assert central(5, ["cnn", "mlp"], np.stack([half, wrong])[:, :0], right[:0], none) is None


def test_the_newest_figures_may_come_from_different_rounds() -> None:
    answers = [local(0, [told("a", 1, 4)]), local(1, [told("a", 2, 4)])]
    first, second = [local_view(one) for one in answers if one]
    by_labels = central(2, ["mlp"], np.zeros((1, 2, 2)), np.zeros((2, 2)), np.array([0, 1]))
    assert by_labels is not None
    scored = central_view(by_labels)
    rounds = [
        RoundView(round=1, state="published", invited=1, updates=1, local=first, central=scored),
        RoundView(round=2, state="published", invited=1, updates=1, local=second),
        RoundView(round=3, state="open", invited=1, updates=0),
    ]
    assert newest(rounds) == (second, scored, None)
    assert newest([]) == (None, None, None)
