"""`liberatai-agent install` and `uninstall`: a service of systemd, where no package brought one."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from liberatai_agent.commands.kit import DEFAULT_CONFIG, OK, add_command
from liberatai_core.errors import DiskError, StateError

ROOT = Path("/")


def register(commands: Any) -> None:
    """Add the commands."""
    install = add_command(
        commands,
        "install",
        _install,
        text="Make the agent a service of this machine and start it.",
        example="liberatai-agent install --systemd",
    )
    install.add_argument(
        "--systemd",
        action="store_true",
        required=True,
        help="as units of systemd, the only way there is",
    )
    uninstall = add_command(
        commands,
        "uninstall",
        _uninstall,
        text="Take away what `install` made; settings, keys and state stay.",
        example="liberatai-agent uninstall --purge",
    )
    uninstall.add_argument(
        "--purge",
        action="store_true",
        help="delete settings, keys and state, too: a new device from then on",
    )


# --- install -----------------------------------------------------------------------------------------


def _install(_args: argparse.Namespace) -> int:
    from liberatai_agent.machine import units  # noqa: PLC0415

    _require_systemd("install --systemd")
    if any((ROOT / path).exists() for path in units.PACKAGED):
        print("the units come from the package; they are enabled")
    else:
        place = _program_folder()
        for path, text in units.files(units.shipped_units(), place).items():
            _write(ROOT / path, text)
            print(f"wrote /{path}")
        _systemd("systemd-sysusers", str(ROOT / units.SYSUSERS_PLACE))
        _systemd("systemctl", "daemon-reload")
    _systemd("systemctl", "enable", "--quiet", *units.ENABLED)
    _systemd("systemctl", "restart", "liberatai-trainer.socket", "liberatai-agent.path")
    if DEFAULT_CONFIG.exists():
        _systemd("systemctl", "restart", "liberatai-agent.service")
        print("the agent runs: systemctl status liberatai-agent")
    else:
        print(f"the agent starts as soon as there is {DEFAULT_CONFIG}: liberatai-agent enrol")
    return OK


def _program_folder() -> PurePosixPath:
    """Return the folder of the programs that the units shall start.

    Raises:
        StateError: no service could start them.
    """
    from liberatai_agent.machine import units  # noqa: PLC0415

    folder = PurePosixPath(sys.executable).parent
    # A virtual environment's Python is a link; what it leads to must be seen as well.
    for path in (folder, PurePosixPath(os.path.realpath(sys.executable))):
        if hidden := units.hidden_from_services(path):
            raise StateError(
                f"{path} is hidden from services (all of {hidden} is): install the agent elsewhere first,"
                " e.g. sudo python3 -m venv /opt/liberatai && sudo /opt/liberatai/bin/pip install liberatai"
            )
    for name in ("liberatai-agent", "python3"):
        if not Path(folder, name).exists():
            raise StateError(
                f"{folder}: no {name} beside {sys.executable}: run the command of an installation"
            )
    return folder


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from error


# --- uninstall ---------------------------------------------------------------------------------------


def _uninstall(args: argparse.Namespace) -> int:
    from liberatai_agent.machine import units  # noqa: PLC0415

    _require_systemd("uninstall")
    if any((ROOT / path).exists() for path in units.PACKAGED):
        how = "purge" if args.purge else "remove"
        raise StateError(f"a package brought this agent: sudo apt-get {how} liberatai-agent")
    installed = [ROOT / units.UNIT_FOLDER / name for name in units.UNITS]
    if any(path.exists() for path in installed):
        _systemd("systemctl", "disable", "--now", "--quiet", *units.ENABLED)
        _systemd(
            "systemctl", "stop", "liberatai-trainer@*.service", "liberatai-training.slice", "liberatai.slice"
        )
    for path in (*installed, ROOT / units.SYSUSERS_PLACE):
        path.unlink(missing_ok=True)
        shutil.rmtree(path.with_name(f"{path.name}.d"), ignore_errors=True)
    _systemd("systemctl", "daemon-reload")
    print("the service is gone")
    if args.purge:
        _purge()
    return OK


def _purge() -> None:
    from liberatai_agent.machine import units  # noqa: PLC0415

    for folder in units.STATE:
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    for path in (
        *(ROOT / name for name in units.SETTINGS),
        *(ROOT / "etc/credstore").glob(f"{units.USER}.*"),
    ):
        path.unlink(missing_ok=True)
    settings = ROOT / "etc/liberatai"
    if settings.is_dir() and not any(settings.iterdir()):
        settings.rmdir()
    subprocess.run(["userdel", units.USER], check=False, capture_output=True)
    print("settings, keys and state are gone: this machine is a new device to every fleet")


# --- both --------------------------------------------------------------------------------------------


def _require_systemd(command: str) -> None:
    if not Path("/run/systemd/system").is_dir():
        raise StateError(
            "systemd does not run this machine: start `liberatai-agent run` by your own supervisor"
        )
    if os.geteuid() != 0:
        raise StateError(f"only root may do that: sudo {sys.argv[0]} {command}")


def _systemd(*command: str) -> None:
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode != 0:
        said = (run.stderr or run.stdout).strip() or f"exit code {run.returncode}"
        raise StateError(f"{' '.join(command)}: {said}")
