"""What a job trains of each structure, and how dense its deltas are, if it says so and if it does not."""

import pytest

from liberatai_coordinator.config import (
    DOWN_TO_ALL,
    DOWN_TO_SOME,
    Aggregate,
    JobSpec,
    Rounds,
    Sparsify,
    StructureChoice,
    Teach,
)
from liberatai_coordinator.models.members import trained_part, trained_share
from liberatai_core.learning.families import structure_of
from liberatai_core.structure import DataContract

DATA = DataContract(input_shape=(1, 8, 8), classes=10)
BIG = structure_of("mlp", {"hidden": 512, "layers": 2}, DATA)
TINY = structure_of("mlp", {"hidden": 8}, DATA)


def job(**changes: object) -> JobSpec:
    structures = (
        StructureChoice(family="mlp", params={"hidden": 512}),
        StructureChoice(family="mlp", params={"hidden": 512, "layers": 2}, density=0.3, trained_share=0.5),
    )
    return JobSpec(**({"name": "j", "data": DATA, "structures": structures} | changes))  # type: ignore[arg-type]


def test_of_several_choices_that_fit_the_most_exact_one_counts() -> None:
    chosen = job().choice("mlp", {"hidden": 512, "layers": 2})
    assert chosen is not None
    assert chosen.density == 0.3
    assert job().choice("cnn", {"width": 8}) is None


def test_the_structure_says_before_the_job_and_the_job_before_the_rule() -> None:
    assert trained_share(job(), BIG) == 0.5
    other = structure_of("mlp", {"hidden": 256, "layers": 2}, DATA)
    assert trained_share(job(sparsify=Sparsify(trained_share=0.7)), other) == 0.7
    assert 0.1 < trained_share(job(), other) < 1


def test_small_structures_and_baselines_without_feedback_are_trained_whole() -> None:
    assert trained_part(job(), TINY).gain is None
    other = structure_of("mlp", {"hidden": 256, "layers": 2}, DATA)
    for method in ("dense", "quantile", "ternary_no_feedback"):
        assert trained_share(job(sparsify=Sparsify(method=method)), other) == 1


def test_two_structures_of_a_job_draw_their_parts_apart_and_again_the_same() -> None:
    one, again = trained_part(job(), BIG), trained_part(job(), BIG)
    assert (one.positions == again.positions).all()
    assert (trained_part(job(seed=1), BIG).positions != one.positions).any()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, DOWN_TO_ALL),
        ({"rounds": Rounds(target=5)}, DOWN_TO_SOME),
        ({"rounds": Rounds(target=5), "sparsify": Sparsify(down_density=0.4)}, 0.4),
    ],
)
def test_deltas_are_denser_where_everybody_fetches_each(changes: dict[str, object], wanted: float) -> None:
    assert job(**changes).down_density == wanted


def test_a_job_says_what_it_goes_without() -> None:
    no_teaching, no_check = job().lacks
    assert no_teaching.startswith("teach.unlabeled: ")
    assert no_check.startswith("aggregate.validation: ")
    fed = job(teach=Teach(unlabeled="u.npz"), aggregate=Aggregate(validation="v.npz"))
    assert fed.lacks == ()
    assert job(structures=job().structures[:1]).lacks == ()  # no ensemble, and nobody to learn from
