"""What the encoder of a sparse stream chooses: runs, their laws, and whether signs are modelled."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.sparsifier.stream import Integers
from liberatai_core.sparsifier.tables import (
    CLASSES,
    EXPLICIT,
    GEOMETRIC,
    IMPLIED_LAW,
    LONGEST,
    MAX_RUNS,
    NEAR,
    NEVER,
    Plan,
    implied,
    shares_of,
    weights_of,
)

_PIECES = 512
"""A group with a smaller share of the non-zeros is no piece of its own: bounds the encoder's search."""
_RUN_HEAD, _SIGNED_RUN_HEAD, _SIGN_HEAD = 32, 56, 40
"""Bits in the stream for a run (table and count), for one with sign statistics, for modelled signs."""
_COST = 8
"""Fractional bits of estimated costs: integers in float64, so sums are the same on every machine."""
_COARSE = 4
_SCALES = 256


def _cost(weights: Integers) -> NDArray[np.int16]:
    """Return the bits that each class costs, times 2^8; unlikely ones cost what `rans.normalise` grants."""
    share = (weights << 6) + (1 << 20)
    bits = rans.log2(share.sum(keepdims=True)) - rans.log2(share)
    return (bits + (1 << rans.FRACTION - _COST - 1) >> rans.FRACTION - _COST).astype(np.int16)


@lru_cache(4096)
def _law_cost(law: bytes) -> NDArray[np.int16]:
    return _cost(shares_of(law))


@lru_cache(1)
def _coarse() -> tuple[list[bytes], NDArray[np.int16]]:
    """Return laws on a coarse grid and their costs, shape (laws, classes)."""
    laws = [bytes([s, c]) for s in range(GEOMETRIC + 1) for c in range(0, _SCALES, _COARSE)]
    return laws, np.stack([_cost(shares_of(law)) for law in laws])


def best_law(histogram: Integers) -> tuple[bytes, float]:
    """Return the best table for a histogram over all classes, and its cost: bits x 2^8 with the table."""
    used = int(np.flatnonzero(histogram)[-1]) + 1
    weights = histogram[:used].astype(np.float64)
    laws, costs = _coarse()
    # Integers in float64: sums are the same on every machine.
    shape, scale = laws[int(np.argmin(costs[:, :used].astype(np.float64) @ weights))]
    near = range(max(scale - _COARSE + 1, 0), min(scale + _COARSE, _SCALES))
    candidates = [bytes([shape, c]) for c in near]
    sums = np.stack([_law_cost(law)[:used] for law in candidates]).astype(np.float64) @ weights
    best, least = candidates[int(np.argmin(sums))], float(sums.min()) + (16 << _COST)
    table = _explicit(histogram[:used])
    cost = float(_cost(weights_of(table)).astype(np.float64) @ weights)
    cost += 8 * len(table) << _COST
    return (table, cost) if cost < least else (best, least)


def _explicit(histogram: Integers) -> bytes:
    """Return a table with the share of every class; the last class of the histogram occurs."""
    counts = histogram
    bits = rans.log2(counts.sum(keepdims=True)) - rans.log2(np.maximum(counts, 1))
    codes = np.minimum((bits + (1 << rans.FRACTION - 4)) >> rans.FRACTION - 3, NEVER - 1)
    return bytes([EXPLICIT, counts.size - 1]) + np.where(counts > 0, codes, NEVER).astype(np.uint8).tobytes()


@lru_cache(1)
def _share_costs() -> NDArray[np.float64]:
    """Return bits x 2^8 of a change and of none, shape (255, 2), for shares of 1 ... 255 in 256."""
    shares = np.arange(1, 256)
    bits = (8 << rans.FRACTION) - rans.log2(np.stack([shares, 256 - shares], axis=1))
    return np.asarray((bits + (1 << rans.FRACTION - _COST - 1)) >> rans.FRACTION - _COST, np.float64)


