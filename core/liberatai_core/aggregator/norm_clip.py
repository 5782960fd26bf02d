"""Norm clipping: no difference is longer than a multiple of the median length.

Sun et al., "Can You Really Backdoor Federated Learning?", 2019, arXiv:1911.07963 (norm thresholding), with
the median of the round as the yardstick: fewer than half of the devices cannot move it beyond honest lengths.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def clip_factors(norms: Sequence[float], multiple: float) -> NDArray[np.float64]:
    """Return what each difference is multiplied by, in (0, 1], shape (devices,).

    Args:
        norms: lengths of the differences. Those that sent nothing (0) are no yardstick.
        multiple: longest length, in medians.
    """
    lengths = np.asarray(norms, dtype=np.float64)
    sent = lengths[lengths > 0]
    if not sent.size:
        return np.ones(lengths.shape)
    limit = multiple * float(np.median(sent))
    return np.where(lengths > limit, limit / np.where(lengths > 0, lengths, 1.0), 1.0)
