"""The gate: may this device train now? A pure decision on a snapshot of the machine."""

from dataclasses import dataclass

from liberatai_agent.config import GateSettings

MIB = 1 << 20


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
        day_bytes: that the link moved today.
        day_quota_bytes: that it may move in a day.
    """

    load_others: float | None = None
    battery_percent: float | None = None
    on_mains: bool = True
    temperature_c: float | None = None
    disk_free_bytes: int | None = None
    memory_available_bytes: int | None = None
    day_bytes: int | None = None
    day_quota_bytes: int | None = None


def decide(now: Snapshot, rules: GateSettings) -> tuple[bool, str]:
    """Return (open, reason); the reason is "" when open and names every rule that is broken otherwise."""
    broken = []
    if rules.max_load_others is not None and _above(now.load_others, rules.max_load_others):
        broken.append(f"other programs use {now.load_others:.2f} processors (max {rules.max_load_others:g})")
    if not now.on_mains and _below(now.battery_percent, rules.min_battery_percent):
        broken.append(f"battery at {now.battery_percent:.0f} % (min {rules.min_battery_percent:g} %)")
    if _above(now.temperature_c, rules.max_temp_c):
        broken.append(f"{now.temperature_c:.0f} °C (max {rules.max_temp_c:g} °C)")
    if _below(now.disk_free_bytes, _bytes(rules.min_free_disk_mb)):
        broken.append(f"{_mib(now.disk_free_bytes)} MiB disk free (min {rules.min_free_disk_mb:g})")
    if _below(now.memory_available_bytes, _bytes(rules.min_free_memory_mb)):
        broken.append(
            f"{_mib(now.memory_available_bytes)} MiB memory available (min {rules.min_free_memory_mb:g})"
        )
    if quota_spent(now.day_bytes, now.day_quota_bytes):
        broken.append(quota_words(now.day_bytes or 0, now.day_quota_bytes or 0))
    return not broken, "; ".join(broken)


def quota_spent(day_bytes: int | None, quota_bytes: int | None) -> bool:
    """Whether a day's quota of the link is used up."""
    return day_bytes is not None and quota_bytes is not None and day_bytes >= quota_bytes


def quota_words(day_bytes: int, quota_bytes: int) -> str:
    """Return why nothing is fetched or trained when the quota is used up."""
    used, whole = day_bytes / MIB, quota_bytes / MIB
    return f"today's link quota is used up: {used:.1f} of {whole:.4g} MiB; goes on tomorrow (UTC)"


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit


def _below(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value < limit


def _bytes(mebibytes: float | None) -> float | None:
    return None if mebibytes is None else mebibytes * MIB


def _mib(size: int | None) -> int:
    return (size or 0) // MIB
