"""What an agent lives through: damaged state, kill -9, SIGTERM, copies, greedy and forgetful coordinators.

    python -m benchmarks.agent_faults --seed 0 --kills 300

Starts Mosquitto and one real agent, and plays its coordinator with real frames. Every kind prints how it
ended. Baseline in the same run: the agent that nothing happens to, which must be connected and answer a task.
Claims: whatever is damaged, the agent is online again by itself under the same key; a training that was
finished is sent, and never done twice; whoever ends it does not wait long.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from liberatai_core.compressor.artifact import restore
from liberatai_core.compressor.codebook import compress
from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Signer, encode_spec, open_frame, seal
from liberatai_core.contract.limits import CHUNK_BYTES
from liberatai_core.contract.messages import (
    BlobManifest,
    BlobRef,
    Capability,
    CoordinatorState,
    Credit,
    EpochSeen,
    Message,
    Offer,
    Receipt,
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
from liberatai_core.contract.topics import Topics, blob_id, parse
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.link.link import Received
from liberatai_core.link.mqtt import MqttLink, MqttSettings
from liberatai_core.structure import DataContract
from liberatai_core.weights import digest

FLEET, DEVICE = "faults", "dev"
DATA = DataContract(input_shape=(64,), classes=3)
ONLINE_S = 60.0
ANSWER_S = 180.0
"""An import of torch on a busy machine, with room."""
EXIT_S = 15.0
MOMENTS = ("start", "fetch", "train", "store", "send", "stop")
DAMAGES = ("header", "truncation", "zero page", "random page")
PAGE = 4096


def main() -> int:
    """Run every kind, print how it ended, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--terms", type=int, default=20, help="SIGTERMs at random moments")
    parser.add_argument("--starts", type=int, default=5, help="starts that are timed")
    parser.add_argument(
        "--only", action="append", choices=[name for name, _ in KINDS], help="these kinds alone"
    )
    parser.add_argument(
        "--quick", action="store_true", help="6 kills, 4 SIGTERMs, 2 starts, one damage per file"
    )
    given = parser.parse_args()
    if given.quick:
        given.kills, given.terms, given.starts = 6, 4, 2
    found: dict[str, Any] = {
        "benchmark": "agent_faults",
        "seed": given.seed,
        "python": platform.python_version(),
    }
    good = True
    for name, kind in KINDS:
        if given.only and name not in given.only:
            continue
        with tempfile.TemporaryDirectory(prefix="liberatai-faults-") as folder:
            outcome: dict[str, Any] = asyncio.run(kind(Path(folder), given))
        good = good and outcome.pop("good")
        found |= {f"{name}_{key}": value for key, value in outcome.items()}
        print(f"{name}: {outcome}", flush=True)
    found["good"] = good
    print(json.dumps(found))
    return 0 if good else 1


# --- the stage ---------------------------------------------------------------------------------


