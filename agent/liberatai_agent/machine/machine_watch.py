"""Looks at the machine now and then: may it train, what are its limits, has the data changed.

While work is in hand the gate is looked at every few seconds. An idle agent looks once a minute, and at once
when something begins.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from liberatai_agent.config import AgentConfig
from liberatai_agent.events import GateChanged, MachineChanged, QuotaChanged
from liberatai_agent.exchange.link_meter import LinkMeter
from liberatai_agent.machine import gate, probe
from liberatai_agent.machine.clock import now_s
from liberatai_agent.machine.pausing import paused
from liberatai_agent.membership.identity import Identity
from liberatai_agent.session.fits import Limits, limits_of
from liberatai_agent.windows import open_at
from liberatai_core.contract.messages import Capability, Telemetry
from liberatai_core.errors import BusyError
from liberatai_core.profile import Profile

BUSY_S = 5.0
"""Between two looks at load, heat and battery while a task is in hand."""
MACHINE_S = 60.0
"""Between two looks at limits and the data file, and at everything while nothing is to be done."""
BUILT_IN = 2026
"""A clock that stands before this year was never set: a board without a battery begins in 1970."""


PAUSED = "the fleet has paused this device: `liberatai shadow show` says why"


@dataclass(frozen=True, slots=True)
class Watched:
    """What the watch asks about the rest of the agent.

    Attributes:
        trainer: process id of the training process while it runs.
        is_busy: whether a task is in hand.
        is_training: whether a training runs.
        held_bytes: what files of models take.
    """

    trainer: Callable[[], int | None]
    is_busy: Callable[[], bool]
    is_training: Callable[[], bool]
    held_bytes: Callable[[], int]


class MachineWatch:
    """Watches for one device.

    Args:
        config: settings.
        profile: the hardware class, if one is set.
        identity: signs, and numbers the start.
        meter: knows the link.
        watched: the rest of the agent.
        happened: told what changed.

    Attributes:
        found: what the child process found, None until it has looked.
        capability: of the last look, None until the first.
    """

    def __init__(
        self,
        config: AgentConfig,
        profile: Profile | None,
        identity: Identity,
        meter: LinkMeter,
        watched: Watched,
        happened: Callable[[GateChanged | MachineChanged | QuotaChanged], None],
    ) -> None:
        self._config, self._profile, self._identity = config, profile, identity
        self._meter, self._watched, self._happened = meter, watched, happened
        self._load = probe.LoadMeter()
        self._gate = gate.Gate()
        self._paused = False
        self._quota = ""
        self._look = asyncio.Event()
        self._looked = asyncio.Event()
        self._data_mark: tuple[str, int, int] | None = None
        self.found: probe.Bench | None = None
        self.capability: Capability | None = None

    def configure(self, config: AgentConfig, *, paused: bool) -> None:
        """Go by other settings from now on; `paused`: by wish of the fleet nothing is trained."""
        self._config, self._paused = config, paused
        self._meter.quota_bytes = config.link.quota_bytes
        self._look.set()

    def look_soon(self) -> None:
        """Look at the gate before long: something begins."""
        self._look.set()

    async def looked(self) -> None:
        """Wait until the machine, and what its people want, was looked at once more."""
        self._looked.clear()
        await self._looked.wait()

    async def first_look(self) -> None:
        """Find out what the machine can do; nothing is told yet."""
        await self._bench()

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            self.look_at_gate()
            began = now_s()
            await self.look_at_machine()
            while now_s() < began + MACHINE_S:
                await self._pause(began + MACHINE_S - now_s())
                self.look_at_gate()

    async def _pause(self, longest_s: float) -> None:
        pause_s = min(longest_s, BUSY_S) if self._watched.is_busy() else longest_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.05, pause_s)):
                await self._look.wait()
        self._look.clear()

    def look_at_gate(self) -> None:
        """Notice whether training is allowed, and what is left of the day's quota."""
        rules = self._config.gate
        load = self._load.others(self._pids()) if rules.max_load_others is not None else None
        own = sum(probe.rss(pid) or 0 for pid in self._pids() if pid != os.getpid())
        seen = snapshot(
            self._config,
            load,
            own_memory_bytes=own,
            training=self._watched.is_training(),
            metered=probe.is_metered(self._config, self._profile),
        )
        before, self._gate = self._gate, gate.decide(seen, rules, self._gate, now_s())
        if self._paused:
            self._gate = replace(self._gate, open=False, reason=PAUSED)
        now = self._gate
        if (before.open, before.reason, before.resting) != (now.open, now.reason, now.resting):
            self._happened(GateChanged(open=now.open, reason=now.reason, resting=now.resting))
        self._looked.set()
        self._meter.count()
        quota = self._meter.quota_bytes
        words = gate.quota_words(self._meter.day_bytes, quota) if quota and self._meter.spent else ""
        if bool(words) != bool(self._quota):
            self._quota = words
            self._happened(QuotaChanged(words=words))
            self._tell()

    def _pids(self) -> tuple[int, ...]:
        return tuple(pid for pid in (os.getpid(), self._watched.trainer()) if pid is not None)

    async def look_at_machine(self) -> None:
        """Notice new limits and new data."""
        await self._bench()
        self._tell()

    def limits(self, deadline_s: float) -> Limits:
        """Return what a training with this deadline may take.

        Raises:
            BusyError: the machine was not looked at yet.
        """
        if self.capability is None:
            raise BusyError("the machine was not looked at yet")
        return limits_of(self._config, self.capability, deadline_s)

    async def _bench(self) -> None:
        folder, data, mark = self._config.state_path, self._config.data, probe.data_mark(self._config.data)
        if mark != self._data_mark:
            found = probe.kept_bench(folder, data) or await probe.new_bench(folder, data)
            self._data_mark, self.found = mark, found

    def _tell(self) -> None:
        if self.found is None:
            return
        self.capability = self._measure(self.found)
        self._happened(
            MachineChanged(
                tier=self.capability.tier,
                storage_bytes=self.capability.storage_bytes,
                fault=self.found.fault,
                note=self.found.warning,
                capability=self.capability,
            )
        )

    def _measure(self, found: probe.Bench) -> Capability:
        return probe.capability(
            self._config,
            self._profile,
            probe.measure(self._config.state_path),
            found,
            session=self._identity.session,
            public_key=self._identity.signer.public_key,
            link=self._meter.look(),
            quota_spent=self._meter.spent,
            held_bytes=self._watched.held_bytes(),
        )


