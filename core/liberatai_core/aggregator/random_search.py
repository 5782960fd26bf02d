"""Per-class weights by random search (Bergstra & Bengio, JMLR 2012); Optuna's sampler, see `searches.py`."""

from typing import TYPE_CHECKING

from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.searches import optuna_search, searched

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


def random_search(trials: int = 50) -> Method:
    """Return the method with this many trials; it needs what `tpe` needs."""
    return searched(optuna_search(_sampler), trials)


def _sampler(seed: int) -> "BaseSampler":
    from optuna.samplers import RandomSampler  # noqa: PLC0415 - only where a search runs

    return RandomSampler(seed=seed)
