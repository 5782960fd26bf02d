"""The one slot that every device has at the broker: the task of the job that has it now, or how one ended.

A job that ends tells its devices so, with the way to the finished model. One that serves another job at that
moment is told when it is free again: a word about the end must not take the place of a task.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.sharing import Sharing
from liberatai_core.contract.messages import Cancel, Task


@dataclass(slots=True, kw_only=True)
class Slots:
    """The slots of all devices.

    Attributes:
        ends: words about ended jobs that wait until their device is free, by device and job.
        owners: the job whose word stands in a slot, since this start.
    """

    publisher: Publisher
    sharing: Sharing
    ends: dict[str, dict[str, Cancel]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    _telling: set[asyncio.Task[None]] = field(default_factory=set)

    async def give(self, tasks: Iterable[Task]) -> None:
        """Let tasks stand in the slots of their devices."""
        given = list(tasks)
        for task in given:
            self.owners[task.device] = task.job
            self.ends.get(task.device, {}).pop(task.job, None)
        await self.publisher.retain_all((self._topic(task.device), task) for task in given)

    async def end(self, cancels: Iterable[Cancel]) -> None:
        """Tell devices that a job is over for them, now or when they are free."""
        now = []
        for cancel in cancels:
            leads_nowhere = not cancel.final and not cancel.held
            if leads_nowhere and self.owners.get(cancel.device, cancel.job) != cancel.job:
                continue  # the task is gone already, and the way to another job's model stays
            if self.sharing.holder(cancel.device) in (None, cancel.job):
                now.append(cancel)
            else:
                self.ends.setdefault(cancel.device, {})[cancel.job] = cancel
        await self._end(now)

    async def flush(self, devices: Iterable[str]) -> None:
        """Tell devices that became free what waited for that."""
        free = [device for device in devices if device in self.ends and self.sharing.holder(device) is None]
        await self._end([cancel for device in free for cancel in self.ends.pop(device).values()])

    def free(self, job: str, devices: Iterable[str]) -> None:
        """Take devices back that a job does not need any more; they are told what waited for that."""
        freed = self.sharing.give_back(job, devices)
        if not self.ends.keys().isdisjoint(freed):
            telling = asyncio.create_task(self.flush(freed))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def clear(self, job: str) -> None:
        """Take away every word about a job."""
        for device in [device for device, owner in self.owners.items() if owner == job]:
            del self.owners[device]
            await self.publisher.clear(self._topic(device))
        for device in list(self.ends):
            self.ends[device].pop(job, None)
            if not self.ends[device]:
                del self.ends[device]

    async def _end(self, cancels: list[Cancel]) -> None:
        for cancel in cancels:
            self.owners[cancel.device] = cancel.job
        await self.publisher.retain_all((self._topic(cancel.device), cancel) for cancel in cancels)

    def _topic(self, device: str) -> str:
        return self.publisher.topics.down(device, "task")
