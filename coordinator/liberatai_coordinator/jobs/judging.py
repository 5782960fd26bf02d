"""What is measured of a version: on labels of the coordinator, on a test file, and on what devices held out.

None of it decides anything here. But the coordinator's labels are those by which the guard judges: a figure
on them is a little hopeful, one on the test file is not.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.jobs.records import Stats
from liberatai_coordinator.models import ensembles, evaluation, members
from liberatai_coordinator.models.evaluation import CentralScores, LocalScores
from liberatai_coordinator.models.members import Labelled, Public, derive_seed
from liberatai_coordinator.models.versions import Current, Versions
from liberatai_core.contract.messages import Update, weights_name
from liberatai_core.errors import LiberataiError

log = logging.getLogger(__name__)


def judged(
    job: JobSpec,
    versions: Versions,
    fleet: Fleet,
    updates: Sequence[Update],
    public: Public,
    test: Labelled | None,
) -> Stats:
    """Return what is known of the newest version, and of the one that its updates were made from.

    Args:
        job: settings.
        versions: of the job.
        fleet: for the profiles of devices.
        updates: of the round that made the version.
        public: the coordinator's labels, of which only those count that judge.
        test: labelled samples that decide nothing.
    """
    number, ensemble = versions.now.number, versions.now.ensemble
    return Stats(
        guard=ensemble.guard,
        ensemble=ensemble.method,
        use=ensemble.use,
        rule=job.aggregate.rule,
        local=local(versions, fleet, number - 1, updates),
        central=_guarded(job, versions.now, public),
        test=None if test is None else _scored(job, versions.now, *test),
    )


def central(job: JobSpec, versions: Versions, public: Public, test: Labelled | None) -> CentralScores | None:
    """Return what the newest version reaches on labels that judge, else on test data; None without any."""
    scores = _guarded(job, versions.now, public)
    return scores or (None if test is None else _scored(job, versions.now, *test))


def _guarded(job: JobSpec, version: Current, public: Public) -> CentralScores | None:
    """Return what a version reaches on those of the coordinator's labels that judge."""
    if public.validation is None:
        return None
    x, y = public.validation
    rows = evaluation.guard_rows(y, version.ensemble.method, derive_seed(job.seed, "labels", 0))
    return _scored(job, version, x[rows], y[rows])


def _scored(job: JobSpec, version: Current, x: members.Floats, y: NDArray[np.int64]) -> CentralScores | None:
    """Return what a version reaches on labels of the coordinator; None if there are none, or if it fails."""
    if not len(y):
        return None
    try:
        views = {sid: member.view for sid, member in version.members.items()}
        log_probs = members.outputs(version.members, views, job.data, x)
        together = ensembles.answer(version.ensemble, log_probs)
        return evaluation.central(version.number, sorted(views), log_probs, together, y)
    except LiberataiError as error:
        # A figure that decides nothing must not cost the round its version.
        log.warning("version %d of %s: %s %s", version.number, job.name, error.code, error)
        return None


def local(versions: Versions, fleet: Fleet, version: int, updates: Sequence[Update]) -> LocalScores | None:
    """Return what the devices of a round told of the version that it began with, or of an older one."""
    marks = versions.history.get(version, {})
    told: dict[str, evaluation.Told] = {}
    for update in updates:
        mark, device = marks.get(update.structure), fleet.devices.get(update.device)
        if update.evaluation is None:
            continue
        profile = device.capability.profile if device and device.capability else ""
        correct, total = update.evaluation
        told[update.device] = evaluation.Told(
            device=update.device,
            structure=update.structure,
            profile=profile,
            correct=correct,
            total=total,
            late=mark is None or update.base != weights_name(mark.digest),
        )
    return evaluation.local(version, list(told.values()))
