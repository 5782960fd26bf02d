"""kill -9 of the coordinator at hundreds of random moments: nothing lost, nothing doubled, no other weights.

    python -m benchmarks.kills --kills 500 --seed 0

The coordinator is a real process with its ledger on a disk (`kills_coordinator`). Simulated devices
(`fleet_devices`) keep every update until it has a receipt, and repeat it. Several jobs at a time are created,
run, are aborted and end; half of them are buffered. Every kill falls into a moment that is drawn: any time,
right after a start, or a little after a job was created, aborted, had its last update, or got a version (then
it is published and the ledger is pruned). At a part of the kills the broker loses what it holds, too.

Claims checked at the end, from the ledger: every update with a receipt is counted in one version or listed in
an abandoned round (`lost`, `doubled`); the weights of every version of a synchronous job are those of a job
that was never disturbed, in the same run (`other_weights`); what was promised of jobs holds
(`jobs_forgotten`), none has failed (`jobs_failed`), and no task stands at a device when all jobs have ended
(`tasks_left`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import select
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.fleet_devices import Devices
from benchmarks.fleet_link import Exchange
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_core.contract.messages import Cancel, Receipt, Task
from liberatai_core.errors import LiberataiError, LinkError
from liberatai_core.structure import DataContract

ROOT: Final = Path(__file__).resolve().parent.parent
FLEET: Final = "kills"
DATA: Final = DataContract(input_shape=(1, 4, 4), classes=3)
DEVICES: Final = 3
MOST_ROUNDS: Final = 4
JOBS_AT_A_TIME: Final = 3
LIMIT_S: Final = 120.0
"""Without any news for so long, the run has failed: something hangs."""

MODES: Final = {
    "synchronous": "target: 3, overselect: 1.0, quorum: 1.0",
    "buffered": "mode: buffered, target: 3, buffer: 2",
}
JOB: Final = """
name: {name}
data: {{input_shape: [1, 4, 4], classes: 3}}
structures: [{{family: mlp, params: {{hidden: 6}}}}]
rounds: {{count: {rounds}, min_devices: 3, deadline_s: 3600, {mode}}}
sparsify: {{up_density: 0.3, down_density: 0.3, final_density: 0.3}}
"""
# The last version of a job is like any other (final_density), and no seed depends on its name: so the
# versions of all synchronous jobs are the same, if they count the updates of all devices.

Moment = Literal["any", "restart", "create", "abort", "end", "publish"]
MOMENTS: Final[dict[Moment, tuple[float, float]]] = {
    "any": (0.0, 0.8),
    "restart": (0.0, 0.3),
    "create": (0.0, 0.05),
    "abort": (0.0, 0.15),
    "end": (0.0, 0.1),
    "publish": (0.0, 0.05),
}
"""How long after what they are named after the kills come, in seconds (from, to)."""
PATIENCE_S: Final = 3.0
"""What a kill waits for may not happen; then it comes anyway."""


def main() -> int:
    """Run, print a table and one JSON object; exit code 0 only if every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for all files, kept [default: a temporary one]")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="liberatai-kills-") as temporary:
        folder = given.folder or Path(temporary)
        expected = asyncio.run(undisturbed(folder / "calm", given.seed))
        run = Run(folder / "wild", random.Random(given.seed), given.seed)
        asyncio.run(run.disturbed(given.kills))
        audited = audit(run, expected)
    result = {
        "benchmark": "kills",
        "seed": given.seed,
        "kills": sum(run.moments.values()),
        "moments": dict(sorted(run.moments.items())),
        **audited,
        "broker_lost": run.broker_lost,
        "repeated": run.devices.repeated,
        "seconds": round(time.monotonic() - started, 1),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    for name, value in result.items():
        print(f"{name:>16}  {value}")
    print(json.dumps(result))
    return 1 if any(result[name] for name in CLAIMS) else 0


CLAIMS: Final = ("lost", "doubled", "other_weights", "jobs_forgotten", "jobs_failed", "tasks_left")


# --- the coordinator's process --------------------------------------------------------------------


class Coordinator:
    """Starts and kills it."""

    def __init__(self, folder: Path) -> None:
        self.state, self.exchange = folder / "state", folder / "exchange.sock"
        self.log = folder / "coordinator.log"
        self.state.mkdir(parents=True)
        settings = folder / "coordinator.yaml"
        settings.write_text(json.dumps({"fleet": FLEET, "state_dir": str(self.state), "enrolment": "open"}))
        command = [sys.executable, "-m", "benchmarks.kills_coordinator", "--settings", str(settings)]
        command += ["--exchange", str(self.exchange), "--log", str(self.log)]
        self._starter = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._process: int | None = None

    def start(self) -> None:
        """Start it."""
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        self._starter.stdin.write("start\n")
        self._starter.stdin.flush()
        self._process = os.pidfd_open(int(self._starter.stdout.readline()))

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            select.select([self._process], [], [])
            os.close(self._process)
            self._process = None

    def close(self) -> None:
        """End everything."""
        self.kill()
        self._starter.kill()
        self._starter.communicate()

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and bool(select.select([self._process], [], [], 0)[0])

    async def ask(self, question: Callable[[Client], Any]) -> Any:
        """Ask the API in a thread; None: nobody answered, and it may have been done or not."""

        def asked() -> Any:
            return question(Client(self.state / "api.sock", timeout_s=LIMIT_S))

        try:
            return await asyncio.to_thread(asked)
        except LinkError:
            return None


# --- the devices ----------------------------------------------------------------------------------


class Answering(Devices):
    """Devices that answer every task, and keep the update until its receipt is there.

    Attributes:
        outbox: updates without a receipt.
        accepted: ids of updates with one.
        refused: how many updates were refused for good, by code.
        answered: how many devices have sent an update of (job, round).
        slots: what stands at every device: a Task, or the Cancel of the job.
        repeated: how many times an update was sent again.
    """

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed, FLEET, DATA)
        self.outbox: dict[bytes, tuple[str, bytes]] = {}
        self.accepted: set[bytes] = set()
        self.refused: Counter[str] = Counter()
        self.answered: Counter[tuple[str, int]] = Counter()
        self.slots: dict[str, Task | Cancel] = {}
        self.repeated = 0
        self.exchange: Exchange
        self._done: set[bytes] = set()
        self._busy: set[bytes] = set()

    def receive(self, topic: str, payload: bytes) -> None:
        """Note what the coordinator says, and answer."""
        super().receive(topic, payload)
        if self.trusts:
            self.read()

    def took(self, message: Task | Cancel | Receipt, came_s: float) -> None:
        """Do what an agent does."""
        super().took(message, came_s)
        match message:
            case Task():
                self.slots[message.device] = message
                if message.task_id not in self._done:
                    self._done.add(message.task_id)
                    self.outbox[message.task_id] = self.answer(message)
                    self.exchange.publish(*self.outbox[message.task_id])
                    self.answered[message.job, message.round] += 1
            case Cancel():
                self.slots[message.device] = message
            case Receipt(update_id=name, accepted=True):
                self.accepted.add(name)
                self.outbox.pop(name, None)
            case Receipt(update_id=name, retry=True):
                if name in self.outbox and name not in self._busy:
                    self._busy.add(name)
                    asyncio.get_running_loop().call_later(0.2, self._again, name)
            case Receipt(update_id=name):
                if self.outbox.pop(name, None) is not None:
                    self.refused[message.code] += 1

    def repeat(self) -> None:
        """Send everything that has no receipt; as when the coordinator says that it is there again."""
        for name in list(self.outbox):
            self._again(name)

    def _again(self, name: bytes) -> None:
        self._busy.discard(name)
        if name in self.outbox:
            self.repeated += 1
            self.exchange.publish(*self.outbox[name])


