"""`liberatai ca`: the fleet's certificate authority. Works on its folder, also where no coordinator runs."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from liberatai_coordinator.cli.kit import group
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, show, when_text
from liberatai_core.errors import CertificateError, ConfigError, DiskError

if TYPE_CHECKING:
    from liberatai_coordinator.authority.authority import Authority, Issued

DEFAULT_CA: Final = "/var/lib/liberatai/ca"
DEFAULT_DAYS: Final = 90.0
"""A stolen device is useless after that even if nobody notices."""
CaOption = Annotated[
    Path, typer.Option("--ca", envvar="LIBERATAI_CA", help="Folder of the authority.", show_default=True)
]
Role = Annotated[str, typer.Option(help="device, coordinator, server or claim.")]
Out = Annotated[Path, typer.Option("--out", help="File for certificate and key, both in one (PEM).")]
Days = Annotated[float, typer.Option(min=0.01, max=3650, help="How long it is valid.")]

app = group("The fleet's certificate authority: who may connect to the broker.", "liberatai ca list")


@app.command("init", epilog="Example: liberatai ca init --fleet default")
def ca_init(
    fleet: Annotated[str, typer.Option(help="Name of the fleet, as in every topic.")] = "default",
    ca: CaOption = Path(DEFAULT_CA),
) -> None:
    """Make the authority: its keys, its certificates, empty lists of revoked ones. Never over an old one."""
    from liberatai_coordinator.authority.authority import Authority

    made = Authority.create(ca, fleet)
    print(f"authority of fleet {made.fleet}: {ca}")
    print(f"keep {ca}/*.key secret and copied: whoever has them can join, and without them nobody can")


@app.command("issue", epilog="Example: liberatai ca issue gateway-01 --out gateway-01.pem")
def ca_issue(
    name: Annotated[str, typer.Argument(help="Common name: the device's, the coordinator's, or a host.")],
    out: Out,
    role: Role = "device",
    host: Annotated[list[str] | None, typer.Option(help="Further name or address of a server.")] = None,
    days: Days = DEFAULT_DAYS,
    ca: CaOption = Path(DEFAULT_CA),
) -> None:
    """Make a key and its certificate by hand. A device that joins by a token needs none of this."""
    authority = _authority(ca)
    _issue(authority, name, role, days, out, (name, *(host or ())) if role == "server" else ())
    print(f"{out}: certificate and key of {role} {name}, valid for {days:g} days")


@app.command("renew", epilog="Example: liberatai ca renew gateway-01.pem")
def ca_renew(
    file: Annotated[Path, typer.Argument(help="Certificate and key, as `issue` wrote them.")],
    days: Days = DEFAULT_DAYS,
    ca: CaOption = Path(DEFAULT_CA),
) -> None:
    """Replace a certificate by a new one of the same holder, with a new key. The old one stays valid."""
    from liberatai_core.certificates import facts

    authority = _authority(ca)
    try:
        found = facts(file.read_bytes())
    except OSError as error:
        raise ConfigError(str(file), [f"cannot be read: {error.strerror}"]) from None
    if found.fleet != authority.fleet:
        raise CertificateError(f"{file}: not of the authority in {ca}, but of {found.issuer!r}")
    serial = f"{found.serial:x}"
    if any(one.serial == serial and one.revoked_s is not None for one in authority.issued()):
        raise CertificateError(f"{file}: {found.name} was revoked: who shall come back gets `ca issue`")
    _issue(authority, found.name, found.role, days, file, found.hosts)
    print(f"{file}: new certificate and key of {found.role} {found.name}, valid for {days:g} days")


@app.command("revoke", epilog="Example: liberatai ca revoke gateway-01 --reason 'stolen'")
def ca_revoke(
    name: Annotated[str, typer.Argument(help="Common name, or the number of one certificate with --serial.")],
    reason: Annotated[str, typer.Option(help="Why; shown in the list.")] = "",
    serial: Annotated[bool, typer.Option("--serial", help="NAME is a certificate's number.")] = False,
    ca: CaOption = Path(DEFAULT_CA),
) -> None:
    """Revoke all certificates of a name. The broker refuses new connections once it has the new list."""
    authority = _authority(ca)
    gone = [authority.revoke_serial(name, reason)] if serial else authority.revoke(name, reason)
    print(f"{gone[0].name}: revoked ({len(gone)} certificate{'s' if len(gone) != 1 else ''})")
    print("now: liberatai broker sync; an open connection stays until the device is quarantined")


@app.command("list", epilog="Example: liberatai ca list --all -o wide")
def ca_list(
    everything: Annotated[bool, typer.Option("--all", help="Also what has ended.")] = False,
    ca: CaOption = Path(DEFAULT_CA),
    output: OutputOption = Output.TABLE,
) -> None:
    """List the certificates that were issued."""
    now_s = time.time()
    found = [one for one in _authority(ca).issued() if everything or one.state(now_s) != "expired"]
    show(sorted(found, key=lambda one: (one.name, one.end_s)), _COLUMNS, output)


def _authority(folder: Path) -> "Authority":
    from liberatai_coordinator.authority.authority import Authority

    return Authority(folder)


def _issue(
    authority: "Authority", name: str, role: str, days: float, out: Path, hosts: tuple[str, ...]
) -> None:
    import msgspec

    from liberatai_coordinator.authority import signing
    from liberatai_core.certificates import ROLES, certificate_pem, key_pem, new_key
    from liberatai_core.files import write_durably

    if role not in ROLES:
        raise ConfigError("--role", [f"{role!r}: must be one of {', '.join(ROLES)}"])
    key = new_key()
    kind = msgspec.convert(role, signing.Role)
    der = authority.issue(key.public_key(), kind, name, days * signing.DAY_S, hosts=hosts)
    try:
        write_durably(out, certificate_pem(der) + key_pem(key))
    except OSError as error:
        raise DiskError(f"{out}: {error.strerror}") from error


def days_text(end_s: float) -> str:
    """Return how long a certificate is still valid."""
    left_s = end_s - time.time()
    if left_s <= 0:
        return "ended"
    return f"{left_s / 86_400:.0f} d" if left_s >= 2 * 86_400 else f"{left_s / 3600:.0f} h"


_COLUMNS: "list[Column[Issued]]" = [
    Column("NAME", lambda row: row.name),
    Column("ROLE", lambda row: row.role),
    Column("STATE", lambda row: row.state(time.time())),
    Column("LEFT", lambda row: days_text(row.end_s), right=True),
    Column("ENDS", lambda row: when_text(row.end_s)),
    Column("REASON", lambda row: row.reason),
    Column("SERIAL", lambda row: row.serial, wide=True),
    Column("SINCE", lambda row: when_text(row.start_s), wide=True),
]
