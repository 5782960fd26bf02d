"""`liberatai devices`: who is there, who is let in."""

import sys
import time
from typing import Annotated

import msgspec
import typer

from liberatai_coordinator.cli import device_verbs, invite
from liberatai_coordinator.cli.device_verbs import Group, KeyOption, Names, Selector, each, meant
from liberatai_coordinator.cli.kit import client_of, complete_device, group
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    WatchOption,
    ago_text,
    clean,
    count_text,
    rate_text,
    show,
    show_list,
    show_one,
    size_text,
    when_text,
)
from liberatai_coordinator.client.views import ConditionView, ContributionView, DeviceView

app = group("Devices of the fleet: who is there, who is let in.", "liberatai devices list")


@app.command("list", epilog="Example: liberatai devices list -o wide")
def devices_list(
    context: typer.Context,
    selector: Selector = "",
    group: Group = "",
    where: Annotated[
        str, typer.Option("--where", help="Devices of which this is true: 'ram_mb >= 2000 and online'.")
    ] = "",
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """List devices: all, or those that fit."""
    with client_of(context) as client:
        if watch:
            show_list(lambda: client.devices.list(selector, where, group), DEVICE_COLUMNS, output, watch=True)
        devices, health = client.devices.list(selector, where, group), client.health()
    show(devices, DEVICE_COLUMNS, output)
    for refused in (*health.get("faults", []), *health.get("broker_refuses", [])):
        print(f"liberatai: {clean(refused)}", file=sys.stderr)
    if not devices and output is Output.TABLE and not (selector or where or group):
        hint = "no device was ever heard: `liberatai-agent doctor` on it says whether the broker refuses it"
        print(f"liberatai: {hint}", file=sys.stderr)


@app.command("show", epilog="Example: liberatai devices show gateway-01")
def devices_show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the device.", autocompletion=complete_device)],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show everything that is known of one device."""
    with client_of(context) as client:
        view = client.devices.show(name)
    if not output.is_table:
        show_one(view, output)
        return
    tables = {"conditions", "contributions"}
    show_one({name: value for name, value in msgspec.to_builtins(view).items() if name not in tables}, output)
    if view.conditions:
        print()
        show(view.conditions, _CONDITION_COLUMNS, output)
    if view.contributions:
        print()
        print("what its updates gave, the newest first:")
        show(view.contributions, _CONTRIBUTION_COLUMNS, output)


@app.command("approve", epilog="Example: liberatai devices approve gateway-01 camera-07")
def devices_approve(context: typer.Context, names: Names = None, key: KeyOption = "") -> None:
    """Let pending devices in; with --key one whose key was compared."""
    with client_of(context) as client:
        each(meant(client, names, "", ""), lambda name: client.devices.approve(name, key), "approved")


@app.command("quarantine", epilog="Example: liberatai devices quarantine camera-07 --reason 'sends nonsense'")
def devices_quarantine(
    context: typer.Context,
    names: Names = None,
    selector: Selector = "",
    group: Group = "",
    reason: Annotated[str, typer.Option(help="Why; shown by `devices show` and in events.")] = "",
) -> None:
    """Shut devices out: what they send is refused until they are released."""
    with client_of(context) as client:
        each(
            meant(client, names, selector, group),
            lambda name: client.devices.quarantine(name, reason),
            "quarantined",
        )


@app.command("release", epilog="Example: liberatai devices release camera-07")
def devices_release(
    context: typer.Context, names: Names = None, selector: Selector = "", group: Group = ""
) -> None:
    """Let quarantined devices in again."""
    with client_of(context) as client:
        each(meant(client, names, selector, group), client.devices.release, "released")


device_verbs.add_to(app)
invite.add_to(app)
invite.add_to(app)


def _certificate(end_s: float) -> str:
    """Return for how long a device's certificate is valid; "" where another authority made it."""
    if not end_s:
        return ""
    days = (end_s - time.time()) / 86_400
    if days <= 0:
        return f"ended {-days:.0f} d ago"
    return f"{days:.0f} d" if days >= 2 else f"{max(0.1, days * 24):.2g} h"


def _link_words(device: DeviceView) -> str:
    words = ["measured" if device.link_measured else "by profile" if device.up_bits_s else "unknown"]
    if device.metered:
        words.append("metered")
    if device.day_quota_bytes:
        words.append(f"{size_text(device.day_quota_bytes)} a day{', used up' if device.quota_spent else ''}")
    return ", ".join(words)


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items()))


DEVICE_COLUMNS: list[Column[DeviceView]] = [
    Column("DEVICE", lambda row: row.id),
    Column("STATUS", lambda row: row.status),
    Column("STATE", lambda row: f"{row.state}, drained" if row.drained else row.state),
    Column("PHASE", lambda row: row.phase),
    Column("SEEN", lambda row: ago_text(row.last_seen_s), right=True),
    Column("STRUCTURE", lambda row: row.structure),
    Column("JOB", lambda row: f"{row.job}/{row.round}" if row.job else ""),
    Column("CERT", lambda row: _certificate(row.certificate_end_s), right=True),
    Column("PROFILE", lambda row: row.profile),
    Column("TIER", lambda row: row.tier),
    Column("STORAGE", lambda row: size_text(row.storage_bytes), right=True),
    Column("KEY", lambda row: f"key {row.key}" if row.status == "pending" else "", note=True, rare=True),
    Column("MEMORY", lambda row: size_text(row.memory_bytes), wide=True, right=True),
    Column("CPU", lambda row: f"{row.cpu_share:g} of {row.cores} {row.arch}", wide=True),
    Column("FORM", lambda row: row.form, wide=True),
    Column("GFLOPS", lambda row: "-" if row.gflops is None else f"{row.gflops:.1f}", wide=True, right=True),
    Column("UPLINK", lambda row: rate_text(row.up_bits_s), wide=True, right=True),
    Column("DOWNLINK", lambda row: rate_text(row.down_bits_s), wide=True, right=True),
    Column("LINK", _link_words, wide=True),
    Column("SAMPLES", lambda row: count_text(row.samples), wide=True, right=True),
    Column("SENT", lambda row: size_text(row.sent_bytes), wide=True, right=True),
    Column("RECEIVED", lambda row: size_text(row.received_bytes), wide=True, right=True),
    Column("UPDATES", lambda row: count_text(row.updates), wide=True, right=True),
    Column("VERSION", lambda row: row.agent_version, wide=True),
    Column("LABELS", lambda row: ",".join(f"{k}={v}" for k, v in sorted(row.labels.items())), wide=True),
    Column("FINGERPRINT", lambda row: row.key, wide=True),
    Column("REFUSALS", lambda row: _counts(row.refusals), wide=True),
    Column("REASON", lambda row: row.reason, wide=True, note=True),
]
_CONDITION_COLUMNS: list[Column[ConditionView]] = [
    Column("CONDITION", lambda row: row.name),
    Column("HOLDS", lambda row: "yes" if row.holds else "no"),
    Column("SINCE", lambda row: when_text(row.since_s) if row.since_s else ""),
    Column("REASON", lambda row: row.reason, note=True),
]
_CONTRIBUTION_COLUMNS: list[Column[ContributionView]] = [
    Column("JOB", lambda row: row.job),
    Column("ROUND", lambda row: str(row.round), right=True),
    Column("VERDICT", lambda row: row.verdict),
    Column("NORM", lambda row: f"{row.norm:.4g}", right=True),
    Column("COSINE", lambda row: f"{row.cosine:.3f}", right=True),
]
