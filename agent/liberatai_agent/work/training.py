"""Trains and stores: what a task becomes for the training process, and its answer for the outbox."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from liberatai_agent.actions import StartTraining, StoreUpdate
from liberatai_agent.children.messages import File, Work
from liberatai_agent.children.trainer import Trainer
from liberatai_agent.events import (
    LeftoverDropped,
    OutboxStored,
    StoreFailed,
    Trained,
    TrainingFailed,
    UpdateDropped,
)
from liberatai_agent.session.fits import Limits, require_fits, trainer_of
from liberatai_agent.store.blobs import BlobStore
from liberatai_agent.store.outbox import Outbox, meaning_of
from liberatai_core.contract.messages import Task, Update
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import CodecError, LiberataiError, MemoryLimitError
from liberatai_core.profile import Trainer as Runtime
from liberatai_core.profile import trainers

log = logging.getLogger(__name__)

Run = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
Answer = LeftoverDropped | OutboxStored | StoreFailed | Trained | TrainingFailed | UpdateDropped


class Training:
    """Runs at most one training, and stores what it gave.

    Args:
        trainer: owns the process.
        store: has the files of models.
        outbox: takes what is stored.
        data_path: the private file, "" if there is none.
        limits: gives what a training with this deadline, in seconds, may take.
        seal: makes the frame of an update.
        happened: told what became of it.
        run: runs a coroutine, and sees to its end.

    Attributes:
        last: what `status` shows of the last training.
        stopping_since: since when a training that was stopped has not ended.
    """

    def __init__(
        self,
        trainer: Trainer,
        store: BlobStore,
        outbox: Outbox,
        data_path: str,
        limits: Callable[[float], Limits],
        seal: Callable[[Update], bytes],
        happened: Callable[[Answer], None],
        run: Run,
    ) -> None:
        self._run = run
        self._trainer, self._store, self._outbox = trainer, store, outbox
        self._data_path, self._limits, self._seal, self._happened = data_path, limits, seal, happened
        self._running: asyncio.Task[None] | None = None
        self._others: set[asyncio.Task[None]] = set()
        self._too_heavy: dict[str, set[Runtime]] = {}
        self.last: dict[str, Any] = {}
        self.stopping_since: float | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the trainer while it runs."""
        return self._trainer.pid

    def warm(self) -> None:
        """Start the process, so that its imports overlap with the download."""
        self._spawn(self._warm())

    def start(self, action: StartTraining) -> None:
        """Train, after the training that was stopped before has ended."""
        self._running = self._spawn(self._train(action, self._running))

    def stop(self) -> None:
        """Kill the training that runs."""
        if self._running is not None and not self._running.done():
            self._running.cancel()
            if self.stopping_since is None:
                self.stopping_since = time.monotonic()

    def store(self, action: StoreUpdate) -> None:
        """Put an update and its residual on disk."""
        self._spawn(self._keep(action))

    async def close(self) -> None:
        """Kill everything."""
        tasks = list(self._others)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._trainer.close()

    def _spawn(self, work: Any) -> "asyncio.Task[None]":
        task = self._run(work)
        self._others.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._others.discard(task)
        if task is self._running:
            self.stopping_since = None

    async def _warm(self) -> None:
        try:
            limits = self._limits(0.0)
            able = trainers(limits.runtimes, limits.memory_bytes)
            await self._trainer.warm(able[0] if able else "numpy")
        except LiberataiError as error:
            log.warning("%s: %s", error.code, error)

    async def _train(self, action: StartTraining, before: "asyncio.Task[None] | None") -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
            self.stopping_since = None
        work: Work | None = None
        try:
            work = await self._work(action)
            started = time.monotonic()
            result = await self._trainer.train(work)
            result = msgspec.structs.replace(result, train_seconds=time.monotonic() - started)
        except LiberataiError as error:
            if isinstance(error, MemoryLimitError) and work is not None:
                # The next task of this structure is trained with something lighter, if there is anything.
                self._too_heavy.setdefault(work.structure.id, set()).add(work.runtime)
            self._happened(TrainingFailed(update_id=action.update_id, code=error.code, text=str(error)))
            return
        if result.dropped is not None:
            code, text = result.dropped
            self._happened(LeftoverDropped(code=code, text=text))
        self.last = {
            "round": action.task.round,
            "structure": action.spec.structure.id,
            "runtime": work.runtime,
            "samples": result.samples,
            "loss": result.loss,
            "train_seconds": result.train_seconds,
            "update_bytes": len(result.body),
        }
        self._happened(Trained(update_id=action.update_id, result=result))

    async def _work(self, action: StartTraining) -> Work:
        task, spec = action.task, action.spec
        limits = self._limits(spec.deadline_s)
        runtime = trainer_of(spec, limits, self._too_heavy.get(spec.structure.id, ()))
        require_fits(spec, task.density, limits, runtime)
        left = self._outbox.leftover(task.job, spec.structure.id, meaning_of(spec))
        if left.dropped:
            text = f"{left.dropped} left-overs of a job of this name with other settings, or damaged ones"
            self._happened(LeftoverDropped(code=CodecError.code, text=text))
        work = work_of(action, self._data_path, self._store.path)
        return msgspec.structs.replace(
            work,
            residual_from=left.residual,
            residual_to=str(self._outbox.new_residual(action.update_id)),
            returned=left.returned,
            rounds_away=rounds_away(task, left.round) if left.residual is not None else 0,
            memory_bytes=limits.memory_bytes,
            cpu_seconds=limits.cpu_seconds,
            runtime=runtime,
        )

    async def _keep(self, action: StoreUpdate) -> None:
        """Seal first: what no receiver would take fails the task, and never gets to the disk."""
        uid = action.update_id
        try:
            update = update_of(action)
            frame = self._seal(update)
            dropped = await asyncio.to_thread(
                self._outbox.commit_training,
                update,
                frame,
                task_id=action.task.task_id,
                residual=action.result.residual_file,
                meaning=meaning_of(action.spec),
                returned=action.result.returned,
            )
        except LiberataiError as error:
            self._happened(StoreFailed(update_id=uid, code=error.code, text=str(error)))
            return
        for one in dropped:
            self._happened(UpdateDropped(update_id=one, reason="the outbox is full"))
        self._happened(
            OutboxStored(
                update_id=uid,
                job=update.job,
                round=update.round,
                transfer=blob_id(frame),
                size_bytes=len(frame),
            )
        )


