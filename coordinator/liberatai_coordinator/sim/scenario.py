"""Scenarios: what happens to a simulated fleet, as a file, and as a list of happenings. Pure.

The same seed gives the same happenings, whatever makes them happen.
"""

import hashlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from liberatai_core.errors import ConfigError
from liberatai_core.profile import Network
from liberatai_core.settings import parse

WINDOW_S: Final = 60.0
"""Happenings are drawn for so long at a time: how long a job runs is not known before."""
STEPS: Final = 48
"""Looks at who is awake, in one period of `nights`."""

Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Positive = Annotated[float, Meta(gt=0, le=1e7)]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of a scenario."""


class Outages(Part, frozen=True, kw_only=True):
    """Links break: once at `at_s`, or again and again, on average `every_s` apart.

    Attributes:
        share: of the devices.
        for_s: how long; on average if it happens again and again.
    """

    share: Share = 1.0
    at_s: Seconds | None = None
    every_s: Positive | None = None
    for_s: Positive = 5.0


class Crashes(Part, frozen=True, kw_only=True):
    """Devices end as by SIGKILL or a pulled plug: this share of them per minute; they come back."""

    per_minute: Share = 0.1
    back_after_s: Positive = 5.0


class Stop(Part, frozen=True, kw_only=True):
    """The broker or the coordinator ends at once and comes back; `forget`: what a broker kept is lost."""

    at_s: Seconds
    down_s: Positive = 3.0
    forget: bool = True


class Skew(Part, frozen=True, kw_only=True):
    """The clocks of some devices jump."""

    at_s: Seconds = 10.0
    share: Share = 0.2
    by_s: Annotated[float, Meta(ge=-1e9, le=1e9)] = 3600.0


class Clones(Part, frozen=True, kw_only=True):
    """Somebody puts copies of so many devices into operation, beside them."""

    at_s: Seconds = 10.0
    count: Annotated[int, Meta(ge=1, le=1000)] = 1
    for_s: Positive = 60.0


class FullDisks(Part, frozen=True, kw_only=True):
    """Disks of some devices take nothing for a while."""

    at_s: Seconds = 5.0
    share: Share = 0.3
    for_s: Positive = 30.0


class Hostile(Part, frozen=True, kw_only=True):
    """Some devices send what they should not: the opposite, noise, or bytes that mean nothing."""

    share: Share = 0.2
    how: Literal["opposite", "noise", "garbage"] = "opposite"


class Nights(Part, frozen=True, kw_only=True):
    """Devices are there in one part of a period only: their share swings between `least` and `most`."""

    period_s: Positive = 86_400.0
    least: Share = 0.25
    most: Share = 1.0


class Failing(Part, frozen=True, kw_only=True):
    """So many devices fail at every training."""

    count: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    reason: str = "E_TRAIN: the loss is not finite"


class Links(Part, frozen=True, kw_only=True):
    """Some devices have another link than their profile says; null leaves a number as it is."""

    share: Share = 1.0
    up_mbit: Positive | None = None
    down_mbit: Positive | None = None
    rtt_ms: Seconds | None = None
    jitter_ms: Seconds | None = None
    loss_percent: Annotated[float, Meta(ge=0, lt=100)] | None = None
    metered: bool | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to a fleet."""

    name: str
    description: str
    links: Links | None = None
    outages: tuple[Outages, ...] = ()
    crashes: Crashes | None = None
    broker: tuple[Stop, ...] = ()
    coordinator: tuple[Stop, ...] = ()
    skew: Skew | None = None
    clones: Clones | None = None
    full_disks: FullDisks | None = None
    hostile: Hostile | None = None
    nights: Nights | None = None
    failing: Failing | None = None


What = Literal[
    "cut",
    "mend",
    "crash",
    "start",
    "broker stops",
    "broker starts",
    "coordinator stops",
    "coordinator starts",
    "clock jumps",
    "clone appears",
    "clone goes",
    "disk full",
    "disk free",
    "asleep",
    "awake",
]


