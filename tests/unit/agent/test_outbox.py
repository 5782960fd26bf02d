"""The outbox: nothing is lost or doubled, whatever dies and whenever."""

import contextlib
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from liberatai_agent.events import ResidualFile, Returned
from liberatai_agent.store import outbox_upgrade
from liberatai_agent.store.counters import Counters
from liberatai_agent.store.outbox import Leftover, Outbox, meaning_of, open_database
from liberatai_agent.store.state_folder import StateLock
from liberatai_core.contract.frame import Signer, open_frame, seal
from liberatai_core.contract.messages import TaskSpec, Update, update_id
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import DamagedError, DigestError, DiskError, LockedError, NotFoundError, QuotaError
from liberatai_core.structure import DataContract, Structure, Tensor

MARK = b"m" * 16
SIGNER = Signer.from_seed(b"d" * 32, "test")


def an_update(number: int = 1, body: bytes = b"body", structure: str = "mlp") -> Update:
    return Update(
        update_id=update_id("dev", "job", number, b"b" * 16),
        device="dev",
        job="job",
        round=number,
        epoch=1,
        structure=structure,
        base=b"b" * 16,
        samples=3,
        codec="topk",
        body=body,
    )


def task_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def store(
    box: Outbox, update: Update, residual: bytes, returned: tuple[bytes, ...] = ()
) -> tuple[bytes, ...]:
    path = box.new_residual(update.update_id)
    path.write_bytes(residual)
    return box.commit_training(
        update,
        seal(update, SIGNER),
        task_id=task_id(update.round),
        residual=ResidualFile(path=str(path), sha256=hashlib.sha256(residual).digest()),
        meaning=MARK,
        returned=returned,
    )


def commit(box: Outbox, number: int = 1, residual: bytes = b"rest", **changes: Any) -> Update:
    update = an_update(number, **changes)
    store(box, update, residual)
    return update


def residual(left: Leftover) -> bytes | None:
    """Return what the training process would read."""
    return None if left.residual is None else Path(left.residual.path).read_bytes()


@contextlib.contextmanager
def a_box(folder: Path, max_bytes: int = 1 << 20, device: str = "dev") -> Iterator[Outbox]:
    database = open_database(folder, device)
    try:
        yield Outbox(database, folder, device, max_bytes)
    finally:
        database.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Outbox]:
    with a_box(tmp_path) as found:
        yield found


def test_what_was_committed_is_there_after_reopening(box: Outbox, tmp_path: Path) -> None:
    update = commit(box)
    box._database.close()
    with a_box(tmp_path) as again:
        frame = seal(update, SIGNER)
        assert [(u.update_id, u.job, u.round) for u in again.unsent()] == [(update.update_id, "job", 1)]
        assert [(u.transfer, u.size_bytes) for u in again.unsent()] == [(blob_id(frame), len(frame))]
        left = again.leftover("job", "mlp", MARK)
        assert (residual(left), left.round, left.dropped) == (b"rest", 1, 0)
        assert again.finished() == (task_id(1),)


def test_counters_of_refusals_add_up(box: Outbox) -> None:
    counters = Counters(box._database, "dev")
    counters.add_refusals({"E_SIG": 2})
    counters.add_refusals({"E_SIG": 1, "E_FRAME": 1})
    assert counters.refusals() == {"E_FRAME": 1, "E_SIG": 3}
    assert Counters(box._database, "other").refusals() == {}


def test_the_first_update_of_a_round_wins(box: Outbox) -> None:
    commit(box, body=b"first", residual=b"first rest")
    commit(box, body=b"second", residual=b"second rest")
    assert len(box.unsent()) == 1
    assert residual(box.leftover("job", "mlp", MARK)) == b"first rest"
    message = open_frame(box.frame(an_update().update_id), "test", lambda _: SIGNER.public_key).message
    assert isinstance(message, Update)
    assert message.body == b"first"


def test_only_forgetting_deletes(box: Outbox) -> None:
    update = commit(box)
    box.forget(b"x" * 16)
    assert box.unsent()
    box.forget(update.update_id)
    assert not box.unsent()
    with pytest.raises(NotFoundError):
        box.frame(update.update_id)


