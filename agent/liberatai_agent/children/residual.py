"""A residual travels between agent and training process as a file: it is as large as the model.

The process reads the one before and writes the next; the agent only gives names, so it never holds one.
"""

import hashlib
import os
from pathlib import Path

from msgspec.structs import replace

from liberatai_agent.children.messages import Work
from liberatai_agent.events import ResidualFile, TrainingResult
from liberatai_core.errors import CodecError, DiskError

DAMAGED = (CodecError.code, "residual: not what was stored")


def read(work: Work) -> Work:
    """Return the work with the residual of its file; without one if the file is not what was stored."""
    if work.residual_from is None:
        return work
    try:
        content = Path(work.residual_from.path).read_bytes()
    except OSError:
        content = b""
    good = hashlib.sha256(content).digest() == work.residual_from.sha256
    return replace(work, residual=content if good else None, rounds_away=work.rounds_away if good else 0)


def write(work: Work, result: TrainingResult) -> TrainingResult:
    """Return a result whose residual is a file on disk, if the work names one.

    Raises:
        DiskError: it cannot be written.
    """
    if not work.residual_to:
        return result
    lost = work.residual_from is not None and work.residual is None
    dropped = result.dropped or (DAMAGED if lost else None)
    try:
        descriptor = os.open(work.residual_to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(result.residual)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DiskError(f"residual: {error.strerror}: free some space; the agent tries again") from error
    kept = ResidualFile(path=work.residual_to, sha256=hashlib.sha256(result.residual).digest())
    return replace(result, residual=b"", residual_file=kept, dropped=dropped)
