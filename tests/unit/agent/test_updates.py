"""Which release runs, by what happened: the way forward, and back, whatever dies in between."""

import asyncio
import os
import random
import sqlite3
import sys
from pathlib import Path

import msgspec
import pytest

from liberatai_agent.config import AgentConfig, UpdateSettings
from liberatai_agent.store.blobs import BlobStore
from liberatai_agent.updates import keeper, plan, slots
from liberatai_agent.updates.plan import MAX_STARTS, Release, State
from liberatai_agent.updates.upgrading import Upgrading
from liberatai_core.contract.messages import AgentWish, BlobRef
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import (
    ConfigError,
    DamagedError,
    DigestError,
    FrameError,
    LiberataiError,
    MissingExtraError,
    NotFoundError,
    SignatureError,
    StateError,
)
from liberatai_core.release import Manifest, pack, release_key

KEY = release_key(b"r" * 32)
NOW_S = 1.8e9


def manifest(sequence: int = 1, **changes: object) -> Manifest:
    made = Manifest(
        format=1, version=f"0.{sequence}", sequence=sequence, created_s=NOW_S - 10, expires_s=NOW_S + 10
    )
    return msgspec.structs.replace(made, **changes)


def a_release(sequence: int, slot: plan.Slot = "a") -> Release:
    return Release(slot=slot, version=f"0.{sequence}", sequence=sequence)


def bundle(folder: Path, sequence: int = 1, code: str = "", **changes: object) -> Path:
    path = folder / f"{sequence}.release"
    files = {
        "liberatai_core/__init__.py": b"",
        "liberatai_agent/__init__.py": b"",
        "liberatai_agent/__main__.py": code.encode(),
    }
    path.write_bytes(pack(manifest(sequence, **changes), files, KEY))
    return path


# --- the decision --------------------------------------------------------------------------------------


def test_a_release_is_tried_confirmed_and_followed_by_one_in_the_other_folder() -> None:
    state = plan.unpacked(State(), a_release(1), 5.0)
    state, wanted = plan.starting(state)
    assert (wanted, state.starts) == (a_release(1), 1)
    state = plan.healthy(state)
    assert plan.starting(state) == (state, a_release(1))
    assert (state.current, state.trial, state.highest) == (a_release(1), None, 1)
    assert plan.free_slot(state) == "b"
    state = plan.healthy(plan.unpacked(state, a_release(2, "b"), 6.0))
    assert plan.free_slot(state) == "a"


def test_a_release_that_never_gets_well_is_left_after_some_starts_and_not_tried_again() -> None:
    confirmed = plan.healthy(plan.unpacked(State(), a_release(1), 5.0))
    state = plan.unpacked(confirmed, a_release(2, "b"), 6.0)
    for _ in range(MAX_STARTS):
        state, wanted = plan.starting(state)
        assert wanted == a_release(2, "b")
    state, wanted = plan.starting(state)
    assert wanted == a_release(1)
    assert "release 0.1 runs again" in state.said
    with pytest.raises(StateError, match="failed here before"):
        plan.require_wanted(state, manifest(2), now_s=NOW_S)
    plan.require_wanted(state, manifest(2), now_s=NOW_S, again=True)
    plan.require_wanted(state, manifest(3), now_s=NOW_S)
    again = plan.unpacked(state, a_release(2, "b"), 6.0)
    assert again.failed == ()


def test_no_older_expired_or_same_release_is_taken() -> None:
    state = plan.healthy(plan.unpacked(State(), a_release(5), NOW_S))
    for offered, words in (
        (manifest(4), "older than one that ran here"),
        (manifest(5), "runs here already"),
        (manifest(6, expires_s=NOW_S - 1), "expired"),
    ):
        with pytest.raises(StateError, match=words):
            plan.require_wanted(state, offered, now_s=NOW_S)
    # a clock in the past does not make an old release young: what was unpacked here was made later
    with pytest.raises(StateError, match="expired"):
        plan.require_wanted(state, manifest(6, expires_s=NOW_S - 1), now_s=0.0)
    # whoever went back to the installed program does not go back to what was mended
    with pytest.raises(StateError, match="older"):
        plan.require_wanted(plan.back(state), manifest(4), now_s=NOW_S)
    plan.require_wanted(plan.back(state), manifest(5), now_s=NOW_S)


@pytest.mark.parametrize("seed", range(50))
def test_whatever_happens_something_runs_that_was_confirmed_or_is_on_trial(seed: int) -> None:
    rng = random.Random(seed)
    confirmed: set[Release | None] = {None}
    state, sequence = State(), 0
    for _ in range(200):
        match rng.randrange(6):
            case 0:
                sequence += 1
                state = plan.unpacked(state, a_release(sequence, plan.free_slot(state)), float(sequence))
            case 1:
                if state.trial is not None and state.starts:
                    confirmed.add(state.trial)
                    state = plan.healthy(state)
            case 2:
                state = plan.failed(state, "x" * 1000)
            case 3:
                state = plan.damaged(state, "rot")
            case 4:
                state = plan.back(state)
            case _:
                pass
        before = state
        state, wanted = plan.starting(state)
        assert wanted in confirmed or wanted == state.trial
        assert state.starts <= MAX_STARTS
        assert state.current in confirmed
        if state.trial is not None and state.current is not None:
            assert state.trial.slot != state.current.slot  # what runs is never written over
        assert len(state.said) <= 512
        assert state.highest >= before.highest