def work_of(action: StartTraining, data_path: str, path_of: Callable[[str], Path]) -> Work:
    """Return what the trainer is told of a task, without left-overs and limits.

    Args:
        action: the task.
        data_path: the private file.
        path_of: gives the file of a blob.
    """
    task, spec = action.task, action.spec
    return Work(
        device=task.device,
        job=task.job,
        round=task.round,
        structure=spec.structure,
        data=spec.data,
        training=spec.training,
        seed=spec.seed,
        density=task.density,
        path=tuple(File(path=str(path_of(step.blob.blob)), digest=step.digest) for step in action.path),
        data_path=data_path,
        codec=spec.codec,
        share_class_counts=spec.share_class_counts,
        trained_share=spec.trained_share,
        residual_decay=spec.residual_decay,
        residual_limit=spec.residual_limit,
    )


def rounds_away(task: Task, left_in: int) -> int:
    """Return how many rounds a device missed since the one that left something over."""
    return max(0, task.round - left_in - 1)


def update_of(action: StoreUpdate) -> Update:
    """Return the update that a training's result becomes."""
    task, result = action.task, action.result
    return Update(
        update_id=action.update_id,
        device=task.device,
        job=task.job,
        round=task.round,
        epoch=task.epoch,
        structure=action.spec.structure.id,
        base=task.base,
        samples=result.samples,
        codec=action.spec.codec,
        body=result.body,
        class_counts=result.class_counts,
        evaluation=result.evaluation,
        train_seconds=result.train_seconds,
        loss=result.loss,
    )
