"""The outbox: nothing is lost or doubled, whatever dies and whenever."""

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

from liberatai_agent.events import Returned
from liberatai_agent.outbox import Outbox, StateLock, device_seed, mark_of
from liberatai_core.contract.frame import Signer, open_frame, seal
from liberatai_core.contract.messages import TaskSpec, Update, update_id
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import ConfigError, DiskError, LockedError, NotFoundError, QuotaError
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


def commit(box: Outbox, number: int = 1, residual: bytes = b"rest", **changes: Any) -> Update:
    update = an_update(number, **changes)
    box.commit_training(update, task_id=task_id(number), residual=residual, mark=MARK)
    return update


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Outbox]:
    found = Outbox(tmp_path / "outbox.db", 1 << 20)
    yield found
    found.close()


def test_what_was_committed_is_there_after_reopening(box: Outbox, tmp_path: Path) -> None:
    update = commit(box)
    box.close()
    again = Outbox(tmp_path / "outbox.db", 1 << 20)
    assert [(u.update_id, u.job, u.round) for u in again.unsent()] == [(update.update_id, "job", 1)]
    left = again.leftover("job", "mlp", MARK)
    assert (left.residual, left.round, left.dropped) == (b"rest", 1, 0)
    assert again.finished() == (task_id(1),)
    assert again.unsent()
    again.close()


def test_session_numbers_grow_over_restarts(box: Outbox, tmp_path: Path) -> None:
    first = [box.next_session(), box.next_session()]
    box.close()
    again = Outbox(tmp_path / "outbox.db", 1 << 20)
    assert [*first, again.next_session()] == [1, 2, 3]
    again.close()


def test_the_epoch_never_falls(box: Outbox) -> None:
    assert box.epoch == 0
    for epoch in (3, 2, 5, 4):
        box.remember_epoch(epoch)
    assert box.epoch == 5


def test_counters_of_refusals_add_up(box: Outbox) -> None:
    box.add_refusals({"E_SIG": 2})
    box.add_refusals({"E_SIG": 1, "E_FRAME": 1})
    assert box.refusals() == {"E_FRAME": 1, "E_SIG": 3}


def test_the_first_update_of_a_round_wins(box: Outbox) -> None:
    commit(box, body=b"first", residual=b"first rest")
    commit(box, body=b"second", residual=b"second rest")
    assert len(box.unsent()) == 1
    assert box.leftover("job", "mlp", MARK).residual == b"first rest"
    frame = box.seal(an_update().update_id, lambda update: seal(update, SIGNER))
    message = open_frame(frame, "test", lambda _: SIGNER.public_key).message
    assert isinstance(message, Update)
    assert message.body == b"first"


def test_a_frame_is_sealed_once_and_its_bytes_stay(box: Outbox) -> None:
    update = commit(box)
    calls = []

    def sealing(found: Update) -> bytes:
        calls.append(found)
        return seal(found, SIGNER)

    frame = box.seal(update.update_id, sealing)
    assert box.seal(update.update_id, sealing) == frame
    assert calls == [update]
    assert box.of_transfer(blob_id(frame)) == update.update_id
    assert box.of_transfer("a" * 26) is None


def test_only_forgetting_deletes(box: Outbox) -> None:
    update = commit(box)
    box.forget(b"x" * 16)
    assert box.unsent()
    box.forget(update.update_id)
    assert not box.unsent()
    with pytest.raises(NotFoundError):
        box.seal(update.update_id, lambda found: seal(found, SIGNER))


