"""Screened mean: who stands out, or stands together, does not count.

Three marks of a hostile update, each against what is usual in this round (median and median absolute
deviation, so that a minority cannot move the yardstick):

- it points elsewhere: its median cosine to the others is low (label flips, sign flips, inner product
  manipulation, arXiv:1903.03936);
- it has accomplices: its f - 1 nearest others are much nearer to it than the rest (backdoors, "a little is
  enough", arXiv:1902.06156). Fung et al., "The Limitations of Federated Learning in Sybil Settings"
  (FoolsGold, RAID 2020, arXiv:1808.04866): those who want the same thing send the same thing;
- it is long (noise, enlarged updates).

At most f updates are left out, and none that does not stand out: an honest round usually loses nobody.

The price: f or fewer devices with the same rare data look like accomplices, and are left out.
"""

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

USUAL = 3.0
"""Deviations that nobody is left out for, of a normal distribution with the round's median absolute one."""
_NORMAL = 1.4826
"""Deviation of a normal distribution in median absolute deviations."""
_LEAST = 1e-3
"""Smallest deviation that is taken for one: cosines of identical updates differ by rounding only."""


def suspicion(products: Doubles, f: int) -> Doubles:
    """Return by how many deviations every update stands out, shape (devices,); at least 0.

    Args:
        products: scalar products of all pairs of differences, shape (devices, devices), before clipping.
        f: how many may be hostile, at least 1.
    """
    lengths = np.sqrt(np.diag(products))
    scale = np.where(lengths > 0, lengths, 1.0)
    cosines = products / scale[:, None] / scale[None, :]
    # Everybody is nearest to itself: the first column after sorting is left out.
    near = np.sort(np.where(np.eye(len(cosines), dtype=np.bool_), np.inf, cosines), axis=1)[:, -2::-1]
    usual = np.median(near, axis=1)
    together = near[:, : max(1, f - 1)].mean(axis=1) - usual
    known = np.log(np.maximum(scale, np.finfo(np.float64).tiny))
    marks = np.stack([standing_out(-usual), standing_out(together), standing_out(known)])
    return np.asarray(np.maximum(marks.max(axis=0), 0.0))


def passed(products: Doubles, f: int) -> NDArray[np.bool_]:
    """Return whose updates count, shape (devices,): all but the at most f that stand out.

    Args:
        products: see `suspicion`.
        f: see `suspicion`; of equally suspicious ones the first ones count.
    """
    found = np.ones(len(products), dtype=np.bool_)
    if f == 0 or len(products) < 3:
        return found
    marks = suspicion(products, f)
    worst = np.argsort(marks, kind="stable")[len(marks) - f :]
    found[worst] = marks[worst] <= USUAL
    return found


def standing_out(values: Doubles) -> Doubles:
    """Return by how many usual deviations every value lies above the median, shape (devices,)."""
    middle = np.median(values)
    spread = _NORMAL * float(np.median(np.abs(values - middle)))
    return np.asarray((values - middle) / max(spread, _LEAST))
