"""Facts about warm-up and staleness."""

import pytest

from liberatai_core.sparsifier.schedule import decay, density_at


def test_warm_up_falls_geometrically_from_factor_times_density_to_density() -> None:
    densities = [density_at(number, 100, 0.01, 4, 16.0) for number in range(1, 8)]
    assert densities == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01, 0.01, 0.01])
    assert densities[4:] == [0.01, 0.01, 0.01]


def test_without_warm_up_every_round_has_the_density() -> None:
    assert [density_at(number, 5, 0.3, 0, 4.0) for number in range(1, 6)] == [0.3] * 5
    assert density_at(1, 5, 0.3, 3, 1.0) == 0.3


def test_warm_up_never_sends_more_than_everything() -> None:
    assert density_at(1, 10, 0.5, 5, 1000.0) == 1.0


def test_a_warm_up_longer_than_the_job_ends_with_it() -> None:
    assert density_at(2, 2, 0.01, 100, 4.0) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "bad", [(0, 5, 0.1, 1, 4.0), (1, 0, 0.1, 1, 4.0), (1, 5, 0.0, 1, 4.0), (1, 5, 1.1, 1, 4.0),
            (1, 5, 0.1, -1, 4.0), (1, 5, 0.1, 1, 0.5), (1, 5, 0.1, 1, float("nan"))]
)  # fmt: skip
def test_a_schedule_out_of_range_is_refused(bad: tuple[int, int, float, int, float]) -> None:
    with pytest.raises(ValueError):
        density_at(*bad)


def test_a_residual_loses_rho_per_round_away_and_all_of_it_beyond_the_limit() -> None:
    assert [decay(away, 0.5, 3) for away in range(6)] == [1.0, 0.5, 0.25, 0.125, 0.0, 0.0]


def test_rho_one_keeps_everything_up_to_the_limit_and_rho_zero_only_the_round_before() -> None:
    assert [decay(away, 1.0, 10) for away in (0, 10, 11)] == [1.0, 1.0, 0.0]
    assert [decay(away, 0.0, 10) for away in (0, 1)] == [1.0, 0.0]


@pytest.mark.parametrize("bad", [(-1, 0.5, 3), (1, -0.1, 3), (1, 1.1, 3), (1, float("nan"), 3), (1, 0.5, -1)])
def test_a_decay_out_of_range_is_refused(bad: tuple[int, float, int]) -> None:
    with pytest.raises(ValueError):
        decay(*bad)
