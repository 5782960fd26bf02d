"""A fleet of virtual time: one coordinator as `wiring` builds it, a broker, and many devices, on one loop."""

import asyncio
import contextlib
import gc
import hashlib
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import numpy as np
from msgspec.structs import replace

from liberatai_coordinator import clock, link_settings, wiring
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.config import CoordinatorConfig, JobSpec
from liberatai_coordinator.fleet.devices import MAX_DEVICES
from liberatai_coordinator.fleet.plan import Assignment
from liberatai_coordinator.jobs import materials
from liberatai_coordinator.jobs.queue import LIVE
from liberatai_coordinator.jobs.tasks import RUN
from liberatai_coordinator.service import Service
from liberatai_coordinator.sim import scenario as scenarios
from liberatai_coordinator.sim.fleet_file import FleetFile
from liberatai_coordinator.sim.line import Line
from liberatai_coordinator.sim.record import (
    DeviceRecord,
    Point,
    Record,
    RoundRecord,
    with_ends,
)
from liberatai_coordinator.sim.scenario import Happening, Scenario
from liberatai_coordinator.sim.virtual.blobs import Blobs
from liberatai_coordinator.sim.virtual.device import Device
from liberatai_coordinator.sim.virtual.hostile import Hostile
from liberatai_coordinator.sim.virtual.learning import Drawn, Trained
from liberatai_coordinator.sim.virtual.loop import VirtualLoop
from liberatai_coordinator.sim.virtual.seen import Seen
from liberatai_coordinator.sim.virtual.trainer import Body
from liberatai_coordinator.store.rows import DeviceRow
from liberatai_core import __version__
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.messages import RUN_BYTES, SPARSE_METHODS, Capability, TaskSpec
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import TrainingError
from liberatai_core.link.link import Link, Will
from liberatai_core.link.memory import MemoryBroker, MemoryLink
from liberatai_core.profile import Profile

