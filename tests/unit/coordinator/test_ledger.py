"""The ledger keeps its promises: nothing receipted is lost or doubled, whatever dies or runs full."""

import asyncio
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from liberatai_coordinator.store import database, migration, refusals, rounds, tables, writer
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import Manifest, MemberRecord, StepRecord, encode_manifest
from liberatai_coordinator.store.rows import DeviceRow, RoundRow, StoredUpdate, TrafficRow, VersionRow
from liberatai_coordinator.store.updates import Outcome
from liberatai_core.errors import (
    BusyError,
    ConfigError,
    DigestError,
    DiskError,
    LockedError,
    NotFoundError,
    RoundClosedError,
    RoundUnknownError,
    SchemaError,
)
from liberatai_core.structure import DataContract, Structure, Tensor


def opened(folder: Path, reserve_bytes: int = 0) -> Ledger:
    return Ledger.open(folder, reserve_bytes=reserve_bytes)


def with_round(folder: Path, number: int = 1) -> Ledger:
    ledger = opened(folder)
    ledger.jobs.create("digits", b"{}", "/", 1.0)
    ledger.rounds.open(a_round(ledger, number))
    return ledger


def a_round(ledger: Ledger, number: int = 1) -> RoundRow:
    return RoundRow(job="digits", round=number, epoch=ledger.epoch, opened_s=2.0, invited=b"who")


