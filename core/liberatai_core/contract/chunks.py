"""Cut an object into chunks and join them again: both ends, pure, resumable.

Bits of a bitmap are chunk numbers, least significant bit of the first byte first.
"""

import hashlib
from dataclasses import dataclass, field

from liberatai_core.contract.limits import MAX_CHUNKS, MAX_OBJECT_BYTES
from liberatai_core.errors import DigestError, SchemaError, TooLargeError


def count(size_bytes: int, chunk_bytes: int) -> int:
    """Return how many chunks an object has.

    Raises:
        TooLargeError: more than MAX_CHUNKS, empty, or larger than MAX_OBJECT_BYTES.
        SchemaError: chunks without content.
    """
    if chunk_bytes < 1:
        raise SchemaError(f"chunks of {chunk_bytes} bytes")
    if not 0 < size_bytes <= MAX_OBJECT_BYTES:
        raise TooLargeError(f"object of {size_bytes} bytes, 1 to {MAX_OBJECT_BYTES}")
    chunks = -(-size_bytes // chunk_bytes)
    if chunks > MAX_CHUNKS:
        raise TooLargeError(f"{chunks} chunks, at most {MAX_CHUNKS}")
    return chunks


def cut(content: bytes, number: int, chunk_bytes: int) -> bytes:
    """Return chunk `number` of an object."""
    if not 0 <= number < count(len(content), chunk_bytes):
        raise SchemaError(f"chunk {number}: no such chunk")
    return content[number * chunk_bytes : (number + 1) * chunk_bytes]


@dataclass(slots=True)
class Assembly:
    """An object that arrives in chunks, in any order, some of them twice.

    Memory grows with what has arrived, never with what was promised.
    """

    size_bytes: int
    chunk_bytes: int
    sha256: bytes
    parts: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse sizes beyond the limits."""
        count(self.size_bytes, self.chunk_bytes)

    @property
    def chunks(self) -> int:
        """Number of chunks of the whole object."""
        return count(self.size_bytes, self.chunk_bytes)

    def add(self, number: int, data: bytes) -> bool:
        """Take one chunk; True if it was new.

        Raises:
            SchemaError: no such chunk, or not of the length that this chunk must have.
        """
        if not 0 <= number < self.chunks:
            raise SchemaError(f"chunk {number}: the object has {self.chunks}")
        wanted = min(self.chunk_bytes, self.size_bytes - number * self.chunk_bytes)
        if len(data) != wanted:
            raise SchemaError(f"chunk {number}: {len(data)} bytes, wanted {wanted}")
        new = number not in self.parts
        self.parts.setdefault(number, data)
        return new

    @property
    def complete(self) -> bool:
        """Whether every chunk is there (content still unchecked)."""
        return len(self.parts) == self.chunks

    def bitmap(self) -> bytes:
        """Return one bit per chunk that is there."""
        bits = bytearray(-(-self.chunks // 8))
        for number in self.parts:
            bits[number // 8] |= 1 << (number % 8)
        return bytes(bits)

    def join(self) -> bytes:
        """Return the content.

        Raises:
            SchemaError: a chunk is missing.
            DigestError: the content is not what the manifest promised; all chunks are dropped.
        """
        if not self.complete:
            raise SchemaError(f"{self.chunks - len(self.parts)} of {self.chunks} chunks are missing")
        content = b"".join(self.parts[number] for number in range(self.chunks))
        if hashlib.sha256(content).digest() != self.sha256:
            self.parts.clear()
            raise DigestError("joined chunks do not have the promised SHA-256")
        return content


def missing(bitmap: bytes, chunks: int) -> list[int]:
    """Return the numbers of the chunks whose bit is not set, in order."""
    have = {n for n in range(min(chunks, len(bitmap) * 8)) if bitmap[n // 8] >> (n % 8) & 1}
    return [number for number in range(chunks) if number not in have]
