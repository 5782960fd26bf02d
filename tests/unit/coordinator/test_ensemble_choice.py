"""Which ensemble method a job gets, who sees which labels, and what the version says about it."""

from dataclasses import replace
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import pytest

from liberatai_coordinator.config import (
    NEED_LABELS,
    Aggregate,
    EnsembleMethod,
    JobSpec,
    StructureChoice,
    Teach,
    parse_job,
)
from liberatai_coordinator.models import aggregation, ensembles, teaching
from liberatai_coordinator.models.members import Public, derive_seed, outputs
from liberatai_coordinator.store.manifests import Ensemble
from liberatai_core.aggregator.ensemble import Evidence
from liberatai_core.aggregator.guard import divided
from liberatai_core.aggregator.methods import ENSEMBLES, LABELLED, TRIALS, method_of
from liberatai_core.aggregator.searches import MAX_TRIALS
from liberatai_core.errors import ConfigError
from liberatai_core.structure import DataContract

pytest.importorskip("torch")
from liberatai_core.learning.families import initial_weights, structure_of

DATA = DataContract(input_shape=(6,), classes=3)
CHOICES = tuple(StructureChoice(family="mlp", params={"hidden": hidden}) for hidden in (4, 8))


def job(**aggregate: Any) -> JobSpec:
    return JobSpec(name="job", data=DATA, structures=CHOICES, aggregate=Aggregate(**aggregate))


def members(*, counted: bool = True) -> Any:
    found = {}
    for seed, choice in enumerate(CHOICES):
        structure = structure_of(choice.family, choice.params, DATA)
        one = aggregation.first(job(), structure, initial_weights(structure, DATA, seed))
        found[structure.id] = replace(one, class_counts=np.array([9.0, 4.0, 1.0]) * counted)
    return found


def labelled(number: int) -> Any:
    """Labels follow the largest of three inputs, so members differ in what they get right."""
    x = np.random.default_rng(number).standard_normal((number, *DATA.input_shape)).astype(np.float32)
    return x, x[:, :3].argmax(axis=1).astype(np.int64)


def test_the_settings_know_the_methods_that_there_are() -> None:
    assert set(get_args(EnsembleMethod)) == {"auto", *ENSEMBLES}
    assert NEED_LABELS == LABELLED
    assert Aggregate().trials == TRIALS
    for trials, good in ((MAX_TRIALS, True), (MAX_TRIALS + 1, False)):
        text = f"""
            {{name: a, data: {{input_shape: [6], classes: 3}}, structures: [{{family: mlp, params: {{hidden: 4}}}}],
             aggregate: {{trials: {trials}}}}}"""
        if good:
            assert parse_job(text, "job.yaml").aggregate.trials == trials
        else:
            with pytest.raises(ConfigError):
                parse_job(text, "job.yaml")


@pytest.mark.parametrize("name", sorted(LABELLED))
def test_a_method_that_needs_labels_is_refused_without_them(name: str) -> None:
    text = f"""
        {{name: a, data: {{input_shape: [6], classes: 3}}, structures: [{{family: mlp, params: {{hidden: 4}}}}],
         aggregate: {{ensemble: {name}}}}}"""
    with pytest.raises(ConfigError) as raised:
        parse_job(text, "job.yaml")
    assert raised.value.faults == [
        f"aggregate.validation: missing ({name} finds its weights on labelled data)"
    ]


def test_without_labels_the_default_is_the_rule_that_needs_none() -> None:
    made = ensembles.combine(job(), members(), Public())
    assert made.method == "label_free"
    assert "not checked" in made.guard
    assert ensembles.combine(job(), members(counted=False), Public()).method == "uniform"


def test_a_hundred_labels_are_all_the_guards() -> None:
    """The demo's case: too few to fit weights, so the guard keeps every one of them."""
    made = ensembles.combine(job(), members(), Public(validation=labelled(100)))
    assert made.method == "label_free"
    assert "on 100 held-out labels" in made.guard
    assert "other labels" not in made.guard


def test_with_many_labels_the_default_is_stacking_and_the_guard_sees_others() -> None:
    x, y = labelled(600)
    made = ensembles.combine(job(), members(), Public(validation=(x, y)))
    fitted, judging = divided(y, derive_seed(job().seed, "labels", 0))
    assert made.method == "stacking"
    assert made.kind == "log"
    assert f"on {len(judging)} held-out labels" in made.guard
    assert f"{len(fitted)} other labels found its weights" in made.guard


def test_weights_depend_on_no_label_that_the_guard_judges_by() -> None:
    """With all labels of the guard's part turned wrong, the weights are the same to the last bit."""
    x, y = labelled(600)
    _, judging = divided(y, derive_seed(job().seed, "labels", 0))
    given = members()
    answers = outputs(given, {sid: one.view for sid, one in given.items()}, DATA, x)
    fitted = np.setdiff1d(np.arange(600), judging)
    for name in ("stacking", "random"):
        made = ensembles.combine(
            job(ensemble=name, trials=5, validation="v.npz"), given, Public(validation=(x, y))
        )
        again = method_of(name, 5)(
            Evidence(
                class_counts=np.stack([given[sid].class_counts for sid in sorted(given)]),
                balance=job().training.balance,
                log_probs=answers[:, fitted],
                y=y[fitted],
                seed=job().seed,
            )
        )
        assert np.array(made.weights).tolist() == again.weights.tolist()


