"""Many devices in one process: the product's decisions and codecs, virtual time, bytes of real frames.

Every device runs the agent's session and the trainer's own `work`; the coordinator's side runs round,
versions and aggregation on a real ledger and repository in a temporary folder. Only the broker is missing:
what would cross it is sealed as it would be sent, and counted as MQTT 5 packets with their topics,
subscriptions and acknowledgements, both ways, for every device. Nothing sleeps and nothing is lost.
"""

import contextlib
import hashlib
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from liberatai_agent import actions as do
from liberatai_agent import events as on
from liberatai_agent import session as s
from liberatai_agent.children.messages import Failed, File, Work
from liberatai_agent.children.trainer_child import Memory, work
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.plan import Candidate, Plan, make_plan, warmed
from liberatai_coordinator.jobs.materials import candidates_of, spec_of
from liberatai_coordinator.models import aggregation
from liberatai_coordinator.models.aggregation import Late
from liberatai_coordinator.models.members import Public, derive_seed
from liberatai_coordinator.models.updates import check_update
from liberatai_coordinator.models.versions import Current, Versions
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.rounds.catch_up import Way
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Signer, decode_spec, encode_spec, seal
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_SINGLE_BYTES, WINDOW_CHUNKS
from liberatai_core.contract.messages import (
    BlobManifest,
    BlobRef,
    Capability,
    Credit,
    Message,
    Offer,
    Receipt,
    Report,
    Step,
    Task,
    Update,
    update_id,
)
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.training import log_probabilities
from liberatai_core.link.packet import publish_bytes
from liberatai_core.profile import Trainer
from liberatai_core.structure import DataContract
from liberatai_core.weights import Vector

