"""How the structures of a version answer together: an ensemble and its guard, in plain numbers."""

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models.members import Floats, Member, Public, derive_seed, outputs
from liberatai_coordinator.store.manifests import Ensemble
from liberatai_core.aggregator.ensemble import Evidence, Pool, pooled
from liberatai_core.aggregator.guard import divided, guard
from liberatai_core.aggregator.methods import LABELLED, chosen, method_of, replaced
from liberatai_core.weights import Vector


def answer(ensemble: Ensemble, log_probs: Floats) -> Floats:
    """Return what a version answers.

    Args:
        ensemble: of the version: a pool, or the structure that the guard fell back to.
        log_probs: of its members, shape (members, n, classes).

    Returns:
        Log-probabilities, shape (n, classes).
    """
    if ensemble.use != "ensemble":
        alone: Floats = log_probs[ensemble.members.index(ensemble.use)]
        return alone
    return pooled(pool_of(ensemble), log_probs)


def pool_of(ensemble: Ensemble) -> Pool:
    """Return the numbers of an ensemble as arrays."""
    return Pool(
        weights=np.array(ensemble.weights),
        log_priors=np.array(ensemble.log_priors) if ensemble.log_priors else None,
        bias=np.array(ensemble.bias) if ensemble.bias else None,
        kind=ensemble.kind,
    )


def combine(job: JobSpec, members: Mapping[str, Member], public: Public) -> Ensemble:
    """Return the guarded ensemble of the devices' views."""
    views = {sid: member.view for sid, member in members.items()}
    return ensemble_of(job, members, views, public)


def ensemble_of(
    job: JobSpec, members: Mapping[str, Member], weights: Mapping[str, Vector], public: Public
) -> Ensemble:
    """Return the guarded ensemble of the members with these weights, by structure id.

    With labels, one part of them finds the ensemble's weights and the other one judges it.
    """
    ids = tuple(sorted(members))
    counts = np.stack([members[sid].class_counts for sid in ids])
    held_out = outputs(members, weights, job.data, public.validation[0]) if public.validation else None
    labels = public.validation[1] if public.validation else np.zeros(0, dtype=np.int64)
    fitted, judging = divided(labels, derive_seed(job.seed, "labels", 0))
    name = chosen(job.aggregate.ensemble, labels=len(fitted), counted=bool(counts.sum() > 0))
    if name not in LABELLED:
        judging = np.arange(len(labels))
    found = method_of(name, job.aggregate.trials)(
        Evidence(
            class_counts=counts,
            balance=job.training.balance,
            log_probs=None if held_out is None else held_out[:, fitted],
            y=labels[fitted],
            seed=job.seed,
        )
    )
    made = Ensemble(
        method=name,
        members=ids,
        weights=_rows(found.weights),
        log_priors=() if found.log_priors is None else _rows(found.log_priors),
        bias=() if found.bias is None else tuple(map(float, found.bias)),
        kind=found.kind,
        guard="not checked: the job has no labelled validation data",
    )
    instead = replaced(job.aggregate.ensemble, name, labels=len(fitted), counted=bool(counts.sum() > 0))
    if held_out is None:
        return msgspec.structs.replace(made, guard=made.guard + instead)
    judged = held_out[:, judging]
    decision = guard(answer(made, judged), judged, labels[judging], ids)
    use = "ensemble" if decision.use == "ensemble" else ids[decision.use]
    told = f"; {len(fitted)} other labels found its weights" if name in LABELLED else ""
    return msgspec.structs.replace(made, use=use, guard=decision.reason + told + instead)


def _rows(values: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in values)
