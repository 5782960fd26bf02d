"""The folder that a Mosquitto reads: settings, access lists, certificates. Made once, then kept up to date.

mosquitto.conf      written by `init` alone
acl, acl-claims     who may read and write what, by either door
certs/server.pem    the broker's certificate and key
certs/ca.crt, ca.crl, claims.crt, claims.crl
reload              touched after every change: whoever watches it sends the broker SIGHUP
"""

import contextlib
import grp
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from liberatai_coordinator import clock
from liberatai_coordinator.authority.authority import KINDS, Authority
from liberatai_coordinator.authority.mosquitto import (
    MosquittoPlan,
    claim_acl,
    device_acl,
    mosquitto_conf,
)
from liberatai_coordinator.authority.signing import DAY_S, SERVER_DAYS
from liberatai_core.certificates import Facts, certificate_pem, facts, key_pem, new_key
from liberatai_core.errors import CertificateError, ConfigError, DiskError, LinkError
from liberatai_core.files import make_folder, write_durably

READABLE: Final = 0o640
"""The broker reads by its group; nobody else does."""
STAMP: Final = "reload"
RENEW_SHARE: Final = 2 / 3
"""Of a server's lifetime, after which it gets a new certificate."""
RELOAD_S: Final = 20.0


def init(plan: MosquittoPlan, authority: Authority, coordinator: str, hosts: Sequence[str]) -> None:
    """Write everything that a broker needs; what is there is replaced, but for a certificate that still fits.

    Args:
        plan: for the settings.
        authority: signs the broker's certificate.
        coordinator: common name of the coordinator's certificate.
        hosts: names and addresses by which devices reach the broker.

    Raises:
        ConfigError: no host. CertificateError: a host that is none. DiskError: a file cannot be written.
    """
    if not hosts:
        raise ConfigError("--host", ["give the names and addresses by which devices reach the broker"])
    folder = Path(plan.folder)
    try:
        make_folder(folder.parent, mode=0o755)
        folder.mkdir(mode=0o750, exist_ok=True)
        _let_in(folder, plan.user)
        (folder / "certs").mkdir(mode=0o750, exist_ok=True)
        _let_in(folder / "certs", plan.user)
        write_durably(folder / "mosquitto.conf", mosquitto_conf(plan).encode(), mode=READABLE)
    except OSError as error:
        raise DiskError(f"{error.filename or folder}: {error.strerror}") from error
    if not _serves(folder / "certs" / "server.pem", authority, hosts):
        _issue_server(folder, authority, hosts)
    sync(folder, authority, authority.fleet, coordinator, denied(folder))


def sync(
    folder: Path,
    authority: Authority | None,
    fleet: str,
    coordinator: str,
    denied: Collection[str],
    now_s: float | None = None,
) -> bool:
    """Bring access lists, lists of revoked certificates and the broker's certificate up to date.

    Args:
        folder: that the broker reads.
        authority: None: only the access lists.
        fleet: name in every topic.
        coordinator: common name of the coordinator's certificate.
        denied: devices that are shut out.
        now_s: Unix seconds; None: now.

    Returns:
        Whether something changed; then `reload` was touched.

    Raises:
        ConfigError: the folder is not one of a broker. DiskError: a file cannot be written.
    """
    if not (folder / "mosquitto.conf").is_file():
        raise ConfigError("broker_dir", [f"{folder} holds no mosquitto.conf: run `liberatai broker init`"])
    wanted = {
        folder / "acl": device_acl(fleet, coordinator, denied).encode(),
        folder / "acl-claims": claim_acl(fleet).encode(),
    }
    changed = False
    try:
        if authority is not None:
            for kind in KINDS:
                wanted[folder / "certs" / f"{kind}.crt"] = certificate_pem(authority.certificates[kind])
                wanted[folder / "certs" / f"{kind}.crl"] = (authority.folder / f"{kind}.crl").read_bytes()
            changed = renew_server(folder, authority, clock.wall() if now_s is None else now_s)
        for path, content in wanted.items():
            if _content(path) != content:
                write_durably(path, content, mode=READABLE)
                changed = True
        if changed:
            (folder / STAMP).write_text(f"{clock.wall()}\n")
    except OSError as error:
        raise DiskError(f"{error.filename or folder}: {error.strerror}") from error
    return changed


def renew_server(folder: Path, authority: Authority, now_s: float) -> bool:
    """Give the broker a new certificate for the same hosts when two thirds of the old one's life are over."""
    found = _facts_of(folder / "certs" / "server.pem")
    if found is None or now_s < found.start_s + RENEW_SHARE * (found.end_s - found.start_s):
        return False
    _issue_server(folder, authority, found.hosts)
    return True


def server_end_s(folder: Path) -> float | None:
    """Return when the broker's certificate ends (Unix seconds), None if there is none."""
    found = _facts_of(folder / "certs" / "server.pem")
    return found.end_s if found else None


def reload(command: Sequence[str] = (), pid_file: Path | None = None) -> None:
    """Let the broker load its lists anew.

    Args:
        command: that does it, e.g. ("systemctl", "reload", "mosquitto").
        pid_file: of a broker that gets SIGHUP instead.

    Raises:
        LinkError: it cannot be done.
    """
    if command:
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=RELOAD_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LinkError(f"{command[0]}: {error}") from error
        if done.returncode:
            raise LinkError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")
        return
    if pid_file is None:
        return
    try:
        os.kill(int(pid_file.read_text()), signal.SIGHUP)
    except (OSError, ValueError) as error:
        raise LinkError(f"{pid_file}: the broker could not be told to reload: {error}") from error


def default_reload() -> tuple[str, ...]:
    """Return the command that reloads a packaged Mosquitto on this machine, () where there is no systemd."""
    return ("systemctl", "reload", "mosquitto") if Path("/run/systemd/system").is_dir() else ()


def denied(folder: Path) -> tuple[str, ...]:
    """Return the devices that the list which is there shuts out."""
    lines = (_content(folder / "acl") or b"").decode(errors="replace").splitlines()
    return tuple(
        line.removeprefix("user ")
        for line, after in itertools.pairwise(lines)
        if line.startswith("user ") and after == "topic deny #"
    )


def _let_in(folder: Path, user: str) -> None:
    """Give a folder to the broker's group: it reads there, and files that come later are its group's."""
    with contextlib.suppress(KeyError, PermissionError):
        group = grp.getgrnam(user).gr_gid
        if os.geteuid() == 0 or group in os.getgroups():
            shutil.chown(folder, group=group)
    folder.chmod(0o2770)


def _serves(path: Path, authority: Authority, hosts: Sequence[str]) -> bool:
    found = _facts_of(path)
    return (
        found is not None
        and sorted(found.hosts) == sorted(hosts)
        and found.issuer == facts(authority.certificates["ca"]).name
        and found.end_s > clock.wall()
    )


def _facts_of(path: Path) -> Facts | None:
    content = _content(path)
    try:
        return facts(content) if content is not None else None
    except CertificateError:
        return None


def _issue_server(folder: Path, authority: Authority, hosts: Sequence[str]) -> None:
    key = new_key()
    der = authority.issue(key.public_key(), "server", hosts[0], SERVER_DAYS * DAY_S, hosts=hosts)
    try:
        write_durably(folder / "certs" / "server.pem", certificate_pem(der) + key_pem(key), mode=READABLE)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror}") from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
