"""Keys that are not those of the devices: refused for good, or knocking with another's name. Pure."""

from dataclasses import dataclass, field

from liberatai_core.contract.frame import key_id
from liberatai_core.errors import RevokedError

MAX_KNOCKS = 1000
"""Names whose knocking keys are kept: whoever gets past the broker may knock for every name there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knock:
    """Another key that introduces itself with the name of a known device: a new card, or somebody else.

    Attributes:
        public_key: the newest one.
        session: of its introduction.
        first_s, last_s: Unix seconds of its first and last word.
        times: that it was heard.
    """

    public_key: bytes
    session: int
    first_s: float
    last_s: float
    times: int = 1


def knock(knocks: dict[str, Knock], name: str, public_key: bytes, session: int, wall_s: float) -> bool:
    """Note that another key asks for the name of a known device.

    Args:
        knocks: by the name that they ask for; too many are not kept.
        name: of the device.
        public_key: that asks.
        session: of its introduction; 0: it was invited, and asks for a certificate.
        wall_s: Unix seconds.

    Returns:
        Whether it is the first time.
    """
    before = knocks.get(name)
    if before is None and len(knocks) >= MAX_KNOCKS:
        return False
    same = before is not None and before.public_key == public_key
    knocks[name] = Knock(
        public_key=public_key,
        session=session,
        first_s=before.first_s if before is not None and same else wall_s,
        last_s=wall_s,
        times=before.times + 1 if before is not None and same else 1,
    )
    return knocks[name].times == 1


@dataclass(slots=True)
class BuriedKeys:
    """Keys that are refused for good.

    Attributes:
        owners: whose they were, by key.
    """

    owners: dict[bytes, str] = field(default_factory=dict)
    _by_id: dict[bytes, bytes] = field(default_factory=dict)

    def bury(self, public_key: bytes, device: str) -> None:
        """Refuse a key for good."""
        self.owners[public_key] = device
        self._by_id[key_id(public_key)] = public_key

    def dig_up(self, public_key: bytes) -> None:
        """Refuse a key no more, if it was."""
        self.owners.pop(public_key, None)
        self._by_id.pop(key_id(public_key), None)

    def get(self, wanted: bytes) -> bytes | None:
        """Return the buried key with this key id, or None."""
        return self._by_id.get(wanted)

    def require_alive(self, public_key: bytes) -> None:
        """Refuse a key that was buried.

        Raises:
            RevokedError: it was.
        """
        if public_key in self.owners:
            raise RevokedError(f"the key of {self.owners[public_key]} is refused for good")