def snapshot(
    config: AgentConfig,
    load_others: float | None = None,
    *,
    own_memory_bytes: int = 0,
    training: bool = False,
    metered: bool = False,
) -> gate.Snapshot:
    """Return what the gate decides on."""
    percent, on_mains = probe.battery()
    pause = paused(config.state_path, time.time())
    return gate.Snapshot(
        load_others=load_others,
        battery_percent=percent,
        on_mains=on_mains,
        temperature_c=probe.temperature_c(),
        disk_free_bytes=probe.disk_free(config.state_path),
        memory_available_bytes=probe.memory_available(),
        own_memory_bytes=own_memory_bytes,
        training=training,
        paused=pause.words if pause is not None else "",
        outside=outside(config.train.windows, time.localtime()),
        metered="the link is metered (train.on_metered: false)"
        if metered and not config.train.on_metered
        else "",
    )


def outside(windows: Sequence[str], now: time.struct_time) -> str:
    """Return in words that a device may not train at this time of the day; "" if it may."""
    if not windows:
        return ""
    if now.tm_year < BUILT_IN:
        return "the clock is not set: nobody knows whether this is within train.windows"
    if open_at(windows, now.tm_wday, now.tm_hour * 60 + now.tm_min):
        return ""
    return f"outside of its windows ({'; '.join(windows)})"


def sample(device: str, session: int, sent_bytes: int, received_bytes: int) -> Telemetry:
    """Return load and traffic of now."""
    return Telemetry(
        device=device,
        session=session,
        cpu_percent=probe.cpu_percent() or 0.0,
        memory_available_bytes=probe.memory_available() or 0,
        rss_bytes=probe.rss() or 0,
        sent_bytes=sent_bytes,
        received_bytes=received_bytes,
        temperature_c=probe.temperature_c(),
    )
