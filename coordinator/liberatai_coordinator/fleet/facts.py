"""What is known of a device, as questions ask for it and as conditions tell it. Pure."""

from dataclasses import dataclass

from liberatai_coordinator.fleet import query
from liberatai_coordinator.fleet.devices import LIVING, Device, Fleet
from liberatai_coordinator.fleet.keys import Knock
from liberatai_coordinator.fleet.query import LABEL, Value

MIB, KIB, MBIT = 1 << 20, 1 << 10, 1e6


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that holds, or does not, of a device.

    Attributes:
        name: Ready, Online … : the words of Kubernetes where it has one.
        holds: whether it does.
        reason: why; "" where there is nothing to say.
        since_s: Unix seconds of the last change; 0: not known.
    """

    name: str
    holds: bool
    reason: str = ""
    since_s: float = 0.0


def facts_of(device: Device, *, ready: bool, wall_s: float) -> dict[str, Value | None]:
    """Return a device's fields by name, see `query.FIELDS`.

    Args:
        device: as the fleet knows it.
        ready: whether it can get work.
        wall_s: the time of day.
    """
    found: dict[str, Value | None] = {
        "name": device.id,
        "status": device.status,
        "state": device.state,
        "phase": device.report.phase if device.report else None,
        "online": device.online,
        "ready": ready,
        "drained": device.drained is not None,
        "updates": float(device.updates),
        "silent_s": max(0.0, wall_s - device.last_seen_s) if device.last_seen_s else None,
    }
    found |= {LABEL + name: value for name, value in device.labels}
    capability = device.capability
    if capability is None:
        return found
    return found | {
        "tier": capability.tier,
        "profile": capability.profile or None,
        "arch": capability.arch or None,
        "agent_version": capability.agent_version,
        "metered": capability.metered,
        "cores": float(capability.cores),
        "cpu_share": capability.cpu_share,
        "ram_mb": capability.memory_bytes / MIB,
        "storage_kb": capability.storage_bytes / KIB,
        "disk_free_mb": capability.disk_free_bytes / MIB,
        "gflops": capability.gflops,
        "up_mbit": None if capability.up_bits_s is None else capability.up_bits_s / MBIT,
        "down_mbit": None if capability.down_bits_s is None else capability.down_bits_s / MBIT,
        "samples": float(capability.samples),
    }


def members(fleet: Fleet, asked: str, wall_s: float) -> tuple[str, ...]:
    """Return the names of the devices of which a question is true, in order.

    Args:
        fleet: all devices.
        asked: the question, see `query`.
        wall_s: the time of day.
    """
    ready, wanted = fleet.ready_names, query.parse(asked)
    return tuple(
        name
        for name, device in sorted(fleet.devices.items())
        if query.matches(wanted, facts_of(device, ready=name in ready, wall_s=wall_s))
    )


def conditions_of(
    device: Device, *, ready: bool, connected: bool, knock: Knock | None, version: str
) -> tuple[Condition, ...]:
    """Return what holds of a device: Ready and Online always, the others where they hold.

    Args:
        device: as the fleet knows it.
        ready: whether it can get work.
        connected: whether the coordinator has a broker.
        knock: another key that asks for its name.
        version: of the coordinator's release.
    """
    online = device.online and connected
    found = [
        Condition("Ready", ready, "" if ready else _not_ready(device, connected), _ready_s(device)),
        Condition("Online", online, _not_online(device, connected), device.state_s),
    ]
    if device.status != "approved":
        name = "Quarantined" if device.status == "quarantined" else "Pending"
        found.append(Condition(name, True, device.reason, device.status_s))
    if device.drained is not None:
        found.append(Condition("Drained", True, device.drained.reason, device.drained.since_s))
    report, capability = device.report, device.capability
    if report is not None and report.phase in ("gated", "failed"):
        name = "Gated" if report.phase == "gated" else "Failed"
        if device.said == "draining":
            name = "Resting"
        found.append(Condition(name, True, report.reason, device.phase_s))
    if capability is not None and capability.quota_spent:
        found.append(Condition("QuotaSpent", True, "today's link quota is used up"))
    if capability is not None and capability.agent_version != version:
        words = f"agent {capability.agent_version}, coordinator {version}"
        found.append(Condition("VersionSkew", True, words))
    if device.ignores:
        found.append(Condition("Ignores", True, device.ignores))
    if device.cloned:
        words = f"its session number went back {device.turns} times: do two machines use its key?"
        found.append(Condition("DuplicateIdentity", True, words, device.turned_s))
    elif device.note:
        found.append(Condition("Odd", True, device.note, device.state_s))
    if knock is not None:
        often = "once" if knock.times == 1 else f"{knock.times} times"
        words = f"another key asks for its name ({often}): `liberatai devices rekey {device.id}`"
        found.append(Condition("Knocking", True, words, knock.first_s))
    return tuple(found)


def _not_online(device: Device, connected: bool) -> str:
    if not connected and device.said in LIVING:
        return "the coordinator has no broker"
    resting = device.said == "draining" and device.report is not None and device.report.reason
    return "" if device.online else device.note or resting or f"it is {device.state}"


def _not_ready(device: Device, connected: bool) -> str:
    if device.status != "approved":
        return f"it is {device.status}"
    if device.drained is not None:
        return "it is drained"
    if not (device.online and connected):
        return _not_online(device, connected)
    return "it did not introduce itself" if device.capability is None else "today's link quota is used up"


def _ready_s(device: Device) -> float:
    drained_s = device.drained.since_s if device.drained else 0.0
    return max(device.state_s, device.status_s, drained_s)
