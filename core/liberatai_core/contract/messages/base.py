"""What all messages have in common: closed, frozen, typed, bounded; and the types of their fields."""

import math
from functools import cache
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.topics import BLOB, FLEET_OR_DEVICE, NAME
from liberatai_core.errors import NonFiniteError

DeviceId = Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]
Name = Annotated[str, Meta(pattern=NAME)]
BlobId = Annotated[str, Meta(pattern=BLOB)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
WeightsName = Annotated[bytes, Meta(min_length=limits.DIGEST_BYTES, max_length=limits.DIGEST_BYTES)]
UpdateId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Round = Annotated[int, Meta(ge=1, le=limits.MAX_ROUND)]
Version = Annotated[int, Meta(ge=0, le=limits.MAX_ROUND)]
Sums = tuple[
    Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)], Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)]
]
Counter = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=limits.MAX_SECONDS)]
Text = Annotated[str, Meta(max_length=limits.MAX_TEXT)]
Fraction = Annotated[float, Meta(gt=0, le=1)]


class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """Base of all messages: closed (unknown keys are refused), frozen, and without NaN or infinity.

    Nothing frozen can be part of a cycle, so the garbage collector need not look at messages: a coordinator
    holds some for every device.

    A field that has its default value is never written (of an array: at its end): a field that a later
    release adds disturbs an older reader only where somebody uses it.
    """

    def __post_init__(self) -> None:
        """Refuse numbers that no comparison bounds (NaN passes every `ge` and `le`).

        Values equal to their default become the default itself: the encoder leaves out what *is* the
        default, not what equals it, and a message must have one encoding only.
        """
        defaults, floats = _looks(type(self))
        for name, default in defaults:
            value = getattr(self, name)
            if value is not default and type(value) is type(default) and value == default:
                msgspec.structs.force_setattr(self, name, default)
        for name in floats:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteError(f"{name}: must be finite")


@cache
def _looks(kind: type[Message]) -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """Return the fields of a message that its `__post_init__` must look at: found once, not for each message.

    Returns:
        Fields with a default that another object may equal (there is one None, one True, one empty text and
        one 0 only), with this default; and fields that hold floats.
    """
    fields = msgspec.structs.fields(kind)
    alone = (None, "", b"", ())
    defaults = [
        (one.name, one.default)
        for one in fields
        if one.default is not msgspec.NODEFAULT
        and not any(one.default is single for single in alone)
        and not (isinstance(one.default, int) and -5 <= one.default <= 256)
    ]
    return tuple(defaults), tuple(one.name for one in fields if _holds_float(one.type))


def _holds_float(kind: Any) -> bool:
    return kind is float or any(_holds_float(part) for part in get_args(kind))
