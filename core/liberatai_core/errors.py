"""Every error of LiberatAI: one tree, each fault with a stable code.

The base is never raised itself. A code is part of the contract: it travels in receipts, stands in
logs and counters, and never changes its meaning.
"""

from typing import ClassVar


class LiberataiError(Exception):
    """Base of all errors; `code` is stable, the text says what, where and what to do."""

    code: ClassVar[str] = "E_INTERNAL"

    def __init__(self, message: str) -> None:
        if type(self) is LiberataiError:
            raise TypeError("LiberataiError is a base: raise one of its subclasses")
        super().__init__(message)


# --- bytes that crossed the broker -------------------------------------------------------------


class TooLargeError(LiberataiError, ValueError):
    """Something is longer than its kind allows."""

    code = "E_SIZE"


class FrameError(LiberataiError, ValueError):
    """The bytes are no frame: wrong magic, unknown kind, too short."""

    code = "E_FRAME"


class SignatureError(LiberataiError, ValueError):
    """The signature does not belong to these bytes, this kind or this fleet."""

    code = "E_SIG"


class UnknownDeviceError(LiberataiError):
    """No enrolled device has this key."""

    code = "E_UNKNOWN_DEVICE"


class RevokedError(LiberataiError):
    """The device is known and shut out."""

    code = "E_REVOKED"


class RoleError(LiberataiError):
    """Whoever asks may not do this: it needs another role."""

    code = "E_ROLE"


class TokenError(LiberataiError):
    """An invitation that nobody made, that is used up, or that was made elsewhere."""

    code = "E_TOKEN"


class CertificateError(LiberataiError, ValueError):
    """A certificate, or a request for one, is not what it must be: name, key, signature, authority."""

    code = "E_CERT"


class ExpiredError(LiberataiError):
    """The time of a certificate, an invitation or a grace period is over."""

    code = "E_EXPIRED"


class TopicError(LiberataiError, ValueError):
    """The topic is malformed, or belongs to somebody else than the signer."""

    code = "E_TOPIC"


class SchemaError(LiberataiError, ValueError):
    """The body is not the message that its kind promises."""

    code = "E_SCHEMA"


class ProtocolVersionError(LiberataiError, ValueError):
    """The other side speaks a version that this side does not."""

    code = "E_VERSION"


class ReplayError(LiberataiError):
    """The message was valid once, in an older session."""

    code = "E_REPLAY"


class DuplicateError(LiberataiError):
    """The same update is stored already: a success for the sender."""

    code = "E_DUP"


class DuplicateConflictError(LiberataiError):
    """Another update of this device is stored for this round: the first one counts."""

    code = "E_DUP_CONFLICT"


class RoundUnknownError(LiberataiError):
    """No such job or round, or the device was not invited."""

    code = "E_ROUND_UNKNOWN"


class RoundClosedError(LiberataiError):
    """The round has ended: the update came too late."""

    code = "E_ROUND_CLOSED"


class BaseModelError(LiberataiError):
    """The update is a difference against other weights than the round's."""

    code = "E_BASE_MODEL"


class BaseMissingError(LiberataiError):
    """The device does not hold the weights that a task goes on from: it needs the whole path."""

    code = "E_BASE"


class TierError(LiberataiError):
    """The device may not do what it tried in its tier."""

    code = "E_TIER"


class IndexRangeError(LiberataiError, ValueError):
    """A position lies outside the structure."""

    code = "E_INDEX_RANGE"


class IndexOrderError(LiberataiError, ValueError):
    """Positions are unsorted or doubled."""

    code = "E_INDEX_ORDER"


class NonFiniteError(LiberataiError, ValueError):
    """A value is NaN or infinite."""

    code = "E_NONFINITE"


class NormError(LiberataiError, ValueError):
    """The update is larger than the job allows."""

    code = "E_NORM"


class CodecError(LiberataiError, ValueError):
    """Unknown codec, or a bit stream that it cannot have written."""

    code = "E_CODEC"


class BombError(LiberataiError, ValueError):
    """The stream promises more than its structure can hold."""

    code = "E_BOMB"


class QuotaError(LiberataiError):
    """The device has used up what it may send or store."""

    code = "E_QUOTA"


class BusyError(LiberataiError):
    """Too much at once: try again later."""

    code = "E_BUSY"


class DigestError(LiberataiError, ValueError):
    """Content does not have the digest that names it."""

    code = "E_DIGEST"


# --- machines, files, settings -----------------------------------------------------------------


class DiskError(LiberataiError):
    """The disk is full or refuses to write."""

    code = "E_DISK"


class ConfigError(LiberataiError, ValueError):
    """Settings are wrong; `faults` has one line for each of them."""

    code = "E_CONFIG"

    def __init__(self, where: str, faults: list[str]) -> None:
        self.where, self.faults = where, list(faults)
        super().__init__("\n".join(f"{where}: {fault}" for fault in self.faults))


class DataError(LiberataiError, ValueError):
    """The training data is missing, empty or not of the job's form."""

    code = "E_DATA"


class BudgetError(LiberataiError, ValueError):
    """The byte budget is smaller than the smallest possible file."""

    code = "E_BUDGET"


class StructureError(LiberataiError, ValueError):
    """Unknown family, wrong parameters, or weights of another structure."""

    code = "E_STRUCTURE"


class UnsafeFileError(LiberataiError, ValueError):
    """A file that could run code, or that reaches outside of itself, is no model."""

    code = "E_UNSAFE"


class RegistryError(LiberataiError):
    """A registry is out of reach, or refuses."""

    code = "E_REGISTRY"


class LinkError(LiberataiError):
    """The broker is out of reach or refuses."""

    code = "E_LINK"


class BrokerRefusedError(LinkError):
    """The broker does not do what was asked: no right to publish or to subscribe there."""

    code = "E_BROKER"


class LockedError(LiberataiError):
    """Another process already uses this state folder."""

    code = "E_LOCKED"


class ReplacedError(LiberataiError):
    """Another one took this program's place on purpose: it must not run."""

    code = "E_REPLACED"


class StateError(LiberataiError):
    """Not possible in the state that the thing is in now."""

    code = "E_STATE"


class DamagedError(LiberataiError):
    """A file of the program's own is not what was written."""

    code = "E_DAMAGED"


class NotFoundError(LiberataiError, LookupError):
    """Nothing has this name."""

    code = "E_NOT_FOUND"


class TrainingError(LiberataiError):
    """Training failed, ran out of time or was stopped."""

    code = "E_TRAIN"


class MemoryLimitError(LiberataiError):
    """The task needs more memory than this device gives to a training: a smaller structure may fit."""

    code = "E_MEMORY"


class TaskLimitError(LiberataiError):
    """The task asks for more work than this device does for one training."""

    code = "E_LIMIT"


class MissingExtraError(LiberataiError, ImportError):
    """A part that is not installed is needed; the text names the extra."""

    code = "E_EXTRA"


def _tree(base: type[LiberataiError]) -> dict[str, type[LiberataiError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[LiberataiError]] = _tree(LiberataiError)