# --- the folders ---------------------------------------------------------------------------------------


def install(state_dir: Path, path: Path, **options: bool) -> State:
    return slots.install(state_dir, path, KEY.public, now_s=NOW_S, **options)


def test_a_bundle_is_unpacked_checked_and_linked_when_it_is_confirmed(tmp_path: Path) -> None:
    state = install(tmp_path, bundle(tmp_path, 1))
    assert state.trial is not None
    place = slots.require_whole(tmp_path, state.trial, KEY.public)
    assert (place / "liberatai_agent" / "__main__.py").exists()
    assert not (tmp_path / "releases" / "current").exists()
    slots.write_state(tmp_path, plan.healthy(state))
    assert (tmp_path / "releases" / "current").resolve() == place
    again = install(tmp_path, bundle(tmp_path, 2))
    assert again.trial is not None
    assert again.trial.slot == "b"
    assert again.current == state.trial
    slots.write_state(tmp_path, plan.back(again))
    assert not (tmp_path / "releases" / "current").is_symlink()


def test_what_must_not_run_here_leaves_what_runs_as_it_is(tmp_path: Path) -> None:
    state = plan.healthy(install(tmp_path, bundle(tmp_path, 3)))
    slots.write_state(tmp_path, state)
    good = bundle(tmp_path, 4).read_bytes()
    (tmp_path / "cut").write_bytes(good[:-1])
    (tmp_path / "changed").write_bytes(good.replace(b"0.4", b"0.5"))
    (tmp_path / "junk").write_bytes(b"junk")
    for path, error in (
        (bundle(tmp_path, 2), StateError),
        (bundle(tmp_path, 5, expires_s=1.0), StateError),
        (bundle(tmp_path, 6, python="9.1"), ConfigError),
        (bundle(tmp_path, 7, requires={"numpy": "999"}), MissingExtraError),
        (bundle(tmp_path, 8, requires={"no-such-package-here": "1"}), MissingExtraError),
        (tmp_path / "changed", SignatureError),
        (tmp_path / "junk", FrameError),
        (tmp_path / "absent", NotFoundError),
        (tmp_path / "cut", FrameError),
    ):
        with pytest.raises(error):
            install(tmp_path, path)
        assert slots.read_state(tmp_path) == state
        assert state.current is not None
        slots.require_whole(tmp_path, state.current, KEY.public)


def test_a_bundle_that_breaks_off_takes_the_trial_with_it_whose_folder_it_was(tmp_path: Path) -> None:
    install(tmp_path, bundle(tmp_path, 1))
    content = bundle(tmp_path, 2, code="x = 1").read_bytes()
    (tmp_path / "bad").write_bytes(content[:-1] + b"!")
    with pytest.raises(DigestError):
        install(tmp_path, tmp_path / "bad")
    assert slots.read_state(tmp_path).trial is None


@pytest.mark.parametrize("damage", ["changed", "missing", "foreign", "compiled", "link", "head", "other"])
def test_a_folder_that_is_not_what_was_signed_does_not_run(tmp_path: Path, damage: str) -> None:
    state = install(tmp_path, bundle(tmp_path, 1))
    assert state.trial is not None
    place = tmp_path / "releases" / state.trial.slot
    code = place / "liberatai_agent" / "__main__.py"
    match damage:
        case "changed":
            code.write_text("x")
        case "missing":
            code.unlink()
        case "foreign":
            (place / "numpy.py").touch()
        case "compiled":
            (place / "liberatai_agent" / "__pycache__").mkdir()
            (place / "liberatai_agent" / "__pycache__" / "__main__.cpython-311.pyc").touch()
        case "link":
            (place / "numpy").symlink_to(tmp_path)
        case "head":
            (place / slots.SIGNED).write_bytes(b"no")
        case "other":
            state = msgspec.structs.replace(state, trial=a_release(9))
    assert state.trial is not None
    with pytest.raises(DamagedError):
        slots.require_whole(tmp_path, state.trial, KEY.public)


def test_an_outbox_that_a_failed_release_brought_to_another_form_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "releases").mkdir()

    def form(number: int | None = None) -> int:
        with sqlite3.connect(tmp_path / slots.OUTBOX) as file:
            if number is not None:
                file.execute("CREATE TABLE IF NOT EXISTS t (x)")
                file.execute(f"PRAGMA user_version = {number}")
            found: int = file.execute("PRAGMA user_version").fetchone()[0]
        file.close()
        return found

    form(3)
    slots.keep_outbox(tmp_path)
    form(4)
    slots.put_outbox_back(tmp_path)
    assert form() == 3


