"""The demo's report: one record (`report.json`) and one self-contained page (`report.html`) made from it."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from liberatai_coordinator.client.views import EnsembleView, LocalView
from liberatai_coordinator.pictures import heat_map
from liberatai_core.errors import MissingExtraError

ENSEMBLE_COLOUR = "#1b1f24"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette: told apart by people with any colour vision."""
MARKERS = ("o", "s", "^", "D", "v", "P")
TEMPLATES = Path(__file__).parent / "templates"


class DeviceLine(msgspec.Struct, frozen=True, kw_only=True):
    """One device.

    Attributes:
        variant_bytes: what the files of the newest model take on it.
        budget_bytes: what its profile lets the model's files take.
        why: the plan's words.
        class_counts: private samples per class; known only to the demo, which made the split.
        sent_bytes, received_bytes: its socket, from start to end.
    """

    id: str
    profile: str
    tier: str
    structure: str
    variant_bytes: int
    budget_bytes: int
    why: str
    samples: int = 0
    class_counts: tuple[int, ...] = ()
    sent_bytes: int = 0
    received_bytes: int = 0


class RoundLine(msgspec.Struct, frozen=True, kw_only=True):
    """One round. `accuracy` is on the test set, by structure and "ensemble"."""

    round: int
    seconds: float
    train_seconds_max: float
    up_bytes: int
    down_bytes: int
    accuracy: dict[str, float]
    teach_seconds: float = 0.0
    updates: int = 0
    invited: int = 0


class StructureRow(msgspec.Struct, frozen=True, kw_only=True):
    """One structure that took part."""

    id: str
    family: str
    parameters: int
    devices: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of the demo measured: the contents of `report.json`.

    Attributes:
        broker: what carried the messages, e.g. "mosquitto 2.0.18".
        protocol: MQTT's version.
        dense_bytes: float32 FedAvg of the same structures over the same rounds, payload only: per
            device and round 4 bytes per parameter down and up.
        total_bytes: sum over the devices' sockets, sent and received, from first to last byte.
        final: accuracy on the test set by structure, and "ensemble", "best_member" (the best single
            structure) and "centralised" (the largest structure trained on the pooled private data).
        orchestration_s_per_round: mean of seconds - train_seconds_max - teach_seconds; the first round
            includes the start of the devices' training processes, so the median stands beside it.
        versions: software.
        local: the newest figures that devices told of their own hold-outs, as sums.
        ensemble: how the newest version's structures answer together.
        merged: by which rule the last round was merged.
        baseline_epochs: how often "centralised" saw its data; a device saw its own just as often.
    """

    broker: str
    protocol: str
    seed: int
    devices: tuple[DeviceLine, ...]
    rounds: tuple[RoundLine, ...]
    dense_bytes: int
    total_bytes: int
    final: dict[str, float]
    orchestration_s_per_round: float
    versions: dict[str, str]
    orchestration_s_median: float = 0.0
    broker_lost: str = ""
    local: LocalView | None = None
    ensemble: EnsembleView | None = None
    merged: str = ""
    structures: tuple[StructureRow, ...] = ()
    model: str = ""
    model_versions: tuple[str, ...] = ()
    test_samples: int = 0
    validation_samples: int = 0
    unlabeled_samples: int = 0
    alpha: float = 0.0
    baseline_epochs: int = 0
    baseline_structure: str = ""
    seconds_total: float = 0.0
    machine: str = ""

    @property
    def ratio(self) -> float:
        """How many times less than dense FedAvg went over the sockets."""
        return self.dense_bytes / self.total_bytes if self.total_bytes else 0.0


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a folder, made if needed, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record, page = folder / "report.json", folder / "report.html"
    record.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    page.write_text(html(report), encoding="utf-8")
    return page, record


def read(text: bytes) -> Report:
    """Return the report that a `report.json` holds.

    Raises:
        msgspec.ValidationError: it is not one.
    """
    return msgspec.json.decode(text, type=Report)


def html(report: Report) -> str:
    """Return the whole page: no script, no file beside it, no network.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    environment = templates()
    colours = colours_of(report)
    page: str = environment.get_template("report.html.j2").render(
        report=report,
        colours=colours,
        ensemble_colour=ENSEMBLE_COLOUR,
        accuracy_picture=accuracy_picture(
            report.rounds, colours, "unseen digits recognised, %", report.final.get("centralised")
        ),
        bytes_picture=bytes_picture(report.rounds, report.dense_bytes),
        heat_map=heat_map.table(report.ensemble) if report.ensemble else "",
        how=heat_map.sentence(report.ensemble) if report.ensemble else "",
        families=sorted({row.family for row in report.structures}),
        profiles=len({device.profile for device in report.devices}),
    )
    return page + "\n"


