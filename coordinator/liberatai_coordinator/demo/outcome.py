"""What a finished demo left behind, and the report of it."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from liberatai_coordinator.client.views import EnsembleView, JobView, PlanView, newest
from liberatai_coordinator.demo import digits
from liberatai_coordinator.demo.examiner import Evaluated
from liberatai_coordinator.demo.screen import published
from liberatai_coordinator.demo.world import Options, World
from liberatai_coordinator.local import LocalFleet
from liberatai_coordinator.pictures.report import DeviceLine, Report, RoundLine, StructureRow
from liberatai_core.structure import Structure

PACKAGES: Final = ("liberatai", "torch", "numpy", "paho-mqtt", "msgspec")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a finished run left behind.

    Attributes:
        protocol: what coordinator and broker spoke.
        evaluated: by version, 1 …
        version_ids: of the model, oldest first.
        ensemble: of the newest version.
        largest: the structure that the baseline was trained with.
        baseline: its accuracy with all data in one place.
    """

    job: JobView
    plan: PlanView
    protocol: str
    evaluated: Mapping[int, Evaluated]
    version_ids: tuple[str, ...]
    ensemble: EnsembleView
    largest: Structure
    baseline: float


def report_of(
    options: Options, world: World, fleet: LocalFleet, outcome: Outcome, started_s: float
) -> Report:
    """Return the report of a demo that has finished.

    Args:
        options: what the user asked for.
        world: what was made up.
        fleet: that ran, stopped by now.
        outcome: what it left behind.
        started_s: `time.perf_counter()` at the start.
    """
    rounds = published(outcome.job)
    evaluated = outcome.evaluated
    final = evaluated[max(evaluated)]
    parameters = {name: structure.parameters for name, structure in final.structures.items()}
    devices = _device_rows(world, fleet, outcome.plan)
    members = [share for name, share in final.accuracy.items() if name != "ensemble"]
    overhead = [row.seconds - row.train_seconds_max - row.teach_seconds for row in rounds]
    return Report(
        broker=fleet.broker_name,
        broker_lost=fleet.broker_lost,
        protocol=outcome.protocol,
        seed=options.seed,
        devices=devices,
        rounds=tuple(
            RoundLine(
                round=row.round,
                seconds=round(row.seconds, 4),
                train_seconds_max=round(row.train_seconds_max, 4),
                teach_seconds=round(row.teach_seconds, 4),
                up_bytes=row.up_bytes,
                down_bytes=row.down_bytes,
                accuracy=evaluated[version].accuracy,
                updates=row.updates,
                invited=row.invited,
            )
            for version, row in enumerate(rounds, start=1)
        ),
        dense_bytes=dense_bytes([parameters.get(device.structure, 0) for device in devices], len(rounds)),
        total_bytes=sum(device.sent_bytes + device.received_bytes for device in devices),
        final={
            **final.accuracy,
            "best_member": max(members),
            "centralised": outcome.baseline,
        },
        orchestration_s_per_round=round(statistics.fmean(overhead), 4),
        orchestration_s_median=round(statistics.median(overhead), 4),
        versions=_software(),
        local=newest(outcome.job.rounds)[0],
        ensemble=outcome.ensemble,
        merged=rounds[-1].merged,
        structures=tuple(
            StructureRow(
                id=name,
                family=structure.family,
                parameters=structure.parameters,
                devices=sum(device.structure == name for device in devices),
            )
            for name, structure in final.structures.items()
        ),
        model=world.job.name,
        model_versions=outcome.version_ids,
        test_samples=len(world.parts.test),
        validation_samples=len(world.parts.validation),
        unlabeled_samples=len(world.parts.unlabeled),
        alpha=digits.ALPHA,
        baseline_epochs=world.job.training.epochs * world.job.rounds.count,
        baseline_structure=outcome.largest.id,
        seconds_total=round(time.perf_counter() - started_s, 2),
        machine=f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} processors",
    )


def dense_bytes(parameters: Sequence[int], rounds: int) -> int:
    """Return what float32 FedAvg would carry: every parameter to and from every device in every round.

    Args:
        parameters: of each device's structure.
        rounds: number of rounds.
    """
    return rounds * sum(2 * 4 * count for count in parameters)


def _device_rows(world: World, fleet: LocalFleet, plan: PlanView) -> tuple[DeviceLine, ...]:
    assigned = {row.device: row for row in plan.assignments}
    rows = []
    for device, own in zip(world.devices, world.parts.devices, strict=True):
        row, status = assigned[device.id], fleet.status(device.id)
        rows.append(
            DeviceLine(
                id=device.id,
                profile=row.profile,
                tier=row.tier,
                structure=row.structure,
                variant_bytes=row.variant_bytes,
                budget_bytes=row.budget_bytes,
                why=row.why,
                samples=len(own),
                class_counts=tuple(
                    int(n) for n in np.bincount(world.samples.y[own], minlength=world.job.data.classes)
                ),
                sent_bytes=int(status.get("sent_bytes", 0)),
                received_bytes=int(status.get("received_bytes", 0)),
            )
        )
    return tuple(rows)


def _software() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