def test_a_refused_body_waits_for_the_next_training_and_is_used_once(box: Outbox) -> None:
    update = commit(box, body=b"refused")
    box.give_back(update.update_id)
    box.give_back(update.update_id)
    assert not box.unsent()
    given_back = (Returned(update_id=update.update_id, round=1, body=b"refused"),)
    assert box.leftover("job", "mlp", MARK).returned == given_back
    assert box.leftover("job", "cnn", MARK).returned == ()
    store(box, an_update(2), b"new", (update.update_id,))
    left = box.leftover("job", "mlp", MARK)
    assert (residual(left), left.returned) == (b"new", ())


def test_devices_share_a_database_and_see_nothing_of_each_other(tmp_path: Path) -> None:
    database = open_database(tmp_path, "one")
    one, two = (Outbox(database, tmp_path, name, 1 << 20) for name in ("one", "two"))
    commit(one)
    assert not two.unsent()
    assert not two.finished()
    assert residual(two.leftover("job", "mlp", MARK)) is None
    commit(two, residual=b"other")
    two.forget(an_update().update_id)
    assert one.unsent()
    assert residual(one.leftover("job", "mlp", MARK)) == b"rest"
    database.close()


def test_a_frame_that_rotted_is_not_sent_and_its_body_not_given_back(box: Outbox) -> None:
    update = commit(box)
    with box._database.transaction() as db:
        db.execute("UPDATE updates SET frame = CAST(zeroblob(length(frame)) AS BLOB)")
    with pytest.raises(DigestError):
        box.frame(update.update_id)
    box.give_back(update.update_id)
    assert not box.unsent()
    assert box.leftover("job", "mlp", MARK).returned == ()


def test_no_file_stays_that_no_row_names(box: Outbox, tmp_path: Path) -> None:
    for number in range(1, 9):
        commit(box, number, structure=f"s{number % 6}")
    assert len(list((tmp_path / "residuals").iterdir())) == 4
    box.new_residual(b"left by a crash").write_bytes(b"x")
    box._database.close()
    with a_box(tmp_path):
        assert len(list((tmp_path / "residuals").iterdir())) == 4


def test_a_large_update_leaves_no_log_and_no_memory_behind(tmp_path: Path) -> None:
    with a_box(tmp_path, 1 << 26) as box:
        commit(box, body=bytes(4 << 20), residual=bytes(20 << 20))
        assert (tmp_path / "outbox.db-wal").stat().st_size <= 1 << 20
        assert (tmp_path / "outbox.db").stat().st_size < 6 << 20, "the residual is a file of its own"
        box.forget(an_update().update_id)
        assert (tmp_path / "outbox.db-wal").stat().st_size <= 1 << 20, "deleting is not writing"


def test_leftovers_of_an_older_job_of_the_same_name_are_deleted_and_counted_once(box: Outbox) -> None:
    box.give_back(commit(box, 1).update_id)
    commit(box, 2)
    other = b"o" * 16
    assert box.leftover("job", "cnn", other).dropped == 0, "another structure"
    assert box.leftover("elsewhere", "mlp", other).dropped == 0, "another job"
    left = box.leftover("job", "mlp", other)
    assert (residual(left), left.round, left.returned, left.dropped) == (None, 0, (), 2)
    left = box.leftover("job", "mlp", MARK)
    assert (residual(left), left.returned, left.dropped) == (None, (), 0)
    assert [u.round for u in box.unsent()] == [2], "updates are the coordinator's to judge"