def templates() -> Any:
    """Return what makes pages: templates of this folder, sizes and shares as filters.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - only the demo needs it
    except ImportError as error:
        raise MissingExtraError("the report needs jinja2: pip install 'liberatai[demo]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "percent": percent}
    return environment


def colours_of(report: Report) -> dict[str, str]:
    """Return a colour per structure that took part, largest structure first."""
    ids = [row.id for row in sorted(report.structures, key=lambda row: -row.parameters)]
    ids += sorted({device.structure for device in report.devices if device.structure} - set(ids))
    return {structure: COLOURS[place % len(COLOURS)] for place, structure in enumerate(ids)}


def accuracy_picture(
    lines: Sequence[RoundLine], colours: Mapping[str, str], what: str, centralised: float | None = None
) -> str:
    """Return a data URI: accuracy of every structure and of the ensemble by round.

    Args:
        lines: the rounds.
        colours: of the structures.
        what: was measured, for the axis.
        centralised: accuracy with all data in one place; None: nobody knows.
    """
    figure, axes = axes_of()
    rounds = [row.round for row in lines]
    for place, (structure, colour) in enumerate(colours.items()):
        axes.plot(
            rounds,
            [100 * row.accuracy.get(structure, float("nan")) for row in lines],
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=1.8,
            label=structure,
        )
    if any("ensemble" in row.accuracy for row in lines):
        ensemble = [100 * row.accuracy.get("ensemble", float("nan")) for row in lines]
        axes.plot(rounds, ensemble, color=ENSEMBLE_COLOUR, linewidth=3.2, label="ensemble")
    if centralised is not None:
        axes.axhline(100 * centralised, color="#8c959f", linestyle=(0, (4, 3)), linewidth=1.4)
        axes.plot(
            [], [], color="#8c959f", linestyle=(0, (4, 3)), linewidth=1.4, label="all data in one place"
        )
    axes.set_ylabel(what)
    _round_axis(axes, rounds)
    axes.set_ylim(top=101)
    legend(figure, axes)
    return data_uri(figure)


def bytes_picture(lines: Sequence[RoundLine], dense_bytes: int) -> str:
    """Return a data URI: bytes up to each round, against dense float32 FedAvg, on a logarithmic scale."""
    figure, axes = axes_of()
    rounds = [row.round for row in lines]
    dense_round = dense_bytes / max(1, len(rounds))
    dense = [dense_round * (place + 1) for place in range(len(rounds))]
    up = _running([row.up_bytes for row in lines])
    down = _running([row.down_bytes for row in lines])
    grey = {"color": "#8c959f", "linestyle": (0, (4, 3))}
    axes.plot(rounds, dense, linewidth=2.2, label="dense FedAvg, up + down", **grey)
    axes.plot(rounds, down, color=COLOURS[0], marker="v", linewidth=2.2, label="LiberatAI, to devices")
    axes.plot(rounds, up, color=COLOURS[1], marker="^", linewidth=2.2, label="LiberatAI, from devices")
    axes.set_yscale("log", base=4)  # 16 KiB, 64 KiB, 256 KiB, 1 MiB: round numbers of bytes
    axes.yaxis.set_major_formatter(lambda count, _: size(count))
    axes.set_ylabel("carried so far, all devices")
    _round_axis(axes, rounds)
    legend(figure, axes)
    return data_uri(figure)


def size(count: float) -> str:
    """Return a number of bytes for people: "812 B", "12.3 KiB", "4.1 MiB"."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def percent(share: float) -> str:
    """Return a share for people: "97.2 %"."""
    return f"{100 * share:.1f} %"


def _running(values: Sequence[int]) -> list[int]:
    total, sums = 0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def axes_of(size: tuple[float, float] = (5.4, 4.4)) -> tuple[Any, Any]:
    """Return a figure without a global state (no pyplot: other threads may draw too)."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - only the demo needs it
    except ImportError as error:
        raise MissingExtraError("the report needs matplotlib: pip install 'liberatai[demo]'") from error
    # Narrow and with large letters: still readable when a telephone shows it at half the size.
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d0d7de")
    axes.grid(visible=True, color="#eaeef2", linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=12, colors="#424a53", length=0)
    axes.yaxis.label.set_fontsize(12)
    axes.xaxis.label.set_fontsize(12)
    return figure, axes


def _round_axis(axes: Any, rounds: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - see axes_of

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    if len(rounds) == 1:
        axes.set_xlim(rounds[0] - 1, rounds[0] + 1)


def legend(figure: Any, axes: Any) -> None:
    """Let a legend stand below the picture."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=12)


def data_uri(figure: Any) -> str:
    """Return a picture as a page holds it."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=180, facecolor="white")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