class Happening(msgspec.Struct, frozen=True, order=True):
    """Something that happens at a time to a device; `value` is what it takes to do it."""

    at_s: float
    what: What
    device: str = ""
    value: float = 0.0


ENDS: Final[dict[str, What]] = {
    "cut": "mend",
    "crash": "start",
    "broker stops": "broker starts",
    "coordinator stops": "coordinator starts",
    "clone appears": "clone goes",
    "disk full": "disk free",
    "asleep": "awake",
}
"""What ends what."""


def scenarios_folder() -> Path:
    """Return the folder of the scenarios that come with LiberatAI."""
    return Path(__file__).parent / "scenarios"


def load_scenario(name: str) -> Scenario:
    """Return a shipped scenario, or that of a file, which is named by its path (with a slash).

    Raises:
        ConfigError: no such scenario, or a faulty one.
    """
    path = Path(name) if "/" in name else scenarios_folder() / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        known = ", ".join(scenario_names())
        raise ConfigError(
            "scenario", [f"no scenario {name!r} (known: {known}; or a path with a slash)"]
        ) from None
    scenario = parse(text, Scenario, str(path))
    faults = [
        f"outages[{number}]: give at_s or every_s"
        for number, one in enumerate(scenario.outages)
        if (one.at_s is None) == (one.every_s is None)
    ]
    if scenario.nights is not None and scenario.nights.least > scenario.nights.most:
        faults.append("nights: least is more than most")
    if faults:
        raise ConfigError(str(path), faults)
    return scenario


def scenario_names() -> list[str]:
    """Return the names of the shipped scenarios, sorted."""
    return sorted(path.stem for path in scenarios_folder().glob("*.yaml"))


# --- who -----------------------------------------------------------------------------------------


def chosen(devices: Collection[str], count: int, seed: int, why: str) -> frozenset[str]:
    """Return so many devices, the same for the same seed and reason."""

    def rank(device: str) -> bytes:
        return hashlib.sha256(f"{seed}|{why}|{device}".encode()).digest()

    return frozenset(sorted(devices, key=rank)[:count])


def hostile(scenario: Scenario, devices: Collection[str], seed: int) -> frozenset[str]:
    """Return the devices that send what they should not."""
    if scenario.hostile is None:
        return frozenset()
    return chosen(devices, round(scenario.hostile.share * len(devices)), seed, "hostile")


def failing(scenario: Scenario, devices: Collection[str], seed: int) -> frozenset[str]:
    """Return the devices that fail at every training."""
    return chosen(devices, scenario.failing.count, seed, "failing") if scenario.failing else frozenset()


def network(scenario: Scenario, device: str, net: Network, seed: int) -> Network:
    """Return the link of a device: its profile's, with what the scenario changes."""
    links = scenario.links
    if links is None or _draw(seed, "links", device) >= links.share:
        return net
    changes = {name: value for name, value in msgspec.structs.asdict(links).items() if value is not None}
    changes.pop("share")
    return msgspec.structs.replace(net, **changes)


# --- when ----------------------------------------------------------------------------------------


def happenings(scenario: Scenario, devices: Collection[str], seed: int, window: int) -> list[Happening]:
    """Return what begins in the window of WINDOW_S with this number, and what ends it, by time.

    Args:
        scenario: what may happen.
        devices: whom it may happen to.
        seed: of the draws.
        window: 0, 1, …
    """
    names = sorted(devices)
    random = Random(f"{seed}|{scenario.name}|{window}")  # noqa: S311 - a simulation
    found = [
        *_outages(scenario, names, seed, window, random),
        *_crashes(scenario, names, window, random),
        *_once(scenario, names, seed, window),
        *_nights(scenario, names, seed, window),
    ]
    return sorted(found)


