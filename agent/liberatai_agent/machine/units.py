"""The agent's systemd units, and where they go when no package brought them.

What is shipped in deploy/systemd stands for a program in /opt/liberatai/bin; an installation elsewhere gets
the same units with its own place in them.
"""

from pathlib import Path, PurePosixPath

SHIPPED_BIN = "/opt/liberatai/bin"
UNITS = (
    "liberatai-agent.service",
    "liberatai-agent.path",
    "liberatai-trainer.socket",
    "liberatai-trainer@.service",
    "liberatai-training.slice",
)
ENABLED = ("liberatai-agent.service", "liberatai-agent.path", "liberatai-trainer.socket")
USER = "liberatai-agent"
SYSUSERS = "liberatai-agent.sysusers.conf"
UNIT_FOLDER = "etc/systemd/system"
SYSUSERS_PLACE = "etc/sysusers.d/liberatai-agent.conf"
PACKAGED = ("lib/systemd/system/liberatai-agent.service", "usr/lib/systemd/system/liberatai-agent.service")
"""Where a Debian package has its unit."""
STATE = ("var/lib/liberatai-agent",)
SETTINGS = ("etc/liberatai/agent.yaml",)
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - nothing is made there
"""Services of these units see nothing of it (ProtectHome, PrivateTmp)."""


def shipped_units() -> Path:
    """Return the folder of the units that come with LiberatAI, installed or in a source tree."""
    package = Path(__file__).parents[1]
    installed = package / "data" / "systemd"
    return installed if installed.is_dir() else package.parents[1] / "deploy" / "systemd"


def hidden_from_services(program: PurePosixPath) -> str:
    """Return the folder that hides a program from services, "" if they see it."""
    return next((folder for folder in HIDDEN if program.is_relative_to(folder)), "")


def files(shipped: Path, programs: PurePosixPath) -> dict[str, str]:
    """Return path below the root -> text of everything that an installation writes.

    Args:
        shipped: see `shipped_units`.
        programs: folder with `liberatai-agent` and `python3`.
    """
    found = {
        f"{UNIT_FOLDER}/{name}": (shipped / name)
        .read_text(encoding="utf-8")
        .replace(SHIPPED_BIN, str(programs))
        for name in UNITS
    }
    found[SYSUSERS_PLACE] = (shipped / SYSUSERS).read_text(encoding="utf-8")
    return found
