"""How the density of the rounds and the worth of an old residual change over time.

Warm-up: Lin et al., "Deep Gradient Compression", ICLR 2018, arXiv:1712.01887, where the density falls
exponentially over the first rounds, because early differences are large and point everywhere.

Staleness: with partial participation a residual speaks about weights that have moved on since. It is worth
rho per round away, and nothing beyond a limit.
"""

import math


def density_at(number: int, rounds: int, density: float, warmup_rounds: int, factor: float) -> float:
    """Return the density of one round: factor x density in round 1, falling geometrically to density.

    Args:
        number: the round, from 1.
        rounds: rounds of the job; a longer warm-up ends with them.
        density: fraction of the parameters after the warm-up, in (0, 1].
        warmup_rounds: rounds above `density`; 0: no warm-up.
        factor: how much more the first round sends, at least 1; never more than everything is sent.

    Raises:
        ValueError: an argument is out of range.
    """
    if number < 1 or rounds < 1 or warmup_rounds < 0:
        raise ValueError(f"round {number} of {rounds}, {warmup_rounds} to warm up: rounds count from 1")
    if not 0 < density <= 1 or not factor >= 1:
        raise ValueError(f"density {density} must lie in (0, 1] and factor {factor} be at least 1")
    last = min(warmup_rounds, rounds)
    if number > last:
        return density
    return min(1.0, density * math.pow(factor, 1 - (number - 1) / last))


def decay(rounds_away: int, rho: float, limit: int) -> float:
    """Return what a residual is worth: rho to the power of the rounds away, 0 beyond the limit.

    Args:
        rounds_away: rounds of the job since the device last took part, 0 if it missed none.
        rho: worth per round, in [0, 1]; 1 keeps everything.
        limit: most rounds away that leave anything, at least 0.

    Raises:
        ValueError: an argument is out of range.
    """
    if rounds_away < 0 or limit < 0 or not 0 <= rho <= 1:
        raise ValueError(f"{rounds_away} rounds away, limit {limit}, rho {rho}: wanted >= 0, >= 0, 0 … 1")
    return math.pow(rho, rounds_away) if rounds_away <= limit else 0.0
