"""What follows from a job's file: its structures, what tasks say, and the coordinator's own samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet import plan
from liberatai_coordinator.models.members import Floats, Labelled, Public, trained_part, trained_share
from liberatai_core.compressor.codebook import smallest_bytes
from liberatai_core.contract.messages import TaskSpec
from liberatai_core.errors import ConfigError, DataError, LiberataiError, StructureError
from liberatai_core.learning.dataset import load_npz, load_unlabeled
from liberatai_core.learning.families import cost, statistics_of, structure_of
from liberatai_core.structure import Structure, trains_head

"""Inputs, shape (n, …), and labels, shape (n,)."""


def spec_of(job: JobSpec, structure: Structure) -> TaskSpec:
    """Return what all tasks of a job say about one structure."""
    return TaskSpec(
        job=job.name,
        structure=structure,
        data=job.data,
        codec=job.sparsify.method,
        training=job.training,
        seed=job.seed,
        deadline_s=job.rounds.deadline_s,
        share_class_counts=job.share_class_counts,
        trained_share=trained_share(job, structure),
        residual_decay=job.sparsify.residual_decay,
        residual_limit=job.sparsify.residual_limit,
    )


def candidates_of(job: JobSpec) -> tuple[list[plan.Candidate], dict[str, Structure]]:
    """Return what the plan must know of the job's structures, and the structures. Builds each one once.

    Raises:
        StructureError: a family or its parameters are wrong, or a structure has running statistics: those of
            unlike devices have no mean that fits any of them.
    """
    candidates, structures = [], {}
    for choice in job.structures:
        structure = structure_of(choice.family, choice.params, job.data)
        if statistics_of(structure):
            raise StructureError(f"{structure.id}: running statistics do not federate: use norm: group")
        price = cost(structure, job.data)
        structures[structure.id] = structure
        candidates.append(
            plan.Candidate(
                id=structure.id,
                family=structure.family,
                density=choice.density_or(job.sparsify.up_density),
                parameters=structure.parameters,
                trained=trained_part(job, structure).part.parameters,
                smallest_bytes=smallest_bytes(structure),
                macs=price.macs_per_sample,
                activation_bytes=price.activation_bytes_per_sample,
                down_density=choice.density_or(job.down_density),
                head=trains_head(structure),
            )
        )
    return candidates, structures


def check(job: JobSpec, base_dir: Path) -> None:
    """Look at everything that a job's file names.

    Args:
        job: settings.
        base_dir: folder of the job's file: its paths are relative to it.

    Raises:
        StructureError, DataError: one thing is wrong.
        ConfigError: several are, one line each, or one file has two uses.
    """
    found: list[LiberataiError] = []
    for look in (
        lambda: candidates_of(job),
        lambda: _unlabeled(job, base_dir),
        lambda: _validation(job, base_dir),
        lambda: load_test(job, base_dir),
        lambda: _require_apart(job, base_dir),
    ):
        try:
            look()
        except LiberataiError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigError("job", [fault for error in found for fault in _faults(error)])


def _faults(error: LiberataiError) -> list[str]:
    return error.faults if isinstance(error, ConfigError) else [f"{error.code}: {error}"]


def _require_apart(job: JobSpec, base_dir: Path) -> None:
    """Raise ConfigError if one file has two uses, under whatever name."""
    named = {
        "evaluate.test": job.evaluate.test,
        "aggregate.validation": job.aggregate.validation,
        "teach.unlabeled": job.teach.unlabeled,
    }
    real = {key: (base_dir / path).resolve() for key, path in named.items() if path is not None}
    reasons = {"evaluate.test": "what decides or teaches cannot test"}
    faults = [
        f"{first}: the same file as {second}: {reasons.get(first, 'what teaches cannot judge')}"
        for first, second in combinations(real, 2)
        if real[first] == real[second]
    ]
    if faults:
        raise ConfigError("job", faults)


@contextmanager
def _of(key: str) -> Iterator[None]:
    """Say in errors which key of the job named the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def load_public(job: JobSpec, base_dir: Path) -> Public:
    """Return the coordinator's own data.

    Raises:
        DataError: a file is missing or not of the job's form.
    """
    return Public(unlabeled=_unlabeled(job, base_dir), validation=_validation(job, base_dir))


def _unlabeled(job: JobSpec, base_dir: Path) -> Floats | None:
    with _of("teach.unlabeled"):
        return load_unlabeled(base_dir / job.teach.unlabeled, job.data) if job.teach.unlabeled else None


def _validation(job: JobSpec, base_dir: Path) -> Labelled | None:
    """Return the labelled samples but those that the file marks as test samples."""
    if not job.aggregate.validation:
        return None
    with _of("aggregate.validation"):
        samples = load_npz(base_dir / job.aggregate.validation, job.data)
        if samples.y is None:
            raise DataError(f"{job.aggregate.validation}: validation data needs labels `y`")
    rest = slice(None) if samples.test is None or samples.test.all() else ~samples.test
    return samples.x[rest], samples.y[rest]


def load_test(job: JobSpec, base_dir: Path) -> Labelled | None:
    """Return what versions are tested on: the part that the file marks as test samples, or all of it.

    Raises:
        DataError: the file is missing, not of the job's form, or has no labels.
    """
    if job.evaluate.test is None:
        return None
    with _of("evaluate.test"):
        samples = load_npz(base_dir / job.evaluate.test, job.data)
        if samples.y is None:
            raise DataError(f"{job.evaluate.test}: test data needs labels `y`")
    if samples.test is None or not samples.test.any():
        return samples.x, samples.y
    return samples.x[samples.test], samples.y[samples.test]
