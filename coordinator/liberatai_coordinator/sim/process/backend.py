"""A simulated fleet of child processes: broker, coordinator and agents as they are, behind shaped links."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

import numpy as np
from msgspec.structs import replace

from liberatai_coordinator.client.views import JobView
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.local import LocalDevice, LocalFleet
from liberatai_coordinator.local.process import Process
from liberatai_coordinator.sim import scenario as scenarios
from liberatai_coordinator.sim.fleet_file import FleetFile, device_name
from liberatai_coordinator.sim.process.limits import limits_of
from liberatai_coordinator.sim.process.proxy import Proxies, Proxy
from liberatai_coordinator.sim.record import (
    DeviceRecord,
    FaultRecord,
    Moment,
    Point,
    Record,
    RoundRecord,
    with_ends,
)
from liberatai_coordinator.sim.scenario import Happening, Scenario
from liberatai_core.errors import (
    ConfigError,
    LiberataiError,
    LinkError,
    NotFoundError,
    StateError,
    TrainingError,
)

POLL_S: Final = 0.25
SPARE: Final = 2
"""Times as many devices as the file says may be scaled to."""
MAX_PROCESSES: Final = 200
ENDED: Final = ("finished", "failed", "aborted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What is simulated.

    Attributes:
        text: the job's YAML.
        data: private file by device.
        test: inputs and labels that no device has; None: nothing is evaluated.
        broker: see `LocalFleet`.
        on_round: called with the job now and then.
    """

    fleet: FleetFile
    scenario: Scenario
    job: JobSpec
    text: str
    base_dir: str
    data: Mapping[str, Path]
    test: tuple[Any, Any] | None = None
    broker: str = "auto"
    on_round: Callable[[JobView], None] = lambda _: None


def check(fleet: FleetFile, scenario: Scenario) -> None:
    """Raise ConfigError for what only devices of virtual time can do."""
    parts = ("skew", "clones", "full_disks", "hostile", "failing")
    faults = [
        f"scenario {scenario.name}: {part} needs backend: virtual"
        for part in parts
        if getattr(scenario, part)
    ]
    total = sum(fleet.devices.values())
    if total > MAX_PROCESSES:
        faults.append(f"devices: {total} processes, at most {MAX_PROCESSES}: take backend: virtual")
    if faults:
        raise ConfigError("fleet", faults)