class Coordinator:
    """Says what it is told to with real frames, and remembers what the device says."""

    def __init__(self, url: str, seed: bytes = b"c" * 32, epoch: int = 1) -> None:
        self.signer, self.epoch = Signer.from_seed(seed, FLEET), epoch
        self.topics = Topics(fleet=FLEET)
        settings = MqttSettings.from_url(url, client_id=f"co-{time.monotonic_ns()}")
        self.link = MqttLink(settings)
        self.heard: list[Message] = []
        self.frames: dict[bytes, set[bytes]] = {}
        self.uploaded = 0
        self.generous = True
        self.arriving: dict[str, chunks.Assembly] = {}
        self.talking: set[asyncio.Task[None]] = set()
        self.keys: dict[bytes, bytes] = {}
        self.newest: Step | None = None

    async def listen(self) -> None:
        """Take in everything, for ever."""
        async for event in self.link.events():
            if isinstance(event, Received):
                with contextlib.suppress(LiberataiError):
                    self._take(event)
                self.link.ack(event.token)

    def _take(self, event: Received) -> None:
        place = parse(event.topic, FLEET)
        if place.leaf == "x":
            self.uploaded += len(event.payload)
        if not event.payload:
            return
        if place.part is None:
            self._hear(event.payload)
        elif place.transfer is not None and (whole := self.arriving.get(place.transfer)) is not None:
            whole.add(place.part, event.payload)
            if whole.complete:
                self._hear(self.arriving.pop(place.transfer).join())
            elif len(whole.parts) % 2 == 0:
                self._credit(place.transfer, whole)

    def _credit(self, transfer: str, whole: chunks.Assembly) -> None:
        credit = Credit(device=DEVICE, transfer=transfer, have=whole.bitmap(), chunks=2)
        saying = asyncio.create_task(self.say(self.topics.down(DEVICE, "xa"), credit, retain=False))
        self.talking.add(saying)
        saying.add_done_callback(self.talking.discard)

    def _hear(self, frame: bytes) -> None:
        opened = open_frame(frame, FLEET, self.keys.get)
        if isinstance(opened.message, Capability):
            self.keys[hashlib.sha256(opened.public_key).digest()[:8]] = opened.public_key
        if isinstance(opened.message, Update):
            self.frames.setdefault(opened.message.update_id, set()).add(frame)
        if isinstance(opened.message, Offer) and self.generous:
            offer = opened.message
            whole = chunks.Assembly(
                size_bytes=offer.size_bytes, chunk_bytes=offer.chunk_bytes, sha256=offer.sha256
            )
            self._credit(offer.transfer, self.arriving.setdefault(offer.transfer, whole))
        self.heard.append(opened.message)

    async def say(self, topic: str, message: Message, *, retain: bool = True) -> None:
        """Publish a signed message."""
        await self.link.publish(topic, seal(message, self.signer), retain=retain)

    async def presence(self) -> None:
        """Say that the coordinator is there."""
        state = CoordinatorState(coordinator="co1", state="online", epoch=self.epoch)
        await self.say(self.topics.coordinator("co1"), state)

    async def blob(self, content: bytes) -> BlobRef:
        """Publish a file."""
        name = blob_id(content)
        for number in range(chunks.count(len(content), CHUNK_BYTES)):
            part = chunks.cut(content, number, CHUNK_BYTES)
            await self.link.publish(self.topics.blob(name, number), part, retain=True)
        if len(content) > CHUNK_BYTES:
            await self.say(self.topics.blob(name), BlobManifest(blob=name, size_bytes=len(content)))
        return BlobRef(blob=name, size_bytes=len(content))

    async def task(self, number: int, hidden: int = 16) -> Task:
        """Give a new task with a keyframe of its own."""
        structure = structure_of("mlp", {"hidden": hidden}, DATA)
        artifact = compress(initial_weights(structure, DATA, number), structure, 4 * structure.parameters)
        name = weights_name(digest(restore(artifact, structure)))
        step = Step(version=number, blob=await self.blob(artifact), digest=name)
        spec = TaskSpec(
            job="job", structure=structure, data=DATA, training=Training(epochs=1), deadline_s=3600
        )
        task = Task(
            task_id=update_id(DEVICE, "job", number, name),
            epoch=self.epoch,
            coordinator="co1",
            device=DEVICE,
            job="job",
            round=number,
            spec=await self.blob(encode_spec(spec)),
            density=1.0,
            steps=(step,),
        )
        await self.say(self.topics.down(DEVICE, "task"), task)
        return task

    async def receipt(self, task: Task) -> None:
        """Say that an update is stored."""
        receipt = Receipt(device=DEVICE, update_id=task.task_id, accepted=True)
        await self.say(self.topics.down(DEVICE, "xa"), receipt, retain=False)

    def answered(self, task: Task) -> bool:
        """Whether the update of a task has come."""
        return task.task_id in self.frames

    async def answer(self, task: Task, timeout_s: float) -> bool:
        """Wait for the update of a task; False if it did not come."""
        return await until(lambda: self.answered(task), timeout_s)

    async def more(self, kind: type[Message], than: int) -> bool:
        """Wait for one more message of a kind; False if none came."""
        return await until(lambda: self.count(kind) > than, ONLINE_S)

    def count(self, kind: type[Message]) -> int:
        """Return how many messages of a kind have come."""
        return sum(isinstance(message, kind) for message in self.heard)


