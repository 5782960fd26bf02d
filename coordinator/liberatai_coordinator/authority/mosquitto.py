"""Mosquitto's settings and access lists as text, every value with its reason. Pure.

Two doors: one for devices and coordinators, and one for claims, whose certificates another authority signs.
What comes in by the second door may ask for a certificate and do nothing else, whatever name it has.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final, Literal

from liberatai_core.contract.topics import ROOT, require_id
from liberatai_core.errors import ConfigError

Release = Literal["2.0", "2.1"]
RELEASES: Final[tuple[Release, ...]] = ("2.0", "2.1")
PORT: Final = 8883
CLAIM_PORT: Final = 8884
CLAIM_CONNECTIONS: Final = 200
"""Devices that join at the same time; each is there for some seconds, or waits for an operator."""
STATE: Final = PurePath("/var/lib/mosquitto")
CHECKED: Final = ("check-a", "check-b")
OBSERVER: Final = "check-observer"
"""Names that `brokers.check` uses; nobody else should have them."""
PLUGINS: Final = "/usr/lib"


@dataclass(frozen=True, slots=True, kw_only=True)
class MosquittoPlan:
    """What a broker's settings are made for.

    Attributes:
        folder: where settings, access lists and certificates lie on the broker's machine.
        release: of Mosquitto: its access lists are plugins from 2.1 on.
        user: that the broker becomes when root starts it.
        devices: that are expected; bounds the number of connections.
        memory_mib: that the broker may take.
        port, claim_port: of the two doors.
        bind: address that both listen on; "" for all.
        state_dir: for retained messages and sessions.
        plugins: folder of `mosquitto_acl_file.so` (2.1).
    """

    folder: PurePath
    release: Release = "2.0"
    user: str = "mosquitto"
    devices: int = 5000
    memory_mib: int = 1024
    port: int = PORT
    claim_port: int = CLAIM_PORT
    bind: str = ""
    state_dir: PurePath = STATE
    plugins: str = PLUGINS

    def __post_init__(self) -> None:
        """Refuse what would not be one line of a settings file."""
        texts = {
            "folder": str(self.folder),
            "user": self.user,
            "bind": self.bind,
            "state_dir": str(self.state_dir),
            "plugins": self.plugins,
        }
        faults = [f"{name}: must be one line without spaces" for name, text in texts.items() if _odd(text)]
        ports = {"port": self.port, "claim_port": self.claim_port}
        faults += [f"{name}: must be 1 to 65535" for name, port in ports.items() if not 0 < port < 1 << 16]
        if self.port == self.claim_port:
            faults.append("claim_port: must be another one than port")
        if not 1 <= self.devices <= 1_000_000:
            faults.append("devices: must be 1 to 1000000")
        if not 64 <= self.memory_mib <= 1 << 20:
            faults.append("memory_mib: must be 64 to 1048576")
        if faults:
            raise ConfigError("broker", faults)


def _odd(text: str) -> bool:
    return any(character.isspace() or not character.isprintable() for character in text)


def device_acl(fleet: str, coordinator: str, denied: Collection[str] = ()) -> str:
    """Return the access list of the door for devices.

    The lines are patterns even without `%u`, because Mosquitto applies a plain `topic` line outside of a
    `user` block to anonymous clients only; it warns about them, and they work.

    Args:
        fleet: name in every topic.
        coordinator: common name of the coordinator's certificate.
        denied: devices that are shut out: their open connections lose all rights when the list is loaded.
    """
    require_id(fleet, "fleet")
    require_id(coordinator, "coordinator")
    root = f"{ROOT}/{fleet}"
    shut_out = "".join(f"user {require_id(name, 'device')}\ntopic deny #\n\n" for name in sorted(denied))
    observed = "".join(f"topic read {root}/up/{name}/#\ntopic write {root}/dn/{name}/#\n" for name in CHECKED)
    return (
        f"# Fleet {fleet}. %u is the user name: the common name of the client's certificate.\n"
        "# A device writes below its own name only, and reads what is addressed to it or public.\n"
        "# Written by `liberatai broker`: what you change here is lost.\n\n"
        f"{shut_out}"
        f"user {coordinator}\n"
        f"topic readwrite {root}/#\n\n"
        "# `liberatai broker check` proves all this from outside; its observer's rights end at its devices.\n"
        f"user {OBSERVER}\n"
        f"{observed}\n"
        f"pattern write {root}/up/%u/#\n"
        f"pattern read {root}/up/%u/test/#\n"
        f"pattern read {root}/dn/%u/#\n"
        f"pattern read {root}/pub/#\n"
        f"pattern read {root}/co/#\n"
        "# A new certificate before the old one ends, over the connection that stands:\n"
        f"pattern write {root}/prov/%u/csr\n"
        f"pattern read {root}/prov/%u/crt\n"
    )


def claim_acl(fleet: str) -> str:
    """Return the access list of the door for claims: ask for a certificate, hear the answer, nothing else."""
    root = f"{ROOT}/{require_id(fleet, 'fleet')}/prov/%u"
    return (
        f"# Fleet {fleet}, the door for claims: ask for a certificate, hear the answer, nothing else.\n"
        "# Written by `liberatai broker`: what you change here is lost.\n\n"
        f"pattern write {root}/csr\n"
        f"pattern read {root}/crt\n"
    )


def mosquitto_conf(plan: MosquittoPlan) -> str:
    """Return the broker's settings."""
    folder, is_new = plan.folder, plan.release != "2.0"
    return "\n".join(
        (
            *_head(plan),
            *_limits(plan),
            *_state(plan),
            *(_plugins(plan) if is_new else ()),
            "# --- the door for devices and the coordinator --------------------------------------",
            *_listener(plan, plan.port, "ca", "acl"),
            "# One for each device and some for the moment in which it changes connections.",
            f"max_connections {plan.devices + plan.devices // 10 + 16}",
            *_access(folder, "acl", is_new=is_new),
            "",
            "# --- the door for claims: joining, and coming back after a certificate's end ------",
            "# Its certificates are signed by an authority of their own, so that a claim never",
            "# comes in by the door above, and a device's certificate never by this one.",
            *_listener(plan, plan.claim_port, "claims", "acl-claims"),
            "# Who joins stays for seconds, or waits for an operator; more than this is a flood.",
            f"max_connections {CLAIM_CONNECTIONS}",
            *_access(folder, "acl-claims", is_new=is_new),
            "",
        )
    )


