"""What an update of a device says, and whether it can mean anything."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models.members import trained_part
from liberatai_core.contract.frame import HEADER_BYTES
from liberatai_core.contract.messages import Update, work_seed
from liberatai_core.errors import CodecError, NormError, SchemaError
from liberatai_core.sparsifier import methods
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector

LARGEST = 1e3
"""No training moves a parameter so far in one round; beyond it float32 sums lose what others sent."""


def decode_update(frame: bytes) -> Update:
    """Return the update in a frame that was verified before it was stored."""
    return msgspec.msgpack.decode(frame[HEADER_BYTES:], type=Update)


def changes(job: JobSpec, update: Update, part: Structure) -> tuple[NDArray[np.int64], Vector]:
    """Return what an update changes in the trained part of its structure: positions (increasing) and values.

    Raises:
        LiberataiError: for every stream that no device writes.
    """
    methods.require_stream(job.sparsify.method, update.body)
    seed = work_seed(job.seed, update.device, update.job, update.round)
    return methods.entries(update.body, part, seed)


def difference(job: JobSpec, update: Update, part: Structure) -> Vector:
    """Return the same as a vector, shape (part.parameters,).

    Raises:
        LiberataiError: for every stream that no device writes.
    """
    dense = np.zeros(part.parameters, np.float32)
    positions, values = changes(job, update, part)
    dense[positions] = values
    return dense


def check_update(update: Update, structure: Structure, job: JobSpec) -> None:
    """Refuse an update that means nothing in its structure.

    Raises:
        CodecError: another method than the task's, or a stream that it does not make.
        LiberataiError: whatever the decoder refuses (positions, counts, values).
        SchemaError: class counts of another number of classes, or more than the samples.
    """
    if update.codec != job.sparsify.method:
        raise CodecError(f"made by {update.codec}, the task named {job.sparsify.method}")
    _, values = changes(job, update, trained_part(job, structure).part)
    if np.abs(values).max(initial=0) > LARGEST:
        raise NormError(f"a parameter changes by more than {LARGEST:g}")
    counts = update.class_counts
    if counts is not None and len(counts) != job.data.classes:
        raise SchemaError(f"{len(counts)} class counts, the job has {job.data.classes} classes")
    if counts is not None and sum(counts) > update.samples:
        raise SchemaError(f"class counts of {sum(counts)} samples, the update has {update.samples}")
    if update.evaluation is not None and update.evaluation[0] > update.evaluation[1]:
        raise SchemaError("more correct answers than questions")
