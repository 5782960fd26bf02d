"""How a device gets from the weights that it holds to the newest ones, for the fewest bytes. Pure.

With few participants per round a device misses several versions between two of its own rounds. Whatever way
it takes, it ends at the same weights, bit for bit; only the files differ:

    what it holds ── merged delta ─────────────────▶ newest
    what it holds ── single deltas, one by one ────▶ newest
    its keyframe  ── merged delta from there ──────▶ newest      (drops what lay between)
    nothing       ── keyframe, merged delta ───────▶ newest

A merged delta is the exact difference of two versions (`sparsifier.merge`), usually one file, at most three:
coordinates that moved to and fro are not paid for. The files of a way stay on the device, because only
compressed files are kept there: they must fit its storage, which is why a long path is now and then shortened
to its keyframe.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from liberatai_core.contract.messages import Step

FILE_BYTES = 170
"""What a file costs beside its content: subscription, topic, acknowledgements, the step in the task."""
MAX_FILES = 64
"""A device reads its whole path when it starts anew: each file is a pass over all parameters."""

Path = tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What a task tells a device, and where it stands afterwards.

    Attributes:
        held: name of weights on the device's path that `steps` go on from; empty: from nothing.
        steps: what it must fetch.
        path: all its files afterwards, in order.
    """

    held: bytes
    steps: Path
    path: Path

    @property
    def size_bytes(self) -> int:
        """Content that the device fetches."""
        return sum(step.blob.size_bytes for step in self.steps)


def size_of(path: Sequence[Step]) -> int:
    """Return what the files of a path take on disk, in bytes."""
    return sum({step.blob.blob: step.blob.size_bytes for step in path}.values())


def choose(
    path: Path,
    newest: Path,
    *,
    merged: Sequence[Step] | None = None,
    singles: Sequence[Step] | None = None,
    storage_bytes: int = 0,
) -> Way:
    """Return the cheapest way to the weights at the end of `newest`.

    Args:
        path: what the device surely holds; empty: nothing.
        newest: keyframe and what leads from there, for a device that holds nothing.
        merged: from the end of `path` to the newest weights, None if there is no such delta.
        singles: the same, version by version; None if a keyframe lies between.
        storage_bytes: what the files may take on this device; 0: no limit.
    """
    afresh = Way(held=b"", steps=newest, path=newest)
    if not path:
        return afresh
    if path[-1].digest == newest[-1].digest:
        return Way(held=path[-1].digest, steps=(), path=path)
    ways = [_onward(path, tuple(steps)) for steps in (merged, singles) if steps]
    if path[0] == newest[0] and len(newest) > 1:
        ways.append(_onward(path[:1], newest[1:]))
    # A path as short as the newest one is never too long: starting afresh would not be shorter.
    files = max(MAX_FILES, len(newest))
    fitting = [
        way
        for way in ways
        if len(way.path) <= files
        and (not storage_bytes or size_of(way.path) <= storage_bytes)
        and way.path[-1].digest == newest[-1].digest
    ]
    return min((*fitting, afresh), key=_cost)


def _onward(path: Path, steps: Path) -> Way:
    return Way(held=path[-1].digest, steps=steps, path=(*path, *steps))


def _cost(way: Way) -> int:
    return way.size_bytes + FILE_BYTES * len(way.steps)
