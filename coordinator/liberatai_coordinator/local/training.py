"""One job on a fleet of this machine, from nothing to the final weights."""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liberatai_coordinator.client.views import JobView, VersionView
from liberatai_coordinator.config import parse_job
from liberatai_coordinator.local.files import LocalDevice
from liberatai_coordinator.local.fleet import POLL_S, LocalFleet
from liberatai_core.errors import LinkError, TrainingError
from liberatai_core.structure import DataContract, Structure
from liberatai_core.units import duration_text
from liberatai_core.weights import Vector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What `run` returns.

    Attributes:
        job: the finished job with its rounds.
        versions: of the model, as the coordinator lists them.
        structures: structure by its id.
        weights: newest weights by structure id, flat float32.
        data: the job's data contract.
    """

    job: JobView
    versions: tuple[VersionView, ...]
    structures: dict[str, Structure]
    weights: dict[str, Vector]
    data: DataContract

    def predict(self, x: Any, structure: str | None = None) -> Any:
        """Return the most probable class of each input, shape (n,), by one structure.

        Args:
            x: inputs, shape (n, *input_shape).
            structure: id of one; None takes the one with the most parameters.
        """
        from liberatai_core.learning.training import log_probabilities  # noqa: PLC0415 - imports torch

        name = structure or max(self.structures, key=lambda known: self.structures[known].parameters)
        inputs = np.asarray(x, dtype=np.float32)
        return log_probabilities(self.structures[name], self.data, self.weights[name], inputs).argmax(axis=1)


def run(
    job: Path | str,
    data: Mapping[str, Path | str],
    *,
    profiles: Mapping[str, str | Path] | None = None,
    broker: str = "auto",
    folder: Path | None = None,
    on_progress: Callable[[JobView], None] | None = None,
    quiet: bool = False,
) -> Result:
    """Run one job on a fleet of this machine, from nothing to the final weights.

    Args:
        job: file with the job's YAML.
        data: device name -> its private .npz.
        profiles: device name -> hardware class; a device without one is limited by this machine only.
        broker: see `LocalFleet`.
        folder: keeps all files; None: a temporary folder that is removed.
        on_progress: called with the job a few times per second.
        quiet: say nothing on stderr about what goes on.

    Raises:
        ConfigError: a faulty job, with all its faults.
        TrainingError: the job failed; the text says why.
        LinkError: a process ended; the text holds the end of its log.
    """
    path = Path(job)
    text = path.read_text(encoding="utf-8")
    spec = parse_job(text, str(path))
    devices = [
        LocalDevice(id=name, data=Path(file), profile=(profiles or {}).get(name))
        for name, file in data.items()
    ]
    with tempfile.TemporaryDirectory(prefix="liberatai-") as temporary:
        fleet = LocalFleet(folder or Path(temporary), devices, broker=broker)
        said = Told(quiet=quiet)
        said.line(f"starting a broker, a coordinator and {len(devices)} devices on this machine …")
        with fleet:
            fleet.client.jobs.create(text, str(path.parent.absolute()))
            said.line(f"job {spec.name}: {spec.rounds.count} rounds")

            def look(view: JobView) -> None:
                said.job(view)
                if on_progress is not None:
                    on_progress(view)

            finished = wait(fleet, spec.name, look)
            versions = tuple(fleet.client.models.log(spec.name))
            loaded = {
                structure: fleet.client.models.weights(spec.name, "latest", structure)
                for structure in versions_structures(versions)
            }
    return Result(
        job=finished,
        versions=versions,
        structures={name: found[0] for name, found in loaded.items()},
        weights={name: np.frombuffer(found[2], dtype="<f4").copy() for name, found in loaded.items()},
        data=spec.data,
    )


class Told:
    """Says on stderr how a run goes on: a line per round, not only the result after half a minute."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._said = quiet, (0, "")

    def line(self, text: str) -> None:
        """Say something."""
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - it is what a person waits for

    def job(self, view: JobView) -> None:
        """Say what is new: the last round that ended, or what the job waits for."""
        ended = [one for one in view.rounds if one.state in ("published", "abandoned")]
        news = (len(ended), view.reason if not ended else "")
        if news == self._said:
            return
        self._said = news
        if not ended:
            if view.reason:
                self.line(f"waiting: {view.reason}")
            return
        last = ended[-1]
        why = f" ({last.reason})" if last.reason else ""
        took = f", {duration_text(last.seconds)}" if last.state == "published" else ""
        self.line(
            f"round {last.round} of {view.rounds_total}: {last.state}{why}, "
            f"{last.updates} of {last.invited} updates{took}"
        )


def wait(fleet: LocalFleet, job: str, on_progress: Callable[[JobView], None] | None = None) -> JobView:
    """Return the job once it is finished; a coordinator that was killed on purpose is waited for.

    Raises:
        TrainingError: it failed or was aborted.
        LinkError: a process of the fleet ended.
    """
    while True:
        try:
            view = fleet.client.jobs.show(job)
        except LinkError:
            fleet.require_alive()
            time.sleep(POLL_S)
            continue
        if on_progress is not None:
            on_progress(view)
        if view.state == "finished":
            return view
        if view.state in ("failed", "aborted"):
            raise TrainingError(f"job {job} {view.state}: {view.reason or 'no reason given'}")
        fleet.require_alive()
        time.sleep(POLL_S)


def versions_structures(versions: Sequence[VersionView]) -> list[str]:
    """Return the ids of the structures that the newest version holds."""
    return sorted(max(versions, key=lambda version: version.version).digests) if versions else []
