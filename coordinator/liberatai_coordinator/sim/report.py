"""The page of a simulation: one record (`record.json`) and one self-contained page made from it."""

from pathlib import Path
from typing import Any, Final

import msgspec

from liberatai_coordinator.pictures import report as demo
from liberatai_coordinator.pictures.report import COLOURS, MARKERS
from liberatai_coordinator.sim.record import AWAY, DeviceRecord, Record
from liberatai_core.errors import ConfigError, MissingExtraError, NotFoundError
from liberatai_core.units import duration_text

TEMPLATES: Final = Path(__file__).parent / "templates"
PHASES: Final = {
    "idle": "#e2e6ea",
    "gated": "#c9d1d9",
    "fetching": "#0072b2",
    "training": "#e69f00",
    "sending": "#009e73",
    "failed": "#d55e00",
    "away": "#1b1f24",
}
"""What a bar of the time line means, and its colour."""
DRAWN: Final = 24
"""Devices in the time line."""
LISTED: Final = 200
"""Rows of a table."""
RECORD: Final = "record.json"
PAGE: Final = "report.html"


def write(record: Record, folder: Path) -> Path:
    """Write the record and its page into a folder, made if needed; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    page = folder / PAGE
    page.write_text(html(record), encoding="utf-8")
    return page


def read(folder: Path) -> Record:
    """Return the record in a folder.

    Raises:
        NotFoundError: there is none. ConfigError: it is damaged.
    """
    path = folder / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        raise NotFoundError(
            f"{path}: no simulation has ended here; start one with `liberatai sim up`"
        ) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None


def html(record: Record) -> str:
    """Return the whole page: no script, no file beside it, no network.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - only the page needs it
    except ImportError as error:
        raise MissingExtraError("the report needs jinja2: pip install 'liberatai[demo]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": demo.size, "percent": demo.percent, "seconds": duration_text}
    profiles = _profiles(record)
    page = environment.get_template("simulation.html.j2").render(
        record=record,
        profiles=profiles,
        colours={row["profile"]: row["colour"] for row in profiles},
        by_time=_curves(record, "at_s", "seconds of the job") if record.points else "",
        by_bytes=_curves(record, "kib", "KiB carried so far, per device") if record.points else "",
        time_line=_time_line(record),
        phases=PHASES,
        listed=LISTED,
        drawn=DRAWN,
        figures={one.profile: one.figure for one in record.points},
        figure_text=_figure_text(record),
    )
    return page + "\n"


def _figure_text(record: Record) -> str:
    if not record.points:
        return "-"
    best = [one.figure for one in record.points if one.version == record.points[-1].version]
    if record.figure == "accuracy":
        return demo.percent(max(best))
    return f"{min(best):.4f}"


def _profiles(record: Record) -> list[dict[str, Any]]:
    names = sorted({one.profile for one in record.devices})
    rows = []
    for place, name in enumerate(names):
        of = [one for one in record.devices if one.profile == name]
        rows.append(
            {
                "profile": name,
                "colour": COLOURS[place % len(COLOURS)],
                "devices": len(of),
                "rounds": sum(one.rounds for one in of) / len(of),
                "busy_s": sum(one.busy_s for one in of) / len(of),
                "up_bytes": sum(one.up_bytes for one in of) / len(of),
                "down_bytes": sum(one.down_bytes for one in of) / len(of),
            }
        )
    return rows


def _curves(record: Record, by: str, label: str) -> str:
    """Return a data URI: the figure of each profile's model by time, or by what its links carried."""
    figure, axes = demo.axes_of()
    accuracy = record.figure == "accuracy"
    for place, row in enumerate(_profiles(record)):
        points = [one for one in record.points if one.profile == row["profile"]]
        kib = [(one.up_bytes + one.down_bytes) / row["devices"] / 1024 for one in points]
        x = [one.at_s for one in points] if by == "at_s" else kib
        axes.plot(
            x,
            [100 * one.figure if accuracy else one.figure for one in points],
            color=row["colour"],
            marker=MARKERS[place % len(MARKERS)] if len(points) <= 40 else None,
            markersize=5,
            linewidth=max(1.4, 4.2 - 0.7 * place),  # lines that lie on each other are all seen
            label=row["profile"],
        )
    axes.set_xlabel(label)
    axes.set_ylabel("held-out samples recognised, %" if accuracy else "distance to the hidden weights")
    if not accuracy:
        axes.set_yscale("log")
    demo.legend(figure, axes)
    return demo.data_uri(figure)


def _shown(record: Record) -> list[DeviceRecord]:
    """Return the devices of the time line: some of every profile, those with faults first."""
    hit = {one.device for one in record.faults}
    with_moments = [one for one in record.devices if one.moments]
    by_profile: dict[str, list[DeviceRecord]] = {}
    for one in sorted(with_moments, key=lambda one: (one.id not in hit, one.id)):
        by_profile.setdefault(one.profile, []).append(one)
    each = max(1, DRAWN // max(1, len(by_profile)))
    return [one for _, of in sorted(by_profile.items()) for one in sorted(of[:each], key=lambda one: one.id)]


def _spans(device: DeviceRecord, record: Record, end_s: float) -> list[tuple[float, float, str]]:
    """Return (from, seconds, phase) of what a device did, from the job's creation on."""
    known = [(one.at_s, "away" if one.what in AWAY else one.what) for one in device.moments]
    phases = [(max(0.0, at_s - record.began_s), what) for at_s, what in known if what in PHASES]
    ends = [at_s for at_s, _ in phases[1:]] + [end_s]
    return [(at_s, max(0.0, until - at_s), what) for (at_s, what), until in zip(phases, ends, strict=True)]


def _time_line(record: Record) -> str:
    """Return a data URI: what some devices did when, with the faults."""
    devices = _shown(record)
    if not devices:
        return ""
    figure, axes = demo.axes_of((11.0, 1.4 + 0.27 * len(devices)))
    end_s = max(record.job_s, 0.001)
    for place, device in enumerate(devices):
        spans = _spans(device, record, end_s)
        for phase, colour in PHASES.items():
            axes.broken_barh(
                [(at_s, length) for at_s, length, what in spans if what == phase],
                (place - 0.36, 0.72),
                facecolors=colour,
                linewidth=0,
            )
    rows = {device.id: place for place, device in enumerate(devices)}
    marks = [(one.at_s, rows[one.device]) for one in record.faults if one.device in rows]
    if marks:
        axes.plot(*zip(*marks, strict=True), linestyle="", marker="v", color="#cf222e", markersize=6)
    for one in record.faults:
        if not one.device:
            axes.axvline(one.at_s, color="#cf222e", linewidth=1.2, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(devices)), [one.id for one in devices], fontsize=9)
    axes.set_ylim(len(devices) - 0.4, -0.6)
    axes.set_xlim(0, end_s)
    axes.set_xlabel("seconds of the job")
    axes.grid(visible=False, axis="y")
    for phase, colour in PHASES.items():
        axes.barh([0], [0], color=colour, label=phase)
    if record.faults:
        axes.plot([], [], linestyle="", marker="v", color="#cf222e", label="fault")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=10)
    return demo.data_uri(figure)
