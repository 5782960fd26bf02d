"""The way of an update: checked, decided, stored, answered. The one owner of all of it.

    frame ─▶ signature, typed decode ─▶ asked for? ─▶ what its bytes mean      a thread, a batch at a time
                                                          │
    receipt ◀─ round: stored ◀─ ledger: group commit ◀─ round: store it        the event loop

It is acknowledged to the broker only when its fate is on disk, and decoded once: what the check has read is
kept for the aggregation. A repetition of what is stored costs a signature and a look into a table.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from liberatai_coordinator import clock
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.intake.frames import Frame, Opened
from liberatai_coordinator.intake.uploads import Uploads
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.queue import Jobs
from liberatai_coordinator.jobs.runner import Runner
from liberatai_coordinator.models.updates import Decoded, check_updates
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import StoredUpdate
from liberatai_core.contract import limits
from liberatai_core.contract.messages import Credit, Offer, Receipt, Update
from liberatai_core.errors import BusyError, DiskError, DuplicateError, LiberataiError, RoundUnknownError
from liberatai_core.structure import Structure

log = logging.getLogger(__name__)

RETRY = (BusyError.code, DiskError.code)
"""Refusals after which the device keeps its update and tries again."""

RESUME_S = 10.0
"""How long an update waits for a restarted job to find its round, before the device is told to try again."""


def _with(opened: Opened, read: Decoded | LiberataiError) -> Opened:
    if isinstance(read, LiberataiError):
        return replace(opened, error=read)
    return replace(opened, found=read)


@dataclass(slots=True, kw_only=True)
class Updates:
    """Takes updates in, whole or in chunks.

    Attributes:
        ack: tells the broker that a message is safe with us.
        refused: counts a refusal of a device.
        again: lets a frame be opened (again).
    """

    ledger: Ledger
    fleet: Fleet
    jobs: Jobs
    publisher: Publisher
    ack: Callable[[int], None]
    refused: Callable[[str, LiberataiError], None]
    again: Callable[[Frame], None]
    uploads: Uploads = field(default_factory=lambda: Uploads(max_bytes=limits.MAX_OBJECT_BYTES))
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    # --- checking, in a thread -----------------------------------------------------------------

    def look(self, batch: list[Opened]) -> list[Opened]:
        """Read what the bytes of updates mean that their rounds ask for; the others are for `take` to refuse.

        Returns:
            The batch, with a `Decoded` in `found` or the reason in `error` of what was read.
        """
        asked = [self._asked(opened) for opened in batch]
        read = iter(check_updates([one for one in asked if one is not None]))
        return [
            opened if one is None else _with(opened, next(read))
            for opened, one in zip(batch, asked, strict=True)
        ]

    def _asked(self, opened: Opened) -> tuple[Update, Structure, JobSpec] | None:
        update = opened.message
        if not isinstance(update, Update) or opened.frame.place.leaf != "x":
            return None
        runner = self.jobs.runners.get(update.job)
        now, newest = (None, None) if runner is None else (runner.open_round, runner.versions.newest)
        if runner is None or now is None or newest is None or now.fault(update) is not None:
            return None
        return update, newest.members[update.structure].structure, runner.job

    # --- deciding ------------------------------------------------------------------------------

    def take(self, opened: Opened, update: Update) -> None:
        """Take a verified update of its own device; everything else follows by itself."""
        self._spawn(self._take(opened, update))

    async def _take(self, opened: Opened, update: Update) -> None:
        try:
            if not await self._settle(opened, update):
                return
        except LiberataiError as error:
            await self.refuse(update, error)
        except Exception:
            # Not acknowledged: the broker and the device's outbox still have it.
            log.exception("fault while storing an update of %s", update.device)
            return
        self.ack(opened.frame.token)

    async def refuse(self, update: Update, error: LiberataiError) -> None:
        """Count a refusal, and say it to a device that was let in."""
        self.refused(update.device, error)
        known = self.fleet.devices.get(update.device)
        if known is not None and known.status != "pending":
            await self._receipt(
                update.device,
                update.update_id,
                accepted=False,
                code=error.code,
                text=str(error),
                retry=error.code in RETRY,
            )

    async def _settle(self, opened: Opened, update: Update) -> bool:
        """Decide about an update; False: it was not looked at closely enough, and comes back."""
        shut_out = self.fleet.require(update.device).status == "quarantined"
        if shut_out and self._is_stored(update):
            await self._accept(update, DuplicateError.code)  # it was counted before
            return True
        self.fleet.admit(update.device)
        runner = await self._resumed(update.job)
        now = None if runner is None else runner.open_round
        error: LiberataiError
        if runner is None or now is None:
            error = RoundUnknownError(f"no open round {update.round} of {update.job}")
        elif (fault := now.fault(update)) is not None:
            error = fault
        elif opened.error is not None:
            error = opened.error
        elif isinstance(opened.found, Decoded):
            await self._store(runner, update, opened.frame.payload, opened.found)
            return True
        else:
            self.again(opened.frame)  # its round opened after it was looked at
            return False
        if isinstance(error, DuplicateError) or self._is_stored(update):
            await self._accept(update, DuplicateError.code)
            return True
        raise error

    def _is_stored(self, update: Update) -> bool:
        return self.ledger.updates.has(update.job, update.device, update.update_id)

    async def _resumed(self, job: str) -> Runner | None:
        """Wait until a job that was interrupted, or is buffered and between two rounds, knows its round.

        Raises:
            BusyError: it takes longer; the device keeps its update and tries again.
        """
        runner = self.jobs.runners.get(job)
        if runner is None or runner.collecting.resumed.is_set():
            return runner
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(runner.collecting.resumed.wait(), RESUME_S)
        if not runner.collecting.resumed.is_set():  # or not any more
            raise BusyError(f"job {job} is between two rounds")
        return self.jobs.runners.get(job)

    # --- storing -------------------------------------------------------------------------------

    async def _store(self, runner: Runner, update: Update, frame: bytes, decoded: Decoded) -> None:
        collecting = runner.collecting
        actions = collecting.decide(deciding.UpdateArrived(update=update))
        if not any(isinstance(action, deciding.Store) for action in actions):
            return  # the first one is on its way to the disk; its receipt answers both
        now = collecting.now
        stored = StoredUpdate(
            update_id=update.update_id,
            job=update.job,
            # Not the update's own: a late one of a buffered job counts in the round that is open now.
            round=update.round if now is None else now.number,
            device=update.device,
            structure=update.structure,
            samples=update.samples,
            sha256=hashlib.sha256(frame).digest(),
            frame=frame,
            received_s=clock.wall(),
            path=runner.tasks.path_after(update.device),
        )
        try:
            outcome = await self.ledger.updates.store(stored)
        except LiberataiError:
            collecting.decide(deciding.StoreFailed(device=update.device, update_id=update.update_id))
            raise
        if outcome == "stored":
            self.fleet.count_update(update.device)
            collecting.decoded.keep(update.update_id, decoded)
        event = deciding.UpdateStored(device=update.device, update_id=update.update_id, outcome=outcome)
        for action in collecting.decide(event):
            if isinstance(action, deciding.Refuse):
                raise action.error
            if isinstance(action, deciding.Accept):
                await self._accept(update, action.code)

    async def _accept(self, update: Update, code: str) -> None:
        await self._receipt(update.device, update.update_id, accepted=True, code=code)

    async def _receipt(
        self,
        device: str,
        update_id: bytes,
        *,
        accepted: bool,
        code: str = "",
        text: str = "",
        retry: bool = False,
    ) -> None:
        receipt = Receipt(
            device=device,
            update_id=update_id,
            accepted=accepted,
            code=code,
            text=text[: limits.MAX_TEXT],
            retry=retry,
        )
        await self.publisher.send(self.publisher.topics.down(device, "xa"), receipt)

    # --- in chunks -----------------------------------------------------------------------------

    def offer(self, opened: Opened, offer: Offer) -> None:
        """Answer the offer of a long update."""
        self._spawn(self._offer(opened, offer))

    async def _offer(self, opened: Opened, offer: Offer) -> None:
        try:
            self.fleet.admit(offer.device)
            runner = self.jobs.runners.get(offer.job)
            # Too early to say anything before it is resumed: the device repeats its offer.
            if runner is None or runner.collecting.resumed.is_set():
                known = runner is not None and runner.collecting.may_upload(offer.device, offer.round)
                stored = self.ledger.updates.has(offer.job, offer.device, offer.update_id)
                if stored or not known:
                    # Say it before bytes move: a receipt for the whole upload.
                    code = DuplicateError.code if stored else RoundUnknownError.code
                    await self._receipt(offer.device, offer.update_id, accepted=stored, code=code)
                else:
                    await self._credit(self.uploads.offer(offer, clock.monotonic()))
        except LiberataiError as error:
            self.refused(offer.device, error)
            log.info("offer of %s refused: %s %s", offer.device, error.code, error)
        self.ack(opened.frame.token)

    def chunk(self, frame: Frame) -> None:
        """Take one chunk; the last one makes a frame of its own.

        Raises:
            LiberataiError: what `Uploads.chunk` refuses.
        """
        place = frame.place
        found = self.uploads.chunk(
            place.owner, place.transfer or "", place.part or 0, frame.payload, clock.monotonic()
        )
        if isinstance(found, bytes):
            self.again(replace(frame, place=replace(place, part=None), payload=found))
            return
        if found is not None:
            self._spawn(self._credit(found))
        self.ack(frame.token)

    async def _credit(self, credit: Credit) -> None:
        await self.publisher.send(self.publisher.topics.down(credit.device, "xa"), credit)

    # --- tasks ---------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Stop at once: what is not acknowledged comes again."""
        for task in self._tasks:
            task.cancel()
