"""What a child process does to itself before it works: it dies with its parent and stays in small limits."""

import contextlib
import ctypes
import math
import os
import resource
import select
import signal
import threading
from pathlib import Path

NICE = 10
PRIORITY = "LIBERATAI_TRAIN_PRIORITY"
"""Environment variable: "low" keeps a training from stepping back behind everything else."""
OPEN_FILES = 256
FILE_BYTES = 128 << 20
"""The residual of the largest structure; it also bounds what a faulty library may leave behind."""
PR_SET_PDEATHSIG = 1
OOM_SCORE = 600
"""Of 1000: when the machine runs out of memory, the training goes before the agent and what others run."""
MAX_RLIMIT = (1 << 63) - 1
SLACK = 0.1
SLACK_BYTES = 32 << 20
"""Memory above what the device gives: limits count address space, some of which is never used."""


def confine(parent: int) -> None:
    """Die with the parent, be nice, and stay inside small limits."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died before the line above.
        os._exit(1)
    be_small()


def be_small() -> None:
    """Be nice and stay inside small limits."""
    with contextlib.suppress(OSError):
        # A service manager may forbid it, and has said how nice the process is.
        os.nice(NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
    ):
        hard = resource.getrlimit(what)[1]
        wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (wanted, wanted))


AUTOGROUP = Path("/proc/self/autogroup")


def step_back() -> None:
    """Take only the processor time that nobody else wants: what people do on this machine must not feel it.

    Where all that runs has one purpose (a simulated fleet), LIBERATAI_TRAIN_PRIORITY=low leaves it a share.
    """
    if os.environ.get(PRIORITY) == "low":
        return
    with contextlib.suppress(OSError):
        os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if os.getsid(0) == os.getpid():
        # Kernels that group processes by session share the processors among groups, whatever is in them:
        # this one's group, and no other, steps back too (sched(7), "The autogroup feature").
        with contextlib.suppress(OSError):
            AUTOGROUP.write_text("19")


def die_with(channel: int) -> None:
    """End this process when the other side of a socket is gone, whatever it is doing then."""

    def wait() -> None:
        watch = select.poll()
        watch.register(channel, select.POLLRDHUP | select.POLLHUP)
        while not watch.poll():
            pass
        os._exit(1)

    threading.Thread(target=wait, name="die-with-agent", daemon=True).start()


def limit(memory_bytes: int, cpu_seconds: float) -> None:
    """Bound what one piece of work may take from now on; the next call replaces these bounds.

    Memory is counted from what the process holds now: libraries reserve address space that they never use,
    and how much depends on how they were built.

    Args:
        memory_bytes: for the whole process, files that it maps included.
        cpu_seconds: processor time.
    """
    data, resident = _held()
    more = max(0, memory_bytes - resident)
    _lower(resource.RLIMIT_DATA, data + more + int(SLACK * more) + SLACK_BYTES)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + cpu_seconds))


def _held() -> tuple[int, int]:
    """Return the bytes of data in the address space, and of memory in use."""
    found = {"VmData": 0, "VmRSS": 0}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    return found["VmData"], found["VmRSS"]


def _lower(what: int, wanted: int) -> None:
    """Set a soft limit; the hard one stays, so that the next work may get more."""
    hard = resource.getrlimit(what)[1]
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (min(soft, MAX_RLIMIT), hard))
