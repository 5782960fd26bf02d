"""The weights of an ensemble, per structure and class: as numbers, as a picture, as a page of its own."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from liberatai_coordinator.client.views import EnsembleView
from liberatai_core.errors import ConfigError, DiskError, MissingExtraError

WHITE: Final = (255, 255, 255)
BLUE: Final = (0, 92, 151)
ORANGE: Final = (196, 84, 0)
"""Above and below zero: two colours that people with any colour vision tell apart."""
INK: Final = "#1b1f24"
DARK: Final = 0.7
"""Share of a colour from which on letters on it are white."""
MAX_LABELS: Final = 40
"""Classes that a picture names; of more it names every n-th."""
MAX_NUMBERS: Final = 16
"""Classes up to which a cell of the picture has room for its number."""
SUFFIXES: Final = (".png", ".html")

KINDS: Final = {
    "log": "weights of log-probabilities",
    "linear": "weights of probabilities",
    "vote": "weights of votes",
}


def sentence(view: EnsembleView) -> str:
    """Return in words how the structures of a version answer together, and what the guard made of it."""
    told = f"{view.method}, {KINDS.get(view.kind, view.kind)} per structure and class"
    if view.bias:
        told += f", and {min(view.bias):+.2f} to {max(view.bias):+.2f} added per class"
    if view.use != "ensemble":
        told += f"; not used: the guard fell back to {view.use}"
    return told


def spread(view: EnsembleView) -> float:
    """Return the largest weight without its sign: what has the full colour. 1 if all are zero."""
    return max((abs(weight) for row in view.weights for weight in row), default=0.0) or 1.0


def require(path: Path) -> None:
    """Raise now what would else be found out after the coordinator was asked.

    Raises:
        ConfigError: no picture and no page by its name.
        MissingExtraError: a picture, but matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError("--heat-map", [f"{path}: the name must end in .png or .html"])
    if path.suffix.lower() == ".png":
        _figure()


def write(view: EnsembleView, title: str, path: Path) -> None:
    """Write a PNG or a page, by the end of the file's name.

    Raises:
        ConfigError: another end.
        MissingExtraError: a PNG, but matplotlib is not installed.
        DiskError: the file cannot be written.
    """
    require(path)
    content = png(view, title) if path.suffix.lower() == ".png" else page(view, title).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror})") from None


# --- the page ------------------------------------------------------------------------------------


def page(view: EnsembleView, title: str) -> str:
    """Return a whole page: no script, no file beside it, no network."""
    told = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{told}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; margin: 32px 20px; }}
  h1 {{ font-size: 1.3rem; margin: 0; }}
  p {{ color: #57606a; margin: .3em 0 1.2em; }}
  div {{ overflow-x: auto; }}
  table {{ border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }}
  th {{ font-weight: 600; font-size: .85rem; color: #57606a; text-align: right; padding: 4px 8px; }}
  td {{ text-align: right; padding: 6px 10px; border-radius: 4px; min-width: 3.2em; }}
</style>
</head>
<body>
<h1>{told}</h1>
<p>{html.escape(sentence(view))}.</p>
<div>{table(view)}</div>
</body>
</html>
"""


def table(view: EnsembleView) -> str:
    """Return the coloured table alone, for a page that has more; classes run down if there are many."""
    most, classes = spread(view), len(view.weights[0]) if view.weights else 0
    cells = [[_cell(weight, most) for weight in row] for row in view.weights]
    members, numbers = [html.escape(one) for one in view.members], [str(one) for one in range(classes)]
    if classes > MAX_LABELS:
        cells = [list(column) for column in zip(*cells, strict=True)]
        return _table("class", members, numbers, cells)
    return _table("structure \\ class", numbers, members, cells)


def _table(corner: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in (corner, *columns))
    body = "\n".join(f"<tr><th>{name}</th>{''.join(row)}</tr>" for name, row in zip(rows, cells, strict=True))
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _cell(weight: float, most: float) -> str:
    share = abs(weight) / most
    ink = "#ffffff" if share > DARK else INK
    return f'<td style="background: {colour(weight, most)}; color: {ink}">{weight:.2f}</td>'


def colour(weight: float, most: float) -> str:
    """Return the colour of a weight, white at zero: "#rrggbb"."""
    share, full = min(1.0, abs(weight) / most), BLUE if weight >= 0 else ORANGE
    mixed = (round(light + share * (dark - light)) for light, dark in zip(WHITE, full, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


# --- the picture ---------------------------------------------------------------------------------


def png(view: EnsembleView, title: str) -> bytes:
    """Return the picture as a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure()
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 - see `_figure`

    members, classes = len(view.members), len(view.weights[0]) if view.weights else 0
    figure.set_size_inches(min(16.0, 3.0 + 0.55 * max(8, classes)), 1.7 + 0.5 * max(1, members))
    axes, most = figure.add_subplot(), spread(view)
    below = any(weight < 0 for row in view.weights for weight in row)
    ends = [colour(-1.0, 1.0), colour(0.0, 1.0), colour(1.0, 1.0)] if below else ["#ffffff", colour(1.0, 1.0)]
    drawn = axes.imshow(
        view.weights,
        aspect="auto",
        interpolation="nearest",
        cmap=LinearSegmentedColormap.from_list("weights", ends),
        vmin=-most if below else 0.0,
        vmax=most,
    )
    every = max(1, -(-classes // MAX_LABELS))
    axes.set_xticks(range(0, classes, every))
    axes.set_yticks(range(members), view.members)
    axes.set_xlabel("class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if classes <= MAX_NUMBERS:
        for place, row in enumerate(view.weights):
            for number, weight in enumerate(row):
                ink = "white" if abs(weight) / most > DARK else INK
                axes.text(number, place, f"{weight:.2f}", ha="center", va="center", color=ink, fontsize=9)
        # White lines between the cells.
        axes.set_xticks([one - 0.5 for one in range(1, classes)], minor=True)
        axes.set_yticks([one - 0.5 for one in range(1, members)], minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    axes.set_title(_wrapped(sentence(view)), fontsize=9, loc="left", color="#57606a")
    figure.colorbar(drawn, ax=axes, label="weight", fraction=0.05, pad=0.02).outline.set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()


def _wrapped(text: str) -> str:
    return text.replace("; ", "\n")


def _figure() -> Any:
    """Return an empty figure without a global state (no pyplot: other threads may draw too)."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - 0.5 s that only a picture needs
    except ImportError as error:
        raise MissingExtraError(
            "a heat map as .png needs matplotlib: pip install 'liberatai[demo]'"
        ) from error
    return Figure(layout="constrained")
