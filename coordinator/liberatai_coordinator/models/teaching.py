"""Teaching: what the ensemble of a version knows goes back into every structure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models.ensembles import answer, ensemble_of
from liberatai_coordinator.models.members import (
    Floats,
    Labelled,
    Labels,
    Member,
    Public,
    derive_seed,
    outputs,
    trained_part,
)
from liberatai_coordinator.models.teachers import Said, Teacher, ask
from liberatai_coordinator.store.manifests import Ensemble
from liberatai_core.aggregator.ensemble import accuracy
from liberatai_core.aggregator.guard import divided, guard
from liberatai_core.aggregator.methods import LABELLED
from liberatai_core.learning.distillation import DistillSettings, distill, usual_copies, usual_steps
from liberatai_core.learning.task_vectors import integrate
from liberatai_core.learning.training import log_probabilities
from liberatai_core.weights import Vector

LABEL_SHARE = 0.5
"""How much a label counts beside what the ensemble says, where labels teach."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What a round's teaching shows.

    Attributes:
        x: inputs, shape (n, *input_shape).
        y: labels of the last of them, shape (m,), m <= n.
        copies: changed ones of each, shape (n,).
        fitted: labelled samples that found the ensemble's weights; None if none did.
        judging: labelled samples that teach nothing; None if there are none. They find nothing either, unless
            no labelled sample teaches and the ensemble does.
    """

    x: Floats
    y: Labels
    copies: NDArray[np.int64]
    fitted: Labelled | None
    judging: Labelled | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Taught:
    """What a teaching made.

    Attributes:
        members: after it.
        untaught: per structure that it made worse and that stays as it was, by how much.
        teachers: who taught, in words; empty if nobody did.
    """

    members: Mapping[str, Member]
    untaught: Mapping[str, str] = field(default_factory=dict)
    teachers: str = ""


def teach(
    job: JobSpec,
    number: int,
    members: Mapping[str, Member],
    public: Public,
    teachers: Sequence[Teacher] = (),
) -> Taught:
    """Distil what all know into every structure (FedDF, arXiv:2006.07242).

    The guarded ensemble of the merged states teaches, or the devices' own models together
    (`models.teachers`). With `teach.method: task_vectors` every structure teaches apart
    (`learning.task_vectors`).

    A student that knows fewer of the coordinator's labels than before, beyond chance, stays as it was:
    unlabeled samples of another kind can teach nonsense.

    Args:
        job: settings.
        number: of the round.
        members: the merged states.
        public: what the coordinator itself has.
        teachers: the models of the round's devices.
    """
    if public.unlabeled is None or number % job.teach.every:
        return Taught(members=members)
    masters = {sid: member.master for sid, member in members.items()}
    teacher = ensemble_of(job, members, masters, public)
    lesson = lesson_of(job, teacher.method, public.unlabeled, public.validation)
    devices = _devices(job, number, members, teachers, teacher, lesson)
    if devices.log_probs is not None:
        told = devices.log_probs[None]
    else:
        answers = outputs(members, masters, job.data, lesson.x)
        told = answers if job.teach.method == "task_vectors" else answer(teacher, answers)[None]
    said = np.stack([with_labels(job, lesson, one) for one in told])
    taught, untaught = {}, {}
    for sid, member in members.items():
        master = _student(job, member, lesson, said, derive_seed(job.seed, f"teach|{sid}", number))
        worse = _worse(job, member, master, lesson.judging)
        taught[sid] = member if worse else replace(member, master=master)
        if worse:
            untaught[sid] = worse
    return Taught(members=taught, untaught=untaught, teachers=devices.why)


def _devices(
    job: JobSpec,
    number: int,
    members: Mapping[str, Member],
    teachers: Sequence[Teacher],
    ensemble: Ensemble,
    lesson: Lesson,
) -> Said:
    """Return what the devices' models say about a lesson, if they are to teach."""
    if job.teach.teachers == "ensemble" or job.teach.method == "task_vectors":
        return Said(log_probs=None, why="")
    structures = None
    if lesson.judging is not None:
        masters = {sid: member.master for sid, member in members.items()}
        structures = answer(ensemble, outputs(members, masters, job.data, lesson.judging[0]))
    return ask(job, number, teachers, lesson.x, lesson.fitted, lesson.judging, structures)


