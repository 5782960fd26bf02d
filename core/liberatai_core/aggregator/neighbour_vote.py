"""Neighbour vote: who is nobody's neighbour does not count.

Every device votes for the n - f differences nearest to its own, by angle; the f with the fewest votes are
left out. It joins the neighbourhoods of Allouah et al. (AISTATS 2023, arXiv:2302.01772, see `nnm`) with the
selection of Blanchard et al. (Multi-Krum, NeurIPS 2017, arXiv:1703.02757), and differs from both in two
points that sparse updates of unlike devices ask for:

- Angles, not distances. Honest updates of unlike devices are long and far apart, so a short hostile one
  (inner product manipulation, arXiv:1903.03936) is everybody's nearest neighbour; by angle it is nobody's.
- The votes of all, not a sum of distances. A handful of twins (a backdoor) is near to itself only.

The price: f honest updates are left out in every round in which nobody is hostile.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.nnm import neighbours

Doubles = NDArray[np.float64]


def elected(products: Doubles, f: int) -> NDArray[np.bool_]:
    """Return who counts: n - f of them, shape (devices,).

    Args:
        products: scalar products of all pairs of differences, shape (devices, devices).
        f: devices that are left out; of those with equally many votes the ones that come last.
    """
    lengths = np.sqrt(np.diag(products))
    scale = np.where(lengths > 0, lengths, 1.0)
    votes = neighbours(products / scale[:, None] / scale[None, :], f).sum(axis=0)
    first = np.argsort(-votes, kind="stable")[: len(votes) - f]
    found = np.zeros(len(votes), dtype=np.bool_)
    found[first] = True
    return found