# --- by wish of the fleet ---------------------------------------------------------------------------------


class Broker:
    """A fetcher whose broker has one file."""

    def __init__(self, content: bytes) -> None:
        self.content, self.asked = content, 0

    async def fetch(self, ref: BlobRef, store: BlobStore) -> None:
        if not store.has(ref):
            self.asked += 1
            store.put(ref, self.content)


def test_a_release_by_wish_is_believed_for_the_release_key_alone(tmp_path: Path) -> None:
    content = bundle(tmp_path, 1, created_s=0.0, expires_s=1e11).read_bytes()
    ref = BlobRef(blob=blob_id(content), size_bytes=len(content))
    state, broker = tmp_path / "state", Broker(content)
    told: list[int] = []

    def wish(version: str, key: bytes | None) -> str:
        update = UpdateSettings(release_key=None if key is None else key.hex())
        config = AgentConfig(fleet="f", device="d", coordinator_key="0" * 64, update=update)
        upgrading = Upgrading(config, state, broker, lambda: told.append(1))  # type: ignore[arg-type]
        with pytest.raises(LiberataiError) as caught:
            asyncio.run(upgrading(AgentWish(version=version, bundle=ref)))
        return f"{caught.value.code} {caught.value}"

    assert wish("0.1", None).startswith("E_STATE update.release_key is not set")
    assert broker.asked == 0
    assert wish("0.1", release_key(b"o" * 32).public).startswith("E_SIG")
    assert wish("0.2", KEY.public).startswith("E_STATE the bundle holds release 0.1")
    assert told == []
    assert wish("0.1", KEY.public).startswith("E_BUSY")  # it waits for its trial
    assert told == [1]
    assert wish("0.1", KEY.public).startswith("E_BUSY")
    slots.write_state(state, plan.failed(slots.read_state(state), "it crashed"))
    assert wish("0.1", KEY.public).startswith("E_STATE release 0.1 failed here before")
    assert broker.asked == 1


# --- who starts what -----------------------------------------------------------------------------------


def lead(state_dir: Path, patience_s: float = 60.0, key: bytes | None = KEY.public) -> int | None:
    return keeper.lead(state_dir, key, ["run"], patience_s=patience_s)


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No other release around, and Python looks for packages where a release puts them."""
    for name in (keeper.RUNS, keeper.TRIAL, "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


HEALTHY = """
import os, sys, time, pathlib
folder = pathlib.Path(os.environ["LIBERATAI_RELEASE"]).parent
(folder / "healthy").write_text(os.environ["LIBERATAI_TRIAL"])
time.sleep(60)
"""


def test_without_releases_or_key_the_installed_program_runs(calm: Path) -> None:
    assert lead(calm) is None
    install(calm, bundle(calm, 1, "raise SystemExit(9)"))
    assert lead(calm, key=None) is None


@pytest.mark.parametrize(
    "code", ["raise SystemExit(0)", "raise SystemExit(9)", "import nothing_of_this_name", "syntax error here",
             "import os; os.kill(os.getpid(), 11)"],
)  # fmt: skip
def test_a_release_that_ends_is_started_some_times_and_then_left(calm: Path, code: str) -> None:
    counter = "import pathlib; pathlib.Path('starts').open('a').write('x')\n" if "syntax" not in code else ""
    install(calm, bundle(calm, 1, counter + code))
    assert lead(calm) is None
    state = slots.read_state(calm)
    assert (state.trial, state.current, state.failed) == (None, None, (1,))
    if counter:
        assert (calm / "starts").read_text() == "x" * MAX_STARTS


def test_a_release_that_hangs_is_killed_when_patience_ends(calm: Path) -> None:
    install(calm, bundle(calm, 1, "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"))
    assert lead(calm, patience_s=0.5) is None
    assert "not healthy within" in slots.read_state(calm).said


def test_a_healthy_release_is_confirmed_and_takes_the_place_of_this_process(
    calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(calm, bundle(calm, 1, HEALTHY))
    became: list[tuple[str, list[str], dict[str, str]]] = []

    class BecameError(Exception):
        pass

    def become(program: str, command: list[str], environment: dict[str, str]) -> None:
        became.append((program, command, environment))
        raise BecameError

    monkeypatch.setattr(os, "execve", become)
    with pytest.raises(BecameError):
        lead(calm)
    state = slots.read_state(calm)
    assert (state.trial, state.current) == (None, a_release(1))
    program, command, environment = became[0]
    assert (program, command[-3:]) == (sys.executable, ["-m", "liberatai_agent", "run"])
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(calm / "releases" / "a")
    assert keeper.TRIAL not in environment
    # and when its folder is damaged later, the installed program runs
    (calm / "releases" / "a" / "liberatai_agent" / "__main__.py").write_text("x")
    assert lead(calm) is None
    assert "damaged" in slots.read_state(calm).said
