"""How long a fleet with slow devices takes to learn: rounds that wait, rounds that drop, and buffered ones.

Virtual time: every device trains with the product's own code, and its update arrives as many seconds later as
the device takes; nothing sleeps. Three arms on the same devices, data and seed, for the same number of
updates:

- waiting: synchronous rounds; every round takes as long as the slowest device;
- dropping: synchronous rounds that close when the fast devices have answered; what slow devices know is lost;
- buffered: every few updates make a version, late ones count for less (FedBuff).

Time to an accuracy is the end of the first of three versions in a row that reach it on test samples.
"""

import argparse
import heapq
import itertools
import json
import math
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.simulation import Population, Simulation
from benchmarks.sparsifier import population
from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice
from liberatai_coordinator.models.aggregation import Late
from liberatai_coordinator.rounds import round as deciding
from liberatai_core.contract.messages import Training, Update

ARMS = ("waiting", "dropping", "buffered")
IN_A_ROW = 3
"""Versions that must reach an accuracy: one may be luck."""
MOST_VERSIONS = 100_000


@dataclass(frozen=True, kw_only=True)
class Version:
    """What one version reached.

    Attributes:
        at_s: virtual time.
        accuracy: of the devices' weights on the test samples.
        staleness: of its updates.
    """

    at_s: float
    accuracy: float
    staleness: tuple[int, ...]


class Timed(Simulation):
    """A simulation in which updates arrive when their devices are done.

    Args:
        seconds: what each device takes for a task.
    """

    def __init__(
        self, job: JobSpec, people: Population, folder: Path, seconds: Mapping[str, float], *, wait_for: int
    ) -> None:
        super().__init__(job, people, folder)
        self.seconds, self.now_s = seconds, 0.0
        self._wait_for = wait_for
        self._coming: list[tuple[float, int, str, Update]] = []
        self._order = itertools.count()

    def versions_of(self, updates: int) -> Iterator[Version]:
        """Yield every version until so many updates have counted."""
        standing: list[deciding.Invitation] = []
        used = 0
        for number in itertools.count(1):
            if used >= updates:
                return
            invitations = self._open(number, standing)
            self._collect()
            used += len(self._updates)
            now = self.versions.now.number
            staleness = {one.update_id: now - one.version for one in invitations}
            late = Late(staleness=staleness, devices=Counter(one.structure for one in invitations))
            counted = {update.update_id for update in self._updates.values()}
            ended = self._advance(number, late if self._buffered else None)
            (accuracy,) = ended.accuracy.values()
            yield Version(
                at_s=self.now_s,
                accuracy=accuracy,
                staleness=tuple(sorted(staleness[one] for one in counted)),
            )
            standing = self._standing(invitations, counted)

    @property
    def _buffered(self) -> bool:
        return self.job.rounds.mode == "buffered"

    def _open(self, number: int, standing: list[deciding.Invitation]) -> list[deciding.Invitation]:
        busy = {one.device for one in standing}
        new = [self._invitation(name, number) for name in sorted(self.devices) if name not in busy]
        ways = {
            one.device: self.versions.way(one.structure, self._paths.get(one.device, ()), 0) for one in new
        }
        version = self.versions.now.number
        asked = [
            deciding.Invitation(
                device=one.device,
                structure=one.structure,
                base=one.base,
                update_id=one.update_id,
                round=number,
                version=version,
            )
            for one in new
        ]
        invitations = [*standing, *asked]
        self._round = deciding.Round(
            job=self.job.name,
            number=number,
            invitations={one.device: one for one in invitations},
            target=self._target(len(invitations)),
            quorum=1,
            closes_s=math.inf,
            buffered=self._buffered,
        )
        self._updates = {}
        for one in asked:
            self._give(one.device, number, one, ways[one.device])
        return invitations

    def _target(self, devices: int) -> int:
        if self._buffered:
            return deciding.buffer_size(self.job.rounds.buffer, devices, 0.0, 1)
        return self._wait_for

    def _standing(
        self, invitations: list[deciding.Invitation], counted: set[bytes]
    ) -> list[deciding.Invitation]:
        if not self._buffered:
            # Whoever is late stops: its task's round is over.
            self._coming.clear()
            return []
        return deciding.standing(
            invitations,
            counted,
            version=self.versions.now.number,
            max_staleness=self.job.rounds.max_staleness,
            free=(),
            opened_after_s=0.0,
        )

    def _receive(self, device: Any, update: Update) -> None:
        arrival = (self.now_s + self.seconds[device.name], next(self._order), device.name, update)
        heapq.heappush(self._coming, arrival)

    def _collect(self) -> None:
        """Let updates arrive until the round closes."""
        while self._round is not None and self._round.phase is deciding.Phase.OPEN:
            self.now_s, _, name, update = heapq.heappop(self._coming)
            super()._receive(self.devices[name], update)