def choose(symbols: rans.Symbols, groups: Integers, parameters: int) -> Plan:
    """Return the gap tables: neighbouring pieces of the row are joined as long as that saves bytes.

    Args:
        symbols: 2 x gap class + (does the sign change?), shape (k,).
        groups: non-zeros per group.
        parameters: size of the structure.
    """
    ends = _pieces(groups)
    sizes = np.diff(ends, prepend=0)
    both = np.stack(
        [np.bincount(part, minlength=2 * CLASSES) for part in np.split(symbols, ends[:-1])]
    ).reshape(sizes.size, CLASSES, 2)
    histograms = both.sum(axis=2)
    kinds = np.add.reduceat(both, [0, 1, NEAR], axis=1)
    # Cost of every piece under every law and share: those of a run are the sums over its pieces.
    change_costs = kinds[:, :, ::-1].astype(np.float64) @ _share_costs().T
    # Signs are modelled in all runs or in none: the choice is made for one run.
    modelled = float(change_costs.sum(axis=0).min(axis=1).sum())
    # Raw signs pay for lanes; without them a lane may have to be paid for, gaps and magnitudes alike.
    lanes = 2 * rans.STATE_BITS * symbols.size // LONGEST
    signs = modelled + (_SIGN_HEAD + lanes << _COST) < symbols.size << _COST
    used = int(np.flatnonzero(histograms.any(axis=0))[-1]) + 1
    law_costs = histograms[:, :used].astype(np.float64) @ _coarse()[1][:, :used].T.astype(np.float64)
    runs = _joined(law_costs, change_costs if signs else None)
    counts, laws, changes = [], [], []
    for first, last in zip(runs, [*runs[1:], sizes.size], strict=True):
        counts.append(int(sizes[first:last].sum()))
        histogram = histograms[first:last].sum(axis=0)
        law, cost = best_law(histogram)
        if len(runs) == 1 and _cost(implied(symbols.size, parameters)) @ histogram <= cost:
            law = IMPLIED_LAW
        laws.append(law)
        shares = change_costs[first:last].sum(axis=0).argmin(axis=1) + 1
        changes.append(tuple(shares.tolist()) if signs else ())
    return Plan(counts, laws, changes, signs)


def _pieces(groups: Integers) -> Integers:
    """Return ends of the pieces that runs are made of: groups, small ones joined, large ones cut."""
    total = int(groups.sum())
    least, small = max(total // MAX_RUNS, 64), max(total // _PIECES, 32)
    ends, last = [], 0
    for end in np.cumsum(groups).tolist():
        size = end - last
        if size < small and end != total:
            continue
        parts = max(size // least, 1)
        ends += [last + size * part // parts for part in range(1, parts + 1)]
        last = end
    return np.array(ends, np.int64)


def _joined(law_costs: NDArray[np.float64], change_costs: NDArray[np.float64] | None) -> list[int]:
    """Return the first piece of every run: neighbours are joined, best first, while that saves anything.

    Args:
        law_costs: bits x 2^8, shape (pieces, laws).
        change_costs: the same for shares of sign changes, shape (pieces, 3, shares).
    """
    head = (_RUN_HEAD if change_costs is None else _SIGNED_RUN_HEAD) << _COST

    def cost(laws: NDArray[np.float64], changes: NDArray[np.float64] | None) -> float:
        return float(laws.min()) + head + (0 if changes is None else float(changes.min(axis=1).sum()))

    def pair(left: int) -> float:
        both = None if changes is None else changes[left] + changes[left + 1]
        return costs[left] + costs[left + 1] - cost(laws[left] + laws[left + 1], both)

    firsts, laws = list(range(len(law_costs))), list(law_costs)
    changes = None if change_costs is None else list(change_costs)
    costs = [cost(row, None if changes is None else changes[at]) for at, row in enumerate(laws)]
    savings = [pair(left) for left in range(len(laws) - 1)]
    while savings:
        best = max(range(len(savings)), key=savings.__getitem__)
        if savings[best] <= 0 and len(firsts) <= MAX_RUNS:
            break
        costs[best : best + 2] = [costs[best] + costs[best + 1] - savings[best]]
        laws[best : best + 2] = [laws[best] + laws[best + 1]]
        if changes is not None:
            changes[best : best + 2] = [changes[best] + changes[best + 1]]
        del firsts[best + 1], savings[best]
        for left in (best - 1, best):
            if 0 <= left < len(savings):
                savings[left] = pair(left)
    return firsts
