"""The topic tree: direction first, so that two access rules per device suffice.

    lai/v1/<fleet>/up/<dev>/{state,caps,rep,have,tele,ev,rsp,x/<xid>/m,x/<xid>/<n>}
    lai/v1/<fleet>/dn/<dev>/{want,task,req,xa}
    lai/v1/<fleet>/pub/{head/<job>,b/<blob>/m,b/<blob>/<n>}
    lai/v1/<fleet>/co/<cid>/state
    lai/v1/<fleet>/prov/<who>/{csr,crt}

Builders and the parser live together; the parser refuses everything that no builder makes.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from liberatai_core.contract.limits import MAX_CHUNKS
from liberatai_core.errors import TopicError

ROOT = "lai/v1"
# Every pattern ends with \Z, because `$` lets a newline follow.
FLEET_OR_DEVICE = r"^[a-z0-9-]{1,32}\Z"
NAME = r"^[a-z0-9_-]{1,64}\Z"
BLOB = r"^[a-z2-7]{26}\Z"
"""First 26 characters of base32(SHA-256): 130 bits."""

_FLEET_OR_DEVICE = re.compile(FLEET_OR_DEVICE)
_NAME = re.compile(NAME)
_BLOB = re.compile(BLOB)
_INDEX = re.compile("^(0|[1-9][0-9]{0,3})$")
UP_LEAVES = frozenset({"state", "caps", "rep", "tele", "ev", "rsp", "have"})
DOWN_LEAVES = frozenset({"want", "task", "req", "xa"})

CLAIM_PREFIX = "claim-"
"""Of the names of claim credentials: no device may have such a name."""
_PROVISIONING_LEAVES = frozenset({"csr", "crt"})


def require_id(value: str, what: str = "id") -> str:
    """Return a fleet's or device's name, or raise TopicError."""
    if not _FLEET_OR_DEVICE.fullmatch(value):
        raise TopicError(f"{what}: must match {_shown(FLEET_OR_DEVICE)} (got {value[:64]!r})")
    return value


def require_name(value: str, what: str = "name") -> str:
    """Return the name of a job, model or group, or raise TopicError."""
    if not _NAME.fullmatch(value):
        raise TopicError(f"{what}: must match {_shown(NAME)} (got {value[:64]!r})")
    return value


def claim_name(device: str) -> str:
    """Return the name of the claim credential with which a device comes back after its certificate's end."""
    digest = hashlib.sha256(device.encode()).digest()
    return CLAIM_PREFIX + base64.b32encode(digest)[:20].decode().lower()


def blob_id(content: bytes) -> str:
    """Return the name of a blob: 26 characters of the base32 of its SHA-256, lower case."""
    return blob_id_of(hashlib.sha256(content).digest())


