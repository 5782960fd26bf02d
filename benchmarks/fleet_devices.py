"""Many simulated devices in one process: real keys, real frames, no training.

What a device says is signed before the clock of a measurement starts, and what it hears is only noted with
its time; `read` checks every frame afterwards. An update carries a real sparse stream of its structure, of
seeded noise: a few dozen streams are made, and dealt to the devices.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np

from liberatai_core.contract.frame import Signer, decode_spec, open_frame, seal
from liberatai_core.contract.messages import (
    KIND_OF,
    Cancel,
    Capability,
    Head,
    Message,
    Receipt,
    State,
    Task,
    TaskSpec,
    Telemetry,
    Update,
)
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.sparsifier.top_k import init, sparsify
from liberatai_core.structure import DataContract, Structure

STREAMS: Final = 64
"""Different updates; making one costs a hundred times what its signature does."""

SAMPLES: Final = 100


class Device:
    """One device: a name and a key."""

    def __init__(self, number: int, seed: int, fleet: str) -> None:
        self.number = number
        self.name = f"d{number:05}"
        self.signer = Signer.from_seed(hashlib.sha256(f"{seed}|{number}".encode()).digest(), fleet)
        self.rounds = 0


class Devices:
    """All devices of a fleet.

    Attributes:
        tasks: the newest task of every device.
        cancels: the newest Cancel of every device.
        receipts: by update id, all that came, with their time.
        heads: time of every head by (job, version, state).
        heard: messages by kind since `reset`.
        bytes_of_updates: of every frame that `answer` made.
    """

    def __init__(
        self, count: int, seed: int, fleet: str, data: DataContract, *, telemetry_s: float = 3600.0
    ) -> None:
        self.fleet, self._seed, self._data, self.telemetry_s = fleet, seed, data, telemetry_s
        self.topics = Topics(fleet=fleet)
        made = [Device(number, seed, fleet) for number in range(count)]
        self.all = {device.name: device for device in made}
        self.tasks: dict[str, Task] = {}
        self.cancels: dict[str, Cancel] = {}
        self.receipts: dict[bytes, list[tuple[float, Receipt]]] = {}
        self.heads: dict[tuple[str, int, str], float] = {}
        self.heard: Counter[type[Message]] = Counter()
        self.last_s: dict[type[Message], float] = {}
        self.bytes_of_updates: list[int] = []
        self._key = b""
        self._blobs: dict[str, bytes] = {}
        self._unread: list[tuple[float, str, bytes]] = []
        self._streams: dict[tuple[str, float], list[bytes]] = {}
        self._changed = asyncio.Event()
        self._down = f"lai/v1/{fleet}/dn/"
        self._blob = f"lai/v1/{fleet}/pub/b/"
        self._head = f"lai/v1/{fleet}/pub/head/"
        self._kinds = {kind: struct for struct, kind in KIND_OF.items()}

    def trust(self, coordinator_key: bytes) -> None:
        """Take the coordinator's public key; nothing can be read before."""
        self._key = coordinator_key

    @property
    def trusts(self) -> bool:
        """Whether the coordinator's key is known."""
        return bool(self._key)

    # --- what they hear -----------------------------------------------------------------------

    def receive(self, topic: str, payload: bytes) -> None:
        """Note one message of the coordinator. Cheap: the clock is running."""
        if not payload:
            return
        now = time.monotonic()
        if topic.startswith(self._down):
            kind = self._kinds[payload[3]]
            self.heard[kind] += 1
            self.last_s[kind] = now
            self._unread.append((now, topic, payload))
        elif topic.startswith(self._blob):
            self._blobs[blob_id(payload)] = payload
            return
        elif topic.startswith(self._head):
            head = self._opened(payload)
            assert isinstance(head, Head)
            self.heads.setdefault((head.job, head.version, head.state), now)
        self._changed.set()

    def reset(self) -> None:
        """Read what came, and count from zero again."""
        self.read()
        self.heard.clear()

    def read(self) -> None:
        """Check and sort everything that came."""
        unread, self._unread = self._unread, []
        for came_s, topic, payload in unread:
            message = self._opened(payload)
            device = topic.removeprefix(self._down).split("/")[0]
            assert getattr(message, "device", None) == device
            if isinstance(message, Task | Cancel | Receipt):
                self.took(message, came_s)

    def took(self, message: Task | Cancel | Receipt, came_s: float) -> None:
        """Sort one message that was checked."""
        match message:
            case Task():
                self.tasks[message.device] = message
            case Cancel():
                self.cancels[message.device] = message
                self.tasks.pop(message.device, None)
            case Receipt():
                self.receipts.setdefault(message.update_id, []).append((came_s, message))

    def tasks_of(self, job: str, number: int) -> list[Task]:
        """Return the tasks of a round, by device."""
        found = [task for task in self.tasks.values() if (task.job, task.round) == (job, number)]
        return sorted(found, key=lambda task: task.device)

    async def until(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        """Wait for something that is said to the devices."""
        try:
            async with asyncio.timeout(limit_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise SystemExit(f"no {what} within {limit_s:.0f} s; heard {dict(self.heard)}") from None

    def _opened(self, payload: bytes) -> Message:
        return open_frame(payload, self.fleet, lambda _: self._key).message

    # --- what they say ------------------------------------------------------------------------

    def introductions(self) -> list[tuple[str, bytes]]:
        """Return topic and frame of what every device says first: its capability, and that it is online."""
        found = []
        for device in self.all.values():
            capability = Capability(
                device=device.name,
                public_key=device.signer.public_key,
                session=1,
                agent_version="benchmark",
                tier="full",
                arch="aarch64",
                cores=4,
                storage_bytes=4_000_000,
                memory_bytes=512_000_000,
                gflops=2.0,
                samples=SAMPLES,
                data=self._data,
                telemetry_s=self.telemetry_s,
            )
            state = State(device=device.name, state="online", session=1)
            found.append((self.topics.up(device.name, "caps"), seal(capability, device.signer)))
            found.append((self.topics.up(device.name, "state"), seal(state, device.signer)))
        return found

    def telemetry(self, device: Device) -> tuple[str, bytes]:
        """Return topic and frame of a sign of life."""
        told = Telemetry(
            device=device.name,
            session=1,
            cpu_percent=12.5,
            memory_available_bytes=300_000_000,
            rss_bytes=40_000_000,
            sent_bytes=6_000 * device.rounds,
            received_bytes=8_000 * device.rounds,
        )
        return self.topics.up(device.name, "tele"), seal(told, device.signer)

    def answer(self, task: Task) -> tuple[str, bytes]:
        """Return topic and frame of the update that answers a task."""
        device = self.all[task.device]
        spec = decode_spec(self._blobs[task.spec.blob])
        streams = self._streams_of(spec, task.density)
        device.rounds += 1
        share = SAMPLES // self._data.classes
        body = streams[(device.number + task.round) % len(streams)]
        update = Update(
            update_id=task.task_id,
            device=device.name,
            job=task.job,
            round=task.round,
            epoch=task.epoch,
            structure=spec.structure.id,
            base=task.base,
            samples=SAMPLES,
            codec=spec.codec,
            body=body,
            class_counts=(share,) * self._data.classes,
            train_seconds=1.0,
            loss=1.0,
            sent_bytes=6_000 * device.rounds,
            received_bytes=8_000 * device.rounds,
        )
        frame = seal(update, device.signer)
        self.bytes_of_updates.append(len(frame))
        return self.topics.upload(device.name, blob_id(frame)), frame

    def _streams_of(self, spec: TaskSpec, density: float) -> list[bytes]:
        key = (spec.structure.id, density)
        if key not in self._streams:
            self._streams[key] = [
                self._stream(spec.structure, density, number) for number in range(min(STREAMS, len(self.all)))
            ]
        return self._streams[key]

    def _stream(self, structure: Structure, density: float, number: int) -> bytes:
        random = np.random.default_rng([self._seed, number])
        # Heavy tails, as differences of training have them: few coordinates move much.
        difference = (0.01 * random.laplace(size=structure.parameters)).astype(np.float32)
        _, body = sparsify(init(structure.parameters), difference, structure, density)
        return body
