"""Starts the release that shall run, and stands by while one is on trial: it goes back by itself.

This is always the code of the *installed* program: a release never starts itself. Where none was ever
unpacked, it looks for one file and is done. A confirmed release takes the place of this process. One on trial
is a child: if it ends, hangs or is not healthy in time, it is killed and what ran before is started.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from liberatai_agent.updates import plan, slots
from liberatai_agent.updates.plan import Release, State
from liberatai_core.errors import DamagedError, DiskError
from liberatai_core.sd_notify import notify, pause_s

RUNS: Final = "LIBERATAI_RELEASE"
"""Environment variable: the number of the release that this process is, so that it does not start another."""
TRIAL: Final = "LIBERATAI_TRIAL"
"""Environment variable: this process is on trial, and says in the folder that it names when it is well."""
STOP_S: Final = 20.0
LOOK_S: Final = 0.2
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PROGRAM: Final = "-m", "liberatai_agent"


def lead(
    state_dir: Path, public_key: bytes | None, arguments: Sequence[str], *, patience_s: float
) -> int | None:
    """Start what shall run.

    Args:
        state_dir: of the agent.
        public_key: of releases; None: only the installed program runs here.
        arguments: of the command line, for whoever is started.
        patience_s: in which a release on trial must become healthy.

    Returns:
        None: this program itself shall run. A number: the exit code, the agent was stopped.
    """
    if RUNS in os.environ or not (slots.folder_of(state_dir) / slots.STATE).exists():
        return None
    while True:
        before = slots.read_state(state_dir)
        state, wanted = plan.starting(before)
        if wanted is None or public_key is None:
            _write(state_dir, before, state)
            return None
        try:
            place = slots.require_whole(state_dir, wanted, public_key)
        except DamagedError as error:
            on_trial = state.trial is not None
            after = plan.failed(state, str(error)) if on_trial else plan.damaged(state, str(error))
            _write(state_dir, before, after)
            _say(after.said)
            continue
        _write(state_dir, before, state)
        if state.trial is None:
            _become(place, arguments)
        code = _try(state_dir, place, wanted, arguments, patience_s)
        if code is not None:
            return code


def restart(arguments: Sequence[str]) -> NoReturn:
    """Start the agent anew in this process, from the installed program: something is to be tried."""
    environment = {name: value for name, value in os.environ.items() if name not in (RUNS, TRIAL)}
    if own := os.environ.get(RUNS):
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path and path != own)
    _flush()
    os.execve(sys.executable, _command(arguments), environment)  # noqa: S606 - there is no shell


def follow(state_dir: Path) -> None:
    """Let a training process that the service manager started be of the release that the agent runs.

    The agent has checked that release when it started; this process is in its sandbox, not above it.
    """
    state = slots.read_state(state_dir)
    wanted = state.trial if state.trial is not None and state.starts else state.current
    if RUNS in os.environ or wanted is None:
        return
    place = slots.folder_of(state_dir) / wanted.slot
    _flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _environment(place))  # noqa: S606


def on_trial() -> bool:
    """Whether this process is a release that must prove itself."""
    return TRIAL in os.environ


def may_try(state_dir: Path) -> bool:
    """Whether a release waits that this process is not."""
    return not on_trial() and slots.waits(state_dir)


def tell_healthy(folder: Path) -> None:
    """Say that the release which this process is works; once."""
    sequence = os.environ.pop(TRIAL, None)
    if sequence is not None:
        (slots.folder_of(folder) / slots.HEALTHY).write_text(sequence, encoding="ascii")


def _try(
    state_dir: Path, place: Path, wanted: Release, arguments: Sequence[str], patience_s: float
) -> int | None:
    """Run a release until it is confirmed or has failed (None); an exit code: somebody stopped the agent."""
    _say(f"release {wanted.version} is on trial")
    slots.keep_outbox(state_dir)
    (slots.folder_of(state_dir) / slots.HEALTHY).unlink(missing_ok=True)
    environment = _environment(place) | {TRIAL: str(wanted.sequence)}
    environment.pop("NOTIFY_SOCKET", None)  # the service manager hears its main process, which is this one
    stopping: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: stopping.append(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    libc = ctypes.CDLL(None, use_errno=True)
    child = subprocess.Popen(  # alone in this process: nothing else runs between fork and exec
        _command(arguments),
        env=environment,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509
    )
    began_s = told_s = time.monotonic()
    notify("READY=1")
    try:
        while True:
            time.sleep(LOOK_S)
            code = child.poll()
            if any(number != signal.SIGHUP for number in stopping):
                notify("STOPPING=1")
                child.terminate()
                return _ended(child)
            if stopping:
                stopping.clear()
                child.send_signal(signal.SIGHUP)
            if _is_healthy(state_dir, wanted):
                _confirm(state_dir, child)
                return None
            if code is not None:
                _failed(state_dir, f"it ended with {code}", count_starts=True)
                return None
            if time.monotonic() - began_s > patience_s:
                child.kill()
                child.wait()
                _failed(state_dir, f"it was not healthy within {patience_s:.0f} s")
                return None
            if time.monotonic() - told_s > pause_s():
                notify("WATCHDOG=1")
                told_s = time.monotonic()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _confirm(state_dir: Path, child: "subprocess.Popen[bytes]") -> None:
    after = plan.healthy(slots.read_state(state_dir))
    slots.write_state(state_dir, after)
    _say(after.said)
    child.terminate()
    _ended(child)


def _failed(state_dir: Path, why: str, *, count_starts: bool = False) -> None:
    """Go back, unless it may be started once more."""
    state = slots.read_state(state_dir)
    if count_starts and state.starts < plan.MAX_STARTS:
        _say(f"the release on trial: {why}; start {state.starts} of {plan.MAX_STARTS}")
        return
    after = plan.failed(state, why)
    slots.put_outbox_back(state_dir)
    slots.write_state(state_dir, after)
    _say(after.said)


def _is_healthy(state_dir: Path, wanted: Release) -> bool:
    try:
        text = (slots.folder_of(state_dir) / slots.HEALTHY).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False
    return text == str(wanted.sequence)


def _ended(child: "subprocess.Popen[bytes]") -> int:
    try:
        return child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _become(place: Path, arguments: Sequence[str]) -> NoReturn:
    _flush()
    os.execve(sys.executable, _command(arguments), _environment(place))  # noqa: S606 - there is no shell


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, *_flags(), *PROGRAM, *arguments]


def _flags() -> list[str]:
    return ["-P"] if sys.flags.safe_path else []


def _environment(place: Path) -> dict[str, str]:
    paths = [str(place), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(paths),
        RUNS: str(place),
        # What is in a slot is checked at every start: nothing else may be there to be imported.
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _write(state_dir: Path, before: State, after: State) -> None:
    if after != before:
        try:
            slots.write_state(state_dir, after)
        except DiskError as error:
            _say(f"{error.code}: {error}")


def _say(line: str) -> None:
    sys.stderr.write(f"liberatai-agent: {line}\n")
    notify(f"STATUS={line}")


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