class Agent:
    """One agent, started and ended at will."""

    def __init__(self, folder: Path, url: str, key: bytes) -> None:
        self.folder, self.state = folder, folder / "state"
        self.settings = folder / "agent.yaml"
        self.process: subprocess.Popen[bytes] | None = None
        random_numbers = np.random.default_rng(0)
        x = random_numbers.normal(size=(200, 64)).astype(np.float32)
        np.savez(folder / "data.npz", x=x, y=np.arange(200) % 3)
        self.pin(url, key)

    def pin(self, url: str, key: bytes) -> None:
        """Write the settings."""
        self.settings.write_text(
            f"fleet: {FLEET}\ndevice: {DEVICE}\ncoordinator_key: {key.hex()}\nbroker: {url}\n"
            "state_dir: state\ndata: data.npz\ntelemetry_s: 3600\n"
            "gate: {min_battery_percent: null, max_temp_c: null, min_free_memory_mb: null}\n"
        )

    def start(self) -> None:
        """Start it."""
        log = (self.folder / "agent.log").open("ab")
        command = [sys.executable, "-P", "-m", "liberatai_agent", "run", "--config", str(self.settings)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()

    def kill(self) -> None:
        """End it as a power cut does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return self.process is not None and self.process.poll() is None

    async def term(self) -> float:
        """Ask it to end; return the seconds that it took (EXIT_S: it did not)."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        await until(lambda: not self.running(), EXIT_S)
        seconds = time.monotonic() - began
        self.kill()
        return seconds

    def status(self) -> dict[str, Any]:
        """Return what it says of itself, nothing of an earlier process."""
        try:
            found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if self.process is not None and found.get("pid") == self.process.pid else {}

    def connected(self) -> bool:
        """Whether it is connected and has looked at its data."""
        return bool(self.status().get("connected")) and self.status().get("samples") == 200


async def until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Wait for a condition; False if it did not come."""
    ends = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > ends:
            return False
        await asyncio.sleep(0.005)
    return True


@contextlib.asynccontextmanager
async def broker(folder: Path) -> AsyncIterator[str]:
    """Run Mosquitto on a free port and yield its URL."""
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SystemExit("mosquitto is not installed: apt install mosquitto")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = folder / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n")
    command = [program, "-c", str(settings)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:  # noqa: ASYNC220 - at once
        try:
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def coordinator(url: str, **given: Any) -> AsyncIterator[Coordinator]:
    """Run a coordinator."""
    made = Coordinator(url, **given)
    await made.link.subscribe(*made.topics.from_devices)
    await made.link.open()
    running = asyncio.create_task(made.listen())
    try:
        while True:
            with contextlib.suppress(LiberataiError):
                await made.presence()
                break
            await asyncio.sleep(0.05)
        yield made
    finally:
        running.cancel()
        await made.link.close()


@contextlib.asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[tuple[Coordinator, Agent]]:
    """Run a broker, a coordinator and an agent that is connected."""
    async with broker(folder) as url, coordinator(url) as co:
        agent = Agent(folder, url, co.signer.public_key)
        try:
            agent.start()
            if not await until(agent.connected, ANSWER_S):
                raise SystemExit(f"the undisturbed agent did not connect: {agent.status()}")
            yield co, agent
        finally:
            agent.kill()


# --- the kinds ---------------------------------------------------------------------------------


async def starts(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Time from the start of the process to its connection, with a cold cache if we may empty it."""
    async with stage(folder) as (co, agent):
        times, cold = [], True
        for _ in range(given.starts):
            await agent.term()
            cold = cold and drop_caches()
            seen, began = co.count(State), time.monotonic()
            agent.start()
            await until(lambda: agent.status().get("connected"), ONLINE_S)
            times.append(time.monotonic() - began)
            await co.more(State, seen)
    median = statistics.median(times)
    return {
        "good": max(times) < ONLINE_S,
        "median_s": round(median, 2),
        "max_s": round(max(times), 2),
        "cold": cold,
    }


def drop_caches() -> bool:
    """Empty the page cache; False if we may not."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


async def damage(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Damage every file of the state in every way; the agent must be online again under its own key."""
    dice = random.Random(given.seed)
    failed: list[str] = []
    tried = 0
    async with stage(folder) as (co, agent):
        await work_through(co, agent)
        key = next(iter(co.keys.values()))
        agent.kill()
        kept = folder / "kept"
        shutil.copytree(agent.state, kept)
        for path in sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file()):
            for how in dice.sample(DAMAGES, 1) if given.quick else DAMAGES:
                shutil.rmtree(agent.state)
                shutil.copytree(kept, agent.state)
                broken = spoilt((kept / path).read_bytes(), how, dice)
                if broken is None or "children" in path.parts:
                    continue
                (agent.state / path).write_bytes(broken)
                tried += 1
                seen = co.count(State)
                agent.start()
                online = await co.more(State, seen) and await until(agent.connected, ONLINE_S)
                if not online or set(co.keys.values()) != {key} or not agent.running():
                    failed.append(f"{path}, {how}")
                agent.kill()
    return {"good": not failed, "tried": tried, "failed": failed}


