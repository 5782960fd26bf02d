"""The trainer of a simulated device: it takes as long as the processor of the profile would."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from msgspec.structs import replace

from liberatai_agent import actions as do
from liberatai_agent import events as on
from liberatai_agent.children.messages import Failed
from liberatai_agent.session.fits import Limits, trainer_of
from liberatai_agent.work.training import rounds_away, work_of
from liberatai_coordinator.fleet.plan import training_s
from liberatai_coordinator.sim.virtual.disk import Disk
from liberatai_coordinator.sim.virtual.learning import Learn
from liberatai_coordinator.sim.virtual.surroundings import Surroundings
from liberatai_core.contract.messages import Capability

LEAST_S: Final = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What a simulated device is made of.

    Attributes:
        capability: what it says of itself; the session number is set at every start.
        data_path: its private file, "" where training is replaced.
        write_mb_s: of its disk.
        learn: its training.
        fails: why every training fails, "" if none does.
    """

    capability: Capability
    data_path: str
    write_mb_s: float
    learn: Learn
    fails: str = ""


class Trainer:
    """Trains one task at a time.

    Attributes:
        busy_s: virtual seconds that it trained.
    """

    __slots__ = ("_body", "_disk", "_happened", "_random", "_timer", "_world", "busy_s")

    def __init__(
        self,
        world: Surroundings,
        body: Body,
        disk: Disk,
        random: Random,
        happened: Callable[[on.Happened], None],
    ) -> None:
        self._world, self._body, self._disk, self._random = world, body, disk, random
        self._happened = happened
        self._timer: asyncio.TimerHandle | None = None
        self.busy_s = 0.0

    def start(self, action: do.StartTraining) -> None:
        """Train; what comes of it happens when the time for it has passed."""
        seconds = training_s(action.spec.training, self._world.macs(action.spec), self._body.capability)
        seconds = max(LEAST_S, seconds * self._random.uniform(0.9, 1.1))
        self._timer = self._world.loop.call_later(seconds, self._trained, action, seconds)

    def _limits(self) -> Limits:
        told = self._body.capability
        return Limits(memory_bytes=told.memory_bytes, runtimes=told.runtimes, samples=told.samples)

    def stop(self) -> None:
        """Stop what is trained, if anything is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _trained(self, action: do.StartTraining, seconds: float) -> None:
        self._timer = None
        self.busy_s += seconds
        if self._body.fails:
            code, _, text = self._body.fails.partition(": ")
            self._happened(on.TrainingFailed(update_id=action.update_id, code=code, text=text))
            return
        task, disk = action.task, self._disk
        residual, left_in, returned = disk.leftover(task.job, action.spec.structure.id)
        work = replace(
            work_of(action, self._body.data_path, self._world.blobs.path),
            residual=residual,
            returned=returned,
            rounds_away=rounds_away(task, left_in) if residual is not None else 0,
            runtime=trainer_of(action.spec, self._limits()),
        )
        answer = self._body.learn(work, self._body.capability.samples)
        if isinstance(answer, Failed):
            failed = on.TrainingFailed(update_id=action.update_id, code=answer.code, text=answer.text)
            self._happened(failed)
            return
        result = replace(answer.result, train_seconds=seconds)
        if result.dropped is not None:
            self._happened(on.LeftoverDropped(code=result.dropped[0], text=result.dropped[1]))
        self._happened(on.Trained(update_id=action.update_id, result=result))
