"""What the devices of one job are told: the files that lead to a version, tasks, and how the job ended."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.jobs.materials import spec_of
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.roster import Roster
from liberatai_coordinator.jobs.slots import Slots
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.rounds.catch_up import Path, Way
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.ledger import Ledger
from liberatai_core.contract import messages
from liberatai_core.contract.frame import encode_spec
from liberatai_core.contract.messages import BlobRef, Cancel, Head, Step, Task
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import BusyError, DiskError

STANDING = "standing"
"""Name under which the ledger has a job's blobs at the broker: name -> bytes. Written before they are there,
so that what a crash leaves behind can be taken away."""
STEPS = "steps"
"""Name under which the ledger has the files that paths consist of, by number: thousands of devices hold the
same ones, and a number is a twentieth of a name."""
MANY_STEPS = 256
"""Files with a number, besides those in use, before the others lose theirs."""
RUN = "run"
"""Name under which the ledger has what was drawn when the job was created."""


@dataclass(slots=True, kw_only=True)
class Tasks:
    """What one job lets stand at the broker.

    Attributes:
        paths: what devices surely hold: the files of the last update of theirs that was stored.
        ways: in the open round, or at the end: what every device was told to fetch.
        run: names the creation of the job; see `messages.update_id`.
    """

    job: JobSpec
    ledger: Ledger
    versions: Versions
    publisher: Publisher
    slots: Slots
    roster: Roster
    coordinator: str
    paths: dict[str, Path] = field(default_factory=dict)
    ways: dict[str, Way] = field(default_factory=dict)
    run: bytes = b""
    _specs: dict[str, BlobRef] = field(default_factory=dict)
    _standing: dict[str, int] = field(default_factory=dict)
    _steps: dict[int, Step] = field(default_factory=dict)
    _numbers: dict[Step, int] = field(default_factory=dict)
    _many: int = MANY_STEPS
    _numbering: threading.Lock = field(default_factory=threading.Lock)

    def recall(self) -> None:
        """Read from the ledger what devices hold, and what stands at the broker."""
        name = self.job.name
        steps = self.ledger.jobs.value(name, STEPS)
        self._steps = msgspec.msgpack.decode(steps, type=dict[int, Step]) if steps else {}
        self._numbers = {step: number for number, step in self._steps.items()}
        self.paths = {
            device: _decode_path(path, self._steps)
            for device, path in self.ledger.updates.paths(name).items()
        }
        self.run = self.ledger.jobs.value(name, RUN) or b""
        standing = self.ledger.jobs.value(name, STANDING)
        self._standing = msgspec.msgpack.decode(standing, type=dict[str, int]) if standing else {}

    # --- files ---------------------------------------------------------------------------------

    async def publish_newest(self, state: str) -> None:
        """Let the newest version stand at the broker: tasks' specs, files, and what names them."""
        now = self.versions.now
        specs = {sid: encode_spec(spec_of(self.job, one.structure)) for sid, one in now.members.items()}
        steps = [step for chain in now.chains.values() for step in chain]
        self._note({blob_id(spec): len(spec) for spec in specs.values()} | _sizes(steps))
        for sid, spec in specs.items():
            self._specs[sid] = await self.publisher.add_blob(spec, self.job.name)
        await self.publish_steps(steps)
        await self.publish_head(state)

    async def publish_steps(self, steps: Iterable[Step]) -> None:
        """Publish files that somebody needs, once for all devices."""
        sizes = _sizes(steps)
        self.publisher.hold(sizes, self.job.name)
        new = sorted(name for name in sizes if name not in self.publisher.blobs)
        contents = [self.versions.content(name) for name in new]
        self._note(sizes)
        await asyncio.gather(*(self.publisher.add_blob(content, self.job.name) for content in contents))

    async def publish_head(self, state: str) -> None:
        """Say which version is the newest."""
        now = self.versions.now
        head = Head(
            job=self.job.name,
            epoch=self.ledger.epoch,
            version=now.number,
            state=msgspec.convert(state, messages.HeadState),
            chains=now.chains,
        )
        await self.publisher.retain(self.publisher.topics.head(self.job.name), head)

    async def drop_unneeded(self, ways: Iterable[Way]) -> None:
        """Take away files that neither newcomers nor devices on these ways need."""
        steps = [step for chain in self.versions.now.chains.values() for step in chain]
        wanted = {step.blob.blob for step in steps} | {step.blob.blob for way in ways for step in way.steps}
        await self._drop(wanted | {spec.blob for spec in self._specs.values()})

    async def drop_all(self) -> None:
        """Take away all files of a job that is over without a model."""
        await self._drop(set())

    async def drop_specs(self) -> None:
        """Take away what only tasks need."""
        await self._drop(set(self._standing) - {spec.blob for spec in self._specs.values()})

    async def _drop(self, wanted: set[str]) -> None:
        unneeded = {name: size for name, size in self._standing.items() if name not in wanted}
        await self.publisher.drop_blobs(unneeded, self.job.name)
        await self.publisher.forget_blobs(unneeded)
        # It is written with the next blob that is new: named once too often costs a word after a crash.
        self._standing = {name: size for name, size in self._standing.items() if name not in unneeded}

    def _note(self, sizes: Mapping[str, int]) -> None:
        if not sizes.keys() <= self._standing.keys():
            self._standing |= sizes
            self._write()

    def _write(self) -> None:
        self.ledger.jobs.set_value(self.job.name, STANDING, msgspec.msgpack.encode(self._standing))

    # --- ways ----------------------------------------------------------------------------------

    def find_ways(self, wanted: Sequence[tuple[str, str]]) -> dict[str, Way]:
        """Return how each of these (device, structure) gets to the newest version."""
        ways = {
            device: self.versions.way(sid, self._path(device), self.roster.room(device))
            for device, sid in wanted
        }
        self._number(step for way in ways.values() for step in way.path)
        return ways

    def _path(self, device: str) -> Path:
        """Return the files that a device holds; another job's task has taken their place if it had one."""
        last = self.slots.sharing.served_last(device)
        return self.paths.get(device, ()) if last in (None, self.job.name) else ()

    def steps(self, invitations: Sequence[Invitation]) -> list[Step]:
        """Return the files that these devices fetch.

        After a restart a way that was told before may name files that no longer lead to the newest version.
        Where they cannot be made again, what stands at the broker must do; a device that lacks them will be
        asked anew.
        """
        found: list[Step] = []
        for one in invitations:
            way = self.ways.get(one.device)
            if way is None:
                continue
            older = [step for step in way.steps if step.blob.blob not in self.publisher.blobs]
            recallable = self.job.rounds.mode != "buffered" or not older
            if recallable or self.versions.recall(one.structure, way):
                found += way.steps
        return found

    def versions_needed(self, standing: Iterable[Invitation]) -> set[int]:
        """Return the versions that devices come from: where their paths end, and what they train on."""
        return {path[-1].version for path in self.paths.values() if path} | {one.version for one in standing}

    def path_after(self, device: str) -> bytes:
        """Return what the ledger notes with an update of the open round: what its device holds now."""
        way = self.ways.get(device)
        if way is None:
            return b""
        self._number(way.path)
        return msgspec.msgpack.encode([self._numbers[step] for step in way.path])

    def _number(self, steps: Iterable[Step]) -> None:
        """Give files numbers, durably: no path names a number that the ledger does not know."""
        with self._numbering:
            self._number_new(steps)

    def _number_new(self, steps: Iterable[Step]) -> None:
        new = dict.fromkeys(step for step in steps if step not in self._numbers)
        if not new:
            return
        first = max(self._steps, default=0) + 1
        known = {**self._steps, **dict(enumerate(new, first))}
        if len(known) > self._many:
            held = {step for path in list(self.paths.values()) for step in path} | new.keys()
            held |= {step for way in list(self.ways.values()) for step in way.path}
            known = {number: step for number, step in known.items() if step in held}
            self._many = 2 * len(known) + MANY_STEPS
        self.ledger.jobs.set_value(self.job.name, STEPS, msgspec.msgpack.encode(known))
        self._steps, self._numbers = known, {step: number for number, step in known.items()}

    def note_path(self, device: str) -> None:
        """Its update was made from the newest weights: the device holds what leads there."""
        if device in self.ways:
            self.paths[device] = self.ways[device].path

    def from_nothing(self, device: str) -> None:
        """A device does not hold what it was told to go on from: it gets the whole path."""
        self.paths.pop(device, None)
        with contextlib.suppress(DiskError, BusyError):
            # Read again after a restart, it costs the device another question.
            self.ledger.updates.forget_path(self.job.name, device)
        self.ways[device] = self.versions.way(self.roster.assigned[device].structure, (), 0)

    # --- words ---------------------------------------------------------------------------------

    def invite(self, number: int, devices: Iterable[str]) -> list[Invitation]:
        """Return the invitations of these devices to train on the newest version."""
        chains, found = self.versions.now.chains, []
        for device in devices:
            structure = self.roster.assigned[device].structure
            base = chains[structure][-1].digest
            name = messages.update_id(device, self.job.name, number, base, self.run)
            found.append(Invitation(device=device, structure=structure, base=base, update_id=name))
        return found

    def lasting(self, number: int, invitation: Invitation, way: Way) -> Invitation:
        """Return an invitation that can stand over: with the version, and what the device shall fetch."""
        return msgspec.structs.replace(
            invitation, round=number, version=self.versions.now.number, opened_s=clock.wall(), way=way
        )

    async def tell(self, number: int, invitations: Iterable[Invitation]) -> None:
        """Give devices their tasks of a round."""
        await self.slots.give(self._task(number, one) for one in invitations)

    def _task(self, number: int, invitation: Invitation) -> Task:
        way = self.ways[invitation.device]
        return Task(
            task_id=invitation.update_id,
            epoch=self.ledger.epoch,
            coordinator=self.coordinator,
            device=invitation.device,
            job=self.job.name,
            round=invitation.round or number,
            spec=self._specs[invitation.structure],
            density=self.roster.task_density(invitation.device, way.size_bytes),
            held=way.held,
            steps=way.steps,
            run=self.run,
        )

    async def tell_end(self, devices: Iterable[str], number: int) -> None:
        """Tell devices that the job is over after round `number`; a way leads to the finished model."""
        await self.slots.end(self._cancel(device, number) for device in devices)

    def _cancel(self, device: str, number: int) -> Cancel:
        way = self.ways.get(device)
        return Cancel(
            device=device,
            epoch=self.ledger.epoch,
            coordinator=self.coordinator,
            job=self.job.name,
            round=number,
            held=b"" if way is None else way.held,
            final=() if way is None else way.steps,
        )


def _sizes(steps: Iterable[Step]) -> dict[str, int]:
    return {step.blob.blob: step.blob.size_bytes for step in steps}


def _decode_path(path: bytes, steps: Mapping[int, Step]) -> Path:
    """Return a path of the ledger: numbers, or in ledgers of the first release the files themselves.

    One that says nothing to this release is worth nothing: the device fetches anew.
    """
    with contextlib.suppress(msgspec.MsgspecError, KeyError):
        found = msgspec.msgpack.decode(path, type=tuple[int | Step, ...])
        return tuple(steps[one] if isinstance(one, int) else one for one in found)
    return ()
