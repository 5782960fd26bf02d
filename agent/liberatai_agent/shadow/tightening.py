"""Settings by wish of the fleet: they may be tighter than the device's own, never looser. Pure."""

from msgspec.structs import replace

from liberatai_agent.config import AgentConfig
from liberatai_core.contract.messages import Wishes

CEILINGS = ("max_load_others", "max_temp_c")
FLOORS = ("min_battery_percent", "min_free_disk_mb", "min_free_memory_mb")


def tightened(own: AgentConfig, wishes: Wishes) -> tuple[AgentConfig, tuple[str, ...]]:
    """Return the settings in force, and the names of those that the device's own hold tighter.

    Args:
        own: from the settings file: what the device's owner allows.
        wishes: of the fleet; None: no wish. How often telemetry is sent is for the fleet to say.
    """
    gate, limited = own.gate, []
    for names, tighter in ((CEILINGS, min), (FLOORS, max)):
        for name in names:
            wished, mine = getattr(wishes, name), getattr(own.gate, name)
            if wished is None:
                continue
            used = wished if mine is None else tighter(wished, mine)
            if used != wished:
                limited.append(name)
            gate = replace(gate, **{name: used})
    link = own.link
    if wishes.quota_mb_per_day is not None:
        mine = own.link.quota_mb_per_day
        used = wishes.quota_mb_per_day if mine is None else min(wishes.quota_mb_per_day, mine)
        if used != wishes.quota_mb_per_day:
            limited.append("quota_mb_per_day")
        link = replace(link, quota_mb_per_day=used)
    telemetry_s = own.telemetry_s if wishes.telemetry_s is None else wishes.telemetry_s
    return replace(own, gate=gate, link=link, telemetry_s=telemetry_s), tuple(limited)


def in_force(config: AgentConfig, wishes: Wishes) -> Wishes:
    """Return the settings in force in the form of wishes, as they are told."""
    gate = config.gate
    return Wishes(
        pause=wishes.pause,
        telemetry_s=max(1.0, config.telemetry_s),
        max_load_others=gate.max_load_others,
        min_battery_percent=gate.min_battery_percent,
        max_temp_c=gate.max_temp_c,
        min_free_disk_mb=gate.min_free_disk_mb,
        min_free_memory_mb=gate.min_free_memory_mb,
        quota_mb_per_day=config.link.quota_mb_per_day,
    )
