"""The agent over the in-memory link, against a scripted coordinator that speaks real frames."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from liberatai_agent.children.messages import Work
from liberatai_agent.children.trainer import Trainer
from liberatai_agent.config import AgentConfig, GateSettings
from liberatai_agent.events import ResidualFile, Returned, TrainingResult
from liberatai_agent.machine import probe
from liberatai_agent.service import Service
from liberatai_agent.store.status import read_status
from liberatai_core.compressor.codebook import compress
from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Signer, encode_spec, open_frame, seal
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_SINGLE_BYTES
from liberatai_core.contract.messages import (
    BlobManifest,
    BlobRef,
    Cancel,
    Capability,
    CoordinatorState,
    Credit,
    EpochSeen,
    Event,
    Message,
    Offer,
    Receipt,
    Report,
    SessionSeen,
    State,
    Step,
    Task,
    TaskSpec,
    Training,
    Update,
    update_id,
    weights_name,
)
from liberatai_core.contract.topics import Place, Topics, blob_id, parse
from liberatai_core.errors import LockedError
from liberatai_core.link.link import Received
from liberatai_core.link.memory import MemoryBroker, MemoryLink
from liberatai_core.sparsifier import top_k
from liberatai_core.structure import DataContract, Structure, Tensor
from liberatai_core.weights import digest

Kind = TypeVar("Kind")
FLEET, DEVICE = "test", "dev-a"
SIGNER = Signer.from_seed(b"c" * 32, FLEET)
STRANGER = Signer.from_seed(b"x" * 32, FLEET)
DATA = DataContract(input_shape=(4,), classes=3)
SHAPELESS = Structure(family="mlp", params={"hidden": 1}, tensors=(Tensor(name="w", shape=(64,)),))
SPEC = TaskSpec(job="job", structure=SHAPELESS, data=DATA)


REAL_PROBE = (
    "test_an_agent_introduces_itself_works_and_says_goodbye",
    "test_a_fault_in_the_data_is_reported_and_heals_when_the_file_is_mended",
)


class Coordinator:
    """Publishes what it is told to, and remembers everything that devices say."""

    def __init__(self, broker: MemoryBroker, epoch: int = 1) -> None:
        self.broker, self.epoch = broker, epoch
        self.topics = Topics(fleet=FLEET)
        self.link = MemoryLink(broker, "co1")
        self.heard: list[Message] = []
        self.changed = asyncio.Event()
        self.raw: list[tuple[Place, bytes]] = []

    async def __aenter__(self) -> Self:
        await self.link.subscribe(*self.topics.from_devices)
        await self.link.open()
        self.running = asyncio.create_task(self.listen())
        await self.until(lambda: "co1" in self.broker.connected)
        await self.presence("online")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.running.cancel()
        await self.link.close()

    async def listen(self) -> None:
        keys: dict[bytes, bytes] = {}
        async for event in self.link.events():
            if isinstance(event, Received):
                place = parse(event.topic, FLEET)
                self.raw.append((place, event.payload))
                if place.part is None:
                    opened = open_frame(event.payload, FLEET, keys.get)
                    if isinstance(opened.message, Capability):
                        keys[hashlib.sha256(opened.public_key).digest()[:8]] = opened.public_key
                    self.heard.append(opened.message)
                self.link.ack(event.token)
            self.changed.set()

    async def until(self, condition: Callable[[], object], timeout: float = 90.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                self.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), 0.02)
                assert not self.running.done(), self.running

    def all(self, kind: type[Kind]) -> list[Kind]:
        return [message for message in self.heard if isinstance(message, kind)]

    async def first(self, kind: type[Kind], number: int = 1, **wanted: object) -> Kind:
        def found() -> list[Kind]:
            return [m for m in self.all(kind) if all(getattr(m, k) == v for k, v in wanted.items())]

        await self.until(lambda: len(found()) >= number)
        return found()[number - 1]

    async def say(
        self, topic: str, message: Message, *, retain: bool = True, signer: Signer = SIGNER
    ) -> None:
        await self.link.publish(topic, seal(message, signer), retain=retain)

    async def presence(self, state: Literal["online", "offline", "lost"]) -> None:
        message = CoordinatorState(coordinator="co1", state=state, epoch=self.epoch)
        await self.say(self.topics.coordinator("co1"), message)

    async def blob(self, content: bytes) -> BlobRef:
        name = blob_id(content)
        for number in range(chunks.count(len(content), CHUNK_BYTES)):
            part = chunks.cut(content, number, CHUNK_BYTES)
            await self.link.publish(self.topics.blob(name, number), part, retain=True)
        if len(content) > CHUNK_BYTES:
            await self.say(self.topics.blob(name), BlobManifest(blob=name, size_bytes=len(content)))
        return BlobRef(blob=name, size_bytes=len(content))

    async def task(
        self,
        *steps: Step,
        number: int = 1,
        held: bytes = b"",
        spec: TaskSpec = SPEC,
        **changes: Any,
    ) -> Task:
        base = steps[-1].digest if steps else held
        fields: dict[str, Any] = {
            "task_id": update_id(DEVICE, "job", number, base),
            "spec": await self.blob(encode_spec(spec)),
            "density": 0.05,
            "held": held,
            "steps": steps,
            "epoch": self.epoch,
            "coordinator": "co1",
            "device": DEVICE,
            "job": "job",
            "round": number,
        }
        task = Task(**(fields | changes))
        await self.say(self.topics.down(DEVICE, "task"), task)
        return task

    async def receipt(
        self, update: Update, *, signer: Signer = SIGNER, accepted: bool = True, **changes: Any
    ) -> None:
        message = Receipt(device=DEVICE, update_id=update.update_id, accepted=accepted, **changes)
        await self.say(self.topics.down(DEVICE, "xa"), message, retain=False, signer=signer)


class QuickTrainer(Trainer):
    """Answers at once with a body of a wished length: the real process has its own tests."""

    def __init__(self, body_bytes: int = 50) -> None:
        super().__init__(60.0)
        self.body = b"b" * body_bytes
        self.dropped: tuple[str, str] | None = None
        self.works: list[Work] = []
        self.residuals: list[bytes | None] = []
        self.hold: asyncio.Event | None = None
        self.changes: dict[str, Any] = {}

    async def warm(self, runtime: Any = "torch") -> None:
        pass

    async def train(self, work: Work) -> TrainingResult:
        self.works.append(work)
        if self.hold is not None:
            await self.hold.wait()
        before = work.residual_from
        self.residuals.append(None if before is None else Path(before.path).read_bytes())
        after = f"after {work.round}".encode()
        Path(work.residual_to).touch(mode=0o600)
        Path(work.residual_to).write_bytes(after)
        result = TrainingResult(
            body=self.body + bytes([work.round]),
            residual_file=ResidualFile(path=work.residual_to, sha256=hashlib.sha256(after).digest()),
            returned=tuple(one.update_id for one in work.returned),
            dropped=self.dropped,
            samples=5,
            train_seconds=0.1,
            loss=0.5,
        )
        return replace(result, **self.changes)


def a_config(folder: Path, **changes: Any) -> AgentConfig:
    data = folder / "private.npz"
    if not data.exists():
        random = np.random.default_rng(0)
        np.savez(data, x=random.random((60, 4), np.float32), y=np.arange(60) % 3)
    fields: dict[str, Any] = {
        "fleet": FLEET,
        "device": DEVICE,
        "coordinator_key": SIGNER.public_key.hex(),
        "state_dir": str(folder / "state"),
        "data": str(data),
        "gate": GateSettings(min_battery_percent=None, max_temp_c=None, min_free_memory_mb=None),
        "telemetry_s": 3600.0,
    }
    return AgentConfig(**(fields | changes))


@contextlib.asynccontextmanager
async def an_agent(
    broker: MemoryBroker,
    config: AgentConfig,
    trainer: Trainer | None = None,
    *,
    die: bool = False,
    blob_timeout_s: float = 60.0,
) -> AsyncIterator[Service]:
    service = Service(
        config,
        lambda will: MemoryLink(broker, config.device, will),
        trainer=trainer or QuickTrainer(),
        blob_timeout_s=blob_timeout_s,
    )
    running = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        if die:
            # As kill -9 does, as far as one process can: nothing is said and nothing is stored.
            broker.kill(config.device)
            running.cancel()
        else:
            service.stop()
        await asyncio.gather(running, return_exceptions=True)
        if not die:
            running.result()


async def a_keyframe(coordinator: Coordinator, content: bytes = b"keyframe" * 10) -> Step:
    return Step(version=0, blob=await coordinator.blob(content), digest=b"d" * 16)


@pytest.fixture(autouse=True)
def no_bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process of the probe takes a second per start; two tests run it."""
    if request.node.name not in REAL_PROBE:
        found = {
            "families": ["mlp"],
            "gflops": 1.0,
            "data": {"samples": 60, "input_shape": [4], "classes": 3},
        }

        async def run_bench(*_: object) -> dict[str, Any]:
            return found

        monkeypatch.setattr(probe, "_run_bench", run_bench)


