"""A backup is one moment, whole or refused; putting it back overwrites nothing."""

import hashlib
import io
import sqlite3
import tarfile
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from tests.unit.coordinator.test_ledger import an_update, store

from liberatai_coordinator.backup import archive, restoring, taking
from liberatai_coordinator.backup.archive import Contents, Entry
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.intake.fencing import generation
from liberatai_coordinator.jobs.tasks import RUN
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.database import Database
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import Manifest, MemberRecord, StepRecord, encode_manifest
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import RoundRow, VersionRow
from liberatai_core.contract.messages import update_id
from liberatai_core.errors import (
    ConfigError,
    DamagedError,
    DiskError,
    LiberataiError,
    LockedError,
    NotFoundError,
)
from liberatai_core.settings import parse
from liberatai_core.structure import DataContract, Structure, Tensor

JOB = b"""{"name": "digits", "data": {"input_shape": [2], "classes": 2}, "structures": [{"family": "mlp"}],
"teach": {"unlabeled": "samples/u.npz"}, "evaluate": {"test": "../gone.npz"}}"""


def quiet(done: int, of: int) -> None:
    assert 0 <= done <= of


class Machine:
    """A coordinator's files, as `serve` leaves them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "var"
        self.settings = folder / "etc" / "coordinator.yaml"
        (folder / "etc").mkdir(parents=True)
        (folder / "samples").mkdir()
        (folder / "samples" / "u.npz").write_bytes(b"samples")
        (folder / "etc" / "ca.crt").write_text("ca")
        (folder / "etc" / "ca.crt").chmod(0o640)
        self.settings.write_text(
            "# ours\nfleet: f\nbroker: mqtts://here:8883\nca_file: ca.crt # the CA\nstate_dir: ../var\n"
        )
        with self.ledger() as ledger:
            ledger.jobs.create("digits", JOB, str(folder), 1.0, {RUN: b"12345678"})
            ledger.jobs.set_state("digits", "running")
            invited = [
                Invitation(device=name, structure="s", base=b"b" * 16, update_id=self.task(name))
                for name in "ab"
            ]
            ledger.rounds.open(
                RoundRow(
                    job="digits", round=1, epoch=1, opened_s=2.0, invited=msgspec.msgpack.encode(invited)
                )
            )
        (self.state / "coordinator.key").write_bytes(b"k" * 32)
        (self.state / "ca").mkdir()
        (self.state / "ca" / "ca.key").write_text("secret")
        (self.state / "ledger-schema-1.db").write_text("old")

    @staticmethod
    def task(device: str, run: bytes = b"12345678") -> bytes:
        return update_id(device, "digits", 1, b"b" * 16, run)

    def ledger(self) -> "Opened":
        return Opened(self.state)

    def config(self) -> CoordinatorConfig:
        text = self.settings.read_text()
        return parse(text, CoordinatorConfig, "c").relative_to(self.settings.parent)

    def take(self, target: Path) -> Contents:
        return taking.take(self.config(), self.settings, target, now_s=3.0, progress=quiet)


class Opened:
    def __init__(self, folder: Path) -> None:
        self._ledger = Ledger.open(folder, reserve_bytes=0)

    def __enter__(self) -> Ledger:
        return self._ledger

    def __exit__(self, *_: object) -> None:
        self._ledger.close()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def backup(machine: Machine, tmp_path: Path) -> Path:
    target = tmp_path / "backup.tar"
    machine.take(target)
    return target


def restored(backup: Path, into: Path | None, **options: object) -> restoring.Restored:
    given = {"broker": None, "force": False, **options}
    return restoring.restore(backup, into=into, progress=quiet, **given)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- taking ------------------------------------------------------------------------------------------


def test_a_backup_of_a_running_coordinator_holds_one_moment_of_it(machine: Machine, tmp_path: Path) -> None:
    repository = Repository(machine.state)
    with machine.ledger() as ledger:
        version = add_version(ledger, repository, 0)
        contents = machine.take(tmp_path / "b.tar")
        assert ledger.jobs.get("digits").state == "running"  # and nobody noticed
        ledger.jobs.end("digits", "finished")
    names = {entry.name for entry in contents.files}
    assert {
        "settings.yaml",
        "outside/0",
        "state/coordinator.key",
        "state/ca/ca.key",
        "state/ledger.db",
        f"state/blobs/sha256/{version.id}",
    } <= names
    assert not [name for name in names if "lock" in name or "schema" in name or "wal" in name]
    assert contents.jobs == ("digits",)
    assert contents.data["digits"].keys() == {"teach.unlabeled"}
    assert [line for line in contents.lacks if "evaluate.test" in line]
    assert not list(machine.state.glob(".backup-*"))
    assert (tmp_path / "b.tar").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["machine", "b.tar"]


def add_version(ledger: Ledger, repository: Repository, number: int) -> VersionRow:
    """A version whose files are there."""
    shas = iter(
        repository.put_all([f"{name} of {number}".encode() for name in ("master", "view", "keyframe")])
    )
    structure = Structure(family="mlp", params={"hidden": 2}, tensors=(Tensor(name="w", shape=(2, 2)),))
    master, view, keyframe = shas
    member = MemberRecord(
        structure=structure,
        master=master,
        view=view,
        digest="c" * 64,
        keyframe=StepRecord(version=number, blob=keyframe, size=1, digest="c" * 64),
    )
    manifest = Manifest(
        model="digits",
        number=number,
        parent=None,
        round=number,
        structures={structure.id: member},
        data=DataContract(input_shape=(1, 2), classes=2),
        updates=(),
    )
    encoded = encode_manifest(manifest)
    row = VersionRow(
        model="digits",
        number=number,
        id=repository.put(encoded),
        parent=None,
        manifest=encoded,
        created_s=1.0,
    )
    ledger.versions.add(row)
    return row


def test_files_that_are_one_file_lie_in_a_backup_once_and_are_one_file_again(
    machine: Machine, tmp_path: Path
) -> None:
    repository = Repository(machine.state)
    with machine.ledger() as ledger:
        version = add_version(ledger, repository, 0)
    models = machine.state / "models" / "blobs" / "sha256"
    models.mkdir(parents=True)
    (models / version.id).hardlink_to(machine.state / "blobs" / "sha256" / version.id)
    (models / ("f" * 64)).write_text("a commit of its own")
    contents = machine.take(tmp_path / "b.tar")
    names = [entry.name for entry in contents.files]
    assert f"state/models/blobs/sha256/{version.id}" not in names
    assert f"state/models/blobs/sha256/{'f' * 64}" in names
    there = restored(tmp_path / "b.tar", tmp_path / "there").state_dir
    again = there / "models" / "blobs" / "sha256"
    assert (again / version.id).samefile(there / "blobs" / "sha256" / version.id)
    assert (again / ("f" * 64)).read_text() == "a commit of its own"


def test_old_versions_that_go_while_a_backup_is_taken_are_in_it_or_not_needed(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository(machine.state)
    with machine.ledger() as ledger:
        old, new = (add_version(ledger, repository, number) for number in (0, 1))
        copies: list[Path] = []
        copy = Database.copy

        def copy_and_collect(path: Path, target: Path) -> None:
            copy(path, target)
            if not copies:  # between the snapshot and the holding of its files, the oldest version goes
                with ledger.database.write() as connection:
                    connection.exec_driver_sql("UPDATE versions SET collected = 1 WHERE number = 0")
                repository.collect(ledger.versions.needed_blobs())
            copies.append(path)

        monkeypatch.setattr(Database, "copy", copy_and_collect)
        contents = machine.take(tmp_path / "b.tar")
        assert len(copies) == 2
        wrote = archive.write

        def collect_and_write(*arguments: object) -> None:  # and once they are held, everything goes
            repository.collect(set())
            wrote(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(archive, "write", collect_and_write)
        again = machine.take(tmp_path / "c.tar")
    for found in (contents, again):
        names = {entry.name for entry in found.files}
        assert f"state/blobs/sha256/{new.id}" in names
        assert f"state/blobs/sha256/{old.id}" not in names
    assert not list((machine.state / "blobs" / "sha256").iterdir())


def test_a_damaged_file_of_a_version_is_named_and_taken_as_it_is(machine: Machine, tmp_path: Path) -> None:
    repository = Repository(machine.state)
    with machine.ledger() as ledger:
        version = add_version(ledger, repository, 0)
    (machine.state / "blobs" / "sha256" / version.id).write_bytes(b"rot")
    contents = machine.take(tmp_path / "b.tar")
    assert any(version.id in line and "damaged" in line for line in contents.lacks)


def test_a_folder_without_a_ledger_has_nothing_to_back_up(tmp_path: Path) -> None:
    config = CoordinatorConfig(fleet="f", state_dir=str(tmp_path / "nothing"))
    with pytest.raises(NotFoundError, match="no ledger"):
        taking.take(config, tmp_path / "c.yaml", tmp_path / "b.tar", now_s=0.0, progress=quiet)


def test_a_target_that_is_there_or_has_no_folder_is_refused_first(backup: Path, tmp_path: Path) -> None:
    for target, words in ((backup, "there already"), (tmp_path / "no" / "b.tar", "no folder")):
        with pytest.raises(ConfigError, match=words):
            taking.require_target(target)


def test_only_so_many_backups_of_one_coordinator_are_kept(machine: Machine, tmp_path: Path) -> None:
    config = machine.config()
    names = [taking.default_name(config, f"2026113{day}T120000Z") for day in range(4)]
    other = taking.default_name(CoordinatorConfig(fleet="f", coordinator="co2"), "20200101T000000Z")
    for name in [*names, other, "notes.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in taking.older(tmp_path, config, 2)] == names[:2]


# --- putting back --------------------------------------------------------------------------------------


def test_a_backup_put_back_elsewhere_is_the_same_coordinator_in_a_new_generation(
    machine: Machine, backup: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    done = restored(backup, there, broker="mqtt://other:1883")
    config = parse(done.settings.read_text(), CoordinatorConfig, "c").relative_to(done.settings.parent)
    assert config.broker == "mqtt://other:1883"
    assert Path(config.state_dir) == done.state_dir == there / "state"
    assert config.ca_file is not None
    assert Path(config.ca_file).read_text() == "ca"
    assert Path(config.ca_file).is_relative_to(there)
    assert "# ours" in done.settings.read_text()  # what people wrote stays
    assert (there / "state" / "coordinator.key").read_bytes() == b"k" * 32
    assert (there / "state" / "ca" / "ca.key").read_text() == "secret"
    assert (there / "state" / "coordinator.key").stat().st_mode & 0o077 == 0
    with Opened(there / "state") as ledger:
        assert generation(ledger.epoch) > 0
        job = msgspec.json.decode(ledger.jobs.get("digits").spec)
        assert Path(job["teach"]["unlabeled"]).read_bytes() == b"samples"
        assert Path(job["teach"]["unlabeled"]).is_relative_to(there)
    with machine.ledger() as ledger:  # the one that was backed up is as it was
        assert generation(ledger.epoch) == 0


def test_a_coordinator_put_back_asks_for_work_that_it_has_not_seen_under_new_names(
    machine: Machine, tmp_path: Path
) -> None:
    with machine.ledger() as ledger:
        update = an_update(1)
        store(ledger, replace(update, device="a", update_id=machine.task("a")))
    machine.take(tmp_path / "b.tar")
    restored(tmp_path / "b.tar", tmp_path / "there")
    with Opened(tmp_path / "there" / "state") as ledger:
        run = ledger.jobs.value("digits", RUN)
        assert run not in (None, b"12345678")
        row = ledger.rounds.get("digits", 1)
        asked = {
            one.device: one.update_id for one in msgspec.msgpack.decode(row.invited, type=list[Invitation])
        }
        assert asked == {"a": machine.task("a"), "b": machine.task("b", run or b"")}


def test_a_backup_goes_back_to_where_it_was_and_renames_what_stands_there(
    machine: Machine, backup: Path
) -> None:
    (machine.state / "coordinator.key").write_bytes(b"x" * 32)
    with pytest.raises(ConfigError, match="--force"):
        restored(backup, None)
    assert (machine.state / "coordinator.key").read_bytes() == b"x" * 32
    with machine.ledger(), pytest.raises(LockedError):
        restored(backup, None, force=True)
    done = restored(backup, None, force=True)
    assert (machine.state / "coordinator.key").read_bytes() == b"k" * 32
    assert (machine.folder / "etc" / "ca.crt").stat().st_mode & 0o777 == 0o640
    assert done.settings == machine.settings
    assert {path.name for path in done.renamed} == {
        "coordinator.yaml.before-restore-1",
        "ca.crt.before-restore-1",
        "var.before-restore-1",
    }
    assert machine.config().state_dir == str(machine.settings.parent / "../var")
    again = restored(backup, None, force=True)
    assert len(again.renamed) == 3


def test_settings_in_one_line_are_written_anew(machine: Machine, tmp_path: Path) -> None:
    machine.settings.write_text('{"fleet": "f", "ca_file": "ca.crt", "state_dir": "../var"}')
    machine.take(tmp_path / "b.tar")
    done = restored(tmp_path / "b.tar", tmp_path / "there")
    config = parse(done.settings.read_text(), CoordinatorConfig, "c").relative_to(done.settings.parent)
    assert Path(config.state_dir) == tmp_path / "there" / "state"


def test_a_ledger_of_an_older_release_is_brought_up_when_it_is_put_back(backup: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    contents = archive.extract(backup, work, quiet)
    (work / "state" / "ledger.db").unlink()
    with sqlite3.connect(work / "state" / "ledger.db") as file:
        file.executescript(Path(__file__).with_name("ledger_schema_2.sql").read_text())
    file.close()
    old = tmp_path / "old.tar"
    rewritten(contents, work, old, data={})
    done = restored(old, tmp_path / "there")
    with Opened(done.state_dir) as ledger:
        assert ledger.jobs.all() == []


# --- what is no backup, or damaged ----------------------------------------------------------------------


def rewritten(contents: Contents, work: Path, target: Path, **changes: object) -> None:
    entries = tuple(taking._entry(one.name, work / one.name) for one in contents.files)
    contents = msgspec.structs.replace(contents, files=entries, **changes)
    archive.write(target, contents, {one.name: work / one.name for one in entries}, quiet)


def test_what_is_no_backup_is_refused(tmp_path: Path) -> None:
    files = {"nothing": b"", "text": b"hello " * 500, "zeros": bytes(20_000)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "tar", "w") as other:
        other.addfile(tarfile.TarInfo("x"))
    for name in (*files, "tar", "absent", "."):
        with pytest.raises((ConfigError, DamagedError)):
            archive.extract(tmp_path / name, None, quiet)
        with pytest.raises((ConfigError, DamagedError)):
            restored(tmp_path / name, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_backup_of_a_newer_form_says_so(tmp_path: Path) -> None:
    made(tmp_path / "b.tar", b'{"format": 2, "and": "more"}', {})
    with pytest.raises(ConfigError, match="format 2, this release reads 1"):
        archive.read(tmp_path / "b.tar")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_a_backup_that_ends_early_is_damaged(backup: Path, cut: float) -> None:
    content = backup.read_bytes()
    end = content.rstrip(b"\0")
    backup.write_bytes(content[: int(len(end) * cut)])
    with pytest.raises((ConfigError, DamagedError)):
        archive.extract(backup, None, quiet)


def test_every_changed_byte_of_a_file_is_found_and_nothing_is_put_in_place(
    backup: Path, tmp_path: Path
) -> None:
    content = backup.read_bytes()
    with tarfile.open(backup) as found:
        members = [(member.name, member.offset_data, member.size) for member in found.getmembers()]
    for name, offset, size in members[1:]:
        place = offset + size // 2
        backup.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedError, match="not what was written"):
            archive.extract(backup, None, quiet)
        with pytest.raises(DamagedError, match=name.rpartition("/")[2][:20]):
            restored(backup, tmp_path / "there" / "deep")
    assert files(tmp_path / "there") == {}


def made(path: Path, text: bytes, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as out:
        for name, content in {archive.CONTENTS: text, **members}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name != archive.CONTENTS:
                member.type = kind
                member.linkname = "/etc/passwd"
            out.addfile(member, io.BytesIO(content))
    return path


def listed(*names: str, **changes: object) -> bytes:
    entries = tuple(Entry(name=name, size=1, sha256=hashlib.sha256(b"x").hexdigest()) for name in names)
    contents = Contents(
        format=1,
        release="",
        created_s=0.0,
        fleet="f",
        coordinator="c",
        epoch=1,
        settings="/s/c.yaml",
        state_dir="/v",
        files=entries,
    )
    return msgspec.json.encode(msgspec.structs.replace(contents, **changes))


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "a//x", ".", "a/.", "x\n", "a\0b", "ü", "a" * 256]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    bad = made(tmp_path / "b.tar", listed(name), {})
    with pytest.raises(DamagedError):
        archive.extract(bad, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_members_that_are_not_listed_missing_doubled_or_links_are_refused(tmp_path: Path) -> None:
    wrong = [
        made(tmp_path / "1", listed("a"), {}),
        made(tmp_path / "2", listed("a"), {"a": b"x", "b": b"x"}),
        made(tmp_path / "3", listed("a", "b"), {"b": b"x", "a": b"x"}),
        made(tmp_path / "4", listed("a", "a"), {"a": b"x"}),
        made(tmp_path / "5", listed("a"), {"a": b"xx"}),
        made(tmp_path / "6", listed("a"), {"a": b"x"}, kind=tarfile.SYMTYPE),
        made(tmp_path / "7", listed("a"), {"a": b"x"}, kind=tarfile.LNKTYPE),
        made(tmp_path / "8", listed("a", outside={"b": "/etc/passwd"}), {"a": b"x"}),
        made(tmp_path / "9", b"{", {}),
    ]
    for path in wrong:
        with pytest.raises(LiberataiError):
            archive.extract(path, tmp_path / f"out{path.name}", quiet)
    assert archive.extract(made(tmp_path / "good", listed("a"), {"a": b"x"}), tmp_path / "out", quiet)
    assert files(tmp_path / "out") == {"a": b"x"}


@pytest.mark.parametrize(
    "changes", [{"settings": "c.yaml"}, {"state_dir": "/v/../etc"}, {"outside": {"a": "b"}}]
)
def test_places_that_are_none_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    bad = made(tmp_path / "b.tar", listed("a", **changes), {"a": b"x"})
    with pytest.raises(DamagedError, match="no place"):
        restored(bad, None)


def test_a_disk_that_refuses_leaves_nothing_half_written(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        archive.write(tmp_path / "b.tar", msgspec.json.decode(listed(), type=Contents), {}, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]
