"""What `liberatai-agent doctor` looks at: settings, state, machine, data, certificates, broker, coordinator.

Nothing is changed, and a running agent is not disturbed.
"""

import time
from pathlib import Path
from typing import Any, Final

import psutil

from liberatai_agent.config import AgentConfig, load_config, load_profile
from liberatai_agent.exchange.broker import mqtt_settings
from liberatai_agent.exchange.link_meter import read_link
from liberatai_agent.machine import gate, probe
from liberatai_agent.machine.machine_watch import snapshot
from liberatai_agent.membership.belonging import (
    FOREIGN_KEY_REMEDY,
    UNKNOWN_FLEET_REMEDY,
    foreign_key,
    unknown_fleet,
)
from liberatai_agent.store.status import last_error, read_status
from liberatai_core.contract.topics import ROOT, Topics
from liberatai_core.doctor.broker import Reached, reach
from liberatai_core.doctor.certificates import TlsFiles, check_files
from liberatai_core.doctor.finding import Finding, fail, failed, ok, warn
from liberatai_core.doctor.machine import check_clock, check_disk, check_folder, check_owners, check_private
from liberatai_core.errors import ConfigError, NotFoundError
from liberatai_core.profile import PROCESS_BYTES, Profile, trainers
from liberatai_core.units import size_text

LEAST_DISK_BYTES: Final = 64 << 20
RIGHTS_REMEDY: Final = "the broker's list of rights: `liberatai broker sync`"
SETTINGS: Final = "what each key means: docs/jobs.md#agentyaml"


def check_settings(path: Path) -> tuple[AgentConfig | None, list[Finding]]:
    """Read the settings; None: they cannot be used, and the findings say why."""
    try:
        config = load_config(path)
    except NotFoundError:
        remedy = "give --config FILE; `liberatai-agent enrol TOKEN` writes one"
        return None, [fail("settings", f"{path}: no such file", remedy)]
    except ConfigError as error:
        return None, [fail("settings", f"{path}: {fault}", SETTINGS) for fault in error.faults]
    text = f"{path}: device {config.device} of fleet {config.fleet}"
    if config.coordinator_key == "0" * 64:
        text = f"{path}: coordinator_key: it is still the placeholder of the documents"
        return config, [fail("settings", text, FOREIGN_KEY_REMEDY)]
    return config, [ok("settings", text)]


async def examine(config: AgentConfig, changed_s: float = 0.0) -> list[Finding]:
    """Look at everything that the settings name, and go to the broker.

    Not if the running agent is connected with these settings, and obeys its coordinator: a broker throws the
    first one of a name out when a second one comes.

    Args:
        config: the settings.
        changed_s: when their file was written, Unix seconds.
    """
    now_s = time.time()
    found = check_state(config)
    found.append(check_clock(now_s))
    found += await check_data(config)
    files = TlsFiles(
        ca_file=_path(config.ca_file),
        cert_file=_path(config.cert_file),
        key_file=_path(config.key_file),
        name=config.device,
        fleet=config.fleet,
    )
    certificates = check_files(files, now_s)
    found += certificates
    if failed(certificates):
        found.append(warn("broker", "not tried: the certificates come first", "mend them, and ask again"))
        return found
    if (told := connected_agent(config, changed_s)) is not None:
        return found + told
    return found + await check_broker(config, files)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


# --- this machine ---------------------------------------------------------------------------------


def check_state(config: AgentConfig) -> list[Finding]:
    """Look at the state folder and the disk."""
    folder = config.state_path
    found = [check_folder(folder, "state_dir")]
    if not failed(found):
        key = check_private(folder / "device.key", "device key", 32)
        found.append(key or ok("device key", "none yet: it is made when the agent first starts"))
        found += check_owners(folder)
        if (folder / "blobs").exists():
            blobs = check_folder(folder / "blobs", "state_dir")
            found += [blobs] if failed([blobs]) else []
    found.append(check_disk(folder, LEAST_DISK_BYTES))
    status = read_status(folder) or {}
    told = last_error(str(status.get("last_error", "")), float(status.get("last_error_at") or 0), time.time())
    if told["last_error"] and status.get("running"):
        remedy = "what follows may say why; its log has the rest"
        found.append(warn("agent", f"the running agent met {told['last_error']}", remedy))
    return found


