"""The ledger: what the coordinator has promised, in one SQLite file that survives every crash.

One store per noun; all of them share one database and one writer thread. Every method is one short
transaction and may be called from any thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liberatai_coordinator.store.database import RESERVE_BYTES, Database
from liberatai_coordinator.store.devices import DeviceStore
from liberatai_coordinator.store.groups import GroupStore
from liberatai_coordinator.store.jobs import JobStore
from liberatai_coordinator.store.journal import AuditStore, EventStore
from liberatai_coordinator.store.refusals import RefusalStore
from liberatai_coordinator.store.rollouts import RolloutStore
from liberatai_coordinator.store.rounds import RoundStore
from liberatai_coordinator.store.shadows import ShadowStore
from liberatai_coordinator.store.tokens import TokenStore
from liberatai_coordinator.store.updates import UpdateStore
from liberatai_coordinator.store.versions import VersionStore
from liberatai_coordinator.store.writer import Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The coordinator's memory. Open it with `Ledger.open`; close it with `close`."""

    database: Database
    writer: Writer
    devices: DeviceStore
    jobs: JobStore
    rounds: RoundStore
    updates: UpdateStore
    versions: VersionStore
    refusals: RefusalStore
    groups: GroupStore
    events: EventStore
    audit: AuditStore
    shadows: ShadowStore
    rollouts: RolloutStore
    tokens: TokenStore

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        reserve_bytes: int = RESERVE_BYTES,
        threaded: bool = True,
        epoch_after: Callable[[int], int] | None = None,
    ) -> "Ledger":
        """Lock the folder, check the database, and begin a new epoch.

        Args:
            folder: made if it is not there.
            reserve_bytes: free space that updates leave on the disk.
            threaded: a thread writes; without one, whoever opened it calls `writer.write_queued`.
            epoch_after: see `Database.open`.

        Raises:
            LockedError: another coordinator uses the folder.
            DiskError: the disk refuses, or the database is damaged (the text says what to do).
            ConfigError: the database is of a newer LiberatAI or of another program.
            ReplacedError: another coordinator took the place of this one.
        """
        database = Database.open(folder, reserve_bytes=reserve_bytes, epoch_after=epoch_after)
        try:
            writer = Writer(database)
            ledger = cls(
                database=database,
                writer=writer,
                devices=DeviceStore(database, writer),
                jobs=JobStore(database),
                rounds=RoundStore(database),
                updates=UpdateStore(database, writer),
                versions=VersionStore(database),
                refusals=RefusalStore(database, writer),
                groups=GroupStore(database),
                events=EventStore(database, writer),
                audit=AuditStore(database),
                shadows=ShadowStore(database),
                rollouts=RolloutStore(database),
                tokens=TokenStore(database),
            )
        except BaseException:
            database.close()
            raise
        if threaded:
            writer.start()
        return ledger

    @property
    def folder(self) -> Path:
        """Where the ledger lies."""
        return self.database.folder

    @property
    def epoch(self) -> int:
        """Generation of this coordinator: larger than that of every earlier one on this folder."""
        return self.database.epoch

    def raise_epoch(self, epoch: int) -> None:
        """Let the next start begin above an epoch that was used before; see `Database.raise_epoch`."""
        self.database.raise_epoch(epoch)

    def note_replaced(self, epoch: int) -> None:
        """Let no start on this folder succeed any more; see `Database.note_replaced`."""
        self.database.note_replaced(epoch)

    def close(self) -> None:
        """Write what is queued, and let go of the folder; idempotent."""
        self.writer.stop()
        self.database.close()
