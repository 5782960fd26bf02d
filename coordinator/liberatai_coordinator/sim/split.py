"""One data file for many devices: split evenly, unevenly by class, or as its owners did."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import ConfigError, DataError

TEST_SHARE: Final = 0.1
"""Held out before the split, for the report only."""
GROUP: Final = "group"
"""Key of the array that says whose each sample is, for a natural split."""

Rows = NDArray[np.int64]


def split(
    path: Path, parts: Mapping[str, int], how: str, seed: int, folder: Path
) -> tuple[dict[str, Path], tuple[Any, Any]]:
    """Write a private file for every device.

    Args:
        path: .npz with `x`, shape (n, …), and `y`, shape (n,); with `group`, shape (n,), for a natural split.
        parts: sources of data by device: 1, or the leaves of a gateway.
        how: "even", "dirichlet:ALPHA" or "natural".
        seed: of the split.
        folder: where to.

    Returns:
        File by device, and inputs and labels of the samples that no device has.

    Raises:
        ConfigError: `how` is none of these. DataError: the file does not do.
    """
    x, y, group = arrays(path)
    random = np.random.default_rng([seed, 0x5711])
    order = random.permutation(len(y))
    held = order[: max(1, int(len(y) * TEST_SHARE))]
    rows = order[len(held) :]
    owners = [name for name, count in parts.items() for _ in range(count)]
    if len(rows) < len(owners):
        raise DataError(f"{path}: {len(rows)} samples for {len(owners)} devices and leaves")
    made = _split(how, rows, y, group, len(owners), random)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in parts:
        own = np.sort(np.concatenate([made[place] for place, owner in enumerate(owners) if owner == name]))
        files[name] = folder / f"{name}.npz"
        np.savez(files[name], x=x[own], y=y[own])
    return files, (x[held].astype(np.float32), y[held].astype(np.int64))


def check(how: str) -> None:
    """Raise ConfigError unless this is a way to split."""
    if how not in ("even", "natural"):
        _alpha(how)


def _alpha(how: str) -> float:
    name, _, number = how.partition(":")
    try:
        alpha = float(number)
    except ValueError:
        alpha = 0.0
    if name != "dirichlet" or not 0 < alpha <= 1e6:
        raise ConfigError("--split", [f'must be even, natural or dirichlet:ALPHA, ALPHA > 0 (got "{how}")'])
    return alpha


def arrays(path: Path) -> tuple[Any, Any, Any]:
    """Return `x`, `y` and `group` (None if it is not there) of a data file, or raise DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("x", "y", GROUP) if name in file}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if "x" not in found or "y" not in found or len(found["x"]) != len(found["y"]) or not len(found["y"]):
        raise DataError(f"{path}: needs x and y of the same length")
    if GROUP in found and len(found[GROUP]) != len(found["y"]):
        raise DataError(f"{path}: {GROUP} has another length than y")
    return found["x"], found["y"], found.get(GROUP)


def _split(how: str, rows: Rows, y: Any, group: Any, count: int, random: np.random.Generator) -> list[Rows]:
    if how == "even":
        return [part.astype(np.int64) for part in np.array_split(rows, count)]
    if how == "natural":
        if group is None:
            raise DataError(f"a natural split needs an array {GROUP!r}: whose each sample is")
        owners = np.unique(group[rows])
        if len(owners) < count:
            raise DataError(
                f"{len(owners)} groups for {count} devices and leaves: fewer devices, or another split"
            )
        made: list[list[Any]] = [[] for _ in range(count)]
        for place, owner in enumerate(random.permutation(owners)):
            made[place % count].append(rows[group[rows] == owner])
        return [np.concatenate(part).astype(np.int64) for part in made]
    return _filled(_dirichlet(_alpha(how), rows, y, count, random))


def _dirichlet(alpha: float, rows: Rows, y: Any, count: int, random: np.random.Generator) -> list[Rows]:
    """Return a share of each class for each part, drawn from a symmetric Dirichlet distribution."""
    made: list[list[Rows]] = [[] for _ in range(count)]
    for label in np.unique(y[rows]):
        of = rows[y[rows] == label]
        ends = np.round(np.cumsum(random.dirichlet(np.full(count, alpha))) * len(of)).astype(np.int64)
        for place, part in enumerate(np.split(of, ends[:-1])):
            made[place].append(part)
    return [np.concatenate(part) for part in made]


def _filled(parts: list[Rows]) -> list[Rows]:
    """Return the parts with at least one sample each: the longest gives."""
    for place, part in enumerate(parts):
        if not len(part):
            longest = max(range(len(parts)), key=lambda one: len(parts[one]))
            parts[place], parts[longest] = parts[longest][-1:], parts[longest][:-1]
    return parts
