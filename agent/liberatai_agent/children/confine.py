"""What a child process does to itself before it works: it dies with its parent and stays in small limits."""

import ctypes
import os
import resource
import signal

NICE = 10
OPEN_FILES = 256
FILE_BYTES = 64 << 20
"""The process writes no files; this bounds what a faulty library may leave behind."""
PR_SET_PDEATHSIG = 1


def confine(parent: int) -> None:
    """Die with the parent, be nice, and stay inside small limits."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died before the line above.
        os._exit(1)
    os.nice(NICE)
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
    ):
        hard = resource.getrlimit(what)[1]
        wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (wanted, wanted))
