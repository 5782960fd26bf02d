"""Whether this device and who speaks on the broker belong together: the fleet, and the coordinator's key.

`doctor` and the running agent say it in the same words. Pure.
"""

from collections.abc import Collection

from liberatai_core.contract.frame import claimed_key, key_id
from liberatai_core.errors import ConfigError, SignatureError
from liberatai_core.spelling import meant


def foreign_key(coordinator: str, frame: bytes, coordinator_key: bytes) -> str:
    """Return that a coordinator signs with another key than the pinned one; "" if it does not.

    Args:
        coordinator: its name, by the topic.
        frame: its presence.
        coordinator_key: the pinned key.
    """
    claimed = claimed_key(frame)
    if not claimed or claimed == key_id(coordinator_key):
        return ""
    return (
        f"coordinator {coordinator} signs with key {claimed.hex()}, coordinator_key in the settings is "
        f"{key_id(coordinator_key).hex()}: nothing it says is obeyed"
    )


FOREIGN_KEY_REMEDY = "copy coordinator_key from what `liberatai doctor` or `liberatai serve` shows there"


def unknown_fleet(fleet: str, others: Collection[str]) -> str:
    """Return that nobody speaks for this fleet on the broker.

    Args:
        fleet: that the settings name.
        others: fleets whose coordinators were heard.
    """
    text = f"no coordinator has ever spoken for fleet {fleet!r} on this broker"
    if others:
        text += f"; there is {', '.join(map(repr, sorted(others)))}{meant(fleet, others)}"
    return text


UNKNOWN_FLEET_REMEDY = "correct fleet: in the settings, or start the coordinator of that fleet"


class Belonging:
    """What a running agent has heard of coordinators since it connected.

    Args:
        fleet: its own.
        coordinator_key: the pinned key.

    Attributes:
        fault: (code, what is wrong and what to do); None: nothing is known to be.
    """

    def __init__(self, fleet: str, coordinator_key: bytes) -> None:
        self._fleet, self._key = fleet, coordinator_key
        self._believed = False
        self.fault: tuple[str, str] | None = None

    def believed(self) -> None:
        """Note that this fleet's coordinator has spoken, with the pinned key."""
        self._believed, self.fault = True, None

    def refused(self, topic: str, frame: bytes) -> None:
        """Note what was not believed: the presence of a coordinator with another key."""
        levels = topic.split("/")
        if self._believed or len(levels) != 6 or levels[3] != "co":
            return
        if words := foreign_key(levels[4], frame, self._key):
            self.fault = (SignatureError.code, f"{words}; {FOREIGN_KEY_REMEDY}")

    def silence(self) -> None:
        """Note that the connection stands for a while, and no coordinator was heard."""
        if not self._believed and self.fault is None:
            self.fault = (ConfigError.code, f"{unknown_fleet(self._fleet, ())}; {UNKNOWN_FLEET_REMEDY}")
