"""What the broker refuses, in words: kept for whoever asks, and said once in the log."""

import logging
from dataclasses import dataclass, field
from typing import Final

from liberatai_core.link.link import Refused

log: Final = logging.getLogger(__name__)

MAX_REFUSALS: Final = 32
"""Refusals that are kept and logged: every blob and device has topics of its own."""


@dataclass(slots=True)
class BrokerRefusals:
    """What the broker of now refuses.

    Attributes:
        lines: a line for people, by kind and topic.
    """

    lines: dict[tuple[str, str], str] = field(default_factory=dict)
    _said: set[tuple[str, str]] = field(default_factory=set)

    def heard(self, event: Refused) -> None:
        """Say once in words what the broker does not do."""
        kind = event.what, event.topic
        line = f"{'E_SIZE' if event.what == 'size' else 'E_BROKER'}: {event.words}"
        if kind not in self._said and len(self._said) < MAX_REFUSALS:
            self._said.add(kind)
            log.warning("%s", line)
        if len(self.lines) < MAX_REFUSALS:
            self.lines[kind] = line