@pytest.mark.parametrize("sealed", [False, True])
def test_a_refused_body_waits_for_the_next_training_and_is_used_once(box: Outbox, sealed: bool) -> None:
    update = commit(box, body=b"refused")
    if sealed:
        box.seal(update.update_id, lambda found: seal(found, SIGNER))
    box.give_back(update.update_id)
    box.give_back(update.update_id)
    assert not box.unsent()
    given_back = (Returned(update_id=update.update_id, round=1, body=b"refused"),)
    assert box.leftover("job", "mlp", MARK).returned == given_back
    assert box.leftover("job", "cnn", MARK).returned == ()
    box.commit_training(
        an_update(2), task_id=task_id(2), residual=b"new", mark=MARK, returned=(update.update_id,)
    )
    left = box.leftover("job", "mlp", MARK)
    assert (left.residual, left.returned) == (b"new", ())


def test_leftovers_of_an_older_job_of_the_same_name_are_deleted_and_counted_once(box: Outbox) -> None:
    box.give_back(commit(box, 1).update_id)
    commit(box, 2)
    other = b"o" * 16
    assert box.leftover("job", "cnn", other).dropped == 0, "another structure"
    assert box.leftover("elsewhere", "mlp", other).dropped == 0, "another job"
    left = box.leftover("job", "mlp", other)
    assert (left.residual, left.round, left.returned, left.dropped) == (None, 0, (), 2)
    left = box.leftover("job", "mlp", MARK)
    assert (left.residual, left.returned, left.dropped) == (None, (), 0)
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
def test_the_mark_depends_on_all_that_gives_coordinates_their_meaning(changes: dict[str, Any]) -> None:
    assert mark_of(a_spec(**changes)) != mark_of(a_spec())
    assert mark_of(a_spec()) == mark_of(a_spec(deadline_s=9.0))
    assert len(mark_of(a_spec())) == 16


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


def test_an_outbox_of_the_first_schema_keeps_its_updates_and_lets_leftovers_go(tmp_path: Path) -> None:
    """They have no mark, so nobody knows what their coordinates mean."""
    path, waiting = tmp_path / "outbox.db", an_update(3)
    db = sqlite3.connect(path)
    db.executescript(SCHEMA_1)
    content = msgspec.msgpack.encode(waiting)
    db.execute("INSERT INTO updates VALUES (?, 'job', 3, 'mlp', ?, NULL, 5, 0)", (waiting.update_id, content))
    db.execute("INSERT INTO residuals VALUES ('job', 'mlp', 3, 1, x'01')")
    db.execute("INSERT INTO returned VALUES (x'02', 'job', 'mlp', x'03', 5)")
    db.commit()
    db.close()
    for _ in range(2):
        box = Outbox(path, 1 << 20)
        assert [u.update_id for u in box.unsent()] == [waiting.update_id]
        box.close()
    box = Outbox(path, 1 << 20)
    assert box.leftover("job", "mlp", MARK).dropped == 2
    commit(box, 4)
    box.give_back(an_update(4).update_id)
    left = box.leftover("job", "mlp", MARK)
    assert (left.residual, [one.round for one in left.returned]) == (b"rest", [4])
    box.close()


