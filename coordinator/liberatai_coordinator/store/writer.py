"""The one thread that writes what many wait for: group commit.

Whatever waits when the disk is free becomes one transaction, and a future resolves only after its commit
reached the disk. Beside it, rows of which only the newest counts are collected and written now and then.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import sqlalchemy as sa

from liberatai_coordinator import clock
from liberatai_coordinator.store.database import SETTLE_BYTES, Database, again
from liberatai_core.errors import BusyError, DiskError, LiberataiError

log = logging.getLogger(__name__)

BATCH_ITEMS: Final = 1000
"""Measured: 404 updates/s with one per transaction, 5969 with 100; beyond a thousand nothing is gained."""
BATCH_BYTES: Final = 64 * 1024 * 1024
"""One largest update: a batch never makes the write-ahead log grow much further."""
PENDING_ITEMS: Final = 10_000
PENDING_BYTES: Final = 512 * 1024 * 1024
"""What may wait for the disk in memory; beyond it senders are told to try again (E_BUSY)."""
LATEST_S: Final = 0.2
"""Between two writes of rows of which only the newest counts: a fleet that appears costs a few syncs."""
RETRY_S: Final = 1.0
"""Pause after a disk that refused them."""

Key = TypeVar("Key")
Row = TypeVar("Row")
Apply = Callable[[sa.Connection, Sequence[Any]], Sequence[Any]]
"""Does something with items in a transaction; returns a result or a LiberataiError for each."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    apply: Apply
    item: Any
    size_bytes: int
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class _Stop:
    """Ends the thread after everything that was queued before."""


class _Wake:
    """There is something to write or to settle that is not in the queue."""


_Item = _Waiting | _Stop | _Wake


