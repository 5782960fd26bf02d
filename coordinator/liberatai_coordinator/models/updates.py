"""What an update of a device says, and whether it can mean anything."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models.members import trained_structure
from liberatai_core.aggregator.packed import Packed, Positions, without_zeros
from liberatai_core.contract.frame import HEADER_BYTES
from liberatai_core.contract.messages import Update, work_seed
from liberatai_core.errors import CodecError, LiberataiError, NormError, SchemaError
from liberatai_core.sparsifier import methods
from liberatai_core.sparsifier.codec import Entries
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector

LARGEST = 1e3
"""No training moves a parameter so far in one round; beyond it float32 sums lose what others sent."""


KEPT_BYTES = 64 << 20
"""Decoded updates of an open round that are kept for its aggregation; the others are decoded again."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What an update's bytes say, so that they need not be read again.

    Attributes:
        content: digest of the structure's name and the bytes that it was read from, 16 bytes.
        packed: the difference of the structure's trained part, without zeros.
    """

    content: bytes
    packed: Packed

    @property
    def nbytes(self) -> int:
        """Memory of positions and values."""
        positions = self.packed.positions
        return self.packed.values.nbytes + (0 if positions is None else positions.nbytes)

    def tells(self, update: Update, part: Structure) -> bool:
        """Whether it was read from this update: an id names the work, not the bytes that came of it."""
        return self.packed.parameters == part.parameters and self.content == _content(update)


class Kept(Mapping[bytes, Decoded]):
    """Decoded updates of one open round by update id, in bounded memory."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        """Keep at most `limit` bytes of positions and values."""
        self.limit, self.nbytes = limit, 0
        self._by_id: dict[bytes, Decoded] = {}

    def keep(self, update_id: bytes, decoded: Decoded) -> bool:
        """Keep one, in place of an older one of the same id; False if there is no room for it."""
        self.drop(update_id)
        if self.nbytes + decoded.nbytes > self.limit:
            return False
        self._by_id[update_id] = decoded
        self.nbytes += decoded.nbytes
        return True

    def drop(self, update_id: bytes) -> None:
        """Forget one, if it is there."""
        if (old := self._by_id.pop(update_id, None)) is not None:
            self.nbytes -= old.nbytes

    def clear(self) -> None:
        """Forget all of them: the round is over."""
        self._by_id.clear()
        self.nbytes = 0

    def __getitem__(self, update_id: bytes) -> Decoded:
        """Return what was kept of an update."""
        return self._by_id[update_id]

    def __iter__(self) -> Iterator[bytes]:
        """Yield the ids in the order in which they came."""
        return iter(self._by_id)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._by_id)


def decode_update(frame: bytes) -> Update:
    """Return the update in a frame that was verified before it was stored."""
    return msgspec.msgpack.decode(frame[HEADER_BYTES:], type=Update)


def changes(job: JobSpec, update: Update, part: Structure) -> tuple[NDArray[np.int64], Vector]:
    """Return what an update changes in the trained part of its structure: positions (increasing) and values.

    Raises:
        LiberataiError: for every stream that no device writes.
    """
    methods.require_stream(job.sparsify.method, update.body)
    return methods.entries(update.body, part, _seed(job, update))


def difference(job: JobSpec, update: Update, part: Structure) -> Vector:
    """Return the same as a vector, shape (part.parameters,).

    Raises:
        LiberataiError: for every stream that no device writes.
    """
    dense = np.zeros(part.parameters, np.float32)
    positions, values = changes(job, update, part)
    dense[positions] = values
    return dense


def packed(job: JobSpec, update: Update, part: Structure, decoded: Decoded | None = None) -> Packed:
    """Return the same without its zeros.

    Args:
        job: settings.
        update: the update.
        part: the trained part of its structure.
        decoded: what `check_update` returned for it, if that was kept; the bytes are then not read again.

    Raises:
        LiberataiError: for every stream that no device writes.
    """
    if decoded is not None and decoded.tells(update, part):
        return decoded.packed
    return _packed(part, *changes(job, update, part))


def check_update(update: Update, structure: Structure, job: JobSpec) -> Decoded:
    """Refuse an update that means nothing in its structure; return what it means.

    Raises:
        CodecError: another method than the task's, or a stream that it does not make.
        LiberataiError: whatever the decoder refuses (positions, counts, values).
        NormError: a parameter changes by more than `LARGEST`.
        SchemaError: class counts of another number of classes, or more than the samples.
    """
    (found,) = check_updates([(update, structure, job)])
    if isinstance(found, LiberataiError):
        raise found
    return found


def check_updates(
    asked: Sequence[tuple[Update, Structure, JobSpec]],
) -> list[Decoded | LiberataiError]:
    """Return for each (update, structure, job) what `check_update` returns or raises.

    No update depends on another. Sixty together take a quarter of the time that they take one by one, and a
    tenth where signs are modelled (`benchmarks/update_path.py`). Memory: 8 bytes per parameter of its trained
    part for each of them at most, so a caller with large parts asks for fewer at a time.
    """
    found: list[Decoded | LiberataiError | Structure] = [_part_of(*one) for one in asked]
    read = [(place, part) for place, part in enumerate(found) if isinstance(part, Structure)]
    bodies = [(asked[place][0].body, part, _seed(asked[place][2], asked[place][0])) for place, part in read]
    for (place, part), entries in zip(read, methods.entries_all(bodies), strict=True):
        update, _, job = asked[place]
        found[place] = (
            entries if isinstance(entries, LiberataiError) else _meaning(update, job, part, entries)
        )
    return [one for one in found if not isinstance(one, Structure)]


def _part_of(update: Update, structure: Structure, job: JobSpec) -> Structure | LiberataiError:
    """Return the structure that an update's body is about, or why it is not worth decoding."""
    if update.codec != job.sparsify.method:
        return CodecError(f"made by {update.codec}, the task named {job.sparsify.method}")
    try:
        methods.require_stream(job.sparsify.method, update.body)
    except CodecError as error:
        return error.with_traceback(None)
    return trained_structure(job, structure)


def _meaning(update: Update, job: JobSpec, part: Structure, entries: Entries) -> Decoded | LiberataiError:
    positions, values = entries
    if values.size and max(values.max(), -values.min()) > LARGEST:
        return NormError(f"a parameter changes by more than {LARGEST:g}")
    counts = update.class_counts
    if counts is not None and len(counts) != job.data.classes:
        return SchemaError(f"{len(counts)} class counts, the job has {job.data.classes} classes")
    if counts is not None and sum(counts) > update.samples:
        return SchemaError(f"class counts of {sum(counts)} samples, the update has {update.samples}")
    if update.evaluation is not None and update.evaluation[0] > update.evaluation[1]:
        return SchemaError("more correct answers than questions")
    return Decoded(_content(update), _packed(part, positions, values))


def _seed(job: JobSpec, update: Update) -> int:
    return work_seed(job.seed, update.device, update.job, update.round)


def _content(update: Update) -> bytes:
    head = update.structure.encode() + b"\0"
    return hashlib.sha256(head + update.body).digest()[:16]


def _packed(part: Structure, positions: Positions, values: Vector) -> Packed:
    """Return what a decoder gave: it has checked that positions increase and lie in the part."""
    if positions.size == part.parameters:
        return Packed(part.parameters, None, values)
    return without_zeros(Packed(part.parameters, positions.astype(np.int32, copy=False), values))
