"""Per-class weights by black-box search: the original method (ICMLA 2020), kept as the baseline.

    y_c(x) = sum_m w[m, c] * p_m(c|x),  sum_m w[m, c] = 1 for every class c

The search maximises accuracy on labelled validation data with the tree-structured Parzen estimator
(Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; Optuna: arXiv:1907.10902).
The paper used 50 trials; how it enforced the normalisation is open: here raw weights are divided by their
sum.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import Evidence, FloatArray, Method, Pool, accuracy, combine, labelled
from liberatai_core.errors import MissingExtraError

MAX_TRIALS = 2000
"""The sampler's time grows with the square of the trials: 2000 take minutes."""
LOWEST = 1e-3
"""Smallest raw weight: keeps every sum of a class above zero."""


def tpe(trials: int = 50) -> Method:
    """Return the method with this many trials (1 … 2000); the first one is the uniform average.

    The method needs `log_probs`, `y` and `seed`, and the extra [coordinator] (Optuna).
    """
    if not 1 <= trials <= MAX_TRIALS:
        raise ValueError(f"trials must be 1 to {MAX_TRIALS}, not {trials}")

    def search(evidence: Evidence) -> Pool:
        log_probs, y = labelled(evidence)
        return Pool(weights=_search(log_probs, y, trials, evidence.seed), kind="linear")

    return search


def _search(log_probs: FloatArray, y: NDArray[np.int64], trials: int, seed: int) -> NDArray[np.float64]:
    try:
        import optuna  # noqa: PLC0415  (the other methods work without it)
    except ImportError as error:
        raise MissingExtraError("optuna is not installed: pip install 'liberatai[coordinator]'") from error
    members, _, classes = log_probs.shape
    names = [f"w{m}_{c}" for m in range(members) for c in range(classes)]

    def weights(raw: list[float]) -> NDArray[np.float64]:
        table = np.array(raw).reshape(members, classes)
        normal: NDArray[np.float64] = table / table.sum(axis=0, keepdims=True)
        return normal

    def objective(trial: "optuna.Trial") -> float:
        raw = [trial.suggest_float(name, LOWEST, 1.0) for name in names]
        return accuracy(combine(log_probs, weights(raw), kind="linear"), y)

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        study.enqueue_trial(dict.fromkeys(names, 0.5))
        study.optimize(objective, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(before)
    return weights([study.best_params[name] for name in names])