def status_file(folder: Path) -> dict[str, Any]:
    found = read_status(folder / "state")
    assert found is not None
    return found


def scenario(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Run an async test in a loop of its own."""

    def run(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 120))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@scenario
async def test_an_agent_introduces_itself_works_and_says_goodbye(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker) as co:
        async with an_agent(broker, a_config(tmp_path)) as agent:
            caps = await co.first(Capability)
            assert (caps.tier, caps.samples, caps.data) == ("full", 60, DATA)
            assert (await co.first(State, state="online")).session == caps.session == 1
            await co.first(Report, phase="idle")
            task = await co.task(await a_keyframe(co))
            update = await co.first(Update)
            assert (update.update_id, update.base, update.samples) == (task.task_id, b"d" * 16, 5)
            assert update.sent_bytes > 0
            await co.receipt(update)
            await co.until(lambda: not agent._outbox.unsent())
            assert [report.phase for report in co.all(Report)] == ["idle"], "a short round needs no report"
        await co.first(State, state="offline")
    found = status_file(tmp_path)
    assert (found["running"], found["phase"], found["connected"]) == (False, "stopped", False)
    modes = {
        str(path): path.stat().st_mode & 0o077 for path in (tmp_path / "state").rglob("*") if path.is_file()
    }
    assert set(modes.values()) == {0}, modes
    assert found["sent_bytes"] > 0
    assert found["round"] == 1


@scenario
async def test_a_killed_link_shows_the_will_with_the_same_session(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)):
        birth = await co.first(State, state="online")
        broker.kill(DEVICE)
        assert (await co.first(State, state="lost")).session == birth.session
        await co.first(State, state="online", number=2)


@scenario
async def test_the_same_bytes_are_sent_again_until_a_receipt_comes(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)) as agent:
        await co.first(Report, phase="idle")
        await co.task(await a_keyframe(co))
        update = await co.first(Update)
        broker.kill(DEVICE)
        await co.first(Update, number=2)
        co.epoch = 2
        await co.presence("online")
        await co.first(Update, number=3)
        frames = {payload for place, payload in co.raw if place.leaf == "x"}
        assert len(frames) == 1
        await co.receipt(update)
        await co.until(lambda: not agent._session.pending)


@scenario
async def test_a_killed_agent_sends_its_update_after_the_restart_without_training_again(
    tmp_path: Path,
) -> None:
    broker, config = MemoryBroker(), a_config(tmp_path)
    async with Coordinator(broker) as co:
        async with an_agent(broker, config, die=True):
            await co.first(Report, phase="idle")
            await co.task(await a_keyframe(co))
            update = await co.first(Update)
        again = QuickTrainer()
        async with an_agent(broker, config, again) as agent:
            await co.first(Update, number=2)
            assert (await co.first(State, state="online", number=2)).session == 2
            await co.receipt(update)
            await co.until(lambda: not agent._session.pending)
        assert not again.works
        # The task is still retained; it is finished, so a third start does nothing.
        async with an_agent(broker, config, again):
            await co.first(State, state="online", session=3)
            await co.first(Report, phase="idle", session=3)
        assert not again.works
    frames = {payload for place, payload in co.raw if place.leaf == "x"}
    assert len(frames) == 1


@scenario
async def test_words_of_anyone_but_the_pinned_coordinator_are_ignored(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)) as agent:
        await co.first(Report, phase="idle")
        await co.task(await a_keyframe(co))
        update = await co.first(Update)
        xa, slot = co.topics.down(DEVICE, "xa"), co.topics.down(DEVICE, "task")
        await co.receipt(update, signer=STRANGER)
        other = Receipt(device="dev-b", update_id=update.update_id, accepted=True)
        await co.say(xa, other, retain=False)
        forged = bytearray(seal(Receipt(device=DEVICE, update_id=update.update_id, accepted=True), SIGNER))
        forged[-1] ^= 1
        for payload in (b"garbage", bytes(forged), b"LA1\xff" + bytes(100), b"", b"LA2" + bytes(200)):
            await co.link.publish(xa, payload)
        cancel = Cancel(device=DEVICE, epoch=9, coordinator="co1", job="job", round=9)
        await co.say(slot, cancel, signer=STRANGER, retain=False)
        state = CoordinatorState(coordinator="co2", state="lost", epoch=1)
        await co.say(co.topics.coordinator("co1"), state, retain=False)
        wanted = {"E_UNKNOWN_DEVICE": 2, "E_TOPIC": 2, "E_FRAME": 2, "E_SIG": 1, "E_VERSION": 1}
        await co.until(lambda: agent.status()["refusals"] == wanted)
        assert agent._session.pending, "a forged receipt made the agent forget"
        assert agent._session.epoch == 1
        await co.receipt(update)
        await co.until(lambda: not agent._session.pending)
    assert status_file(tmp_path)["refusals"] == wanted


@scenario
async def test_a_task_whose_name_is_not_of_its_work_is_refused(tmp_path: Path) -> None:
    broker, trainer = MemoryBroker(), QuickTrainer()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path), trainer) as agent:
        await co.first(Report, phase="idle")
        await co.task(await a_keyframe(co), task_id=b"0" * 16)
        await co.until(lambda: agent.status()["refusals"] == {"E_SCHEMA": 1})
        assert not trainer.works


@scenario
async def test_a_long_blob_comes_in_chunks_and_is_resumed_after_a_restart(tmp_path: Path) -> None:
    broker, config = MemoryBroker(), a_config(tmp_path)
    content = np.random.default_rng(1).bytes(20 * CHUNK_BYTES + 77)
    name = blob_id(content)
    chunk_topic = f"lai/v1/{FLEET}/pub/b/{name}/"
    received: list[str] = []

    def lose(client: str, topic: str) -> bool:
        if client == DEVICE and topic.startswith(chunk_topic) and not topic.endswith("m"):
            received.append(topic)
            # The first agent never gets the chunks from 12 on.
            return not again and int(topic.rpartition("/")[2]) >= 12
        return False

    again = False
    broker.drop = lose
    async with Coordinator(broker) as co:
        keyframe = await a_keyframe(co, content)
        async with an_agent(broker, config, die=True):
            await co.first(Report, phase="idle")
            await co.task(keyframe)
            part = tmp_path / "state" / "blobs" / f"{name}.map"
            await co.until(lambda: part.exists() and len(received) >= 16)
        received.clear()
        again, trainer = True, QuickTrainer()
        async with an_agent(broker, config, trainer):
            await co.first(Update)
    numbers = {int(topic.rpartition("/")[2]) for topic in received}
    assert set(range(12, 21)) <= numbers
    assert len(numbers) <= 13, "chunks that were on disk were fetched again"
    stored = tmp_path / "state" / "blobs" / name
    assert stored.read_bytes() == content
    assert trainer.works[0].path[0].path == str(stored)
    assert {path.name for path in stored.parent.iterdir()} == {name, blob_id(encode_spec(SPEC))}


@scenario
async def test_content_that_is_not_what_its_name_says_is_refused_and_the_right_one_used(
    tmp_path: Path,
) -> None:
    broker = MemoryBroker()
    content = b"the model" * 1000
    name = blob_id(content)
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)) as agent:
        await co.first(Report, phase="idle")
        topic = co.topics.blob(name, 0)
        await co.link.publish(topic, b"evil", retain=True)
        ref = BlobRef(blob=name, size_bytes=len(content))
        await co.task(Step(version=0, blob=ref, digest=b"d" * 16))
        await co.until(lambda: agent.status()["refusals"].get("E_DIGEST") == 1)
        await co.link.publish(topic, content[:-1] + b"x", retain=True)
        await co.until(lambda: agent.status()["refusals"].get("E_DIGEST") == 2)
        await co.link.publish(topic, b"", retain=True)
        assert not co.all(Update)
        await co.link.publish(topic, content, retain=True)
        await co.first(Update)


@scenario
async def test_a_false_manifest_is_refused_and_the_true_one_used(tmp_path: Path) -> None:
    broker = MemoryBroker()
    content = np.random.default_rng(1).bytes(CHUNK_BYTES + 77)
    name = blob_id(content)
    ref = BlobRef(blob=name, size_bytes=len(content))
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)) as agent:
        await co.first(Report, phase="idle")
        topic = co.topics.blob(name)
        await co.say(topic, BlobManifest(blob=name, size_bytes=len(content) + 1))
        await co.task(Step(version=0, blob=ref, digest=b"d" * 16))
        await co.until(lambda: agent.status()["refusals"].get("E_DIGEST") == 1)
        await co.say(topic, BlobManifest(blob=name, size_bytes=len(content)), signer=STRANGER)
        await co.until(lambda: agent.status()["refusals"].get("E_UNKNOWN_DEVICE") == 1)
        assert not co.all(Update)
        await co.blob(content)
        await co.first(Update)


@scenario
async def test_a_blob_that_is_not_there_is_reported_and_asked_for_again(tmp_path: Path) -> None:
    broker = MemoryBroker()
    content = b"late" * 100
    async with (
        Coordinator(broker) as co,
        an_agent(broker, a_config(tmp_path), blob_timeout_s=0.2) as agent,
    ):
        await co.first(Report, phase="idle")
        ref = BlobRef(blob=blob_id(content), size_bytes=len(content))
        await co.task(Step(version=0, blob=ref, digest=b"d" * 16))
        await co.until(lambda: any("E_NOT_FOUND" in r.reason for r in co.all(Report)))
        await co.blob(content)
        broker.kill(DEVICE)  # a new connection tries again at once
        await co.first(Update)
        assert agent.status()["phase"] == "sending"


@scenario
async def test_a_model_larger_than_the_storage_limit_is_refused(tmp_path: Path) -> None:
    broker = MemoryBroker()
    config = a_config(tmp_path, storage_kb=1.0)
    async with Coordinator(broker) as co, an_agent(broker, config):
        await co.first(Report, phase="idle")
        assert (await co.first(Capability)).storage_bytes == 1024
        await co.task(await a_keyframe(co, b"k" * 1025))
        assert (await co.first(Event, name="task_failed")).code == "E_QUOTA"
        assert (await co.first(Report, phase="failed")).reason.startswith("E_QUOTA")


@scenario
async def test_a_long_update_is_offered_and_goes_chunk_by_chunk_as_credit_allows(tmp_path: Path) -> None:
    broker = MemoryBroker()
    trainer = QuickTrainer(body_bytes=6 * CHUNK_BYTES)
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path), trainer) as agent:
        await co.first(Report, phase="idle")
        await co.task(await a_keyframe(co))
        offer = await co.first(Offer)
        assert offer.size_bytes > MAX_SINGLE_BYTES
        whole = chunks.Assembly(
            size_bytes=offer.size_bytes, chunk_bytes=offer.chunk_bytes, sha256=offer.sha256
        )

        def parts() -> list[tuple[int, bytes]]:
            return [(p.part, data) for p, data in co.raw if p.leaf == "x" and p.part is not None]

        def enough(wanted: int) -> bool:
            return len(parts()) >= wanted

        seen = 0
        while not whole.complete:
            credit = Credit(device=DEVICE, transfer=offer.transfer, have=whole.bitmap(), chunks=2)
            await co.say(co.topics.down(DEVICE, "xa"), credit, retain=False)
            wanted = seen + min(2, whole.chunks - len(whole.parts))
            await co.until(partial(enough, wanted))
            assert len(parts()) == wanted, "more was sent than the credit allowed"
            for number, data in parts()[seen:]:
                whole.add(number, data)
            seen = wanted
            if seen == 4:
                broker.kill(DEVICE)  # the same offer comes again; what is there is not repeated
                await co.first(Offer, number=2, transfer=offer.transfer)
        frame = whole.join()
        update = open_frame(frame, FLEET, lambda _: agent._identity.signer.public_key).message
        assert isinstance(update, Update)
        assert update.body == trainer.body + b"\1"
        assert seen == whole.chunks
        await co.receipt(update)
        await co.until(lambda: not agent._session.pending)
        assert not co.all(Update)


@scenario
async def test_a_refused_update_comes_back_into_the_next_training(tmp_path: Path) -> None:
    broker, trainer = MemoryBroker(), QuickTrainer()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path), trainer):
        await co.first(Report, phase="idle")
        keyframe = await a_keyframe(co)
        await co.task(keyframe)
        first = await co.first(Update)
        await co.receipt(first, accepted=False, code="E_ROUND_CLOSED", text="too late")
        assert (await co.first(Event, name="update_refused")).code == "E_ROUND_CLOSED"
        await co.task(keyframe, number=2)
        second = await co.first(Update, round=2)
        assert trainer.works[0].returned == ()
        assert trainer.works[1].returned == (Returned(update_id=first.update_id, round=1, body=first.body),)
        assert trainer.residuals[1] == b"after 1"
        await co.receipt(second)
        await co.task(keyframe, number=3)
        await co.first(Update, round=3)
        assert trainer.works[2].returned == ()


@scenario
async def test_left_overs_of_a_job_of_the_same_name_with_another_seed_are_dropped_and_told(
    tmp_path: Path,
) -> None:
    """The same size and structure: only the mark beside them says that they mean other coordinates."""
    broker, trainer = MemoryBroker(), QuickTrainer()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path), trainer):
        await co.first(Report, phase="idle")
        keyframe = await a_keyframe(co)
        await co.task(keyframe)
        first = await co.first(Update)
        await co.receipt(first, accepted=False, code="E_ROUND_CLOSED", text="too late")
        await co.first(Event, name="update_refused")
        other = replace(SPEC, seed=7)
        await co.task(keyframe, number=2, spec=other)
        await co.receipt(await co.first(Update, round=2))
        assert (trainer.residuals[1], trainer.works[1].returned) == (None, ())
        assert trainer.works[1].rounds_away == 0
        told = await co.first(Event, name="residual_dropped")
        assert (told.code, told.text[:2]) == ("E_CODEC", "2 ")
        await co.task(keyframe, number=3, spec=other)
        await co.receipt(await co.first(Update, round=3))
        assert trainer.residuals[2] == b"after 2"
    assert [event.name for event in co.all(Event)].count("residual_dropped") == 1


@scenario
async def test_a_residual_that_rots_is_told_and_replaced_by_the_next_training(tmp_path: Path) -> None:
    broker, trainer = MemoryBroker(), QuickTrainer()
    trainer.dropped = ("E_CODEC", "residual: damaged")
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path), trainer):
        await co.first(Report, phase="idle")
        await co.task(await a_keyframe(co))
        await co.first(Update)
        told = await co.first(Event, name="residual_dropped")
        assert (told.code, told.text) == ("E_CODEC", "residual: damaged")


@scenario
async def test_a_new_round_and_a_cancel_stop_the_training_that_runs(tmp_path: Path) -> None:
    broker, trainer = MemoryBroker(), QuickTrainer()
    trainer.hold = asyncio.Event()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path), trainer) as agent:
        await co.first(Report, phase="idle")
        keyframe = await a_keyframe(co)
        await co.task(keyframe)
        await co.until(lambda: len(trainer.works) == 1)
        await co.task(keyframe, number=2)
        await co.until(lambda: len(trainer.works) == 2)
        final = await a_keyframe(co, b"final model")
        cancel = Cancel(device=DEVICE, epoch=1, coordinator="co1", job="job", round=2, final=(final,))
        await co.say(co.topics.down(DEVICE, "task"), cancel)
        await co.until(lambda: agent._session.task is None)
        trainer.hold.set()
        await co.until((tmp_path / "state" / "blobs" / final.blob.blob).exists)
        assert not co.all(Update)
    model = status_file(tmp_path)["model"]
    assert model["complete"]
    assert model["digest"] == final.digest.hex()


@scenario
async def test_what_the_device_holds_is_known_after_a_restart_and_not_fetched_again(tmp_path: Path) -> None:
    broker, config = MemoryBroker(), a_config(tmp_path)
    async with Coordinator(broker) as co:
        keyframe = await a_keyframe(co)
        async with an_agent(broker, config, die=True):
            await co.first(Report, phase="idle")
            await co.task(keyframe)
            await co.receipt(await co.first(Update))
        await co.link.publish(co.topics.blob(keyframe.blob.blob, 0), b"", retain=True)
        delta = Step(version=3, blob=await co.blob(b"merged"), digest=b"e" * 16)
        trainer = QuickTrainer()
        async with an_agent(broker, config, trainer):
            await co.task(delta, number=4, held=keyframe.digest)
            assert (await co.first(Update, round=4)).base == delta.digest
            names = [Path(file.path).name for file in trainer.works[0].path]
            assert names == [keyframe.blob.blob, delta.blob.blob]
            assert trainer.works[0].rounds_away == 2
    assert not co.all(Event)


@scenario
async def test_a_device_without_the_files_says_so_and_works_when_it_has_the_whole_path(
    tmp_path: Path,
) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)):
        await co.first(Report, phase="idle")
        keyframe = await a_keyframe(co)
        delta = Step(version=3, blob=await co.blob(b"merged"), digest=b"e" * 16)
        await co.task(delta, held=keyframe.digest)
        assert (await co.first(Event)).code == "E_BASE"
        broker.kill(DEVICE)
        await co.first(Event, number=2)
        await co.task(keyframe, delta)
        assert (await co.first(Update)).base == delta.digest


@scenario
async def test_a_fault_in_the_data_is_reported_and_heals_when_the_file_is_mended(tmp_path: Path) -> None:
    broker = MemoryBroker()
    config = a_config(tmp_path, data=str(tmp_path / "absent.npz"))
    async with Coordinator(broker) as co, an_agent(broker, config) as agent:
        report = await co.first(Report, phase="failed")
        assert report.reason.startswith("E_DATA")
        assert (await co.first(Capability)).samples == 0
        np.savez(tmp_path / "absent.npz", x=np.ones((4, 4), np.float32), y=[0, 1, 2, 0])
        await agent._machine.look_at_machine()
        await co.first(Report, phase="idle")
        assert (await co.first(Capability, samples=4)).data == DATA


@scenario
async def test_only_one_agent_uses_a_state_folder(tmp_path: Path) -> None:
    broker, config = MemoryBroker(), a_config(tmp_path)
    async with Coordinator(broker) as co, an_agent(broker, config):
        await co.first(State, state="online")
        with pytest.raises(LockedError):
            await Service(config, lambda will: MemoryLink(broker, DEVICE, will)).run()


@scenario
async def test_a_device_that_was_put_back_from_a_copy_goes_on_with_a_higher_number(tmp_path: Path) -> None:
    broker, config = MemoryBroker(), a_config(tmp_path)
    async with Coordinator(broker) as co:
        async with an_agent(broker, config) as agent:
            await co.first(State, state="online", session=1)
            seen = SessionSeen(device=DEVICE, session=40)
            await co.say(co.topics.down(DEVICE, "xa"), seen, retain=False)
            await co.first(State, state="online", session=41)
            await co.first(Capability, session=41)
            await co.first(Report, session=41)
            await co.say(co.topics.down(DEVICE, "xa"), seen, retain=False, signer=STRANGER)
            await co.task(await a_keyframe(co))
            await co.first(Update)
            broker.kill(DEVICE)
            assert (await co.first(State, state="lost")).session == 41, "the will has the new number too"
            await co.first(State, state="online", session=41, number=2)
            assert agent.status()["session"] == 41
        async with an_agent(broker, config):
            await co.first(State, state="online", session=42)


@scenario
async def test_a_coordinator_that_was_put_back_is_shown_its_own_word_of_a_higher_epoch(
    tmp_path: Path,
) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker, epoch=7) as co:
        async with an_agent(broker, a_config(tmp_path)) as agent:
            await co.first(Report, phase="idle")
            await co.until(lambda: agent._session.epoch == 7)
        co.epoch = 2
        await co.presence("online")
        async with an_agent(broker, a_config(tmp_path)) as agent:
            seen = await co.first(EpochSeen)
            word = open_frame(seen.word, FLEET, lambda _: SIGNER.public_key).message
            assert isinstance(word, CoordinatorState)
            assert word.epoch == 7
            report = await co.first(Report, phase="gated")
            assert "epoch 2, 7 was seen" in report.reason
            co.epoch = 8
            await co.presence("online")
            await co.first(Report, phase="idle", session=2)
            assert agent.status()["epoch"] == 8


@scenario
async def test_a_coordinator_that_was_set_up_anew_works_at_once_when_its_key_is_pinned(
    tmp_path: Path,
) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker, epoch=7) as co, an_agent(broker, a_config(tmp_path)) as agent:
        await co.until(lambda: agent._session.epoch == 7)
    broker = MemoryBroker()
    config = a_config(tmp_path, coordinator_key=STRANGER.public_key.hex())
    async with Coordinator(broker) as co, an_agent(broker, config) as agent:
        topic = co.topics.coordinator("co1")
        await co.say(topic, CoordinatorState(coordinator="co1", state="online", epoch=1), signer=STRANGER)
        await co.until(lambda: agent.status()["coordinator"] == "online")
        assert agent.status()["epoch"] == 1
        assert not [event for event in co.all(Event) if event.code == "E_REPLAY"]


@pytest.mark.parametrize(
    ("field", "value"), [("samples", 10_000_001), ("samples", 0), ("body", bytes(64 << 20))]
)
def test_an_update_that_breaks_a_bound_fails_its_task_and_ends_nothing(
    tmp_path: Path, field: str, value: Any
) -> None:
    async def play() -> None:
        broker, trainer = MemoryBroker(), QuickTrainer()
        trainer.changes = {field: value}
        config = a_config(tmp_path)
        async with Coordinator(broker) as co:
            async with an_agent(broker, config, trainer):
                await co.first(Report, phase="idle")
                keyframe = await a_keyframe(co)
                await co.task(keyframe)
                told = await co.first(Event, name="task_failed")
                assert told.code in ("E_SCHEMA", "E_SIZE", "E_QUOTA")
                trainer.changes = {}
                await co.task(keyframe, number=2)
                await co.receipt(await co.first(Update, round=2))
            async with an_agent(broker, config, trainer):
                await co.first(Report, phase="idle", session=2)
        assert not co.all(Offer)

    asyncio.run(asyncio.wait_for(play(), 120))


@scenario
async def test_a_repeated_credit_costs_nothing(tmp_path: Path) -> None:
    broker = MemoryBroker()
    trainer = QuickTrainer(body_bytes=10 * CHUNK_BYTES)
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path), trainer) as agent:
        await co.first(Report, phase="idle")
        await co.task(await a_keyframe(co))
        offer = await co.first(Offer)
        credit = Credit(device=DEVICE, transfer=offer.transfer, have=b"", chunks=4)
        for _ in range(100):
            await co.say(co.topics.down(DEVICE, "xa"), credit, retain=False)
        last = Cancel(device=DEVICE, epoch=9, coordinator="co1", job="other", round=1)
        await co.say(co.topics.down(DEVICE, "task"), last)
        await co.until(lambda: agent._session.epoch == 9)
        parts = [place.part for place, _ in co.raw if place.leaf == "x" and place.part is not None]
        assert sorted(parts) == [0, 1, 2, 3]


@scenario
async def test_a_machine_that_takes_long_to_look_at_is_connected_and_stops_at_once(tmp_path: Path) -> None:
    """The first look at the data may take two minutes; nothing waits for it but the first word."""
    broker, running = MemoryBroker(), asyncio.Event()

    async def never(*_: object) -> dict[str, Any]:
        running.set()
        await asyncio.sleep(3600)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_run_bench", never)
        async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)) as agent:
            await running.wait()
            await co.until(lambda: agent.status()["connected"])
            assert not co.heard


@scenario
async def test_real_training_gives_updates_that_lead_to_the_trained_model(tmp_path: Path) -> None:
    """Two rounds with the real process: keyframe, delta, evaluation, error feedback; it ends with the agent."""
    from liberatai_core.learning.families import initial_weights, structure_of

    structure = structure_of("mlp", {"hidden": 8}, DATA)
    weights = initial_weights(structure, DATA, seed=3)
    keyframe_bytes = compress(weights, structure, 4096)
    from liberatai_core.compressor.artifact import restore

    base = restore(keyframe_bytes, structure)
    broker, trainer = MemoryBroker(), Trainer(60.0)
    spec = TaskSpec(
        job="job", structure=structure, data=DATA, training=Training(epochs=2), share_class_counts=True
    )
    wanted: dict[str, Any] = {"spec": spec, "density": 0.5}
    async with (
        Coordinator(broker) as co,
        an_agent(broker, a_config(tmp_path), trainer) as agent,
    ):
        await co.first(Report, phase="idle")
        keyframe = Step(version=0, blob=await co.blob(keyframe_bytes), digest=weights_name(digest(base)))
        await co.task(keyframe, **wanted)
        first = await co.first(Update)
        assert first.samples == 51
        assert first.class_counts is not None
        assert first.evaluation is not None
        assert sum(first.class_counts) == 51
        assert first.evaluation[1] == 9
        await co.receipt(first)
        pid = trainer.pid
        moved = base + top_k.densify(first.body, structure)
        delta = Step(version=1, blob=await co.blob(first.body), digest=weights_name(digest(moved)))
        await co.task(delta, number=2, held=keyframe.digest, **wanted)
        second = await co.first(Update, round=2)
        assert trainer.pid == pid, "the process did not live across rounds"
        assert second.base == weights_name(digest(moved))
        assert np.abs(top_k.densify(second.body, structure)).max() > 0
        assert agent.status()["last_training"]["samples"] == 51
    assert trainer.pid is None
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert json.loads((tmp_path / "state" / "status.json").read_text())["updates_waiting"] == 1
