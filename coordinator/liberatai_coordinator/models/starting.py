"""What a job's structures begin from, if it goes on from a commit.

The same structure begins with exactly these weights, a smaller member of its family with a slice of them, any
other one is taught what the commit answers, on unlabeled inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models import aggregation
from liberatai_coordinator.models.ensembles import answer
from liberatai_coordinator.models.members import Floats, Public, derive_seed
from liberatai_coordinator.repository import tensors
from liberatai_coordinator.repository.commits import Commit
from liberatai_coordinator.repository.names import short
from liberatai_coordinator.repository.store import Loaded, Store
from liberatai_core.errors import ConfigError, DataError, StructureError
from liberatai_core.learning.distillation import DistillSettings, distill, usual_copies
from liberatai_core.learning.families import initial_weights, sliced
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

STEPS: Final = 1500
"""Of teaching a structure that begins from nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """Where a job begins.

    Attributes:
        commit: digest.
        weights: structure id -> float32, shape (parameters,).
        ways: structure id -> how it came to them, in words.
    """

    commit: str
    weights: Mapping[str, Vector]
    ways: Mapping[str, str]


def check(store: Store, job: JobSpec, structures: Mapping[str, Structure]) -> Loaded:
    """Return the commit that a job starts from.

    Raises:
        NotFoundError, SchemaError, SignatureError: there is none that is trusted.
        DataError: it is for other data.
        ConfigError: a structure of the job is unlike all of it, and there are no unlabeled inputs.
    """
    loaded = store.read(store.find(str(job.start)))
    told = loaded.commit.data
    if told is not None and told != job.data:
        raise DataError(
            f"start: {job.start} is for samples {told.input_shape} and {told.classes} classes, the job for "
            f"{job.data.input_shape} and {job.data.classes}"
        )
    whole = [one for one in loaded.commit.variants if one.weights and not one.budget]
    known = [one.structure for one in whole if one.structure is not None]
    if not known:
        raise StructureError(f"start: {job.start} has no weights that can be trained")
    unlike = [sid for sid, wanted in structures.items() if _way(wanted, known) == "taught"]
    if unlike and job.teach.unlabeled is None:
        fault = f"{job.start} has nothing like {', '.join(unlike)}: give teach.unlabeled, and it is taught"
        raise ConfigError("start", [fault])
    return loaded


def _way(wanted: Structure, known: list[Structure]) -> str:
    if wanted in known:
        return "the same structure"
    if any(_may_be_cut(one, wanted) for one in known):
        return "a slice"
    return "taught"


def _may_be_cut(large: Structure, small: Structure) -> bool:
    if large.family != small.family or large.parameters < small.parameters:
        return False
    try:
        sliced(np.zeros(large.parameters, np.float32), large, small)
    except StructureError:
        return False
    return True


def begin(store: Store, job: JobSpec, structures: Mapping[str, Structure], public: Public) -> Start:
    """Return the weights that a job's structures begin with; byte-identical for equal arguments.

    Raises:
        ConfigError, DataError, NotFoundError, StructureError: see `check`.
    """
    loaded = check(store, job, structures)
    members = tensors.members(store, loaded.commit)
    known = [structure for structure, _ in members.values()]
    weights: dict[str, Vector] = {}
    ways: dict[str, str] = {}
    said: Floats | None = None
    for sid, wanted in sorted(structures.items()):
        ways[sid] = _way(wanted, known)
        if ways[sid] == "the same structure":
            weights[sid] = next(values for structure, values in members.values() if structure == wanted)
        elif ways[sid] == "a slice":
            large, values = min(
                ((shape, values) for shape, values in members.values() if _may_be_cut(shape, wanted)),
                key=lambda pair: pair[0].parameters,
            )
            weights[sid] = sliced(values, large, wanted)
        else:
            if public.unlabeled is None:
                raise ConfigError("start", [f"{sid} is taught: give teach.unlabeled"])
            if said is None:
                said = _answers(loaded.commit, members, job.data, public.unlabeled)
            weights[sid] = _taught(wanted, job, public.unlabeled, said)
    _share(job, structures, weights)
    told = {sid: f"{way} by {short(loaded.digest)}" for sid, way in ways.items()}
    return Start(commit=loaded.digest, weights=weights, ways=told)


def _share(job: JobSpec, structures: Mapping[str, Structure], weights: dict[str, Vector]) -> None:
    """Let members of a group that share coordinates begin with the same values, those of the largest."""
    for group in aggregation.groups(job, structures.values()):
        large = weights[group.largest]
        for sid, places in list(group.places.items())[1:]:
            shared = places < large.size
            weights[sid] = weights[sid].copy()
            weights[sid][shared] = large[places[shared]]


def _answers(commit: Commit, members: Mapping[str, tensors.Member], data: DataContract, x: Floats) -> Floats:
    """Return what a commit answers: its ensemble, else its largest structure."""
    ensemble = commit.ensemble
    if ensemble is not None and ensemble.members and set(ensemble.members) <= members.keys():
        said = [log_probabilities(members[sid][0], data, members[sid][1], x) for sid in ensemble.members]
        return answer(ensemble, np.stack(said))
    structure, weights = max(members.values(), key=lambda member: member[0].parameters)
    return log_probabilities(structure, data, weights, x)


def _taught(structure: Structure, job: JobSpec, x: Floats, said: Floats) -> Vector:
    seed = derive_seed(job.seed, f"start|{structure.id}", 0)
    weights = initial_weights(structure, job.data, seed)
    settings = DistillSettings(steps=STEPS, copies=usual_copies(len(x)))
    return distill(structure, job.data, weights, x, said, settings, seed)