def _head(plan: MosquittoPlan) -> tuple[str, ...]:
    per_listener = (
        ()
        if plan.release != "2.0"
        else (
            "# Each door has an access list of its own. (2.1 has another word for this, and 3.0 no more",
            "# this one: `liberatai broker init --mosquitto 2.1` writes that form.)",
            "per_listener_settings true",
        )
    )
    return (
        f"# Mosquitto {plan.release} for a LiberatAI fleet: mutual TLS, one certificate per device.",
        "# Written by `liberatai broker init`; run it again to change it.",
        f"# Start: mosquitto -c {plan.folder}/mosquitto.conf",
        "",
        "# Started by root, Mosquitto becomes this user: it must be able to read every file named here.",
        f"user {plan.user}",
        *per_listener,
        "",
    )


def _limits(plan: MosquittoPlan) -> tuple[str, ...]:
    return (
        "# --- limits: every one of them is unlimited, or far too high, by default ------------",
        "# Chunks have at most 256 KiB; the rest is room for other clients. The default of 2.0 is",
        "# 256 MB, and every client could make the broker reserve that.",
        "max_packet_size 1048576",
        "# Unacknowledged messages per client: 20 chunks are 5 MiB of memory.",
        "max_inflight_messages 20",
        "# A full queue loses messages silently. Nothing of LiberatAI depends on it, but telemetry",
        "# should not fill it.",
        "max_queued_messages 1000",
        "max_queued_bytes 67108864",
        "# By default a session never ends: devices that are gone would keep their queues for ever.",
        "persistent_client_expiration 14d",
        "# MQTT 5 clients are told this value; 3.1.1 clients that ask for more are refused.",
        "max_keepalive 300",
        '# In bytes: 2.0.11 does not start with "1G". Beyond it clients are refused, the broker lives.',
        f"memory_limit {plan.memory_mib << 20}",
        "# Small packets go out at once: an acknowledgement must not wait for another packet.",
        "set_tcp_nodelay true",
        "",
    )


def _state(plan: MosquittoPlan) -> tuple[str, ...]:
    return (
        "# --- state and observation -----------------------------------------------------------",
        "# Retained messages (models among them) are written this often. A killed broker loses what",
        "# came after; the coordinator publishes its own again when it finds them missing.",
        "persistence true",
        f"persistence_location {plan.state_dir}/",
        "autosave_interval 300",
        "sys_interval 10",
        "connection_messages true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "",
    )


def _plugins(plan: MosquittoPlan) -> tuple[str, ...]:
    program = f"{plan.plugins}/mosquitto_acl_file.so"
    return (
        "# --- access lists: plugins from 2.1 on, each used by one door -------------------------",
        f"plugin_load acl {program}",
        f"plugin_opt_acl_file {plan.folder}/acl",
        f"plugin_load acl-claims {program}",
        f"plugin_opt_acl_file {plan.folder}/acl-claims",
        "",
    )


def _listener(plan: MosquittoPlan, port: int, authority: str, access: str) -> tuple[str, ...]:
    certs = f"{plan.folder}/certs"
    allow = "allow_anonymous" if plan.release == "2.0" else "listener_allow_anonymous"
    return (
        f"listener {port}{f' {plan.bind}' if plan.bind else ''}",
        "tls_version tlsv1.2",
        f"cafile {certs}/{authority}.crt",
        f"certfile {certs}/server.pem",
        f"keyfile {certs}/server.pem",
        "# Revoked certificates; read again at SIGHUP, for new connections only. An open one is shut",
        f"# out by {access}, which is read at the same time.",
        f"crlfile {certs}/{authority}.crl",
        "require_certificate true",
        "# The certificate's common name is the user name (%u in the access list) and the client id:",
        "# nobody can write under another name, or throw another one out.",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        f"{allow} false",
        "# QoS 2 is never used, and its state has leaked before (CVE-2023-28366).",
        "max_qos 1",
    )


def _access(folder: PurePath, name: str, *, is_new: bool) -> tuple[str, ...]:
    return (f"plugin_use {name}",) if is_new else (f"acl_file {folder}/{name}",)