def a_spec(**changes: Any) -> TaskSpec:
    mlp = Structure(family="mlp", params={}, tensors=(Tensor(name="w", shape=(4,)),))
    fields: dict[str, Any] = {
        "job": "job",
        "structure": mlp,
        "data": DataContract(input_shape=(4,), classes=2),
        "seed": 1,
        "trained_share": 0.5,
    }
    return TaskSpec(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "other"},
        {"seed": 2},
        {"trained_share": 0.25},
        {"codec": "random_k_feedback"},
        {"structure": Structure(family="cnn", params={}, tensors=(Tensor(name="w", shape=(4,)),))},
        {"structure": Structure(family="mlp", params={}, tensors=(Tensor(name="w", shape=(2, 2)),))},
    ],
    ids=["job", "seed", "share", "method", "family", "tensors"],
)
def test_the_meaning_depends_on_all_that_gives_coordinates_their_meaning(changes: dict[str, Any]) -> None:
    assert meaning_of(a_spec(**changes)) != meaning_of(a_spec())
    assert meaning_of(a_spec()) == meaning_of(a_spec(deadline_s=9.0))
    assert len(meaning_of(a_spec())) == 16


SCHEMA_1 = """
CREATE TABLE updates (
    update_id BLOB PRIMARY KEY, job TEXT NOT NULL, round INTEGER NOT NULL, structure TEXT NOT NULL,
    content BLOB NOT NULL, transfer TEXT, created INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE returned (
    update_id BLOB PRIMARY KEY, job TEXT NOT NULL, structure TEXT NOT NULL, body BLOB NOT NULL,
    created INTEGER NOT NULL
) STRICT;
CREATE TABLE residuals (
    job TEXT NOT NULL, structure TEXT NOT NULL, round INTEGER NOT NULL, used INTEGER NOT NULL,
    state BLOB NOT NULL, PRIMARY KEY (job, structure)
) STRICT;
CREATE TABLE finished (
    number INTEGER PRIMARY KEY AUTOINCREMENT, task_id BLOB NOT NULL UNIQUE
) STRICT;
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
PRAGMA application_id=1279347009;
PRAGMA user_version=1;
"""


def test_an_outbox_of_the_first_schema_lets_leftovers_go(tmp_path: Path) -> None:
    """They have no mark, so nobody knows what their coordinates mean."""
    path, waiting = tmp_path / "outbox.db", an_update(3)
    db = sqlite3.connect(path)
    db.executescript(SCHEMA_1)
    frame = seal(waiting, SIGNER)
    values = (waiting.update_id, frame, blob_id(frame))
    db.execute("INSERT INTO updates VALUES (?, 'job', 3, 'mlp', ?, ?, 5, 0)", values)
    db.execute("INSERT INTO residuals VALUES ('job', 'mlp', 3, 1, x'01')")
    db.execute("INSERT INTO returned VALUES (x'02', 'job', 'mlp', x'03', 5)")
    db.commit()
    db.close()
    for _ in range(2):
        with a_box(tmp_path) as box:
            assert [u.update_id for u in box.unsent()] == [waiting.update_id]
            assert box.frame(waiting.update_id) == frame
    with a_box(tmp_path) as box:
        assert not box._database.damaged
        assert box.leftover("job", "mlp", MARK).dropped == 2


def test_an_outbox_of_the_second_schema_is_taken_over(tmp_path: Path) -> None:
    sent, unsent = an_update(3), an_update(4, body=b"never sent")
    db = sqlite3.connect(tmp_path / "outbox.db")
    db.executescript(SCHEMA_1)
    db.executescript(outbox_upgrade._FROM_1 + ";PRAGMA user_version=2;")
    frame, content = seal(sent, SIGNER), msgspec.msgpack.encode(unsent)
    db.execute(
        "INSERT INTO updates VALUES (?, 'job', 3, 'mlp', ?, ?, 5, 0, ?)",
        (sent.update_id, frame, blob_id(frame), MARK),
    )
    db.execute(
        "INSERT INTO updates VALUES (?, 'job', 4, 'mlp', ?, NULL, 5, 0, ?)", (unsent.update_id, content, MARK)
    )
    db.execute("INSERT INTO residuals VALUES ('job', 'mlp', 4, 1, x'0102', ?)", (MARK,))
    db.execute("INSERT INTO finished (task_id) VALUES (?)", (task_id(3),))
    db.execute("INSERT INTO meta VALUES ('session', 7), ('epoch', 5), ('refused:E_SIG', 2)")
    db.commit()
    db.close()
    with a_box(tmp_path) as box:
        assert not box._database.damaged
        assert [u.update_id for u in box.unsent()] == [sent.update_id]
        left = box.leftover("job", "mlp", MARK)
        assert (residual(left), left.round) == (b"\1\2", 4)
        assert [one.body for one in left.returned] == [b"never sent"]
        assert box.finished() == (task_id(3),)
        counters = Counters(box._database, "dev")
        assert counters.refusals() == {"E_SIG": 2}
        assert (counters.take("session"), counters.take("epoch")) == (7, 5)
        assert counters.take("session") == 0