def _student(job: JobSpec, member: Member, lesson: Lesson, said: Floats, seed: int) -> Vector:
    """Return a structure's weights after a lesson by these teachers, shape (teachers, n, classes)."""
    structure, gain = member.structure, trained_part(job, member.structure).gain
    settings = _settings(job, len(lesson.copies) + int(lesson.copies.sum()))
    if job.teach.method == "ensemble":
        return distill(
            structure,
            job.data,
            member.master,
            lesson.x,
            said[0],
            settings,
            seed,
            gain=gain,
            copies=lesson.copies,
        )
    return integrate(
        structure,
        job.data,
        member.master,
        lesson.x,
        said,
        settings,
        seed,
        labelled=lesson.fitted,
        gain=gain,
        copies=lesson.copies,
    ).weights


def lesson_of(job: JobSpec, method: str, unlabeled: Floats, validation: Labelled | None) -> Lesson:
    """Return the unlabeled samples, and those labelled ones that found the ensemble's weights.

    Both get as many copies as suit their number: the few labelled samples are shown more often.

    Args:
        job: settings.
        method: by which the ensemble's weights were found.
        unlabeled: inputs of the coordinator.
        validation: labelled samples of the coordinator.
    """
    shown, y = [unlabeled], np.zeros(0, dtype=np.int64)
    fitted, judging = None, validation
    if validation is not None and method in LABELLED:
        known, labels = validation
        finding, rest = divided(labels, derive_seed(job.seed, "labels", 0))
        fitted, judging = (known[finding], labels[finding]), (known[rest], labels[rest])
        if job.teach.validation != "none":
            shown.append(fitted[0])
            y = fitted[1]
        elif job.teach.method == "ensemble":
            judging = validation  # all of them: students have nothing from a label but the teacher's weights
    given = job.teach.copies
    return Lesson(
        x=np.concatenate(shown),
        y=y,
        copies=np.repeat(
            [usual_copies(len(one)) if given is None else given for one in shown], [len(one) for one in shown]
        ),
        fitted=fitted,
        judging=judging,
    )


def with_labels(job: JobSpec, lesson: Lesson, said: Floats) -> Floats:
    """Return what the ensemble says about a lesson, and what the labels say where they are to count."""
    if job.teach.validation != "labels" or not len(lesson.y):
        return said
    known = len(said) - len(lesson.y)
    truth = np.eye(job.data.classes)[lesson.y]
    both = (1 - LABEL_SHARE) * np.exp(said[known:], dtype=np.float64) + LABEL_SHARE * truth
    return np.concatenate([said[:known], np.log(both + np.finfo(np.float32).tiny).astype(np.float32)])


def _worse(job: JobSpec, member: Member, taught: Vector, judging: Labelled | None) -> str:
    """Return how a taught state compares with the merged one if the labels show that it is worse, or ""."""
    if judging is None:
        return ""
    x, y = judging
    after, before = (
        log_probabilities(member.structure, job.data, weights, x) for weights in (taught, member.master)
    )
    if guard(after, before[None], y).use == "ensemble":
        return ""
    return f"{accuracy(after, y):.1%} after it, {accuracy(before, y):.1%} before on {len(y)} labels"


def _settings(job: JobSpec, shown: int) -> DistillSettings:
    """Return the settings of a teaching that shows so many samples, copies among them."""
    given = {name: getattr(job.teach, name) for name in DistillSettings.__struct_fields__}
    given["copies"] = given["copies"] or 0
    if given["steps"] is None:
        given["steps"] = usual_steps(shown, given["batch_size"])
    return DistillSettings(**given)