def job_of(options: argparse.Namespace, people: Population, arm: str) -> JobSpec:
    """Return the job of an arm."""
    buffered = arm == "buffered"
    return JobSpec(
        name="stragglers",
        data=people.data,
        structures=(StructureChoice(family="cnn", params={"width": 8}),),
        rounds=Rounds(
            count=MOST_VERSIONS,
            mode="buffered" if buffered else "synchronous",
            buffer=options.buffer if buffered else None,
        ),
        training=Training(epochs=options.epochs, learning_rate=options.learning_rate),
        sparsify=Sparsify(down_density=0.15),
        aggregate=Aggregate(ensemble="uniform"),
        seed=options.seed,
    )


def run_arm(options: argparse.Namespace, people: Population, arm: str) -> list[Version]:
    """Return the versions of an arm."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"device-{number:04d}" for number in range(len(people.devices))]
        slow = set(names[: options.slow])
        seconds = {
            name: (options.factor if name in slow else 1.0) * (1.0 + 0.01 * place)  # no two are done at once
            for place, name in enumerate(names)
        }
        fast = len(names) - (options.slow if arm == "dropping" else 0)
        simulation = Timed(job_of(options, people, arm), people, Path(folder), seconds, wait_for=fast)
        try:
            return list(simulation.versions_of(options.updates))
        finally:
            simulation.close()


def reached_s(versions: list[Version], accuracy: float) -> float | None:
    """Return when an accuracy is reached for good enough; None: never."""
    for first in range(len(versions) - IN_A_ROW + 1):
        some = versions[first : first + IN_A_ROW]
        if min(one.accuracy for one in some) >= accuracy:
            return round(some[0].at_s, 2)
    return None


def summary(versions: list[Version], targets: list[float]) -> dict[str, Any]:
    """Return what an arm reached; the last accuracy is the mean over the last fifth of its versions."""
    last = [one.accuracy for one in versions[-max(1, len(versions) // 5) :]]
    late = [staleness for one in versions for staleness in one.staleness]
    return {
        "versions": len(versions),
        "updates": len(late),
        "seconds": round(versions[-1].at_s, 2),
        "last": round(float(np.mean(last)), 4),
        "staleness_mean": round(float(np.mean(late)), 2),
        "staleness_max": max(late),
        "seconds_to": {f"{target:g}": reached_s(versions, target) for target in targets},
    }


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help=".npz with x and y; default: the digits of scikit-learn")
    parser.add_argument("--alpha", type=float, default=0.3, help="label skew")
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--slow", type=int, default=2, help="of the devices")
    parser.add_argument("--factor", type=float, default=10.0, help="how much slower they are")
    parser.add_argument("--buffer", type=int, help="updates per version; default: the product's")
    parser.add_argument("--updates", type=int, default=200, help="of every arm")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--samples", type=int, default=1200, help="for training")
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.85, 0.9, 0.93])
    parser.add_argument("--only", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few updates")
    options = parser.parse_args(arguments)
    if options.quick:
        options.updates = min(options.updates, 120)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the arms, print a table and one line of JSON."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    people, _ = population(options)
    result: dict[str, Any] = {}
    head = " ".join(f"{f'to {target:g}':>9}" for target in options.targets)
    print(f"{'arm':<10} {'versions':>8} {'seconds':>8} {'last':>7} {head}  (virtual s)")
    for arm in options.only:
        started = time.perf_counter()
        found = summary(run_arm(options, people, arm), options.targets)
        result[arm] = found | {"wall_s": round(time.perf_counter() - started, 1)}
        reached = found["seconds_to"].values()
        times = " ".join(f"{'never' if at is None else f'{at:.1f}':>9}" for at in reached)
        print(f"{arm:<10} {found['versions']:>8} {found['seconds']:>8.1f} {found['last']:>7.3f} {times}")
    result["options"] = {key: value for key, value in vars(options).items() if key != "only"}
    result["versions"] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
