"""`liberatai profiles`: the classes of hardware that come with LiberatAI, or lie in a folder."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from liberatai_coordinator.cli.kit import group
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, dump, show

if TYPE_CHECKING:
    from liberatai_core.profile import Profile

app = group("Show classes of hardware.", "liberatai profiles show pi4")

Folder = Annotated[
    Path | None, typer.Option("--dir", help="Folder of profiles [default: those that are installed].")
]

UNITS: Final = {
    "cores": "processors",
    "clock_mhz": "MHz",
    "ram_mb": "MiB",
    "cpu_share": "processors",
    "memory_mb": "MiB",
    "storage.model_kb": "KiB",
    "storage.write_mb_s": "MB/s",
    "net.up_mbit": "Mbit/s",
    "net.down_mbit": "Mbit/s",
    "net.rtt_ms": "ms",
    "net.jitter_ms": "ms",
    "net.loss_percent": "%",
    "gflops": "Gflop/s per core",
    "power.idle_w": "W",
    "power.load_w": "W",
    "leaves.count": "devices",
    "leaves.ram_kb": "KiB",
    "leaves.flash_kb": "KiB",
    "leaves.link_kbit": "kbit/s",
}


@dataclass(frozen=True, slots=True)
class Number:
    """One number of a profile, as it is shown."""

    key: str
    value: float
    unit: str
    assumed: bool
    source: str


@app.command("list", epilog="Example: liberatai profiles list -o json")
def list_profiles(folder: Folder = None, output: OutputOption = Output.TABLE) -> None:
    """List the classes of hardware; a star marks what nobody measured."""
    from liberatai_core.profile import load_profile, profile_names

    profiles = [load_profile(name, "profiles", folder) for name in profile_names(folder)]
    show(profiles, COLUMNS, output)


@app.command("show", epilog="Example: liberatai profiles show pi-zero-2w")
def show_profile(
    name: Annotated[str, typer.Argument(help="Name of a profile, or the path of a file (with a slash).")],
    folder: Folder = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show every number of one class of hardware, with its unit and where it comes from."""
    from liberatai_core.profile import load_profile

    profile = load_profile(name, "profile", folder)
    if output in (Output.JSON, Output.YAML):
        dump(profile, output)
        return
    print(f"{profile.id}: {profile.description}\n")
    show(numbers_of(profile), NUMBERS, output)


def numbers_of(profile: "Profile") -> list[Number]:
    """Return the numbers of a profile with unit and source."""
    from liberatai_core.profile import is_assumed, numbers, source_of

    return [
        Number(key, value, UNITS[key], is_assumed(profile, key), source_of(profile, key))
        for key, value in numbers(profile)
    ]


def _marked(profile: "Profile", key: str, text: str) -> str:
    from liberatai_core.profile import is_assumed

    return f"{text}*" if is_assumed(profile, key) else text


COLUMNS: "tuple[Column[Profile], ...]" = (
    Column("PROFILE", lambda row: row.id),
    Column("ARCH", lambda row: row.arch, wide=True),
    Column("CORES", lambda row: _marked(row, "cores", str(row.cores)), right=True),
    Column("MEMORY", lambda row: f"{row.memory_mb:g} MiB", right=True),
    Column("MODEL", lambda row: f"{row.storage.model_kb / 1024:g} MiB", right=True),
    Column(
        "UP/DOWN MBIT/S",
        lambda row: _marked(row, "net", f"{row.net.up_mbit:g}/{row.net.down_mbit:g}"),
        right=True,
    ),
    Column("RTT", lambda row: _marked(row, "net", f"{row.net.rtt_ms:g} ms"), wide=True, right=True),
    Column("GFLOPS", lambda row: _marked(row, "gflops", f"{row.gflops:.1f}"), right=True),
    Column("DESCRIPTION", lambda row: row.description),
)

NUMBERS: "tuple[Column[Number], ...]" = (
    Column("KEY", lambda row: row.key),
    Column("VALUE", lambda row: f"{row.value:g}", right=True),
    Column("UNIT", lambda row: row.unit),
    Column("ASSUMED", lambda row: "assumed" if row.assumed else ""),
    Column("SOURCE", lambda row: row.source or "not given"),
)
