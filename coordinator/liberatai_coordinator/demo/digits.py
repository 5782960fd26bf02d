"""UCI handwritten digits, split like a fleet would hold them: unevenly, and never the test set.

The skew is that of Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification", arXiv:1909.06335: per class, shares are drawn from Dirichlet(alpha).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import ConfigError, MissingExtraError
from liberatai_core.structure import DataContract

CONTRACT = DataContract(input_shape=(1, 8, 8), classes=10)
TEST_SHARE = 0.2
UNLABELED = 300
VALIDATION = 100
ALPHA = 0.3
"""Dirichlet parameter: at 0.3 a device has plenty of two or three digits and next to none of some others."""
SMALLEST = 20
"""Samples of the poorest device: fewer than one batch would only add noise."""
MAX_DEVICES = 40
"""About 1040 samples are private: beyond 40 devices the smallest share is no longer possible."""
DRAWS = 200
"""Splits drawn before the best of them is repaired by hand; eight devices need a few draws."""
BRIGHTEST = 16.0
"""The files hold counts of dark pixels in 4x4 fields."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Inputs (n, 1, 8, 8) float32 in 0 … 1 and labels (n,) int64."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def pick(self, rows: NDArray[np.int64]) -> "Samples":
        """Return these rows."""
        return Samples(self.x[rows], self.y[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Row numbers of the whole set, without overlap.

    Attributes:
        devices: private rows, one array per device.
        unlabeled: public; only their inputs are ever written to a file.
        validation: labelled, held by the operator; the ensemble's guard uses them, nothing trains on them.
        test: only the report sees them.
    """

    devices: tuple[NDArray[np.int64], ...]
    unlabeled: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def load() -> Samples:
    """Return the 1797 digits that ship with scikit-learn (UCI "Optical Recognition of Handwritten Digits").

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - only the demo needs it
    except ImportError as error:
        raise MissingExtraError(
            "the demo's data needs scikit-learn: pip install 'liberatai[demo]'"
        ) from error
    digits = load_digits()
    x = (digits.images / BRIGHTEST).astype(np.float32)[:, None, :, :]
    return Samples(x, digits.target.astype(np.int64))


def split(y: NDArray[np.int64], devices: int, seed: int, alpha: float = ALPHA) -> Split:
    """Return who holds which rows; the same for the same arguments.

    Args:
        y: labels of all rows, shape (n,).
        devices: 1 … 40.
        seed: of the shuffle and of the Dirichlet draws.
        alpha: skew; small is uneven.

    Raises:
        ConfigError: a number of devices that the set cannot serve.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise ConfigError("demo", [f"--devices: must be from 1 to {MAX_DEVICES} (got {devices})"])
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(y))
    cuts = np.cumsum([round(len(y) * TEST_SHARE), UNLABELED, VALIDATION])
    test, unlabeled, validation, private = np.split(rows, cuts)
    shares = _dirichlet(y, private, devices, alpha, rng)
    return Split(tuple(shares), unlabeled, validation, test)


def write(samples: Samples, parts: Split, folder: Path, devices: Sequence[str]) -> dict[str, Path]:
    """Write the files of the data contract and return device name -> private file.

    Every device's file lies in a folder of its own (0700, file 0600). `folder` also gets `unlabeled.npz`
    (inputs only) and `validation.npz`. The test set is not written at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "unlabeled.npz", x=samples.x[parts.unlabeled])
    _save(folder / "validation.npz", samples.pick(parts.validation))
    files = {}
    for device, rows in zip(devices, parts.devices, strict=True):
        private = folder / device
        private.mkdir(mode=0o700, exist_ok=True)
        files[device] = private / "private.npz"
        _save(files[device], samples.pick(rows))
    return files


def _save(path: Path, samples: Samples) -> None:
    np.savez_compressed(path, x=samples.x, y=samples.y)
    path.chmod(0o600)


def _dirichlet(
    y: NDArray[np.int64], rows: NDArray[np.int64], devices: int, alpha: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Return rows per device: at least SMALLEST of at least two classes each."""
    best: list[NDArray[np.int64]] = []
    for _ in range(DRAWS):
        drawn = _draw(y, rows, devices, alpha, rng)
        if not best or min(map(len, drawn)) > min(map(len, best)):
            best = drawn
        if min(map(len, best)) >= SMALLEST and all(len(np.unique(y[own])) > 1 for own in best):
            return [np.sort(own) for own in best]
    return [np.sort(own) for own in _repaired(y, best)]


def _draw(
    y: NDArray[np.int64], rows: NDArray[np.int64], devices: int, alpha: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(devices)]
    for label in np.unique(y):
        own = rows[y[rows] == label]
        cuts = (np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * len(own)).astype(int)
        for part, piece in zip(parts, np.split(own, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _repaired(y: NDArray[np.int64], parts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Move rows from the richest device, a digit the receiver lacks first, until nobody is too poor."""
    while True:
        poor = [place for place, own in enumerate(parts) if len(own) < SMALLEST or len(np.unique(y[own])) < 2]
        if not poor:
            return parts
        taker, giver = poor[0], max(range(len(parts)), key=lambda place: len(parts[place]))
        new = ~np.isin(y[parts[giver]], y[parts[taker]])
        row = int(np.argmax(new))
        parts[taker] = np.append(parts[taker], parts[giver][row])
        parts[giver] = np.delete(parts[giver], row)
