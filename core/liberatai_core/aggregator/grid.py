"""Per-class weights from a grid, its points visited in random order and none twice, see `searches.py`.

Optuna's GridSampler visits a grid in random order too, but writes down all of its points first: four members
and ten classes make 5^40.
"""

import numpy as np

from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.searches import LOWEST, Point, Walk, searched

LEVELS = np.array([LOWEST, 0.25, 0.5, 0.75, 1.0])
"""Values of a raw weight; 0.5 for all is the uniform average, the first trial."""


def grid(trials: int = 50) -> Method:
    """Return the method with this many trials; it needs `log_probs`, `y` and `seed`."""
    return searched(_walk, trials)


def _walk(first: Point, seed: int) -> Walk:
    random = np.random.default_rng(seed)
    seen = {first.tobytes()}
    yield first
    while len(seen) < len(LEVELS) ** first.size:
        point = random.choice(LEVELS, first.size)
        if point.tobytes() not in seen:
            seen.add(point.tobytes())
            yield point
