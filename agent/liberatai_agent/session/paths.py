"""Paths of files that lead to weights: a keyframe, then deltas."""

from liberatai_agent.session.state import Fetching, ReadingSpec, Ready, Session, Storing, Training, final_of
from liberatai_core.contract.messages import BlobRef, Step


def joined(path: tuple[Step, ...], held: bytes, steps: tuple[Step, ...]) -> tuple[Step, ...] | None:
    """Return the path to where `steps` lead, None if the device does not hold what they go on from."""
    if not held:
        return steps
    for number, one in enumerate(path):
        if one.digest == held:
            return (*path[: number + 1], *steps)
    return None


def with_room(path: tuple[Step, ...], chain: tuple[Step, ...], storage_bytes: int) -> tuple[Step, ...]:
    """Return what stays of the old path until the new one is worked from: all, unless both are too much."""
    if size_bytes((*path, *chain)) <= storage_bytes:
        return path
    shared = 0
    while shared < min(len(path), len(chain)) and path[shared] == chain[shared]:
        shared += 1
    return path[:shared]


def kept(s: Session) -> frozenset[str]:
    """Return the blobs that must stay on disk."""
    task, work = s.task, s.work
    specs = [task.spec.blob] if task is not None else [] if s.spec is None else [s.spec[0]]
    chain = work.chain if isinstance(work, Fetching | ReadingSpec | Ready | Training | Storing) else ()
    return frozenset([*(one.blob.blob for one in (*s.path, *chain, *final_of(work))), *specs])


def refs(steps: tuple[Step, ...]) -> tuple[BlobRef, ...]:
    """Return the files of a path, each once."""
    return tuple({one.blob.blob: one.blob for one in steps}.values())


def size_bytes(path: tuple[Step, ...]) -> int:
    """Return what the files of a path take."""
    return sum(ref.size_bytes for ref in refs(path))
