"""Which of the devices that are ready take part, where a round asks for fewer. Pure: values in, names out.

| how | who |
|---|---|
| `random` | a seeded draw |
| `fair` | those that were invited least often, ties by a seeded hash: everybody gets its turn |
| `utility` | those from whom the model learns most per time, and a share for those it knows least about |

`utility` follows Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection", OSDI
2021, arXiv:2010.06081: samples times loss of a device's last update, cut at a high quantile of all devices,
put on a scale of 0 … 1, plus a bonus that grows with the rounds since; times (T / t)^2 for devices that take
longer (t) than preferred (T). Two things differ. Oort takes the root of the mean squared loss of single
samples; devices here tell only the mean loss, which is a sum and gives away less. And the share that Oort
spends on devices that were never tried goes to those invited least often: it never ends, so that no device
starves and a liar cannot take all places.

Loss and samples are a device's own word: samples are capped, and the quantile takes what exceeds the others'.
The duration is the coordinator's own measurement.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from liberatai_coordinator.config import Select

CLIP_QUANTILE = 0.95
"""Of the utilities, above which they count as it (Oort, section 4.2)."""
CUT_OFF = 0.95
"""Who has this much of the utility of the last one that would be taken may be drawn, too (Oort)."""
EXPLORE_FIRST, EXPLORE_LEAST, EXPLORE_DECAY = 0.9, 0.2, 0.98
"""Share of the places for little-known devices: from .9 down to .2, by 2 % per round (Oort)."""
STALENESS_BONUS = 0.1
"""In sqrt(bonus * log(round) / last round) (Oort)."""
SLOW_POWER = 2.0
"""How strongly slowness counts (Oort's alpha)."""
PREFERRED_QUANTILE = 0.8
"""The slowest fifth counts less even if it keeps the deadline: the round waits for it."""


class Past(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What is known of a device in a job.

    Attributes:
        invited: times.
        round: of its last counted update; 0: none.
        loss: mean training loss that came with it, None: it told none.
        samples: that it told.
        seconds: from its invitation to its update, by the coordinator's clock.
    """

    invited: int = 0
    round: int = 0
    loss: float | None = None
    samples: int = 0
    seconds: float = 0.0


class History(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What is known of all devices of a job up to and including a round."""

    round: int = 0
    devices: dict[str, Past] = {}


def choose(
    how: Select,
    ready: Sequence[str],
    wanted: int,
    *,
    past: Mapping[str, Past],
    seed: int,
    number: int,
    sample_cap: int,
    preferred_s: float,
) -> list[str]:
    """Return `wanted` of the devices that are ready, in their order; the same for equal arguments.

    Args:
        how: see the table of this module.
        ready: device names, each once.
        wanted: at most as many as are ready.
        past: by device; who is missing is new.
        seed: of this round's draw.
        number: the round, 1 …
        sample_cap: most samples that a device counts for.
        preferred_s: T above, at most; the slowest fifth may lower it.
    """
    draw = np.random.default_rng(seed)
    if how == "random":
        return [
            ready[place] for place in sorted(draw.choice(len(ready), size=wanted, replace=False).tolist())
        ]
    known = {name: past.get(name, Past()) for name in ready}
    turn = sorted(ready, key=lambda name: (known[name].invited, _hash(seed, name)))
    if how == "fair":
        chosen = set(turn[:wanted])
    else:
        worth = _worth(known, number, sample_cap, preferred_s)
        share = max(EXPLORE_LEAST, EXPLORE_FIRST * EXPLORE_DECAY ** (number - 1))
        # Half a place is one in every second round, not none.
        explored = min(wanted, math.floor(share * wanted + draw.random()))
        best = _best(worth, min(len(worth), wanted - explored), draw)
        rest = [name for name in turn if name not in best]
        chosen = {*best, *rest[: wanted - len(best)]}
    return [name for name in ready if name in chosen]


def _best(worth: Mapping[str, float], wanted: int, draw: np.random.Generator) -> set[str]:
    """Draw from those near the top, in proportion to what they are worth."""
    if wanted == 0:
        return set()
    names = sorted(worth, key=lambda name: (-worth[name], name))
    least = CUT_OFF * worth[names[wanted - 1]]
    top = [name for name in names if worth[name] >= least]
    # A little more than nothing, so that equals at zero can be drawn.
    weights = np.array([worth[name] for name in top]) + 1e-12
    return set(draw.choice(top, size=wanted, replace=False, p=weights / weights.sum()).tolist())


def _worth(known: Mapping[str, Past], number: int, sample_cap: int, preferred_s: float) -> dict[str, float]:
    """Return what every device is worth that has been counted before, at least 0."""
    tried = {name: one for name, one in known.items() if one.round > 0}
    if not tried:
        return {}
    useful = {name: _statistical(one, sample_cap) for name, one in tried.items()}
    ceiling = _quantile(list(useful.values()), CLIP_QUANTILE)
    floor = min(useful.values())
    span = max(ceiling - floor, 1e-12)
    preferred_s = min(preferred_s, _quantile([one.seconds for one in tried.values()], PREFERRED_QUANTILE))
    worth = {}
    for name, one in tried.items():
        scaled = (min(useful[name], ceiling) - floor) / span
        bonus = math.sqrt(STALENESS_BONUS * math.log(max(number, 1)) / min(one.round, max(number, 1)))
        slow = one.seconds > preferred_s > 0
        worth[name] = (scaled + bonus) * ((preferred_s / one.seconds) ** SLOW_POWER if slow else 1.0)
    return worth


def _statistical(one: Past, sample_cap: int) -> float:
    """Return samples times loss; what is no loss is worth nothing."""
    if one.loss is None or not math.isfinite(one.loss) or one.loss < 0:
        return 0.0
    return min(one.samples, sample_cap) * one.loss


def _quantile(values: Sequence[float], share: float) -> float:
    """Return a value that about this share lies below; of 2 to 20 the second largest at most.

    So no single liar sets it.
    """
    return sorted(values)[math.floor(share * (len(values) - 1))]


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}|{name}".encode()).digest()
