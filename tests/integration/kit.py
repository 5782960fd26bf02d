"""A coordinator over the in-memory link, and scripted devices that speak real frames."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.intake.fencing import presence_frame
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.runner import Runner
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_core.compressor.artifact import restore
from liberatai_core.contract.frame import Signer, decode_spec, open_frame, seal
from liberatai_core.contract.messages import (
    Cancel,
    Capability,
    Event,
    Message,
    Receipt,
    State,
    Step,
    Task,
    TaskSpec,
    Update,
    update_id,
    weights_name,
)
from liberatai_core.contract.topics import Topics, blob_id, parse
from liberatai_core.errors import LinkError
from liberatai_core.link.link import Connected, Received, Will
from liberatai_core.link.memory import MemoryBroker, MemoryLink
from liberatai_core.sparsifier.top_k import densify, init, sparsify
from liberatai_core.structure import DataContract
from liberatai_core.weights import digest

FLEET = "test"
COORDINATOR_KEY = b"c" * 32
DATA = DataContract(input_shape=(1, 4, 4), classes=3)

JOB = """
name: tiny
data: {input_shape: [1, 4, 4], classes: 3}
structures: [{family: mlp, params: {hidden: 8}}]
rounds: {count: %(rounds)d, min_devices: %(devices)d, quorum: %(quorum)s, deadline_s: %(deadline_s)s}
sparsify: {up_density: 0.3, down_density: 0.3}
"""


def job_yaml(*, rounds: int = 2, devices: int = 3, quorum: float = 1.0, deadline_s: float = 60) -> str:
    return JOB % {"rounds": rounds, "devices": devices, "quorum": quorum, "deadline_s": deadline_s}


@contextlib.asynccontextmanager
async def coordinator(broker: MemoryBroker, folder: Path) -> AsyncIterator[Service]:
    """Run a coordinator on this folder; leaving ends it as a crash would: without a goodbye."""
    ledger = Ledger.open(folder)
    config = CoordinatorConfig(fleet=FLEET, state_dir=str(folder), enrolment="open")
    signer = Signer.from_seed(COORDINATOR_KEY, FLEET)
    topics = Topics(fleet=FLEET)
    will = Will(topic=topics.coordinator("co1"), payload=presence_frame(signer, "co1", ledger.epoch, "lost"))
    link = MemoryLink(broker, "co1", will=will)
    service = Service(
        config=config,
        link=link,
        ledger=ledger,
        repository=Repository(folder),
        signer=signer,
        fleet=Fleet(enrolment="open"),
        publisher=Publisher(link=link, signer=signer, topics=topics),
        topics=topics,
    )
    running = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        broker.kill("co1")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        ledger.close()


@dataclass
class ScriptedDevice:
    """A device that trains by adding seeded noise: real frames, no torch, every message recorded.

    It forgets no file, and remembers the path of its last update, as an agent does.
    """

    broker: MemoryBroker
    name: str
    samples: int = 10
    answers: bool = True
    storage_bytes: int = 100_000
    runtimes: tuple[str, ...] = ()
    path: tuple[Step, ...] = ()
    link_bits_s: tuple[float, float] | None = None
    made: int = 0
    receipts: list[Receipt] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    views: dict[bytes, np.ndarray] = field(default_factory=dict)
    sent: dict[int, bytes] = field(default_factory=dict)
    done: dict[int, bytes] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.topics = Topics(fleet=FLEET)
        self.signer = Signer.from_seed(self.name.encode().ljust(32, b"-"), FLEET)
        self.coordinator_key = Signer.from_seed(COORDINATOR_KEY, FLEET).public_key
        self.link = MemoryLink(self.broker, self.name)
        self.blobs: dict[str, bytes] = {}

    async def run(self) -> None:
        await self.link.subscribe(*self.topics.to_device(self.name))
        await self.link.open()
        async for event in self.link.events():
            # A connection may break while we answer; what comes after the next one asks again.
            with contextlib.suppress(LinkError):
                if isinstance(event, Received):
                    await self._received(event)
                    self.link.ack(event.token)
                elif isinstance(event, Connected):
                    await self._introduce()

    async def say(self, topic: str, message: Message, *, retain: bool = False) -> None:
        await self.link.publish(topic, seal(message, self.signer), retain=retain)

    async def _introduce(self) -> None:
        caps = Capability(
            device=self.name,
            public_key=self.signer.public_key,
            session=1,
            agent_version="test",
            tier="full",
            storage_bytes=self.storage_bytes,
            memory_bytes=2**30,
            runtimes=self.runtimes,
            samples=self.samples,
            data=DATA,
            up_bits_s=self.link_bits_s[0] if self.link_bits_s else None,
            down_bits_s=self.link_bits_s[1] if self.link_bits_s else None,
            link_measured=self.link_bits_s is not None,
        )
        await self.say(self.topics.up(self.name, "caps"), caps, retain=True)
        await self.say(
            self.topics.up(self.name, "state"),
            State(device=self.name, state="online", session=1),
            retain=True,
        )

    async def _received(self, event: Received) -> None:
        if not event.payload:
            return
        if parse(event.topic, FLEET).leaf == "b":
            self.blobs[blob_id(event.payload)] = event.payload
            if self.tasks:
                await self._answer(self.tasks[-1])
            self.changed.set()
            return
        opened = open_frame(event.payload, FLEET, lambda _: self.coordinator_key)
        match opened.message:
            case Task() as task:
                self.tasks.append(task)
                if task.held and self.joined(task.held, task.steps) is None:
                    missing = Event(device=self.name, session=1, number=1, name="base_missing", code="E_BASE")
                    await self.say(self.topics.up(self.name, "ev"), missing)
                    return
                needed = [task.spec.blob, *(step.blob.blob for step in task.steps)]
                await self.link.subscribe(*(self.topics.blob(b, 0) for b in needed if b not in self.blobs))
                await self._answer(task)
            case Receipt() as receipt:
                self.receipts.append(receipt)
            case Cancel() as cancel:
                self.cancels.append(cancel)
        self.changed.set()

    def joined(self, held: bytes, steps: tuple[Step, ...]) -> tuple[Step, ...] | None:
        """Return the files that lead to where these steps lead, None if what they go on from is not here."""
        if not held:
            return steps
        names = [step.digest for step in self.path]
        return (*self.path[: names.index(held) + 1], *steps) if held in names else None

    def spec(self, task: Task) -> TaskSpec:
        return decode_spec(self.blobs[task.spec.blob])

    async def _answer(self, task: Task) -> None:
        path = self.joined(task.held, task.steps)
        ready = path is not None and task.spec.blob in self.blobs
        if not self.answers or path is None or not ready or any(s.blob.blob not in self.blobs for s in path):
            return
        if self.done.get(task.round) != task.task_id or task.round not in self.sent:
            self.sent[task.round] = seal(self.train(task), self.signer)
            self.done[task.round] = task.task_id
            self.path = path
        await self.link.publish(self.topics.upload(self.name, "a" * 26), self.sent[task.round])

    def base(self, task: Task) -> np.ndarray:
        """Return the weights that a task names; every file on the way is checked against its name."""
        path, structure = self.joined(task.held, task.steps), self.spec(task).structure
        assert path
        weights = restore(self.blobs[path[0].blob.blob], structure)
        assert weights_name(digest(weights)) == path[0].digest
        for step in path[1:]:
            weights = (weights + densify(self.blobs[step.blob.blob], structure)).astype(np.float32)
            assert weights_name(digest(weights)) == step.digest
        assert path[-1].digest == task.base
        return weights

    def train(self, task: Task) -> Update:
        base, spec = self.base(task), self.spec(task)
        noise = np.random.default_rng([task.round, len(self.name), ord(self.name[-1])])
        difference = noise.normal(0, 0.01, len(base)).astype(np.float32)
        _, body = sparsify(init(len(base)), difference, spec.structure, task.density)
        self.made += 1
        return Update(
            update_id=update_id(self.name, task.job, task.round, task.base, task.run),
            device=self.name,
            job=task.job,
            round=task.round,
            epoch=task.epoch,
            structure=spec.structure.id,
            base=task.base,
            samples=self.samples,
            codec=spec.codec,
            body=body,
            class_counts=(4, 3, 3),
            sent_bytes=1000 * self.made,
            received_bytes=100 * self.made,
        )


@contextlib.asynccontextmanager
async def devices(broker: MemoryBroker, *names: str) -> AsyncIterator[list[ScriptedDevice]]:
    made = [ScriptedDevice(broker, name) for name in names]
    running = [asyncio.create_task(device.run()) for device in made]
    try:
        yield made
    finally:
        for device, task in zip(made, running, strict=True):
            await device.link.close()
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until a condition holds; fails with what was waited for."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def ended(service: Service, job: str = "tiny") -> bool:
    """Whether nothing runs for a job any more: it came to its end, or its task did."""
    running = service.jobs._running.get(job)
    return running is None or running.done()


async def runner_of(service: Service, job: str = "tiny") -> Runner:
    """Return the runner of a finished job, as it is read back when a device asks for it."""
    runner = await service.jobs._recall(service.ledger.jobs.get(job))
    runner.roster.recall_rounds()
    return runner


def decode(frame: bytes) -> Message:
    opened = open_frame(frame, FLEET, lambda _: Signer.from_seed(COORDINATOR_KEY, FLEET).public_key)
    return opened.message


def replaced(message: Update, **changes: object) -> Update:
    return msgspec.structs.replace(message, **changes)
