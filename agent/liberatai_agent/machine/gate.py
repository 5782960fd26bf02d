"""The gate: may this device train now? A pure decision on a snapshot of the machine and the gate before.

A training uses memory and makes heat, so a gate that looked at bare numbers would close because of the
training that it let in, and open once that was stopped, for ever. Therefore

- what the training process holds counts as free, and its load as nobody's;
- a rule that is broken stays so until the value is better than the limit by a margin;
- a training that runs is left alone for a while, unless a value is far beyond its limit. Each time the gate
  stops one, the next one gets twice the time: so that sooner or later one is finished.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from liberatai_agent.config import GateSettings

MIB = 1 << 20
RUN_S = 60.0
"""What a training may run with a rule broken: most are over by then."""
MAX_RUN_S = 86_400.0
HEAT_MARGIN_C, HEAT_FAR_C = 5.0, 10.0
"""Cooler by so much: open again. Hotter by so much: at once; boards slow themselves down long before."""
CHARGE_MARGIN = 5.0
FREE_MARGIN, FAR = 1.25, 0.5
"""Shares of a limit from below: open again above the first, closed at once below the second."""
LOAD_MARGIN, LOAD_FAR = 0.8, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was measured just now; None where the machine cannot tell.

    Attributes:
        load_others: processors' worth of load by other programs.
        battery_percent: charge.
        on_mains: whether a charger is connected; true without a battery.
        temperature_c: hottest sensor.
        disk_free_bytes: where the state lies.
        memory_available_bytes: on the machine or in its container.
        own_memory_bytes: that the training process holds: it would be available without it.
        training: whether a training runs.
        paused: why somebody at the device wants peace, in words; "" if nobody does.
        outside: the windows that the time of the day is outside of, in words; "" if it is inside of one.
        metered: why the link counts as metered and may not be used, in words; "" if it may.
    """

    load_others: float | None = None
    battery_percent: float | None = None
    on_mains: bool = True
    temperature_c: float | None = None
    disk_free_bytes: int | None = None
    memory_available_bytes: int | None = None
    own_memory_bytes: int = 0
    training: bool = False
    paused: str = ""
    outside: str = ""
    metered: str = ""


RESTING = frozenset({"paused", "windows", "metered"})
"""Rules by which the device takes part in nothing for a while: it says so, and is not invited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The gate after a look.

    Attributes:
        open: training is allowed.
        reason: "" when open, otherwise every rule that is broken.
        broken: names of the rules that are broken and not yet well again.
        run_s: what a training may run with a rule broken.
        began_s: when the training that runs was first seen; None: none runs.
    """

    open: bool = True
    reason: str = ""
    broken: frozenset[str] = frozenset()
    run_s: float = RUN_S
    began_s: float | None = None

    @property
    def resting(self) -> bool:
        """Whether the device takes part in nothing for a while."""
        return bool(self.broken & RESTING)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One rule that can be judged: a value, and the limits that it must not pass.

    Attributes:
        name: of the rule.
        value: measured.
        limit: where the rule is broken.
        again: where it is well again.
        far: from where on nothing waits.
        words: what is said of it.
        above: the limit is one from above.
    """

    name: str
    value: float
    limit: float
    again: float
    far: float
    words: str
    above: bool

    def beyond(self, limit: float) -> bool:
        """Whether the value is on the wrong side of a limit."""
        return self.value > limit if self.above else self.value < limit


def decide(now: Snapshot, rules: GateSettings, before: Gate | None = None, now_s: float = 0.0) -> Gate:
    """Return the gate after a look at the machine.

    Args:
        now: what was measured.
        rules: the device's.
        before: what this returned at the last look; None: the first one.
        now_s: of a clock that never goes back.
    """
    before = before or Gate()
    judged = list(_judged(now, rules))
    broken = [
        rule for rule in judged if rule.beyond(rule.again if rule.name in before.broken else rule.limit)
    ]
    began_s = (now_s if before.began_s is None else before.began_s) if now.training else None
    # One that was not stopped here came to its end: the next one starts with the usual patience.
    ended = before.began_s is not None and not now.training and before.open
    after = replace(
        before,
        began_s=began_s,
        run_s=RUN_S if ended else before.run_s,
        broken=frozenset(r.name for r in broken),
    )
    if not broken:
        return replace(after, open=True, reason="")
    far = any(rule.beyond(rule.far) for rule in broken)
    if before.open and began_s is not None:
        if not far and now_s - began_s < before.run_s:
            return after
        after = replace(after, run_s=min(2 * before.run_s, MAX_RUN_S))
    return replace(after, open=False, reason="; ".join(rule.words for rule in broken))


def _judged(now: Snapshot, rules: GateSettings) -> Iterator[_Rule]:
    # Somebody who wants peace has it at once; a training that runs when a window ends may come to its end.
    yield _Rule("paused", bool(now.paused), 0.5, 0.5, 0.5, now.paused, True)
    yield _Rule("windows", bool(now.outside), 0.5, 0.5, 1.5, now.outside, True)
    yield _Rule("metered", bool(now.metered), 0.5, 0.5, 1.5, now.metered, True)
    limit, load = rules.max_load_others, now.load_others
    if limit is not None and load is not None:
        words = f"other programs use {load:.2f} processors (max {limit:g})"
        yield _Rule("load", load, limit, LOAD_MARGIN * limit, LOAD_FAR * limit, words, True)
    limit, charge = rules.min_battery_percent, now.battery_percent
    if limit is not None and charge is not None and not now.on_mains:
        words = f"battery at {charge:.0f} % (min {limit:g} %)"
        yield _Rule("battery", charge, limit, min(100.0, limit + CHARGE_MARGIN), FAR * limit, words, False)
    limit, heat = rules.max_temp_c, now.temperature_c
    if limit is not None and heat is not None:
        words = f"{heat:.0f} °C (max {limit:g} °C)"
        yield _Rule("heat", heat, limit, limit - HEAT_MARGIN_C, limit + HEAT_FAR_C, words, True)
    limit, disk = rules.min_free_disk_mb, now.disk_free_bytes
    if limit is not None and disk is not None:
        yield _free("disk", disk, limit, f"{disk // MIB} MiB disk free (min {limit:g})")
    limit, memory = rules.min_free_memory_mb, now.memory_available_bytes
    if limit is not None and memory is not None:
        left = memory + now.own_memory_bytes
        yield _free("memory", left, limit, f"{left // MIB} MiB memory available (min {limit:g})")


def _free(name: str, size: int, limit: float, words: str) -> _Rule:
    return _Rule(name, size / MIB, limit, FREE_MARGIN * limit, FAR * limit, words, False)


def quota_spent(day_bytes: int | None, quota_bytes: int | None) -> bool:
    """Whether a day's quota of the link is used up."""
    return day_bytes is not None and quota_bytes is not None and day_bytes >= quota_bytes


def quota_words(day_bytes: int, quota_bytes: int) -> str:
    """Return why nothing is fetched or trained when the quota is used up."""
    used, whole = day_bytes / MIB, quota_bytes / MIB
    return f"today's link quota is used up: {used:.1f} of {whole:.4g} MiB; goes on tomorrow (UTC)"
