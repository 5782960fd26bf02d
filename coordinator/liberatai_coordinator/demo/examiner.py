"""The demo's test set, and what versions reach on it."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import EnsembleView
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.demo import digits
from liberatai_coordinator.models.ensembles import answer
from liberatai_coordinator.store.manifests import Ensemble
from liberatai_core.aggregator import ensemble as pooling
from liberatai_core.errors import LinkError
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import from_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluated:
    """What one version reaches on the test set: accuracy by structure and "ensemble"; its structures."""

    accuracy: dict[str, float]
    structures: dict[str, Structure]


class Examiner:
    """Holds the test set, and evaluates versions in a thread of its own so that the run does not wait."""

    def __init__(self, test: digits.Samples, data: DataContract) -> None:
        self._test, self._data = test, data
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="examiner")
        self._results: dict[int, Future[Evaluated]] = {}
        self._client: Client | None = None
        self._pool.submit(_import_torch, data)  # two seconds, while the fleet starts

    def connect(self, socket: Path) -> None:
        """Say where the coordinator answers: a client serves one thread, so this one has its own."""
        self._client = Client(socket)

    def submit(self, model: str, version: int) -> None:
        """Evaluate a version some time soon; saying so twice does nothing more."""
        if version not in self._results:
            self._results[version] = self._pool.submit(self._evaluate, model, version)

    def finished(self) -> dict[int, Evaluated]:
        """Return what is known already, by version; raises what an evaluation raised."""
        return {version: task.result() for version, task in self._results.items() if task.done()}

    def all(self) -> dict[int, Evaluated]:
        """Wait for everything that was submitted, and return it by version."""
        return {version: task.result() for version, task in self._results.items()}

    def centralised(self, structure: Structure, job: JobSpec, pooled: digits.Samples) -> float:
        """Return what this structure reaches when all private data lies in one place, in the same epochs."""
        return self._pool.submit(_centralised, structure, job, pooled, self._test).result()

    def close(self) -> None:
        """Forget what has not begun, and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _evaluate(self, model: str, version: int) -> Evaluated:
        from liberatai_core.learning.training import log_probabilities  # noqa: PLC0415 - imports torch

        if self._client is None:
            raise LinkError("the demo is not connected to its coordinator")
        how = self._client.models.ensemble(model, str(version))
        structures: dict[str, Structure] = {}
        outputs: dict[str, NDArray[np.float32]] = {}
        for name in how.members:
            structures[name], _, content = self._client.models.weights(model, str(version), name)
            outputs[name] = log_probabilities(structures[name], self._data, from_bytes(content), self._test.x)
        accuracy = {name: pooling.accuracy(output, self._test.y) for name, output in outputs.items()}
        accuracy["ensemble"] = pooling.accuracy(_combined(how, outputs), self._test.y)
        return Evaluated(accuracy=accuracy, structures=structures)


def _combined(how: EnsembleView, outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the ensemble's log-probabilities: the pool, or the structure that the guard fell back to."""
    ensemble = msgspec.convert(how, Ensemble, from_attributes=True)
    return answer(ensemble, np.stack([outputs[name] for name in how.members]))


def _centralised(structure: Structure, job: JobSpec, pooled: digits.Samples, test: digits.Samples) -> float:
    from liberatai_core.learning.families import initial_weights  # noqa: PLC0415 - imports torch
    from liberatai_core.learning.training import (  # noqa: PLC0415 - imports torch
        TrainSettings,
        log_probabilities,
        train,
    )

    given = {name: getattr(job.training, name) for name in TrainSettings.__struct_fields__}
    settings = TrainSettings(**(given | {"epochs": job.training.epochs * job.rounds.count}))
    start = initial_weights(structure, job.data, job.seed)
    trained = train(structure, job.data, start, pooled.x, pooled.y, settings, job.seed)
    return pooling.accuracy(log_probabilities(structure, job.data, trained.weights, test.x), test.y)


def _import_torch(data: DataContract) -> None:
    """Let torch be imported where it is needed first: by building the smallest model."""
    from liberatai_core.learning.families import build  # noqa: PLC0415 - imports torch

    build("mlp", {"hidden": 1}, data)