def _draw(seed: int, why: str, device: str) -> float:
    """Return a number in [0, 1) that belongs to a device."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{why}|{device}".encode()).digest()[:7], "big") / 2**56


def _within(at_s: float, window: int) -> bool:
    return window * WINDOW_S <= at_s < (window + 1) * WINDOW_S


def _pair(what: What, at_s: float, for_s: float, device: str = "", value: float = 0.0) -> list[Happening]:
    return [Happening(at_s, what, device, value), Happening(at_s + for_s, ENDS[what], device, value)]


def _outages(
    scenario: Scenario, names: list[str], seed: int, window: int, random: Random
) -> Iterator[Happening]:
    for number, outages in enumerate(scenario.outages):
        theirs = sorted(chosen(names, round(outages.share * len(names)), seed, f"outage {number}"))
        if outages.at_s is not None:
            if _within(outages.at_s, window):
                for device in theirs:
                    yield from _pair("cut", outages.at_s, outages.for_s, device)
            continue
        for device in theirs:
            at_s = window * WINDOW_S + random.expovariate(1 / (outages.every_s or WINDOW_S))
            while _within(at_s, window):
                for_s = min(random.expovariate(1 / outages.for_s), 5 * outages.for_s)
                yield from _pair("cut", at_s, for_s, device)
                at_s += for_s + random.expovariate(1 / (outages.every_s or WINDOW_S))


def _crashes(scenario: Scenario, names: list[str], window: int, random: Random) -> Iterator[Happening]:
    crashes = scenario.crashes
    if crashes is None:
        return
    share = crashes.per_minute * WINDOW_S / 60
    for device in names:
        if random.random() < share:
            at_s = window * WINDOW_S + random.uniform(0, WINDOW_S)
            yield from _pair("crash", at_s, crashes.back_after_s, device)


def _once(scenario: Scenario, names: list[str], seed: int, window: int) -> Iterator[Happening]:
    for stop in scenario.broker:
        if _within(stop.at_s, window):
            yield from _pair("broker stops", stop.at_s, stop.down_s, value=float(stop.forget))
    for stop in scenario.coordinator:
        if _within(stop.at_s, window):
            yield from _pair("coordinator stops", stop.at_s, stop.down_s)
    if scenario.skew is not None and _within(scenario.skew.at_s, window):
        skew = scenario.skew
        for device in sorted(chosen(names, round(skew.share * len(names)), seed, "skew")):
            yield Happening(skew.at_s, "clock jumps", device, skew.by_s)
    if scenario.clones is not None and _within(scenario.clones.at_s, window):
        clones = scenario.clones
        for device in sorted(chosen(names, clones.count, seed, "clones")):
            yield from _pair("clone appears", clones.at_s, clones.for_s, device)
    if scenario.full_disks is not None and _within(scenario.full_disks.at_s, window):
        disks = scenario.full_disks
        for device in sorted(chosen(names, round(disks.share * len(names)), seed, "disks")):
            yield from _pair("disk full", disks.at_s, disks.for_s, device)


def _nights(scenario: Scenario, names: list[str], seed: int, window: int) -> Iterator[Happening]:
    """Yield who goes and who comes: a device is awake while its own number is below the share of the hour."""
    nights = scenario.nights
    if nights is None:
        return
    pause_s = max(1.0, nights.period_s / STEPS)
    first = math.ceil(window * WINDOW_S / pause_s)
    step = first
    while _within(step * pause_s, window):
        before = 2.0 if step == 0 else _awake(nights, (step - 1) * pause_s)
        now = _awake(nights, step * pause_s)
        for device in names:
            own = _draw(seed, "night", device)
            if (own < before) != (own < now):
                yield Happening(step * pause_s, "awake" if own < now else "asleep", device)
        step += 1


def _awake(nights: Nights, at_s: float) -> float:
    """Return the share of the devices that is awake; most of them at the beginning of a period."""
    return (
        nights.least + (nights.most - nights.least) * (1 + math.cos(2 * math.pi * at_s / nights.period_s)) / 2
    )