@pytest.mark.parametrize("name", sorted(ENSEMBLES))
def test_a_version_keeps_what_every_method_found(name: str) -> None:
    """Written down and read back, the ensemble gives the same answers."""
    x, y = labelled(320)
    given = members()
    made = ensembles.combine(
        job(ensemble=name, trials=3, validation="v.npz"), given, Public(validation=(x, y))
    )
    assert made.method == name
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Ensemble)
    answers = outputs(given, {sid: one.view for sid, one in given.items()}, DATA, x)
    assert ensembles.answer(read, answers).tolist() == ensembles.answer(made, answers).tolist()


def test_the_guard_falls_back_where_labels_show_that_a_member_is_better() -> None:
    """One member is right by its labels, the other names a class at random: their average is worse."""
    x, _ = labelled(400)
    given = members()
    first = min(given)
    answers = outputs(given, {sid: one.view for sid, one in given.items()}, DATA, x)
    y = answers[0].argmax(axis=1).astype(np.int64)
    made = ensembles.combine(job(ensemble="majority_vote"), given, Public(validation=(x, y)))
    assert made.use == first
    assert "falling back" in made.guard
    assert ensembles.answer(made, answers).tolist() == answers[0].tolist()


TEACHING: tuple[Literal["none"], Literal["inputs"], Literal["labels"]] = ("none", "inputs", "labels")


@pytest.mark.parametrize("validated", [False, True])
def test_a_student_that_teaching_makes_worse_stays_and_the_version_says_so(validated: bool) -> None:
    """The ensemble is one member's answers; the other has all labels right and would forget them."""
    x, _ = labelled(400)
    given = members()
    good = max(given)
    answers = outputs(given, {sid: one.view for sid, one in given.items()}, DATA, x)
    y = answers[sorted(given).index(good)].argmax(axis=1).astype(np.int64)
    spec = msgspec.structs.replace(
        job(ensemble="majority_vote"), teach=Teach(steps=200, learning_rate=0.5, unlabeled="u.npz")
    )
    public = Public(unlabeled=-x[:100], validation=(x, y) if validated else None)
    made = aggregation.advance(spec, 1, given, [], public)
    if not validated:
        assert not made.untaught
        assert not np.array_equal(made.members[good].master, given[good].master)
        return
    assert good in made.untaught
    assert "100.0% before on 400 labels" in made.untaught[good]
    assert np.array_equal(made.members[good].master, given[good].master)


def taught(
    how: Literal["none", "inputs", "labels"],
    ensemble: str,
    public: Public,
    method: Literal["ensemble", "task_vectors"] = "ensemble",
) -> dict[str, bytes]:
    """Return what a teaching makes of the members."""
    teach = Teach(steps=20, unlabeled="u.npz", validation=how, method=method)
    spec = msgspec.structs.replace(job(ensemble=ensemble, validation="v.npz"), teach=teach)
    made = aggregation.advance(spec, 1, members(), [], public)
    assert not made.untaught
    return {sid: one.master.tobytes() for sid, one in made.members.items()}


@pytest.mark.parametrize("method", get_args(Teach.__annotations__["method"]))
def test_labelled_samples_teach_but_never_those_that_judge(method: Any) -> None:
    """Whatever stands in the guard's part, students learn the same; the other part teaches if it may."""
    x, y = labelled(400)
    unlabeled = -x[:60]
    _, judging = divided(y, derive_seed(job().seed, "labels", 0))
    other = x.copy()
    other[judging] = x[judging] * 0.9  # as far from it as the guard lets students be
    before = Public(unlabeled=unlabeled, validation=(x, y))
    after = Public(unlabeled=unlabeled, validation=(other, y))
    found = {how: taught(how, "stacking", before, method) for how in TEACHING}
    for how in TEACHING:
        assert taught(how, "stacking", after, method) == found[how]
    assert found["none"] != found["inputs"] != found["labels"] != found["none"]


def test_labels_that_all_judge_teach_nothing() -> None:
    """A method that looks at no labels leaves them all to the guard."""
    x, y = labelled(400)
    public = Public(unlabeled=-x[:60], validation=(x, y))
    assert taught("none", "uniform", public) == taught("inputs", "uniform", public)
    assert taught("none", "uniform", public) == taught("labels", "uniform", public)


def test_only_labels_themselves_teach_what_they_say() -> None:
    """Wrong labels change what is learned if labels teach; inputs alone teach what the ensemble says."""
    x, y = labelled(400)
    right = Public(unlabeled=-x[:60], validation=(x, y))
    spec = job(ensemble="stacking", validation="v.npz")
    lesson = teaching.lesson_of(spec, "stacking", -x[:60], right.validation)
    said = outputs(members(), {sid: one.view for sid, one in members().items()}, DATA, lesson.x)[0]
    inputs, labels = (
        teaching.with_labels(msgspec.structs.replace(spec, teach=Teach(validation=how)), lesson, said)
        for how in ("inputs", "labels")
    )
    assert inputs is said
    assert np.array_equal(labels[:60], said[:60])
    known = np.exp(labels[60:])
    assert known.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert (known[np.arange(len(lesson.y)), lesson.y] >= teaching.LABEL_SHARE - 1e-6).all()
    assert np.array_equal(x[divided(y, derive_seed(spec.seed, "labels", 0))[0]], lesson.x[60:])
    assert lesson.copies.tolist() == [4] * 60 + [4] * len(lesson.y)


def test_structures_can_teach_apart() -> None:
    """Another student comes of it, the same every time."""
    x, y = labelled(400)
    public = Public(unlabeled=-x[:60], validation=(x, y))
    together, apart, again = (
        taught("inputs", "stacking", public, method)
        for method in ("ensemble", "task_vectors", "task_vectors")
    )
    assert all(together[sid] != apart[sid] for sid in together)
    assert apart == again
