"""How a child process of the agent is started: its folder, its environment, its command line.

Its working directory and everything that libraries like to write (temporary files, caches, a home) lie in
a folder of its own below the agent's state, so that training works where nothing else may be written and
where the user has no name. What it prints goes to the agent's log: what it has to say, it says on a pipe or
socket of its own, whose number it is told.
"""

import os
import pwd
import shutil
import site
from pathlib import Path

from liberatai_core import processes

CALM = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}
"""One thread, sleeping while it waits (two spinning threads on a busy core collapse); no calls home."""
FOLDER = "children"
PLACES = {
    "HOME": ".",
    "TMPDIR": "tmp",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "MPLCONFIGDIR": "cache",
    "NUMBA_CACHE_DIR": "cache",
    "TORCH_HOME": "cache",
    "TORCHINDUCTOR_CACHE_DIR": "cache",
    "TRITON_CACHE_DIR": "cache",
}
"""Variable -> folder inside the child's own."""
ROOT = Path("/")
LOG = 2
"""Both outputs of a child go where the agent's log goes."""


def fresh_folder(state_dir: Path | None, name: str) -> Path:
    """Return an empty folder for one child below the state; the root folder if none can be made.

    A child that writes nothing works in the root folder as well, and the disk may be full.
    """
    if state_dir is None:
        return ROOT
    folder = state_dir / FOLDER / name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        for place in sorted({"tmp", *PLACES.values()}):
            (folder / place).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return ROOT
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a child that works in `folder`."""
    own = {} if folder == ROOT else {name: str(folder / place) for name, place in PLACES.items()}
    own |= dict.fromkeys(("USER", "LOGNAME"), _user_name())
    if site.ENABLE_USER_SITE and site.USER_BASE:
        # Packages that were installed with --user are found through HOME otherwise.
        own["PYTHONUSERBASE"] = site.USER_BASE
    return processes.environment(also=CALM | own)


def _user_name() -> str:
    """Return the user's name, or a made-up one: torch asks for it, and a service's user may have none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user{os.getuid()}"
