"""Per-class weights by the tree-structured Parzen estimator: the original method (ICMLA 2020), the baseline.

Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; Optuna's sampler. What is
searched, and how weights sum to one, stands in `searches.py`.
"""

from typing import TYPE_CHECKING

from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.searches import optuna_search, searched

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


def tpe(trials: int = 50) -> Method:
    """Return the method with this many trials (1 … 2000); the first one is the uniform average.

    The method needs `log_probs`, `y` and `seed`, and the extra [coordinator] (Optuna).
    """
    return searched(optuna_search(_sampler), trials)


def _sampler(seed: int) -> "BaseSampler":
    from optuna.samplers import TPESampler  # noqa: PLC0415 - only where a search runs

    return TPESampler(seed=seed)
