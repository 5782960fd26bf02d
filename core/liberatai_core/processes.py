"""How one program of ours starts another: command line and environment.

`python -m` puts the working directory at the head of the module search path, so a file `random.py` that lies
there would be run in place of Python's own. `-P` keeps it out; installed packages and entry points stay. The
environment is an allow-list: what a service manager or a user's shell holds (NOTIFY_SOCKET, passwords,
tokens) is nobody else's business.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ALLOWED = frozenset(
    {
        "HOME",
        "LANG",
        "LANGUAGE",
        "LIBERATAI_TRAIN_PRIORITY",
        "LOGNAME",
        "PATH",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONHASHSEED",
        "PYTHONHOME",
        "PYTHONIOENCODING",
        "PYTHONMALLOC",
        "PYTHONNOUSERSITE",
        "PYTHONPYCACHEPREFIX",
        "PYTHONUSERBASE",
        "PYTHONUTF8",
        "PYTHONWARNINGS",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "SYSTEMROOT",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
    }
)
"""What an interpreter needs to find its packages, its language and its time zone."""
ALLOWED_PREFIXES = (
    "CUDA_",
    "GOMP_",
    "KMP_",
    "LC_",
    "LD_",  # boards preload libgomp for torch; who sets this for us can do anything anyway
    "MALLOC_",
    "MKL_",
    "NUMEXPR_",
    "NVIDIA_",
    "OMP_",
    "OPENBLAS_",
    "ORT_",
    "PYTORCH_",
    "TORCH_",
    "XDG_",
)
"""Settings of numerical libraries and of the loader."""


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line of `module` that imports nothing from the working directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(
    given: Mapping[str, str] | None = None, *, also: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return what a child gets of an environment, and what is set for it.

    Args:
        given: the environment to take from; None: this process's own.
        also: variables that are set whatever was there.
    """
    found = os.environ if given is None else given
    kept = {name: value for name, value in found.items() if _allowed(name)}
    if paths := _absolute(found.get("PYTHONPATH", "").split(os.pathsep)):
        kept["PYTHONPATH"] = os.pathsep.join(paths)
    # For the children of children, whoever starts them.
    return {**kept, "PYTHONSAFEPATH": "1", **(also or {})}


def _allowed(name: str) -> bool:
    return name in ALLOWED or name.startswith(ALLOWED_PREFIXES)


def _absolute(paths: Iterable[str]) -> list[str]:
    """Return the paths that do not depend on the working directory (an empty one is the directory itself)."""
    return [path for path in paths if Path(path).is_absolute()]
