"""Numbers of variable length, and a cursor that reads them from bytes of anywhere. Pure.

Seven bits per byte, low bits first, at most five bytes, in the one shortest form.
"""

from typing import ClassVar

from liberatai_core.errors import CodecError


def varint(value: int) -> bytes:
    """Return a number with 7 bits per byte, low bits first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Cursor:
    """Reads bytes in order; what is missing is refused before anything is allocated.

    Attributes:
        what: what is read, for the text of errors.
    """

    what: ClassVar[str] = "content"

    def __init__(self, data: bytes) -> None:
        """Start at the first byte."""
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes.

        Raises:
            CodecError: there are fewer.
        """
        if size > len(self.data) - self.at:
            raise CodecError(f"{self.what}: truncated")
        self.at += size
        return self.data[self.at - size : self.at]

    def byte(self) -> int:
        """Return the next byte.

        Raises:
            CodecError: there is none.
        """
        if self.at == len(self.data):
            raise CodecError(f"{self.what}: truncated")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        """Return the next number of at most 35 bits.

        Raises:
            CodecError: it is truncated, padded or longer.
        """
        if self.at < len(self.data) and self.data[self.at] < 0x80:  # most are this short
            return self.byte()
        value = 0
        for place in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << place
            if byte < 0x80:
                if byte == 0 and place:
                    raise CodecError(f"{self.what}: padded number")
                return value
        raise CodecError(f"{self.what}: number too long")

    def end(self) -> None:
        """Raise CodecError unless everything was read."""
        if self.at != len(self.data):
            raise CodecError(f"{self.what}: trailing bytes")
