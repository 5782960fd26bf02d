"""Runs rollouts: asks `fleet.rollout` what follows, wishes it of devices, and writes down where all stand.

What a device had before is written down with it before the new is wished: so it can be gone back to, whatever
happens in between.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.control.cargo import Cargo, Loaded, load, unload
from liberatai_coordinator.control.shadows import Desired, Shadows
from liberatai_coordinator.fleet import rollout as deciding
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.fleet.rollout import ENDED, Part, Plan, Rollout
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import RolloutRow
from liberatai_core.errors import LiberataiError, NotFoundError, StateError

log = logging.getLogger(__name__)

TICK_S: Final = 1.0


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for.

    Attributes:
        cargo: what it brings.
        query: tells who belongs to it, see `fleet.query`.
        who: the same as the operator wrote it.
        plan: how it goes on.
    """

    cargo: Cargo
    query: str
    who: str
    plan: Plan


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger has of one device: where it stands, and what it was wished to be like before."""

    part: Part
    before: Desired


@dataclass(slots=True, kw_only=True)
class Running:
    """One rollout.

    Attributes:
        before: what its devices were wished to be like.
        loaded: its cargo, once it stands at the broker.
        fault: why the cargo does not stand there yet.
        wished: whether everything that was decided is wished: after a crash it may not be.
    """

    spec: Spec
    rollout: Rollout
    created_s: float
    before: dict[str, Desired] = field(default_factory=dict)
    loaded: Loaded | None = None
    fault: str = ""
    wished: bool = True


@dataclass(slots=True, kw_only=True)
class Rollouts:
    """All rollouts.

    Attributes:
        members: returns the names of the approved devices of which a question is true.
        by_name: the rollouts.
    """

    fleet: Fleet
    ledger: Ledger
    repository: Repository
    publisher: Publisher
    shadows: Shadows
    members: Callable[[str], tuple[str, ...]]
    by_name: dict[str, Running] = field(default_factory=dict)
    tick_s: float = TICK_S
    _heard: set[str] = field(default_factory=set)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def restore(self) -> None:
        """Read from the ledger where all stand."""
        for row in self.ledger.rollouts.all():
            kept = {
                device: msgspec.msgpack.decode(one, type=_Kept)
                for device, one in self.ledger.rollouts.devices(row.name).items()
            }
            state = msgspec.msgpack.decode(row.state, type=Rollout)
            self.by_name[row.name] = Running(
                spec=msgspec.msgpack.decode(row.spec, type=Spec),
                rollout=msgspec.structs.replace(state, parts={name: one.part for name, one in kept.items()}),
                created_s=row.created_s,
                before={name: one.before for name, one in kept.items()},
                wished=False,
            )

    def get(self, name: str) -> Running:
        """Return a rollout, or raise NotFoundError."""
        if name not in self.by_name:
            raise NotFoundError(f"rollout {name}: not known (see `liberatai rollout list`)")
        return self.by_name[name]

    async def create(self, name: str, spec: Spec) -> Running:
        """Begin a rollout.

        Raises:
            StateError: there is one of this name. LiberataiError: its cargo is not there.
        """
        if name in self.by_name:
            raise StateError(f"rollout {name}: exists already; give another name")
        loaded = await load(spec.cargo, _holder(name), self.ledger, self.repository, self.publisher)
        now_s = clock.wall()
        running = Running(
            spec=spec, rollout=Rollout(name=name, since_s=now_s), created_s=now_s, loaded=loaded
        )
        row = RolloutRow(
            name=name,
            spec=msgspec.msgpack.encode(spec),
            state=_state(running.rollout),
            created_s=now_s,
        )
        await asyncio.to_thread(self.ledger.rollouts.create, row)
        if spec.cargo.model:  # its files are kept as long as somebody may need them
            tag = f"rollout-{name}"
            await asyncio.to_thread(self.ledger.versions.set_tag, spec.cargo.model, tag, spec.cargo.version)
        self.by_name[name] = running
        self.note(running, "rollout_created", spec.cargo.words)
        self._wake.set()
        return running

    async def tell(self, name: str, event: deciding.Event) -> Running:
        """Let an operator's word, or a device's, be decided about."""
        running = self.get(name)
        async with self._lock:
            await self._step(running, event)
        return running

    def heard(self, device: str) -> None:
        """Note that a device has said what it is like."""
        self._heard.add(device)
        self._wake.set()

    def forget(self, device: str) -> None:
        """Note that a device was decommissioned."""
        self._heard.add(device)
        self._wake.set()

    async def run(self) -> None:
        """Go on with all rollouts until cancelled."""
        while True:
            self._wake.clear()
            async with self._lock:
                heard, self._heard = self._heard, set()
                for running in list(self.by_name.values()):
                    try:
                        await self._look(running, heard)
                    except LiberataiError as error:
                        self._heard |= heard
                        log.warning("rollout %s waits: %s %s", running.rollout.name, error.code, error)
            try:
                async with asyncio.timeout(self.tick_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look(self, running: Running, heard: Collection[str]) -> None:
        rollout = running.rollout
        if rollout.state in ("cancelled", "rolled back"):
            return
        if running.loaded is None:
            await self._load(running)
        if not running.wished:
            await self._wish_again(running)
        for device in [name for name in rollout.parts if name not in self.fleet.devices]:
            await self._step(running, deciding.Gone(device=device))
        for device in [name for name in heard if name in rollout.parts]:
            if (told := self._told(running, device)) is not None:
                await self._step(running, told)
        if running.rollout.state not in ENDED:
            members = self.members(running.spec.query)
            await self._step(running, deciding.Tick(now_s=clock.wall(), members=members))

    async def _wish_again(self, running: Running) -> None:
        """Wish what was decided before a crash; what is wished already is not said again."""
        wishes: dict[str, Desired] = {}
        for device, part in running.rollout.parts.items():
            known = self.fleet.devices.get(device)
            if known is None:
                continue
            if part.state == "going back":
                wishes[device] = running.before[device]
            elif part.state == "offered" and running.loaded is not None:
                with contextlib.suppress(LiberataiError):
                    wishes[device] = running.loaded.wish(known, running.before[device])
        await self.shadows.wish_all(wishes.items())
        self._heard |= running.rollout.parts.keys()
        running.wished = True

    async def _load(self, running: Running) -> None:
        name = running.rollout.name
        try:
            running.loaded = await load(
                running.spec.cargo, _holder(name), self.ledger, self.repository, self.publisher
            )
            running.fault = ""
        except LiberataiError as error:
            running.fault = f"{error.code}: {error}"
            raise

    def _told(self, running: Running, device: str) -> deciding.Told | None:
        """Return what a device's newest word says about this rollout; None: nothing yet."""
        shadow, part = self.shadows.of(device), running.rollout.parts[device]
        have = shadow.have
        if have is None or have.version != shadow.version or have.state == "working":
            return None
        if part.state in ("done", "failed", "back"):
            return None
        return deciding.Told(
            device=device,
            now_s=clock.wall(),
            outcome="done" if have.state == "done" else "failed",
            reason=f"{have.code}: {have.text}" if have.code else "",
            evaluation=have.evaluation,
            before=have.before,
        )

    async def _step(self, running: Running, event: deciding.Event) -> None:
        """Decide, write it down, then wish it: in this order, so that a crash loses nothing."""
        before = running.rollout
        after, actions = deciding.step(running.spec.plan, before, event)
        if after == before:
            return
        wishes: dict[str, Desired] = {}
        failed: list[deciding.Told] = []
        for action in actions:
            for device in action.devices:
                if isinstance(action, deciding.Offer):
                    running.before[device] = self.shadows.of(device).desired
                    try:
                        assert running.loaded is not None  # noqa: S101 - `_look` has loaded it
                        known = self.fleet.require(device)
                        wishes[device] = running.loaded.wish(known, running.before[device])
                    except LiberataiError as error:
                        text = f"{error.code}: {error}"
                        failed.append(
                            deciding.Told(device=device, now_s=clock.wall(), outcome="failed", reason=text)
                        )
                elif device in self.fleet.devices and device in running.before:
                    wishes[device] = running.before[device]
        await self._write(running, before, after)
        running.rollout = after
        if after.state != before.state:
            words = f"stage {after.stage + 1} of {len(running.spec.plan.stages)}"
            self.note(running, f"rollout_{after.state.replace(' ', '_')}", after.reason or words)
        await self.shadows.wish_all(wishes.items())
        # Who is as wished already will say nothing new.
        self._heard |= wishes.keys()
        if wishes:
            self._wake.set()
        for told in failed:
            await self._step(running, told)
        if after.state in ("cancelled", "rolled back") and running.loaded is not None:
            loaded, running.loaded = running.loaded, None
            await unload(loaded, self.publisher)

    async def _write(self, running: Running, before: Rollout, after: Rollout) -> None:
        moved = {
            device: msgspec.msgpack.encode(_Kept(part=part, before=running.before.get(device, Desired())))
            for device, part in after.parts.items()
            if before.parts.get(device) != part
        }
        gone = [device for device in before.parts if device not in after.parts]
        steady = msgspec.structs.replace(after, since_s=before.since_s, members=before.members)
        if not moved and not gone and steady == before:
            return
        await asyncio.to_thread(self.ledger.rollouts.put, after.name, _state(after), moved, gone)

    def note(self, running: Running, what: str, text: str) -> None:
        """Note an event of a rollout."""
        self.ledger.events.note(clock.wall(), "", what, "", f"{running.rollout.name}: {text}")


def _holder(name: str) -> str:
    return f"rollout:{name}"


def _state(rollout: Rollout) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(rollout, parts={}))