FLEET, COORDINATOR = "fleet", "co1"
PUBACK, SUBACK = 4, 6
"""Bytes of the shortest form of these packets; an UNSUBACK is as long as a SUBACK."""
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Tamper = Callable[[int, Sequence[Update]], Sequence[Update]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """Who has which data.

    Attributes:
        data: what samples look like.
        devices: (x, y) of each device.
        test: (x, y) that no device has.
    """

    data: DataContract
    devices: Sequence[tuple[Floats, Labels]]
    test: tuple[Floats, Labels]


@dataclass(slots=True)
class Traffic:
    """Bytes of one device so far: all packets, and of these the update streams and the model's files."""

    up: int = 0
    down: int = 0
    up_body: int = 0
    down_body: int = 0


@dataclass(frozen=True, kw_only=True)
class RoundEnd:
    """What a round left.

    Attributes:
        number: 1 …
        accuracy: of the devices' weights after it on the test samples, by structure; nan if not asked.
        traffic: of all devices together since the start.
        updates: streams of this round, by device.
    """

    number: int
    accuracy: dict[str, float]
    traffic: Traffic
    updates: dict[str, bytes]


@dataclass(slots=True)
class _Device:
    name: str
    signer: Signer
    data_path: Path
    samples: int
    session: s.Session
    traffic: Traffic = field(default_factory=Traffic)
    memory: Memory = field(default_factory=Memory)
    residual: bytes | None = None
    residual_round: int = 0
    results: dict[bytes, tuple[Task, on.TrainingResult]] = field(default_factory=dict)


def newest(
    job: JobSpec,
    population: Population,
    *,
    public: Public,
    structures: Sequence[int],
    tamper: Tamper | None = None,
) -> Current:
    """Run a job to its end in a folder of its own and return its last version."""
    with tempfile.TemporaryDirectory(prefix="liberatai-simulation-") as folder:
        simulation = Simulation(
            job,
            population,
            Path(folder),
            evaluate_every=job.rounds.count,
            public=public,
            structures=structures,
            tamper=tamper,
        )
        with contextlib.closing(simulation):
            for _ in simulation.run():
                pass
            return simulation.versions.now


class Simulation:
    """One job over a population.

    Args:
        job: settings; `rounds.count` bounds the rounds.
        population: who has which data.
        folder: empty; takes ledger, repository and the devices' data.
        evaluate_every: rounds between two evaluations on the test samples; the last round has one.
        public: the coordinator's own data, for teaching and for the guard.
        structures: place in the job's structures of each device's one; None: the plan decides.
        tamper: hostile devices: (round, all updates of it) -> what is sent instead. They know what the others
            send, which is the worst case; what the coordinator refuses does not count.
        runtime: what devices train with.
        start: weights of the only structure's backbone; None: random ones.
    """

    def __init__(
        self,
        job: JobSpec,
        population: Population,
        folder: Path,
        *,
        evaluate_every: int = 1,
        public: Public | None = None,
        structures: Sequence[int] | None = None,
        tamper: Tamper | None = None,
        runtime: Trainer = "torch",
        start: Vector | None = None,
    ) -> None:
        self._runtime: Trainer = runtime
        self.job, self.population, self.folder = job, population, folder
        self._public = public or Public()
        self._every, self._tamper = evaluate_every, tamper
        self._topics = Topics(fleet=FLEET)
        self._signer = Signer.from_seed(_key("coordinator"), FLEET)
        self._files = folder / "blobs"
        self._files.mkdir(parents=True)
        self.devices = {device.name: device for device in map(self._device, range(len(population.devices)))}
        self.ledger = Ledger.open(folder / "state", reserve_bytes=0)
        self.ledger.jobs.create(job.name, b"", str(folder), 0.0)
        self.versions = Versions(job=job, ledger=self.ledger, repository=Repository(folder / "repository"))
        candidates, self._structures = candidates_of(job)
        self._candidates = {candidate.id: candidate for candidate in candidates}
        self.plan = self._planned(candidates, structures)
        chosen = {sid: self._structures[sid] for sid in self.plan.keyframe_bytes}
        given = None if start is None else dict.fromkeys(chosen, start)
        self.versions.start(chosen, self.plan.keyframe_bytes, self._public, given)
        self._specs = {sid: self._publish(encode_spec(spec_of(job, one))) for sid, one in chosen.items()}
        self._paths: dict[str, tuple[Step, ...]] = {}
        self._updates: dict[str, Update] = {}
        self._round: deciding.Round | None = None

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def traffic(self) -> Traffic:
        """Return the bytes of all devices together since the start."""
        each = [device.traffic for device in self.devices.values()]
        return Traffic(
            up=sum(one.up for one in each),
            down=sum(one.down for one in each),
            up_body=sum(one.up_body for one in each),
            down_body=sum(one.down_body for one in each),
        )

    def run(self) -> Iterator[RoundEnd]:
        """Yield after every round."""
        for number in range(1, self.job.rounds.count + 1):
            yield self._play(number)

    # --- the coordinator's side ------------------------------------------------------------------

    def _planned(self, candidates: Sequence[Candidate], structures: Sequence[int] | None) -> Plan:
        """Return the plan; where the structure of every device is given, it has no choice."""
        devices = [self._capability(device) for device in self.devices.values()]
        if structures is None:
            return make_plan(self.job, candidates, devices)
        plans = [
            make_plan(
                self.job,
                [candidate],
                [device for device, own in zip(devices, structures, strict=True) if own == place],
            )
            for place, candidate in enumerate(candidates)
        ]
        return Plan(
            assignments={name: given for plan in plans for name, given in plan.assignments.items()},
            keyframe_bytes={sid: size for plan in plans for sid, size in plan.keyframe_bytes.items()},
        )

    def _play(self, number: int) -> RoundEnd:
        names = sorted(self.devices)
        wanted = deciding.invited(len(names), self.job.rounds.target, self.job.rounds.overselect)
        draw = np.random.default_rng(derive_seed(self.job.seed, "participants", number))
        chosen = [names[place] for place in sorted(draw.choice(len(names), size=wanted, replace=False))]
        ways = {
            name: self.versions.way(self._structure(name), self._paths.get(name, ()), 0) for name in chosen
        }
        invitations = {name: self._invitation(name, number) for name in chosen}
        self._round = deciding.Round(
            job=self.job.name,
            number=number,
            invitations=invitations,
            target=wanted,
            quorum=wanted,
            closes_s=math.inf,
        )
        self._updates = {}
        for name in chosen:
            self._give(name, number, invitations[name], ways[name])
        if self._round.phase is not deciding.Phase.CLOSED:
            raise RuntimeError(f"round {number}: {len(self._updates)} of {wanted} updates arrived")
        return self._advance(number)

    def _give(self, name: str, number: int, invitation: deciding.Invitation, way: Way) -> None:
        """Give a device its task; it trains and sends at once."""
        task = Task(
            task_id=invitation.update_id,
            epoch=self.ledger.epoch,
            coordinator=COORDINATOR,
            device=name,
            job=self.job.name,
            round=number,
            spec=self._specs[invitation.structure],
            density=warmed(self.job, self._candidates[invitation.structure], number).density,
            held=way.held,
            steps=way.steps,
        )
        self._down(self.devices[name], self._topics.down(name, "task"), task)
        self._happen(self.devices[name], on.TaskArrived(task=task))
        self._paths[name] = way.path

    def _advance(self, number: int, late: Late | None = None) -> RoundEnd:
        updates = sorted(self._tampered(number), key=lambda update: update.update_id)
        now = self.versions.now
        advanced = aggregation.advance(self.job, now.number + 1, now.members, updates, self._public, late)
        self.versions.commit(
            advanced,
            number,
            [update.update_id for update in updates],
            {},
            self.plan.keyframe_bytes,
            self._public,
        )
        asked = number % self._every == 0 or number == self.job.rounds.count
        return RoundEnd(
            number=number,
            accuracy=self._accuracy() if asked else {},
            traffic=self.traffic(),
            updates={update.device: update.body for update in updates},
        )

    def _tampered(self, number: int) -> list[Update]:
        honest = list(self._updates.values())
        if self._tamper is None:
            return honest
        kept = []
        for update in self._tamper(number, honest):
            with contextlib.suppress(LiberataiError):
                check_update(update, self.versions.now.members[update.structure].structure, self.job)
                kept.append(update)
        return kept

    def _accuracy(self) -> dict[str, float]:
        x, y = self.population.test
        return {
            sid: float(
                (log_probabilities(one.structure, self.job.data, one.view, x).argmax(axis=1) == y).mean()
            )
            for sid, one in self.versions.now.members.items()
        }

    def _structure(self, name: str) -> str:
        assigned = self.plan.assignments[name]
        if not assigned.structure:
            raise RuntimeError(f"{name}: {assigned.why}")
        return assigned.structure

    def _invitation(self, name: str, number: int) -> deciding.Invitation:
        structure = self._structure(name)
        base = self.versions.now.chains[structure][-1].digest
        uid = update_id(name, self.job.name, number, base)
        return deciding.Invitation(device=name, structure=structure, base=base, update_id=uid)

    def _receive(self, device: _Device, update: Update) -> None:
        """Let the round decide about an update, and answer as the service does."""
        if self._round is None:
            raise RuntimeError("an update before the first round")
        check_update(update, self.versions.now.members[update.structure].structure, self.job)
        waiting = deque(self._round.handle(deciding.UpdateArrived(update=update)))
        while waiting:
            match waiting.popleft():
                case deciding.Store():
                    self._updates[device.name] = update
                    stored = deciding.UpdateStored(
                        device=device.name, update_id=update.update_id, outcome="stored"
                    )
                    waiting.extend(self._round.handle(stored))
                case deciding.Accept(update_id=uid):
                    receipt = Receipt(device=device.name, update_id=uid, accepted=True)
                    self._down(device, self._topics.down(device.name, "req"), receipt)
                    self._happen(device, on.ReceiptArrived(receipt=receipt))
                case deciding.Refuse(error=error):
                    raise error
                case _:
                    pass

    def _publish(self, content: bytes) -> BlobRef:
        """Let a file stand where devices fetch it."""
        name = blob_id(content)
        path = self._files / name
        if not path.exists():
            path.write_bytes(content)
        return BlobRef(blob=name, size_bytes=len(content))

    # --- a device's side -------------------------------------------------------------------------

    def _device(self, number: int) -> _Device:
        x, y = self.population.devices[number]
        name = f"device-{number:04d}"
        path = self.folder / f"{name}.npz"
        np.savez(path, x=x, y=y)
        state, _ = s.step(s.Session(device=name), on.Started())
        state, _ = s.step(state, on.LinkUp())
        return _Device(name, Signer.from_seed(_key(name), FLEET), path, len(y), state)

    def _capability(self, device: _Device) -> Capability:
        return Capability(
            device=device.name,
            public_key=device.signer.public_key,
            session=1,
            agent_version="",
            tier="full",
            runtimes=("torch", "numpy"),
            samples=device.samples,
            data=self.population.data,
        )

    def _happen(self, device: _Device, event: on.Happened) -> None:
        waiting: deque[on.Happened] = deque([event])
        while waiting:
            device.session, actions = s.step(device.session, waiting.popleft())
            for action in actions:
                waiting.extend(self._do(device, action))

    def _do(self, device: _Device, action: do.Action) -> list[on.Happened]:
        match action:
            case do.FetchBlobs(refs=refs):
                for ref in refs:
                    self._fetch(device, ref)
                return [on.BlobStored(blob=ref.blob) for ref in refs]
            case do.ReadSpec(blob=blob):
                return [on.SpecRead(blob=blob, spec=decode_spec((self._files / blob).read_bytes()))]
            case do.StartTraining(task=task):
                # Training outlasts the hold of a routine report; other phases of a round do not.
                report = Report(
                    device=device.name, session=1, phase="training", job=task.job, round=task.round
                )
                self._up(device, self._topics.up(device.name, "rep"), report)
                return [self._train(device, action)]
            case do.StoreUpdate(task=task, update_id=uid, result=result):
                device.results[uid] = (task, result)
                device.residual, device.residual_round = result.residual, task.round
                return [on.OutboxStored(update_id=uid)]
            case do.SendUpdate(update_id=uid):
                self._send(device, uid)
            case do.Forget(update_id=uid):
                del device.results[uid]
            case do.Emit(name=name, code=code, text=text):
                raise RuntimeError(f"{device.name}: {name} {code} {text}")
            case _:
                pass
        return []

    def _train(self, device: _Device, action: do.StartTraining) -> on.Trained:
        task, spec = action.task, action.spec
        away = max(0, task.round - device.residual_round - 1) if device.residual is not None else 0
        answer = work(
            Work(
                device=device.name,
                job=task.job,
                round=task.round,
                structure=spec.structure,
                data=spec.data,
                training=spec.training,
                seed=spec.seed,
                density=task.density,
                path=tuple(
                    File(path=str(self._files / one.blob.blob), digest=one.digest) for one in action.path
                ),
                data_path=str(device.data_path),
                runtime=self._runtime,
                codec=spec.codec,
                residual=device.residual,
                share_class_counts=spec.share_class_counts,
                trained_share=spec.trained_share,
                rounds_away=away,
                residual_decay=spec.residual_decay,
                residual_limit=spec.residual_limit,
            ),
            device.memory,
        )
        if isinstance(answer, Failed):
            raise RuntimeError(f"{device.name}: {answer.code} {answer.text}")  # noqa: TRY004
        return on.Trained(update_id=action.update_id, result=answer.result)

    def _send(self, device: _Device, uid: bytes) -> None:
        task, result = device.results[uid]
        update = Update(
            update_id=uid,
            device=device.name,
            job=task.job,
            round=task.round,
            epoch=task.epoch,
            structure=self._structure(device.name),
            base=task.base,
            samples=result.samples,
            codec=self.job.sparsify.method,
            body=result.body,
            class_counts=result.class_counts,
            evaluation=result.evaluation,
            train_seconds=result.train_seconds,
            loss=result.loss,
            sent_bytes=device.traffic.up,
            received_bytes=device.traffic.down,
        )
        device.traffic.up_body += len(result.body)
        frame = seal(update, device.signer)
        if len(frame) <= MAX_SINGLE_BYTES:
            self._count_up(device, self._topics.up(device.name, "ev"), len(frame))
        else:
            self._upload(device, update, frame)
        self._receive(device, update)

    def _upload(self, device: _Device, update: Update, frame: bytes) -> None:
        """Count offer, credits and chunks of a long update."""
        transfer, number = blob_id(frame), chunks.count(len(frame), CHUNK_BYTES)
        offer = Offer(
            device=device.name,
            transfer=transfer,
            size_bytes=len(frame),
            chunk_bytes=CHUNK_BYTES,
            sha256=hashlib.sha256(frame).digest(),
            update_id=update.update_id,
            job=update.job,
            round=update.round,
        )
        self._up(device, self._topics.upload(device.name, transfer), offer)
        credit = Credit(
            device=device.name, transfer=transfer, have=bytes(-(-number // 8)), chunks=WINDOW_CHUNKS
        )
        for _ in range(-(-number // WINDOW_CHUNKS)):
            self._down(device, self._topics.down(device.name, "xa"), credit)
        for part in range(number):
            size = len(chunks.cut(frame, part, CHUNK_BYTES))
            self._count_up(device, self._topics.upload(device.name, transfer, part), size)

    def _fetch(self, device: _Device, ref: BlobRef) -> None:
        """Count what fetching a blob takes: subscription, manifest, chunks."""
        path = self._files / ref.blob
        content = path.read_bytes() if path.exists() else self.versions.content(ref.blob)
        self._publish(content)
        device.traffic.down_body += len(content)
        topics = [
            self._topics.blob(ref.blob, part) for part in range(chunks.count(len(content), CHUNK_BYTES))
        ]
        for part, topic in enumerate(topics):
            self._count_down(device, topic, len(chunks.cut(content, part, CHUNK_BYTES)))
        if len(topics) > 1:
            manifest = BlobManifest(blob=ref.blob, size_bytes=len(content), chunk_bytes=CHUNK_BYTES)
            topics.append(self._topics.blob(ref.blob))
            self._down(device, topics[-1], manifest)
        for topic in topics:  # SUBSCRIBE and UNSUBSCRIBE: fixed header, packet id, properties, filter
            device.traffic.up += (2 + 2 + 1 + 2 + len(topic) + 1) + (2 + 2 + 1 + 2 + len(topic))
            device.traffic.down += 2 * SUBACK

    # --- counting --------------------------------------------------------------------------------

    def _up(self, device: _Device, topic: str, message: Message) -> None:
        self._count_up(device, topic, len(seal(message, device.signer)))

    def _down(self, device: _Device, topic: str, message: Message) -> None:
        self._count_down(device, topic, len(seal(message, self._signer)))

    def _count_up(self, device: _Device, topic: str, size: int) -> None:
        device.traffic.up += publish_bytes(topic, size)
        device.traffic.down += PUBACK

    def _count_down(self, device: _Device, topic: str, size: int) -> None:
        device.traffic.down += publish_bytes(topic, size)
        device.traffic.up += PUBACK


def _key(name: str) -> bytes:
    return hashlib.sha256(f"simulated {name}".encode()).digest()