def test_the_quota_drops_superseded_updates_first(tmp_path: Path) -> None:
    box = Outbox(open_database(tmp_path, "dev"), tmp_path, "dev", 3000)
    other = commit(box, 1, body=bytes(1000), structure="cnn")
    old = commit(box, 2, body=bytes(1000))
    dropped = store(box, an_update(3, body=bytes(1000)), b"")
    assert dropped == (old.update_id,)
    dropped = store(box, an_update(4, body=bytes(1000), structure="ds_cnn"), b"")
    assert dropped == (other.update_id,)
    with pytest.raises(QuotaError):
        commit(box, 5, body=bytes(4000))
    assert [u.round for u in box.unsent()] == [3, 4]
    box._database.close()


def test_residuals_of_old_structures_are_let_go(box: Outbox) -> None:
    for number in range(1, 8):
        commit(box, number, structure=f"s{number}", residual=bytes([number]))
    kept = [n for n in range(1, 8) if residual(box.leftover("job", f"s{n}", MARK)) is not None]
    assert kept == [4, 5, 6, 7]


def test_finished_tasks_are_remembered_within_bounds(box: Outbox) -> None:
    for number in range(1, 300):
        store(box, an_update(number), b"")
    assert len(box.finished()) == 256
    assert box.finished()[-1] == task_id(299)


def test_a_full_disk_is_refused_whole_and_heals(tmp_path: Path) -> None:
    database = open_database(tmp_path, "dev")
    box, raw = Outbox(database, tmp_path, "dev", 1 << 24), database._db
    commit(box, 1)
    pages = raw.execute("PRAGMA page_count").fetchone()[0]
    raw.execute(f"PRAGMA max_page_count={pages + 4}")  # what SQLite sees of a full disk
    with pytest.raises(DiskError, match="full"):
        commit(box, 2, body=bytes(100_000), residual=b"new")
    assert [u.round for u in box.unsent()] == [1]
    assert box.finished() == (task_id(1),)
    assert residual(box.leftover("job", "mlp", MARK)) == b"rest"
    raw.execute("PRAGMA max_page_count=1000000")
    commit(box, 2, body=bytes(100_000), residual=b"new")
    assert residual(box.leftover("job", "mlp", MARK)) == b"new"
    database.close()


def damaged(content: bytes, how: str) -> bytes:
    page, middle = 4096, len(content) // 2 // 4096 * 4096
    noise = random.Random(how).randbytes(page)
    return {
        "foreign": lambda: b"not a database at all" * 100,
        "empty header": lambda: bytes(100) + content[100:],
        "random header": lambda: noise[:100] + content[100:],
        "short": lambda: content[:50],
        "half": lambda: content[: len(content) // 2],
        "odd": lambda: content[:-1234],
        "zero first page": lambda: bytes(page) + content[page:],
        "random first page": lambda: noise + content[page:],
        "zero second page": lambda: content[:page] + bytes(page) + content[2 * page :],
        "random second page": lambda: content[:page] + noise + content[2 * page :],
        "zero middle page": lambda: content[:middle] + bytes(page) + content[middle + page :],
        "random middle page": lambda: content[:middle] + noise + content[middle + page :],
        "newer": lambda: content[:60] + (99).to_bytes(4, "big") + content[64:],
    }[how]()


@pytest.mark.parametrize(
    "how",
    [
        "foreign",
        "empty header",
        "random header",
        "short",
        "half",
        "odd",
        "zero first page",
        "random first page",
        "zero second page",
        "random second page",
        "zero middle page",
        "random middle page",
        "newer",
    ],
)
def test_a_damaged_outbox_is_set_aside_and_a_fresh_one_works(tmp_path: Path, how: str) -> None:
    with a_box(tmp_path) as box:
        for number in range(1, 6):
            commit(box, number, body=random.Random(number).randbytes(9000))
    path = tmp_path / "outbox.db"
    broken = damaged(path.read_bytes(), how)
    path.write_bytes(broken)
    with a_box(tmp_path) as box:
        if box._database.damaged:
            assert (tmp_path / "outbox.db.damaged").read_bytes() == broken
            assert not box.unsent()
        else:
            # A page inside a blob: the row is there, and is found out when it is read.
            assert len(box.unsent()) == 5
            with pytest.raises(DigestError):
                [box.frame(one.update_id) for one in box.unsent()]
        commit(box, 9)
        assert box.unsent()[-1].round == 9
    with a_box(tmp_path) as box:
        assert not box._database.damaged


def test_damage_that_shows_while_the_agent_runs_is_told_from_a_full_disk(box: Outbox, tmp_path: Path) -> None:
    for number in range(1, 6):
        commit(box, number, body=random.Random(number).randbytes(150_000))
    box._database.cut_log()
    path = tmp_path / "outbox.db"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(1).randbytes(path.stat().st_size - 4096))
    with pytest.raises(DamagedError):
        [box.frame(one.update_id) for one in box.unsent()]