def an_update(number: int, *, round_number: int = 1, size: int = 64) -> StoredUpdate:
    device = f"device-{number}"
    frame = hashlib.sha256(f"{device}/{round_number}".encode()).digest() * (size // 32)
    return StoredUpdate(
        update_id=hashlib.md5(f"{device}|{round_number}".encode()).digest(),  # noqa: S324 - 16 distinct bytes
        job="digits",
        round=round_number,
        device=device,
        structure="cnn-width8",
        samples=10,
        sha256=hashlib.sha256(frame).digest(),
        frame=frame,
        received_s=3.0,
    )


def with_frame(update: StoredUpdate, frame: bytes) -> StoredUpdate:
    return replace(update, frame=frame, sha256=hashlib.sha256(frame).digest())


def store(ledger: Ledger, *updates: StoredUpdate) -> list[Outcome | BaseException]:
    async def all_at_once() -> list[Outcome | BaseException]:
        return await asyncio.gather(*map(ledger.updates.store, updates), return_exceptions=True)

    return asyncio.run(all_at_once())


def count_transactions(ledger: Ledger) -> list[str]:
    seen: list[str] = []
    sa.event.listen(ledger.database.engine, "commit", lambda _connection: seen.append("commit"))
    return seen


# --- updates -------------------------------------------------------------------------------------


def test_a_stored_update_is_there_after_reopening(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    assert store(ledger, an_update(1), an_update(2)) == ["stored", "stored"]
    ledger.close()
    ledger = opened(tmp_path)
    assert ledger.updates.of_round("digits", 1) == sorted(
        [an_update(1), an_update(2)], key=lambda u: u.update_id
    )
    assert ledger.updates.ids("digits", 1) == sorted([an_update(1).update_id, an_update(2).update_id])
    ledger.close()


def test_the_same_update_is_a_duplicate_in_one_batch_and_later(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    assert sorted(map(str, store(ledger, *[an_update(1)] * 5))) == ["duplicate"] * 4 + ["stored"]
    assert store(ledger, an_update(1)) == ["duplicate"]
    assert len(ledger.updates.of_round("digits", 1)) == 1
    ledger.close()


def test_other_bytes_or_another_id_of_the_same_device_and_round_conflict_and_the_first_counts(
    tmp_path: Path,
) -> None:
    ledger = with_round(tmp_path)
    first = an_update(1)
    assert store(ledger, first) == ["stored"]
    assert store(ledger, with_frame(first, b"other")) == ["conflict"]
    assert store(ledger, replace(first, update_id=b"z" * 16)) == ["conflict"]
    assert store(ledger, replace(first, device="thief", sha256=first.sha256)) == ["duplicate"]
    assert ledger.updates.of_round("digits", 1) == [first]
    ledger.close()


def test_two_unlike_updates_of_one_device_in_one_batch_conflict(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    first = an_update(1)
    assert store(ledger, first, replace(first, update_id=b"z" * 16)) == ["stored", "conflict"]
    ledger.close()


def test_an_update_of_an_unknown_or_closed_round_is_refused(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    stored = an_update(1)
    store(ledger, stored)
    (unknown,) = store(ledger, an_update(1, round_number=2))
    assert isinstance(unknown, RoundUnknownError)
    ledger.rounds.close("digits", 1)
    late, repeated = store(ledger, an_update(2), stored)
    assert isinstance(late, RoundClosedError)
    assert repeated == "duplicate"
    ledger.close()


def test_the_digest_of_a_frame_is_the_ledgers_own(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    assert store(ledger, replace(an_update(1), sha256=b"nonsense")) == ["stored"]
    assert ledger.updates.of_round("digits", 1) == [an_update(1)]
    ledger.close()


def test_what_waits_together_becomes_few_transactions(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    commits = count_transactions(ledger)
    results = store(ledger, *(an_update(number) for number in range(300)))
    assert results == ["stored"] * 300
    assert 1 <= len(commits) < 60
    ledger.close()


def test_too_much_waiting_is_refused_with_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PENDING_ITEMS", 10)
    ledger = with_round(tmp_path)
    with ledger.database.write_lock:  # the disk stands still

        async def flood() -> tuple[list[asyncio.Task[Outcome]], BaseException | None]:
            tasks = [asyncio.create_task(ledger.updates.store(an_update(n))) for n in range(11)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks, done.pop().exception()

        loop = asyncio.new_event_loop()
        tasks, error = loop.run_until_complete(flood())
        assert isinstance(error, BusyError)
    results = loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
    assert results[:10] == ["stored"] * 10
    ledger.close()


def test_a_caller_that_gives_up_changes_nothing_for_the_others(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)

    async def scenario() -> Outcome:
        task = asyncio.create_task(ledger.updates.store(an_update(1)))
        await asyncio.sleep(0)
        task.cancel()
        return await ledger.updates.store(an_update(2))

    assert asyncio.run(scenario()) == "stored"
    assert len(ledger.updates.ids("digits", 1)) == 2
    ledger.close()


def test_a_closed_ledger_refuses_and_closing_twice_is_fine(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    ledger.close()
    ledger.close()
    (refused,) = store(ledger, an_update(1))
    assert isinstance(refused, BusyError)
    with pytest.raises(BusyError):
        ledger.jobs.all()


def test_a_frame_damaged_on_disk_is_found(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1))
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        file.execute("UPDATE update_frames SET frame = x'00'")
    file.close()
    ledger = opened(tmp_path)
    with pytest.raises(DigestError, match="device-1 is damaged"):
        ledger.updates.of_round("digits", 1)
    ledger.close()


# --- crashes -------------------------------------------------------------------------------------

CHILD = """
import asyncio, hashlib, sys
from pathlib import Path
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import StoredUpdate

ledger = Ledger.open(Path(sys.argv[1]), reserve_bytes=0)

async def one(number):
    frame = number.to_bytes(8, "big") * 512
    sha256 = hashlib.sha256(frame).digest()
    update = StoredUpdate(update_id=sha256[:16], job="digits", round=1, device=f"device-{number}",
        structure="s", samples=1, sha256=sha256, frame=frame, received_s=1.0)
    result = await ledger.updates.store(update)
    sys.stdout.write(f"{number} {result}\\n"); sys.stdout.flush()

async def main():
    for base in range(len(ledger.updates.ids("digits", 1)), 1_000_000, 25):
        await asyncio.gather(*(one(base + i) for i in range(25)))

asyncio.run(main())
"""


def test_after_kill_9_every_promised_update_is_there_and_none_twice(tmp_path: Path) -> None:
    """Ten times: a process stores and says so, is killed somewhere, and its word is checked."""
    with_round(tmp_path).close()
    promised: set[int] = set()
    for attempt in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(1 + 17 * attempt)]
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
        child.wait()
        said = [line.split() for line in lines if line.endswith("\n")]
        assert said, "the child stored nothing"
        promised |= {int(number) for number, result in said if result in ("stored", "duplicate")}
        ledger = opened(tmp_path)
        assert ledger.epoch == 3 + 2 * attempt
        found = [update.device for update in ledger.updates.of_round("digits", 1)]
        ledger.close()
        assert len(found) == len(set(found))
        assert {f"device-{number}" for number in promised} <= set(found)
    assert len(promised) > 200


def test_ten_thousand_pending_updates_are_there_after_a_crash(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    source = with_round(tmp_path / "running")
    updates = [an_update(number, size=2048) for number in range(10_000)]
    assert set(store(source, *updates)) == {"stored"}
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in ("ledger.db", "ledger.db-wal"):  # as they are at this moment: nothing closed, no checkpoint
        (crashed / name).write_bytes((source.folder / name).read_bytes())
    source.close()
    start = time.monotonic()
    ledger = opened(crashed)
    (row,) = ledger.rounds.all("digits")
    ids = ledger.updates.ids("digits", 1)
    seconds = time.monotonic() - start
    record_property("recovery_seconds", seconds)
    assert row.state == "open"
    assert ids == sorted(update.update_id for update in updates)
    assert ledger.rounds.close("digits", 1) == tuple(ids)
    ledger.close()


def test_every_opening_is_a_new_epoch(tmp_path: Path) -> None:
    epochs = []
    for _ in range(3):
        ledger = opened(tmp_path)
        epochs.append(ledger.epoch)
        ledger.close()
    assert epochs == [1, 2, 3]


def test_a_second_coordinator_on_the_folder_is_refused_with_the_holder(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    with pytest.raises(LockedError, match=f"two coordinators on one state folder.*process {os.getpid()};"):
        opened(tmp_path)
    ledger.close()
    opened(tmp_path).close()


# --- disks ---------------------------------------------------------------------------------------


def test_a_full_database_refuses_and_heals(tmp_path: Path) -> None:
    """SQLITE_FULL, provoked by a page limit: nothing half-stored, reading works, it heals by itself."""
    ledger = with_round(tmp_path)
    with ledger.database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar() or 0
    limit = [1 << 30]
    # the limit belongs to a connection; with one connection in the pool it is everybody's
    sa.event.listen(
        ledger.database.engine,
        "begin",
        lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={limit[0]}"),
    )
    limit[0] = pages + 8
    results = store(ledger, *(an_update(number, size=8192) for number in range(40)))
    refused = [result for result in results if result != "stored"]
    assert refused
    assert all(isinstance(result, DiskError) and "full" in str(result) for result in refused)
    assert len(ledger.updates.ids("digits", 1)) == 40 - len(refused)
    limit[0] = 1 << 30
    assert set(store(ledger, *(an_update(number, size=8192) for number in range(40)))) <= {
        "stored",
        "duplicate",
    }
    assert len(ledger.updates.ids("digits", 1)) == 40
    ledger.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_refuses_and_heals(small_disk: Path) -> None:
    ledger = with_round(small_disk / "state")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (2 << 20))
    results = store(ledger, *(an_update(number, size=65_536) for number in range(60)))
    refused = [result for result in results if isinstance(result, DiskError)]
    assert refused
    assert len(refused) + results.count("stored") == 60
    assert len(ledger.updates.ids("digits", 1)) == results.count("stored")
    ballast.unlink()
    again = store(ledger, *(an_update(number, size=64) for number in range(100, 110)))
    assert again == ["stored"] * 10
    ledger.close()


def test_updates_leave_a_reserve_with_which_rounds_can_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(tmp_path, reserve_bytes=1 << 20)
    ledger.jobs.create("digits", b"{}", "/", 1.0)
    ledger.rounds.open(a_round(ledger))
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: real._replace(free=(1 << 20) + 100))
    first, second = store(ledger, an_update(1, size=64), an_update(2, size=8192))
    assert first == "stored"
    assert isinstance(second, DiskError)
    assert ledger.rounds.close("digits", 1) == (an_update(1).update_id,)
    ledger.close()


def test_a_file_that_may_not_grow_is_a_disk_error(tmp_path: Path) -> None:
    """The kernel refuses to write (EFBIG): the error has a code, and what was promised stays."""
    with_round(tmp_path).close()
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import importlib.util
spec = importlib.util.spec_from_file_location("ledger_test", {__file__!r})
test = importlib.util.module_from_spec(spec); spec.loader.exec_module(test)
ledger = test.opened(test.Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
results = test.store(ledger, *(test.an_update(n, size=8192) for n in range(60)))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
codes = [getattr(result, "code", result) for result in results]
later = test.store(ledger, test.an_update(1000))
print(codes.count("stored"), codes.count("E_DISK"), len(ledger.updates.ids("digits", 1)), later[0])
ledger.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    stored, refused, kept, later = done.stdout.split()
    assert int(stored) + int(refused) == 60
    assert int(refused) > 0
    assert int(kept) == int(stored) + 1
    assert later == "stored"


def test_after_a_failed_fsync_nothing_is_promised_any_more(tmp_path: Path) -> None:
    """The kernel may have dropped the pages: the ledger stops instead of trying again."""
    ledger = with_round(tmp_path)
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    failing = [error]

    def commit(_connection: object) -> None:
        if failing:
            raise failing.pop()

    sa.event.listen(ledger.database.engine, "commit", commit)
    first, second = store(ledger, an_update(1))[0], store(ledger, an_update(2))[0]
    for refused in (first, second):
        assert isinstance(refused, DiskError)
        assert "fsync failed; restart" in str(refused)
    with pytest.raises(DiskError, match="fsync failed"):
        ledger.jobs.create("other", b"", "/", 1.0)
    ledger.close()
    ledger = opened(tmp_path)
    assert ledger.updates.ids("digits", 1) == []
    ledger.close()


@pytest.mark.parametrize("damage", ["header", "page"])
def test_a_damaged_database_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    ledger = with_round(tmp_path)
    store(ledger, *(an_update(number, size=1024) for number in range(200)))
    ledger.close()
    path = tmp_path / "ledger.db"
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:16] = b"not a database!!"
    else:
        content[4096 * 3 : 4096 * 20] = os.urandom(4096 * 17)
    path.write_bytes(content)
    with pytest.raises(DiskError, match=r"is damaged .*restore a backup.*\.recover"):
        opened(tmp_path)
    with pytest.raises(DiskError):  # and the lock is free again
        opened(tmp_path)


def test_a_database_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    file = sqlite3.connect(tmp_path / "ledger.db")
    file.execute("PRAGMA user_version = 99")
    file.close()
    with pytest.raises(ConfigError, match=r"version 99, this program writes .* version 4.*ledger-schema"):
        opened(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        opened(tmp_path / "file" / "state")


# --- rounds --------------------------------------------------------------------------------------


def test_traffic_and_the_number_of_updates_of_a_device_are_there_after_reopening(tmp_path: Path) -> None:
    first = TrafficRow(
        device="device-1", sent_bytes=2**53, received_bytes=2, session=3, session_sent=4, session_received=5
    )
    ledger = with_round(tmp_path)
    ledger.devices.set_traffic([first, replace(first, device="device-2")])
    ledger.devices.set_traffic([replace(first, received_bytes=9)])
    store(ledger, an_update(1), an_update(1), an_update(2))
    ledger.rounds.close("digits", 1)
    ledger.rounds.abandon("digits", 1, "why not")
    ledger.rounds.open(a_round(ledger, 2))
    store(ledger, an_update(1, round_number=2))
    ledger.close()
    ledger = opened(tmp_path)
    assert ledger.devices.traffic() == {
        "device-1": replace(first, received_bytes=9),
        "device-2": replace(first, device="device-2"),
    }
    assert ledger.updates.counts() == {"device-1": 2, "device-2": 1}
    ledger.close()


def test_a_round_goes_from_open_to_published(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(2), an_update(1))
    frozen = ledger.rounds.close("digits", 1)
    assert frozen == tuple(sorted(frozen))
    assert len(frozen) == 2
    ledger.rounds.set_aggregated("digits", 1, "v1", b"stats")
    ledger.rounds.set_published("digits", 1)
    row = ledger.rounds.get("digits", 1)
    assert (row.state, row.frozen, row.version_id, row.stats) == ("published", frozen, "v1", b"stats")
    assert row.frozen_sha256 == hashlib.sha256(b"".join(frozen)).digest()
    ledger.close()


def test_closing_freezes_everything_stored_even_if_the_caller_forgot_one(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1), an_update(2))
    assert len(ledger.rounds.close("digits", 1, [an_update(1).update_id])) == 2
    ledger.close()


def test_closing_with_an_update_that_is_not_stored_changes_nothing(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    with pytest.raises(NotFoundError):
        ledger.rounds.close("digits", 1, [b"x" * 16])
    assert ledger.rounds.get("digits", 1).state == "open"
    ledger.close()


def test_every_step_of_a_round_may_be_repeated_after_a_crash(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1))
    assert ledger.rounds.close("digits", 1) == ledger.rounds.close("digits", 1)
    for _ in range(2):
        ledger.rounds.set_aggregated("digits", 1, "v1")
    for _ in range(2):
        ledger.rounds.set_published("digits", 1)
    ledger.rounds.set_aggregated("digits", 1, "v1")
    assert ledger.rounds.get("digits", 1).state == "published"
    with pytest.raises(RoundClosedError):
        ledger.rounds.set_aggregated("digits", 1, "v2")
    ledger.close()


def test_an_open_round_is_taken_over_with_its_updates(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1))
    ledger.close()
    ledger = opened(tmp_path)
    ledger.rounds.open(replace(a_round(ledger), invited=b"others"))
    row = ledger.rounds.get("digits", 1)
    assert (row.epoch, row.invited, row.state) == (2, b"others", "open")
    assert len(ledger.updates.ids("digits", 1)) == 1
    ledger.rounds.close("digits", 1)
    with pytest.raises(RoundClosedError):
        ledger.rounds.open(a_round(ledger))
    ledger.close()


def test_an_abandoned_round_lists_its_updates_and_makes_no_version(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1), an_update(2))
    lost = ledger.rounds.abandon("digits", 1, "no quorum")
    assert set(lost) == {an_update(1).update_id, an_update(2).update_id}
    row = ledger.rounds.get("digits", 1)
    assert (row.state, row.reason, row.frozen) == ("abandoned", "no quorum", lost)
    assert ledger.rounds.abandon("digits", 1, "again") == lost
    for step in (
        lambda: ledger.rounds.close("digits", 1),
        lambda: ledger.rounds.set_aggregated("digits", 1, "v1"),
        lambda: ledger.rounds.set_published("digits", 1),
    ):
        with pytest.raises(RoundClosedError):
            step()
    ledger.close()


def test_a_round_that_made_a_version_cannot_be_abandoned(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    ledger.rounds.close("digits", 1)
    ledger.rounds.set_aggregated("digits", 1, "v1")
    with pytest.raises(RoundClosedError, match="made version v1"):
        ledger.rounds.abandon("digits", 1, "late")
    ledger.close()


def test_unknown_rounds_and_jobs_are_refused(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    with pytest.raises(NotFoundError):
        ledger.rounds.open(a_round(ledger))
    for step in (
        lambda: ledger.rounds.get("digits", 1),
        lambda: ledger.rounds.close("digits", 1),
        lambda: ledger.rounds.set_stats("digits", 1, b""),
    ):
        with pytest.raises(RoundUnknownError):
            step()
    assert ledger.rounds.all("digits") == []
    ledger.close()


def test_pruning_drops_old_frames_gives_space_back_and_still_knows_duplicates(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    for number in (1, 2, 3):
        if number > 1:
            ledger.rounds.open(a_round(ledger, number))
        store(ledger, *(an_update(device, round_number=number, size=65_536) for device in range(8)))
        ledger.rounds.close("digits", number)
        ledger.rounds.set_aggregated("digits", number, f"v{number}")
        ledger.rounds.set_published("digits", number)
    ledger.rounds.open(a_round(ledger, 4))
    store(ledger, an_update(1, round_number=4))
    assert ledger.rounds.prune("digits", 1) == 16
    assert ledger.rounds.prune("digits", 1) == 0
    with pytest.raises(NotFoundError, match="pruned"):
        ledger.updates.of_round("digits", 1)
    assert len(ledger.updates.of_round("digits", 3)) == 8
    assert len(ledger.updates.of_round("digits", 4)) == 1
    assert len(ledger.updates.ids("digits", 1)) == 8
    assert store(ledger, an_update(1, size=65_536)) == ["duplicate"]
    assert (tmp_path / "ledger.db").stat().st_size < 16 * 65_536
    ledger.close()


# --- the rest ------------------------------------------------------------------------------------


def test_devices_keep_their_first_sight_and_their_status(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    row = DeviceRow(
        id="pi",
        public_key=b"k" * 32,
        status="pending",
        capability=None,
        session=1,
        first_seen_s=1.5,
        last_seen_s=1.5,
    )
    ledger.devices.remember(row)
    ledger.devices.set_status("pi", "quarantined", "nonsense")
    ledger.devices.remember(
        replace(row, status="quarantined", session=2, capability=b"c", first_seen_s=9.0, last_seen_s=9.0)
    )
    ledger.close()
    ledger = opened(tmp_path)
    expected = replace(
        row,
        status="quarantined",
        reason="nonsense",
        session=2,
        capability=b"c",
        first_seen_s=1.5,
        last_seen_s=9.0,
    )
    assert ledger.devices.all() == [expected]
    with pytest.raises(NotFoundError):
        ledger.devices.set_status("nobody", "approved")
    ledger.close()


def test_jobs_their_states_and_their_values_survive(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    ledger.jobs.set_state("digits", "paused", "by an operator")
    ledger.jobs.set_value("digits", "plan", b"1")
    ledger.jobs.set_value("digits", "plan", b"2")
    ledger.close()
    ledger = opened(tmp_path)
    (job,) = ledger.jobs.all()
    assert job == ledger.jobs.get("digits")
    assert (job.state, job.reason, job.spec, job.base_dir) == ("paused", "by an operator", b"{}", "/")
    assert ledger.jobs.value("digits", "plan") == b"2"
    assert ledger.jobs.value("digits", "other") is None
    with pytest.raises(ConfigError, match="digits exists already"):
        ledger.jobs.create("digits", b"", "/", 1.0)
    for step in (
        lambda: ledger.jobs.get("x"),
        lambda: ledger.jobs.set_state("x", "running"),
        lambda: ledger.jobs.set_value("x", "k", b""),
    ):
        with pytest.raises(NotFoundError):
            step()
    ledger.close()


def manifest_of(number: int, counted: tuple[bytes, ...]) -> VersionRow:
    structure = Structure(family="mlp", params={"hidden": 2}, tensors=(Tensor(name="w", shape=(2, 2)),))
    member = MemberRecord(
        structure=structure,
        master="a" * 64,
        view="b" * 64,
        digest="c" * 64,
        keyframe=StepRecord(version=number, blob="d" * 64, size=1, digest="c" * 64),
    )
    encoded = encode_manifest(
        Manifest(
            model="digits",
            number=number,
            parent=None,
            round=number,
            structures={structure.id: member},
            data=DataContract(input_shape=(1, 2), classes=2),
            updates=tuple(sorted(one.hex() for one in counted)),
        )
    )
    sha = hashlib.sha256(encoded).hexdigest()
    return VersionRow(model="digits", number=number, id=sha, parent=None, manifest=encoded, created_s=1.0)


@pytest.mark.parametrize("state", ["aborted", "failed"])
def test_the_end_of_a_job_is_the_end_of_its_rounds_in_one_transaction(tmp_path: Path, state: str) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1), an_update(2))
    commits = count_transactions(ledger)
    ledger.jobs.end("digits", state, "why")
    assert len(commits) == 1
    row = ledger.rounds.get("digits", 1)
    assert (row.state, row.reason, len(row.frozen)) == ("abandoned", f"job {state}", 2)
    assert (ledger.jobs.get("digits").state, ledger.jobs.get("digits").reason) == (state, "why")
    ledger.jobs.end("digits", state, "why")
    assert ledger.rounds.get("digits", 1) == row
    with pytest.raises(NotFoundError):
        ledger.jobs.end("nothing", state)
    ledger.close()


def test_a_disk_that_refuses_the_end_of_a_job_leaves_job_and_rounds_as_they_were(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1))

    def commit(_connection: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    sa.event.listen(ledger.database.engine, "commit", commit)
    with pytest.raises(DiskError):
        ledger.jobs.end("digits", "failed", "why")
    sa.event.remove(ledger.database.engine, "commit", commit)
    assert ledger.jobs.get("digits").state == "waiting"
    assert ledger.rounds.get("digits", 1).state == "open"
    ledger.close()


@pytest.mark.parametrize("counts", [True, False])
def test_the_end_of_a_job_looks_into_the_ledger_for_what_a_closed_round_made(
    tmp_path: Path, counts: bool
) -> None:
    """Its updates are counted in a version or listed, never both, also before the job has loaded."""
    ledger = with_round(tmp_path)
    store(ledger, an_update(1), an_update(2))
    frozen = ledger.rounds.close("digits", 1)
    version = manifest_of(1, frozen if counts else ())  # or one of an earlier job of this name
    ledger.versions.add(version)
    ledger.jobs.end("digits", "aborted")
    row = ledger.rounds.get("digits", 1)
    assert (row.state, row.version_id) == (("aggregated", version.id) if counts else ("abandoned", ""))
    ledger.close()


def a_version(number: int, parent: str | None, content: bytes = b"") -> VersionRow:
    manifest = f"manifest {number}".encode() + content
    sha = hashlib.sha256(manifest).hexdigest()
    return VersionRow(model="digits", number=number, id=sha, parent=parent, manifest=manifest, created_s=1.0)


def test_versions_form_a_chain_and_have_tags(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    first = a_version(0, None)
    second = a_version(1, first.id)
    for row in (first, second, second):
        ledger.versions.add(row)
    ledger.versions.set_tag("digits", "stable", 1)
    ledger.versions.set_tag("digits", "stable", 0)
    tagged = replace(first, tags=("stable",))
    assert ledger.versions.all("digits") == [tagged, second]
    assert ledger.versions.get("digits") == second
    assert ledger.versions.get("digits", "latest") == second
    for ref in (0, "0", "stable", first.id):
        assert ledger.versions.get("digits", ref) == tagged
    assert ledger.versions.models() == ["digits"]
    ledger.close()


def test_a_version_that_contradicts_the_chain_is_refused(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    first = a_version(0, None)
    ledger.versions.add(first)
    for wrong in (
        replace(a_version(1, first.id), id="0" * 64),
        a_version(0, None, b"other"),
        replace(first, number=1),
        a_version(2, "f" * 64),
    ):
        with pytest.raises(DigestError):
            ledger.versions.add(wrong)
    for tag in ("", "latest", "12"):
        with pytest.raises(SchemaError):
            ledger.versions.set_tag("digits", tag, 0)
    with pytest.raises(NotFoundError):
        ledger.versions.set_tag("digits", "stable", 7)
    with pytest.raises(NotFoundError):
        ledger.versions.get("digits", "7")
    with pytest.raises(NotFoundError):
        ledger.versions.get("nothing")
    assert ledger.versions.all("digits") == [first]
    ledger.close()


def test_refusals_are_counted_over_restarts_and_strangers_share_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MAX_REFUSAL_ROWS", 2)
    ledger = opened(tmp_path)
    for device in ("a", "a", "b", "c", "d"):
        ledger.refusals.count(device, "E_SIG")
    ledger.close()
    ledger = opened(tmp_path)
    ledger.refusals.count("a", "E_SIG")
    assert ledger.refusals.all() == {"": {"E_SIG": 2}, "a": {"E_SIG": 3}, "b": {"E_SIG": 1}}
    ledger.close()


def test_two_threads_write_without_losing_a_word(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)

    async def both() -> None:
        values = [
            asyncio.to_thread(ledger.jobs.set_value, "digits", str(number), b"%d" % number)
            for number in range(40)
        ]
        await asyncio.gather(*values, *(ledger.updates.store(an_update(number)) for number in range(40)))

    asyncio.run(both())
    assert [ledger.jobs.value("digits", str(number)) for number in range(40)] == [
        b"%d" % n for n in range(40)
    ]
    assert len(ledger.updates.ids("digits", 1)) == 40
    ledger.close()


def test_every_connection_waits_for_the_disk_and_checks_references(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for _ in range(2):
        with ledger.database.engine.connect() as first, ledger.database.engine.connect() as second:
            for connection in (first, second):
                found = [
                    connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                    for name in ("journal_mode", "synchronous", "foreign_keys", "auto_vacuum")
                ]
                assert found == ["wal", 2, 1, 2]  # synchronous 2 is FULL, auto_vacuum 2 is incremental
    ledger.close()


def test_nobody_else_can_read_the_ledger(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1))
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("lock", "ledger.db", "ledger.db-wal", "ledger.db-shm"), 0o600)
    ledger.close()


# --- what devices hold ------------------------------------------------------------------------------


def test_what_a_device_holds_is_written_with_the_update_that_proves_it(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, replace(an_update(1), path=b"one"), replace(an_update(2), path=b"two"), an_update(3))
    store(ledger, replace(an_update(1), path=b"a repetition"))
    store(ledger, with_frame(replace(an_update(2), update_id=b"x" * 16, path=b"a conflict"), b"other"))
    assert ledger.updates.paths("digits") == {"device-1": b"one", "device-2": b"two"}
    ledger.close()
    ledger = opened(tmp_path)
    assert ledger.updates.paths("digits") == {"device-1": b"one", "device-2": b"two"}
    ledger.rounds.open(a_round(ledger, 2))
    store(ledger, replace(an_update(1, round_number=2), path=b"further"), an_update(2, round_number=2))
    assert ledger.updates.paths("digits") == {"device-1": b"further", "device-2": b"two"}
    ledger.updates.forget_path("digits", "device-1")
    ledger.updates.forget_path("digits", "nobody")
    assert ledger.updates.paths("digits") == {"device-2": b"two"}
    assert ledger.updates.paths("other") == {}
    assert [update.path for update in ledger.updates.of_round("digits", 1)] == [b"", b"", b""]
    ledger.close()


def test_an_update_that_is_refused_proves_nothing(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    ledger.rounds.close("digits", 1)
    (outcome,) = store(ledger, replace(an_update(1), path=b"late"))
    assert isinstance(outcome, RoundClosedError)
    assert ledger.updates.paths("digits") == {}
    ledger.close()


# --- how it is found ---------------------------------------------------------------------------------


def test_no_statement_of_the_hot_paths_scans_a_table_that_grows(tmp_path: Path) -> None:
    """A batch of updates costs the same with ten rows stored as with ten million."""
    ledger = with_round(tmp_path)
    store(ledger, *(an_update(number) for number in range(50)))
    said: dict[str, Any] = {}

    @sa.event.listens_for(ledger.database.engine, "before_cursor_execute")
    def note(_c: object, _cursor: object, statement: str, values: Any, _x: object, many: bool) -> None:
        said[statement] = values[0] if many else values

    store(ledger, *(an_update(number) for number in range(40, 90)))
    ledger.updates.of_round("digits", 1)
    ledger.updates.senders("digits", 1)
    ledger.updates.ids("digits", 1)
    ledger.updates.has("digits", "device-1", an_update(1).update_id)
    ledger.rounds.close("digits", 1)
    ledger.rounds.newest("digits")
    ledger.rounds.newest_number("digits")
    ledger.rounds.get("digits", 1)
    ledger.rounds.set_aggregated("digits", 1, "v1")
    ledger.rounds.set_published("digits", 1)
    ledger.rounds.prune("digits", 0)
    ledger.updates.forget_path("digits", "device-1")
    plans = {}
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        for statement, values in said.items():
            if statement.split()[0] in {"SELECT", "UPDATE", "DELETE", "INSERT"}:
                plans[statement] = [row[3] for row in file.execute("EXPLAIN QUERY PLAN " + statement, values)]
    file.close()
    assert sum("update_keys" in statement for statement in plans) >= 6
    scans = {statement: plan for statement, plan in plans.items() if any("SCAN" in step for step in plan)}
    assert scans == {}
    ledger.close()


def test_the_view_shows_updates_as_people_expect_them(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1), an_update(2))
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        rows = file.execute("SELECT device, job, round, frame, update_id FROM updates ORDER BY device")
        shown = [(*row,) for row in rows]
    file.close()
    expected = [an_update(1), an_update(2)]
    assert shown == [(one.device, one.job, one.round, one.frame, one.update_id) for one in expected]


# --- a ledger of the release before ------------------------------------------------------------------


def test_a_ledger_of_the_first_schema_opens_with_everything_in_it(tmp_path: Path) -> None:
    first = Path(__file__).with_name("ledger_schema_1.sql").read_text()
    invited = msgspec.msgpack.encode([{"device": "a"}, {"device": "b"}])
    updates = [an_update(number, round_number=1 + number // 3) for number in range(9)]
    ids = {number: sorted(one.update_id for one in updates if one.round == number) for number in (1, 2, 3)}
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        file.executescript(first)
        file.execute("INSERT INTO meta VALUES ('epoch', 7)")
        file.execute("INSERT INTO jobs VALUES ('digits', x'7b7d', '/', 'running', '', 1.0)")
        states = {1: "published", 2: "abandoned", 3: "open"}
        for number, state in states.items():
            frozen = [] if state == "open" else ids[number]
            row = ("digits", number, 5, state, "", 2.0, invited, msgspec.msgpack.encode(frozen))
            digest = hashlib.sha256(b"".join(frozen)).digest()
            file.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'v', x'01')", (*row, digest))
        for one in updates:
            frame = None if one.round == 1 else one.frame
            key = (one.update_id, one.job, one.round, one.device, one.structure, one.samples, one.sha256)
            file.execute("INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*key, frame, 3.0))
        version = a_version(0, None)
        values = (version.id, version.manifest)
        file.execute("INSERT INTO versions VALUES ('digits', 0, ?, NULL, ?, 1.0)", values)
        file.execute("INSERT INTO tags VALUES ('digits', 'stable', 0)")
        file.execute("INSERT INTO paths VALUES ('digits', 'device-1', x'01')")
        file.execute("INSERT INTO job_values VALUES ('digits', 'plan', x'02')")
    file.close()
    ledger = opened(tmp_path)
    assert ledger.epoch == 8
    assert ledger.jobs.get("digits").state == "running"
    assert ledger.jobs.value("digits", "plan") == b"\x02"
    rows = ledger.rounds.all("digits")
    assert [(row.state, row.invited, row.asked, row.stats) for row in rows] == [
        (state, invited, 2, b"\x01") for state in states.values()
    ]
    assert [list(row.frozen) for row in rows] == [ids[1], ids[2], []]
    assert [ledger.updates.ids("digits", number) for number in (1, 2, 3)] == list(ids.values())
    with pytest.raises(NotFoundError, match="pruned"):
        ledger.updates.of_round("digits", 1)
    assert ledger.updates.of_round("digits", 3) == sorted(updates[6:], key=lambda one: one.update_id)
    assert ledger.updates.counts() == {one.device: 1 for one in updates}
    assert ledger.updates.paths("digits") == {"device-1": b"\x01"}
    assert ledger.versions.get("digits", "stable") == replace(a_version(0, None), tags=("stable",))
    assert store(ledger, updates[0], updates[4], updates[8]) == ["duplicate"] * 3
    assert store(ledger, an_update(20, round_number=3)) == ["stored"]
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        assert file.execute("PRAGMA foreign_key_check").fetchall() == []
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    file.close()
    opened(tmp_path).close()


def test_a_migration_that_is_killed_leaves_the_old_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        file.executescript(Path(__file__).with_name("ledger_schema_1.sql").read_text())
        before = file.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
    file.close()
    steps = shutil.copytree(migration.REVISIONS, tmp_path / "steps")
    broken = steps / "versions" / "s0003_whole.py"
    broken.write_text(broken.read_text() + '\n    connection.exec_driver_sql("no statement")\n')
    monkeypatch.setattr(migration, "REVISIONS", steps)
    with pytest.raises(DiskError):
        opened(tmp_path)
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        assert file.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == before
        assert file.execute("PRAGMA user_version").fetchone() == (1,)
    file.close()
    monkeypatch.undo()
    opened(tmp_path).close()


def shape(path: Path) -> dict[str, object]:
    """What a database's tables are, as SQLite tells it; how their text was laid out does not count."""
    with sqlite3.connect(path) as file:
        names = file.execute(
            "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_auto%'"
        ).fetchall()
        found: dict[str, object] = {}
        for kind, name in sorted(names):
            columns, foreign, indexes, strict = (
                file.execute(query, (name,)).fetchall()
                for query in (
                    "SELECT * FROM pragma_table_xinfo(?)",
                    "SELECT * FROM pragma_foreign_key_list(?)",
                    'SELECT "unique", origin FROM pragma_index_list(?)',
                    "SELECT strict FROM pragma_table_list(?)",
                )
            )
            default = [(*column[1:4], str(column[4]).strip("'"), column[5]) for column in columns]
            found[f"{kind} {name}"] = (default, sorted(foreign), sorted(indexes), strict)
    file.close()
    return found


OLD = {
    1: ("ledger_schema_1.sql", ()),
    2: (
        "ledger_schema_2.sql",
        ("DROP TABLE variants", "ALTER TABLE jobs ADD COLUMN run BLOB NOT NULL DEFAULT x''"),
    ),
}
"""Ledgers as released programs have left them, and what some of the same number lacked or had beside it."""


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("version", OLD)
def test_a_ledger_of_every_schema_becomes_like_a_new_one(tmp_path: Path, version: int, changed: bool) -> None:
    script, changes = OLD[version]
    old = tmp_path / "old"
    old.mkdir()
    with sqlite3.connect(old / "ledger.db") as file:
        file.executescript(Path(__file__).with_name(script).read_text())
        file.execute("INSERT INTO meta VALUES ('epoch', 7)")
        for statement in changes if changed else ():
            file.execute(statement)
    file.close()
    ledger = opened(old)
    assert ledger.epoch == 8
    ledger.close()
    opened(tmp_path / "new").close()
    assert shape(old / "ledger.db") == shape(tmp_path / "new" / "ledger.db")
    copy = old / f"ledger-schema-{version}.db"
    assert copy.stat().st_mode & 0o077 == 0
    with sqlite3.connect(copy) as file:  # the way back: what an older program opens
        assert file.execute("PRAGMA user_version").fetchone() == (version,)
        assert file.execute("SELECT value FROM meta").fetchone() == (7,)
    file.close()
    opened(old).close()


def test_the_tables_of_today_are_those_of_the_last_step(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    steps = [step.revision for step in ScriptDirectory(str(migration.REVISIONS)).walk_revisions()]
    assert steps == [str(number) for number in range(migration.SCHEMA_VERSION, 0, -1)]
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        file.executescript(Path(__file__).with_name("ledger_schema_1.sql").read_text())
    file.close()
    ledger = opened(tmp_path)
    with ledger.database.read() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == str(migration.SCHEMA_VERSION)
        assert compare_metadata(context, tables.METADATA) == []
    ledger.close()


def test_a_ledger_of_today_is_opened_without_alembic(tmp_path: Path) -> None:
    opened(tmp_path).close()
    program = (
        "import sys, pathlib; from liberatai_coordinator.store.ledger import Ledger;"
        "Ledger.open(pathlib.Path(sys.argv[1])).close();"
        "sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_manifests_that_were_packed_for_a_while_are_read_by_others_again(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        file.executescript(Path(__file__).with_name("ledger_schema_2.sql").read_text())
        version = a_version(0, None)
        packed = b"\0zlib\0" + zlib.compress(version.manifest)
        file.execute("INSERT INTO versions VALUES ('digits', 0, ?, NULL, ?, 1.0, 0)", (version.id, packed))
    file.close()
    opened(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        assert file.execute("SELECT manifest FROM versions").fetchone() == (version.manifest,)
    file.close()


def test_an_upgrade_without_room_for_a_copy_changes_nothing(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        file.executescript(Path(__file__).with_name("ledger_schema_2.sql").read_text())
    file.close()
    with pytest.raises(
        DiskError, match="no room for a copy of the ledger before its upgrade from schema 2 to"
    ):
        Ledger.open(tmp_path, reserve_bytes=2**60)
    with sqlite3.connect(tmp_path / "ledger.db") as file:
        assert file.execute("PRAGMA user_version").fetchone() == (2,)
    file.close()


# --- names of ended jobs -----------------------------------------------------------------------------


def test_a_deleted_job_leaves_its_versions_and_its_name(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    ledger.jobs.create("other", b"{}", "/", 1.0)
    ledger.rounds.open(replace(a_round(ledger), job="other"))
    kept = replace(an_update(1), job="other", update_id=b"o" * 16)
    store(ledger, *(replace(an_update(number), path=b"p") for number in range(1200)), kept)
    frozen = ledger.rounds.close("digits", 1)
    ledger.versions.add(manifest_of(1, frozen))
    ledger.jobs.set_value("digits", "plan", b"1")
    ledger.jobs.end("digits", "finished")
    ledger.jobs.delete("digits")
    with pytest.raises(NotFoundError):
        ledger.jobs.get("digits")
    with pytest.raises(NotFoundError):
        ledger.jobs.delete("digits")
    assert [row.number for row in ledger.versions.all("digits")] == [1]
    assert ledger.updates.of_round("other", 1) == [kept]
    ledger.jobs.create("digits", b"{}", "/", 2.0, {"run": b"r"})
    assert ledger.jobs.get("digits").first_version == 2
    assert ledger.jobs.value("digits", "run") == b"r"
    assert ledger.jobs.value("digits", "plan") is None
    assert ledger.rounds.all("digits") == []
    assert ledger.updates.paths("digits") == {}
    ledger.rounds.open(a_round(ledger))
    assert store(ledger, an_update(1)) == ["stored"]
    assert ledger.updates.counts()["device-1"] == 3
    ledger.close()


def test_an_ended_job_forgets_what_only_rounds_need(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, replace(an_update(1), path=b"p"))
    ledger.jobs.set_value("digits", "plan", b"1")
    ledger.jobs.set_value("digits", "history", b"2")
    ledger.jobs.end("digits", "finished", forget=("history", "merged"))
    assert ledger.updates.paths("digits") == {}
    assert [ledger.jobs.value("digits", key) for key in ("plan", "history")] == [b"1", None]
    ledger.close()


def test_a_round_tells_who_sent_without_its_frames(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    store(ledger, an_update(1), an_update(2))
    told = ledger.updates.senders("digits", 1)
    assert sorted(told) == [(one.device, one.update_id) for one in (an_update(1), an_update(2))]
    assert ledger.updates.senders("digits", 2) == []
    ledger.close()


# --- nobody waits long -------------------------------------------------------------------------------


def test_long_work_is_done_in_parts_between_which_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "DELETED_ROWS", 10)
    monkeypatch.setattr(database, "FREED_PAGES", 8)
    ledger = with_round(tmp_path)
    store(ledger, *(an_update(number, size=8192) for number in range(95)))
    ledger.rounds.abandon("digits", 1, "no quorum")
    commits = count_transactions(ledger)
    others: list[int] = []
    give_way = database.Database.slice

    @contextmanager
    def noting(self: database.Database) -> Iterator[None]:
        with give_way(self):
            yield
            with self.write() as connection:  # as any other thread could now
                others.append(connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0)

    monkeypatch.setattr(database.Database, "slice", noting)
    assert ledger.rounds.prune("digits", 0) == 95
    assert len(commits) > 2 * 10
    assert max(others) > 190  # two pages of each frame were free
    assert others[-1] < 8
    assert (tmp_path / "ledger.db").stat().st_size < 95 * 8192
    ledger.close()


def test_the_log_is_moved_into_the_database_by_the_writer_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SETTLE_BYTES", 100_000)
    monkeypatch.setattr(writer, "SETTLE_BYTES", 100_000)
    settled: list[str] = []
    done = threading.Event()
    settle = database.Database.settle

    def noting(self: database.Database) -> None:
        settled.append(threading.current_thread().name)
        settle(self)
        done.set()

    monkeypatch.setattr(database.Database, "settle", noting)
    ledger = with_round(tmp_path)
    for number in range(10):
        ledger.jobs.set_value("digits", str(number), b"v")
    assert done.wait(60)
    assert set(settled) == {"ledger"}
    ledger.close()


def test_a_log_that_others_append_to_all_the_time_stays_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(with_round(tmp_path)) as ledger:
        file = ledger.database
        script = file._script

        def interrupted(pragma: str) -> None:
            """Write beside a checkpoint: a reader of what was before keeps it from the end of the log."""
            if "PASSIVE" not in pragma:
                return script(pragma)
            with file.read() as reader:
                reader.exec_driver_sql("SELECT count(*) FROM jobs").all()
                ledger.jobs.set_value("digits", "beside", os.urandom(100_000))
                return script(pragma)

        monkeypatch.setattr(file, "_script", interrupted)
        for _ in range(12):
            ledger.jobs.set_value("digits", "much", os.urandom(4_000_000))
            file.settle()
        ledger.jobs.set_value("digits", "last", b"a commit cuts the log")
        assert (tmp_path / "ledger.db-wal").stat().st_size < 20_000_000
        assert ledger.jobs.value("digits", "last") == b"a commit cuts the log"


def test_devices_that_were_heard_while_the_disk_was_full_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY_S", 0.05)
    ledger = opened(tmp_path)
    full = threading.Event()
    full.set()
    tried = threading.Event()

    def commit(connection: sa.Connection) -> None:
        if full.is_set() and connection.get_execution_options().get("write"):
            tried.set()
            raise sqlite3.OperationalError("database or disk is full")

    sa.event.listen(ledger.database.engine, "commit", commit)
    known = DeviceRow(
        id="a",
        public_key=b"k" * 32,
        status="approved",
        capability=None,
        session=1,
        first_seen_s=1.0,
        last_seen_s=1.0,
    )
    for number in range(100):
        ledger.devices.remember(replace(known, id=f"device-{number:02}"))
    ledger.devices.set_traffic(
        [
            TrafficRow(
                device="a", sent_bytes=1, received_bytes=2, session=3, session_sent=4, session_received=5
            )
        ]
    )
    assert tried.wait(60)
    ledger.devices.remember(replace(known, id="device-07", session=9))  # newer than what the disk refused
    with pytest.raises(DiskError):
        ledger.devices.flush()
    assert ledger.devices.all() == []
    full.clear()
    commits = count_transactions(ledger)
    deadline = time.monotonic() + 60
    while len(ledger.devices.all()) < 100 or not ledger.devices.traffic():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(commits) < 20 + 2 * 100  # reads are counted, too
    assert {row.id: row.session for row in ledger.devices.all()}["device-07"] == 9
    ledger.close()


def test_a_fleet_that_appears_costs_a_few_transactions(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    commits = count_transactions(ledger)
    for number in range(5000):
        ledger.devices.remember(
            DeviceRow(
                id=f"device-{number}",
                public_key=b"k" * 32,
                status="pending",
                capability=b"c",
                session=1,
                first_seen_s=1.0,
                last_seen_s=1.0,
            )
        )
    ledger.close()
    assert len(commits) < 100
    ledger = opened(tmp_path)
    assert len(ledger.devices.all()) == 5000
    ledger.close()


def test_what_an_operator_decides_is_not_undone_by_what_was_heard_before(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    row = DeviceRow(
        id="a",
        public_key=b"k" * 32,
        status="pending",
        capability=None,
        session=1,
        first_seen_s=1.0,
        last_seen_s=1.0,
    )
    ledger.devices.remember(row)
    ledger.devices.set_status("a", "approved", "known")
    ledger.close()
    ledger = opened(tmp_path)
    assert [(one.status, one.reason) for one in ledger.devices.all()] == [("approved", "known")]
    ledger.close()


# --- less than everything ----------------------------------------------------------------------------


def test_what_a_list_shows_of_rounds_is_read_without_their_long_records(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    assert ledger.rounds.newest("nothing") is None
    assert ledger.rounds.newest_number("nothing") == 0
    for number in (1, 2, 3):
        if number > 1:
            invited = msgspec.msgpack.encode([{"device": device} for device in range(number)])
            ledger.rounds.open(replace(a_round(ledger, number), invited=invited))
        store(ledger, *(an_update(device, round_number=number) for device in range(number)))
        if number < 3:
            ledger.rounds.close("digits", number)
            ledger.rounds.set_aggregated("digits", number, f"v{number}", b"short", b"long" * 1000)
    shown = ledger.rounds.summaries("digits")
    assert [(row.round, row.state, row.asked, row.updates, row.stats) for row in shown] == [
        (1, "aggregated", 0, 1, b"short"),
        (2, "aggregated", 2, 2, b"short"),
        (3, "open", 3, 3, b""),
    ]
    assert ledger.rounds.newest_number("digits") == 3
    newest = ledger.rounds.newest("digits")
    assert newest == ledger.rounds.get("digits", 3)
    assert [row.round for row in ledger.rounds.newest_first("digits", page=2)] == [3, 2, 1]
    assert ledger.rounds.get("digits", 2).details == b"long" * 1000
    assert [row.round for row in ledger.rounds.all("digits", after=1)] == [2, 3]
    ledger.close()


def test_pruning_shortens_what_is_known_of_invitations(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    ledger.rounds.abandon("digits", 1, "no quorum")
    ledger.rounds.open(a_round(ledger, 2))
    ledger.rounds.prune("digits", 0, lambda invited: invited[:1])
    ledger.rounds.prune("digits", 0, lambda _invited: b"never twice")
    assert [row.invited for row in ledger.rounds.all("digits")] == [b"w", b"who"]
    ledger.close()


# --- one bad row -------------------------------------------------------------------------------------


def test_a_row_that_no_column_takes_holds_up_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = with_round(tmp_path)
    row = TrafficRow(
        device="a", sent_bytes=1, received_bytes=1, session=1, session_sent=1, session_received=1
    )
    ledger.devices.set_traffic(
        [row, replace(row, device="hostile", sent_bytes=2**70), replace(row, device="z")]
    )
    results = store(ledger, an_update(1), replace(an_update(2), samples=2**70), an_update(3))
    assert [str(result).split(":")[0] for result in results] == ["stored", "ledger", "stored"]
    assert isinstance(results[1], DiskError)
    ledger.devices.flush()
    assert sorted(ledger.devices.traffic()) == ["a", "z"]
    assert "dropped, for it cannot be written: 'hostile'" in caplog.text
    assert store(ledger, an_update(4)) == ["stored"]  # the thread lives
    ledger.close()


def test_more_readers_than_connections_wait_for_each_other(tmp_path: Path) -> None:
    ledger = with_round(tmp_path)
    inside, leave = threading.Semaphore(0), threading.Event()

    def read() -> None:
        with ledger.database.read() as connection:
            connection.exec_driver_sql("SELECT 1").scalar()
            inside.release()
            leave.wait(60)

    threads = [threading.Thread(target=read) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert all(inside.acquire(timeout=60) for _ in threads)
    assert store(ledger, an_update(1)) == ["stored"]
    leave.set()
    for thread in threads:
        thread.join()
    ledger.close()


def test_long_values_are_packed_and_read_back_as_they_were(tmp_path: Path) -> None:
    """Also what an earlier release wrote as it is."""
    values = [b"", b"short", b"\0zlib\0 no", b"the same of every device, " * 1000, bytes(range(256)) * 8]
    with closing(Ledger.open(tmp_path)) as ledger:
        ledger.jobs.create("j", b"{}", "/", 1.0)
        for number, value in enumerate(values):
            ledger.jobs.set_value("j", f"k{number}", value)
    file = sqlite3.connect(tmp_path / "ledger.db")
    stored = dict(file.execute("SELECT key, length(value) FROM job_values"))
    assert stored["k3"] < len(values[3]) / 20
    assert stored["k1"] == 5
    file.execute("UPDATE job_values SET value = ? WHERE key = 'k3'", (values[3],))
    file.commit()
    file.close()
    with closing(Ledger.open(tmp_path)) as ledger:
        assert [ledger.jobs.value("j", f"k{number}") for number in range(len(values))] == values