# --- jobs and kills -------------------------------------------------------------------------------


@dataclass
class Known:
    """What the driver knows of a job.

    Attributes:
        created: the coordinator has said so.
        aborted: the same of its end; `asked` before it.
    """

    name: str
    rounds: int
    mode: str
    created: bool = False
    asked: bool = False
    aborted: bool = False
    ended: bool = False


@dataclass
class Run:
    """One coordinator's life, with all its deaths."""

    folder: Path
    draw: random.Random
    seed: int
    jobs: dict[str, Known] = field(default_factory=dict)
    moments: Counter[str] = field(default_factory=Counter)
    broker_lost: int = 0
    devices: Answering = field(init=False)
    coordinator: Coordinator = field(init=False)
    exchange: Exchange = field(init=False)

    def __post_init__(self) -> None:
        self.devices = Answering(DEVICES, self.seed)
        self.coordinator = Coordinator(self.folder)
        self.exchange = self.devices.exchange = Exchange(self.devices.receive)

    async def open(self) -> None:
        """Start everything."""
        await self.exchange.open(self.coordinator.exchange)
        for topic, frame in self.devices.introductions():
            self.exchange.publish(topic, frame, retain=True)
        self.coordinator.start()
        await self.ready()

    async def close(self) -> None:
        """End everything."""
        self.coordinator.close()
        await self.exchange.close()

    async def ready(self) -> None:
        """Wait until the coordinator answers."""
        health = await self.until(lambda client: client.health(), "answer")
        self.devices.trust(bytes.fromhex(health["public_key"]))

    async def until(self, question: Callable[[Client], Any], what: str) -> Any:
        """Ask until there is an answer that is true."""
        ends = time.monotonic() + LIMIT_S
        while time.monotonic() < ends:
            found = await self.coordinator.ask(question)
            if found:
                return found
            if self.coordinator.ended:
                raise SystemExit(f"the coordinator has ended by itself:\n{self.tail()}")
            await asyncio.sleep(0.02)
        raise SystemExit(f"no {what} within {LIMIT_S:.0f} s:\n{self.tail()}")

    def tail(self) -> str:
        """Return the end of the coordinator's log."""
        return "\n".join(self.coordinator.log.read_text(errors="replace").splitlines()[-30:])

    async def disturbed(self, kills: int) -> None:
        """Kill again and again, then let all jobs end."""
        await self.open()
        for number in range(kills):
            moment = self.draw.choice([*MOMENTS, "abort"])
            await self._wait_for(moment)
            self.coordinator.kill()
            self.moments[moment] += 1
            if self.draw.random() < 0.2:
                self.exchange.forget()
                self.broker_lost += 1
            await asyncio.sleep(self.draw.uniform(0.0, 0.02))
            self.coordinator.start()
            repeating = asyncio.create_task(self._repeat())
            if moment != "restart" and self.draw.random() < 0.7:
                await self.ready()
                await self._keep_jobs()
            await repeating
            if (number + 1) % 50 == 0:
                print(f"  {number + 1} kills, {len(self.jobs)} jobs", file=sys.stderr, flush=True)
        await self.ready()
        for job in list(self.jobs.values()):
            await self.create(job)
        await self.until(self.ended, "end of all jobs")
        await self.exchange.all_taken()
        await self._drained()
        await self.close()

    async def _repeat(self) -> None:
        """Let devices repeat their updates once the coordinator is connected."""
        try:
            await asyncio.wait_for(self.exchange.connected.wait(), PATIENCE_S)
        except TimeoutError:
            return
        self.devices.repeat()

    async def _wait_for(self, moment: Moment) -> None:
        """Return at a random time after something has happened."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._happened(moment)
        except TimeoutError:
            pass
        await asyncio.sleep(self.draw.uniform(*MOMENTS[moment]))

    async def _happened(self, moment: Moment) -> None:
        devices = self.devices
        match moment:
            case "create":
                asking = asyncio.create_task(self.create(self._new()))
                _KEPT.add(asking)
                asking.add_done_callback(_KEPT.discard)
            case "abort":
                live = [job for job in self.jobs.values() if job.created and not job.asked and not job.ended]
                if live:
                    asking = asyncio.create_task(self._abort(self.draw.choice(live)))
                    _KEPT.add(asking)
                    asking.add_done_callback(_KEPT.discard)
            case "end":
                ends = {(job.name, job.rounds) for job in self.jobs.values()}
                before = sum(devices.answered[end] for end in ends)
                await devices.until(lambda: sum(devices.answered[end] for end in ends) > before, LIMIT_S, "")
            case "publish":
                before = len(devices.heads)
                await devices.until(lambda: len(devices.heads) > before, LIMIT_S, "")
            case _:
                pass

    async def _keep_jobs(self) -> None:
        """Let a few jobs be under way."""
        shown = await self.coordinator.ask(lambda client: client.jobs.list())
        if shown is None:
            return
        self._note_states(shown)
        live = [job for job in self.jobs.values() if not job.ended and not job.asked]
        for job in live:
            if not job.created:
                await self.create(job)
        while len(live) < JOBS_AT_A_TIME:
            live.append(self._new())
            await self.create(live[-1])

    def _new(self) -> Known:
        number = len(self.jobs) + 1
        mode = self.draw.choice(list(MODES))
        job = Known(name=f"j{number:05}", rounds=self.draw.randint(2, MOST_ROUNDS), mode=mode)
        self.jobs[job.name] = job
        return job

    async def create(self, job: Known) -> None:
        """Create a job, unless the coordinator has said that it is there."""
        if job.created:
            return
        text = JOB.format(name=job.name, rounds=job.rounds, mode=MODES[job.mode])
        try:
            made = await self.coordinator.ask(lambda client: client.jobs.create(text, str(self.folder)))
        except LiberataiError as error:
            # Asked before a kill, done, and never answered.
            if "exist" not in str(error):
                raise
            made = True
        job.created = job.created or made is not None

    async def _abort(self, job: Known) -> None:
        job.asked = True
        with contextlib.suppress(LiberataiError):  # it has ended meanwhile
            job.aborted = await self.coordinator.ask(lambda client: client.jobs.abort(job.name)) is not None
        job.asked = job.aborted

    def ended(self, client: Client) -> bool:
        """Return whether all jobs have ended."""
        shown = client.jobs.list()
        self._note_states(shown)
        return all(job.ended for job in self.jobs.values() if job.created)

    def _note_states(self, shown: Any) -> None:
        for view in shown:
            if view.state in {"finished", "aborted", "failed"}:
                self.jobs[view.name].ended = True

    async def _drained(self) -> None:
        """Wait until every device has its last receipt."""
        ends = time.monotonic() + LIMIT_S
        while self.devices.outbox and time.monotonic() < ends:
            self.devices.repeat()
            await asyncio.sleep(0.2)
        if self.devices.outbox:
            raise SystemExit(f"{len(self.devices.outbox)} updates get no receipt:\n{self.tail()}")


_KEPT: set["asyncio.Task[None]"] = set()
"""Requests that are under way when the coordinator dies."""


async def undisturbed(folder: Path, seed: int) -> dict[int, dict[str, str]]:
    """Return the digests of every version of a job that nothing disturbs."""
    run = Run(folder, random.Random(seed), seed)
    await run.open()
    names = ("calm", "calm-too")
    for name in names:
        job = run.jobs[name] = Known(name=name, rounds=MOST_ROUNDS, mode="synchronous")
        await run.create(job)
    await run.until(run.ended, "end of the undisturbed jobs")
    found = await run.until(lambda client: [client.models.log(name) for name in names], "versions")
    await run.close()
    one, other = ({view.version: dict(view.digests) for view in views} for views in found)
    if one != other or len(one) != MOST_ROUNDS + 1:
        raise SystemExit(f"two undisturbed jobs are not alike: {one}, {other}")
    return one


def audit(run: Run, expected: dict[int, dict[str, str]]) -> dict[str, Any]:
    """Compare what the ledger says in the end with what was promised."""
    counted: Counter[str] = Counter()
    versions = other = 0
    ledger = Ledger.open(run.coordinator.state)
    try:
        rows = {row.name: row for row in ledger.jobs.all()}
        for name in rows:
            for version in ledger.versions.all(name):
                manifest = decode_manifest(version.manifest)
                counted.update(manifest.updates)
                versions += 1
                if run.jobs[name].mode == "synchronous":
                    digests = {sid: record.digest for sid, record in manifest.structures.items()}
                    other += digests != expected[version.number]
            for row in ledger.rounds.all(name):
                if row.state == "abandoned":
                    counted.update(update.hex() for update in row.frozen)
    finally:
        ledger.close()
    accepted = {name.hex() for name in run.devices.accepted}
    states = {name: row.state for name, row in rows.items()}
    forgotten = [
        job.name
        for job in run.jobs.values()
        if (job.created and job.name not in states) or (job.aborted and states[job.name] != "aborted")
    ]
    return {
        "lost": len(accepted - set(counted)),
        "doubled": sum(times > 1 for times in counted.values()),
        "other_weights": other,
        "jobs_forgotten": len(forgotten),
        "jobs_failed": sum(state == "failed" for state in states.values()),
        "tasks_left": sum(isinstance(slot, Task) for slot in run.devices.slots.values()),
        "jobs": dict(sorted(Counter(states.values()).items())),
        "versions": versions,
        "updates": len(accepted),
        "refused": dict(run.devices.refused),
    }


if __name__ == "__main__":
    sys.exit(main())