WRITER = """
import hashlib, sys
from pathlib import Path
from liberatai_agent.events import ResidualFile
from liberatai_agent.store.outbox import Outbox, open_database
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.messages import Update, update_id
folder, signer = Path(sys.argv[1]), Signer.from_seed(b"d" * 32, "test")
box = Outbox(open_database(folder, "dev"), folder, "dev", 1 << 30)
number = len(box.finished())
for waiting in box.unsent():
    if waiting.round % 2:
        box.give_back(waiting.update_id)
while True:
    number += 1
    update = Update(update_id=update_id("dev", "job", number, b"b" * 16), device="dev", job="job", round=number,
        epoch=1, structure="mlp", base=b"b" * 16, samples=3, codec="topk", body=bytes(20_000))
    left = box.leftover("job", "mlp", b"mark").returned
    path = box.new_residual(update.update_id)
    path.write_bytes(b"%d" % number)
    box.commit_training(update, seal(update, signer), task_id=number.to_bytes(16, "big"),
        residual=ResidualFile(path=str(path), sha256=hashlib.sha256(b"%d" % number).digest()),
        meaning=b"mark", returned=tuple(one.update_id for one in left))
    if number % 2:
        box.give_back(update.update_id)
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_kill_minus_9_at_random_leaves_update_residual_and_task_together(tmp_path: Path) -> None:
    """Acknowledged commits survive; the residual is always that of the last stored round."""
    chance = random.Random(1)
    acknowledged = 0
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(chance.randrange(1, 12)):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        writer.stdout.close()
        # A line may have been written and not read before the kill.
        acknowledged = int(rest[-1]) if rest else acknowledged
        database = open_database(tmp_path, "dev")
        box = Outbox(database, tmp_path, "dev", 1 << 30)
        assert not database.damaged
        done = len(box.finished())
        left = box.leftover("job", "mlp", b"mark")
        assert done in (acknowledged, acknowledged + 1)
        assert residual(left) == b"%d" % done
        rounds = {u.round for u in box.unsent()}
        given_back = {n for n in range(1, done + 1) if n % 2}
        # The last one may have been killed before it was given back, but is never in both places.
        assert rounds - {done} == set(range(1, done)) - given_back
        returned = {one.update_id for one in left.returned}
        last = update_id("dev", "job", done, b"b" * 16)
        assert returned == ({last} if done % 2 and done not in rounds else set())
        assert database.rows("PRAGMA integrity_check")[0][0] == "ok"
        database.close()


def test_a_state_folder_has_one_agent(tmp_path: Path) -> None:
    lock = StateLock(tmp_path / "state")
    with pytest.raises(LockedError):
        StateLock(tmp_path / "state")
    lock.close()
    lock.close()
    StateLock(tmp_path / "state").close()


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        StateLock(tmp_path / "file" / "state")
