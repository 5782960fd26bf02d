"""What a late update counts for: FedBuff's polynomial damping.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639,
with the damping of Xie et al., "Asynchronous Federated Optimization" (FedAsync), arXiv:1903.03934, exponent
1/2. As in the paper the difference itself is shortened and the divisor of the mean is not, so that a version
of late updates only is a small step. Every rule, robust or not, then sees the shortened difference.

Measured against staleness as a relative weight (`benchmarks/stragglers.py`: digits, label skew 0.3, two of
ten devices ten times slower, 150 updates, one seed): two updates per version reach 96.0 % against 77.9 %,
four 96.4 % against 95.9 %; with one the relative weight means nothing, and training fails.
"""

import math

import numpy as np

from liberatai_core.errors import SchemaError
from liberatai_core.weights import Vector


def damping(staleness: int) -> float:
    """Return 1 / sqrt(1 + staleness), as a float32 holds it.

    Args:
        staleness: versions that were made between the one an update started from and the one that it goes
            into, 0 …

    Raises:
        SchemaError: it is negative.
    """
    if staleness < 0:
        raise SchemaError(f"staleness {staleness}: an update cannot start from a later version")
    return float(np.float32(1.0 / math.sqrt(1.0 + staleness)))


def damped(difference: Vector, staleness: int) -> Vector:
    """Return a difference, shape (parameters,), float32, times `damping`; a fresh one stays as it is.

    Both roots and the product are correctly rounded (IEEE 754), so the bytes are the same everywhere.

    Raises:
        SchemaError: the staleness is negative.
    """
    factor = damping(staleness)
    return difference if factor == 1.0 else difference * np.float32(factor)
