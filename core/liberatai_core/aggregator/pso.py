"""Per-class weights by a particle swarm, see `searches.py`.

Kennedy & Eberhart, "Particle Swarm Optimization", ICNN 1995, with the inertia and the attractions of Clerc &
Kennedy, IEEE Transactions on Evolutionary Computation 2002:

    v <- 0.7298 v + 1.4962 r1 (own best - x) + 1.4962 r2 (swarm's best - x);   x <- x + v
"""

import numpy as np

from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.searches import LOWEST, Point, Walk, searched

PARTICLES = 10
"""Five generations within the paper's 50 trials: fewer particles find less, more learn less."""
INERTIA, ATTRACTION = 0.7298, 1.4962


def pso(trials: int = 50) -> Method:
    """Return the method with this many trials; it needs `log_probs`, `y` and `seed`."""
    return searched(_walk, trials)


def _walk(first: Point, seed: int) -> Walk:
    random = np.random.default_rng(seed)
    places = random.uniform(LOWEST, 1.0, (PARTICLES, first.size))
    places[0] = first
    speeds = random.uniform(-0.5, 0.5, places.shape)
    bests, scores = places.copy(), np.full(PARTICLES, -np.inf)
    while True:
        for one in range(PARTICLES):
            score = yield places[one].copy()
            if score > scores[one]:
                bests[one], scores[one] = places[one], score
        leader = bests[int(np.argmax(scores))]
        own, all_ = random.random((2, *places.shape))
        speeds = INERTIA * speeds + ATTRACTION * (own * (bests - places) + all_ * (leader - places))
        moved = places + speeds
        places = np.clip(moved, LOWEST, 1.0)
        # A particle that ran into the wall stands still there: it would press against it for ever.
        speeds = np.where(places == moved, speeds, 0.0)
