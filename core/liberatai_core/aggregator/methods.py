"""The ways to find an ensemble's weights, by name."""

from collections.abc import Callable

from liberatai_core.aggregator.by_samples import by_samples
from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.gp import gp
from liberatai_core.aggregator.grid import grid
from liberatai_core.aggregator.label_free import label_free
from liberatai_core.aggregator.majority_vote import majority_vote
from liberatai_core.aggregator.pso import pso
from liberatai_core.aggregator.random_search import random_search
from liberatai_core.aggregator.smac import smac
from liberatai_core.aggregator.stacking import FEW_LABELS, stacking
from liberatai_core.aggregator.tpe import tpe
from liberatai_core.aggregator.uniform import uniform

TRIALS = 50
"""The budget of the original method."""

SEARCHES: dict[str, Callable[[int], Method]] = {
    "grid": grid,
    "random": random_search,
    "pso": pso,
    "gp": gp,
    "tpe": tpe,
    "smac": smac,
}
"""The six black-box searches of the original method: trials -> method."""

ENSEMBLES: dict[str, Method] = {
    "uniform": uniform,
    "majority_vote": majority_vote,
    "by_samples": by_samples,
    "label_free": label_free,
    "stacking": stacking,
    **{name: search(TRIALS) for name, search in SEARCHES.items()},
}
"""All methods, the searches with the original budget."""

LABELLED = frozenset({"stacking", *SEARCHES})
"""Methods that need labelled validation data."""
COUNTED = frozenset({"by_samples", "label_free"})
"""Methods that have nothing to go by without class counts."""


def method_of(name: str, trials: int = TRIALS) -> Method:
    """Return a method by name, a search with so many trials.

    Raises:
        KeyError: no such method.
        ValueError: trials of a search out of 1 … 2000.
    """
    return SEARCHES[name](trials) if name in SEARCHES else ENSEMBLES[name]


def chosen(asked: str, *, labels: int, counted: bool) -> str:
    """Return the name of the method that is really used.

    "auto" is stacking with enough labels, else the rule without labels. Stacking with too few labels hands
    over to that rule as well, and a rule that has nothing to go by to the uniform average.

    Args:
        asked: a name of `ENSEMBLES`, or "auto".
        labels: labelled samples that the weights may be fitted to.
        counted: whether class counts are known.
    """
    if asked in ("auto", "stacking"):
        asked = "stacking" if labels >= FEW_LABELS else "label_free"
    return "uniform" if asked in COUNTED and not counted else asked


def replaced(asked: str, used: str, *, labels: int, counted: bool) -> str:
    """Return, for people, why another method than the one asked for is used; "" if it is the one.

    Args:
        asked: a name of `ENSEMBLES`, or "auto", which promises nothing.
        used: what `chosen` returned for the rest.
        labels: as of `chosen`.
        counted: as of `chosen`.
    """
    if asked in ("auto", used):
        return ""
    lacks = []
    if asked == "stacking":
        lacks.append(f"stacking needs {FEW_LABELS} labels to find weights, {labels} are there")
    if used == "uniform" and not counted:
        lacks.append("no device told class counts (share_class_counts)")
    return f"; {used} instead of {asked}: {' and '.join(lacks)}"