class ProcessFleet:
    """A fleet of child processes, from nothing to its record. Its methods may be called from any thread."""

    backend: Literal["process", "container"] = "process"

    def __init__(self, given: Given, folder: Path) -> None:
        """Set up, without starting anything.

        Raises:
            ConfigError: the fleet or the scenario needs another backend.
        """
        check(given.fleet, given.scenario)
        self._given, self._folder = given, folder
        self._profiles = given.fleet.profiles()
        self._names = given.fleet.names()
        spare = given.fleet.scaled(**{name: SPARE * count for name, count in given.fleet.devices.items()})
        self._all = spare.names()
        self._links = Proxies()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._active = set(self._names)
        self._target: tuple[str, int] = ("127.0.0.1", 0)
        self._faults: list[FaultRecord] = []
        self._open_faults: dict[tuple[str, str], int] = {}
        self._points: list[Point] = []
        self._moments: dict[str, list[Moment]] = {name: [] for name in self._all}
        self._began_s = time.monotonic()
        self._view: JobView | None = None
        devices = [
            LocalDevice(
                id=name, data=self._data_of(name), profile=Path(profile) if "/" in profile else profile
            )
            for name, profile in self._all.items()
        ]
        self._fleet = LocalFleet(
            folder,
            devices,
            broker=self._broker(),
            fleet=given.fleet.fleet,
            profiles_dir=Path(given.fleet.profiles_dir) if given.fleet.profiles_dir else None,
            url_of=self._url_of,
            limits_of=self._limits_of,
            housed=self._housed,
            idle=self._all.keys() - self._names.keys(),
        )

    # --- life ----------------------------------------------------------------------------------

    def run(self, ready: Callable[[], None] = lambda: None) -> Record:
        """Start everything, run the job to its end, stop everything.

        Raises:
            LinkError: a process does not start, or ended by itself. TrainingError: it was stopped.
        """
        started_s = time.monotonic()
        happening = threading.Thread(target=self._happen, name="scenario", daemon=True)
        try:
            with self._fleet:
                self._started()
                self._fleet.client.jobs.create(self._given.text, self._given.base_dir)
                self._began_s = time.monotonic()
                happening.start()
                ready()
                record = self._watch()
                self._stop.set()
                happening.join()
            # Stopped: every agent has written its last words.
            seconds = round(time.monotonic() - started_s, 3)
            return with_ends(replace(record, wall_s=seconds, last_body_bytes=self._last_bodies()))
        finally:
            self._stop.set()
            self._links.close()

    def stop(self) -> None:
        """Let `run` end before the job does."""
        self._stop.set()

    def _watch(self) -> Record:
        client, job = self._fleet.client, self._given.job.name
        seen = 0
        while not self._stop.is_set():
            with contextlib.suppress(LinkError):  # it was killed on purpose, and comes back
                self._view = view = client.jobs.show(job)
                self._given.on_round(view)
                seen = self._evaluate(seen)
                if view.state in ENDED:
                    return self._record(view)
            self._look()
            with self._lock:
                self._fleet.require_alive()
            self._stop.wait(POLL_S)
        raise TrainingError("stopped before the job ended")

    def _look(self) -> None:
        """Note what the agents say they do."""
        at_s = round(time.monotonic() - self._began_s, 3)
        for name in self._active:
            status = self._fleet.status(name)
            what = status.get("phase") or "away"
            moments = self._moments[name]
            if not moments or moments[-1].what != what:
                moments.append(Moment(at_s=at_s, what=str(what)))

    def _evaluate(self, seen: int) -> int:
        if self._given.test is None:
            return seen
        from liberatai_core.learning.training import log_probabilities  # noqa: PLC0415 - imports torch

        client, job = self._fleet.client, self._given.job.name
        try:
            newest = max((one.version for one in client.models.log(job)), default=0)
        except NotFoundError:
            return seen
        if newest in (seen, 0):
            return seen
        figures: dict[str, float] = {}
        assigned = {one.device: one.structure for one in client.plan(job).assignments if one.structure}
        x, y = self._given.test
        for name, structure in sorted(
            {self._all[d]: s for d, s in assigned.items() if d in self._all}.items()
        ):
            if structure not in figures:
                made, data, content = client.models.weights(job, str(newest), structure)
                weights = np.frombuffer(content, dtype="<f4").copy()
                answers = log_probabilities(made, data, weights, x).argmax(axis=1)
                figures[structure] = float((answers == y).mean())
            moved = [self._links.moved(d) for d, profile in self._all.items() if profile == name]
            self._points.append(
                Point(
                    profile=name,
                    at_s=round(time.monotonic() - self._began_s, 3),
                    version=newest,
                    figure=figures[structure],
                    up_bytes=sum(up for up, _ in moved),
                    down_bytes=sum(down for _, down in moved),
                )
            )
        return newest

    # --- what a device is made of ----------------------------------------------------------------

    def _broker(self) -> str:
        return self._given.broker

    def _housed(self, agent: Process) -> Process:
        """Return what runs a device's agent."""
        return agent

    def _started(self) -> None:
        """Look at what was started, before the job begins."""

    def _data_of(self, name: str) -> Path:
        """Return a device's file; one beyond the file's number has that of another of its profile."""
        if name in self._given.data:
            return self._given.data[name]
        number = int(name.rpartition("-")[2])
        profile = self._all[name]
        return self._given.data[device_name(profile, 1 + (number - 1) % self._given.fleet.devices[profile])]

    def _url_of(self, device: str, url: str) -> str:
        host, _, port = url.rpartition("//")[2].rpartition(":")
        self._target = host, int(port)
        net = scenarios.network(
            self._given.scenario, device, self._profiles[self._all[device]].net, self._given.fleet.seed
        )
        random = Random(f"{self._given.fleet.seed}|{device}|line")  # noqa: S311 - a simulation
        scheme = url.partition("://")[0]
        return f"{scheme}://127.0.0.1:{self._links.add(device, net, random, lambda: self._target)}"

    def _limits_of(self, device: str) -> Callable[[], None] | None:
        return limits_of(self._profiles[self._all[device]], list(self._all).index(device))

    # --- what happens to it ----------------------------------------------------------------------

    def _happen(self) -> None:
        window, seed, waiting = 0, self._given.fleet.seed, list[Happening]()
        while not self._stop.is_set():
            waiting = sorted(waiting + scenarios.happenings(self._given.scenario, self._names, seed, window))
            window += 1
            until_s = window * scenarios.WINDOW_S
            while waiting and waiting[0].at_s < until_s:
                one = waiting.pop(0)
                if self._stop.wait(max(0.0, self._began_s + one.at_s - time.monotonic())):
                    return
                with contextlib.suppress(LiberataiError):
                    self.do(one)
            if self._stop.wait(max(0.0, self._began_s + until_s - time.monotonic())):
                return

    def fault(self, what: scenarios.What, device: str, for_s: float) -> None:
        """Make something happen now, and end it later.

        Raises:
            NotFoundError: no such device.
        """
        if device and device not in self._all:
            raise NotFoundError(f"no device {device!r} in this simulation")
        at_s = time.monotonic() - self._began_s
        self.do(Happening(at_s, what, device, 1.0))
        end = Happening(at_s + for_s, scenarios.ENDS[what], device, 1.0)
        timer = threading.Timer(for_s, self.do, (end,))
        timer.daemon = True
        timer.start()

    def do(self, one: Happening) -> None:
        """Make one happening happen."""
        with self._lock:
            if self._stop.is_set():
                return
            self._note(one)
            fleet = self._fleet
            match one.what:
                case "cut":
                    self._links.do(one.device, Proxy.cut)
                case "mend":
                    self._links.do(one.device, Proxy.mend)
                case "crash":
                    fleet.kill_agent(one.device)
                case "start" | "awake":
                    fleet.start_agent(one.device)
                case "asleep":
                    fleet.stop_agent(one.device)
                case "broker stops" if fleet.broker is not None:
                    fleet.broker.kill()
                    if one.value:
                        _forget(self._folder / "broker")
                case "broker starts" if fleet.broker is not None:
                    fleet.broker.restart()
                case "coordinator stops":
                    fleet.kill_coordinator()
                case "coordinator starts":
                    fleet.restart_coordinator()
                case _:
                    raise StateError(f"{one.what} needs backend: virtual")

    def _note(self, one: Happening) -> None:
        key = next((begin for begin, end in scenarios.ENDS.items() if end == one.what), None)
        if key is None:
            self._open_faults[one.what, one.device] = len(self._faults)
            self._faults.append(FaultRecord(at_s=round(one.at_s, 3), what=one.what, device=one.device))
        elif (number := self._open_faults.pop((key, one.device), None)) is not None:
            self._faults[number] = replace(self._faults[number], ended_s=round(one.at_s, 3))

    def scale(self, profile: str, count: int) -> tuple[int, int]:
        """Let so many devices of a profile run; returns how many were started and stopped.

        Raises:
            NotFoundError: the fleet has no such profile. ConfigError: more than it can be scaled to.
        """
        of = [name for name, its in self._all.items() if its == profile]
        if not of:
            raise NotFoundError(f"the fleet has no {profile!r}: {', '.join(self._given.fleet.devices)}")
        if not 0 <= count <= len(of):
            raise ConfigError(
                "scale", [f"{profile}={count}: 0 … {len(of)} (twice what the fleet's file says)"]
            )
        with self._lock:
            wanted, there = set(of[:count]), {name for name in of if name in self._active}
            for name in sorted(wanted - there):
                self._fleet.start_agent(name)
            for name in sorted(there - wanted):
                self._fleet.stop_agent(name)
            self._active = (self._active - set(of)) | wanted
        return len(wanted - there), len(there - wanted)

    def status(self) -> dict[str, Any]:
        """Return how it stands, for people and programs."""
        view = self._view
        counts: dict[str, int] = {}
        for name in self._active:
            counts[self._all[name]] = counts.get(self._all[name], 0) + self._fleet.is_running(name)
        ended = [one for one in view.rounds if one.state != "open"] if view else []
        return {
            "backend": self.backend,
            "scenario": self._given.scenario.name,
            "job": self._given.job.name,
            "state": view.state if view else "starting",
            "rounds": f"{len(ended)}/{self._given.job.rounds.count}",
            "running": counts,
            "faults": len(self._faults),
            "seconds": round(time.monotonic() - self._began_s, 1),
        }

    def _last_bodies(self) -> int:
        """Return the bytes of every device's newest sparse stream."""
        last = [self._fleet.status(name).get("last_training") or {} for name in self._all]
        return sum(int(one.get("update_bytes", 0)) for one in last)

    # --- the end -------------------------------------------------------------------------------

    def _record(self, view: JobView) -> Record:
        given, client = self._given, self._fleet.client
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
                    reason=one.reason,
                )
            )
        told = {one.id: one for one in client.devices.list()}
        devices = []
        for name, profile in self._all.items():
            if name not in told:
                continue
            up_bytes, down_bytes = self._links.moved(name)
            devices.append(
                DeviceRecord(
                    id=name,
                    profile=profile,
                    rounds=told[name].updates,
                    up_bytes=up_bytes,
                    down_bytes=down_bytes,
                    moments=tuple(self._moments[name]),
                )
            )
        try:
            versions = client.models.log(given.job.name)
        except NotFoundError:
            versions = ()
        newest = max(versions, key=lambda one: one.version, default=None)
        return Record(
            fleet=given.fleet.fleet,
            backend=self.backend,
            scenario=given.scenario.name,
            description=given.scenario.description,
            seed=given.fleet.seed,
            job=given.job.name,
            state=view.state,
            reason=view.reason or "",
            job_s=round(time.monotonic() - self._began_s, 3),
            wall_s=0.0,
            known=len(told),
            updates=sum(one.rounds for one in devices),
            lost=unaccounted(devices, view),
            up_bytes=sum(one.up_bytes for one in devices),
            down_bytes=sum(one.down_bytes for one in devices),
            digests=dict(newest.digests) if newest else {},
            file_bytes=dict(newest.bytes) if newest else {},
            rounds=tuple(rounds),
            devices=tuple(devices),
            faults=tuple(self._faults),
            points=tuple(self._points),
        )


def unaccounted(devices: Sequence[DeviceRecord], view: JobView) -> int:
    """Return how many stored updates, by the devices' counts, are in no round that ended."""
    return sum(one.rounds for one in devices) - sum(one.updates for one in view.rounds if one.state != "open")


def _forget(folder: Path) -> None:
    """Let a broker forget what it kept."""
    for path in folder.rglob("mosquitto.db*"):
        path.unlink(missing_ok=True)