def check_machine(config: AgentConfig, profile: Profile | None, bench: probe.Bench) -> list[Finding]:
    """Look at what the machine can do."""
    machine = probe.measure(config.state_path)
    caps = probe.capability(config, profile, machine, bench, session=0, public_key=bytes(32))
    able = trainers(caps.runtimes, caps.memory_bytes)
    text = f"tier {caps.tier}, {size_text(caps.memory_bytes)} of memory for training"
    if able or config.data is None:
        with_what = f" with {able[0]}" if able else ""
        slow = "" if "torch" in machine.runtimes else "; no torch: small networks only"
        found = [ok("machine", f"{text}{with_what}{slow}")]
    else:
        remedy = f"training needs {size_text(PROCESS_BYTES['numpy'])}: memory_mb, or a profile with more"
        found = [warn("machine", text, remedy)]
    now = gate.decide(snapshot(config), config.gate)
    found.append(
        ok("gate", "open: training may begin")
        if now.open
        else warn(
            "gate", f"closed: {now.reason}", "training waits until that is over (gate: in the settings)"
        )
    )
    quota, used = config.link.quota_bytes, read_link(config.state_path).day_bytes
    if quota is not None:
        text = f"{size_text(used)} of {size_text(quota)} moved on its last day"
        spent = gate.quota_spent(used, quota)
        found.append(warn("quota", text, "waits for the next day (UTC)") if spent else ok("quota", text))
    return found


async def check_data(config: AgentConfig) -> list[Finding]:
    """Look at the private data, in a process of its own, and at what can be done with them."""
    try:
        profile = load_profile(config)
    except ConfigError as error:
        return [
            fail("profile", fault, "`liberatai profiles list` shows those that exist")
            for fault in error.faults
        ]
    if config.data is None:
        text = "none: this device only observes"
        return [
            warn("data", text, "set data: to an .npz file to train"),
            *check_machine(config, profile, probe.Bench()),
        ]
    bench = await probe.look_at_data(config.data)
    if bench.fault:
        text = bench.fault.removeprefix("E_DATA: ")
        remedy = "give data: a file .npz with x (n, …) and y (n,) of numbers 0 … (docs/jobs.md#data-contract)"
        return [fail("data", text, remedy), *check_machine(config, profile, bench)]
    assert bench.data is not None  # noqa: S101 - without a fault there is a contract
    shape = "x".join(map(str, bench.data.input_shape))
    found = [ok("data", f"{config.data}: {bench.samples:,} samples of {shape}, {bench.data.classes} classes")]
    if bench.warning:
        found.append(warn("data", bench.warning.removeprefix("E_DATA: "), "look at y of the file"))
    return found + check_machine(config, profile, bench)


def connected_agent(config: AgentConfig, changed_s: float) -> list[Finding] | None:
    """Say what the running agent has at the broker; None: somebody has to go there and look."""
    status = read_status(config.state_path) or {}
    same = status.get("device") == config.device and status.get("fleet") == config.fleet
    newer = float(status.get("started_at") or 0) < changed_s
    obeys = status.get("connected") is True and status.get("coordinator") == "online"
    if not (same and obeys and _runs(status)) or newer or status.get("broker") != config.broker:
        return None
    found = [ok("broker", f"{config.broker}: the running agent is connected ({status.get('protocol')})")]
    found += [fail("rights", str(line), RIGHTS_REMEDY) for line in status.get("broker_refuses", [])]
    return [*found, ok("coordinator", f"of fleet {config.fleet}: the running agent hears and obeys it")]


def _runs(status: dict[str, Any]) -> bool:
    """Whether the agent that wrote this is there: its file outlives a kill."""
    pid = status.get("pid")
    return bool(status.get("running")) and isinstance(pid, int) and psutil.pid_exists(pid)


# --- the broker -----------------------------------------------------------------------------------


async def check_broker(config: AgentConfig, files: TlsFiles) -> list[Finding]:
    """Go to the broker, say a word there, and look for this fleet's coordinator."""
    try:
        settings = mqtt_settings(config)
    except ConfigError as error:
        return [fail("broker", fault, "correct it in the settings") for fault in error.faults]
    topics = Topics(fleet=config.fleet)
    own = topics.to_device(config.device)[-1]
    reached = await reach(settings, files, topics.test_word("up", config.device), own, f"{ROOT}/+/co/+/state")
    found = list(reached.findings)
    told = (read_status(config.state_path) or {}).get("broker_refuses", [])
    found += [fail("rights", line, "the running agent was told so; see the line above") for line in told]
    if reached.connected:
        found += check_coordinator(config, reached)
    return found


def check_coordinator(config: AgentConfig, reached: Reached) -> list[Finding]:
    """Say whether this fleet's coordinator is there, and is the one that is obeyed."""
    mine: dict[str, bytes] = {}
    others: set[str] = set()
    for topic, payload in reached.heard:
        levels = topic.split("/")
        if len(levels) == 6 and levels[3] == "co" and payload:
            if levels[2] == config.fleet:
                mine[levels[4]] = payload
            else:
                others.add(levels[2])
    if not mine:
        return [fail("fleet", unknown_fleet(config.fleet, others), UNKNOWN_FLEET_REMEDY)]
    strange = [foreign_key(name, frame, config.key_bytes) for name, frame in sorted(mine.items())]
    if not all(strange):
        return [
            ok("coordinator", f"{', '.join(sorted(mine))} of fleet {config.fleet} has the key that is obeyed")
        ]
    return [fail("coordinator key", line, FOREIGN_KEY_REMEDY) for line in strange]