async def work_through(co: Coordinator, agent: Agent) -> None:
    """Let the device train twice; the second update stays without a receipt."""
    first = await co.task(1)
    await until(lambda: co.answered(first), ANSWER_S)
    await co.receipt(first)
    second = await co.task(2)
    await until(lambda: co.answered(second), ANSWER_S)
    await until(lambda: agent.status().get("updates_waiting") == 1, ONLINE_S)


def spoilt(content: bytes, how: str, dice: random.Random) -> bytes | None:
    """Return a file damaged in one way, None if that way changes nothing."""
    at = dice.randrange(max(1, -(-len(content) // PAGE))) * PAGE
    size = len(content[at : at + PAGE])
    found = {
        "header": dice.randbytes(min(64, len(content))) + content[64:],
        "truncation": content[: dice.randrange(len(content))] if content else b"",
        "zero page": content[:at] + bytes(size) + content[at + size :],
        "random page": content[:at] + dice.randbytes(size) + content[at + size :],
    }[how]
    return found if found != content else None


async def rows(folder: Path, _given: argparse.Namespace) -> dict[str, Any]:
    """Spoil one stored update: the agent lets it go and does the next task."""
    async with stage(folder) as (co, agent):
        await work_through(co, agent)
        agent.kill()
        with contextlib.closing(sqlite3.connect(agent.state / "outbox.db")) as db:
            db.execute("UPDATE updates SET frame = CAST(zeroblob(length(frame)) AS BLOB)")
            db.commit()
        agent.start()
        gone = await until(lambda: agent.status().get("updates_waiting") == 0, ONLINE_S)
        third = await co.task(3)
        answered = await until(lambda: co.answered(third), ANSWER_S)
    return {"good": gone and answered, "let_go": gone, "next_answered": answered}


async def credits(folder: Path, _given: argparse.Namespace) -> dict[str, Any]:  # noqa: A001 - the field's word
    """Repeat one Credit a hundred times."""
    async with stage(folder) as (co, _agent):
        co.generous = False
        await co.task(1, hidden=8192)
        await until(lambda: co.count(Offer), ANSWER_S)
        offer = next(message for message in co.heard if isinstance(message, Offer))
        before = co.uploaded
        credit = Credit(device=DEVICE, transfer=offer.transfer, have=b"", chunks=4)
        for _repetition in range(100):
            await co.say(co.topics.down(DEVICE, "xa"), credit, retain=False)
        await until(lambda: co.uploaded - before >= 4 * offer.chunk_bytes, ONLINE_S)
        await asyncio.sleep(2)
        cost = co.uploaded - before
    return {"good": cost <= 5 * offer.chunk_bytes, "uplink_kib": cost // 1024}


async def copies(folder: Path, _given: argparse.Namespace) -> dict[str, Any]:
    """Put a device back from a copy, and a coordinator."""
    async with stage(folder) as (co, agent):
        await agent.term()
        shutil.copytree(agent.state, folder / "copy")
        for _ in range(3):
            agent.start()
            await until(agent.connected, ONLINE_S)
            await agent.term()
        highest = max(m.session for m in co.heard if isinstance(m, State))
        shutil.rmtree(agent.state)
        shutil.copytree(folder / "copy", agent.state)
        began = time.monotonic()
        agent.start()
        await until(agent.connected, ONLINE_S)
        await co.say(co.topics.down(DEVICE, "xa"), SessionSeen(device=DEVICE, session=highest), retain=False)
        higher = await until(
            lambda: any(isinstance(m, State) and m.session > highest for m in co.heard), ONLINE_S
        )
        device_s = time.monotonic() - began
        co.epoch = 9
        await co.presence()
        await until(lambda: agent.status().get("epoch") == 9, ONLINE_S)
        co.epoch = 2
        await co.presence()
        shown = await until(lambda: co.count(EpochSeen), ONLINE_S)
        told = await until(lambda: "epoch 2, 9 was seen" in agent.status().get("reason", ""), ONLINE_S)
        await agent.term()
        async with coordinator(agent_url(agent), seed=b"n" * 32) as anew:
            agent.pin(agent_url(agent), anew.signer.public_key)
            agent.start()
            works = await until(lambda: agent.status().get("coordinator") == "online", ONLINE_S)
    return {
        "good": higher and shown and told and works,
        "device_online_s": round(device_s, 1),
        "epoch_shown": shown,
        "reason_told": told,
        "new_key_works": works,
    }


def agent_url(agent: Agent) -> str:
    """Return the broker of an agent."""
    return next(
        line.partition(" ")[2]
        for line in agent.settings.read_text().splitlines()
        if line.startswith("broker:")
    )


async def terms(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Send SIGTERM at random moments: while it starts, looks at data, fetches, trains, sends."""
    dice = random.Random(given.seed)
    seconds = []
    async with stage(folder) as (co, agent):
        for number in range(1, given.terms + 1):
            task = await co.task(number, hidden=dice.choice((16, 8192)))
            if dice.random() < 0.3:
                (agent.state / "bench.json").unlink(missing_ok=True)
            if not agent.running():
                agent.start()
            await co.answer(task, dice.uniform(0.0, 6.0))
            seconds.append(await agent.term())
            await co.receipt(task)
    return {
        "good": max(seconds) <= 5,
        "max_s": round(max(seconds), 2),
        "median_s": round(statistics.median(seconds), 2),
    }


async def kills(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Kill the agent at random moments of its life, and again, with the same task until it is answered."""
    dice = random.Random(given.seed)
    lost = twice = offline = done = 0
    per_moment = dict.fromkeys(MOMENTS, 0)
    async with stage(folder) as (co, agent):
        number = 0
        began = time.monotonic()
        while done < given.kills:
            number += 1
            task = await co.task(number, hidden=dice.choice((16, 16, 6000)))
            for _ in range(dice.choice((1, 1, 2, 3))):
                moment = dice.choice(MOMENTS)
                await reach(moment, co, agent, task, dice)
                agent.kill()
                per_moment[moment] += 1
                done += 1
                seen = co.count(State)
                agent.start()
                if not await co.more(State, seen):
                    offline += 1
                    print(f"  not online after a kill while {moment}: {agent.status()}", flush=True)
            if not await co.answer(task, ANSWER_S):
                lost += 1
                print(f"  round {number} was not answered: {agent.status()}", flush=True)
            await co.receipt(task)
            # A frame is made once, when a training is finished: another one is another training.
            twice += len(co.frames.get(task.task_id, ())) > 1
            if number % 20 == 0:
                print(f"  {done} kills in {time.monotonic() - began:.0f} s", flush=True)
    return {
        "good": not (lost or twice or offline),
        "done": done,
        "moments": per_moment,
        "lost": lost,
        "trained_twice": twice,
        "never_online": offline,
    }


async def reach(moment: str, co: Coordinator, agent: Agent, task: Task, dice: random.Random) -> None:
    """Wait for a moment in the life of a task, and a little longer."""
    residuals = agent.state / "residuals"
    before = set(residuals.iterdir()) if residuals.is_dir() else set()
    waits: dict[str, tuple[Callable[[], object], float]] = {
        "start": (bool, 2.0),
        "fetch": ((agent.state / "blobs" / task.spec.blob).exists, 0.2),
        "train": (lambda: agent.status().get("phase") == "training", 4.0),
        "store": (lambda: len(set(residuals.iterdir()) - before), 0.03),
        "send": (lambda: co.answered(task) or co.arriving, 0.01),
        "stop": (bool, 0.3),
    }
    condition, longest_s = waits[moment]
    if moment == "stop" and agent.process is not None:
        agent.process.send_signal(signal.SIGTERM)
    # What was answered already is not trained again: then any time is as good.
    if moment not in ("start", "stop"):
        await until(lambda: co.answered(task) or condition(), 30.0)
    await asyncio.sleep(dice.uniform(0.0, longest_s))


Kind = Callable[[Path, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]
KINDS: list[tuple[str, Kind]] = [
    ("start", starts),
    ("damage", damage),
    ("row", rows),
    ("credit", credits),
    ("copy", copies),
    ("term", terms),
    ("kill", kills),
]


if __name__ == "__main__":
    sys.exit(main())