def test_the_quota_drops_superseded_updates_first(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o.db", 3000)
    other = commit(box, 1, body=bytes(1000), structure="cnn")
    old = commit(box, 2, body=bytes(1000))
    dropped = box.commit_training(an_update(3, body=bytes(1000)), task_id=task_id(3), residual=b"", mark=MARK)
    assert dropped == (old.update_id,)
    dropped = box.commit_training(
        an_update(4, body=bytes(1000), structure="ds_cnn"), task_id=task_id(4), residual=b"", mark=MARK
    )
    assert dropped == (other.update_id,)
    with pytest.raises(QuotaError):
        commit(box, 5, body=bytes(4000))
    assert [u.round for u in box.unsent()] == [3, 4]
    box.close()


def test_residuals_of_old_structures_are_let_go(box: Outbox) -> None:
    for number in range(1, 8):
        commit(box, number, structure=f"s{number}", residual=bytes([number]))
    kept = [n for n in range(1, 8) if box.leftover("job", f"s{n}", MARK).residual is not None]
    assert kept == [4, 5, 6, 7]


def test_finished_tasks_are_remembered_within_bounds(box: Outbox) -> None:
    for number in range(1, 300):
        box.commit_training(an_update(number), task_id=task_id(number), residual=b"", mark=MARK)
    assert len(box.finished()) == 256
    assert box.finished()[-1] == task_id(299)


def test_a_full_disk_is_refused_whole_and_heals(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o.db", 1 << 24)
    commit(box, 1)
    pages = box._db.execute("PRAGMA page_count").fetchone()[0]
    box._db.execute(f"PRAGMA max_page_count={pages + 4}")  # what SQLite sees of a full disk
    with pytest.raises(DiskError, match="full"):
        commit(box, 2, body=bytes(100_000), residual=b"new")
    assert [u.round for u in box.unsent()] == [1]
    assert box.finished() == (task_id(1),)
    assert box.leftover("job", "mlp", MARK).residual == b"rest"
    box._db.execute("PRAGMA max_page_count=1000000")
    commit(box, 2, body=bytes(100_000), residual=b"new")
    assert box.leftover("job", "mlp", MARK).residual == b"new"
    box.close()


def test_a_foreign_or_newer_file_is_refused(tmp_path: Path) -> None:
    ours = "application_id=1279347009"
    faults = {
        "foreign": ("application_id=7",),
        "newer": (ours, "user_version=99"),
        "impossible": (ours, "user_version=-1"),
    }
    for name, pragmas in faults.items():
        db = sqlite3.connect(tmp_path / name)
        db.execute("CREATE TABLE t (x)")
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}")
        db.close()
        with pytest.raises(ConfigError):
            Outbox(tmp_path / name, 1)
    (tmp_path / "garbage").write_bytes(b"not a database at all" * 100)
    with pytest.raises(DiskError):
        Outbox(tmp_path / "garbage", 1)


WRITER = """
import sys
from pathlib import Path
from liberatai_agent.outbox import Outbox
from liberatai_core.contract.messages import Update, update_id
box = Outbox(Path(sys.argv[1]), 1 << 30)
number = len(box.finished())
for waiting in box.unsent():
    if waiting.round % 2:
        box.give_back(waiting.update_id)
while True:
    number += 1
    update = Update(update_id=update_id("dev", "job", number, b"b" * 16), device="dev", job="job", round=number,
        epoch=1, structure="mlp", base=b"b" * 16, samples=3, codec="topk", body=bytes(20_000))
    left = box.leftover("job", "mlp", b"mark").returned
    box.commit_training(update, task_id=number.to_bytes(16, "big"), residual=b"%d" % number,
        mark=b"mark", returned=tuple(one.update_id for one in left))
    if number % 2:
        box.give_back(update.update_id)
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_kill_minus_9_at_random_leaves_update_residual_and_task_together(tmp_path: Path) -> None:
    """Acknowledged commits survive; the residual is always that of the last stored round."""
    path, chance = tmp_path / "outbox.db", random.Random(1)
    acknowledged = 0
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
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
        box = Outbox(path, 1 << 30)
        done = len(box.finished())
        left = box.leftover("job", "mlp", b"mark")
        assert done in (acknowledged, acknowledged + 1)
        assert left.residual == b"%d" % done
        rounds = {u.round for u in box.unsent()}
        given_back = {n for n in range(1, done + 1) if n % 2}
        # The last one may have been killed before it was given back, but is never in both places.
        assert rounds - {done} == set(range(1, done)) - given_back
        returned = {one.update_id for one in left.returned}
        last = update_id("dev", "job", done, b"b" * 16)
        assert returned == ({last} if done % 2 and done not in rounds else set())
        assert box._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        box.close()


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


def test_the_device_key_is_made_once_and_private(tmp_path: Path) -> None:
    seed = device_seed(tmp_path / "state")
    assert len(seed) == 32
    assert device_seed(tmp_path / "state") == seed
    path = tmp_path / "state" / "device.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        device_seed(tmp_path / "state")
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="32"):
        device_seed(tmp_path / "state")
