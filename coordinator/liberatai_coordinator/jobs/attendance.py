"""What becomes of devices while rounds wait for them: who is away, who said that it failed, who is back.

A device that lost its connection usually comes back with its update: a round goes on waiting for it, but not
to its deadline. One that says that it failed has answered.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.jobs.runner import Runner
from liberatai_coordinator.rounds import round as deciding
from liberatai_core.contract.messages import Report
from liberatai_core.errors import MemoryLimitError

GRACE_S, GRACE_SHARE = 30.0, 0.25
"""How long a round waits for a device that is away: so long, or so much of its deadline if that is less."""
LAST_S, LAST_SHARE = 2.0, 0.25
"""The same once most have answered and it waits for nobody else: so long, or so much of the time that the
round took until now if that is more. What a device does meanwhile is not lost: a later round gets it."""


@dataclass(slots=True, kw_only=True)
class Attendance:
    """Tells open rounds and their jobs about devices.

    Attributes:
        runners: by the name of their job.
        answer_baseless: lets a job answer a device that lacks what it was told to go on from.
    """

    runners: dict[str, Runner]
    answer_baseless: Callable[[Device], None]
    _away: dict[str, float] = field(default_factory=dict)

    def devices_changed(self, devices: Collection[Device], now_s: float) -> None:
        """Devices came, went or can do other things than before."""
        for device in devices:
            if device.online:
                self._away.pop(device.id, None)
            elif device.silent:
                self._away[device.id] = now_s - GRACE_S  # its silence was long enough
            elif device.said != "draining" or _rests(device):
                self._away.setdefault(device.id, now_s)
        for job in self.runners.values():
            job.opening.fleet_changed.set()
            now = job.open_round
            for device in devices if now is not None else ():
                if now is not None and device.id in now.invitations:
                    self._attend(job, now, device)

    def reported(self, device: Device, report: Report, now_s: float) -> None:
        """Let the round of a task know that its device failed, or that it tries again after all."""
        if device.said == "draining" and _rests(device):
            self._away.setdefault(device.id, now_s)  # it finishes nothing: it waits
        job = self.runners.get(report.job)
        now = job.open_round if job is not None else None
        if job is None or now is None or now.asked(device.id) != report.round:
            return
        if report.phase == "failed" and device.id not in now.failed:
            job.roster.failures.note(device.id, "failed", device.capability, now_s)
            if report.reason.startswith(MemoryLimitError.code):
                job.roster.lighten(device.id)
            job.collecting.decide(deciding.Failed(device=device.id))
        elif report.phase != "failed" and device.online and device.id in now.failed | now.gone:
            job.collecting.decide(deciding.Back(device=device.id))

    def base_missing(self, device: Device) -> None:
        """Let a job answer a device that does not hold what its task goes on from."""
        if device.status == "approved":
            self.answer_baseless(device)

    def connected_again(self, now_s: float) -> None:
        """Give all who are away their whole time: while the broker was gone they could not come back."""
        self._away = dict.fromkeys(self._away, now_s)

    def tick(self, now_s: float) -> None:
        """Let no round wait longer for a device that is away."""
        if not self._away:
            return
        for job in self.runners.values():
            now = job.open_round
            if now is None:
                continue
            deadline_s = job.job.rounds.deadline_s
            grace_s = min(GRACE_S, GRACE_SHARE * deadline_s)
            if now.waiting <= self._away.keys() and 2 * len(now.stored) > len(now.invitations):
                taken_s = max(0.0, now_s - (now.closes_s - deadline_s))
                grace_s = min(grace_s, max(LAST_S, LAST_SHARE * taken_s))
            for device in now.waiting & self._away.keys():
                if now_s - self._away[device] >= grace_s:
                    self._give_up(job, now, device, now_s)

    def _give_up(self, job: Runner, now: deciding.Round, device: str, now_s: float) -> None:
        known = job.fleet.devices.get(device)
        if device not in now.stored and known is not None and known.said != "draining":
            job.roster.failures.note(device, "lost", known.capability, now_s)
        job.collecting.decide(deciding.Gone(device=device))

    def _attend(self, job: Runner, now: deciding.Round, device: Device) -> None:
        if device.status == "quarantined":
            job.collecting.decide(deciding.Gone(device=device.id))
        elif device.online and device.status == "approved" and device.id in now.gone:
            job.collecting.decide(deciding.Back(device=device.id))


def _rests(device: Device) -> bool:
    """Whether a device that wants no new work does not go on with what it has either."""
    return device.report is not None and device.report.phase == "gated"
