"""What devices of virtual time share."""

import asyncio
from typing import Protocol

from liberatai_coordinator.sim.virtual.blobs import Blobs
from liberatai_coordinator.sim.virtual.seen import Seen
from liberatai_core.contract.messages import TaskSpec
from liberatai_core.contract.topics import Topics
from liberatai_core.link.memory import MemoryBroker


class Surroundings(Protocol):
    """The loop, the broker, the content of files, and what is noted of devices."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop that everything runs on."""

    broker: MemoryBroker
    topics: Topics
    coordinator_key: bytes
    blobs: Blobs
    seen: Seen

    def macs(self, spec: TaskSpec) -> int:
        """Return the multiply-adds of a structure per sample."""
