"""Who takes part in a job: what every device was given, whom a round may invite, and how much each may send.

What must outlive a restart is in the ledger: the plan, the sizes of keyframes, the history of participations.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet import plan
from liberatai_coordinator.fleet.devices import Device, Fleet
from liberatai_coordinator.fleet.failures import Failures
from liberatai_coordinator.fleet.link_tries import LinkTries, only_link
from liberatai_coordinator.jobs.records import with_round
from liberatai_coordinator.models.members import derive_seed
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.rounds import selection
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import RoundRow
from liberatai_core.contract.messages import Capability
from liberatai_core.errors import DataError, NotFoundError

log = logging.getLogger(__name__)

GAPS = 20
"""Participations behind the mean time between them."""

MAX_TOLD = 5
"""Devices named where a job says what it waits for."""


@dataclass(slots=True, kw_only=True)
class Roster:
    """The devices of one job.

    Attributes:
        published: returns the number of the newest version.
        candidates: what the plan knows of the job's structures, by id.
        assigned: who got what, by device.
        keyframe_bytes: per structure, what a keyframe may take.
        history: of participations, for selection.
        failures: of its devices, which are not asked again for a while.
        too_heavy: what devices ran out of memory with: they get something lighter.
        link_tries: of devices whose links were too slow when last measured.
    """

    job: JobSpec
    ledger: Ledger
    fleet: Fleet
    published: Callable[[], int]
    candidates: dict[str, plan.Candidate] = field(default_factory=dict)
    assigned: dict[str, plan.Assignment] = field(default_factory=dict)
    keyframe_bytes: dict[str, int] = field(default_factory=dict)
    history: selection.History = field(default_factory=selection.History)
    too_heavy: dict[str, frozenset[plan.Try]] = field(default_factory=dict)
    link_tries: LinkTries = field(default_factory=LinkTries)
    failures: Failures = field(default_factory=Failures)
    _invited: list[deciding.Invitation] = field(default_factory=list)
    _unsaved: bool = False
    _offered: dict[str, tuple[Capability, plan.Assignment]] = field(default_factory=dict)
    _shares: dict[str, tuple[Capability, plan.Assignment, float]] = field(default_factory=dict)
    _invited_s: dict[str, "deque[float]"] = field(default_factory=dict)

    # --- the plan ------------------------------------------------------------------------------

    def recall(self) -> None:
        """Read the plan from the ledger."""
        stored = self.ledger.jobs.value(self.job.name, "plan")
        if stored is not None:
            for assigned in msgspec.msgpack.decode(stored, type=list[plan.Assignment]):
                self.assigned[assigned.device] = assigned
        sizes = self.ledger.jobs.value(self.job.name, "keyframes")
        if sizes is not None:
            self.keyframe_bytes = msgspec.msgpack.decode(sizes, type=dict[str, int])

    def recall_rounds(self) -> None:
        """Read from the ledger who was invited when; takes a while after many rounds."""
        self._invited_s = {}
        for row in self.ledger.rounds.last(self.job.name, GAPS * GAPS):
            self.note_invited(row)
        history = self.ledger.jobs.value(self.job.name, "history")
        if history is not None:
            self.history = msgspec.msgpack.decode(history, type=selection.History)

    def able(self, ready: Sequence[Device]) -> int:
        """Return how many of these can train in this job, before it has a plan; may take a while for many."""
        return sum(bool(given.structure) for given in self._offers(ready).values())

    def make(self) -> None:
        """Give every device that is there a structure, and store that.

        Raises:
            DataError: no device can take part; says why for each.
        """
        self.assigned = self._offers(self.fleet.ready())
        made = plan.keyframe_budgets(self.job, list(self.candidates.values()), self.assigned.values())
        if not made:
            reasons = "; ".join(f"{a.device}: {a.why}" for a in self.assigned.values())
            raise DataError(f"no device can take part: {reasons}")
        self.keyframe_bytes = made
        self._offered = {}
        self._store()

    def _offers(self, ready: Sequence[Device]) -> dict[str, plan.Assignment]:
        """Return what each of these devices would get; found out anew only for what changed."""
        candidates, offers = list(self.candidates.values()), {}
        for device in ready:
            if device.capability is None:
                continue
            known = self._offered.get(device.id)
            if known is None or known[0] is not device.capability:
                known = (device.capability, plan.assign(self.job, candidates, device.capability))
                self._offered[device.id] = known
            offers[device.id] = known[1]
        return offers

    def _store(self) -> None:
        plan_bytes = msgspec.msgpack.encode(sorted(self.assigned.values(), key=lambda a: a.device))
        self.ledger.jobs.set_value(self.job.name, "plan", plan_bytes)
        self.ledger.jobs.set_value(self.job.name, "keyframes", msgspec.msgpack.encode(self.keyframe_bytes))
        self._unsaved = False

    def assign_newcomers(self) -> None:
        """Give devices that came later, or could not take part, one of the structures that the job has.

        It is on disk before one of them is invited, or told of: what is lost with a crash is found out again.
        """
        self._forgive()
        present = [c for c in self.candidates.values() if c.id in self.keyframe_bytes]
        changed = False
        for device in self.fleet.ready():
            before = self.assigned.get(device.id)
            if device.capability is None or (before is not None and before.structure):
                continue
            heavy = self.too_heavy.get(device.id, frozenset())
            made = plan.assign(self.job, present, device.capability, too_heavy=heavy)
            room = made.budget_bytes or self.keyframe_bytes.get(made.structure, 0)
            if made.structure and self.keyframe_bytes[made.structure] > room:
                why = f"the keyframe is larger than its storage: {made.why}"
                made = replace(made, structure="", why=why)
            self.assigned[device.id] = made
            changed = changed or made != before
        self._unsaved = self._unsaved or changed

    def lighten(self, device: str) -> None:
        """Give a device that ran out of memory something lighter: numpy for torch, or a smaller structure.

        Where nothing lighter fits it keeps what it has, and is asked again after a pause.
        """
        assigned, known = self.assigned.get(device), self.fleet.devices.get(device)
        if assigned is None or not assigned.structure or known is None or known.capability is None:
            return
        heavy = self.too_heavy.get(device, frozenset()) | {(assigned.structure, assigned.tier or "full")}
        present = [c for c in self.candidates.values() if c.id in self.keyframe_bytes]
        made = plan.assign(self.job, present, known.capability, too_heavy=heavy)
        if not made.structure:
            return
        self.too_heavy[device] = heavy
        self.assigned[device] = made
        self.failures.clear(device)
        self._unsaved = True
        log.info("device %s ran out of memory: %s", device, made.why)

    def taking(self) -> list[tuple[str, str]]:
        """Return every (device, structure) of the plan."""
        return [(device, one.structure) for device, one in self.assigned.items() if one.structure]

    # --- what a device can bear ----------------------------------------------------------------

    def room(self, device: str) -> int:
        """Return what a device's files may take: as planned, or less if it has less now; 0: no limit."""
        known = self.fleet.devices.get(device)
        now = known.capability.storage_bytes if known and known.capability else 0
        return min((size for size in (self.assigned[device].budget_bytes, now) if size), default=0)

    def spacing_s(self, device: str) -> float:
        """Return the time between two participations of a device, for its quota: measured if it took part."""
        times = self._invited_s.get(device)
        gap_s = max(0.0, clock.wall() - times[0]) / len(times) if times else None
        # A gap of no time at all is none that was measured.
        return plan.spacing_s(self.job, self.job.rounds.count - self.published(), gap_s or None)

    def task_density(self, device: str, download_bytes: int) -> float:
        """Return the share of the parameters that an invited device sends, above 0.

        Args:
            device: with a structure.
            download_bytes: that it fetches first.
        """
        assigned = self.assigned[device]
        candidate = self.candidates.get(assigned.structure)
        return (
            # A download that is too much for now is no reason to let an invited device send nothing.
            self._density(device, download_bytes, warm=True)
            or self._density(device)
            or (plan.least_density(candidate) if candidate else assigned.density)
        )

    def _density(self, device: str, download_bytes: int | None = None, *, warm: bool = False) -> float:
        """Return the share of the parameters that a device's link carries now; 0: it cannot take part.

        Args:
            device: with a structure.
            download_bytes: see `plan.density`.
            warm: whether it may be more than usual in the job's first rounds.
        """
        assigned, known = self.assigned[device], self.fleet.devices.get(device)
        candidate = self.candidates.get(assigned.structure)
        if candidate is None or known is None or known.capability is None:
            return assigned.density
        if warm:
            candidate = plan.warmed(self.job, candidate, self.published() + 1)
        return plan.density(
            self.job,
            candidate,
            known.capability,
            download_bytes=download_bytes,
            round_s=self.spacing_s(device),
        )[0]

    # --- whom a round invites ------------------------------------------------------------------

    def ready(self, number: int) -> list[Device]:
        """Return the devices that may be invited to this round.

        Warm-up does not matter: it only raises densities.
        """
        now_s = clock.monotonic()
        return [device for device in self.fleet.ready() if self._takes_part(device, number, now_s)]

    def _takes_part(self, device: Device, number: int, now_s: float) -> bool:
        name, assigned = device.id, self.assigned.get(device.id)
        if assigned is None or not assigned.structure or _unable(self.job, device):
            return False
        if not self.failures.may_try(name, device.capability, now_s):
            return False
        if self._share(device, assigned) > 0:
            self.link_tries.clear(name)
            return True
        candidate = self.candidates.get(assigned.structure)
        return only_link(self.job, candidate, device.capability) and self.link_tries.is_due(
            name, number, now_s
        )

    def _share(self, device: Device, assigned: plan.Assignment) -> float:
        """Return what `_density` does for a round that misses nothing; found out anew only after a change."""
        capability, candidate = device.capability, self.candidates.get(assigned.structure)
        if candidate is None or capability is None:
            return assigned.density
        known = self._shares.get(device.id)
        if known is not None and known[0] is capability and known[1] is assigned:
            return known[2]
        round_s = self.spacing_s(device.id) if capability.day_quota_bytes else None
        share = plan.share(self.job, candidate, capability, round_s=round_s)
        if not capability.day_quota_bytes:  # what a quota allows varies with the time
            self._shares[device.id] = (capability, assigned, share)
        return share

    def remember(self, number: int) -> None:
        """Add the rounds before this one to the history, from what the ledger has of them."""
        newer = self.ledger.rounds.all(self.job.name, after=self.history.round)
        rows = [row for row in newer if row.round < number]
        for row in rows:
            try:
                stored = self.ledger.updates.of_round(self.job.name, row.round)
            except NotFoundError:  # pruned: only rounds from before a long pause of this record
                stored = []
            self.history = with_round(self.history, row, stored)
        if rows:
            self.ledger.jobs.set_value(self.job.name, "history", msgspec.msgpack.encode(self.history))

    def choose(self, number: int, ready: Iterable[Device], wanted: int) -> list[Device]:
        """Return so many of those that are ready, and note which links are only tried again."""
        if self._unsaved:
            self._store()
        names = selection.choose(
            self.job.rounds.select,
            [device.id for device in ready],
            wanted,
            past=self.history.devices,
            seed=derive_seed(self.job.seed, "participants", number),
            number=number,
            sample_cap=self.job.aggregate.sample_cap,
            preferred_s=self.job.rounds.deadline_s * plan.PREFERRED_SHARE,
        )
        self.link_tries.note_invited(names, number, clock.monotonic())
        return [self.fleet.devices[name] for name in names]

    def _forgive(self) -> None:
        """Forget the failures of devices whose update is stored."""
        for one in [one for one in self._invited if one.device in self.failures]:
            if self.ledger.updates.has(self.job.name, one.device, one.update_id):
                self.failures.clear(one.device)

    def note_invited(self, row: RoundRow) -> None:
        """Note when the devices of a round were invited to it."""
        self._invited = msgspec.msgpack.decode(row.invited, type=list[deciding.Invitation])
        for one in self._invited:
            if one.round in (0, row.round):  # its own, not one that stands over
                self._invited_s.setdefault(one.device, deque(maxlen=GAPS)).append(row.opened_s)

    def standing(self, version: int, ready: set[str]) -> list[deciding.Invitation]:
        """Return the invitations of the newest round that are still to be answered (buffered jobs).

        Args:
            version: the newest.
            ready: devices that could take another task.
        """
        newest = self.ledger.rounds.newest(self.job.name)
        if newest is None:
            return []
        invited = msgspec.msgpack.decode(newest.invited, type=list[deciding.Invitation])
        asked = [self.fleet.devices.get(one.device) for one in invited]  # not all that are known
        approved = {one.id for one in asked if one is not None and one.status == "approved"}
        return deciding.standing(
            [one for one in invited if one.device in approved],
            set(self.ledger.updates.ids(self.job.name, newest.round)),
            version=version,
            max_staleness=self.job.rounds.max_staleness,
            free=ready,
            opened_after_s=clock.wall() - self.job.rounds.deadline_s,
        )

    def waiting(self, able: int = 0) -> str:
        """Return why no round opens where so many devices could take part, and what speaks against others."""
        if self._unsaved:
            self._store()
        told, now_s = [], clock.monotonic()
        for device in self.fleet.ready():
            if against := self._against(device, now_s):
                told.append(f"{device.id}: {against}")
            if len(told) == MAX_TOLD:
                break
        least = self.job.rounds.min_devices
        there = len(self.fleet.ready_names)
        words = f"waits: {able} of {least} devices can take part (rounds.min_devices)"
        if there < least:
            words = f"waits: {there} of {least} devices are online (rounds.min_devices)"
        elif not able:
            words = "waits: no device can take part"
        return words + (f" ({'; '.join(told)})" if told else "")

    def _against(self, device: Device, now_s: float) -> str:
        """Return why a device cannot take part now; "" if it can, or if nobody has looked yet."""
        offered, given = self._offered.get(device.id), self.assigned.get(device.id)
        if given is None:
            return "" if offered is None or offered[1].structure else offered[1].why
        if not given.structure:
            return given.why
        if unable := _unable(self.job, device):
            return unable
        if not self.failures.may_try(device.id, device.capability, now_s):
            return self.failures.words(device.id, now_s)
        if self._share(device, given) > 0:
            return ""
        candidates, round_s = list(self.candidates.values()), self.spacing_s(device.id)
        return plan.by_link(self.job, candidates, given, device.capability, round_s=round_s).link


def tightest(given: Iterable[plan.Assignment]) -> dict[str, int]:
    """Return per structure the tightest storage among its devices; absent where nobody has a limit."""
    limits: dict[str, int] = {}
    for assigned in given:
        if assigned.structure and assigned.budget_bytes:
            least = limits.get(assigned.structure, assigned.budget_bytes)
            limits[assigned.structure] = min(least, assigned.budget_bytes)
    return limits


def _unable(job: JobSpec, device: Device) -> str:
    """Return why a device with a structure cannot train now, by its own word; "" if it can."""
    report = device.report
    if report is not None and report.phase == "failed" and not report.job:
        return f"it says: {report.reason}"
    return plan.unfit(job, device.capability) if device.capability else "it did not introduce itself"
