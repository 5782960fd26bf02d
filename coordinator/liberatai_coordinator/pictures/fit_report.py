"""What `models fit` found: one record (`fit.json`) and one picture of it (`fit.png`)."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from liberatai_core.errors import DiskError, MissingExtraError

BLUE: Final = "#0072b2"
ORANGE: Final = "#d55e00"
"""Of Okabe and Ito's palette: told apart by people with any colour vision."""
GREY: Final = "#57606a"
LINE_POINTS: Final = 12
"""Height of a line of a label, in printer's points."""
CLOSE: Final = 0.07
"""Share of the axis that a value's label takes."""


class FitPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One variant.

    Attributes:
        ratio: how many times smaller than the original as float32.
        bits_per_weight: of the file, per weight of its own structure.
        divergence: mean KL divergence (nats) of its outputs from the original's; None: not measured.
        agreement: share of samples with the original's top class; None: not measured.
        accuracy: on the test file; None if there was none.
        smaller: its structure is not the original's.
        pareto: no other variant is smaller and loses less (`fitting.pareto`).
        id: in the repository; "" if it was not committed.
    """

    budget_bytes: int
    file_bytes: int
    ratio: float
    bits_per_weight: float
    divergence: float | None
    agreement: float | None
    accuracy: float | None
    structure: str
    smaller: bool
    method: str
    why: str
    seconds: float
    pareto: bool
    id: str = ""


class FitReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `models fit`: the contents of `fit.json`.

    Attributes:
        parent: id of the version that was fitted.
        float32_bytes: the original without compression.
        unlabeled_samples: 0 if there were none; then `lost` says what that costs.
        judged_samples: unlabeled ones behind divergence and agreement.
        judged_apart: whether those taught nothing; with a few samples all teach and judge.
        accuracy: of the original on the test file; None if there was none.
    """

    model: str
    version: int
    parent: str
    structure: str
    parameters: int
    float32_bytes: int
    seed: int
    unlabeled_samples: int
    judged_samples: int
    judged_apart: bool
    test_samples: int
    accuracy: float | None
    dry_run: bool
    points: tuple[FitPoint, ...]
    lost: str = ""


def require_parts(folder: Path) -> None:
    """Make the folder of a report, and raise now what would else be found out after a long fit.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DiskError: the folder cannot be made.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("--report needs matplotlib: pip install 'liberatai[demo]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made ({error.strerror})") from None


def write(report: FitReport, folder: Path) -> list[Path]:
    """Write `fit.json` and, where something was measured, `fit.png`; return the paths of what was written.

    Raises:
        DiskError: a file cannot be written.
    """
    record, picture = folder / "fit.json", folder / "fit.png"
    written = [record]
    try:
        record.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        figure = draw(report)
        if figure is not None:
            figure.savefig(picture, format="png", dpi=160, facecolor="white")
            written.append(picture)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written ({error.strerror})") from None
    return written


def draw(report: FitReport) -> Any:
    """Return the picture: bytes of the file (log) against agreement and accuracy; None without either."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - 0.5 s that only a report needs

    points = sorted(report.points, key=lambda point: point.file_bytes)
    series = [
        (name, colour, marker, [(p, v) for p, v in zip(points, values, strict=True) if v is not None])
        for name, colour, marker, values in (
            ("agrees with the original", BLUE, "o", [p.agreement for p in points]),
            ("accuracy on the test file", ORANGE, "s", [p.accuracy for p in points]),
        )
    ]
    series = [one for one in series if one[3]]
    if not series:
        return None
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for name, colour, marker, pairs in series:
        xs, ys = [point.file_bytes for point, _ in pairs], [value for _, value in pairs]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=7, linewidth=1.4, label=name)
        hollow = [pair for pair in pairs if pair[0].smaller]
        xs, ys = [point.file_bytes for point, _ in hollow], [value for _, value in hollow]
        axes.plot(xs, ys, marker, color=colour, markerfacecolor="white", markersize=7)
    if report.accuracy is not None:
        name = f"original: {report.accuracy:.1%} in {_size(report.float32_bytes)}"
        axes.axhline(report.accuracy, color=ORANGE, linestyle="--", linewidth=1.1, label=name)
    _scales(axes, report, [value for *_, pairs in series for _, value in pairs])
    _value_labels(axes, [(colour, pairs) for _, colour, _, pairs in series])
    _size_ticks(axes, points)
    weights = f"{report.parameters:,}".replace(",", " ")
    title = f"{report.model} version {report.version}, {report.structure}: {weights} weights"
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel("file, and how many times smaller than float32 (log scale)")
    if any(point.smaller for point in points):
        axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="a smaller structure")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#eaeef2", linewidth=0.9)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return figure


def _scales(axes: Any, report: FitReport, values: list[float]) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter  # noqa: PLC0415 - see `draw`

    sizes = [point.file_bytes for point in report.points]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
    axes.xaxis.set_minor_locator(NullLocator())
    shown = values if report.accuracy is None else [*values, report.accuracy]
    room = max(0.02, max(shown) - min(shown))
    # A fifth on both sides for the labels; nobody agrees on more than all samples.
    low, high = min(shown) - 0.2 * room, max(shown) + 0.2 * room
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(1.0, high)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if room > 0.05 else 1))


def _value_labels(axes: Any, series: Sequence[tuple[str, list[tuple[FitPoint, float]]]]) -> None:
    """Write every value: above the upper line, below the lower one; close neighbours take turns in height."""
    above = max(range(len(series)), key=lambda place: sum(value for _, value in series[place][1]))
    low, high = axes.get_xlim()
    for place, (colour, pairs) in enumerate(series):
        side = 1 if place == above else -1
        turn, before = 0, 0.0
        for point, value in pairs:
            close = before and math.log(point.file_bytes / before) < CLOSE * math.log(high / low)
            turn, before = (1 - turn if close else 0), point.file_bytes
            axes.annotate(
                f"{value:.1%}",
                (point.file_bytes, value),
                xytext=(0, side * (7 + turn * LINE_POINTS)),
                textcoords="offset points",
                ha="center",
                va="bottom" if side > 0 else "top",
                fontsize=8.5,
                color=colour if point.pareto else GREY,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )


def _size_ticks(axes: Any, points: Sequence[FitPoint]) -> None:
    """Name every file on the axis: its size, its ratio, and its structure if it is a smaller one."""
    names = {
        point.file_bytes: f"{_size(point.file_bytes)}, {point.ratio:.0f}x"
        + (f", {point.structure}" if point.smaller else "")
        for point in points
    }
    axes.set_xticks(list(names), list(names.values()), rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize=8.5)


def _size(size_bytes: float) -> str:
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    if size_bytes < 1_000_000:
        return f"{size_bytes / 1000:.3g} KB"
    return f"{size_bytes / 1e6:.3g} MB"