def blob_id_of(sha256: bytes) -> str:
    """Return the name of the blob with this SHA-256."""
    return base64.b32encode(sha256)[:26].decode().lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topics:
    """The topics of one fleet."""

    fleet: str

    def __post_init__(self) -> None:
        """Refuse a fleet that no topic can carry."""
        require_id(self.fleet, "fleet")

    def up(self, device: str, leaf: str) -> str:
        """Return a topic that only this device writes."""
        if leaf not in UP_LEAVES:
            raise TopicError(f"up/{leaf}: no such topic")
        return f"{ROOT}/{self.fleet}/up/{require_id(device, 'device')}/{leaf}"

    def upload(self, device: str, xid: str, part: int | None = None) -> str:
        """Return the topic of an upload's manifest (no part) or of one of its chunks."""
        return f"{ROOT}/{self.fleet}/up/{require_id(device, 'device')}/x/{_blob(xid)}/{_part_leaf(part)}"

    def down(self, device: str, leaf: str) -> str:
        """Return a topic that only this device reads."""
        if leaf not in DOWN_LEAVES:
            raise TopicError(f"dn/{leaf}: no such topic")
        return f"{ROOT}/{self.fleet}/dn/{require_id(device, 'device')}/{leaf}"

    def head(self, job: str) -> str:
        """Return the retained topic with a job's newest version."""
        return f"{ROOT}/{self.fleet}/pub/head/{require_name(job, 'job')}"

    def blob(self, blob: str, part: int | None = None) -> str:
        """Return the topic of a blob's manifest (no part) or of one of its chunks."""
        return f"{ROOT}/{self.fleet}/pub/b/{_blob(blob)}/{_part_leaf(part)}"

    def coordinator(self, coordinator: str) -> str:
        """Return the retained presence of a coordinator."""
        return f"{ROOT}/{self.fleet}/co/{require_id(coordinator, 'coordinator')}/state"

    def provisioning(self, who: str, leaf: str) -> str:
        """Return where a device or a claim asks for a certificate ("csr"), or hears the answer ("crt")."""
        if leaf not in _PROVISIONING_LEAVES:
            raise TopicError(f"prov/{leaf}: no such topic")
        return f"{ROOT}/{self.fleet}/prov/{require_id(who, 'claim')}/{leaf}"

    @property
    def requests(self) -> str:
        """Filter of everybody's requests for a certificate."""
        return f"{ROOT}/{self.fleet}/prov/+/csr"

    def test_word(self, side: Literal["up", "co"], name: str) -> str:
        """Return where a device or a coordinator may hear itself: nobody else listens there."""
        return f"{ROOT}/{self.fleet}/{side}/{require_id(name, 'name')}/test/word"

    @property
    def from_devices(self) -> tuple[str, ...]:
        """Filters of everything that devices say to the coordinator."""
        base = f"{ROOT}/{self.fleet}/up/+"
        return (f"{base}/+", f"{base}/x/+/+")

    def to_device(self, device: str) -> tuple[str, ...]:
        """Filters of everything that is said to one device, without bulk."""
        return (
            f"{ROOT}/{self.fleet}/dn/{require_id(device, 'device')}/+",
            f"{ROOT}/{self.fleet}/co/+/state",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a message came from.

    Attributes:
        side: "up", "dn", "pub", "co" or "prov".
        owner: the device, blob, job, coordinator or claim named by the topic.
        leaf: last fixed level: "state", "task", "x" (upload), "b" (blob), "head" …
        transfer: upload id for leaf "x".
        part: chunk number; None for a manifest.
    """

    side: str
    owner: str
    leaf: str
    transfer: str | None = None
    part: int | None = None


def parse(topic: str, fleet: str) -> Place:
    """Return what a topic of this fleet means.

    Raises:
        TopicError: another fleet, another version, or a form that no builder makes.
    """
    if len(topic) > 256:
        raise TopicError("longer than any topic of this protocol")
    head, _, rest = topic.partition(f"{ROOT}/{fleet}/")
    if head or not rest:
        raise TopicError(f"not a topic of fleet {fleet}: {topic[:80]!r}")
    match rest.split("/"):
        case ["up", device, leaf] if leaf in UP_LEAVES:
            return Place(side="up", owner=require_id(device), leaf=leaf)
        case ["up", device, "x", xid, part]:
            return Place(side="up", owner=require_id(device), leaf="x", transfer=_blob(xid), part=_part(part))
        case ["dn", device, leaf] if leaf in DOWN_LEAVES:
            return Place(side="dn", owner=require_id(device), leaf=leaf)
        case ["pub", "head", job]:
            return Place(side="pub", owner=require_name(job), leaf="head")
        case ["pub", "b", blob, part]:
            return Place(side="pub", owner=_blob(blob), leaf="b", part=_part(part))
        case ["prov", who, leaf] if leaf in _PROVISIONING_LEAVES:
            return Place(side="prov", owner=require_id(who), leaf=leaf)
        case ["co", coordinator, "state"]:
            return Place(side="co", owner=require_id(coordinator), leaf="state")
        case _:
            raise TopicError(f"unknown topic: {topic[:80]!r}")


def _shown(pattern: str) -> str:
    return pattern.replace(r"\Z", "$")


def _blob(value: str) -> str:
    if not _BLOB.fullmatch(value):
        raise TopicError(f"blob or transfer id: must match {_shown(BLOB)} (got {value[:64]!r})")
    return value


def _part_leaf(part: int | None) -> str:
    if part is None:
        return "m"
    if not 0 <= part < MAX_CHUNKS:
        raise TopicError(f"chunk number: 0 to {MAX_CHUNKS - 1} (got {part})")
    return str(part)


def _part(value: str) -> int | None:
    if value == "m":
        return None
    if not _INDEX.fullmatch(value) or int(value) >= MAX_CHUNKS:
        raise TopicError(f"chunk number: 0 to {MAX_CHUNKS - 1} (got {value[:16]!r})")
    return int(value)
