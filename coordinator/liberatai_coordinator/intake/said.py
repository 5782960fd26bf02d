"""What the log says of devices: a line when one comes, goes, is let in or shut out; of many at once a sum."""

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from liberatai_coordinator.fleet.devices import Device
from liberatai_core.units import count_text

log: Final = logging.getLogger("liberatai_coordinator.devices")

MANY: Final = 20
"""Devices that change together and still have a line each: ten thousand after a restart must not."""


@dataclass(slots=True)
class Devices:
    """Remembers what was said of each device last."""

    _said: dict[str, tuple[str, str]] = field(default_factory=dict)

    def changed(self, devices: Collection[Device], shown: Callable[[Device], tuple[str, str]]) -> None:
        """Say what is new.

        Args:
            devices: that something has changed of.
            shown: returns a device's state, and what is odd about it.
        """
        news = []
        for device in devices:
            if device.status == "pending":
                continue  # strangers come and go; that they wait is said where they are heard first
            state, odd = shown(device)
            now = (device.status, state)
            before = self._said.get(device.id)
            if now == before or (before is None and state == "unknown" and device.status == "approved"):
                continue
            self._said[device.id] = now
            news.append((device, before, odd))
        if len(news) > MANY:
            states = Counter(self._said[device.id][1] for device, _, _ in news)
            told = ", ".join(f"{count_text(number)} {state}" for state, number in sorted(states.items()))
            log.info("%s devices changed: %s", count_text(len(news)), told)
            return
        for device, before, odd in news:
            self._say(device, before, odd)

    def _say(self, device: Device, before: tuple[str, str] | None, odd: str) -> None:
        status, state = self._said[device.id]
        words = [] if before is not None and before[1] == state else [state]
        if before is None or before[0] != status:
            words.insert(0, status)
        caps = device.capability
        if state == "online" and caps is not None and before is None:
            words.append(f"tier {caps.tier}, agent {caps.agent_version}")
        reason = device.reason or odd
        told = ", ".join(words) + (f" ({reason})" if reason else "")
        log.info(
            "device %s: %s", device.id, told, extra={"device": device.id, "state": state, "status": status}
        )