COORDINATOR: Final = "coordinator"
COMMIT_S: Final = 0.01
"""From the first update that waits for the coordinator's disk to the commit of all that wait then."""
LATEST_S: Final = 0.25
"""Until rows are written of which only the newest counts."""
LOOK_S: Final = 0.25
"""Between two looks at a job."""
QUEUED: Final = 1_000_000
"""Messages that the broker keeps for one client."""
SHOWN: Final = 60
"""Devices whose moments are kept."""
YOUNG_OBJECTS: Final = 100_000
SETTLED_S: Final = 5.0
"""After the start of the last device: they are there before the job is created."""
SPREAD_S: Final = 2.0
"""Devices start within so many seconds, or a millisecond each if they are many."""
BIG_BYTES: Final = 1 << 40
ROOM_BYTES: Final = 1 << 30
"""Free memory from which on a coordinator's state lies there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What is simulated.

    Attributes:
        data: private file by device; empty where training is drawn.
        samples: of each device.
        base_dir: of the job's file.
        test: inputs and labels that no device has; None: nothing is evaluated.
        limit_s: virtual seconds after which the job must have ended.
        on_round: called with the number of rounds that have ended, now and then.
    """

    fleet: FleetFile
    scenario: Scenario
    job: JobSpec
    base_dir: str
    data: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)
    test: tuple[Any, Any] | None = None
    limit_s: float = 30 * 86_400.0
    on_round: Callable[[int], None] = lambda _: None


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """Make a folder in memory, if this machine has one: what a simulated coordinator stores need not last."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own is made there
    place = str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES else None
    with tempfile.TemporaryDirectory(prefix="liberatai-sim-", dir=place) as folder:
        yield Path(folder)


def simulate(given: Given, folder: Path) -> Record:
    """Run one job on a fleet of virtual time.

    Args:
        given: what is simulated.
        folder: for the coordinator's state and the files of models; empty.

    Raises:
        ConfigError: a faulty fleet. TrainingError: the job did not end in `limit_s`.
    """
    gc.freeze()  # what the imports left stays; devices are few cycles and many objects
    before = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS, *before[1:])
    loop = VirtualLoop()
    began_s = time.monotonic()
    with clock.replaced(loop.time, loop.wall), contextlib.closing(loop):
        asyncio.set_event_loop(loop)
        try:
            record = loop.run_until_complete(VirtualFleet(loop, given, folder).run())
        finally:
            asyncio.set_event_loop(None)
            gc.set_threshold(*before)
            gc.unfreeze()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return replace(record, wall_s=time.monotonic() - began_s, rss_mb=round(peak, 1))


class VirtualFleet:
    """Everything that runs on the loop.

    Attributes:
        loop, broker, topics, coordinator_key, blobs, seen: what devices share.
        devices: by name; those that are only known are not here.
    """

    def __init__(self, loop: VirtualLoop, given: Given, folder: Path) -> None:
        self.loop, self.given, self._folder = loop, given, folder
        self.topics = Topics(fleet=given.fleet.fleet)
        self.broker = MemoryBroker(max_inflight=link_settings.RECEIVE_MAXIMUM, max_queued=QUEUED)
        self._key = _seeded(given.fleet.seed, "coordinator")
        self.coordinator_key = Signer.from_seed(self._key, given.fleet.fleet).public_key
        self._learn = Drawn(given.fleet.seed) if given.fleet.training == "drawn" else Trained()
        self.blobs = Blobs(folder / "blobs")
        self.seen = Seen(loop.time)
        self._macs: dict[str, int] = {}
        self._names = given.fleet.names()
        self.devices: dict[str, Device] = {}
        self._clones: dict[str, Device] = {}
        self._points: list[Point] = []
        self._service: Service | None = None
        self._running: asyncio.Task[None] | None = None
        self._stack = ExitStack()
        self._committing = False
        self.blobs.folder.mkdir(parents=True, exist_ok=True)

    # --- what devices share --------------------------------------------------------------------

    def macs(self, spec: TaskSpec) -> int:
        """Return the multiply-adds of a structure per sample."""
        return self._macs.get(spec.structure.id, 0)

    # --- running -------------------------------------------------------------------------------

    async def run(self) -> Record:
        """Run the job to its end."""
        self._prepare()
        await self._start_coordinator()
        try:
            return await self._run()
        finally:
            await self._stop_coordinator()

    async def _run(self) -> Record:
        await asyncio.sleep(self._start_devices() + SETTLED_S)
        beside = [asyncio.create_task(self._live()), asyncio.create_task(self._happen())]
        await self._create()
        began_s = self.loop.time()
        try:
            await self._watch(began_s)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        for task in beside:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        return await self._record(began_s)

    async def _watch(self, began_s: float) -> None:
        """Wait for the job's end; look at every version on the way."""
        job, seen, opened = self.given.job.name, 0, 0
        looks = self.given.test is not None or self.given.fleet.training == "drawn"
        while True:
            service = self._service
            if service is not None:
                runner = service.runners.get(job)
                now = runner.open_round if runner else None
                if (now is not None and now.number != opened) or runner is None:
                    opened = now.number if now else opened
                    self.given.on_round(opened - 1)
                    seen = await self._evaluate(service, seen, began_s) if looks else seen
                if runner is None and service.ledger.jobs.get(job).state not in LIVE:
                    return
            if self.loop.time() - began_s > self.given.limit_s:
                waits = service.jobs.waits().get(job, "") if service else "no coordinator"
                raise TrainingError(f"the job has not ended after {self.given.limit_s:.0f} s: {waits}")
            await asyncio.sleep(LOOK_S)

    async def _evaluate(self, service: Service, seen: int, began_s: float) -> int:
        """Note how good the newest version is, if it is new."""
        job = self.given.job.name
        if job not in service.ledger.versions.models():
            return seen
        row = service.ledger.versions.get(job)
        if row.number == seen or row.number < 1:
            return seen
        figures: dict[str, float] = {}
        operations = Operations.of(service)
        plan = service.ledger.jobs.value(job, "plan")
        given = msgspec.msgpack.decode(plan, type=list[Assignment]) if plan else []
        by_profile = {self._names[one.device]: one.structure for one in given if one.structure}
        moved = self._moved()
        for profile, structure in by_profile.items():
            if structure not in figures:
                figures[structure] = await self._figure(operations, job, row.number, structure)
            up_bytes, down_bytes = moved[profile]
            self._points.append(
                Point(
                    profile=profile,
                    at_s=round(self.loop.time() - began_s, 3),
                    version=row.number,
                    figure=figures[structure],
                    up_bytes=up_bytes,
                    down_bytes=down_bytes,
                )
            )
        return int(row.number)

    async def _figure(self, operations: Operations, job: str, version: int, structure: str) -> float:
        made, data, content = await operations.models.weights(job, str(version), structure)
        weights = np.frombuffer(content, dtype="<f4").copy()
        if isinstance(self._learn, Drawn):
            return self._learn.loss(structure, weights)
        from liberatai_core.learning.training import log_probabilities  # noqa: PLC0415 - imports torch

        assert self.given.test is not None  # noqa: S101 - the caller looked
        x, y = self.given.test
        return float((log_probabilities(made, data, weights, x).argmax(axis=1) == y).mean())

    def _moved(self) -> dict[str, tuple[int, int]]:
        moved: dict[str, tuple[int, int]] = {}
        for name, device in self.devices.items():
            up, down = moved.get(self._names[name], (0, 0))
            moved[self._names[name]] = (
                up + device.line.up.moved_bytes,
                down + device.line.down.moved_bytes,
            )
        return moved

    # --- the coordinator -----------------------------------------------------------------------

    def _prepare(self) -> None:
        state = self._folder / "coordinator"
        state.mkdir(mode=0o700, exist_ok=True)
        key = state / "coordinator.key"
        key.touch(mode=0o600)
        key.write_bytes(self._key)
        candidates, _ = materials.candidates_of(self.given.job)
        self._macs = {one.id: one.macs for one in candidates}
        self._make_devices()

    async def _start_coordinator(self) -> None:
        fleet = self.given.fleet.fleet
        state = str(self._folder / "coordinator")
        config = CoordinatorConfig(
            fleet=fleet,
            coordinator=COORDINATOR,
            state_dir=state,
            enrolment="open",
            max_devices=max(len(self._names), MAX_DEVICES),
            broker="mqtt://virtual",
        )
        service = self._stack.enter_context(wiring.build(config, self._link, threaded=False))
        self._service = service
        if self.given.fleet.awake < 1:
            self._remember(service)
        await service.restore()
        self._running = asyncio.create_task(service.run())
        service.ledger.writer.queued = lambda: self._queued(service)
        self._queued(service)

    def _queued(self, service: Service) -> None:
        """Let the ledger write what waits in a moment: a disk takes that long for all of it together."""
        if not self._committing:
            self._committing = True
            self.loop.call_later(COMMIT_S, self._commit, service)

    def _commit(self, service: Service) -> None:
        self._committing = False
        if service is not self._service:
            return
        service.ledger.writer.write_queued()
        if service.ledger.writer.has_latest:  # their time has not come
            self._committing = True
            self.loop.call_later(LATEST_S, self._commit, service)

    def _link(self, config: CoordinatorConfig, will: Will) -> Link:
        return MemoryLink(self.broker, config.coordinator, will=will, retry_s=0.5)

    async def _stop_coordinator(self, *, crash: bool = False) -> None:
        service, running = self._service, self._running
        if service is None or running is None:
            return
        if crash:
            self.broker.block(COORDINATOR)
        self._service = self._running = None
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        self._stack.close()
        self._stack = ExitStack()

    def _remember(self, service: Service) -> None:
        """Let the coordinator know the devices that are not there: as if they had been there before."""
        devices = service.ledger.devices
        if devices.all():
            return
        for number, (name, profile) in enumerate(self._names.items()):
            if name in self.devices:
                continue
            key = _seeded(self.given.fleet.seed, name)  # nobody speaks with it: the device is not there
            capability = self._capability(name, self._profiles[profile], key)
            devices.remember(
                DeviceRow(
                    id=name,
                    public_key=key,
                    status="approved",
                    capability=msgspec.msgpack.encode(capability),
                    session=1,
                    first_seen_s=self.loop.wall(),
                    last_seen_s=self.loop.wall(),
                    reason="",
                )
            )
            if number % 50_000 == 0:
                service.ledger.writer.write_queued(now=True)
        service.ledger.writer.write_queued(now=True)

    async def _create(self) -> None:
        """Create the job, as its operation does, with numbers of the seed."""
        service, job = self._service, self.given.job
        assert service is not None  # noqa: S101 - it was started
        await asyncio.to_thread(materials.check, job, Path(self.given.base_dir))
        run = _seeded(self.given.fleet.seed, "run")[:RUN_BYTES]
        service.ledger.jobs.create(
            job.name, msgspec.json.encode(job), self.given.base_dir, clock.wall(), {RUN: run}
        )
        service.jobs.start(service.ledger.jobs.get(job.name))

    # --- the devices ---------------------------------------------------------------------------

    def _make_devices(self) -> None:
        given, fleet = self.given, self.given.fleet
        self._profiles = fleet.profiles()
        awake: Any = self._names
        if fleet.awake < 1:
            awake = scenarios.chosen(
                self._names, max(1, round(fleet.awake * len(self._names))), fleet.seed, "awake"
            )
        there = [name for name in self._names if name in awake]
        hostile = scenarios.hostile(given.scenario, there, fleet.seed)
        failing = scenarios.failing(given.scenario, there, fleet.seed)
        reason = given.scenario.failing.reason if given.scenario.failing else ""
        how = given.scenario.hostile.how if given.scenario.hostile else "opposite"
        for name in there:
            profile = self._profiles[self._names[name]]
            key = _seeded(fleet.seed, f"key|{name}")
            net = scenarios.network(given.scenario, name, profile.net, fleet.seed)
            signer = Signer.from_seed(key, fleet.fleet)
            body = Body(
                capability=self._capability(name, replace(profile, net=net), signer.public_key),
                data_path=given.data.get(name, ""),
                write_mb_s=profile.storage.write_mb_s or 20.0,
                learn=Hostile(self._learn, how) if name in hostile else self._learn,
                fails=reason if name in failing else "",
            )
            line = Line.of(net, Random(f"{fleet.seed}|{name}|line"))  # noqa: S311 - a simulation
            self.devices[name] = Device(self, body, line, key, fleet.seed)
        for name in _spread(there, SHOWN):
            self.seen.moments[name] = []

    def _capability(self, name: str, profile: Profile, public_key: bytes) -> Capability:
        """Return what a device of a profile says of itself, as `liberatai_agent.machine.probe` would."""
        return Capability(
            device=name,
            public_key=public_key,
            session=1,
            agent_version=__version__,
            tier="full",
            profile=profile.id,
            arch=profile.arch,
            cores=profile.cores,
            cpu_share=profile.cpu_share,
            memory_bytes=profile.memory_bytes,
            storage_bytes=profile.storage_bytes,
            disk_free_bytes=BIG_BYTES,
            gflops=profile.gflops,
            up_bits_s=profile.net.up_mbit * 1e6,
            down_bits_s=profile.net.down_mbit * 1e6,
            metered=profile.net.metered,
            samples=self.given.samples.get(name, self.given.fleet.samples),
            data=self.given.job.data,
            runtimes=("torch", "numpy"),
            codecs=SPARSE_METHODS,
            telemetry_s=self.given.fleet.telemetry_s,
        )

    def _start_devices(self) -> float:
        """Start all, one after the other; return how long that takes."""
        spread_s = max(SPREAD_S, 0.001 * len(self.devices))
        for number, device in enumerate(self.devices.values()):
            self.loop.call_later(spread_s * number / len(self.devices), device.start)
        return spread_s

    async def _live(self) -> None:
        """Let every device give a sign of life once in its interval, and look for garbage now and then."""
        devices = list(self.devices.values())
        pause_s = self.given.fleet.telemetry_s / len(devices)
        while True:
            began_s = self.loop.time()
            for number, device in enumerate(devices):
                due_s = began_s + (number + 1) * pause_s
                if due_s > self.loop.time():
                    await asyncio.sleep(max(pause_s, 0.05, due_s - self.loop.time()))
                device.telemetry()

    # --- what happens to them ------------------------------------------------------------------

    async def _happen(self) -> None:
        window, seed = 0, self.given.fleet.seed
        waiting: list[Happening] = []
        began_s = self.loop.time()
        while True:
            waiting = sorted(waiting + scenarios.happenings(self.given.scenario, self.devices, seed, window))
            window += 1
            until_s = window * scenarios.WINDOW_S
            while waiting and waiting[0].at_s < until_s:
                one = waiting.pop(0)
                await asyncio.sleep(max(0.0, began_s + one.at_s - self.loop.time()))
                await self.do(one)
            await asyncio.sleep(max(0.0, began_s + until_s - self.loop.time()))

    async def do(self, one: Happening) -> None:
        """Make one happening happen."""
        self.seen.happened(one)
        device = self.devices.get(one.device)
        match one.what:
            case "cut":
                self.broker.block(one.device)
            case "mend":
                self.broker.unblock(one.device)
            case "broker stops":
                self.broker.stop(forget=bool(one.value))
            case "broker starts":
                self.broker.start()
            case "coordinator stops":
                await self._stop_coordinator(crash=True)
            case "coordinator starts":
                self.broker.unblock(COORDINATOR)
                await self._start_coordinator()
            case "clone appears" if device is not None:
                seed, disk = self.given.fleet.seed + 1, device.disk.copy()
                clone = Device(self, device.body, device.line, device.key, seed, disk)
                self._clones[one.device] = clone
                clone.start()
            case "clone goes":
                self._clones.pop(one.device).crash()
            case _ if device is not None:
                _DO[one.what](device, one.value)

    # --- the end -------------------------------------------------------------------------------

    async def _record(self, began_s: float) -> Record:
        given, service = self.given, self._service
        assert service is not None  # noqa: S101 - it was started
        view = await Operations.of(service).jobs.show(given.job.name)
        versions = await Operations.of(service).models.log(given.job.name)
        newest = max(versions, key=lambda one: one.version)
        stored = {uid for one in view.rounds for uid in service.ledger.updates.ids(given.job.name, one.round)}
        rounds, at_s = [], 0.0
        for one in view.rounds:
            at_s += one.seconds
            rounds.append(
                RoundRecord(
                    round=one.round,
                    state=one.state,
                    invited=one.invited,
                    updates=one.updates,
                    seconds=round(one.seconds, 3),
                    at_s=round(at_s, 3),
                    held_by=tuple(self.seen.last.get(one.round, ())),
                    reason=one.reason,
                )
            )
        devices = [
            DeviceRecord(
                id=name,
                profile=self._names[name],
                rounds=device.rounds,
                busy_s=round(device.trainer.busy_s, 3),
                up_bytes=device.line.up.moved_bytes,
                down_bytes=device.line.down.moved_bytes,
                moments=tuple(self.seen.moments.get(name, ())),
            )
            for name, device in self.devices.items()
        ]
        record = Record(
            fleet=given.fleet.fleet,
            backend="virtual",
            scenario=given.scenario.name,
            description=given.scenario.description,
            seed=given.fleet.seed,
            job=given.job.name,
            state=view.state,
            reason=view.reason or "",
            figure="distance" if given.fleet.training == "drawn" else "accuracy",
            began_s=round(began_s, 3),
            job_s=round(self.loop.time() - began_s, 3),
            wall_s=0.0,
            known=len(self._names),
            updates=len(self.seen.receipts),
            update_bytes=sum(self.seen.receipts.values()),
            last_body_bytes=sum(device.body_bytes for device in self.devices.values()),
            blob_bytes=self.blobs.fetched_bytes,
            up_bytes=sum(one.up_bytes for one in devices),
            down_bytes=sum(one.down_bytes for one in devices),
            lost=len(self.seen.receipts.keys() - stored),
            digests=dict(newest.digests),
            file_bytes=dict(newest.bytes),
            rounds=tuple(rounds),
            devices=tuple(devices),
            faults=tuple(self.seen.faults),
            points=tuple(self._points),
        )
        return with_ends(record)


_DO: Final[dict[str, Callable[[Device, float], None]]] = {
    "crash": lambda device, _: device.crash(),
    "start": lambda device, _: device.start(),
    "clock jumps": lambda device, by_s: device.jump(by_s),
    "disk full": lambda device, _: device.disk.fill(True),
    "disk free": lambda device, _: device.disk.fill(False),
    "asleep": lambda device, _: device.leave(),
    "awake": lambda device, _: device.start(),
}


def _seeded(seed: int, what: str) -> bytes:
    return hashlib.sha256(f"liberatai simulation|{seed}|{what}".encode()).digest()


def _spread(names: list[str], count: int) -> Iterator[str]:
    """Yield so many of the names, spread over all of them."""
    step = max(1.0, len(names) / count)
    yield from (names[int(number * step)] for number in range(min(count, len(names))))
