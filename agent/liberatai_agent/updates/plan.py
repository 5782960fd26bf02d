"""Which release runs: the pure decision between what is installed, what is confirmed and what is tried.

    installed program ──a release is unpacked──▶ on trial ──healthy──▶ confirmed
                                                    └──crashes, hangs, never connects──▶ what ran before

A release that failed is not tried again unless somebody says so, and no older one is ever taken: what was
mended stays mended. Times of releases bound the clock from below, for devices whose clock stands in the past.
"""

from typing import Final, Literal

import msgspec

from liberatai_core.errors import StateError
from liberatai_core.release import Manifest

Slot = Literal["a", "b"]
MAX_STARTS: Final = 3
"""Of a release on trial: a crash may have another cause; three in a row have this one."""
MAX_FAILED: Final = 32


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A release in one of the two folders."""

    slot: Slot
    version: str
    sequence: int


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of releases; kept in one small file.

    Attributes:
        current: confirmed, and run; None: the installed program.
        trial: unpacked, not confirmed yet.
        starts: of the one on trial.
        highest: sequence of the newest one that was ever confirmed here.
        newest_s: when the newest release that was ever unpacked here was made: it is later than that now.
        failed: sequences that failed here.
        said: what became of the last trial, in words.
    """

    current: Release | None = None
    trial: Release | None = None
    starts: int = 0
    highest: int = 0
    newest_s: float = 0.0
    failed: tuple[int, ...] = ()
    said: str = ""


def require_wanted(state: State, offered: Manifest, *, now_s: float, again: bool = False) -> None:
    """Refuse a release that must not run here.

    Args:
        state: of this device.
        offered: signed by its release key.
        now_s: by the clock.
        again: somebody wants one that failed here to be tried once more.

    Raises:
        StateError: it is expired, older than what ran here, the same, or failed here before.
    """
    now_s = max(now_s, state.newest_s)
    if now_s > offered.expires_s:
        raise StateError(f"release {offered.version} has expired: get a newer one")
    running = state.current.sequence if state.current is not None else 0
    if offered.sequence < max(state.highest, running):
        raise StateError(
            f"release {offered.version} (number {offered.sequence}) is older than one that ran here"
            f" (number {max(state.highest, running)}): a device never goes back to what was mended"
        )
    if offered.sequence == running:
        raise StateError(f"release {offered.version} runs here already")
    if offered.sequence in state.failed and not again:
        raise StateError(f"release {offered.version} failed here before: `--again` tries it once more")


def free_slot(state: State) -> Slot:
    """Return the folder that nothing needs which runs."""
    return "b" if state.current is not None and state.current.slot == "a" else "a"


def unpacked(state: State, release: Release, created_s: float) -> State:
    """A release lies in its folder, whole: it is tried at the next start."""
    return msgspec.structs.replace(
        state,
        trial=release,
        starts=0,
        newest_s=max(state.newest_s, created_s),
        failed=tuple(number for number in state.failed if number != release.sequence),
        said=f"release {release.version} waits for its trial",
    )


def starting(state: State) -> tuple[State, Release | None]:
    """The agent starts: return what must be on disk before it does, and what to run (None: as installed)."""
    trial = state.trial
    if trial is None:
        return state, state.current
    if state.starts >= MAX_STARTS:
        state = failed(state, f"it was started {state.starts} times and never became healthy")
        return state, state.current
    said = f"release {trial.version} is on trial"
    return msgspec.structs.replace(state, starts=state.starts + 1, said=said), trial


def healthy(state: State) -> State:
    """The release on trial has proved itself."""
    if state.trial is None:
        return state
    return msgspec.structs.replace(
        state,
        current=state.trial,
        trial=None,
        starts=0,
        highest=max(state.highest, state.trial.sequence),
        said=f"release {state.trial.version} runs",
    )


def failed(state: State, why: str) -> State:
    """The release on trial must not run: what ran before does."""
    if state.trial is None:
        return state
    before = "the installed program" if state.current is None else f"release {state.current.version}"
    return msgspec.structs.replace(
        state,
        trial=None,
        starts=0,
        failed=(*state.failed, state.trial.sequence)[-MAX_FAILED:],
        said=f"release {state.trial.version} failed, {before} runs again: {why}"[:512],
    )


def back(state: State) -> State:
    """Somebody wants the installed program; releases above the highest one may come again."""
    said = "the installed program runs, somebody wanted it"
    return msgspec.structs.replace(state, current=None, trial=None, starts=0, said=said)


def damaged(state: State, why: str) -> State:
    """The confirmed release is not what was signed any more: the installed program runs."""
    if state.current is None:
        return state
    words = f"release {state.current.version} is damaged, the installed program runs: {why}"
    return msgspec.structs.replace(state, current=None, said=words[:512])
