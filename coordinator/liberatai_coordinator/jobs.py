"""What follows from a job's file: its structures, what tasks say, and the coordinator's own samples."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator import plan
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.members import Floats, Public, trained_part, trained_share
from liberatai_core.compressor.codebook import smallest_bytes
from liberatai_core.contract.messages import TaskSpec
from liberatai_core.errors import DataError, StructureError
from liberatai_core.learning.dataset import load_npz, load_unlabeled
from liberatai_core.learning.families import cost, statistics_of, structure_of
from liberatai_core.structure import Structure

Labelled = tuple[Floats, NDArray[np.int64]]
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
                density=choice.density or job.sparsify.up_density,
                parameters=structure.parameters,
                trained=trained_part(job, structure).part.parameters,
                smallest_bytes=smallest_bytes(structure),
                macs=price.macs_per_sample,
                activation_bytes=price.activation_bytes_per_sample,
                down_density=choice.density or job.down_density,
            )
        )
    return candidates, structures


def load_public(job: JobSpec, base_dir: Path) -> Public:
    """Return the coordinator's own data.

    Raises:
        DataError: a file is missing or not of the job's form.
    """
    unlabeled = load_unlabeled(base_dir / job.teach.unlabeled, job.data) if job.teach.unlabeled else None
    validation = None
    if job.aggregate.validation:
        samples = load_npz(base_dir / job.aggregate.validation, job.data)
        if samples.y is None:
            raise DataError(f"{job.aggregate.validation}: validation data needs labels `y`")
        validation = (samples.x, samples.y)
    return Public(unlabeled=unlabeled, validation=validation)


def load_test(job: JobSpec, base_dir: Path) -> Labelled | None:
    """Return what versions are tested on: the part that the file marks as test samples, or all of it.

    Raises:
        DataError: the file is missing, not of the job's form, or has no labels.
    """
    if job.evaluate.test is None:
        return None
    samples = load_npz(base_dir / job.evaluate.test, job.data)
    if samples.y is None:
        raise DataError(f"{job.evaluate.test}: test data needs labels `y`")
    if samples.test is None or not samples.test.any():
        return samples.x, samples.y
    return samples.x[samples.test], samples.y[samples.test]