@dataclass(slots=True)
class _Pending:
    """What waits for the disk; guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    items: int = 0
    size_bytes: int = 0
    closed: bool = False


class Latest(Generic[Key, Row]):
    """Rows that are not on the disk yet, the newest per key; what the disk refused is tried again."""

    def __init__(self, database: Database, apply: Callable[[sa.Connection, dict[Key, Row]], None]) -> None:
        """`apply` writes rows in a transaction."""
        self._database = database
        self._apply = apply
        self._rows: dict[Key, Row] = {}
        self._lock = threading.Lock()
        self.wake: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, key: Key, row: Row) -> None:
        """Let a row be written soon. Cheap, and never waits for the disk."""
        with self._lock:
            first = not self._rows
            self._rows[key] = row
        if first:
            self.wake()

    def flush(self) -> None:
        """Write now what was put before.

        Raises:
            LiberataiError: not written; it is tried again with the next ones.
        """
        rows: dict[Key, Row] = {}
        try:
            with self._database.write() as connection:
                with self._lock:  # in the transaction, so that an older row never follows a newer one
                    rows, self._rows = self._rows, {}
                if rows:
                    self._apply(connection, rows)
        except LiberataiError:
            self._give_back(rows)
            raise
        except Exception:
            log.exception("rows of the ledger cannot be written together")
            self._flush_one_by_one(rows)

    def _flush_one_by_one(self, rows: dict[Key, Row]) -> None:
        """Write what can be written: one row that no column takes must not hold up all others."""
        while rows:
            key, row = rows.popitem()
            try:
                with self._database.write() as connection:
                    self._apply(connection, {key: row})
            except LiberataiError:
                self._give_back(rows | {key: row})
                raise
            except Exception:
                log.exception("dropped, for it cannot be written: %r", key)

    def _give_back(self, rows: dict[Key, Row]) -> None:
        with self._lock:
            self._rows = rows | self._rows


class Writer:
    """The writer thread of a database.

    Attributes:
        queued: called whenever there is something to write; for who calls `write_queued`.
    """

    def __init__(self, database: Database) -> None:
        """Call `start` before anything is submitted."""
        self._database = database
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self.queued: Callable[[], None] = lambda: None
        self._pending = _Pending()
        self._latest: list[Latest[Any, Any]] = []
        self._latest_s = 0.0
        database.wake = self._wake
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)

    def start(self) -> None:
        """Begin to write, in a thread."""
        self._thread.start()

    @property
    def has_latest(self) -> bool:
        """Whether rows wait of which only the newest counts."""
        return any(self._latest)

    def write_queued(self, *, now: bool = False) -> bool:
        """Write what waits, in the thread that calls; False: nothing did. Instead of `start`.

        Args:
            now: also those rows of which only the newest counts, whose time has not come.
        """
        try:
            item: _Item | None = self._queue.get_nowait()
        except queue.Empty:
            item = None
        batch, _ = self._gathered(item)
        if batch:
            self._settle(batch)
        self._write_latest(now=now)
        return bool(batch)

    def stop(self) -> None:
        """Write what is queued, then end; idempotent."""
        with self._pending.lock:
            if self._pending.closed:
                return
            self._pending.closed = True
            self._queue.put(_Stop())
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()

    def look_after(self, latest: Latest[Any, Any]) -> None:
        """Write these rows from time to time; call it before `start`."""
        self._latest.append(latest)
        latest.wake = self._wake

    def _wake(self) -> None:
        self._queue.put(_Wake())
        self.queued()

    async def submit(self, apply: Apply, item: Any, size_bytes: int) -> Any:
        """Let `apply` handle an item, together with others in one transaction; returns after its commit.

        Args:
            apply: gets all that wait for it; a bound method or function, the same object for all of a kind.
            item: what it gets.
            size_bytes: that the item takes on the disk.

        Raises:
            LiberataiError: what `apply` returned for the item.
            DiskError: not done, the disk is full or refuses; heals by itself when there is space.
            BusyError: not done, too much is waiting, or the ledger is closed.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(apply, item, size_bytes, loop, loop.create_future())
        pending = self._pending
        with pending.lock:
            if pending.closed:
                raise BusyError("the ledger is closed: the coordinator is stopping")
            self._database.require_alive()
            waiting_bytes = pending.size_bytes + size_bytes
            if pending.items >= PENDING_ITEMS or (pending.items and waiting_bytes > PENDING_BYTES):
                raise BusyError(f"{pending.items} updates wait for the disk: try again later")
            pending.items += 1
            pending.size_bytes = waiting_bytes
            self._queue.put(waiting)
        self.queued()
        return await waiting.future

    # --- the thread ---

    def _run(self) -> None:
        stopping = False
        while not stopping:
            batch, stopping = self._gathered(self._wait())
            if batch:
                self._settle(batch)
            self._write_latest(now=stopping)
            if self._database.unsettled_bytes >= SETTLE_BYTES:
                try:
                    self._database.settle()
                except Exception as error:  # noqa: BLE001 - it is tried again; in the end whoever commits does it
                    log.warning("the write-ahead log stays as it is: %s", error)

    def _gathered(self, item: _Item | None) -> tuple[list[_Waiting], bool]:
        """Return what is written together with an item: whatever else is there already."""
        batch: list[_Waiting] = []
        size_bytes = 0
        while item is not None:
            if isinstance(item, _Stop):
                return batch, True
            if isinstance(item, _Waiting):
                batch.append(item)
                size_bytes += item.size_bytes
            if len(batch) >= BATCH_ITEMS or size_bytes >= BATCH_BYTES:
                break
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
        return batch, False

    def _wait(self) -> _Item | None:
        """Return the next item; None when it is time to write the rows of which only the newest counts."""
        wait_s: float | None = None
        if any(self._latest):
            wait_s = max(0.0, self._latest_s - clock.monotonic())
        with suppress(queue.Empty):
            return self._queue.get(timeout=wait_s)
        return None

    def _settle(self, batch: list[_Waiting]) -> None:
        results = self._store(batch)
        with self._pending.lock:
            self._pending.items -= len(batch)
            self._pending.size_bytes -= sum(waiting.size_bytes for waiting in batch)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for waiting, result in zip(batch, results, strict=True):
            by_loop.setdefault(waiting.loop, []).append((waiting.future, result))
        for loop, answers in by_loop.items():
            with suppress(RuntimeError):  # its event loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_resolve, answers)

    def _store(self, batch: list[_Waiting]) -> list[Any]:
        """Return a result or an error for each."""
        try:
            self._database.require_space(sum(waiting.size_bytes for waiting in batch))
            return self._transact(batch)
        except LiberataiError as error:
            if len(batch) == 1 or not isinstance(error, DiskError):
                return [again(error) for _ in batch]
        except Exception as error:  # the thread must answer, whatever went wrong
            if len(batch) == 1:
                log.exception("an update cannot be written")
                return [DiskError(f"ledger: {type(error).__name__}: {error}")]
        # What does not fit together may fit in parts, and what is wrong with one is not with all.
        half = len(batch) // 2
        return self._store(batch[:half]) + self._store(batch[half:])

    def _transact(self, batch: list[_Waiting]) -> list[Any]:
        places: dict[Apply, list[int]] = {}
        for place, waiting in enumerate(batch):
            places.setdefault(waiting.apply, []).append(place)
        results: list[Any] = [None] * len(batch)
        with self._database.write() as connection:
            for apply, theirs in places.items():
                done = apply(connection, [batch[place].item for place in theirs])
                for place, result in zip(theirs, done, strict=True):
                    results[place] = result
        self._database.unsettled_bytes += sum(waiting.size_bytes for waiting in batch)
        return results

    def _write_latest(self, *, now: bool) -> None:
        if not any(self._latest) or (not now and clock.monotonic() < self._latest_s):
            return
        self._latest_s = clock.monotonic() + LATEST_S
        for latest in self._latest:
            try:
                if latest:
                    latest.flush()
            except LiberataiError as error:
                log.debug("tried again in %.1f s: %s %s", RETRY_S, error.code, error)
                self._latest_s = clock.monotonic() + RETRY_S


def _resolve(answers: list[tuple["asyncio.Future[Any]", Any]]) -> None:
    for future, result in answers:
        if future.done():  # the caller gave up waiting
            continue
        if isinstance(result, LiberataiError):
            future.set_exception(result)
        else:
            future.set_result(result)
